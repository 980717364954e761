"""docs/experiments/reader.py and its data: gradients against numerical ones, what questions and answers are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import attention
import cloze
import norms
import reader
from rmsnorm_np.gradcheck import check_gradient

TINY = reader.Config(
    embedding=3, hidden=3, words=14, markers=4, batch=3, example_length=6, example_question=4, dropout=0.3
)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def tiny(kind, **settings):
    return dataclasses.replace(TINY, norm=norms.Norm(kind, fused=False, p=0.5), **settings)


def perturbed(P, rng):
    """float64, and nothing zero; running statistics as they are."""
    return {
        key: value.astype(float) + (0 if key.endswith("running") else 0.1 * rng.normal(size=value.shape))
        for key, value in P.items()
    }


def batch_of(config, rng):
    """Passages of 6, 5 and 3 words, questions of 4, 2 and 3, the answer more than once in one of them."""
    passages = [[5, 9, 6, 5, 10, 7], [11, 6, 5, 6, 12], [5, 13, 7]]
    examples = [
        cloze.Example(np.array(passage), np.array(question), answer)
        for passage, question, answer in zip(passages, [[4, 9, 8, 3], [10, 4], [6, 4, 11]], [5, 6, 7], strict=True)
    ]
    return cloze.make_batch(examples, config, rng)


def check(layer, backward, *inputs):
    report = check_gradient(
        lambda *inputs: np.asarray(layer(*inputs)[0]),
        lambda dy, *inputs: backward(dy, layer(*inputs)[1]),
        *inputs,
        method="complex-step",
        directions=3,
    )
    assert report.ok, report


def test_gradient_of_additive_scores(rng):
    P = attention.additive_attention_parameters(rng, state=3, memory=4, d=5)

    def layer(s, keys, W, v):
        return attention.additive_scores(s, keys, {"W": W, "v": v})

    def backward(dy, cache):
        ds, dkeys, grads = attention.additive_scores_backward(dy, cache)
        return ds, dkeys, grads["W"], grads["v"]

    check(
        layer, backward, rng.normal(size=(2, 3)), rng.normal(size=(6, 2, 5)), P["W"].astype(float), rng.normal(size=5)
    )


def test_gradient_of_the_attention_sum(rng):
    batch = batch_of(TINY, rng)

    def layer(s):
        return reader.attention_sum_loss(s, batch.entities, batch.passage == batch.answer)

    check(layer, lambda dy, cache: [reader.attention_sum_loss_backward(dy, cache)], 3 * rng.normal(size=(6, 3)))


def check_with_parameters(function, P):
    """The same for `function(P) -> (y, dy -> gradients by name)`, each layer's parameters as one vector."""
    trained = {key: value for key, value in P.items() if not key.endswith("running")}
    layers = {}
    for key in trained:
        layers.setdefault(key.split(".")[0], []).append(key)

    def from_vectors(vectors):
        named = dict(P)
        for keys, vector in zip(layers.values(), vectors, strict=True):
            ends = np.cumsum([P[key].size for key in keys])
            named |= {key: x.reshape(P[key].shape) for key, x in zip(keys, np.split(vector, ends), strict=False)}
        return named

    def to_vectors(values):
        assert values.keys() == trained.keys()
        return [np.concatenate([values[key].ravel() for key in keys]) for keys in layers.values()]

    report = check_gradient(
        lambda *vectors: np.asarray(function(from_vectors(vectors))[0]),
        lambda dy, *vectors: to_vectors(function(from_vectors(vectors))[1](dy)),
        *to_vectors(trained),
        method="complex-step",
        directions=2,
    )
    assert report.ok, [(key, part) for key, part in zip(layers, report.inputs, strict=True) if part.verdict != "right"]


def test_gradient_of_reading(rng):
    config, batch = tiny("rms"), batch_of(TINY, rng)
    P = perturbed({k: v for k, v in reader.init(config, rng).items() if k.startswith(("table", "passage"))}, rng)

    def function(P):
        y, cache = reader.read(
            P, batch.passage, batch.passage_mask, "passage", config, config.norm, np.random.default_rng(0)
        )
        return y, lambda dy: reader.read_backward(dy, cache)

    check_with_parameters(function, P)


@pytest.mark.parametrize("kind", reader.NORMS)
def test_gradient_of_the_whole_model(kind, rng):
    config, batch = tiny(kind), batch_of(TINY, rng)
    P = perturbed(reader.init(config, rng), rng)

    def function(P):
        loss, grads, _ = reader.loss_and_gradients(P, batch, config, np.random.default_rng(0))
        return loss, lambda dy: {key: dy * value for key, value in grads.items()}

    check_with_parameters(function, P)
    assert any(key.endswith("running") for key in P) == (kind == "batch")
