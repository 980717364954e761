"""docs/experiments/transformer.py: its parts, two layers together, translation with kept keys, the learning rate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from test_experiments import check, check_with_parameters

import data
import layers
import norms
import training
import transformer
import translation
from attention import (
    causal_mask,
    keys_and_values,
    keys_and_values_backward,
    multi_head_attention,
    multi_head_attention_parameters,
)
from rmsnorm_np.gradcheck import check_gradient

RMS = norms.Norm("rms", fused=False)
TINY = transformer.Config(RMS, 2, 6, 5, 2, source_words=9, target_words=8, batch=3, example_length=3, dropout=0.3)
PAIRS = [([4, 5], [4, 5, 6, 7, 5]), ([6, 7], [5, 4])]  # one target is padded when they are a batch


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def parameters(config, rng, scatter=0.1):
    """In float64, none of them zero or one."""
    P = transformer.init(config, rng)
    return {name: value + scatter * rng.normal(size=value.shape) for name, value in P.items()}


# Parts


def test_gradient_of_the_embedding(rng):
    ids = np.array([[1, 2, 2], [4, 1, 0]])
    check(
        lambda table: transformer.embed(ids, table, 3, 0.4, np.random.default_rng(0)),
        transformer.embed_backward,
        rng.normal(size=(5, 4)),
    )


def test_positions(rng):
    angles = [[t / 10_000 ** (i / 6) for i in (0, 2, 4)] for t in (5, 6)]
    expected = [[f(angle) for angle in row for f in (np.sin, np.cos)] for row in angles]
    np.testing.assert_allclose(transformer.positions(5, 2, 6), expected)
    table = rng.normal(size=(5, 6))
    x, _ = transformer.embed(np.array([[1, 2], [3, 3]]), table, 5)
    np.testing.assert_allclose(x, np.sqrt(6) * table[[[1, 2], [3, 3]]] + expected)


def test_attention_in_each_head(rng):
    P = multi_head_attention_parameters(rng, 6)
    x, memory = rng.normal(size=(3, 6)), rng.normal(size=(4, 6))  # one sentence
    q, k, v = x @ P["W_q"], memory @ P["W_k"], memory @ P["W_v"]
    read = []
    for head in (slice(0, 3), slice(3, 6)):
        e = np.exp(q[:, head] @ k[:, head].T / np.sqrt(3))
        read.append(e / e.sum(axis=1, keepdims=True) @ v[:, head])
    y, _ = multi_head_attention(x[None], memory[None], P, heads=2)
    np.testing.assert_allclose(y[0], np.concatenate(read, axis=1) @ P["W_o"])


def test_gradient_of_feed_forward(rng):
    P = layers.part(transformer.layer_parameters(rng, TINY, []), "ffn")
    x = rng.normal(size=(2, 3, 6))
    check_with_parameters(transformer.feed_forward, transformer.feed_forward_backward, P, x)
    y, _ = transformer.feed_forward(x, {**P, "b_1": np.full(5, 0.5), "b_2": np.full(6, 0.2)})
    np.testing.assert_allclose(y, np.maximum(0, x @ P["W_1"] + 0.5) @ P["W_2"] + 0.2)


def test_gradient_of_a_residual_sum(rng):
    P = norms.norm_parameters(RMS, "n", 6)

    def layer(x, f, P):
        return transformer.residual(x, f, P, "n", TINY, np.random.default_rng(0))

    check_with_parameters(layer, transformer.residual_backward, P, *rng.normal(size=(2, 2, 3, 6)))


def test_gradient_of_an_encoder_layer(rng):
    P = transformer.layer_parameters(rng, TINY, ["self"])

    def layer(x, P):
        return transformer.encoder_layer(x, P, TINY, np.random.default_rng(0))

    check_with_parameters(layer, transformer.encoder_layer_backward, P, rng.normal(size=(2, 3, 6)))


def test_gradient_of_a_decoder_layer(rng):
    P = transformer.layer_parameters(rng, TINY, ["self", "cross"])
    mask, heads = causal_mask(3), TINY.heads

    def layer(x, memory, P):
        own, cache_own = keys_and_values(x, layers.part(P, "self"), heads)
        read, cache_read = keys_and_values(memory, layers.part(P, "cross"), heads)
        y, cache = transformer.decoder_layer(x, own, read, P, TINY, mask, np.random.default_rng(0))
        return y, (cache, cache_own, cache_read)

    def backward(dy, caches):
        cache, cache_own, cache_read = caches
        dx, down, dread, grads = transformer.decoder_layer_backward(dy, cache)
        dx_own, grads_own = keys_and_values_backward(down, cache_own)
        dmemory, grads_read = keys_and_values_backward(dread, cache_read)
        return dx + dx_own, dmemory, {**grads, **layers.whole("self", grads_own), **layers.whole("cross", grads_read)}

    check_with_parameters(layer, backward, P, rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 4, 6)))


# The whole model


@pytest.mark.parametrize("kind", transformer.NORMS)
def test_gradient_of_two_layers_a_side(kind, rng):
    config = dataclasses.replace(TINY, norm=RMS._replace(kind=kind, p=0.5))
    P, batch = parameters(config, rng), translation.make_batch(PAIRS)
    cuts = np.cumsum([value.size for value in P.values()])[:-1]

    def loss_and_gradients(vector):  # of all parameters in one: a check takes the time of one
        named = {name: v.reshape(P[name].shape) for name, v in zip(P, np.split(vector, cuts), strict=True)}
        return transformer.loss_and_gradients(named, batch, config, np.random.default_rng(0))

    def gradient(dy, vector):
        grads = loss_and_gradients(vector)[1]
        assert grads.keys() == P.keys()
        return np.concatenate([dy * grads[name].ravel() for name in P])

    vector = np.concatenate([value.ravel() for value in P.values()])
    report = check_gradient(
        lambda vector: np.asarray(loss_and_gradients(vector)[0]), gradient, vector, method="complex-step", directions=3
    )
    assert report.ok, report


def test_the_paper_has_thirty_norms_after_residual_sums(rng):
    config = dataclasses.replace(transformer.SIZES["paper"], d=6, ffn=5, heads=2, source_words=9, target_words=8)
    P = transformer.init(config, rng)
    assert sum(name.endswith("norm.g") for name in P) == 30
    memory, _ = transformer.encode(P, np.array([[4, 5, 6]]), config)
    np.testing.assert_allclose(np.mean(memory**2, axis=-1), 1, rtol=1e-3)  # the last operation is a norm


def test_the_decoder_does_not_see_what_comes_after_and_the_encoder_sees_the_order(rng):
    P = parameters(TINY, rng)
    memory, _ = transformer.encode(P, np.array([[4, 5, 6]]), TINY)
    logits, _ = transformer.decode(P, np.array([[1, 4, 5, 6]]), memory, TINY)
    others, _ = transformer.decode(P, np.array([[1, 4, 7, 4]]), memory, TINY)
    np.testing.assert_array_equal(others[:, :2], logits[:, :2])
    assert np.all(others[:, 2:] != logits[:, 2:])
    reordered, _ = transformer.encode(P, np.array([[6, 5, 4]]), TINY)
    assert np.abs(reordered[:, ::-1] - memory).max() > 0.1


def test_padding_does_not_count(rng):
    P = parameters(TINY, rng)
    together = transformer.loss_and_gradients(P, translation.make_batch(PAIRS), TINY)
    alone = [transformer.loss_and_gradients(P, translation.make_batch([pair]), TINY) for pair in PAIRS]
    shares = np.array([6, 3]) / 9  # words, each target's END with them
    assert together[2]["words"] == 9
    assert together[0] == pytest.approx(shares @ [loss for loss, *_ in alone])
    for name, grad in together[1].items():
        expected = sum(share * grads[name] for share, (_, grads, _) in zip(shares, alone, strict=True))
        np.testing.assert_allclose(grad, expected, atol=1e-12)


def test_labels_are_smoothed_in_training_only(rng):
    P, batch = parameters(TINY, rng), translation.make_batch(PAIRS)
    plain = dataclasses.replace(TINY, smoothing=0.0)
    exact = transformer.loss(P, batch, TINY)
    assert transformer.loss_and_gradients(P, batch, plain)[0] == pytest.approx(exact)
    assert abs(transformer.loss_and_gradients(P, batch, TINY)[0] - exact) > 1e-3


def test_the_learning_rate_rises_and_falls():
    config = transformer.SIZES["paper"]
    rates = [transformer.learning_rate(config, step) for step in (1, 2_000, 4_000, 16_000)]
    assert rates == pytest.approx([7e-4 / 4_000, 3.5e-4, 7e-4, 3.5e-4])
    assert rates[2] == pytest.approx((config.d * config.warmup) ** -0.5, rel=0.01)


# Translation


def test_translation_with_kept_keys_is_that_of_all_steps_at_once(rng):
    P = parameters(TINY, rng, scatter=0.5)
    source = rng.integers(4, 9, (4, 6))  # (S, B)
    words = transformer.translate(P, source, TINY, 7)  # (T, B)
    assert len(np.unique(words)) > 2
    previous = np.concatenate([np.full((1, 6), data.START), words[:-1]])  # (T, B)
    logits, _ = transformer.decode(P, previous.T, transformer.encode(P, source.T, TINY)[0], TINY)  # (B, T, V)
    logits[..., [data.PAD, data.START, data.UNKNOWN]] = -np.inf
    np.testing.assert_array_equal(logits.argmax(axis=-1).T, words)


def test_greedy_translation_takes_words_until_all_sentences_have_ended():
    best = np.array([[4, 5], [data.END, 6], [7, data.END], [4, 4]])  # (T, B)
    seen = []

    def step(word, t):
        seen.append(word.tolist())
        logits = np.zeros((2, 8))
        logits[:, [data.PAD, data.START, data.UNKNOWN]] = 2.0  # the most probable, but no words
        logits[range(2), best[t]] = 1.0
        return logits, t + 1

    assert translation.greedy(step, 0, 2, longest=10).tolist() == best[:3].tolist()
    assert seen == [[data.START] * 2, *best[:2].tolist()]
    assert translation.greedy(step, 0, 2, longest=2).tolist() == best[:2].tolist()


def test_it_translates_what_it_has_learnt():
    pairs = [("the big house", "das große Haus"), ("the house", "das Haus"), ("big and old", "groß - und alt")] * 2
    tokens = [(data.tokenize(english), data.tokenize(german)) for english, german in pairs]
    source, target = (data.Vocabulary.of((pair[side] for pair in tokens), 1) for side in (0, 1))
    numbers = [(source.encode(s), target.encode(t)) for s, t in tokens]
    parts = ("train", "validation", "test")
    loaded = translation.Data(dict.fromkeys(parts, numbers), dict.fromkeys(parts, pairs), source, target)
    config = transformer.Config(
        RMS, 1, 8, 16, 2, len(source), len(target), dropout=0.0, batch=4, learning_rate=0.02, warmup=20, steps=120
    )
    run = training.train(transformer, loaded, config, 0, Path("no checkpoint"))
    assert [entry["translation"] for entry in run["translations"]] == [german for _, german in pairs]
    assert run["test"]["bleu"] == pytest.approx(100)
