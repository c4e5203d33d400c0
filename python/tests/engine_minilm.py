"""An engine process that answers with sentence embeddings. Needs PyTorch.

    engine_minilm.py serve --channel C --vocab vocab.txt [--socket PATH] [--listen PATH]
    engine_minilm.py reference --model DIR [--listen PATH]
    engine_minilm.py variant --model DIR --to FILE [--change FACTOR] [--layers [N ...]]

``serve`` takes its weights from the node's agent, ``reference`` from the model's file. Both say
``{"ready": true, "release": ...}`` on stdout once they can answer, and then answer each line
``{"texts": [...]}`` by a line ``{"release": ..., "embeddings": [[...], ...]}``, on stdin and stdout
or, with ``--listen``, to any number of connections of a Unix socket at once. A line that cannot be
answered is answered by ``{"error": ...}``. They end when stdin does. ``release`` is the manifest
served, ``null`` for a file. ``variant`` writes a second version of the checkpoint.
"""

import argparse
import contextlib
import json
import os
import socketserver
import sys
import threading

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import torch

import aquifer
import minilm


def main():
    options = arguments()
    # One thread computes one answer: equal queries then give equal bits.
    torch.set_num_threads(1)
    if options.command == "variant":
        source = os.path.join(options.model, "model.safetensors")
        print(json.dumps({"changed": minilm.write_variant(source, options.to, options.change, options.layers)}))
    elif options.command == "reference":
        model, vocabulary = minilm.read_model(options.model)
        answer(model, vocabulary, lambda: contextlib.nullcontext(None), options.listen)
    else:
        with aquifer.Engine(options.channel, socket=options.socket, name=options.name, connect_timeout=60) as engine:
            weights = engine.allocate(framework="torch")
            engine.wait_hydrated(options.timeout)
            vocabulary = minilm.read_vocabulary(options.vocab)
            answer(minilm.load(weights), vocabulary, engine.serving, options.listen)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve")
    serve.add_argument("--channel", required=True)
    serve.add_argument("--vocab", required=True)
    serve.add_argument("--socket")
    serve.add_argument("--name")
    serve.add_argument("--timeout", type=float, default=None, help="seconds to wait for the weights")
    reference = commands.add_parser("reference")
    reference.add_argument("--model", required=True, help="directory with model.safetensors and vocab.txt")
    for command in (serve, reference):
        command.add_argument("--listen", help="path of a Unix socket to answer on, instead of stdin and stdout")
    variant = commands.add_parser("variant")
    variant.add_argument("--model", required=True)
    variant.add_argument("--to", required=True)
    variant.add_argument("--change", type=float, default=1.5)
    variant.add_argument("--layers", type=int, nargs="*", default=(0, 5), help="none: all of it")
    return parser.parse_args()


def answer(model, vocabulary, serving, listen):
    """Answers queries until stdin ends."""

    def reply(line):
        try:
            texts = json.loads(line)["texts"]
            with serving() as release:
                embeddings = minilm.embed(model, texts, vocabulary)
            return {"release": release, "embeddings": embeddings.tolist()}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    if listen is None:
        with serving() as release:
            say({"ready": True, "release": release})
        for line in sys.stdin:
            say(reply(line))
        return

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                self.wfile.write(json.dumps(reply(line)).encode() + b"\n")

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    with Server(listen, Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with serving() as release:
            say({"ready": True, "release": release})
        sys.stdin.read()
        server.shutdown()


_saying = threading.Lock()


def say(message):
    with _saying:
        print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
