"""An agent that is made up: it serves the page under a strict policy, and whatever state a test gives it."""

import base64
import hashlib
import http.server
import json
import math
import os
import queue
import re
import threading
import time
import urllib.parse

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
PAGE = os.path.join(ROOT, "src", "http", "page.html")
CHANNEL = "prod/model"
OLD, NEW = hashlib.sha256(b"release 11").hexdigest(), hashlib.sha256(b"release 12").hexdigest()


def policy(page):
    """What the page may do: its own script, its own style, and asking who served it."""

    def named(tag):
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(found) == 1, f"{len(found)} of {tag}, and there is to be one"
        return "'sha256-" + base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; connect-src 'self'; script-src {named('script')}; style-src {named('style')}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Stub:
    """``state`` is what GET /v1/status gives; ``None``: the agent is gone, and connections end without an answer."""

    def __init__(self, state):
        self.state = state
        self.given = []
        self.channels_asked = []
        self.listeners = []
        self.began = time.monotonic()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def say(self, event):
        for listener in list(self.listeners):
            listener.put(event)

    def gone(self):
        self.state, self.kept = None, self.state
        self.say(None)

    def back(self):
        self.state = self.kept

    def close(self):
        self.say(None)
        self.server.shutdown()
        self.server.server_close()

    def _status(self):
        state = dict(self.state, uptime_seconds=time.monotonic() - self.began)
        self.given.append(state)
        del self.given[:-60]
        return state

    def _handler(stub):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                if stub.state is None:
                    self.close_connection = True
                    return
                url = urllib.parse.urlsplit(self.path)
                asked = urllib.parse.parse_qs(url.query).get("channel", [""])[0]
                if url.path == "/":
                    with open(PAGE, encoding="utf-8") as file:
                        page = file.read()
                    self._answer("text/html; charset=utf-8", page, policy(page))
                elif url.path == "/v1/status":
                    self._answer("application/json", json.dumps(stub._status()))
                elif url.path == "/v1/swarm":
                    stub.channels_asked.append(asked)
                    self._answer(
                        "application/json",
                        json.dumps(dict(stub.state.get("_swarm") or swarm(), channel=asked, manifest=NEW)),
                    )
                elif url.path == "/v1/autoscale":
                    self._answer("application/json", json.dumps(dict(stub.state["_autoscale"], channel=asked)))
                elif url.path == "/v1/events":
                    self._events()
                else:
                    self.send_response(204)
                    self.end_headers()

            def _answer(self, kind, text, csp=None):
                body = text.encode()
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                if csp:
                    self.send_header("Content-Security-Policy", csp)
                self.end_headers()
                self.wfile.write(body)

            def _events(self):
                mine = queue.Queue()
                self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(b"retry: 200\n\n")
                for event in stub.state["_events"]:
                    self._event(event)
                stub.listeners.append(mine)
                while (event := mine.get()) is not None:
                    try:
                        self._event(event)
                    except OSError:
                        break
                stub.listeners.remove(mine)

            def _event(self, event):
                text = f"event: {event['event']}\nid: {event['id']}\ndata: {json.dumps(event)}\n\n"
                self.wfile.write(text.encode())
                self.wfile.flush()

        return Handler


# ---- states ----


def node_id(i):
    return hashlib.sha256(f"node {i}".encode()).hexdigest()


def report(phase, seq=12, served=None, step=None, ready=None, reason=""):
    wanted, before = (NEW, OLD) if seq == 12 else (OLD, OLD)
    done = phase == "ready"
    serves = served if served is not None else (wanted if done else before)
    return {
        "channel": CHANNEL, "seq": seq, "wanted": wanted, "due": serves, "served": serves,
        "step": step or ("done" if done else "waiting"), "phase": phase,
        "ready": phase != "paused" if ready is None else ready, "reason": reason,
    }  # fmt: skip


def peer(i, name, labels, rollouts, have=1201, want=1201, engines=2, **more):
    ready = engines if all(r["ready"] for r in rollouts) else 0
    p = {
        "node": node_id(i), "name": name, "connected": True, "labels": labels,
        "channels": [[CHANNEL, rollouts[0]["seq"] if rollouts else 12, have, want]], "rollouts": rollouts,
        "engines": engines, "engines_ready": ready, "avoided": False, "corrupt_chunks": 0,
        "bytes_from": 3_400_000 * i, "bytes_by": {"tcp": 3_400_000 * i} if i else {}, "bytes_to": 2_900_000 * i, "draining": False,
    }  # fmt: skip
    return p | more


def event(n, kind, **more):
    e = {
        "id": f"{node_id(0)[:16]}-1-{n}", "seq": n, "time_unix_ms": 1_790_000_000_000 + 1700 * n, "event": kind,
        "node": node_id(0), "name": "gpu-a1-01", "channel": CHANNEL, "release": 12, "manifest": NEW, "engine": None,
        "bytes_done": None, "bytes_total": None, "eta_seconds": None, "peer": None, "reason": "",
    }  # fmt: skip
    return e | more


def status(name="gpu-a1-01", peers=(), rollout=None, engines=1, labels=(), channels=None, **more):
    """A node that holds release 12 and whose engines serve it, if nothing else is said."""
    rollout = rollout or report("ready")
    channel = {
        "channel": CHANNEL, "seq": 12, "manifest": NEW, "publisher": hashlib.sha256(b"publisher").hexdigest(),
        "note": "step 48000", "checkpoint_bytes": 152_417_280_512, "chunks": 2_318_112, "chunks_wanted": 2_318_112,
        "chunks_have": 2_318_112, "bytes_wanted": 152_417_280_512, "bytes_have": 152_417_280_512, "sources": 0,
        "state": "hydrated", "problem": None, "rollout": rollout if engines else None,
        "policy": "rolling: 3 out at a time, by rack", "word": None, "eta_seconds": None,
    }  # fmt: skip
    engine = lambda i: {  # noqa: E731
        "name": f"vllm-{i}", "pid": 4100 + i, "channel": CHANNEL, "phase": "serving", "serving": rollout["served"],
        "ready": rollout["ready"], "chunks_done": 1_159_056, "chunks_total": 1_159_056, "reason": None, "during_pause": "held",
    }  # fmt: skip
    state = {
        "node": node_id(0), "name": name, "version": "0.1.0", "uptime_seconds": 0.0,
        "addresses": ["/ip4/10.0.1.1/tcp/7401"], "data_endpoint": ":7402", "data_encryption": "off",
        "channels": [channel] if channels is None else channels, "engines": [engine(i) for i in range(engines)],
        "publication": None, "peers": list(peers), "labels": [list(label) for label in labels],
        "traffic": dict.fromkeys(
            ["bytes_in", "bytes_out", "bytes_out_of_gpus", "chunks_verified", "chunks_corrupt", "reads_failed", "chunks_found", "sources"], 0
        ) if not engines else {
            "bytes_in": 152_417_280_512, "bytes_out": 611_240_112_128, "bytes_out_of_gpus": 0, "chunks_verified": 2_318_112,
            "chunks_corrupt": 0, "reads_failed": 3, "chunks_found": 0, "sources": min(24, len(peers)),
        },
        "transports": {
            "rdma": {"received_bytes": 148_217_280_512, "sent_bytes": 603_240_112_128},
            "shm": {"received_bytes": 0, "sent_bytes": 0},
            "tcp": {"received_bytes": 4_211_000_000, "sent_bytes": 8_004_000_000},
        },
        "rdma_ports": [], "rejected_releases": {"forged": 0, "untrusted": 0, "older": 0},
        "memory_store_bytes": 4_294_967_296, "disk_store_bytes": 0, "leased_bytes": 268_435_456,
        "rates": {"in_bytes_per_s": 0.0, "out_bytes_per_s": 1_342_177_280.0}, "draining": False, "http": "127.0.0.1:7404",
        "_autoscale": {
            "hydrated_replicas": 1 + len(peers), "ready_replicas": 1 + len(peers), "hydrating_replicas": 0, "hydrating": [],
            "spare_upload_bytes_per_s": 1_200_000_000.0, "nodes": 1, "predicted_seconds": 11.6,
        },
        "_events": [],
    }  # fmt: skip
    state.update(more)
    ready = bool(rollout["ready"]) and not state["draining"]
    said = [
        {"channel": c["channel"], "seq": c["seq"], "manifest": c["manifest"], "ready": ready, "reason": rollout["reason"], "eta_seconds": None}
        for c in state["channels"]
    ]  # fmt: skip
    state.setdefault("readiness", {
        "ready": ready, "node": state["node"], "name": name, "reason": rollout["reason"], "eta_seconds": None,
        "channels": said, "draining": state["draining"],
    })  # fmt: skip
    return state


def swarm(buckets=256, copies=lambda x: 20 + 30 * (1 + math.sin(x / 19)) + 8 * math.sin(x / 3.1), here=lambda x: 1.0):
    parts = [{"have": here(x), "wanted": 1.0, "copies": max(0.0, copies(x))} for x in range(buckets)]
    return {"channel": CHANNEL, "manifest": NEW, "chunks": 2_318_112, "buckets": parts}


def alone():
    return status(
        peers=[], rates={"in_bytes_per_s": 0.0, "out_bytes_per_s": 0.0}, _swarm=swarm(copies=lambda x: 0.0),
        _events=[
            event(1, "joined", channel=None, release=None), event(2, "engine-joined", engine="vllm-0"), event(3, "heard"),
            event(4, "hydrated"), event(5, "activated", engine="vllm-0"),
        ],
    )  # fmt: skip


def failing():
    return rolling(failed=37)


def rolling(n=64, failed=None):
    """Two zones of two racks, a rolling release under way, one node that drains, and a publisher."""
    phases = ["ready"] * 8 + ["paused", "checked", "staged", "staged", "verified", "fetched", "planned", "heard"]
    peers = []
    for i in range(1, n):
        where = i * 4 // n
        labels = [["zone", "ab"[where // 2]], ["rack", f"{'ab'[where // 2]}{1 + where % 2}"]]
        name = f"gpu-{labels[1][1]}-{1 + i % (n // 4):02}"
        phase = phases[i % (n // 4) * len(phases) // (n // 4)]
        of = report(phase, step="going" if phase in ("paused", "checked") else None, ready=phase not in ("paused", "checked"),
                    reason={"paused": "switching", "checked": "switching", "staged": "waits for its turn"}.get(phase, ""))  # fmt: skip
        have = {"planned": 640, "heard": 0}.get(phase, 1201)
        more = {}
        if i == failed:
            of = report(
                "failed",
                step="halted",
                ready=False,
                reason="the engine's check failed: perplexity 41.2, expected below 12",
            )
        if i == 52:
            of, more = report("heard", seq=11), {"draining": True}
        if i == 23:
            of = report("ready", seq=11)
        peers.append(peer(i, name, labels, [of], have=have, **more))
    peers.append(peer(n, "publisher", [["zone", "a"], ["rack", "a1"]], [], engines=0))
    happened = [
        event(1, "joined", channel=None, release=None), event(2, "engine-joined", engine="vllm-0"), event(3, "engine-joined", engine="vllm-1"),
        event(4, "heard"), event(5, "hydrating", bytes_done=91 << 30, bytes_total=152_417_280_512, eta_seconds=21.0), event(6, "hydrated"),
        event(7, "activated", engine="vllm-0"), event(8, "activated", engine="vllm-1"), event(9, "peer-joined", peer=node_id(52), channel=None),
    ]  # fmt: skip
    hydrating = [
        {"node": p["node"], "name": p["name"], "fraction": 0.53, "eta_seconds": 18.0}
        for p in peers
        if p["channels"][0][2] == 640
    ]
    return status(
        peers=peers, engines=2, labels=[("zone", "a"), ("rack", "a1")], _events=happened,
        _autoscale={
            "hydrated_replicas": 52, "ready_replicas": 57, "hydrating_replicas": len(hydrating), "hydrating": hydrating,
            "spare_upload_bytes_per_s": 19.4e9, "nodes": 1, "predicted_seconds": 11.6,
        },
    )  # fmt: skip


def thousand():
    peers = []
    for i in range(1, 1000):
        rack = i * 25 // 1000
        of = report("ready") if i % 3 else report("staged", reason="waits for its turn")
        if i == 777:
            of = report("failed", step="halted", ready=False, reason="the engine's check failed")
        peers.append(peer(i, f"n{i:04}", [["zone", "abcde"[rack // 5]], ["rack", f"r{rack:02}"]], [of]))
    return status(name="n0000", peers=peers, labels=[("zone", "a"), ("rack", "r00")])


def hostile():
    """Names that want to be markup, to be invisible, to turn the line around, or not to end."""
    names = [
        "<img src=x onerror=alert(1)>", "</script><script>window.hit=1</script>", "__proto__", "constructor", "a\u202eb\u0000c",
        "x" * 3000, "\"'><svg/onload=window.hit=1>", "javascript:window.hit=1",
    ]  # fmt: skip
    channel = "<b>prod</b>/" + "m" * 60
    peers = []
    for i, name in enumerate(names, 1):
        of = report("failed" if i == 1 else "ready", ready=i != 1, reason=name) | {"channel": channel}
        labels = [["zone", name], ["rack", name], ["__proto__", name]]
        peers.append(peer(i, name, labels, [of]) | {"channels": [[channel, 12, 3, 4]], "bytes_by": {name: 5}})
    state = status(name=names[0], peers=peers)
    state["channels"][0].update(channel=channel, note=names[1], policy=names[6], problem=names[0])
    state["channels"][0]["rollout"] |= {"channel": channel}
    state["engines"][0].update(name=names[0], channel=channel, reason=names[1], phase=names[6])
    state["transports"][names[0]] = {"received_bytes": 1, "sent_bytes": 2}
    state["readiness"]["channels"][0]["channel"] = channel
    state["_events"] = [
        event(i, "check-failed", reason=name, channel=channel, engine=name) for i, name in enumerate(names)
    ]
    state["_events"].append(event(99, "constructor", reason="no such kind"))
    return state


def gathering():
    """A node that comes new, with two others, of which one is in no zone; some chunks nobody is known to have."""
    of = report("planned", served="", step="going", ready=False, reason="fetching")
    state = status(
        name="fresh", rollout=of, engines=1,
        peers=[peer(1, "seed", [], [], engines=0), peer(2, "half", [["zone", "b"]], [], have=300, engines=0)],
        rates={"in_bytes_per_s": 3.1e9, "out_bytes_per_s": 2.2e8},
        _swarm=swarm(90, copies=lambda x: 0 if 30 < x < 34 else 1 + (x < 25), here=lambda x: max(0.0, min(1.0, 1.2 - x / 40))),
    )  # fmt: skip
    state["channels"][0].update(
        state="fetching", bytes_have=61 << 30, chunks_have=1_000_112, sources=2, eta_seconds=27.4
    )
    state["engines"][0].update(phase="hydrating", chunks_done=400_000, serving="")
    state["readiness"].update(reason="prod/model: fetching release 12", eta_seconds=27.4)
    return state


def nothing():
    """The first agent of a mesh, just started."""
    return status(engines=0, channels=[], transports={"tcp": {"received_bytes": 0, "sent_bytes": 0}}) | {
        "readiness": {"ready": False, "node": node_id(0), "name": "gpu-a1-01", "reason": "no engine has registered yet", "eta_seconds": None, "channels": [], "draining": False}
    }  # fmt: skip


def unreleased():
    """It follows a channel of which no release is known."""
    bare = dict.fromkeys(
        ["seq", "checkpoint_bytes", "chunks", "chunks_wanted", "chunks_have", "bytes_wanted", "bytes_have", "sources"],
        0,
    )
    state = nothing()
    state["channels"] = [bare | {"channel": CHANNEL, "manifest": "", "publisher": "", "note": "", "state": "waiting", "problem": None,
                                 "rollout": None, "policy": "", "word": None, "eta_seconds": None}]  # fmt: skip
    return state


def empty():
    """A checkpoint of no bytes, and a channel with a problem."""
    state = status()
    nil = dict.fromkeys(["checkpoint_bytes", "chunks", "chunks_wanted", "chunks_have", "bytes_wanted", "bytes_have"], 0)
    state["channels"][0].update(nil, state="idle", problem="the store is full: 0 B of 12 GiB are left")
    state["engines"][0].update(chunks_done=0, chunks_total=0)
    state["_swarm"] = {"channel": CHANNEL, "manifest": NEW, "chunks": 0, "buckets": []}
    return state
