"""The agent under deploy/systemd/aquifer.service, as a real systemd runs it.

AQUIFER_BIN=target/release/aquifer python3 -m unittest discover -v -s tests/systemd -t tests/systemd
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import unittest

import guest

PROGRAM = os.environ.get("AQUIFER_BIN", os.path.join(guest.ROOT, "target", "release", "aquifer"))
CHANNEL = "systemd/test"
SOCKET = "/run/aquifer/agent.sock"
#: Seconds for what takes milliseconds on an idle machine.
PATIENCE_S = 60
POLL_S = 0.05
#: In place of the unit's 30 s, so that nobody has to wait for that long.
WATCHDOG_S = 5
TOKEN = "tip-top-secret-token-of-tests"
#: The publisher's ports in the guest; the agent has the usual ones.
PUBLISHER = ("--listen", "127.0.0.1:7501", "--data-listen", "127.0.0.1:7502", "--rdma", "off", "--mdns", "false")
WHY_NOT = guest.missing() or (None if os.path.exists(PROGRAM) else f"{PROGRAM} is not built")


def keygen(directory, kind, *options):
    path = os.path.join(directory, kind)
    command = [PROGRAM, "keygen", kind, "--out", path, *options]
    return path, subprocess.run(command, check=True, capture_output=True, text=True).stdout


def checkpoint(path):
    """A file of safetensors: eight tensors of 1 MiB, all different."""
    size = 1 << 20
    table = {f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]} for i in range(8)}
    header = json.dumps(table).encode()
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.writelines(os.urandom(size) for _ in range(8))


@unittest.skipIf(WHY_NOT, WHY_NOT)
class Unit(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        place = temporary.name
        mesh, _ = keygen(place, "mesh")
        publisher, said = keygen(place, "publisher", "--json")
        public = json.loads(said)["public"]
        config = (
            f'channel = ["{CHANNEL}"]\ntrust = ["{public}"]\npeer = ["127.0.0.1:7501"]\nhold = "all"\nmdns = false\n'
        )
        config += 'hook = ["cat >> /var/lib/aquifer/events"]\n'
        unit = os.path.join(guest.UNITS, "aquifer.service")
        drop_in = f"[Service]\nWatchdogSec={WATCHDOG_S}\n".encode()
        cls.guest = guest.Guest(
            {
                "/usr/bin/aquifer": (PROGRAM, 0o755),
                "/etc/systemd/system/aquifer.service": (unit, 0o644),
                "/etc/systemd/system/aquifer.service.d/test.conf": (drop_in, 0o644),
                "/etc/systemd/system/silent.service": (silent(unit), 0o644),
                "/usr/lib/sysusers.d/aquifer.conf": (os.path.join(guest.UNITS, "aquifer.sysusers.conf"), 0o644),
                "/etc/aquifer/mesh.key": (mesh, 0o600),
                "/etc/aquifer/aquifer.toml": (config.encode(), 0o644),
            }
        )
        cls.addClassCleanup(cls.guest.close)
        os.rename(publisher, os.path.join(cls.guest.shared, "publisher.key"))
        checkpoint(os.path.join(cls.guest.shared, "model.safetensors"))

    def setUp(self):
        self.guest.run("systemctl", "reset-failed", "aquifer")
        self.guest.run("systemctl", "restart", "aquifer", check=True)

    def tearDown(self):
        self.guest.run("systemctl", "kill", "--signal=SIGKILL", "aquifer")
        self.guest.run("systemctl", "stop", "aquifer")

    def shown(self, *names):
        return self.guest.properties("aquifer", *names)

    def await_(self, what, question):
        limit = time.monotonic() + PATIENCE_S
        while time.monotonic() < limit:
            if answer := question():
                return answer
            time.sleep(POLL_S)
        self.fail(f"{what}: not in {PATIENCE_S} s\n{self.guest.journal('aquifer')[-3000:]}")

    def no_errors(self):
        journal = self.guest.journal("aquifer")
        self.assertNotEqual(journal.strip(), "")
        self.assertEqual([line for line in journal.splitlines() if " ERROR " in line], [])

    def test_it_says_when_it_listens_and_ends_when_told(self):
        self.assertEqual(self.shown("ActiveState", "SubState"), {"ActiveState": "active", "SubState": "running"})
        self.assertNotEqual(self.shown("StatusText")["StatusText"], "", "no STATUS= was told")
        # Listening, not just begun: an engine that comes now is answered.
        status = self.guest.run("aquifer", "status", "--json", "--socket", SOCKET, check=True)
        self.assertEqual(json.loads(status.stdout)["channels"][0]["channel"], CHANNEL)
        self.guest.run("systemctl", "stop", "aquifer", check=True)
        ended = self.shown("ActiveState", "Result", "ExecMainCode", "ExecMainStatus")
        # By itself (CLD_EXITED of waitid(2) is 1), and with 0.
        wanted = {"ActiveState": "inactive", "Result": "success", "ExecMainCode": "1", "ExecMainStatus": "0"}
        self.assertEqual(ended, wanted)
        self.no_errors()
        self.assertNotIn("can be read by others", self.guest.journal("aquifer"))

    def test_one_that_hangs_is_ended_and_started_anew(self):
        before = self.shown("MainPID", "NRestarts")
        self.guest.run("kill", "-STOP", before["MainPID"], check=True)

        def anew():
            now = self.shown("MainPID", "NRestarts", "ActiveState")
            other = now["MainPID"] not in (before["MainPID"], "0") and now["ActiveState"] == "active"
            return other and int(now["NRestarts"]) > int(before["NRestarts"])

        self.await_("a new agent after the watchdog", anew)
        self.assertIn("Watchdog timeout", self.guest.journal("aquifer"))

    def test_one_that_lives_is_left_alone(self):
        """The watchdog is fed: nothing happens for three times its time."""
        before = self.shown("MainPID")
        time.sleep(3 * WATCHDOG_S)
        self.assertEqual(self.shown("MainPID"), before)
        self.no_errors()

    def test_weights_come_and_engines_of_its_user_get_them(self):
        publish = self.guest.start(
            "aquifer",
            "publish",
            "--channel",
            CHANNEL,
            "--publisher-key",
            "/outside/publisher.key",
            "--mesh-key",
            "/etc/aquifer/mesh.key",
            *PUBLISHER,
            "/outside/model.safetensors",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(end, publish)

        def whole():
            status = self.guest.run("aquifer", "status", "--json", "--socket", SOCKET, check=True)
            channel = json.loads(status.stdout)["channels"][0]
            return channel["bytes_have"] == channel["bytes_wanted"] > 0 and channel["checkpoint_bytes"] >= 8 << 20

        self.await_("the release", whole)
        engine = (
            "timeout",
            str(PATIENCE_S),
            "aquifer",
            "demo-engine",
            "--socket",
            SOCKET,
            "--channel",
            CHANNEL,
            "--name",
            "e",
        )
        with self.guest.start(
            "setpriv",
            "--reuid=aquifer",
            "--regid=aquifer",
            "--clear-groups",
            *engine,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            self.addCleanup(end, process)
            events = (json.loads(line)["event"] for line in process.stdout)
            self.assertIn("hydrated", events)
            process.stdin.close()
        stranger = self.guest.run("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *engine)
        self.assertIn("Permission denied", stranger.stderr)
        self.no_errors()

    def test_a_drain_that_was_asked_for_is_not_undone(self):
        before = self.shown("NRestarts")
        self.guest.run("aquifer", "drain", "--socket", SOCKET, "--grace", "5s", check=True)
        self.await_("the agent's end", lambda: self.shown("ActiveState")["ActiveState"] == "inactive")
        self.assertEqual(self.shown("Result", "ExecMainStatus"), {"Result": "success", "ExecMainStatus": "0"})
        self.assertEqual(self.shown("NRestarts"), before)
        # The hook ran, confined as the agent is, and to the end.
        events = self.guest.run("cat", "/var/lib/aquifer/events", check=True).stdout
        self.assertIn('"event":"draining"', events)
        self.assertIn('"event":"drained"', events)
        self.no_errors()

    def ask(self, path, *options):
        """Status and body of the agent's HTTP, from inside."""
        script = (
            "import sys, urllib.request as u, urllib.error as e\n"
            "headers = dict(h.split(': ') for h in sys.argv[3:])\n"
            "r = u.Request(sys.argv[1], method=sys.argv[2], headers=headers)\n"
            "try: a = u.urlopen(r, timeout=20)\n"
            "except e.HTTPError as error: a = error\n"
            "print(a.status); print(a.read().decode())"
        )
        said = self.guest.run(
            "/usr/bin/python3", "-c", script, f"http://127.0.0.1:7404{path}", *(options or ("GET",)), check=True
        )
        status, body = said.stdout.split("\n", 1)
        return int(status), body

    def test_its_http_answers(self):
        status, body = self.ask("/healthz")
        self.assertEqual((status, json.loads(body)), (200, {"status": "ok"}))
        status, body = self.ask("/metrics")
        self.assertIn("aquifer_build_info", body)
        if shutil.which("promtool"):
            checked = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, text=True)
            self.assertEqual((checked.returncode, checked.stderr), (0, ""))
        # No token was given to it, so nobody can have it drain.
        status, _ = self.ask("/v1/drain", "POST")
        self.assertIn(status, (401, 403))

    def test_with_a_token_it_drains_over_http(self):
        example = os.path.join(guest.UNITS, "aquifer.service.d", "http-token.conf.example")
        shutil.copy(example, os.path.join(self.guest.shared, "http-token.conf"))
        drop_in = "/etc/systemd/system/aquifer.service.d/http-token.conf"
        self.guest.run(
            "bash",
            "-c",
            f"umask 077; echo {TOKEN} > /etc/aquifer/http.token; cp /outside/http-token.conf {drop_in}",
            check=True,
        )
        self.guest.run("systemctl", "daemon-reload", check=True)

        def undo():
            self.guest.run("rm", drop_in, check=True)
            self.guest.run("systemctl", "daemon-reload", check=True)

        self.addCleanup(undo)
        self.guest.run("systemctl", "restart", "aquifer", check=True)
        status, _ = self.ask("/v1/drain", "POST", "Authorization: Bearer another")
        self.assertIn(status, (401, 403))
        status, _ = self.ask("/v1/drain", "POST", f"Authorization: Bearer {TOKEN}")
        self.assertEqual(status, 202)
        self.await_("the agent's end", lambda: self.shown("ActiveState")["ActiveState"] == "inactive")
        self.assertEqual(self.shown("Result")["Result"], "success")
        self.no_errors()

    def test_it_runs_confined(self):
        pid = self.shown("MainPID")["MainPID"]
        status = dict(
            line.split(":\t", 1)
            for line in self.guest.run("cat", f"/proc/{pid}/status", check=True).stdout.splitlines()
        )
        self.assertEqual((status["NoNewPrivs"], status["Seccomp"]), ("1", "2"))
        self.assertEqual({int(status[kind], 16) for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}, {0})
        uid = self.guest.run("id", "-u", "aquifer", check=True).stdout.strip()
        self.assertEqual(set(status["Uid"].split()), {uid})
        self.assertEqual(self.shown("LimitMEMLOCK"), {"LimitMEMLOCK": "infinity"})
        # Where root itself may not raise it, as in some containers, the unit cannot either.
        if self.guest.run("bash", "-c", "ulimit -l unlimited").returncode == 0:
            limits = self.guest.run("cat", f"/proc/{pid}/limits", check=True).stdout
            self.assertRegex(limits, r"Max locked memory\s+unlimited\s+unlimited")
        for path, mode in (("/run/aquifer", "700"), ("/var/lib/aquifer", "700"), (SOCKET, "600")):
            self.assertEqual(self.guest.run("stat", "-c", "%a %U", path, check=True).stdout.split(), [mode, "aquifer"])

    def test_one_that_does_not_say_it_is_ready_is_not_taken_for_it(self):
        """This test's own test: `systemctl start` succeeds for no other reason than READY=1."""
        self.assertNotEqual(self.guest.run("systemctl", "start", "silent").returncode, 0)
        self.assertEqual(self.guest.properties("silent", "Result"), {"Result": "timeout"})


def silent(unit):
    """The unit with a program that never notifies."""
    with open(unit) as text:
        lines = text.read().splitlines()
    swapped = {"ExecStart": "ExecStart=/bin/sleep 100", "TimeoutStartSec": "TimeoutStartSec=2", "Restart": "Restart=no"}
    return "\n".join(swapped.get(line.split("=")[0], line) for line in lines).encode()


def end(process):
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    unittest.main()
