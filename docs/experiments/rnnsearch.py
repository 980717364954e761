"""RNNSearch (Bahdanau, Cho and Bengio, 2015): translation by an encoder and a decoder of GRUs with additive attention.

    encoder   h_j = [forward GRU; backward GRU] of the source words' embeddings
    decoder   s_0 = tanh(W_first h←_1 + b)
              c_t = Σ_j α_tj h_j with α_t = softmax_j of vᵀ tanh(W s_{t−1} + U h_j + b)
              s_t = GRU([embedding of y_{t−1}; c_t], s_{t−1})
              p(y_t) = softmax(W_out tanh(W_read [s_t; embedding of y_{t−1}; c_t] + b) + b)

Each GRU has four norms a step: of W x and of U h, each for the gates and for the proposal (recurrent.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import translation
from attention import (
    additive_attention,
    additive_attention_backward,
    additive_attention_parameters,
    attention_keys,
    attention_keys_backward,
)
from layers import (
    add,
    dropout,
    dropout_backward,
    embedding,
    embedding_backward,
    glorot,
    linear,
    linear_backward,
    part,
    softmax_cross_entropy,
    softmax_cross_entropy_backward,
    tanh_backward,
    whole,
)
from norms import Norm, named_norm
from optim import falling
from recurrent import (
    gru,
    gru_backward,
    gru_gradients,
    gru_input,
    gru_input_backward,
    gru_parameters,
    gru_step,
    gru_step_backward,
)
from translation import batches, example_batch, load  # part of every model's interface

__all__ = [
    "EXPERIMENTS",
    "METRIC",
    "NORMS",
    "SIZES",
    "Config",
    "batches",
    "evaluate",
    "example_batch",
    "init",
    "learning_rate",
]
__all__ += ["load", "loss_and_gradients", "report"]

METRIC = "bleu"
NORMS = ("none", "layer", "rms", "prms", "l2")
EXPERIMENTS = (
    *({"norm": kind} for kind in NORMS),
    # the paper's p sweep, with fewer steps; RMSNorm is p = 1
    *({"norm": "prms", "p": p / 10, "steps": 1_200, "seeds": 1} for p in range(1, 10)),
    {"norm": "rms", "steps": 1_200, "seeds": 1},
    *({"norm": kind, "initial_mean": 0.2, "steps": 1_200, "seeds": 1} for kind in ("none", "layer", "rms", "prms")),
)
RMS = Norm("rms")


@dataclass(frozen=True)
class Config:
    """Sizes and settings; the defaults are the paper's."""

    norm: Norm = RMS
    embedding: int = 512
    encoder: int = 1024  # hidden units in each direction
    decoder: int = 1024
    read: int = 512  # units between the decoder and the words
    source_words: int = 32_000
    target_words: int = 32_000
    minimum: int = 1  # how often a word must stand in the training data to be in the vocabulary
    dropout: float = 0.0
    initial_mean: float = 0.0  # of the GRUs' initial weights: the paper's robustness test has 0.2
    batch: int = 80
    example_length: int = 25  # words of a sentence where time is measured
    learning_rate: float = 1e-4
    decay_from: float = 1.0  # share of the steps after which the learning rate falls linearly, to zero
    clip: float | None = 1.0
    steps: int = 100_000
    evaluate_every: int = 5_000


SIZES = {
    "paper": Config(),
    "small": Config(
        embedding=128,
        encoder=128,
        decoder=256,
        read=256,
        minimum=3,
        example_length=12,
        dropout=0.2,
        batch=32,
        learning_rate=2e-3,
        decay_from=0.5,
        steps=4_000,
        evaluate_every=400,
    ),
}


# Parameters


def init(config, rng):
    """All parameters, float32, in one dict."""
    m, e, d, how = config.embedding, config.encoder, config.decoder, config.norm
    limit = config.read**-0.5  # larger than Glorot's, which is small as there are many words: quicker at the start
    P = {
        "source.table": rng.normal(size=(config.source_words, m)).astype(np.float32),
        "target.table": rng.normal(size=(config.target_words, m)).astype(np.float32),
        **whole("forward", gru_parameters(rng, m, e, how)),
        **whole("backward", gru_parameters(rng, m, e, how)),
        "first.W": glorot(rng, e, d),
        "first.b": np.zeros(d, np.float32),
        **whole("attention", additive_attention_parameters(rng, d, 2 * e, d)),
        **whole("decoder", gru_parameters(rng, m + 2 * e, d, how)),
        "read.W": glorot(rng, d + m + 2 * e, config.read),
        "read.b": np.zeros(config.read, np.float32),
        "out.W": rng.uniform(-limit, limit, (config.read, config.target_words)).astype(np.float32),
        "out.b": np.zeros(config.target_words, np.float32),
    }
    for name in filter(is_normalised, P):
        P[name] += np.float32(config.initial_mean)
    return P


def is_normalised(name):
    """Whether a parameter is one of the GRUs' weights W and U, whose products are normalised."""
    layer, parameter, *_ = name.split(".")
    return layer in ("forward", "backward", "decoder") and parameter[:2] in ("W_", "U_")


def learning_rate(config, step):
    """Constant, then falling linearly to zero if `decay_from` is below 1."""
    return config.learning_rate * falling(step, config.steps, config.decay_from)


# Encoder


def encode(P, source, config, rng=None):
    """(h (S, B, 2e), its keys (S, B, d), s_0 (B, d)), cache for source words (S, B)."""
    how = config.norm
    x, cache_table = embedding(source, P["source.table"])  # (S, B, m)
    x, cache_dropout = dropout(x, config.dropout, rng)
    start = np.zeros((source.shape[1], config.encoder), x.dtype)  # (B, e)
    forward, cache_forward = gru(x, start, part(P, "forward"), how)  # (S, B, e)
    backward, cache_backward = gru(x, start, part(P, "backward"), how, reverse=True)  # (S, B, e)
    h = np.concatenate([forward, backward], axis=2)  # (S, B, 2e)
    keys, cache_keys = attention_keys(h, part(P, "attention"))  # (S, B, d)
    first, cache_first = linear(backward[0], P["first.W"], P["first.b"])  # (B, d)
    s = np.tanh(first)  # (B, d)
    return (h, keys, s), (cache_table, cache_dropout, cache_forward, cache_backward, cache_keys, cache_first, s)


def encode_backward(dh, dkeys, ds, cache):
    """Gradients of the encoder's parameters from dh (S, B, 2e), dkeys (S, B, d) and ds (B, d)."""
    cache_table, cache_dropout, cache_forward, cache_backward, cache_keys, cache_first, s = cache
    dbackward_0, dW, db = linear_backward(tanh_backward(ds, s), cache_first)  # (B, e)
    dh_keys, grads_keys = attention_keys_backward(dkeys, cache_keys)  # (S, B, 2e)
    dforward, dbackward = np.split(dh + dh_keys, 2, axis=2)  # (S, B, e), (S, B, e)
    dbackward = np.concatenate([dbackward[:1] + dbackward_0, dbackward[1:]])  # (S, B, e)
    dx_forward, _, grads_forward = gru_backward(dforward, cache_forward)  # (S, B, m)
    dx_backward, _, grads_backward = gru_backward(dbackward, cache_backward)  # (S, B, m)
    dx = dropout_backward(dx_forward + dx_backward, cache_dropout)  # (S, B, m)
    return {
        "source.table": embedding_backward(dx, cache_table),
        **whole("forward", grads_forward),
        **whole("backward", grads_backward),
        **whole("attention", grads_keys),
        "first.W": dW,
        "first.b": db,
    }


# Decoder


def decoder_step(y, s, memory, decoder, attention, how):
    """From the state s (B, d) and the embedding y (B, m) of the word before: (s' (B, d), context (B, 2e)), cache."""
    h, keys = memory  # (S, B, 2e), (S, B, d)
    (context, _), cache_attention = additive_attention(s, keys, h, attention)  # (B, 2e)
    x = np.concatenate([y, context], axis=1)  # (B, m + 2e)
    (gates, proposal), cache_input = gru_input(x, decoder, how)  # (B, 2d), (B, d)
    new, cache_step = gru_step(gates, proposal, s, decoder, how)  # (B, d)
    return (new, context), (cache_attention, cache_input, cache_step)


def decode(P, previous, encoded, config, rng=None):
    """Logits (T, B, V) for the words that follow `previous` (T, B), one step after the other."""
    h, keys, s = encoded
    decoder, attention = part(P, "decoder"), part(P, "attention")
    sizes = s.shape[-1], P["target.table"].shape[-1]  # d, m
    y, cache_table = embedding(previous, P["target.table"])  # (T, B, m)
    y, cache_dropout = dropout(y, config.dropout, rng)
    steps, states, contexts = [], [], []
    for t in range(len(previous)):
        (s, context), cache = decoder_step(y[t], s, (h, keys), decoder, attention, config.norm)  # (B, d), (B, 2e)
        steps.append(cache)
        states.append(s)
        contexts.append(context)
    read_in = np.concatenate([np.stack(states), y, np.stack(contexts)], axis=2)  # (T, B, d + m + 2e)
    logits, cache_read = read_out(P, read_in, config, rng)  # (T, B, V)
    return logits, (steps, cache_table, cache_dropout, cache_read, sizes)


def read_out(P, x, config, rng=None):
    """Logits (..., V) from [s_t; y_{t−1}; c_t] (..., d + m + 2e)."""
    a, cache_read = linear(x, P["read.W"], P["read.b"])  # (..., read)
    t = np.tanh(a)  # (..., read)
    dropped, cache_dropout = dropout(t, config.dropout, rng)  # (..., read)
    logits, cache_out = linear(dropped, P["out.W"], P["out.b"])  # (..., V)
    return logits, (cache_read, t, cache_dropout, cache_out)


def read_out_backward(dlogits, cache):
    """(dx (..., d + m + 2e), grads) from dlogits (..., V)."""
    cache_read, t, cache_dropout, cache_out = cache
    ddropped, dW_out, db_out = linear_backward(dlogits, cache_out)  # (..., read)
    da = tanh_backward(dropout_backward(ddropped, cache_dropout), t)  # (..., read)
    dx, dW, db = linear_backward(da, cache_read)  # (..., d + m + 2e)
    return dx, {"out.W": dW_out, "out.b": db_out, "read.W": dW, "read.b": db}


def decode_backward(dlogits, cache):
    """(dh (S, B, 2e), dkeys (S, B, d), ds_0 (B, d), grads) from dlogits (T, B, V)."""
    steps, cache_table, cache_dropout, cache_read, (d, m) = cache
    dread_in, grads = read_out_backward(dlogits, cache_read)  # (T, B, d + m + 2e)
    dstates, dy, dcontexts = np.split(dread_in, [d, d + m], axis=2)  # (T, B, d), (T, B, m), (T, B, 2e)
    dh, dkeys, ds = 0, 0, 0
    input_grads, step_grads, attention_grads = [], [], {}
    for t in reversed(range(len(steps))):
        cache_attention, cache_input, cache_step = steps[t]
        step = gru_step_backward(dstates[t] + ds, cache_step)
        inputs = gru_input_backward(step.dgates, step.dproposal, cache_input)
        dy[t] += inputs.dx[:, :m]  # (B, m)
        dcontext = dcontexts[t] + inputs.dx[:, m:]  # (B, 2e)
        ds_attention, dkeys_t, dh_t, grads_t = additive_attention_backward(dcontext, cache_attention)
        ds = step.dh + ds_attention  # (B, d)
        dh, dkeys = dh + dh_t, dkeys + dkeys_t  # (S, B, 2e), (S, B, d)
        add(attention_grads, grads_t)
        input_grads.append(inputs)
        step_grads.append(step)
    grads["target.table"] = embedding_backward(dropout_backward(dy, cache_dropout), cache_table)  # (V, m)
    grads |= whole("decoder", gru_gradients(input_grads, step_grads)) | whole("attention", attention_grads)
    return dh, dkeys, ds, grads


# Training


def loss_and_gradients(P, batch, config, rng=None):
    """(mean cross-entropy of a target word, gradients, {"words": …}). With `rng`, dropout."""
    encoded, cache_encoder = encode(P, batch.source, config, rng)
    logits, cache_decoder = decode(P, batch.previous, encoded, config, rng)  # (T, B, V)
    loss, cache_loss = softmax_cross_entropy(logits, batch.target, batch.weights)

    dlogits = softmax_cross_entropy_backward(1, cache_loss)  # (T, B, V)
    dh, dkeys, ds, grads = decode_backward(dlogits, cache_decoder)
    add(grads, encode_backward(dh, dkeys, ds, cache_encoder))
    return loss, grads, {"words": int(batch.weights.sum())}


# Translation


def translate(P, source, config, longest):
    """The most probable word at every step, greedily: source (S, B) -> numbers (T, B), with T at most `longest`."""
    h, keys, s = encode(P, source, config)[0]
    decoder, attention = part(P, "decoder"), part(P, "attention")

    def step(word, s):
        y = P["target.table"][word]  # (B, m)
        (s, context), _ = decoder_step(y, s, (h, keys), decoder, attention, config.norm)  # (B, d), (B, 2e)
        logits, _ = read_out(P, np.concatenate([s, y, context], axis=1), config)  # (B, V)
        return logits, s

    return translation.greedy(step, s, source.shape[1], longest)


def evaluate(P, loaded, config, name):
    """{"loss", "bleu"} of one part of the data: "validation" or "test"."""
    return translation.evaluate(P, loaded, config, name, loss, translate)


def loss(P, batch, config):
    """Mean cross-entropy of a target word, without dropout."""
    logits, _ = decode(P, batch.previous, encode(P, batch.source, config)[0], config)  # (T, B, V)
    return softmax_cross_entropy(logits, batch.target, batch.weights)[0]


def report(P, loaded, config):
    """What the stored result has beside the metrics: ten translations and the paper's Table 5."""
    return {
        "translations": translation.examples(P, loaded, config, translate),
        "hidden_to_hidden": hidden_to_hidden(P, loaded, config),
    }


def hidden_to_hidden(P, loaded, config, positions=4):
    """The paper's Table 5: mean and standard deviation of norm(U h) in the decoder, at the first positions and at all.

    Over the validation data, with the reference as the words before; gates and proposal together, 3d numbers a state.
    """
    decoder, found = part(P, "decoder"), {}
    for batch in translation.fixed_batches(loaded.parts["validation"], config.batch):
        _, (steps, *_) = decode(P, batch.previous, encode(P, batch.source, config)[0], config)
        for t, (_, _, (h, _, rh, *_)) in enumerate(steps):
            gates, _ = named_norm(config.norm, h @ decoder["U_gates"], decoder, "h_gates")  # (B, 2d)
            proposal, _ = named_norm(config.norm, rh @ decoder["U_proposal"], decoder, "h_proposal")  # (B, d)
            values = np.concatenate([gates, proposal], axis=1)[batch.weights[t] > 0]  # (words, 3d)
            found.setdefault(t, []).append(values.ravel())
    rows = {str(t + 1): np.concatenate(found[t]) for t in range(positions)}
    rows["all"] = np.concatenate([values for parts in found.values() for values in parts])
    return {name: {"mean": float(values.mean()), "sd": float(values.std())} for name, values in rows.items()}
