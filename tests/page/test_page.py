"""The page of an agent in a real browser, with agents that are made up: every state it has to be right about."""

import unittest

import stub
from shown import expected, misspelt, seen
from webdriver import Browser, needs_browser

SHOWN = "return window.aquiferShown !== null && document.body.dataset.link === 'good'"
SWARM = "return document.querySelector('.swarm svg[data-buckets]') !== null"

# The contrast of each piece of text with what is behind it, by the formula of WCAG 2.
CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const colour = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
const light = ([r, g, b]) => { const [x, y, z] = [r, g, b].map((c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }); return 0.2126 * x + 0.7152 * y + 0.0722 * z; };
const behind = (e) => { for (; e; e = e.parentElement) { const c = colour(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; } return [255, 255, 255, 255]; };
const poor = []; let looked = 0;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let t = walker.nextNode(); t; t = walker.nextNode()) {
  const e = t.parentElement;
  if (!t.data.trim() || ['SCRIPT', 'STYLE'].includes(e.tagName) || !e.checkVisibility() || e.closest('.unseen')) continue;
  const a = light(colour(getComputedStyle(e).color)), b = light(behind(e));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  looked += 1;
  if (ratio < 4.5) poor.push([t.data.trim().slice(0, 40), e.className, ratio.toFixed(2)]);
}
return {poor, looked};
"""

# What a checker of accessibility would look for first.
STRUCTURE = """
const wrong = [];
const named = (e) => (e.getAttribute('aria-label') || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent || e.textContent).trim();
for (const e of document.querySelectorAll('button, [role=gridcell], [role=grid], [role=img], [role=region], section:not(.zone), dialog, [tabindex="0"]')) if (e.checkVisibility() && !named(e)) wrong.push('no name: ' + e.outerHTML.slice(0, 90));
for (const e of document.querySelectorAll('th')) if (!['col', 'row'].includes(e.scope)) wrong.push('th without scope: ' + e.textContent);
for (const e of document.querySelectorAll('table')) if (!e.caption && !e.closest('[aria-label],[aria-labelledby],dialog')) wrong.push('a table without a name');
let level = 0;
for (const e of document.querySelectorAll('h1,h2,h3,h4')) { if (!e.checkVisibility()) continue; const n = +e.tagName[1]; if (n > level + 1) wrong.push(`h${n} after h${level}: ${e.textContent}`); level = n; }
const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
if (new Set(ids).size !== ids.length) wrong.push('an id twice');
for (const e of document.querySelectorAll('[aria-labelledby]')) if (!document.getElementById(e.getAttribute('aria-labelledby'))) wrong.push('labelled by nothing');
if (document.querySelectorAll('[role=gridcell][tabindex="0"]').length !== 1) wrong.push('not one cell to tab to');
for (const e of document.querySelectorAll('[role=gridcell]')) if (!e.closest('[role=row]')) wrong.push('a cell outside a row');
for (const [what, n] of [['header', 1], ['main', 1], ['footer', 1], ['h1', 1]]) if (document.querySelectorAll(`body > ${what}, body > header > ${what}`).length !== n) wrong.push(`not one ${what}`);
if (!document.documentElement.lang || !document.title) wrong.push('no language or no title');
if (document.querySelectorAll('[style]:not(#grid):not(.level):not(.phases span)').length) wrong.push('style in the markup');
return wrong;
"""

WIDE = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"


@needs_browser
class PageTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.browser = Browser()

    @classmethod
    def tearDownClass(cls):
        cls.browser.close()

    def setUp(self):
        self.browser.media()
        self.browser.size(1440, 1000)
        self.stubs = []
        self.quiet = True

    def tearDown(self):
        if self.stubs:
            said = [line["message"] for line in self.browser.log() if line["level"] in ("SEVERE", "WARNING")]
            broken = self.browser.run("return window.violations ?? []")
            # So that what it asks next is not asked of the next test's agent.
            self.browser.open("about:blank")
            for agent in self.stubs:
                agent.close()
            self.browser.log()
            if self.quiet:
                self.assertEqual(said, [])
            self.assertEqual(broken, [])

    def open(self, state, swarm=True):
        agent = stub.Stub(state)
        self.stubs.append(agent)
        self.browser.open(agent.url)
        self.browser.run(
            "window.violations = []; document.addEventListener('securitypolicyviolation', (e) => window.violations.push(e.violatedDirective + ' ' + e.blockedURI))"
        )
        self.browser.run("try { localStorage.removeItem('aquifer-theme') } catch {}")
        self.browser.until(SHOWN, "the page shows a status")
        if swarm:
            self.browser.until(SWARM, "the page shows the swarm")
        return agent

    def words(self, selector):
        return self.browser.run("return document.querySelector(arguments[0]).innerText", selector)

    def seen(self):
        return seen(self.browser)

    def focused(self):
        return self.browser.run("const e = document.activeElement; return e.dataset.node ?? e.dataset.rack ?? e.id")

    # ---- numbers ----

    def check_numbers(self, agent):
        """What the page shows is what it says it was given, and that is what was given."""
        seen = self.seen()
        status, fields = seen["status"], seen["fields"]
        given = [s for s in agent.given if s["uptime_seconds"] == status["uptime_seconds"]]
        self.assertEqual(given, [status])
        wanted = expected(status)
        self.assertEqual({name: fields.get(name) for name in wanted}, wanted)
        self.assertEqual(misspelt(seen), [])
        return seen

    def test_64_nodes(self):
        agent = self.open(stub.rolling())
        for _ in range(3):
            seen = self.check_numbers(agent)
            self.assertEqual(len(seen["nodes"]), 65)
            reports = [r for p in seen["status"]["peers"] for r in p["rollouts"]] + [
                seen["status"]["channels"][0]["rollout"]
            ]
            phases = {}
            for r in reports:
                phase = r["phase"] if r["seq"] == 12 else "other"
                phases[phase] = phases.get(phase, 0) + 1
            shown = {
                name.split("|")[2]: int(value) for name, value in seen["fields"].items() if "|rollout.phase|" in name
            }
            self.assertEqual(shown, phases)
            self.assertEqual(seen["fields"]["fleet.serving"], "64")
            ready = sum(r["ready"] for r in reports) - 1  # The one that drains is not counted.
            self.assertEqual(seen["fields"]["fleet.ready"], str(ready))
            self.assertEqual(sum(state in ("ready", "older") for state in seen["nodes"].values()), ready)
            # Another second, with other numbers.
            before = seen["status"]["uptime_seconds"]
            agent.state["traffic"]["bytes_in"] += 123_456_789
            agent.state["peers"][9]["rollouts"] = [stub.report("ready")]
            self.browser.until(
                lambda at=before: self.browser.run("return window.aquiferShown.status.uptime_seconds") > at,
                "the next status",
            )
        self.assertEqual(seen["nodes"][stub.node_id(52)], "draining")
        self.assertEqual(seen["nodes"][stub.node_id(64)], "holder")
        self.assertEqual(seen["fields"]["rollout.state"], "going")

    def test_the_swarm_is_asked_for_each_channel_and_drawn(self):
        agent = self.open(stub.gathering())
        self.assertIn(stub.CHANNEL, agent.channels_asked)
        paths = self.browser.run("return Object.fromEntries([...document.querySelectorAll('.swarm svg path')].map((p) => [p.getAttribute('class'), p.getAttribute('d')]))")  # fmt: skip
        parts = agent.state["_swarm"]["buckets"]
        self.assertEqual(paths["k-copies"].count("M"), sum(b["copies"] > 0 for b in parts))
        self.assertEqual(paths["k-have"].count("M"), sum(b["have"] > 0 for b in parts))
        self.assertEqual(paths["k-wanted"].count("M"), len(parts))
        self.assertEqual(paths["k-nobody"].count("M"), sum(b["copies"] == 0 and b["have"] < 1 for b in parts))
        self.assertIn("3 parts of 90 with none known", self.words(".swarm figcaption"))
        self.assertIn("about 27 s", self.words("#hero-why"))
        self.check_numbers(agent)
        self.assertIn(f"release 12 ({stub.NEW[:8]}) on its way: planned", self.words("#hero-with"))

    def test_nodes_that_hold_it_all_count_as_copies(self):
        agent = self.open(stub.rolling() | {"_swarm": stub.swarm(copies=lambda x: 0.0)})
        whole = sum(p["channels"][0] == [stub.CHANNEL, 12, 1201, 1201] for p in agent.state["peers"])
        self.assertGreater(whole, 50)
        agent.state["channels"][0]["chunks_wanted"] = agent.state["channels"][0]["chunks_have"] = 1201
        self.browser.until(
            lambda: self.browser.run("return document.querySelector('.swarm svg').dataset.whole") == str(whole),
            "they are counted",
        )
        self.assertIn(f"{whole}.0 on average", self.words(".swarm figcaption"))

    def test_a_node_says_which_release_it_serves_while_another_comes(self):
        self.open(
            stub.status(
                rollout=stub.report("staged", reason="waits for its turn"),
                peers=[stub.peer(1, "n1", [], [stub.report("ready", seq=11)])],
            )
        )
        self.assertEqual(self.words("#hero-with"), f"prod/model, release 11 ({stub.OLD[:8]}); release 12 staged")

    def test_bytes_are_written_in_one_way(self):
        self.open(stub.alone())
        cases = [
            [0, "0 B"],
            [1023, "1023 B"],
            [1024, "1.0 KiB"],
            [1048575, "1.0 MiB"],
            [5 << 30, "5.0 GiB"],
            [1 << 62, "4096.0 PiB"],
            [12.4, "12 B"],
        ]
        self.assertEqual(self.browser.run("return arguments[0].map(([n]) => [n, bytes(n)])", [c for c in cases]), cases)
        self.assertEqual(
            self.browser.run("return [0.4, 119.9, 120, 7200, 1e6].map(seconds)"),
            ["0 s", "119 s", "2 min", "2 h", "11 d"],
        )

    # ---- states ----

    def test_one_node(self):
        agent = self.open(stub.alone())
        seen = self.check_numbers(agent)
        self.assertEqual(list(seen["nodes"].values()), ["ready"])
        self.assertEqual((seen["fields"]["fleet.ready"], seen["fields"]["fleet.serving"]), ("1", "1"))
        self.assertIn("no other node is known", self.words("#hero-fleet"))
        self.assertIn("release 12", self.words("#hero-with"))
        self.assertIn("Rolled out", self.words("#hero-rollout"))
        events = self.browser.run("return [...document.querySelectorAll('#events li')].map((e) => e.dataset.event)")
        self.assertEqual(events, ["activated", "hydrated", "heard", "engine-joined", "joined"])

    def test_nothing_at_all(self):
        self.open(stub.nothing(), swarm=False)
        self.assertIn("Not ready", self.words("#hero-node"))
        self.assertIn("no engine has registered yet", self.words("#hero-why"))
        self.assertIn("follows no channel", self.words("#hero-with"))
        self.assertIn("No engine is registered here", self.words("#no-engines"))
        self.assertIn("This node follows no channel yet", self.words("#no-channels"))
        self.assertIn("no engines anywhere", self.words("#fleet-with"))
        self.assertIn("Nothing has happened", self.words("#no-events"))

    def test_no_release(self):
        self.open(stub.unreleased(), swarm=False)
        self.assertIn("No release yet", self.words("#hero-rollout"))
        self.assertIn("no release is known yet", self.words(".channel"))

    def test_an_empty_checkpoint_and_a_problem(self):
        agent = self.open(stub.empty(), swarm=False)
        self.check_numbers(agent)
        self.assertIn("the store is full", self.words(".channel .problem"))
        self.assertIn("the store is full", self.words("#attention"))
        self.assertNotIn("NaN", self.words("body"))

    def test_a_failed_check_says_why(self):
        self.open(stub.failing())
        self.assertIn("gpu-b1-06: the engine's check failed: perplexity 41.2", self.words("#attention"))
        self.assertEqual(self.seen()["nodes"][stub.node_id(37)], "failed")
        self.assertIn("Failed", self.words("#hero-rollout"))

    def test_1000_nodes_are_shown_by_rack_and_the_page_keeps_up(self):
        self.open(stub.thousand())
        self.assertEqual(
            self.browser.run("return [...document.querySelectorAll('#grid [data-rack]')].map((e) => +e.dataset.value)"),
            [40] * 25,
        )
        self.assertEqual(self.words("#hero-fleet .big").split(), ["999", "of", "1,000"])
        took = self.browser.run(
            "const t = performance.now(); for (let i = 0; i < 10; i += 1) show(window.aquiferShown.status); return (performance.now() - t) / 10"
        )
        print(f"\n    1000 nodes are shown in {took:.1f} ms")
        self.assertLess(took, 200, "milliseconds that a status of 1000 nodes takes")
        self.assertLess(self.browser.run("return document.querySelectorAll('*').length"), 2500)
        self.browser.press("n", "Enter")
        self.assertIn("rack r19", self.words("#detail-title"))
        rows = self.browser.run(
            "return [...document.querySelectorAll('#detail-body tbody tr')].map((e) => e.dataset.state)"
        )
        self.assertEqual((len(rows), rows[0]), (40, "failed"))
        self.browser.press("Tab", "Enter")
        self.browser.until(
            "return document.getElementById('detail').dataset.node !== undefined", "the node's own dialog"
        )
        self.assertIn("n0777", self.words("#detail-title"))

    def test_hostile_names_are_text(self):
        agent = self.open(stub.hostile())
        self.check_numbers(agent)
        for cell in range(9):
            self.browser.run("focusCell(cells[arguments[0]]); openCell(cells[arguments[0]])", cell)
            self.browser.press("Escape")
        strange = "return [window.hit, document.querySelectorAll('img, iframe, a[href^=javascript], article b:not([data-field]), script').length]"
        self.assertEqual(self.browser.run(strange), [None, 1])
        text = self.words("body")
        self.assertIn("<img src=x onerror=alert(1)>", text)
        self.assertIn("a\\u{202e}b\\u{0}c", text)
        self.assertLess(len(text), 20_000)
        self.assertTrue(self.browser.run(WIDE))
        self.browser.size(360, 700)
        self.assertTrue(self.browser.run(WIDE))

    # ---- an agent that goes and comes ----

    def test_an_agent_that_is_gone_is_said_to_be_and_found_again(self):
        agent = self.open(stub.rolling())
        self.quiet = False  # The browser says itself that the connection was refused.
        self.assertTrue(self.browser.run("return document.getElementById('lost').hidden"))
        agent.gone()
        self.browser.until("return document.body.dataset.link === 'lost'", "the page says that the agent is gone")
        self.browser.until(
            "return /Last heard [1-9]\\d* s ago/.test(document.getElementById('lost').innerText)", "how long ago"
        )
        self.assertIn("does not answer", self.words("#lost"))
        self.assertIn("last heard", self.words("#heard"))
        self.assertEqual(
            self.browser.run("return getComputedStyle(document.getElementById('shown')).filter"), "grayscale(1)"
        )
        self.assertEqual(
            self.browser.run("return document.getElementById('live').textContent"), "The agent does not answer."
        )
        self.assertEqual(self.browser.run(CONTRAST)["poor"], [])
        before = self.browser.run("return window.aquiferShown.status.uptime_seconds")
        agent.back()
        self.browser.until("return document.body.dataset.link === 'good'", "the page has found it again")
        self.browser.until(
            lambda: self.browser.run("return window.aquiferShown.status.uptime_seconds") > before, "a new status"
        )
        self.assertTrue(self.browser.run("return document.getElementById('lost').hidden"))
        self.browser.until(lambda: agent.listeners, "it listens for events again")
        agent.say(stub.event(40, "hydrated"))
        self.browser.until("return document.querySelector('#events li').dataset.event === 'hydrated' && document.querySelectorAll('#events [data-id$=\"-40\"]').length === 1", "the event")  # fmt: skip

    def test_events_come_live_once_each_and_progress_is_one_line(self):
        agent = self.open(stub.alone())
        self.browser.until(lambda: agent.listeners, "it listens")
        for n, done in enumerate([10, 40, 90]):
            agent.say(stub.event(10 + n, "hydrating", bytes_done=done << 20, bytes_total=100 << 20, eta_seconds=5.0))
        agent.say(stub.event(5, "activated", engine="vllm-0"))
        self.browser.until(
            "return document.querySelector('#events li').innerText.includes('90% of 100.0 MiB')", "progress"
        )
        self.assertEqual(
            self.browser.run("return document.querySelectorAll('#events [data-event=hydrating]').length"), 1
        )
        self.assertEqual(self.browser.run("return document.querySelectorAll('#events li').length"), 6)
        for n in range(200):
            agent.say(stub.event(100 + n, "peer-joined", peer=stub.node_id(n)))
        self.browser.until("return document.querySelector('#events li').dataset.id.endsWith('-299')", "the last event")
        self.assertEqual(self.browser.run("return document.querySelectorAll('#events li').length"), 100)

    # ---- keys ----

    def test_everything_is_reached_by_keyboard(self):
        self.open(stub.rolling())
        walked = []
        for _ in range(14):
            self.browser.press("Tab")
            walked.append(
                self.focused()
                or self.browser.run("return document.activeElement.className || document.activeElement.tagName")
            )
            if walked[-1] == "BODY":
                break
        self.assertEqual(walked[:4], ["skip", "theme", "keys", stub.node_id(0)])
        self.assertIn("events", walked)
        self.assertIn("engines-scroll", walked)
        # One tab stop for all the nodes; arrows go on from there.
        self.assertEqual(sum(len(stop) == 64 for stop in walked), 1)
        self.browser.press("f")
        self.assertEqual(self.focused(), stub.node_id(0))
        self.browser.press("ArrowRight", "ArrowRight")
        self.assertEqual(self.focused(), stub.node_id(2))
        self.browser.press("ArrowLeft")
        self.assertEqual(self.focused(), stub.node_id(1))
        seen = set()
        for _ in range(12):
            seen.add(self.focused())
            self.browser.press("ArrowDown")
        self.assertGreaterEqual(len(seen), 4, "down leads from rack to rack")
        self.browser.press("End")
        self.assertEqual(self.focused(), stub.node_id(63))
        self.browser.press("Home")
        self.assertEqual(self.browser.run("return cells.indexOf(document.activeElement)"), 0)
        self.assertIn("gpu-a1-01 (this node)", self.words("#hint"))
        self.browser.press("ArrowUp", "ArrowLeft")
        self.assertEqual(self.browser.run("return cells.indexOf(document.activeElement)"), 0)
        self.browser.press("n")
        self.assertEqual(self.browser.run("return document.activeElement.dataset.state"), "updating")

    def test_a_nodes_dialog_opens_with_enter_follows_and_closes_with_escape(self):
        agent = self.open(stub.failing())
        self.browser.run("focusCell(cells.find((c) => c.dataset.node === arguments[0]))", stub.node_id(37))
        self.browser.press("Enter")
        self.assertTrue(self.browser.run("return document.getElementById('detail').open"))
        text = self.words("#detail")
        for part in [
            "gpu-b1-06",
            "perplexity 41.2",
            "zone=b, rack=b1",
            "0 of 2 ready",
            stub.node_id(37),
            "release 12 (",
            "release 11",
        ]:
            self.assertIn(part, text)
        self.assertEqual(self.browser.run(CONTRAST)["poor"], [])
        agent.state["peers"][36]["rollouts"] = [stub.report("ready")]
        self.browser.until(
            "return !document.getElementById('detail').innerText.includes('perplexity')", "the dialog follows"
        )
        agent.state["peers"] = [p for p in agent.state["peers"] if p["node"] != stub.node_id(37)]
        self.browser.until(
            "return document.getElementById('detail').innerText.includes('has left')", "the dialog says that it left"
        )
        self.browser.press("Escape")
        self.assertFalse(self.browser.run("return document.getElementById('detail').open"))
        self.assertTrue(self.browser.run("return document.activeElement.classList.contains('cell')"))
        self.browser.press("?")
        self.assertTrue(self.browser.run("return document.getElementById('help').open"))
        self.browser.press("Escape")
        self.assertFalse(self.browser.run("return document.getElementById('help').open"))

    def test_focus_stays_while_the_page_renews_itself(self):
        self.open(stub.rolling())
        self.browser.press("f", "ArrowRight", "ArrowRight", "ArrowRight")
        at, uptime = self.focused(), self.browser.run("return window.aquiferShown.status.uptime_seconds")
        self.browser.until(
            lambda: self.browser.run("return window.aquiferShown.status.uptime_seconds") > uptime + 1.5,
            "two more statuses",
        )
        self.assertEqual(self.focused(), at)

    # ---- looks ----

    def test_the_theme_is_the_systems_until_it_is_chosen_and_then_kept(self):
        paper = "return getComputedStyle(document.body).backgroundColor"
        agent = self.open(stub.alone())
        light = self.browser.run(paper)
        self.browser.media(dark=True)
        dark = self.browser.run(paper)
        self.assertNotEqual(light, dark)
        self.browser.press("t")
        self.assertEqual((self.browser.run(paper), self.words("#theme")), (light, "Theme: light"))
        self.browser.open(agent.url)
        self.browser.until(SHOWN, "the page shows a status")
        self.assertEqual((self.browser.run(paper), self.words("#theme")), (light, "Theme: light"))
        self.browser.media(dark=False)
        self.browser.click("#theme")
        self.assertEqual((self.browser.run(paper), self.words("#theme")), (dark, "Theme: dark"))
        self.browser.press("t")
        self.assertEqual((self.browser.run(paper), self.words("#theme")), (light, "Theme: system"))

    def test_text_can_be_read_in_both_themes(self):
        for state in [stub.failing(), stub.gathering(), stub.thousand(), stub.empty(), stub.nothing()]:
            self.open(state, swarm=False)
            for dark in [False, True]:
                self.browser.media(dark=dark)
                seen = self.browser.run(CONTRAST)
                self.assertEqual(seen["poor"], [], f"dark: {dark}")
                self.assertGreater(seen["looked"], 40)

    def test_structure_for_those_who_listen(self):
        for state in [stub.failing(), stub.thousand(), stub.alone(), stub.nothing()]:
            self.open(state, swarm=False)
            self.assertEqual(self.browser.run(STRUCTURE), [])
        agent = self.open(stub.alone())
        said = self.browser.run("return document.getElementById('live').textContent")
        self.assertEqual(said, f"This node: Ready. prod/model, release 12 ({stub.NEW[:8]}) Rolled out: release 12.")
        # Numbers that tick are not read out.
        self.browser.run(
            "window.said = 0; new MutationObserver(() => (window.said += 1)).observe(document.getElementById('live'), {childList: true, characterData: true, subtree: true})"
        )
        agent.state["traffic"]["bytes_in"] += 1 << 30
        self.browser.until(
            lambda: self.seen()["fields"]["traffic.bytes_in"] == str(agent.state["traffic"]["bytes_in"]),
            "the new number",
        )
        self.assertEqual(self.browser.run("return window.said"), 0)

    def test_it_fits_narrow_and_wide_windows(self):
        for state in [stub.failing(), stub.thousand(), stub.alone()]:
            self.open(state)
            for width in [320, 360, 768, 1280, 1920, 3840]:
                self.browser.size(width, 800)
                self.assertTrue(self.browser.run(WIDE), width)

    def test_motion_only_where_it_is_wanted(self):
        self.open(stub.rolling())
        moving = "return [...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s').length"
        self.assertEqual(self.browser.run(moving), 0)
        self.browser.media(still=False)
        self.assertGreater(self.browser.run(moving), 0)

    def test_the_policy_is_in_force(self):
        self.open(stub.alone())
        self.assertEqual(self.browser.run("return document.styleSheets.length"), 1)
        self.browser.run(
            "const s = document.createElement('script'); s.textContent = 'window.hit = 1'; document.body.append(s); s.remove()"
        )
        self.assertIsNone(self.browser.run("return window.hit ?? null"))
        self.assertEqual(
            len(self.browser.until("return window.violations.length && window.violations", "it is said")), 1
        )
        self.browser.run("window.violations = []")
        self.quiet = False


class FileTest(unittest.TestCase):
    """What can be said of the page without a browser."""

    def test_one_script_one_style_and_nothing_from_outside(self):
        with open(stub.PAGE, encoding="utf-8") as file:
            page = file.read()
        self.assertTrue(stub.policy(page))
        for word in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "style=", "onclick", "src=", "http://", "https://"]:  # fmt: skip
            self.assertNotIn(word, page.replace("http://www.w3.org/2000/svg", ""), word)
        self.assertLess(len(page.encode()), 100_000)


if __name__ == "__main__":
    unittest.main()
