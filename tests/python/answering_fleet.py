"""A fleet of nodes whose engines are asked all the time, and what must hold of their answers."""

import collections
import json
import os
import random
import socket
import struct
import sys
import threading
import time

from mesh import CHANNEL, PATIENCE, Failure, Process, python_with

ANSWERING = os.path.join(os.path.dirname(os.path.abspath(__file__)), "answering.py")
#: Seconds between an answer and the next question of a client: many engines share few cores.
THINKING = 0.005

Answer = collections.namedtuple("Answer", "node asked answered release value standing")


def checkpoint(directory, seed, changed=None, tensors=8, rows=256, columns=1024):
    """A safetensors file of random float32 tensors; ``changed``: the tensors that differ from seed 0's."""
    os.makedirs(directory)
    header, content = {}, b""
    for i in range(tensors):
        source = random.Random(1000 * (seed if changed is None or i in changed else 0) + i)
        data = source.randbytes(4 * rows * columns)
        header[f"layer.{i}"] = {
            "dtype": "F32",
            "shape": [rows, columns],
            "data_offsets": [len(content), len(content) + len(data)],
        }
        content += data
    text = json.dumps(header).encode()
    with open(os.path.join(directory, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + content)
    return sum(content)


class Fleet:
    """``count`` agents, an engine at each, and a client for each that asks until it is told to stop."""

    def __init__(self, site, count, labels=None, peers=(), options=(), refuse=None):
        self.site, self.agents, self.engines = site, [], []
        self._answers, self._faults = [], []
        self._changed = threading.Condition()
        self._stopping = False
        self._clients = []
        for i in range(count):
            of_it = [word for label in (labels[i] if labels else ()) for word in ("--label", label)]
            self.agents.append(site.agent(f"node-{i}", *options, *of_it, peers=[*peers, *self.addresses(2)]))

    def addresses(self, most):
        return [agent.address for agent in self.agents[:most]]

    def start_engine(self, i, *options):
        name = f"engine-{i}"
        place = self.site.path(f"{name}.answers")
        if os.path.exists(place):
            os.unlink(place)
        command = [python_with("numpy"), ANSWERING, "--socket", self.agents[i].socket, "--channel", CHANNEL]
        command += ["--name", name, "--listen", place, *options]
        engine = self.site.started(Process(self.site, name, command, self.site.environment))
        engine.place = place
        return engine

    def start_engines(self, options=lambda i: ()):
        """An engine at each node; returns when all of them are ready."""
        self.engines = [self.start_engine(i, *options(i)) for i in range(len(self.agents))]
        return [engine.event("ready")["manifest"] for engine in self.engines]

    def ask_all_the_time(self):
        for i, engine in enumerate(self.engines):
            client = threading.Thread(target=self._ask, args=(i, engine.place), daemon=True)
            client.start()
            self._clients.append(client)

    def stop_asking(self):
        """All answers, in the order in which they came."""
        with self._changed:
            self._stopping = True
        for client in self._clients:
            client.join(PATIENCE)
        with self._changed:
            if self._faults:
                raise Failure(f"{len(self._faults)} faults, the first: {self._faults[0]}")
            return list(self._answers)

    def wait_answers(self, manifest, nodes=None, standing=None):
        """Until each of the nodes (all, if none are named) has answered under ``manifest``, and knew of that
        ``standing`` if one is given."""
        nodes = set(range(len(self.engines)) if nodes is None else nodes)
        at = 0

        def done():
            nonlocal at
            while at < len(self._answers):
                answer = self._answers[at]
                if answer.release == manifest and standing in (None, answer.standing):
                    nodes.discard(answer.node)
                at += 1
            return self._faults or not nodes

        with self._changed:
            arrived = self._changed.wait_for(done, PATIENCE)
            if not arrived or self._faults:
                raise Failure(f"{sorted(nodes)} do not answer under {manifest[:12]}; faults: {self._faults[:3]}")

    def wait_ready(self, manifest, nodes=None):
        """Until these nodes' agents say that their engines are ready with ``manifest``."""
        for i in range(len(self.agents)) if nodes is None else nodes:
            self.agents[i].wait_until(
                f"is ready with {manifest[:12]}",
                lambda s: s["engines"] and all(e["ready"] and e["serving"] == manifest for e in s["engines"]),
            )

    def _ask(self, node, place):
        try:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.settimeout(PATIENCE)
            client.connect(place)
            with client, client.makefile() as lines:
                while not self._stopping:
                    asked = time.monotonic()
                    client.sendall(b"\n")
                    told = json.loads(lines.readline())
                    with self._changed:
                        of_it = (told["release"], told["value"], told["standing"])
                        self._answers.append(Answer(node, asked, time.monotonic(), *of_it))
                        self._changed.notify_all()
                    time.sleep(THINKING)
        except Exception as error:
            with self._changed:
                self._faults.append(f"node {node}: {type(error).__name__}: {error}")
                self._changed.notify_all()


def check_values(answers, values):
    """Each answer is what its release says, whole."""
    for answer in answers:
        if values.get(answer.release) != answer.value:
            whose = [m[:12] for m, value in values.items() if value == answer.value]
            raise Failure(f"node {answer.node} answered under {answer.release[:12]} what {whose or 'no release'} says")


def check_no_mixture(answers, order):
    """Once somebody was answered under a release, nobody who asks later, wherever, is answered under one before it."""
    rank = {manifest: i for i, manifest in enumerate(order)}
    first = {}
    for answer in answers:
        at = rank[answer.release]
        first[at] = min(first.get(at, answer.answered), answer.answered)
    for answer in answers:
        for newer in range(rank[answer.release] + 1, len(order)):
            if answer.asked > first.get(newer, float("inf")):
                late = 1e3 * (answer.asked - first[newer])
                raise Failure(
                    f"node {answer.node} answered under release {rank[answer.release]} a question asked {late:.1f} ms"
                    f" after release {newer} had answered one"
                )


def longest_wait(answers):
    """Seconds that a question waited for its answer, the longest."""
    return max(answer.answered - answer.asked for answer in answers)


def report(**figures):
    """Figures of a test, for people."""
    text = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
    print(f"  [{text}]", file=sys.stderr, flush=True)
