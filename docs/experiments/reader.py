"""The attentive reader (Hermann et al., 2015): which name fills the blank of a question about a passage?

    passage   y_t = [forward LSTM; backward LSTM] of its words' embeddings
    question  u = [last state of a forward LSTM; last state of a backward LSTM]
    answer    s_t = vᵀ tanh(W u + U y_t + b), for each place t of the passage where a name stands
              p(name) = Σ of softmax(s) over the places of that name     (attention sum, Kadlec et al., 2016)

Each LSTM has three norms a step: of W x + b, of U h and of the cell before its tanh (recurrent.py). BatchNorm starts
with the gain 0.1 and has statistics of its own for each step (Cooijmans et al., 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import cloze
from attention import (
    additive_attention_parameters,
    additive_scores,
    additive_scores_backward,
    attention_keys,
    attention_keys_backward,
)
from cloze import ENTITIES, batches, example_batch, load  # part of every model's interface
from layers import (
    add,
    dropout,
    dropout_backward,
    embedding,
    embedding_backward,
    part,
    softmax,
    whole,
)
from norms import Norm
from optim import falling
from recurrent import lstm, lstm_backward, lstm_parameters

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
    "load",
    "loss_and_gradients",
    "report",
]

METRIC = "accuracy"
NORMS = ("none", "layer", "rms", "prms", "batch")
EXPERIMENTS = tuple({"norm": kind} for kind in NORMS)
RMS = Norm("rms")


@dataclass(frozen=True)
class Config:
    """Sizes and settings; the defaults are the paper's, except for the text: verses, not news."""

    norm: Norm = RMS
    embedding: int = 240
    hidden: int = 240  # units of each LSTM
    words: int = 32_000  # numbers in all: special ones, markers and words
    markers: int = 50  # of names
    verses: int = 8  # in a passage
    names: int = 4  # at least so many different ones in a passage
    minimum: int = 1  # how often a word must stand in the training data to be in the vocabulary
    dropout: float = 0.0  # of the embeddings
    batch: int = 64
    example_length: int = 250  # words of passage and question where time is measured
    example_question: int = 30
    learning_rate: float = 8e-5
    decay_from: float = 1.0  # share of the steps after which the learning rate falls linearly, to zero
    clip: float | None = 10.0
    steps: int = 100_000
    evaluate_every: int = 5_000


SIZES = {
    "paper": Config(),
    "small": Config(
        embedding=96,
        hidden=96,
        minimum=3,
        dropout=0.2,
        learning_rate=3e-3,
        decay_from=0.5,
        steps=600,
        evaluate_every=100,
    ),
}


# Parameters


def init(config, rng):
    """All parameters, float32, in one dict."""
    m, d, how = config.embedding, config.hidden, config.norm
    gain = 0.1 if how.kind == "batch" else 1.0

    def of_lstm():
        return lstm_parameters(rng, m, d, how, gain)

    return {
        "table": rng.normal(0, m**-0.5, (config.words, m)).astype(np.float32),
        **whole("passage_forward", of_lstm()),
        **whole("passage_backward", of_lstm()),
        **whole("question_forward", of_lstm()),
        **whole("question_backward", of_lstm()),
        **whole("attention", additive_attention_parameters(rng, 2 * d, 2 * d, 2 * d)),
    }


def learning_rate(config, step):
    """Constant, then falling linearly to zero if `decay_from` is below 1."""
    return config.learning_rate * falling(step, config.steps, config.decay_from)


# The model


def read(P, words, mask, name, config, how, rng=None):
    """States (T, B, 2d) of the words (T, B), from the LSTMs `name`_forward and `name`_backward. Returns (y, cache)."""
    x, cache_table = embedding(words, P["table"])  # (T, B, m)
    x, cache_dropout = dropout(x, config.dropout, rng)
    forward, cache_forward = lstm(x, part(P, f"{name}_forward"), how, mask)  # (T, B, d)
    backward, cache_backward = lstm(x, part(P, f"{name}_backward"), how, mask, reverse=True)  # (T, B, d)
    y = np.concatenate([forward, backward], axis=2)  # (T, B, 2d)
    return y, (cache_table, cache_dropout, cache_forward, cache_backward, name)


def read_backward(dy, cache):
    """Gradients of the parameters from dy (T, B, 2d)."""
    cache_table, cache_dropout, cache_forward, cache_backward, name = cache
    dforward, dbackward = np.split(dy, 2, axis=2)  # (T, B, d), (T, B, d)
    dx_forward, grads_forward = lstm_backward(dforward, cache_forward)  # (T, B, m)
    dx_backward, grads_backward = lstm_backward(dbackward, cache_backward)  # (T, B, m)
    dx = dropout_backward(dx_forward + dx_backward, cache_dropout)  # (T, B, m)
    return {
        "table": embedding_backward(dx, cache_table),
        **whole(f"{name}_forward", grads_forward),
        **whole(f"{name}_backward", grads_backward),
    }


def scores(P, batch, config, how, rng=None):
    """The score s (S, B) of each place of the passages. Returns (s, cache)."""
    d, attention = config.hidden, part(P, "attention")
    y, cache_passage = read(P, batch.passage, batch.passage_mask, "passage", config, how, rng)  # (S, B, 2d)
    z, cache_question = read(P, batch.question, batch.question_mask, "question", config, how, rng)  # (Q, B, 2d)
    u = np.concatenate([z[-1, :, :d], z[0, :, d:]], axis=1)  # (B, 2d): the last states of both directions
    keys, cache_keys = attention_keys(y, attention)  # (S, B, 2d)
    s, cache_scores = additive_scores(u, keys, attention)  # (S, B)
    return s, (cache_passage, cache_question, cache_keys, cache_scores, z.shape)


def scores_backward(ds, cache):
    """Gradients of all parameters from ds (S, B)."""
    cache_passage, cache_question, cache_keys, cache_scores, shape = cache
    du, dkeys, grads_scores = additive_scores_backward(ds, cache_scores)  # (B, 2d), (S, B, 2d)
    dy, grads_keys = attention_keys_backward(dkeys, cache_keys)  # (S, B, 2d)
    d = shape[2] // 2
    dz = np.zeros(shape, ds.dtype)  # (Q, B, 2d)
    dz[-1, :, :d] = du[:, :d]
    dz[0, :, d:] = du[:, d:]
    grads = read_backward(dy, cache_passage)
    add(grads, read_backward(dz, cache_question))
    return grads | whole("attention", grads_scores | grads_keys)


def attention_sum_loss(s, entities, correct):
    """−log of the share of softmax(s) over `entities` that is on `correct` (S, B, bool), mean over B: (loss, cache).

    log Σ exp(s) over the names minus the same over the places of the answer.
    """
    log_all, log_correct = log_sum_exp(s, entities), log_sum_exp(s, correct)  # (B,), (B,)
    return np.mean(log_all - log_correct), (s, entities, correct)


def attention_sum_loss_backward(dloss, cache):
    """ds (S, B) from the number dloss: each of the two terms has a softmax as its gradient."""
    s, entities, correct = cache
    return (softmax(s, axis=0, mask=entities) - softmax(s, axis=0, mask=correct)) * (dloss / s.shape[1])


def log_sum_exp(s, mask):
    """log Σ exp(s) over the places (S, B) where the mask is True: (B,)."""
    s = np.where(mask, s, s.dtype.type(-1e9))  # (S, B)
    top = s.real.max(axis=0)  # (B,): a constant shift, it cancels
    return top + np.log(np.exp(s - top).sum(axis=0))


# Training and answers


def loss_and_gradients(P, batch, config, rng=None):
    """(mean −log p(answer), gradients, {"examples": B}). With `rng`, dropout. BatchNorm: statistics of this batch."""
    s, cache = scores(P, batch, config, config.norm, rng)  # (S, B)
    loss, cache_loss = attention_sum_loss(s, batch.entities, batch.passage == batch.answer)
    grads = scores_backward(attention_sum_loss_backward(1, cache_loss), cache)
    return loss, grads, {"examples": len(batch.answer)}


def predict(P, batch, config):
    """(p of every marker (B, markers), loss), without dropout, BatchNorm with its running statistics."""
    s, _ = scores(P, batch, config, config.norm._replace(training=False))  # (S, B)
    loss, _ = attention_sum_loss(s, batch.entities, batch.passage == batch.answer)
    share = softmax(s, axis=0, mask=batch.entities)  # (S, B)
    time, row = np.nonzero(batch.entities)  # (mentions,), (mentions,)
    p = np.zeros((s.shape[1], config.markers), s.dtype)  # (B, markers)
    np.add.at(p, (row, batch.passage[time, row] - ENTITIES), share[time, row])
    return p, loss


def evaluate(P, loaded, config, name):
    """{"loss", "accuracy"} of one part of the data: "validation" or "test"."""
    loss, right, examples = 0.0, 0, loaded.parts[name]
    for _, batch in cloze.fixed_batches(examples, config):
        p, mean = predict(P, batch, config)
        loss += float(mean) * len(p)
        right += int(np.sum(ENTITIES + p.argmax(axis=1) == batch.answer))
    return {"loss": loss / len(examples), "accuracy": right / len(examples)}


def report(P, loaded, config):
    """What the stored result has beside the metrics: how far one gets without reading, and ten answers."""
    return {"baselines": cloze.baselines(loaded.parts["test"], config), "answers": answers(P, loaded, config)}


def answers(P, loaded, config, count=10):
    """Test questions from all over the part: [{"question", "answer", "prediction"}, …], as text."""
    places = np.linspace(0, len(loaded.texts["test"]) - 1, count).astype(int)
    examples, texts = ([of[i] for i in places] for of in (loaded.parts["test"], loaded.texts["test"]))
    found = {}
    for chosen, batch in cloze.fixed_batches(examples, config):
        p, _ = predict(P, batch, config)
        for row, i in enumerate(chosen):
            place = np.argmax(batch.passage[:, row] == ENTITIES + p[row].argmax())  # the first with that marker
            blanked = ["_____" if token == texts[i].answer else token for token in texts[i].question]
            found[i] = {
                "question": cloze.text_of(blanked),
                "answer": texts[i].answer,
                "prediction": texts[i].passage[place],
            }
    return [found[i] for i in range(count)]
