"""A mesh of real processes on loopback, for tests with engines in Python.

The driver needs the standard library alone. ``AQUIFER_BIN`` is the program, ``AQUIFER_MINILM`` the
unpacked model directory, ``AQUIFER_PYTHON`` the Python of the engine processes (default: this one, or
else ``/usr/bin/python3``, whichever can import what the test needs).
"""

import functools
import hashlib
import json
import os
import queue
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

CHANNEL = "test/minilm"
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
ENGINE_MINILM = os.path.join(ROOT, "python", "tests", "engine_minilm.py")
ENGINE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "engine.py")
MODEL_BYTES = 90_868_376

#: Seconds; longer than any wait that succeeds, on any machine.
PATIENCE = 120.0
#: Seconds between two looks at a state that nothing announces.
POLL = 0.02
#: Of each process's log, what a failure shows.
LOG_BYTES_MAX = 16 << 10


class Failure(AssertionError):
    """A process that ended, or did not get there in time."""


@functools.lru_cache(maxsize=None)
def python_with(module):
    """A Python that has ``module``, or ``None``."""
    chosen = os.environ.get("AQUIFER_PYTHON")
    for python in [chosen] if chosen else [sys.executable, "/usr/bin/python3"]:
        if (
            os.path.exists(python)
            and subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0
        ):
            return python
    return None


def program():
    return os.environ.get("AQUIFER_BIN")


def model_directory():
    return os.environ.get("AQUIFER_MINILM")


def needs_program():
    """For tests that make their own checkpoints, and whose engines need the standard library alone."""
    if not program():
        return unittest.skip("AQUIFER_BIN does not name the program")
    return lambda case: case


def needs(*modules):
    """Skips a test class that cannot run here, and says why."""
    if not program():
        return unittest.skip("AQUIFER_BIN does not name the program")
    if not model_directory():
        return unittest.skip("AQUIFER_MINILM does not name the model's directory")
    for module in modules:
        if python_with(module) is None:
            return unittest.skip(f"no Python here has {module}")
    return lambda case: case


class Process:
    """A child, the JSON lines it prints, and its log."""

    def __init__(self, site, name, command, environment=None):
        self.name = name
        self.log = os.path.join(site.directory, f"{name}.log")
        self._lines = queue.Queue()
        with open(self.log, "ab") as log:
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
            )
        self.pid = self.child.pid
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.child.stdout:
            try:
                self._lines.put(json.loads(line))
            except ValueError:
                with open(self.log, "a", encoding="utf-8") as log:
                    log.write(f"[stdout] {line}")
        self._lines.put(None)

    def expect(self, fits, what, timeout=PATIENCE):
        """The next line that ``fits``; those before it are dropped."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                line = self._lines.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                raise Failure(f"{self.name} did not say {what} within {timeout} s") from None
            if line is None:
                self._lines.put(None)
                raise Failure(f"{self.name} ended with {self.child.wait(PATIENCE)} before it said {what}")
            if fits(line):
                return line

    def event(self, name, timeout=PATIENCE):
        return self.expect(lambda line: line.get("event") == name, f"'{name}'", timeout)

    def say(self, message):
        self.child.stdin.write(json.dumps(message) + "\n")
        self.child.stdin.flush()

    def check_alive(self):
        status = self.child.poll()
        if status is not None:
            raise Failure(f"{self.name} ended with {status}")

    def kill(self):
        """``kill -9``: as if the machine had lost power."""
        self.child.kill()
        self._end()

    def stop(self):
        """Asks it to leave. Returns its exit code."""
        self.child.terminate()
        return self._end()

    def wait(self, timeout=PATIENCE):
        try:
            return self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name} did not end within {timeout} s") from None

    def _end(self):
        code = self.wait()
        try:
            self.child.stdin.close()
        except OSError:
            pass  # What was still to be written has no reader any more.
        return code


class Publisher(Process):
    def __init__(self, site, name, checkpoint, peers, *options):
        keys = ("--channel", CHANNEL, "--json", "--publisher-key", site.publisher_key)
        super().__init__(
            site, name, site.node("publish", checkpoint, *keys, *options, name=name, peers=peers), site.environment
        )
        self.published = self.event("published")
        self.manifest, self.seq = self.published["manifest"], self.published["seq"]
        self.address = self.published["addresses"][0]


class Agent:
    """A node with a socket for engines, which can be killed and started anew."""

    def __init__(self, site, name, peers, *options):
        self.site, self.name, self.peers = site, name, list(peers)
        self.options = options
        self.socket = os.path.join(site.directory, f"{name}.sock")
        self.state = os.path.join(site.directory, f"{name}.state")
        self.process = None
        self.start()

    def start(self):
        own = ("--channel", CHANNEL, "--trust", self.site.trust, "--socket", self.socket, "--state", self.state)
        command = self.site.node("agent", *own, *self.options, name=self.name, peers=self.peers)
        self.process = self.site.started(Process(self.site, self.name, command, self.site.environment))
        pid = self.process.pid
        # An agent that was killed left its socket's file behind: the pid in the lock tells who listens.
        self.wait_until("it listens", lambda status: status["addresses"] and self._lock_pid() == pid)
        self.address = self.status()["addresses"][0]

    def kill(self):
        self.process.kill()

    def stop(self):
        return self.process.stop()

    def status(self):
        """``aquifer status --json``, or ``None`` while nobody answers."""
        command = [program(), "--config", os.devnull, "status", "--json", "--socket", self.socket]
        answer = subprocess.run(command, capture_output=True, env=self.site.environment, timeout=PATIENCE)
        return json.loads(answer.stdout) if answer.returncode == 0 else None

    def bytes_in(self):
        return self.status()["traffic"]["bytes_in"]

    def wait_until(self, what, fits):
        """Looks at the status until it ``fits``; returns it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            self.process.check_alive()
            status = self.status()
            if status is not None and fits(status):
                return status
            if time.monotonic() > deadline:
                raise Failure(f"{self.name}: not within {PATIENCE} s: {what}; status: {json.dumps(status)}")
            time.sleep(POLL)

    def wait_engine(self, what, name, fits):
        """The same for one of its engines; returns that engine."""

        def engine(status):
            return next((e for e in status["engines"] if e["name"] == name), None)

        return engine(self.wait_until(what, lambda status: engine(status) is not None and fits(engine(status))))

    def wait_holds(self, manifest):
        """Until all of a release is here."""

        def holds(status):
            channel = status["channels"][0]
            done = channel["chunks_wanted"] > 0 and channel["chunks_have"] == channel["chunks_wanted"]
            return channel["manifest"] == manifest and done

        return self.wait_until(f"holds {manifest}", holds)

    def _lock_pid(self):
        try:
            with open(f"{self.socket}.lock", encoding="ascii") as file:
                return int(file.read().split()[0])
        except (OSError, ValueError, IndexError):
            return None


class Site:
    """A directory with the keys of a mesh, and the processes that a test started."""

    def __init__(self):
        self.directory = tempfile.mkdtemp(prefix="aquifer-")
        # What the user configured for a real mesh must not reach into the tests.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("AQUIFER_")}
        self._processes = []
        self.mesh_key, self.publisher_key = self.path("mesh.key"), self.path("publisher.key")
        self.run("keygen", "mesh", "--out", self.mesh_key)
        self.trust = json.loads(self.run("keygen", "publisher", "--out", self.publisher_key, "--json").stdout)["public"]

    def path(self, *names):
        return os.path.join(self.directory, *names)

    def run(self, *arguments, code=0):
        """Runs the program to its end, which must be ``code``."""
        command = [program(), "--config", os.devnull, *arguments]
        done = subprocess.run(command, capture_output=True, env=self.environment, timeout=PATIENCE, text=True)
        if done.returncode != code:
            raise Failure(f"aquifer {' '.join(arguments)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def manifest(self, directory):
        """``aquifer manifest show --json``."""
        return json.loads(self.run("manifest", "show", directory, "--json").stdout)

    def node(self, *arguments, name, peers):
        """The command line of a node on loopback."""
        at = ["--listen", "127.0.0.1:0", "--data-listen", "127.0.0.1:0", "--mesh-key", self.mesh_key, "--name", name]
        at += ["--shm-dir", os.path.join(self.directory, "shm")]
        for peer in peers:
            at += ["--peer", peer]
        return [program(), "--config", os.devnull, *arguments, *at]

    def started(self, process):
        self._processes.append(process)
        return process

    def publisher(self, name, checkpoint, *options, peers=()):
        return self.started(Publisher(self, name, checkpoint, peers, *options))

    def agent(self, name, *options, peers):
        return Agent(self, name, peers, *options)

    def engine(self, agent, name):
        """A process of ``engine.py`` at ``agent``, which does what it is told."""
        return self.started(Engine(self, agent, name))

    def minilm(self, agent, name):
        """A process that serves embeddings from what ``agent`` gives it; see ``python/tests``."""
        place = self.path(f"{name}.answers")
        options = ("--channel", CHANNEL, "--socket", agent.socket, "--name", name)
        vocabulary = os.path.join(model_directory(), "vocab.txt")
        command = [python_with("torch"), ENGINE_MINILM, "serve", *options, "--vocab", vocabulary, "--listen", place]
        process = self.started(Process(self, name, command, self.environment))
        process.place = place
        return process

    def reference(self, name, directory):
        """A process that answers from a model's file."""
        command = [python_with("torch"), ENGINE_MINILM, "reference", "--model", directory]
        process = self.started(Process(self, name, command, self.environment))
        process.expect(lambda line: "ready" in line, "that it is ready")
        return process

    def variant(self, name, change=1.5, layers=(0, 5)):
        """A second version of the model directory. Returns it and the names of the changed tensors."""
        target = self.path(name)
        shutil.copytree(model_directory(), target)
        file = os.path.join(target, "model.safetensors")
        options = ["--model", model_directory(), "--to", file, "--change", str(change), "--layers", *map(str, layers)]
        done = subprocess.run(
            [python_with("torch"), ENGINE_MINILM, "variant", *options],
            capture_output=True,
            timeout=PATIENCE,
            check=True,
        )
        return target, json.loads(done.stdout)["changed"]

    def logs(self):
        """The ends of all logs, each under its process's name."""
        texts = []
        for name in sorted(os.listdir(self.directory)):
            if name.endswith(".log"):
                with open(self.path(name), "rb") as file:
                    content = file.read()[-LOG_BYTES_MAX:].decode(errors="replace")
                texts.append(f"---- {name}\n{content}")
        return "\n".join(texts)

    def close(self):
        for process in reversed(self._processes):
            if process.child.poll() is None:
                process.kill()
            process.child.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class Engine(Process):
    """Tells an ``engine.py`` what to do, one thing after the other."""

    def __init__(self, site, agent, name):
        self.start(site, name, [python_with("numpy"), ENGINE])
        self.tell("open", channel=CHANNEL, socket=agent.socket, name=name)

    def start(self, site, name, command):
        Process.__init__(self, site, name, command, site.environment)

    def tell(self, do, **what):
        """Returns what it answers; an ``error`` in that is a failure."""
        answer = self.ask(do, **what)
        if "error" in answer:
            raise Failure(f"{self.name} cannot {do} {what}: {answer['error']}")
        return answer["done"]

    def ask(self, do, **what):
        self.say({"do": do, **what})
        return self.expect(lambda line: line.get("of") == do, f"what came of {do}")

    def refusal(self, do, **what):
        """The error that must come of it."""
        answer = self.ask(do, **what)
        if "error" not in answer:
            raise Failure(f"{self.name} could {do} {what}: {answer}")
        return answer["error"]


class Client:
    """Asks a serving process over its Unix socket."""

    def __init__(self, place):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(place)
        self._lines = self._socket.makefile()

    def ask(self, text):
        """The manifest served, and the embedding."""
        self._socket.sendall(json.dumps({"texts": [text]}).encode() + b"\n")
        answer = json.loads(self._lines.readline())
        if "error" in answer:
            raise Failure(f"no answer to {text!r}: {answer['error']}")
        return answer["release"], answer["embeddings"][0]

    def close(self):
        self._lines.close()
        self._socket.close()


class Safetensors:
    """A file's tensors as bytes."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.content = file.read()
        (length,) = struct.unpack_from("<Q", self.content)
        self._begin = 8 + length
        header = json.loads(self.content[8 : self._begin])
        self.entries = {name: entry for name, entry in header.items() if name != "__metadata__"}

    def shape(self, name):
        return self.entries[name]["shape"]

    def tensor(self, name):
        begin, end = self.entries[name]["data_offsets"]
        return self.content[self._begin + begin : self._begin + end]

    def bytes(self, names):
        return sum(len(self.tensor(name)) for name in names)


def sums(directory):
    """Path -> SHA-256 of every file of a directory."""
    found = {}
    for place, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, directory)] = hashlib.sha256(file.read()).hexdigest()
    return found


class MeshTest(unittest.TestCase):
    """A test with a site of its own; if it fails, the logs of its processes are shown."""

    maxDiff = 2000

    def run(self, result=None):
        if getattr(type(self), "__unittest_skip__", False):
            return super().run(result)
        result = result or self.defaultTestResult()
        before = len(result.failures) + len(result.errors)
        self.site = Site()
        try:
            super().run(result)
            if len(result.failures) + len(result.errors) > before:
                print(f"\n==== {self.id()}: logs\n{self.site.logs()}", file=sys.stderr)
        finally:
            self.site.close()
        return result
