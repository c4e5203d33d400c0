"""MiniLM sentence embeddings, by hand: a real model to serve from registered memory.

``load`` checks the weights and names their parts, ``embed`` runs them: BERT (Devlin et al. 2018), mean
pooling and normalization, as sentence-transformers' all-MiniLM-L6-v2 has it. Needs PyTorch.
"""

import json
import mmap
import os
import struct
import unicodedata

import torch
import torch.nn.functional as F

HEADS = 12
LAYER_NORM_EPS = 1e-12
#: Tokens of a text, with its two special ones.
TOKENS_MAX = 256
WORD_CHARS_MAX = 100

_KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


def read_safetensors(path):
    """Name -> tensor over the mapped file, copy on write."""
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        kind = _KINDS[entry["dtype"]]
        if begin == end:
            tensors[name] = torch.empty(entry["shape"], dtype=kind)
            continue
        flat = torch.frombuffer(mapped, dtype=torch.uint8, count=end - begin, offset=8 + header_bytes + begin)
        # A copy, as a file's tensors need not be aligned for their elements.
        tensors[name] = flat.clone().view(kind).reshape(entry["shape"])
    return tensors


def write_variant(source, target, change, layers=(0, 5)):
    """Copies a safetensors file with the query projections of some layers multiplied by ``change``, or all
    floats if there are no ``layers``.

    Returns the names of the changed tensors. Changing more than one layer makes a mixture of the two
    versions a third function, unlike both.
    """
    with open(source, "rb") as file:
        content = bytearray(file.read())
    (header_bytes,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + header_bytes])
    names = [f"encoder.layer.{layer}.attention.self.query.weight" for layer in layers]
    if not names:
        names = [name for name, entry in header.items() if entry.get("dtype") == "F32"]
    for name in names:
        begin, end = header[name]["data_offsets"]
        at = 8 + header_bytes + begin
        values = torch.frombuffer(bytearray(content[at : at + end - begin]), dtype=_KINDS[header[name]["dtype"]])
        content[at : at + end - begin] = (values * change).numpy().tobytes()
    with open(target, "wb") as file:
        file.write(content)
    return names


def load(weights):
    """Takes the tensors as they are, without a copy; raises if one is missing."""
    layers = 0
    while f"encoder.layer.{layers}.output.dense.weight" in weights:
        layers += 1
    if layers == 0:
        raise KeyError("encoder.layer.0.output.dense.weight")
    for name in ("embeddings.word_embeddings.weight", f"encoder.layer.{layers - 1}.output.LayerNorm.bias"):
        weights[name]
    return {"weights": weights, "layers": layers}


def embed(model, texts, vocabulary):
    """One vector of length 1 for each text: float32, [texts, hidden]."""
    ids, mask = batch([tokenize(text, vocabulary) for text in texts], vocabulary)
    with torch.no_grad():
        hidden = encode(model, ids, mask)
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1)
        return F.normalize(pooled, dim=1)


def encode(model, ids, mask):
    """Hidden states, [texts, tokens, hidden], from token ids and mask, both [texts, tokens]."""
    w = model["weights"]
    hidden = (
        w["embeddings.word_embeddings.weight"][ids]
        + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        + w["embeddings.token_type_embeddings.weight"][0]
    )
    hidden = _norm(w, "embeddings.LayerNorm", hidden)
    # Added to the attention's logits, [texts, 1, 1, tokens].
    blocked = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[:, None, None, :]
    for layer in range(model["layers"]):
        hidden = _layer(w, f"encoder.layer.{layer}", hidden, blocked)
    return hidden


def _layer(w, name, hidden, blocked):
    attended = _linear(w, f"{name}.attention.output.dense", _attention(w, f"{name}.attention.self", hidden, blocked))
    hidden = _norm(w, f"{name}.attention.output.LayerNorm", hidden + attended)
    inner = F.gelu(_linear(w, f"{name}.intermediate.dense", hidden))
    return _norm(w, f"{name}.output.LayerNorm", hidden + _linear(w, f"{name}.output.dense", inner))


def _attention(w, name, hidden, blocked):
    texts, tokens, size = hidden.shape
    split = (texts, tokens, HEADS, size // HEADS)
    query, key, value = (
        _linear(w, f"{name}.{part}", hidden).view(split).transpose(1, 2) for part in ("query", "key", "value")
    )
    logits = query @ key.transpose(-1, -2) / (size // HEADS) ** 0.5 + blocked
    return (logits.softmax(-1) @ value).transpose(1, 2).reshape(texts, tokens, size)


def _linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], LAYER_NORM_EPS)


def read_vocabulary(path):
    """Token -> id, from a ``vocab.txt``."""
    with open(path, encoding="utf-8") as file:
        return {token.rstrip("\n"): number for number, token in enumerate(file)}


def batch(sequences, vocabulary):
    """Pads to one length: ids and mask, [texts, tokens]."""
    length = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), length), vocabulary["[PAD]"])
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = True
    return ids, mask


def tokenize(text, vocabulary):
    """Token ids by WordPiece, lower case, with [CLS] and [SEP]."""
    pieces = [piece for word in _words(text) for piece in _pieces(word, vocabulary)]
    inner = pieces[: TOKENS_MAX - 2]
    return [vocabulary[token] for token in ["[CLS]", *inner, "[SEP]"]]


def _words(text):
    """Splits at white space, and around punctuation and Chinese characters."""
    characters = []
    for c in text:
        if c in "\t\n\r" or unicodedata.category(c) == "Zs":
            characters.append(" ")
        elif ord(c) in (0, 0xFFFD) or unicodedata.category(c) in ("Cc", "Cf", "Co"):
            continue
        else:
            characters.append(f" {c} " if _is_chinese(ord(c)) else c)
    plain = unicodedata.normalize("NFD", "".join(characters).lower())
    spaced = (f" {c} " if _is_punctuation(c) else c for c in plain if unicodedata.category(c) != "Mn")
    return "".join(spaced).split()


def _pieces(word, vocabulary):
    """The longest known piece, again and again; [UNK] if that leaves a rest."""
    if len(word) > WORD_CHARS_MAX:
        return ["[UNK]"]
    pieces = []
    at = 0
    while at < len(word):
        prefix = "##" if at else ""
        ends = range(len(word), at, -1)
        end = next((end for end in ends if prefix + word[at:end] in vocabulary), None)
        if end is None:
            return ["[UNK]"]
        pieces.append(prefix + word[at:end])
        at = end
    return pieces


def _is_punctuation(c):
    ascii_sign = 33 <= ord(c) <= 126 and not c.isalnum()
    return ascii_sign or unicodedata.category(c).startswith("P")


def _is_chinese(code):
    """The blocks of CJK ideographs."""
    blocks = [
        (0x4E00, 0x9FFF),
        (0x3400, 0x4DBF),
        (0x20000, 0x2A6DF),
        (0x2A700, 0x2B73F),
        (0x2B740, 0x2B81F),
        (0x2B820, 0x2CEAF),
        (0xF900, 0xFAFF),
        (0x2F800, 0x2FA1F),
    ]
    return any(first <= code <= last for first, last in blocks)


def read_model(directory):
    """Model and vocabulary of an unpacked model directory."""
    model = load(read_safetensors(os.path.join(directory, "model.safetensors")))
    return model, read_vocabulary(os.path.join(directory, "vocab.txt"))
