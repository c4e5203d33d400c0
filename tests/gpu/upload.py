"""What an engine on a GPU notices of it that its node serves others from the GPU's memory.

    AQUIFER_BIN=target/release/aquifer python3 tests/gpu/upload.py [--limits 512MiB,2GiB,4GiB] [--json FILE]

A node with one engine, which answers by a CUDA graph all the time (see engine.py), and host memory for few chunks: its
publisher has left, so that most of the model lies on the GPU alone. For each limit the node's agent is started anew and
another node comes that wants to hold all of it. Prints how many answers a second the engine gave before and meanwhile,
and how fast chunks came out of the GPU; ends with 1 if anything is wrong. Needs a GPU, PyTorch, transformers and
safetensors, and 5 GB of disk.
"""

import argparse
import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir, "python"))

from mesh import CHANNEL, PATIENCE, Failure, Process, Site

ENGINE = os.path.join(HERE, "engine.py")
SMALL = ("--memory-limit", "64MiB")
#: Seconds for which answers are counted before anybody reads.
BEFORE_S = 5.0


def counts(engine):
    """Answers so far, and when that was said."""
    line = engine.expect(lambda l: l.get("event") in ("count", "fault"), "how often it answered")
    if line["event"] == "fault":
        raise Failure(f"{engine.name}: {line}")
    return line["answers"], line["at"]


def last_counts(engine):
    """The newest of what it said."""
    now = time.monotonic()
    while True:
        answers, at = counts(engine)
        if at >= now:
            return answers, at


def rate(begin, end):
    return (end[0] - begin[0]) / (end[1] - begin[1])


def measure(site, node, engine, manifest, limit):
    node.kill()
    node.options = (*SMALL, "--gpu-upload-limit", limit)
    node.start()
    node.wait_engine("it serves again", "engine", lambda e: e["serving"] == manifest and e["ready"])
    begin = last_counts(engine)
    time.sleep(BEFORE_S)
    end = last_counts(engine)
    reader = site.agent(f"reader-{limit}", "--hold", "all", "--memory-limit", "8GiB", peers=[node.address])
    reader.wait_until("it reads", lambda status: status["traffic"]["bytes_in"] > 0)
    reading, out = last_counts(engine), node.status()["traffic"]["bytes_out_of_gpus"]
    # What no engine needs, such as the files' headers, has left with the publisher.
    there = node.status()["engines"][0]["chunks_total"]
    reader.wait_until("it has the model", lambda status: status["channels"][0]["chunks_have"] >= there)
    done, all_out = last_counts(engine), node.status()["traffic"]["bytes_out_of_gpus"]
    corrupt = reader.status()["traffic"]["chunks_corrupt"]
    reader.stop()
    if corrupt or not all_out:
        raise Failure(f"{corrupt} chunks came wrong; {all_out} bytes came out of the GPU")
    found = {
        "limit": limit,
        "answers_per_s_before": rate(begin, end),
        "answers_per_s_meanwhile": rate(reading, done),
        "bytes_per_s": (all_out - out) / (done[1] - reading[1]),
        "bytes_out_of_gpus": all_out,
    }
    share = found["answers_per_s_meanwhile"] / found["answers_per_s_before"]
    print(
        f"limit {limit}/s: {found['answers_per_s_before']:.1f} answers a second before, {100 * share:.1f} % of that "
        f"while {all_out / 1e9:.2f} GB came out of the GPU at {found['bytes_per_s'] / 1e9:.2f} GB/s",
        flush=True,
    )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", default="512MiB,2GiB,4GiB")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    site = Site()
    try:
        subprocess.run([sys.executable, ENGINE, "make", site.path("a"), "1"], check=True)
        publisher = site.publisher("publisher", site.path("a"))
        node = site.agent("node", *SMALL, peers=[publisher.address])
        command = [sys.executable, ENGINE, "serve", "--socket", node.socket, "--channel", CHANNEL, "--name", "engine"]
        command += ["--mode", "graph", "--count", site.path("a")]
        engine = site.started(Process(site, "engine", command, site.environment))
        fits = lambda line: line.get("event") in ("hydrated", "fault")
        line = engine.expect(fits, "that it is hydrated", 3 * PATIENCE)
        if line["event"] == "fault":
            raise Failure(f"engine: {line}")
        node.wait_holds(publisher.manifest)
        publisher.stop()
        found = [measure(site, node, engine, publisher.manifest, limit) for limit in options.limits.split(",")]
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(found, file, indent=1)
    except BaseException:
        print(site.logs(), file=sys.stderr)
        raise
    finally:
        site.close()


if __name__ == "__main__":
    main()
