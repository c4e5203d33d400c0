"""The model that is served in end-to-end tests, small here, and its process under a fake agent."""

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import unittest

from support import PATIENCE, AgentTest, manifest, release, torch

if torch:
    import minilm

HIDDEN, INNER, LAYERS, POSITIONS = 24, 32, 6, 16
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "un", "##believ", "##able", "believ", ",", "中", "cafe"]
VOCABULARY = {token: number for number, token in enumerate(TOKENS)}
TEXTS = ["the unbelievable", "cafe, the", "中 the the the"]


def random_weights(seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights = {
        "embeddings.word_embeddings.weight": normal(len(TOKENS), HIDDEN),
        "embeddings.position_embeddings.weight": normal(POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": normal(2, HIDDEN),
    }
    linears = {
        "attention.self.query": (HIDDEN, HIDDEN),
        "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN),
        "attention.output.dense": (HIDDEN, HIDDEN),
        "intermediate.dense": (INNER, HIDDEN),
        "output.dense": (HIDDEN, INNER),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        for name, (rows, columns) in linears.items():
            weights[f"encoder.layer.{layer}.{name}.weight"] = normal(rows, columns) / 5
            weights[f"encoder.layer.{layer}.{name}.bias"] = normal(rows)
        norms += [f"encoder.layer.{layer}.attention.output.LayerNorm", f"encoder.layer.{layer}.output.LayerNorm"]
    for name in norms:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = normal(HIDDEN), normal(HIDDEN)
    return weights


def write_safetensors(path, weights):
    header, at = {}, 0
    for name, tensor in weights.items():
        length = 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in weights.values():
            file.write(tensor.numpy().tobytes())


@unittest.skipUnless(torch, "needs PyTorch")
class Model(unittest.TestCase):
    def test_a_layer_is_what_pytorch_calls_one(self):
        w = random_weights(1)
        theirs = torch.nn.TransformerEncoderLayer(
            HIDDEN, minilm.HEADS, INNER, activation="gelu", layer_norm_eps=minilm.LAYER_NORM_EPS, batch_first=True
        ).train()  # In eval mode the padding comes out otherwise.
        for dropout in (theirs.dropout, theirs.dropout1, theirs.dropout2):
            dropout.p = 0.0
        theirs.self_attn.dropout = 0.0
        name = "encoder.layer.0."
        parts = ["query", "key", "value"]
        state = {
            "self_attn.in_proj_weight": torch.cat([w[f"{name}attention.self.{p}.weight"] for p in parts]),
            "self_attn.in_proj_bias": torch.cat([w[f"{name}attention.self.{p}.bias"] for p in parts]),
        }
        for their_name, our_name in [
            ("self_attn.out_proj", "attention.output.dense"),
            ("linear1", "intermediate.dense"),
            ("linear2", "output.dense"),
            ("norm1", "attention.output.LayerNorm"),
            ("norm2", "output.LayerNorm"),
        ]:
            for kind in ("weight", "bias"):
                state[f"{their_name}.{kind}"] = w[f"{name}{our_name}.{kind}"]
        theirs.load_state_dict(state)
        hidden = torch.randn(2, 5, HIDDEN)
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        blocked = torch.zeros(2, 5).masked_fill(~mask, float("-inf"))[:, None, None, :]
        with torch.no_grad():
            expected = theirs(hidden, src_key_padding_mask=~mask)
            found = minilm._layer(w, "encoder.layer.0", hidden, blocked)
        self.assertTrue(torch.allclose(found[mask], expected[mask], atol=1e-5))

    def test_padding_changes_nothing(self):
        model = minilm.load(random_weights(2))
        together = minilm.embed(model, TEXTS, VOCABULARY)
        for row, text in enumerate(TEXTS):
            alone = minilm.embed(model, [text], VOCABULARY)[0]
            self.assertTrue(torch.allclose(together[row], alone, atol=1e-5))
        self.assertTrue(torch.allclose(together.norm(dim=1), torch.ones(len(TEXTS))))

    def test_tokens(self):
        for text, expected in [
            ("The  unbelievable", "[CLS] the un ##believ ##able [SEP]"),
            ("the,CAFÉ\u0000", "[CLS] the , cafe [SEP]"),
            ("the中the", "[CLS] the 中 the [SEP]"),
            ("unthe " + "x" * 101, "[CLS] [UNK] [UNK] [SEP]"),
            ("", "[CLS] [SEP]"),
        ]:
            self.assertEqual([TOKENS[t] for t in minilm.tokenize(text, VOCABULARY)], expected.split(), text)
        self.assertEqual(len(minilm.tokenize("the " * 1000, VOCABULARY)), minilm.TOKENS_MAX)

    def test_a_file_and_its_variant(self):
        weights = random_weights(3)
        with tempfile.TemporaryDirectory() as directory:
            path, other = (os.path.join(directory, name) for name in ("a.safetensors", "b.safetensors"))
            write_safetensors(path, weights)
            read = minilm.read_safetensors(path)
            changed = minilm.write_variant(path, other, 2.0)
            varied = minilm.read_safetensors(other)
        self.assertEqual(len(changed), 2)
        for name, tensor in weights.items():
            self.assertTrue(torch.equal(read[name], tensor))
            self.assertTrue(torch.equal(varied[name], tensor * 2 if name in changed else tensor))


class Caller:
    """Asks a serving process over its Unix socket."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(path)
        self.lines = self.socket.makefile()

    def ask(self, text):
        self.socket.sendall(json.dumps({"texts": [text]}).encode() + b"\n")
        reply = json.loads(self.lines.readline())
        assert "error" not in reply, reply
        return reply["release"], torch.tensor(reply["embeddings"][0])

    def close(self):
        self.lines.close()
        self.socket.close()


@unittest.skipUnless(torch, "needs PyTorch")
class Process(AgentTest):
    def setUp(self):
        super().setUp()
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.vocabulary = os.path.join(self.directory.name, "vocab.txt")
        with open(self.vocabulary, "w", encoding="utf-8") as file:
            file.writelines(token + "\n" for token in TOKENS)

    def start(self, *arguments):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "engine_minilm.py")
        command = [sys.executable, script, *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.wait, PATIENCE)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stdin.close)
        return process

    def test_answers_are_of_one_release_while_it_changes(self):
        versions = {manifest(seq): random_weights(seq) for seq in (1, 2)}
        expected = {name: minilm.embed(minilm.load(w), TEXTS, VOCABULARY) for name, w in versions.items()}
        data = {name: {k: t.numpy().tobytes() for k, t in w.items()} for name, w in versions.items()}
        first = versions[manifest(1)]
        self.agent.tensors = {k: ("F32", tuple(t.shape), data[manifest(1)][k]) for k, t in first.items()}

        place = os.path.join(self.directory.name, "engine.sock")
        process = self.start(
            *("serve", "--channel", "demo/test", "--socket", self.agent.path),
            *("--vocab", self.vocabulary, "--listen", place),
        )
        peer = self.agent.peer()
        peer.expect("manifest")
        peer.expect("hydrate")
        peer.land(data[manifest(1)])
        peer.event("hydrated", release=release(1))
        self.assertEqual(json.loads(process.stdout.readline()), {"ready": True, "release": manifest(1)})

        stop, wrong, seen = threading.Event(), [], set()

        def query(row):
            caller = Caller(place)
            while not stop.is_set():
                served, found = caller.ask(TEXTS[row])
                seen.add(served)
                if not torch.allclose(found, expected[served][row], atol=1e-5):
                    wrong.append((served, row))
            caller.close()

        threads = [threading.Thread(target=query, args=(row,)) for row in range(len(TEXTS))]
        for thread in threads:
            thread.start()
        for turn in range(20):
            seq = 2 - turn % 2
            self.update(peer, seq, data[manifest(seq)])
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(wrong, [])
        self.assertTrue(seen)
        distance = (expected[manifest(1)] - expected[manifest(2)]).norm(dim=1)
        self.assertTrue((distance > 0.1).all(), "the two releases must be told apart")

    def test_the_reference_answers_from_a_file(self):
        weights = random_weights(1)
        write_safetensors(os.path.join(self.directory.name, "model.safetensors"), weights)
        process = self.start("reference", "--model", self.directory.name)
        self.assertEqual(json.loads(process.stdout.readline()), {"ready": True, "release": None})
        for question in ({"texts": TEXTS}, {"no": 1}):
            process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        found = torch.tensor(json.loads(process.stdout.readline())["embeddings"])
        self.assertTrue(torch.allclose(found, minilm.embed(minilm.load(weights), TEXTS, VOCABULARY), atol=1e-5))
        self.assertEqual(json.loads(process.stdout.readline()), {"error": "KeyError: 'texts'"})


if __name__ == "__main__":
    unittest.main()
