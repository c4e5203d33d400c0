"""The page of a real agent, while a release rolls out over a real mesh: its numbers are those that the agent gave."""

import http.client
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import unittest

import stub
from shown import expected, misspelt, seen
from webdriver import Browser, missing

sys.path.insert(0, os.path.join(stub.ROOT, "tests", "python"))

from answering_fleet import checkpoint
from mesh import CHANNEL, Engine, MeshTest, Process, program

NODES = 4
ENGINE = os.path.join(stub.ROOT, "tests", "python", "checking_engine.py")


def lacking():
    """Why this cannot run here, or None."""
    if not program():
        return "AQUIFER_BIN does not name the program"
    said = subprocess.run([program(), "agent", "--help"], check=False, capture_output=True, text=True, timeout=60)
    return missing() or (None if "--http " in said.stdout else "the program has no --http")


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


class Recorder:
    """Stands between the browser and the agent, and keeps each status that was given, by its ``uptime_seconds``."""

    def __init__(self, port):
        self.port, self.given = port, {}
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def _handler(recorder):
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                asked = http.client.HTTPConnection("127.0.0.1", recorder.port, timeout=60)
                try:
                    told = {
                        name: value
                        for name, value in self.headers.items()
                        if name.lower() in ("accept", "last-event-id")
                    }
                    asked.request("GET", self.path, headers=told)
                    answer = asked.getresponse()
                    self.send_response(answer.status)
                    for name, value in answer.getheaders():
                        if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                            self.send_header(name, value)
                    self.end_headers()
                    if answer.getheader("content-type", "").startswith("text/event-stream"):
                        while part := answer.read1(65536):
                            self.wfile.write(part)
                            self.wfile.flush()
                        return
                    body = answer.read()
                    if self.path == "/v1/status":
                        status = json.loads(body)
                        recorder.given[status["uptime_seconds"]] = status
                    self.wfile.write(body)
                except (OSError, http.client.HTTPException):
                    pass  # The agent or the browser is gone: the connection ends, as it would without this.
                finally:
                    asked.close()

        return Handler


class CheckingEngine(Engine):
    def __init__(self, site, agent, name):
        Process.__init__(self, site, name, [sys.executable, ENGINE], site.environment)
        self.tell("open", channel=CHANNEL, socket=agent.socket, name=name)
        self.tell("checks", mode="pass")
        self.tell("check")
        self.tell("allocate")
        self.tell("wait")


@unittest.skipIf(lacking(), lacking())
class LiveTest(MeshTest):
    def setUp(self):
        self.port = free_port()
        checkpoint(self.site.path("release-1"), 0)
        self.publisher = self.site.publisher("publisher-1", self.site.path("release-1"))
        self.agents = []
        for i in range(NODES):
            http_at = f"127.0.0.1:{self.port}" if i == 0 else "off"
            options = ["--http", http_at, "--label", f"zone={'ab'[i // 2]}", "--label", f"rack=r{i}"]
            peers = [self.publisher.address, *(a.address for a in self.agents[:2])]
            self.agents.append(self.site.agent(f"node-{i}", *options, peers=peers))
        self.engines = [
            self.site.started(CheckingEngine(self.site, a, f"engine-{i}")) for i, a in enumerate(self.agents)
        ]
        self.recorder = Recorder(self.port)
        self.browser = Browser()

    def tearDown(self):
        self.browser.close()
        self.recorder.close()

    def look(self):
        """What the page shows now, which must be what the agent said."""
        at = seen(self.browser)
        status, fields = at["status"], at["fields"]
        self.assertEqual(self.recorder.given[status["uptime_seconds"]], status)
        wanted = expected(status)
        self.assertEqual({name: fields.get(name) for name in wanted}, wanted)
        self.assertEqual(misspelt(at), [])
        reports = [r for p in status["peers"] for r in p["rollouts"]] + [
            c["rollout"] for c in status["channels"] if c["rollout"]
        ]
        newest = max(r["seq"] for r in reports)
        serving = sum(r["seq"] == newest and r["ready"] and r["served"] == r["wanted"] for r in reports)
        shown = {name.split("|")[2]: int(value) for name, value in fields.items() if "|rollout.phase|" in name}
        self.assertEqual(sum(shown.values()), len(reports))
        self.assertEqual(shown.get("ready", 0), serving)
        self.assertEqual(len(at["nodes"]), 1 + len(status["peers"]))
        return at

    def until(self, what, holds):
        """Looks again and again until it ``holds``; every look is checked. Returns all of them."""
        looks = []

        def look():
            looks.append(self.look())
            return holds(looks[-1])

        self.browser.until(look, what)
        return looks

    def publish(self, n, *options):
        checkpoint(self.site.path(f"release-{n}"), n, (1, 3))
        before, peers = self.publisher, [a.address for a in self.agents[:3]]
        self.publisher = self.site.publisher(f"publisher-{n}", self.site.path(f"release-{n}"), *options, peers=peers)
        before.kill()  # What only it had is had by all.

    def test_the_numbers_on_the_page_are_the_agents_while_a_release_rolls_out(self):
        self.browser.open(self.recorder.url)
        self.browser.run("window.violations = []; document.addEventListener('securitypolicyviolation', (e) => window.violations.push(e.violatedDirective))")  # fmt: skip
        self.browser.until("return window.aquiferShown !== null", "the page shows a status")
        first = f"{CHANNEL}|channel.seq"
        self.until("release 1 is rolled out", lambda at: at["fields"].get("rollout.state") == "done" and at["fields"]["fleet.ready"] == str(NODES))  # fmt: skip
        self.browser.until("return document.querySelector('.swarm svg[data-buckets]') !== null", "the swarm is drawn")
        # The check of each node's engine waits for a word, so that every stage of the rollout is there to be looked at.
        for engine in self.engines:
            engine.tell("checks", mode="ask")
        self.publish(2, "--policy", "rolling", "--max-unavailable", "1")
        looks, gone = [], []
        while len(gone) < NODES:
            for i, engine in enumerate(self.engines):
                if i not in gone and self.agents[i].status()["engines"][0]["phase"] == "checking":
                    done = str(len(gone))
                    out = self.until(
                        f"a node is out and {done} are done",
                        lambda at, done=done: (
                            at["fields"]["fleet.ready"] == str(NODES - 1)
                            and at["fields"].get(f"{CHANNEL}|rollout.phase|ready", "0") == done
                        ),
                    )
                    self.assertEqual(out[-1]["fields"]["rollout.state"], "going")
                    looks += out
                    engine.tell("decide")
                    gone.append(i)
            looks.append(self.look())
        looks += self.until("release 2 is rolled out", lambda at: at["fields"]["rollout.state"] == "done" and at["fields"][first] == "2" and at["fields"]["fleet.ready"] == str(NODES))  # fmt: skip
        statuses = {at["status"]["uptime_seconds"] for at in looks}
        served = {at["fields"].get(f"{CHANNEL}|rollout.phase|ready", "0") for at in looks}
        print(
            f"\n    {len(looks)} looks at {len(statuses)} statuses; nodes that served it: {', '.join(sorted(served))}"
        )
        self.assertGreaterEqual(len(served), NODES)
        kinds = self.browser.run("return [...document.querySelectorAll('#events li')].map((e) => e.dataset.event)")
        self.assertIn("activated", kinds)
        self.assertIn("heard", kinds)
        # At rest the page says what anybody hears who asks the agent.
        asked = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        asked.request("GET", "/v1/status")
        direct, shown = json.load(asked.getresponse()), self.look()["status"]
        asked.close()
        for name in ["channels", "engines", "node", "labels"]:
            self.assertEqual(direct[name], shown[name], name)
        self.assertEqual([line for line in self.browser.log() if line["level"] == "SEVERE"], [])
        self.assertEqual(self.browser.run("return window.violations"), [])
        self.an_agent_dies_and_comes_back()

    def an_agent_dies_and_comes_back(self):
        before = self.look()["status"]["uptime_seconds"]
        self.agents[0].kill()
        self.browser.until("return document.body.dataset.link === 'lost'", "the page says that the agent is gone")
        self.agents[0].start()
        self.browser.until("return document.body.dataset.link === 'good'", "the page has found it again")
        self.until("it shows the new one", lambda at: at["status"]["uptime_seconds"] < before)


if __name__ == "__main__":
    unittest.main()
