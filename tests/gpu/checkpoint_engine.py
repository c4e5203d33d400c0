"""checkpoint-engine beside Aquifer, in one run: Llama 8B from host memory into another process's GPU memory.

    AQUIFER_BIN=target/release/aquifer python3 tests/gpu/checkpoint_engine.py WHEELS [--runs 5] [--in-place]

WHEELS is a directory into which these were unpacked (`pip download --no-deps`, then unzip): checkpoint-engine 0.4.2,
pyzmq, loguru, pydantic, pydantic-core, annotated-types, typing-inspection, typing-extensions, fastapi 0.115.0 and
starlette 0.38.6. PyTorch with CUDA, numpy, safetensors and httpx must be installed.

First runs `aquifer bench gpu`. Then a ParameterServer of one rank registers the same shapes and updates a worker
process over its ZMQ and CUDA IPC protocol, the first time to warm up. The worker copies every tensor into its model,
as engines do, and at the end some of them are compared. Needs 50 GB of GPU memory and 40 GB of host memory; with
--in-place 17 GB of /dev/shm too, from which checkpoint-engine can register a file without copying it.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
NAME = "llama"
SHM = "/dev/shm"
#: Of Llama 3 8B, as `aquifer bench gpu` has it.
HIDDEN, INTERMEDIATE, KEYS, WORDS, LAYERS = 4096, 14336, 1024, 128256, 32
#: Bytes of random elements that tensors are filled with, each from another place on.
PATTERN_ELEMENTS = 32 << 20
#: A worker that hangs keeps the ParameterServer waiting without end.
LIMIT_S = 480


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", help="where the wheels were unpacked")
    parser.add_argument("--runs", type=int, default=5, help="updates after the first one")
    parser.add_argument("--in-place", action="store_true", help=f"also register a file in {SHM} where it lies")
    parser.add_argument("--without-aquifer", action="store_true", help="checkpoint-engine alone")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer, where memory is short")
    parser.add_argument("--json", help="a file for all figures")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def find_wheels(directory):
    """This file has the package's name: it must not be found in its place."""
    sys.path[:] = [os.path.abspath(directory)] + [p for p in sys.path if os.path.abspath(p or ".") != HERE]
    try:
        import torch  # noqa: F401
        import checkpoint_engine
    except ImportError as missing:
        sys.exit(f"checkpoint_engine.py: {missing}: unpack the wheels that this file names into {directory}")
    if not hasattr(checkpoint_engine, "ParameterServer"):
        sys.exit(f"checkpoint_engine.py: no package of that name is in {directory}: unpack the wheels there")
    return checkpoint_engine.__version__


def shapes(layers):
    yield "model.embed_tokens.weight", (WORDS, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (HIDDEN,)
        yield f"{at}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}.self_attn.k_proj.weight", (KEYS, HIDDEN)
        yield f"{at}.self_attn.v_proj.weight", (KEYS, HIDDEN)
        yield f"{at}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{at}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{at}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{at}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (WORDS, HIDDEN)


def total(tensor):
    """What two tensors with the same bytes have in common."""
    import torch

    return int(tensor.view(-1).view(torch.int16).sum(dtype=torch.int64).item())


def serve_updates(layers):
    """The worker: one line of JSON in, one out."""
    import torch
    import zmq
    from checkpoint_engine.worker import update_weights_from_ipc

    model = {name: torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for name, shape in shapes(layers)}
    torch.cuda.synchronize()
    context = zmq.Context()

    def load(weights):
        for name, tensor in weights:
            model[name].copy_(tensor)

    say({"ready": sum(tensor.nbytes for tensor in model.values())})
    for line in sys.stdin:
        asked = json.loads(line)
        if "check" in asked:
            say({"totals": [total(model[name]) for name in asked["check"]]})
        else:
            began = time.perf_counter()
            update_weights_from_ipc(context, asked["update"], 0, run=load)
            say({"blocked": time.perf_counter() - began})


def say(message):
    print(json.dumps(message), flush=True)


class Worker:
    def __init__(self, options):
        command = [sys.executable, __file__, options.wheels, "--worker", "--layers", str(options.layers)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.bytes = self.hear("ready")

    def ask(self, message, answer):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self.hear(answer)

    def hear(self, answer):
        line = self.process.stdout.readline()
        if not line:
            # The ParameterServer waits for a worker without end, on a thread that nothing interrupts.
            print("checkpoint_engine.py: the worker is gone", file=sys.stderr, flush=True)
            os._exit(1)
        return json.loads(line)[answer]

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def tensors(layers):
    import torch

    pattern = torch.randint(-(2**15), 2**15, (PATTERN_ELEMENTS,), dtype=torch.int16)
    made = {}
    for index, (name, shape) in enumerate(shapes(layers)):
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        flat = tensor.view(-1).view(torch.int16)
        at, source = 0, index * 4099
        while at < flat.numel():
            count = min(flat.numel() - at, PATTERN_ELEMENTS - source)
            flat[at : at + count] = pattern[source : source + count]
            at, source = at + count, 0
        made[name] = tensor
    return made


def environment():
    """One rank on this machine. The server's store listens beside MASTER_PORT."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port - 1))
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def address_of_this_machine():
    """It asks for its own, which a machine without a network does not have."""
    import checkpoint_engine.ps

    try:
        checkpoint_engine.ps.get_ip()
    except OSError:
        checkpoint_engine.ps.get_ip = lambda: "127.0.0.1"


def timed(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(options, version):
    environment()
    from checkpoint_engine.ps import ParameterServer

    address_of_this_machine()
    worker = Worker(options)
    made = tensors(options.layers)
    server = ParameterServer()
    found = {"version": version, "bytes": worker.bytes}
    found["register_s"] = timed(lambda: server.register_checkpoint(NAME, named_tensors=made))
    print(f"checkpoint-engine registered {worker.bytes / 1e9:.2f} GB in {found['register_s']:.2f} s", flush=True)
    updates, blocked = [], []

    def request(paths):
        blocked.append(worker.ask({"update": paths[0][1]}, "blocked"))

    for _ in range(options.runs + 1):
        server.gather_metas(NAME)
        updates.append(timed(lambda: server.update(NAME, request)))
        print(f"  update {updates[-1]:.3f} s, worker blocked {blocked[-1]:.3f} s", flush=True)
    found["update_s"], found["blocked_s"] = updates[1:], blocked[1:]
    some = list(made)[:: max(1, len(made) // 3)]
    right = [total(made[name]) for name in some]
    if worker.ask({"check": some}, "totals") != right:
        sys.exit("checkpoint_engine.py: the worker does not have what was registered")
    worker.stop()
    if options.in_place:
        found["in_place_register_s"] = in_place(server, made, worker.bytes)
    return found


def in_place(server, made, size):
    """How long it takes to register a file where it lies; the server removes the file."""
    from safetensors.torch import save_file

    room = os.statvfs(SHM)
    if room.f_bavail * room.f_frsize < size + (1 << 30):
        print(f"{SHM} has no room for {size / 1e9:.1f} GB: nothing is registered in place", flush=True)
        return None
    path = os.path.join(SHM, f"checkpoint-engine-{os.getpid()}.safetensors")
    try:
        save_file(made, path)
        return timed(lambda: server.register_checkpoint("in place", files=[path]))
    finally:
        if os.path.exists(path):
            os.remove(path)


def bench():
    """What `aquifer bench gpu` says, in this run."""
    binary = os.environ.get("AQUIFER_BIN", "aquifer")
    done = subprocess.run([binary, "bench", "gpu", "--json"], stdout=subprocess.PIPE, text=True)
    document = json.loads(done.stdout) if done.stdout else {"failures": [f"{binary} ended with {done.returncode}"]}
    if document["failures"]:
        sys.exit(f"checkpoint_engine.py: {document['failures'][0]}")
    return document


def show(report):
    """Medians, and least and most, of every thing."""
    for thing in report["series"]:
        rate, took = thing["gb_per_s"]["median"], thing["seconds"]
        low, median, high = (took[key] * 1e3 for key in ("min", "median", "max"))
        print(f"{thing['name']:<30} {rate:9.1f} GB/s {median:10.2f} ms ({low:.2f} to {high:.2f})", flush=True)
    for ratio in report["ratios"]:
        value, met = ratio["value"], {True: "met", False: "NOT met", None: ""}[ratio["met"]]
        print(f"{ratio['name']:<34} {value['median']:9.3f} {ratio['unit']:<5} "
              f"({value['min']:.3f} to {value['max']:.3f}) {met}", flush=True)


def compare(found, document):
    """Rows of: what, checkpoint-engine's seconds, Aquifer's, both for as many bytes."""
    report = document["benches"][0]
    series = {thing["name"]: thing for thing in report["series"]}

    def aquifer(*names):
        return sum(series[name]["seconds"]["median"] * found["bytes"] / series[name]["bytes"] for name in names)

    update, blocked = statistics.median(found["update_s"]), statistics.median(found["blocked_s"])
    ready = aquifer("first touch", "registering")
    rows = [
        ("register: tensors copied to pinned memory; memory touched and registered", found["register_s"], ready),
        ("update: into another's memory; the same, and verified there", update, aquifer("load, any order")),
        ("blocked: while it comes from the host; while it is copied from shadow memory",
         blocked, aquifer("apply from shadow, any order")),
        ("blocked: while it comes from the host; the same from registered host memory",
         blocked, aquifer("apply from host, any order")),
    ]
    if found.get("in_place_register_s"):
        rows.insert(1, ("register: a file in /dev/shm where it lies; registered only",
                        found["in_place_register_s"], aquifer("registering")))
    return [(what, theirs, ours, theirs / ours) for what, theirs, ours in rows]


def main():
    options = arguments()
    signal.alarm(LIMIT_S)
    # Read when the package is imported.
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    version = find_wheels(options.wheels)
    if options.worker:
        return serve_updates(options.layers)
    document = None if options.without_aquifer else bench()
    if document:
        show(document["benches"][0])
    found = measure(options, version)
    update, blocked = statistics.median(found["update_s"]), statistics.median(found["blocked_s"])
    print(f"checkpoint-engine {version}, {found['bytes'] / 1e9:.2f} GB: register {found['register_s']:.2f} s, "
          f"update {update:.3f} s, blocked {blocked:.3f} s (medians of {options.runs})")
    rows = compare(found, document) if document else []
    if rows:
        print(f"{'checkpoint-engine; Aquifer':<80} {'s':>8} {'s':>8} {'ratio':>7}")
    for what, theirs, ours, ratio in rows:
        print(f"{what:<80} {theirs:8.3f} {ours:8.3f} {ratio:7.2f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"checkpoint_engine": found, "aquifer": document, "ratios": rows}, file)


if __name__ == "__main__":
    main()
