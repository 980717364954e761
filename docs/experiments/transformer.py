"""The Transformer (Vaswani et al., 2017): translation by attention alone, with a norm after every residual sum.

    embed     x = √d · table[word] + position
    sublayer  x ← norm(x + dropout(f(x)))           post-norm, as in the paper: f is attention or feed-forward
    encoder   each layer: self-attention, feed-forward
    decoder   each layer: causal self-attention, attention to the encoder's output, feed-forward
    output    p(y_t) = softmax(table · x_t)         the table of the target words' embeddings, once more

With 6 + 6 layers these are 6 · 2 + 6 · 3 = 30 norms. Arrays are (B, T, d): sample first, unlike in recurrent models.
No padding mask is needed: a batch has sources of one length, and padding at the end of a target comes after its words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

import translation
from attention import (
    attend,
    attend_backward,
    causal_mask,
    keys_and_values,
    keys_and_values_backward,
    multi_head_attention,
    multi_head_attention_backward,
    multi_head_attention_parameters,
)
from layers import (
    add,
    dropout,
    dropout_backward,
    embedding,
    embedding_backward,
    glorot,
    leaky_relu,
    leaky_relu_backward,
    linear,
    linear_backward,
    part,
    softmax_cross_entropy,
    softmax_cross_entropy_backward,
    whole,
)
from norms import Norm, named_norm, named_norm_backward, norm_parameters
from translation import batches, example_batch, load  # part of every model's interface

__all__ = ["EXPERIMENTS", "METRIC", "NORMS", "SIZES", "Config", "batches", "evaluate", "example_batch", "init"]
__all__ += ["learning_rate", "load", "loss_and_gradients", "report"]

METRIC = "bleu"
NORMS = ("none", "layer", "rms", "prms")
EXPERIMENTS = tuple({"norm": kind} for kind in NORMS)
RMS = Norm("rms")


@dataclass(frozen=True)
class Config:
    """Sizes and settings; the defaults are the paper's, but for the batch: Vaswani et al. have 25,000 words in one."""

    norm: Norm = RMS
    layers: int = 6  # of the encoder, and as many of the decoder
    d: int = 512
    ffn: int = 2048  # hidden units of the feed-forward sublayers
    heads: int = 8
    source_words: int = 32_000
    target_words: int = 32_000
    minimum: int = 1  # how often a word must stand in the training data to be in the vocabulary
    dropout: float = 0.1
    smoothing: float = 0.1  # of the labels, in training
    batch: int = 80
    example_length: int = 25  # words of a sentence where time is measured
    learning_rate: float = 7e-4  # the highest, reached after the warm-up: 1/√(d · warmup)
    warmup: int = 4_000  # steps
    clip: float | None = None
    steps: int = 100_000
    evaluate_every: int = 5_000


SIZES = {
    "paper": Config(),
    "small": Config(
        layers=2,
        d=128,
        ffn=512,
        heads=4,
        minimum=3,
        dropout=0.1,
        batch=32,
        example_length=12,
        learning_rate=2e-3,
        warmup=400,
        steps=4_000,
        evaluate_every=400,
    ),
}


# Parameters


def init(config, rng):
    """All parameters, float32, in one dict."""
    d = config.d
    P = {
        "source.table": rng.normal(0, d**-0.5, (config.source_words, d)).astype(np.float32),
        "target.table": rng.normal(0, d**-0.5, (config.target_words, d)).astype(np.float32),
    }
    for side, attentions in (("encoder", ["self"]), ("decoder", ["self", "cross"])):
        for i in range(config.layers):
            P |= whole(f"{side}.{i}", layer_parameters(rng, config, attentions))
    return P


def layer_parameters(rng, config, attentions):
    """Of one layer: its attentions, the feed-forward sublayer, and a norm after each."""
    d, n = config.d, config.ffn
    P = {
        "ffn.W_1": glorot(rng, d, n),
        "ffn.b_1": np.zeros(n, np.float32),
        "ffn.W_2": glorot(rng, n, d),
        "ffn.b_2": np.zeros(d, np.float32),
        **norm_parameters(config.norm, "ffn_norm", d),
    }
    for name in attentions:
        P |= whole(name, multi_head_attention_parameters(rng, d)) | norm_parameters(config.norm, f"{name}_norm", d)
    return P


def learning_rate(config, step):
    """Rises linearly during the warm-up and then falls with 1/√step."""
    return config.learning_rate * min(step / config.warmup, math.sqrt(config.warmup / step))


# Words and positions


def positions(first, T, d):
    """Sinusoids of the positions first, …, first + T − 1, (T, d): sin and cos of t/10000^(2i/d), side by side."""
    angles = np.arange(first, first + T)[:, None] / 10_000 ** (np.arange(0, d, 2) / d)  # (T, d/2)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(T, d)


def embed(ids, table, first=0, rate=0.0, rng=None):
    """√d · table[ids] + positions for ids (B, T) that begin at position `first`: (B, T, d)."""
    d = table.shape[1]
    words, cache_table = embedding(ids, table)  # (B, T, d)
    x = words * math.sqrt(d) + positions(first, ids.shape[1], d).astype(table.dtype)  # (B, T, d) + (T, d)
    x, cache_dropout = dropout(x, rate, rng)  # (B, T, d)
    return x, (cache_table, cache_dropout)


def embed_backward(dx, cache):
    """dtable (V, d) from dx (B, T, d)."""
    cache_table, cache_dropout = cache
    dx = dropout_backward(dx, cache_dropout)  # (B, T, d)
    return embedding_backward(dx * math.sqrt(dx.shape[-1]), cache_table)


# Sublayers


def feed_forward(x, P):
    """max(0, x W_1 + b_1) W_2 + b_2 for x (B, T, d): (B, T, d)."""
    a, cache_1 = linear(x, P["W_1"], P["b_1"])  # (B, T, ffn)
    h, cache_relu = leaky_relu(a)  # (B, T, ffn)
    y, cache_2 = linear(h, P["W_2"], P["b_2"])  # (B, T, d)
    return y, (cache_1, cache_relu, cache_2)


def feed_forward_backward(dy, cache):
    """(dx, {W_1, b_1, W_2, b_2}) from dy (B, T, d)."""
    cache_1, cache_relu, cache_2 = cache
    dh, dW_2, db_2 = linear_backward(dy, cache_2)  # (B, T, ffn)
    dx, dW_1, db_1 = linear_backward(leaky_relu_backward(dh, cache_relu), cache_1)  # (B, T, d)
    return dx, {"W_1": dW_1, "b_1": db_1, "W_2": dW_2, "b_2": db_2}


def residual(x, f, P, name, config, rng=None):
    """norm(x + dropout(f)) for the input x and the output f of a sublayer, both (B, T, d)."""
    f, cache_dropout = dropout(f, config.dropout, rng)  # (B, T, d)
    y, cache_norm = named_norm(config.norm, x + f, P, name)  # (B, T, d)
    return y, (cache_dropout, cache_norm, name)


def residual_backward(dy, cache):
    """(dx, df, grads of the norm) from dy (B, T, d)."""
    cache_dropout, cache_norm, name = cache
    dx, grads = named_norm_backward(dy, cache_norm, name)  # (B, T, d): the same for both terms of the sum
    return dx, dropout_backward(dx, cache_dropout), grads


# Layers


def encoder_layer(x, P, config, rng=None):
    """x (B, S, d) -> (B, S, d)."""
    a, cache_self = multi_head_attention(x, x, part(P, "self"), config.heads)  # (B, S, d)
    x, cache_1 = residual(x, a, P, "self_norm", config, rng)  # (B, S, d)
    f, cache_ffn = feed_forward(x, part(P, "ffn"))  # (B, S, d)
    x, cache_2 = residual(x, f, P, "ffn_norm", config, rng)  # (B, S, d)
    return x, (cache_self, cache_1, cache_ffn, cache_2)


def encoder_layer_backward(dy, cache):
    """(dx, grads) from dy (B, S, d)."""
    cache_self, cache_1, cache_ffn, cache_2 = cache
    dx, df, grads_2 = residual_backward(dy, cache_2)  # (B, S, d)
    df, grads_ffn = feed_forward_backward(df, cache_ffn)  # (B, S, d)
    dx, da, grads_1 = residual_backward(dx + df, cache_1)  # (B, S, d)
    dqueries, dmemory, grads_self = multi_head_attention_backward(da, cache_self)  # (B, S, d)
    grads = {**whole("self", grads_self), **grads_1, **whole("ffn", grads_ffn), **grads_2}
    return dx + dqueries + dmemory, grads


def decoder_layer(x, own, read, P, config, mask=None, rng=None):
    """x (B, T, d) -> (B, T, d).

    The keys and values of the words (`own`) and of the encoder's output (`read`) come from outside: translation keeps
    those it has.
    """
    a, cache_self = attend(x, own, part(P, "self"), mask)  # (B, T, d)
    x, cache_1 = residual(x, a, P, "self_norm", config, rng)  # (B, T, d)
    c, cache_cross = attend(x, read, part(P, "cross"))  # (B, T, d)
    x, cache_2 = residual(x, c, P, "cross_norm", config, rng)  # (B, T, d)
    f, cache_ffn = feed_forward(x, part(P, "ffn"))  # (B, T, d)
    x, cache_3 = residual(x, f, P, "ffn_norm", config, rng)  # (B, T, d)
    return x, (cache_self, cache_1, cache_cross, cache_2, cache_ffn, cache_3)


def decoder_layer_backward(dy, cache):
    """(dx, down, dread, grads) from dy (B, T, d)."""
    cache_self, cache_1, cache_cross, cache_2, cache_ffn, cache_3 = cache
    dx, df, grads_3 = residual_backward(dy, cache_3)  # (B, T, d)
    df, grads_ffn = feed_forward_backward(df, cache_ffn)  # (B, T, d)
    dx, dc, grads_2 = residual_backward(dx + df, cache_2)  # (B, T, d)
    dc, dread, grads_cross = attend_backward(dc, cache_cross)  # (B, T, d)
    dx, da, grads_1 = residual_backward(dx + dc, cache_1)  # (B, T, d)
    da, down, grads_self = attend_backward(da, cache_self)  # (B, T, d)
    grads = {**whole("self", grads_self), **grads_1, **whole("cross", grads_cross), **grads_2}
    return dx + da, down, dread, {**grads, **whole("ffn", grads_ffn), **grads_3}


# Encoder and decoder


def encode(P, source, config, rng=None):
    """The memory (B, S, d) for source words (B, S)."""
    x, cache_embed = embed(source, P["source.table"], 0, config.dropout, rng)  # (B, S, d)
    caches = []
    for i in range(config.layers):
        x, cache = encoder_layer(x, part(P, f"encoder.{i}"), config, rng)  # (B, S, d)
        caches.append(cache)
    return x, (cache_embed, caches)


def encode_backward(dx, cache):
    """Gradients of the encoder's parameters from dx (B, S, d)."""
    cache_embed, caches = cache
    grads = {}
    for i, cache_layer in reversed(list(enumerate(caches))):
        dx, grads_layer = encoder_layer_backward(dx, cache_layer)  # (B, S, d)
        grads |= whole(f"encoder.{i}", grads_layer)
    return {**grads, "source.table": embed_backward(dx, cache_embed)}


def decode(P, previous, memory, config, rng=None):
    """Logits (B, T, V) for the words that follow `previous` (B, T), all steps at once."""
    x, cache_embed = embed(previous, P["target.table"], 0, config.dropout, rng)  # (B, T, d)
    mask, caches = causal_mask(previous.shape[1]), []  # (T, T)
    for i in range(config.layers):
        layer = part(P, f"decoder.{i}")
        own, cache_own = keys_and_values(x, part(layer, "self"), config.heads)
        read, cache_read = keys_and_values(memory, part(layer, "cross"), config.heads)
        x, cache_layer = decoder_layer(x, own, read, layer, config, mask, rng)  # (B, T, d)
        caches.append((cache_own, cache_read, cache_layer))
    logits, cache_out = linear(x, P["target.table"].T)  # (B, T, V)
    return logits, (cache_embed, caches, cache_out)


def decode_backward(dlogits, cache):
    """(dmemory (B, S, d), grads) from dlogits (B, T, V)."""
    cache_embed, caches, cache_out = cache
    dx, dtable, _ = linear_backward(dlogits, cache_out)  # (B, T, d), (d, V)
    dmemory, grads = 0, {}
    for i, (cache_own, cache_read, cache_layer) in reversed(list(enumerate(caches))):
        dx, down, dread, grads_layer = decoder_layer_backward(dx, cache_layer)  # (B, T, d)
        dx_own, grads_own = keys_and_values_backward(down, cache_own)  # (B, T, d)
        dmemory_read, grads_read = keys_and_values_backward(dread, cache_read)  # (B, S, d)
        dx, dmemory = dx + dx_own, dmemory + dmemory_read
        grads_layer |= whole("self", grads_own) | whole("cross", grads_read)
        grads |= whole(f"decoder.{i}", grads_layer)
    return dmemory, {**grads, "target.table": dtable.T + embed_backward(dx, cache_embed)}


# Training


def loss_and_gradients(P, batch, config, rng=None):
    """(mean cross-entropy of a target word, labels smoothed, gradients, {"words": …}). With `rng`, dropout."""
    memory, cache_encoder = encode(P, batch.source.T, config, rng)  # (B, S, d)
    logits, cache_decoder = decode(P, batch.previous.T, memory, config, rng)  # (B, T, V)
    loss, cache_loss = softmax_cross_entropy(logits, batch.target.T, batch.weights.T, config.smoothing)

    dlogits = softmax_cross_entropy_backward(1, cache_loss)  # (B, T, V)
    dmemory, grads = decode_backward(dlogits, cache_decoder)  # (B, S, d)
    return loss, add(grads, encode_backward(dmemory, cache_encoder)), {"words": int(batch.weights.sum())}


# Translation


def translate(P, source, config, longest):
    """The most probable word at every step, greedily: source (S, B) -> numbers (T, B), with T at most `longest`.

    The keys and values of the words so far are kept: each step computes those of one word.
    """
    memory, _ = encode(P, source.T, config)  # (B, S, d)
    layers = [part(P, f"decoder.{i}") for i in range(config.layers)]
    read = [keys_and_values(memory, part(layer, "cross"), config.heads)[0] for layer in layers]
    nothing = np.empty((len(memory), config.heads, 0, config.d // config.heads), memory.dtype)  # (B, heads, 0, d/heads)

    def step(word, kept):
        x, _ = embed(word[:, None], P["target.table"], first=kept[0][0].shape[2])  # (B, 1, d)
        now = []
        for layer, own, memory_read in zip(layers, kept, read, strict=True):
            new, _ = keys_and_values(x, part(layer, "self"), config.heads)  # (B, heads, 1, d/heads) each
            now.append([np.concatenate(pair, axis=2) for pair in zip(own, new, strict=True)])  # (B, heads, t, d/heads)
            x, _ = decoder_layer(x, now[-1], memory_read, layer, config)  # (B, 1, d)
        return x[:, 0] @ P["target.table"].T, now  # (B, V)

    return translation.greedy(step, [(nothing, nothing)] * config.layers, source.shape[1], longest)


def evaluate(P, loaded, config, name):
    """{"loss", "bleu"} of one part of the data: "validation" or "test"."""
    return translation.evaluate(P, loaded, config, name, loss, translate)


def loss(P, batch, config):
    """Mean cross-entropy of a target word, without dropout or smoothing."""
    logits, _ = decode(P, batch.previous.T, encode(P, batch.source.T, config)[0], config)  # (B, T, V)
    return softmax_cross_entropy(logits, batch.target.T, batch.weights.T)[0]


def report(P, loaded, config):
    """What the stored result has beside the metrics: ten translations."""
    return {"translations": translation.examples(P, loaded, config, translate)}
