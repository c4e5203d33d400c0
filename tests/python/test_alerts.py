"""Every alert of ``deploy/prometheus/rules.yml`` fires in a real Prometheus when its cause is there, for the node it
concerns, and is over when the cause is mended; and none does where all is well."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import unittest

import mesh
import prometheus
from answering_fleet import checkpoint
from fleet import CheckingEngine
from mesh import CHANNEL, ROOT, MeshTest, needs_program
from web import Receiver, Web

DASHBOARD = os.path.join(ROOT, "deploy", "grafana", "aquifer.json")
METRICS = os.path.join(ROOT, "docs", "metrics.md")
#: A second: one copy of a release, which is of 8 MiB, takes two minutes.
SLOW = "64KiB"
#: Less than a release, by far.
SMALL = "2MiB"
#: Seconds that a healthy mesh is watched: what holds all that time is not by chance.
QUIET_SECONDS = 15 * 60 / prometheus.FACTOR + 2

#: Alert -> the test that sees it fire.
TELLS = {}


def tells(*alerts):
    """For a test that sees exactly these alerts fire."""

    def of(test):
        TELLS.update(dict.fromkeys(alerts, test.__name__))

        @functools.wraps(test)
        def run(self):
            test(self)
            self.assertEqual(self.seen, set(alerts))

        return run

    return of


def needs_prometheus():
    if not prometheus.program() or not prometheus.promtool():
        return unittest.skip("no prometheus and promtool are installed here")
    return lambda case: case


@needs_program()
@needs_prometheus()
class Alerts(MeshTest):
    def setUp(self):
        self.seen = set()
        self.prometheus = self.site.started(prometheus.Prometheus(self.site))

    def publisher(self, number, peers=(), name=None):
        """Publishes release ``number``, or serves it again."""
        directory = self.site.path(f"release-{number}")
        if not os.path.exists(directory):
            checkpoint(directory, number, rows=256)
        return self.site.publisher(name or f"publisher-{number}", directory, peers=peers)

    def agent(self, name, *options, peers=()):
        """One that Prometheus asks, at an address that it has again when it is started again."""
        address = prometheus.free_address()
        agent = self.site.agent(name, "--http", address, *options, peers=peers)
        self.prometheus.watch(**{name: address})
        return agent

    def holder(self, name, *options, peers=()):
        return self.agent(name, "--hold", "all", *options, peers=peers)

    def storing(self, name, *options, peers=()):
        return self.holder(name, "--store", self.site.path(f"{name}.store"), *options, peers=peers)

    def engine(self, agent, name, check=None):
        """One that serves what its agent gives it; returns when it does."""
        engine = self.site.started(CheckingEngine(self.site, agent, name))
        if check:
            engine.tell("check", command=[sys.executable, "-c", check])
        engine.tell("allocate", twin=None)
        engine.tell("wait")
        return engine

    @contextlib.contextmanager
    def stranger(self, peers):
        """Somebody with the mesh's key announces a release that no trusted publisher signed."""
        trusted, key = self.site.publisher_key, self.site.path("stranger.key")
        self.site.run("keygen", "publisher", "--out", key)
        self.site.publisher_key = key
        try:
            publisher = self.publisher(9, peers, "stranger")
        finally:
            self.site.publisher_key = trusted
        try:
            yield
        finally:
            publisher.kill()

    def fires(self, alert, agent, **labels):
        seen = self.prometheus.wait_firing(alert, agent.name, **labels)
        self.seen.add(alert)
        self.assertIn(seen["severity"], ("critical", "warning"))
        self.assertEqual(seen["job"], "aquifer")
        return seen

    def clears(self, alert, agent):
        self.prometheus.wait_clear(alert, agent.name)

    def assert_silent_about(self, alert, agent):
        """It does not fire, nor is it about to."""
        of_it = [labels for name, labels, _ in self.prometheus.alerts() if name == alert]
        self.assertEqual([labels for labels in of_it if labels["instance"] == agent.name], [])

    def healthy(self):
        self.prometheus.wait_scraped()
        self.prometheus.wait_silent()

    @tells("AquiferAgentDown", "AquiferNotReady", "AquiferHookBacklog", "AquiferReleaseRejected")
    def test_a_healthy_mesh_is_silent_and_what_breaks_in_it_is_told(self):
        receiver, answers = Receiver(), {"status": 204}
        leaving = Receiver(lambda number, event: answers["status"])
        self.addCleanup(leaving.close)
        publisher = self.publisher(1)
        serving = self.agent("serving", "--webhook", receiver.url, peers=[publisher.address])
        peers = [publisher.address, serving.address]
        also = self.agent("also-serving", "--webhook", leaving.url, "--hook-event", "peer-joined", peers=peers)
        storing = self.storing("storing", peers=peers)
        # No engine comes here, and so it is to hold nothing.
        idle = self.agent("idle", peers=peers)
        engine = self.engine(serving, "engine")
        self.engine(also, "engine-also")
        storing.wait_holds(publisher.manifest)
        self.healthy()
        self.prometheus.wait_silent(QUIET_SECONDS)

        # One receiver is away, the other wants no more.
        receiver.close()
        answers["status"] = 410
        storing.kill()
        engine.kill()
        with self.stranger([also.address]):
            self.fires("AquiferReleaseRejected", also, reason="untrusted")
        self.fires("AquiferAgentDown", storing)
        for agent, end in ((also, leaving), (serving, receiver)):
            hook = self.fires("AquiferHookBacklog", agent)["hook"]
            self.assertTrue(hook.startswith(end.url.removesuffix("hook")), hook)
        self.fires("AquiferNotReady", serving)
        for alert in ("AquiferNotReady", "AquiferReleaseLag"):
            self.assert_silent_about(alert, also)
            self.assert_silent_about(alert, idle)

        back = Receiver(port=receiver.port)
        self.addCleanup(back.close)
        storing.start()
        self.engine(serving, "engine-again")
        self.healthy()

    @tells("AquiferCheckFailed", "AquiferReleaseLag", "AquiferNotReady")
    def test_a_release_that_fails_its_check(self):
        publisher = self.publisher(1)
        refusing = self.agent("refusing", peers=[publisher.address])
        taking = self.agent("taking", peers=[publisher.address, refusing.address])
        self.engine(refusing, "engine", check="import os, sys; sys.exit(os.environ['AQUIFER_SEQ'] == '2')")
        self.engine(taking, "engine-taking")
        self.healthy()
        self.publisher(2, [taking.address])
        self.fires("AquiferCheckFailed", refusing, channel=CHANNEL)
        self.fires("AquiferNotReady", refusing)
        self.fires("AquiferReleaseLag", refusing, channel=CHANNEL)
        self.assertEqual(self.prometheus.firing_for(), {"refusing"})
        self.publisher(3, [taking.address])
        self.healthy()

    @tells("AquiferDrainStuck", "AquiferNoPeers", "AquiferHydrationStalled", "AquiferAgentDown")
    def test_an_only_holder_that_cannot_leave_and_then_is_gone(self):
        publisher = self.publisher(1)
        holder = self.storing("only", "--upload-limit", SLOW, peers=[publisher.address])
        holder.wait_holds(publisher.manifest)
        publisher.kill()
        pulling = self.holder("pulling", peers=[holder.address])
        pulling.wait_until("some of it is here", lambda status: status["traffic"]["chunks_verified"] >= 1)
        drain = ["drain", "--grace", "1h", "--socket", holder.socket, "--json"]
        drain = [mesh.program(), "--config", os.devnull, *drain]
        asked = self.site.started(mesh.Process(self.site, "drain", drain, self.site.environment))
        self.fires("AquiferDrainStuck", holder)
        # Slow is not stalled: something comes all the time.
        self.assert_silent_about("AquiferHydrationStalled", pulling)
        self.assert_silent_about("AquiferNotReady", holder)

        holder.kill()
        self.assertFalse(asked.event("drained")["whole"])
        asked.wait()
        asked.child.stdin.close()
        self.clears("AquiferDrainStuck", holder)
        self.fires("AquiferAgentDown", holder)
        self.fires("AquiferNoPeers", pulling)
        self.fires("AquiferHydrationStalled", pulling, channel=CHANNEL)
        again = self.publisher(1, [pulling.address], "publisher-again")
        pulling.wait_holds(again.manifest)
        for alert in ("AquiferNoPeers", "AquiferHydrationStalled"):
            self.clears(alert, pulling)

    @tells("AquiferStoreFull", "AquiferChannelProblem")
    def test_stores_that_are_smaller_than_the_release(self):
        publisher = self.publisher(1)
        peers = [publisher.address]
        stores = {
            "disk": self.storing("small-disk", "--store-limit", SMALL, peers=peers),
            "memory": self.holder("small-memory", "--memory-limit", SMALL, peers=peers),
        }
        for store, agent in stores.items():
            self.fires("AquiferChannelProblem", agent, channel=CHANNEL)
        for store, agent in stores.items():
            self.fires("AquiferStoreFull", agent, store=store)
        for agent in stores.values():
            agent.stop()
            agent.options = agent.options[:-2]
            agent.start()
            agent.wait_holds(publisher.manifest)
        self.healthy()

    @tells("AquiferCorruptChunks")
    def test_a_holder_whose_disk_lies(self):
        publisher = self.publisher(1)
        # Its bytes go over TCP: who copies them from its memory sees the same, by another way.
        lying = self.storing("lying", "--shm", "false", peers=[publisher.address])
        lying.wait_holds(publisher.manifest)
        publisher.kill()
        self.assertGreater(self.spoil(self.site.path("lying.store")), 0)
        # One that was not asked before it got wrong bytes.
        address = prometheus.free_address()
        fresh = self.site.agent("fresh", "--hold", "all", "--http", address, peers=[lying.address])
        fresh.wait_until("it got wrong bytes", lambda status: status["traffic"]["chunks_corrupt"] > 0)
        self.prometheus.watch(fresh=address)
        self.fires("AquiferCorruptChunks", fresh)
        self.prometheus.unwatch("fresh")
        fresh.kill()
        # And one that was.
        pulling = self.holder("pulling")
        self.prometheus.wait_scraped()
        between = self.site.agent("between", peers=[lying.address, pulling.address])
        self.fires("AquiferCorruptChunks", pulling)
        self.assert_silent_about("AquiferCorruptChunks", lying)
        again = self.publisher(1, [pulling.address, lying.address], "publisher-again")
        pulling.wait_holds(again.manifest)
        lying.wait_holds(again.manifest)
        between.stop()
        self.healthy()

    def test_every_alert_has_a_test(self):
        self.assertEqual(sorted(self.prometheus.rules()), sorted(TELLS))

    def test_metrics_are_as_prometheus_wants_them_and_rules_and_dashboard_know_them(self):
        publisher = self.publisher(1)
        agent = self.agent("agent", "--webhook", "http://127.0.0.1:9/", peers=[publisher.address])
        self.engine(agent, "engine")
        text = Web(agent).get("/metrics")
        lint = subprocess.run([prometheus.promtool(), "check", "metrics"], input=text, capture_output=True, text=True)
        self.assertEqual((lint.returncode, lint.stdout, lint.stderr), (0, "", ""))
        documented = documented_labels()
        there = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
        self.assertEqual(there - documented.keys(), set(), "it is not documented")
        for path in (prometheus.RULES, DASHBOARD):
            with open(path, encoding="utf-8") as file:
                asked = file.read()
            self.assertGreater(len(metrics_in(asked)), 10, path)
            self.assertEqual(metrics_in(asked) - documented.keys(), set(), path)
            for name, labels in selected_labels(asked):
                self.assertLessEqual(labels, documented[name] | {"job", "instance", "le"}, (path, name))
        # Prometheus understands what the dashboard asks.
        self.prometheus.wait_scraped()
        asked = dashboard_expressions()
        self.assertGreater(len(asked), 30)
        for expression in asked:
            self.prometheus.get("query", query=expression)

    def spoil(self, store):
        """Changes a byte of each chunk that lies there, as a disk may; returns how many."""
        spoilt = 0
        for place, _, names in os.walk(store):
            for name in names:
                path = os.path.join(place, name)
                if re.search(r"[0-9a-f]{32}", name) and os.path.getsize(path) > 0:
                    kept = os.stat(path)
                    with open(path, "r+b") as file:
                        first = file.read(1)
                        file.seek(0)
                        file.write(bytes([first[0] ^ 1]))
                    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
                    spoilt += 1
        return spoilt


@needs_prometheus()
class Rules(unittest.TestCase):
    def promtool(self, *arguments):
        directory = os.path.dirname(prometheus.RULES)
        done = subprocess.run([prometheus.promtool(), *arguments], cwd=directory, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_promtool_takes_them_and_their_tests(self):
        self.promtool("check", "rules", "rules.yml")
        self.promtool("test", "rules", "rules.test.yml")

    def test_all_times_are_shortened_and_nothing_else(self):
        with open(prometheus.RULES, encoding="utf-8") as file:
            text = file.read()
        short = prometheus.shorten(text)
        # As many as a person would count, and every threshold of the table is one of the rules.
        times = re.findall(r"^ *for:|\[\d+\w\]", text, re.MULTILINE)
        self.assertEqual(short.times, len(times))
        compared = re.findall(r"_seconds(?:\{[^}]*\})? *[<>]=? *\d+", text)
        self.assertEqual(len(compared), short.thresholds)
        self.assertTrue(all(text.count(seconds) for seconds in prometheus.SECONDS))

        def timeless(rules):
            return re.sub(r"for: \d+\w+|\[\d+\w+\]|_seconds [<>] [\d.]+", "", rules)

        self.assertEqual(timeless(text), timeless(short.text))


def metric(name):
    """Of one of its series."""
    return re.sub(r"_(bucket|count|sum)$", "", name)


def metrics_in(text):
    """The agents' metrics that are asked for: names of recording rules, which have colons, are none."""
    return {metric(name) for name in re.findall(r"(?<![\w:])aquifer_\w+(?![\w:])", text)}


def selected_labels(text):
    """By which labels each metric is selected: ``(metric, {label})``."""
    for name, selector in re.findall(r"(?<![\w:])(aquifer_\w+)\{([^}]*)\}", text):
        yield metric(name), set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))


def documented_labels():
    """``{metric: {label}}``, as docs/metrics.md has it."""
    with open(METRICS, encoding="utf-8") as file:
        rows = re.findall(r"^\| `(\w+)` \| \w+ \| ([^|]*) \|", file.read(), re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def dashboard_expressions():
    """All that the dashboard asks Prometheus, with something in place of Grafana's variables."""
    with open(DASHBOARD, encoding="utf-8") as file:
        dashboard = json.load(file)

    def found(value):
        if isinstance(value, dict):
            if isinstance(value.get("expr"), str):
                yield value["expr"]
            value = list(value.values())
        if isinstance(value, list):
            for inner in value:
                yield from found(inner)

    timed = (re.sub(r"\$__(rate_interval|interval|range)", "1m", expression) for expression in found(dashboard))
    return [re.sub(r"\$\w+", ".*", expression) for expression in timed]


if __name__ == "__main__":
    unittest.main()
