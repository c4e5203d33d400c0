"""An engine that answers whoever asks, over a Unix socket, from weights that an agent keeps current. Needs NumPy.

    answering.py --socket S --channel C --name N --listen PATH [--fail-at N --turns FILE] [--check-seconds T]

A request is any line; its answer is ``{"release": manifest, "value": V, "standing": S}`` where S is the manifest wanted
and whether the node is ready, as the engine knows, and V is the sum of all of the weights'
bytes as they are at that moment, so a mixture of two releases is found out. ``--fail-at``: of all engines that share
``FILE``, the check of the Nth and of all that come later fails, with each manifest but the first. What the agent makes
known is printed as JSON lines. It ends when stdin does.
"""

import argparse
import json
import os
import socket
import sys
import threading
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
sys.path.insert(0, os.path.join(ROOT, "python"))

import numpy as np

import aquifer

_saying = threading.Lock()


def say(**what):
    with _saying:
        print(json.dumps(what), flush=True)


def value_of(arrays):
    return sum(int(np.frombuffer(memoryview(a).cast("B"), np.uint8).sum(dtype=np.uint64)) for a in arrays)


def answer(engine, arrays, connection):
    with connection, connection.makefile() as lines:
        for _ in lines:
            with engine.serving() as release:
                value = value_of(arrays)
            stands = engine.standing
            standing = [stands.wanted, stands.ready] if stands else None
            connection.sendall(json.dumps({"release": release, "value": value, "standing": standing}).encode() + b"\n")


def listen(place, engine, arrays):
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(place)
    server.listen()
    while True:
        connection, _ = server.accept()
        threading.Thread(target=answer, args=(engine, arrays, connection), daemon=True).start()


def turn(path):
    """How many have asked for a turn, this one counted."""
    with open(path, "ab") as file:
        file.write(b".")
        file.flush()
        return file.tell()


def main():
    parser = argparse.ArgumentParser()
    for name in ("--socket", "--channel", "--name", "--listen"):
        parser.add_argument(name, required=True)
    parser.add_argument("--fail-at", type=int)
    parser.add_argument("--turns")
    parser.add_argument("--check-seconds", type=float, default=0.0)
    options = parser.parse_args()
    engine = aquifer.Engine(options.channel, options.socket, options.name, connect_timeout=60)

    def check(release):
        value = value_of(arrays)
        time.sleep(options.check_seconds)  # What a real one would take.
        say(event="checked", manifest=release.manifest, value=value)
        return release.seq == 1 or options.fail_at is None or turn(options.turns) < options.fail_at

    engine.on_check(check)
    engine.on_pause(lambda release: say(event="pausing", manifest=release.manifest))
    engine.on_resume(lambda release: say(event="resumed", manifest=release.manifest))
    engine.on_failed(lambda reason: say(event="failed", reason=reason))
    arrays = list(engine.allocate(framework="numpy").values())
    threading.Thread(target=listen, args=(options.listen, engine, arrays), daemon=True).start()
    engine.wait_hydrated(progress=False)
    say(event="ready", manifest=engine.release)
    sys.stdin.read()


if __name__ == "__main__":
    main()
