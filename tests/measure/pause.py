"""How long an engine is paused for a small update in host memory: what there is besides copying.

    pause.py --program target/release/aquifer [--updates 200] [--tensors 16] [--twin] [--package DIR] [--json FILE]

A publisher, an agent and an engine, which answers all the time, on this machine; in each update one tensor of 256 KiB
changes. With --twin the agent takes the engine's memory for a GPU's. Prints the median, the quartiles and the longest
of the pauses as the engine sees them. Needs Linux and the standard library.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.join(HERE, os.pardir, os.pardir, "python")
CHANNEL = "measure/pause"
TWIN = "GPU-7e57ed00-0000-4000-8000-000000000001"
TENSOR_BYTES = 256 << 10
PATIENCE = 60.0


def engine(package, socket, twin):
    sys.path.insert(0, package)
    import aquifer

    served = aquifer.Engine(CHANNEL, socket, "measured", connect_timeout=30)
    weights = served.allocate(framework="memoryview", hydrate=False)
    if twin:
        for region in served._registration._regions:
            host = region.claim
            gpu = {"device": TWIN, "handle": "00" * 64, "offset": 0}
            region.claim = lambda first, host=host: {**host(first), "gpu": gpu}
    served.wait_hydrated(progress=False)
    before = None
    while True:
        with served.serving() as release:
            for tensor in weights.values():
                sum(bytes(tensor)[:2000])
        time.sleep(0.002)  # Others have work to do, too.
        if release != before:
            print(json.dumps({"release": release, "pause": served.last_pause}), flush=True)
            before = release


class Child:
    def __init__(self, command, log):
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

    def line(self, fits):
        while True:
            text = self.child.stdout.readline()
            if not text:
                raise SystemExit(f"{self.child.args[1:4]} ended with {self.child.wait()}")
            line = json.loads(text)
            if fits(line):
                return line

    def end(self):
        self.child.terminate()
        self.child.wait(PATIENCE)


def checkpoint(directory, n, tensors):
    os.makedirs(directory, exist_ok=True)
    names = [f"tensor.{i:02}" for i in range(tensors)]
    header = {
        name: {"dtype": "U8", "shape": [TENSOR_BYTES], "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    with open(os.path.join(directory, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i in range(tensors):
            # One of them is another each time.
            file.write(random.Random(f"{i} {n if i == n % tensors else 0}").randbytes(TENSOR_BYTES))


def measure(options):
    with tempfile.TemporaryDirectory(prefix="aquifer-pause-") as site, open(os.path.join(site, "log"), "wb") as log:
        path = lambda *names: os.path.join(site, *names)
        run = lambda *arguments: subprocess.run(
            [options.program, "--config", os.devnull, *arguments], check=True, capture_output=True, text=True
        ).stdout
        run("keygen", "mesh", "--out", path("mesh.key"))
        trust = json.loads(run("keygen", "publisher", "--out", path("publisher.key"), "--json"))["public"]
        common = ["--mesh-key", path("mesh.key"), "--listen", "127.0.0.1:0", "--data-listen", "127.0.0.1:0"]
        common += ["--shm-dir", path("shm"), "--channel", CHANNEL]

        def publish(n, peers):
            checkpoint(path(f"release-{n}"), n, options.tensors)
            command = [options.program, "--config", os.devnull, "publish", path(f"release-{n}"), "--json", *common]
            for peer in peers:
                command += ["--peer", peer]
            publisher = Child([*command, "--name", f"p{n}", "--publisher-key", path("publisher.key")], log)
            return publisher, publisher.line(lambda line: line.get("event") == "published")

        publisher, published = publish(0, [])
        agent = [options.program, "--config", os.devnull, "agent", *common, "--trust", trust, "--name", "node"]
        agent += ["--socket", path("socket"), "--state", path("state"), "--peer", published["addresses"][0]]
        agent = Child(agent + (["--twin-gpu", TWIN] if options.twin else []), log)
        package = ["--package", options.package]
        command = [sys.executable, os.path.abspath(__file__), "--engine", path("socket"), *package]
        measured = Child(command + (["--twin"] if options.twin else []), log)
        pauses = []
        try:
            measured.line(lambda line: line["release"] == published["manifest"])
            status = json.loads(run("status", "--json", "--socket", path("socket")))
            for n in range(1, options.updates + 1):
                before = publisher
                publisher, published = publish(n, status["addresses"][:1])
                line = measured.line(lambda line: line["release"] == published["manifest"])
                pauses.append(1e3 * line["pause"])
                before.end()
                shutil.rmtree(path(f"release-{n - 1}"))
        finally:
            for child in (measured, agent, publisher):
                child.end()
        return pauses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--tensors", type=int, default=16)
    parser.add_argument("--twin", action="store_true")
    parser.add_argument("--package", default=PACKAGE, help="where the engine's package is")
    parser.add_argument("--json", help="a file for all pauses, in milliseconds")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        return engine(options.package, options.engine, options.twin)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # With all its children.
    pauses = measure(options)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(pauses, file)
    low, middle, high = statistics.quantiles(pauses, n=4)
    print(
        f"{'twin' if options.twin else 'host'}, {options.tensors} tensors: {len(pauses)} updates, pause: median {middle:.2f} ms"
        f" (quartiles {low:.2f} and {high:.2f}, least {min(pauses):.2f}, most {max(pauses):.2f})"
    )


if __name__ == "__main__":
    main()
