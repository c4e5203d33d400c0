"""What a synchronous rollout takes beyond the pull: eight nodes, each with an engine that is asked all the time.

    AQUIFER_BIN=target/release/aquifer python3 tests/measure/rollout.py [--updates 20] [--nodes 8] [--json FILE]

Each update changes a part of a small checkpoint. Of each release the nodes' own times are read from `aquifer releases`:
the pull is over when the last node has all of it verified, and the rollout when the last one is ready; both since the
node heard of the release. Beside it is the time from the publisher's word that it is published until the last engine
resumed, by this program's clock. Needs NumPy.
"""

import argparse
import json
import os
import statistics
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, os.pardir, "python"))

from answering_fleet import Fleet, check_no_mixture, check_values, checkpoint, longest_wait
from mesh import CHANNEL, Site


def figures(site, agent, manifest):
    """Milliseconds since each node heard of it: until verified, and until ready, of the last."""
    told = json.loads(site.run("releases", CHANNEL, "--json", "--socket", agent.socket).stdout)
    release = next(r for r in told["releases"] if r["manifest"] == manifest)
    times = [dict(map(tuple, node["times"])) for node in release["nodes"]]
    reached = lambda phase: max(t[phase] for t in times if phase in t)
    pulled = max(max(ms for phase, ms in t.items() if phase in ("heard", "planned", "fetched", "verified")) for t in times)
    return {"pulled": pulled, "staged": reached("staged"), "ready": reached("ready"), "nodes": len(times)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--json")
    options = parser.parse_args()
    site = Site()
    try:
        values = {}
        value = checkpoint(site.path("release-0"), 0)
        publisher = site.publisher("publisher-0", site.path("release-0"))
        values[publisher.manifest], order = value, [publisher.manifest]
        fleet = Fleet(site, options.nodes, peers=[publisher.address])
        fleet.start_engines()
        fleet.wait_ready(publisher.manifest)
        fleet.ask_all_the_time()
        rows = []
        for n in range(1, options.updates + 1):
            directory = site.path(f"release-{n}")
            value = checkpoint(directory, n, (1, 3))
            before = publisher
            publisher = site.publisher(f"publisher-{n}", directory, "--policy", "synchronous", peers=fleet.addresses(3))
            at = time.monotonic()
            values[publisher.manifest] = value
            order.append(publisher.manifest)
            for engine in fleet.engines:
                engine.expect(lambda l: l.get("event") == "resumed" and l["manifest"] == publisher.manifest, "that it resumed")
            resumed = time.monotonic() - at
            fleet.wait_ready(publisher.manifest)
            row = figures(site, fleet.agents[0], publisher.manifest)
            rows.append({**row, "resumed": 1e3 * resumed, "overhead": row["ready"] - row["pulled"]})
            before.stop()
        answers = fleet.stop_asking()
        check_values(answers, values)
        check_no_mixture(answers, order)
        for name in ("pulled", "staged", "ready", "overhead", "resumed"):
            of = sorted(row[name] for row in rows)
            print(f"{name:<9} ms: median {statistics.median(of):.0f}, {of[0]:.0f} to {of[-1]:.0f}")
        print(f"{len(answers)} answers, none of a mixture; longest wait {1e3 * longest_wait(answers):.0f} ms")
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(rows, file)
    except BaseException:
        print(site.logs()[-20000:], file=sys.stderr)
        raise
    finally:
        site.close()


if __name__ == "__main__":
    main()
