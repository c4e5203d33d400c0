"""The documentation is true: its commands run, its links lead somewhere, and what it names is there."""

import glob
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import unittest

import docs
from mesh import PATIENCE, POLL, ROOT, needs_program, program

#: Of documents that were written by hand for people, and of what is deployed.
PAGES = ["README.md", "ARCHITECTURE.md", "python/README.md", "docs/*.md", "docs/measured/*.md", "deploy/**/*.md"]
#: What was measured is a report, with the options of the programs that measured.
REPORTS = "docs/measured/"
#: Options of `cargo run -p simulations`, which docs/how-it-works.md describes.
OF_SIMULATIONS = {"--baselines", "--record-node", "--seeds", "--seed", "--quick"}
#: Read by a check's command, by hooks, and by tests.
ENVIRONMENT = {
    "AQUIFER_CHANNEL", "AQUIFER_MANIFEST", "AQUIFER_SEQ", "AQUIFER_EVENT", "AQUIFER_EVENT_ID", "AQUIFER_ENGINE",
    "AQUIFER_BIN", "AQUIFER_BLESS", "AQUIFER_ROLLOUT_SEEDS", "AQUIFER_ROLLOUT_FROM", "AQUIFER_MINILM",
}  # fmt: skip
#: Where the documents' meshes listen.
PORTS = [7400, *range(7401, 7405), *range(7411, 7415), *range(7421, 7425), *range(8001, 8004), 9000]


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def pages():
    """Path from the root, and text, of every page."""
    for pattern in PAGES:
        for path in sorted(glob.glob(os.path.join(ROOT, pattern), recursive=True)):
            path = os.path.relpath(path, ROOT)
            yield path, read(path)


def deployed():
    """The same of everything in deploy/ that is text."""
    for path in sorted(glob.glob(os.path.join(ROOT, "deploy", "**", "*.*"), recursive=True)):
        if os.path.isfile(path):
            path = os.path.relpath(path, ROOT)
            yield path, read(path)


class Wrong(unittest.TestCase):
    maxDiff = None

    def assert_none(self, found):
        found = list(found)
        self.assertEqual(found, [], "\n" + "\n".join(found))


class Pages(Wrong):
    def test_links_lead_somewhere(self):
        self.assert_none(wrong for path, text in pages() for wrong in docs.broken_links(ROOT, path, text))

    def test_metrics_exist(self):
        known = docs.metric_names(read("docs/metrics.md"))
        crates = {f"aquifer_{name}" for name in os.listdir(os.path.join(ROOT, "crates"))}
        self.assertGreater(len(known), 30)
        for path, text in [*pages(), *deployed()]:
            self.assert_none(docs.unknown_metrics(path, text, known, crates))

    def test_every_alert_has_its_section(self):
        rules = "deploy/prometheus/rules.yml"
        if not os.path.exists(os.path.join(ROOT, rules)):
            self.skipTest(f"{rules} is not there yet")
        self.assertTrue(docs.alerts(read(rules)))
        self.assert_none(docs.alerts_without_section(read(rules), read("docs/operate.md")))
        for number, line in enumerate(read(rules).split("\n"), 1):
            if line.strip().startswith("runbook:"):
                target = line.split(":", 1)[1].strip().strip("\"'")
                self.assert_none(docs.broken_links(ROOT, "README.md", f"[{rules}:{number}]({target})"))

    def test_events_and_calls_are_documented(self):
        document = json.loads(read("docs/openapi.json"))
        schemas, operate = document["components"]["schemas"], read("docs/operate.md")
        self.assert_none(docs.undocumented(schemas["Kind"]["enum"], operate, "event"))
        self.assert_none(docs.undocumented(schemas["Happening"]["properties"], operate, "field of an event"))
        self.assert_none(docs.undocumented(document["paths"], operate, "call"))
        shown = [json.loads(block.text) for block in docs.blocks(operate) if block.kind == "json"]
        self.assertTrue(shown)
        for event in shown:
            self.assertEqual(set(event), set(schemas["Happening"]["properties"]))
        for path, text in pages():
            self.assert_none(docs.unknown_calls(path, text, set(document["paths"])))

    def test_what_looks_as_if_it_were_run_is(self):
        written = [(path, text) for path, text in pages() if path.startswith("docs/")]
        self.assert_none(wrong for path, text in written for wrong in docs.unmarked(path, text))

    def test_the_index_names_every_page(self):
        index = {target.partition("#")[0] for _, target in docs.links(read("docs/README.md"))}
        there = {name for name in os.listdir(os.path.join(ROOT, "docs")) if name.endswith((".md", ".json"))}
        self.assertEqual(there - {"README.md"} - index, set())


@needs_program()
class Program(Wrong):
    def test_options_and_commands_exist(self):
        commands, options, environment = docs.help_of(program())
        self.assertIn(("keygen", "mesh"), commands)
        for path, text in pages():
            if not path.startswith(REPORTS):
                self.assert_none(docs.unknown_options(path, text, commands, options | OF_SIMULATIONS))
                self.assert_none(docs.unknown_environment(path, text, environment | ENVIRONMENT))

    def test_environment_of_what_is_deployed_exists(self):
        _, _, environment = docs.help_of(program())
        for path, text in deployed():
            self.assert_none(docs.unknown_environment(path, text, environment | ENVIRONMENT))


@needs_program()
class Blocks(unittest.TestCase):
    """Each document that says so is run, from top to bottom."""

    def run_page(self, path):
        apart = docs.isolation()
        if apart is None:
            apart = []
            for port in PORTS:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        self.skipTest(f"port {port} is taken, and there are no network namespaces to be had")
        for needed in ("bash", "curl"):
            if shutil.which(needed) is None:
                self.skipTest(f"no {needed} here")
        wrong = docs.run(path, read(path), program(), ROOT, apart)
        if wrong:
            self.fail(f"\n{path}: {wrong}")


def _test_of(path):
    return lambda self: self.run_page(path)


for _path, _text in pages():
    if docs.runs(_text):
        setattr(Blocks, f"test_{docs.runs(_text).replace(' ', '_').replace('-', '_')}", _test_of(_path))


class Checker(unittest.TestCase):
    """Each planted mistake is found; what is right is not complained of."""

    PAGE = """# A page
<!-- run by CI: it -->
## Two words, `code`
[good](#two-words-code) [file](docs.py) `[no](link)`
<!-- file: a.py -->
```python
print("x")
```
```sh
python3 a.py
```

```text
x
```
```console
$ sudo aquifer agent --hold all
```
"""

    def outcome(self, text, **replaced):
        for old, new in replaced.values():
            self.assertIn(old, text)
            text = text.replace(old, new)
        return docs.run("page", text, "/bin/true", ROOT, [])

    def test_blocks(self):
        found = docs.blocks(self.PAGE)
        self.assertEqual([b.kind for b in found], ["python", "sh", "text", "console"])
        self.assertEqual((found[0].file, found[1].file, found[1].text), ("a.py", "", "python3 a.py\n"))
        self.assertEqual(list(docs.expectations(found)), [(1, "x\n", 14)])
        self.assertEqual(docs.runs(self.PAGE), "it")
        self.assertNotIn("print", docs.prose(self.PAGE))
        self.assertEqual(len(docs.prose(self.PAGE)[: docs.prose(self.PAGE).index("[good]")].split("\n")), 4)

    def test_runs(self):
        self.assertEqual(self.outcome(self.PAGE), "")
        wrong = self.outcome(self.PAGE, said=('print("x")', 'print("y")'))
        self.assertIn("shows another text", wrong)
        self.assertIn("---- it printed\ny\n", wrong)
        wrong = self.outcome(self.PAGE, fails=("python3 a.py", "echo so far\nfalse\necho never"))
        self.assertIn("ended with 1 in\npage: line 10:", wrong)
        self.assertIn("so far", wrong)
        self.assertIn("ended with 1", self.outcome(self.PAGE, fails=("python3 a.py", "false | cat")))
        self.assertIn("nothing_here", self.outcome(self.PAGE, unset=("python3 a.py", "echo $nothing_here")))

    def test_what_is_left_running_ends(self):
        with tempfile.TemporaryDirectory() as place:
            pid = os.path.join(place, "pid")
            self.assertEqual(self.outcome(self.PAGE, left=("python3 a.py", f"sleep 1000 & echo $! > {pid}; echo x")), "")
            with open(pid, encoding="ascii") as file:
                number = int(file.read())
        # It was killed; the kernel may take a moment on a busy machine.
        deadline = time.monotonic() + PATIENCE
        while True:
            state = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True).stdout
            if state.strip()[:1] in ("", "Z"):
                return
            self.assertLess(time.monotonic(), deadline, f"{number} is still there: {state}")
            time.sleep(POLL)

    def test_texts(self):
        for expected, given, fits in [
            ("a\n", "a\n", True),
            ("a\n", "b\n", False),
            ("a\n", "a\nb\n", False),
            ("a ... c\n", "a bb c\n", True),
            ("a ... c\n", "a bb\nc\n", False),
            ("a\n...\nc\n", "a\nb\nb\nc\n", True),
            ("a\n...\n", "a\n", True),
            ("a.c\n", "abc\n", False),
        ]:
            self.assertEqual(bool(docs.pattern(expected).match(given)), fits, (expected, given))

    def test_links(self):
        here = os.path.dirname(os.path.abspath(__file__))

        def broken(text):
            return list(docs.broken_links(here, "page.md", text))

        with_anchor = os.path.relpath(os.path.join(ROOT, "README.md"), here)
        self.assertEqual(broken(f"[a](docs.py) [b]({with_anchor}#try-it) [c](https://example.test/x)"), [])
        self.assertEqual(len(broken(f"[a](dogs.py) [b]({with_anchor}#try-that)")), 2)
        self.assertEqual(docs.anchors(self.PAGE), {"a-page", "two-words-code"})
        self.assertEqual(docs.slug("What `--hold all` does, and *why*"), "what---hold-all-does-and-why")

    def test_options(self):
        known = ({("agent",), ("drain",)}, {"--hold", "--grace"})

        def unknown(text):
            return [wrong.split(": ")[1] for wrong in docs.unknown_options("p", text, *known)]

        self.assertEqual(unknown("`--hold all`, `aquifer drain --grace 1s`, `docker run --rm`"), [])
        self.assertEqual(unknown("`--holt all`"), ["--holt"])
        self.assertEqual(unknown("```console\naquifer agent \\\n  --holt all  # --comment\ncurl --fail x\n```"), ["--holt"])
        self.assertEqual(unknown("```sh\nX=$(aquifer drian --grace 1)\n```"), ["`aquifer drian`"])
        self.assertEqual(unknown("`aquifer drian`"), ["`aquifer drian`"])
        self.assertEqual(unknown("`a\nb` and `aquifer agent\n--holt all`"), ["--holt"])
        self.assertEqual(docs.options_of_help("  --a-b <X>  [env: AQUIFER_A=]"), ({"--a-b"}, {"AQUIFER_A"}))
        self.assertEqual(docs.commands_of_help("Commands:\n  agent  It\n         more\n  drain  x\n\nOptions:\n  -h\n"), ["agent", "drain"])
        self.assertEqual(list(docs.unknown_environment("p", "AQUIFER_HOLD=all AQUIFER_...", {"AQUIFER_HOLD"})), [])
        self.assertEqual(len(list(docs.unknown_environment("p", "AQUIFER_HOLT=all", {"AQUIFER_HOLD"}))), 1)

    def test_metrics(self):
        known = docs.metric_names("| `aquifer_ready` | gauge |\n| `aquifer_pause_seconds` | histogram |\n")
        text = "aquifer_ready, aquifer_pause_seconds_bucket{x}, job:aquifer_bytes:rate5m, aquifer_mesh=debug, aquifer_core::Time"
        self.assertEqual(list(docs.unknown_metrics("p", text, known, {"aquifer_mesh"})), [])
        self.assertEqual(len(list(docs.unknown_metrics("p", "sum(aquifer_redy) by (x)", known))), 1)

    def test_alerts_events_and_calls(self):
        rules = "  - alert: AquiferOne\n  - alert: AquiferTwo\n"
        self.assertEqual(list(docs.alerts_without_section(rules, "### AquiferOne\n### AquiferTwo\n")), [])
        self.assertEqual(len(list(docs.alerts_without_section(rules, "### AquiferOne\n### AquiferThree\n"))), 2)
        self.assertEqual(list(docs.undocumented(["left", "/readyz"], "`left` `GET /readyz?channel=C`", "word")), [])
        self.assertEqual(list(docs.undocumented(["left"], "```sh\nx\n```\n`a`, `left`", "word")), [])
        self.assertEqual(len(list(docs.undocumented(["left"], "left is not code; `left-over` is another", "word"))), 1)
        self.assertEqual(list(docs.unknown_calls("p", "localhost/v1/status?x, /v1/openapi.json.", {"/v1/status", "/v1/openapi.json"})), [])
        self.assertEqual(len(list(docs.unknown_calls("p", "curl localhost:7404/v1/state", {"/v1/status"}))), 1)

    def test_blocks_that_nothing_runs(self):
        self.assertEqual(list(docs.unmarked("p", self.PAGE)), [])
        self.assertEqual(len(list(docs.unmarked("p", "```sh\nx\n```\n"))), 1)


if __name__ == "__main__":
    unittest.main()
