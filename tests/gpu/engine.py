"""A language model on a GPU that answers all the time, while an agent keeps its weights current.

    engine.py make DIR SEED [--like DIR]     a checkpoint of random weights, or another with one matrix changed
    engine.py serve --socket S --channel C --name N --mode eager|graph|compile DIR...

`serve` first computes what each checkpoint's answer is, with a model of its own. Then every answer of the
served model must be one of these, and always the same one under the same release. Needs PyTorch, transformers
and safetensors.
"""

import argparse
import json
import os
import sys
import threading
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
sys.path.insert(0, os.path.join(ROOT, "python"))

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import aquifer

FILE = "model.safetensors"
#: 1.1 billion parameters, 2.2 GB in BF16.
CONFIG = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    tie_word_embeddings=False,
)
CHANGED = "model.layers.7.mlp.down_proj.weight"
NEW_TOKENS = 8


def say(**what):
    print(json.dumps(what), flush=True)


def new_model():
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(CONFIG)
    return model.eval()


class Eager:
    """Tokens chosen one after the other, and the logits of the prompt."""

    def __init__(self, model):
        self.model = model
        self.prompt = torch.arange(1, 25, device="cuda").reshape(1, -1) * 997 % CONFIG.vocab_size

    @torch.inference_mode()
    def __call__(self):
        tokens = self.model.generate(
            self.prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        logits = self.model(self.prompt, use_cache=False).logits[0, -1]
        return tokens[0].tolist(), logits.float().cpu().numpy().tobytes()


class Graph:
    """The prompt's logits by a CUDA graph, captured once, before any weights are there."""

    def __init__(self, model):
        self.prompt = torch.arange(1, 25, device="cuda").reshape(1, -1) * 997 % CONFIG.vocab_size
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    model(self.prompt, use_cache=False)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.logits = model(self.prompt, use_cache=False).logits[0, -1]

    def __call__(self):
        self.graph.replay()
        return [], self.logits.float().cpu().numpy().tobytes()


class Unusable(Exception):
    """This machine cannot run a mode."""


class Compiled:
    """The prompt's logits by `torch.compile` of all of the model, which replays CUDA graphs of its own, compiled and
    captured before any weights are there. It takes a minute or two; nothing of the model is left out."""

    def __init__(self, model):
        import torch._dynamo.utils

        self.prompt = torch.arange(1, 25, device="cuda").reshape(1, -1) * 997 % CONFIG.vocab_size
        logits = lambda prompt: model(prompt, use_cache=False).logits[0, -1]
        self.forward = torch.compile(logits, mode="reduce-overhead", dynamic=False)
        begun = time.monotonic()
        try:
            for _ in range(4):  # Compiled, warmed up, captured, replayed.
                self()
        except Exception as error:
            why = str(error).strip().splitlines() or [""]
            raise Unusable(
                f"torch.compile does not work here (it needs Triton and a C compiler, such as gcc, beside Python's "
                f"headers): {type(error).__name__}: {why[0]}"
            ) from error
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if not graphs:
            raise Unusable("torch.compile compiled nothing")
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        say(event="compiled", graphs=graphs, breaks=breaks, seconds=round(time.monotonic() - begun, 1))

    @torch.no_grad()
    def __call__(self):
        torch.compiler.cudagraph_mark_step_begin()
        return [], self.forward(self.prompt).float().cpu().numpy().tobytes()


MODES = {"eager": Eager, "graph": Graph, "compile": Compiled}


def make(directory, seed, like):
    torch.manual_seed(seed)
    if like is None:
        state = new_model().state_dict()
    else:
        state = load_file(os.path.join(like, FILE))
        state[CHANGED] = torch.randn_like(state[CHANGED]) * 0.02
    os.makedirs(directory)
    save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, os.path.join(directory, FILE))


def expected(mode, directories):
    model = new_model()
    answers = []
    runner = mode(model)
    for directory in directories:
        model.load_state_dict(load_file(os.path.join(directory, FILE), device="cuda"))
        answers.append(runner())
        if answers[-1] != runner():
            say(event="fault", reason="the reference does not repeat itself")
    del runner, model
    torch.cuda.empty_cache()
    if len(set(map(repr, answers))) != len(answers):
        say(event="fault", reason="two checkpoints answer alike")
    return answers


def serve(options):
    mode = MODES[options.mode]
    try:
        answers = expected(mode, options.directories)
        model = new_model()
        runner = mode(model)
    except Unusable as unusable:
        say(event="fault", reason=str(unusable))
        sys.exit(1)
    engine = aquifer.Engine(options.channel, options.socket, options.name, connect_timeout=60)
    engine.on_pause(lambda release: say(event="pausing", manifest=release.manifest))
    engine.on_resume(lambda release: say(event="resuming", manifest=release.manifest))
    bound = engine.bind_module(model)
    say(event="bound", bound=len(bound.bound), unused=len(bound.unused))
    engine.wait_hydrated(progress=False)
    say(event="hydrated", manifest=engine.release)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    seen, count, before, told = {}, {}, None, time.monotonic()
    while not ended.is_set():
        with engine.serving() as release:
            answer = runner()
        if answer not in answers:
            return say(event="fault", reason=f"an answer of no checkpoint under {release}")
        which = answers.index(answer)
        if seen.setdefault(release, which) != which:
            return say(event="fault", reason=f"{release} answered as {seen[release]} and as {which}")
        count[release] = count.get(release, 0) + 1
        if release != before:
            say(event="serves", manifest=release, checkpoint=which, pause=engine.last_pause)
            before = release
        if options.count and time.monotonic() - told >= 0.2:
            told = time.monotonic()
            say(event="count", answers=sum(count.values()), at=told)
    say(event="ended", answers=sum(count.values()), releases=len(count))


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("directory")
    making.add_argument("seed", type=int)
    making.add_argument("--like")
    serving = commands.add_parser("serve")
    for name in ("--socket", "--channel", "--name"):
        serving.add_argument(name, required=True)
    serving.add_argument("--mode", required=True, choices=MODES)
    serving.add_argument("--count", action="store_true", help="say now and then how many answers were given")
    serving.add_argument("directories", nargs="+")
    options = parser.parse_args()
    if options.command == "make":
        make(options.directory, options.seed, options.like)
    else:
        serve(options)


if __name__ == "__main__":
    main()
