"""docs/experiments: every gradient against a numerical one, the fused norms against the separate operations."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import attention
import convolution
import data
import layers
import norms
import optim
import recurrent
import run
import timing
import training
from rmsnorm_np.gradcheck import check_gradient

SEPARATE = [norms.Norm(kind, fused=False, p=0.3) for kind in norms.KINDS]
PAPER_KINDS = [how for how in SEPARATE if how.kind in ("none", "layer", "rms", "prms", "batch")]
by_kind = pytest.mark.parametrize("how", SEPARATE, ids=lambda how: how.kind)
by_paper_kind = pytest.mark.parametrize("how", PAPER_KINDS, ids=lambda how: how.kind)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch):
    """What run.py sets for its own process, memory and threads, is not for the other tests in this one."""
    monkeypatch.setattr(run, "keep_memory", lambda: None)
    monkeypatch.setattr(run.rn, "set_num_threads", lambda n: None)


def check(layer, backward, *inputs, method="complex-step", directions=3):
    """`layer(*inputs)` gives (y, cache), `backward(dy, cache)` a gradient for each input, None where not checked."""
    report = check_gradient(
        lambda *inputs: layer(*inputs)[0],
        lambda dy, *inputs: backward(dy, layer(*inputs)[1]),
        *inputs,
        method=method,
        directions=directions,
    )
    assert report.ok, report


def check_with_parameters(layer, backward, P, *inputs):
    """The same for `layer(*inputs, P)` and a backward that ends in a dict of gradients; parameters are perturbed."""
    rng = np.random.default_rng(5)
    trained = {name: value + 0.1 * rng.normal(size=value.shape) for name, value in P.items() if "running" not in name}
    running = {name: value.astype(float) for name, value in P.items() if "running" in name}

    def forward(*arguments):
        values = dict(zip(trained, arguments[len(inputs) :], strict=True))
        return layer(*arguments[: len(inputs)], {**values, **running})

    def gradients(dy, cache):
        *dinputs, grads = backward(dy, cache)
        assert grads.keys() == trained.keys()
        return *dinputs, *(grads[name] for name in trained)

    check(forward, gradients, *inputs, *trained.values(), directions=2)


# Norms


@by_kind
@pytest.mark.parametrize("given", ["gain and bias", "neither"])
def test_norm(how, given, rng):
    a, g, b = rng.normal(size=(2, 3, 7)), rng.normal(size=7), rng.normal(size=7)
    g = None if given == "neither" or how.kind in ("none", "weight") else g
    b = None if given == "neither" else b
    check(functools.partial(norms.norm, how), norms.norm_backward, a, g, b)


@by_kind
def test_channel_norm(how, rng):
    a, g, b = rng.normal(size=(4, 3, 2, 5)), rng.normal(size=4), rng.normal(size=4)
    g = g if how.kind in norms.GAINED else None
    check(functools.partial(norms.channel_norm, how), norms.channel_norm_backward, a, g, b)


def test_weight_norm(rng):
    check(norms.weight_norm, norms.weight_norm_backward, rng.normal(size=(3, 2, 4)), rng.normal(size=3))


@pytest.mark.parametrize("kind", ["layer", "rms", "prms", "l2"])
@pytest.mark.parametrize("given", ["gain and bias", "neither"])
def test_the_kernels_and_the_separate_operations_agree(kind, given, rng):
    a, dy = rng.normal(size=(2, 5, 40)).astype(np.float32)
    g, b = rng.normal(size=(2, 40)).astype(np.float32)
    g, b = (None, None) if given == "neither" else (g, b)
    results = []
    for fused in (True, False):
        y, cache = norms.norm(norms.Norm(kind, fused, p=0.3), a, g, b)
        results.append((y, *norms.norm_backward(dy, cache)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_batch_norm_keeps_running_statistics_for_evaluation(rng):
    a = rng.normal(3, 2, size=(50, 4))
    running = np.stack([np.zeros(4), np.ones(4)])
    for _ in range(400):
        y, _ = norms.norm(norms.Norm("batch"), a, running=running)
    np.testing.assert_allclose(running, [a.mean(0), a.var(0)], rtol=1e-6)
    evaluated, _ = norms.norm(norms.Norm("batch", training=False), a[:1], running=running)
    np.testing.assert_allclose(evaluated, y[:1], rtol=1e-5)


# Layers


def test_embedding(rng):
    ids = np.array([[0, 2, 2], [4, 2, 0]])  # words that stand there more than once, and one that does not
    check(lambda table: layers.embedding(ids, table), layers.embedding_backward, rng.normal(size=(5, 3)))


@pytest.mark.parametrize("biased", [True, False])
def test_linear(biased, rng):
    b = rng.normal(size=4) if biased else None
    check(layers.linear, layers.linear_backward, rng.normal(size=(2, 5, 3)), rng.normal(size=(3, 4)), b)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_dropout(rate, rng):
    x = rng.normal(size=(4, 6))
    check(lambda x: layers.dropout(x, rate, np.random.default_rng(0)), layers.dropout_backward, x)
    assert layers.dropout(x, rate, None)[0] is x
    kept = layers.dropout(np.ones(100_000, np.float32), 0.25, rng)[0]
    assert set(np.unique(kept)) == {np.float32(0), np.float32(4 / 3)}
    assert abs(kept.mean() - 1) < 0.01


def test_leaky_relu(rng):
    x = rng.uniform(0.5, 1.5, (3, 4)) * rng.choice([-1, 1], (3, 4))
    check(lambda x: layers.leaky_relu(x, 0.1), layers.leaky_relu_backward, x)
    assert layers.leaky_relu(np.array([-2.0, 3.0]), 0.1)[0].tolist() == [-0.2, 3.0]


def test_softmax(rng):
    mask = np.array([[True, True, False], [False, True, True]])
    check(
        lambda x: (layers.softmax(x, mask=mask),) * 2,
        layers.softmax_backward,
        rng.normal(size=(4, 2, 3)) * 30,
    )
    y = layers.softmax(np.array([[1000.0, 0.0], [1.0, 1.0]]), mask=np.array([[True, True], [True, False]]))
    assert y.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_cross_entropy(smoothing, rng):
    logits, targets, weights = (
        rng.normal(size=(2, 3, 5)),
        rng.integers(5, size=(2, 3)),
        np.array([[1, 1, 0], [1, 0, 1]]),
    )

    def layer(logits):
        return layers.softmax_cross_entropy(logits, targets, weights, smoothing)

    check(layer, layers.softmax_cross_entropy_backward, logits)
    logp = np.log(layers.softmax(logits))
    chosen = np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    each = -(1 - smoothing) * chosen - smoothing * logp.mean(-1)
    assert layer(logits)[0] == pytest.approx(np.sum(each * weights) / 4)


# Attention


@pytest.mark.parametrize("masked", [True, False])
def test_additive_attention(masked, rng):
    P = attention.additive_attention_parameters(rng, state=3, memory=4, d=5)
    mask = np.array([[True, True], [True, False], [False, True]]) if masked else None

    def layer(s, h, P):
        keys, cache_keys = attention.attention_keys(h, P)
        (context, alpha), cache = attention.additive_attention(s, keys, h, P, mask)
        return np.concatenate([context, alpha.T], axis=1), (cache, cache_keys)

    def backward(dy, caches):
        cache, cache_keys = caches
        ds, dkeys, dh, grads = attention.additive_attention_backward(dy[:, :4], cache, dalpha=dy[:, 4:].T)
        dh_keys, grads_keys = attention.attention_keys_backward(dkeys, cache_keys)
        return ds, dh + dh_keys, {**grads, **grads_keys}

    s, h = rng.normal(size=(2, 3)), rng.normal(size=(3, 2, 4))
    check_with_parameters(layer, backward, P, s, h)
    if masked:
        h[1:, 0] = h[2, 0] = 7.0  # an unseen position has no influence
        (_, alpha), _ = attention.additive_attention(s, attention.attention_keys(h, P)[0], h, P, mask)
        assert np.all(alpha[~mask] == 0)
        np.testing.assert_allclose(alpha.sum(0), 1)


def test_multi_head_attention(rng):
    P = attention.multi_head_attention_parameters(rng, 6)
    mask = attention.padding_mask([4, 2], 4)
    x, memory = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 4, 6))

    def layer(x, memory, P):
        return attention.multi_head_attention(x, memory, P, 2, mask)

    check_with_parameters(layer, attention.multi_head_attention_backward, P, x, memory)
    y, _ = layer(x, memory, P)
    memory[1, 2:] += 5.0
    np.testing.assert_array_equal(layer(x, memory, P)[0], y)


def test_causal_attention_does_not_see_what_comes_after(rng):
    P = attention.multi_head_attention_parameters(rng, 4)
    x = rng.normal(size=(1, 5, 4))
    y, _ = attention.multi_head_attention(x, x, P, 2, attention.causal_mask(5))
    x[:, 3:] += 1.0
    later, _ = attention.multi_head_attention(x, x, P, 2, attention.causal_mask(5))
    np.testing.assert_array_equal(later[:, :3], y[:, :3])
    assert np.all(later[:, 3:] != y[:, 3:])


# Recurrent layers

MASK = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])


@by_paper_kind
@pytest.mark.parametrize("options", [{}, {"mask": MASK, "reverse": True}], ids=["forward", "masked reverse"])
def test_gru(how, options, rng):
    P = recurrent.gru_parameters(rng, 3, 4, how)
    x, h0 = rng.normal(size=(4, 3, 3)), rng.normal(size=(3, 4))
    check_with_parameters(lambda x, h0, P: recurrent.gru(x, h0, P, how, **options), recurrent.gru_backward, P, x, h0)


@by_paper_kind
@pytest.mark.parametrize("options", [{}, {"mask": MASK, "reverse": True}], ids=["forward", "masked reverse"])
def test_lstm(how, options, rng):
    P = recurrent.lstm_parameters(rng, 3, 4, how)
    x = rng.normal(size=(4, 3, 3))
    check_with_parameters(lambda x, P: recurrent.lstm(x, P, how, **options), recurrent.lstm_backward, P, x)


def recurrent_layers(rng):
    """A GRU and an LSTM of 3 inputs and 4 hidden units: functions (x, mask, reverse) -> states."""
    how = norms.Norm("layer", fused=False)
    P, Q = recurrent.gru_parameters(rng, 3, 4, how), recurrent.lstm_parameters(rng, 3, 4, how)
    return (
        lambda x, mask=None, reverse=False: recurrent.gru(x, np.full((x.shape[1], 4), 0.5), P, how, mask, reverse)[0],
        lambda x, mask=None, reverse=False: recurrent.lstm(x, Q, how, mask, reverse)[0],
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_changes_no_state(reverse, rng):
    x, mask = rng.normal(size=(5, 2, 3)), (np.arange(5)[:, None] < [5, 3]).astype(float)
    for layer in recurrent_layers(rng):
        padded, alone = layer(x, mask, reverse), layer(x[:3, 1:], None, reverse)
        np.testing.assert_allclose(padded[:3, 1:], alone, atol=1e-12)
        if not reverse:
            np.testing.assert_array_equal(padded[3:, 1], padded[[2, 2], 1])


def test_reverse_runs_from_the_last_input_to_the_first(rng):
    x = rng.normal(size=(5, 2, 3))
    for layer in recurrent_layers(rng):
        np.testing.assert_allclose(layer(x, reverse=True), layer(x[::-1])[::-1])


# Convolution and pooling


@pytest.mark.parametrize(("size", "padding"), [(3, 1), (3, 0), (1, 0), (2, 1)])
@pytest.mark.parametrize("block", [1, 2**20])
def test_conv2d(size, padding, block, rng, monkeypatch):
    monkeypatch.setattr(convolution, "BLOCK", block)  # one sample after the other, or all at once
    x, W = rng.normal(size=(3, 2, 4, 5)), rng.normal(size=(4, 3, size, size))
    check(lambda x, W: convolution.conv2d(x, W, padding), convolution.conv2d_backward, x, W)
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    y, _ = convolution.conv2d(x, W, padding)
    at = padded[:, 1, 1 : 1 + size, 2 : 2 + size]
    assert y[3, 1, 1, 2] == pytest.approx(np.sum(at * W[3]))


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 2, 5, 7)])
def test_pooling(shape, rng):
    x = rng.permutation(np.arange(np.prod(shape), dtype=float)).reshape(shape)  # no two equal: no branch near
    check(convolution.max_pool, convolution.max_pool_backward, x / 10, method="finite-difference")
    check(convolution.average_pool, convolution.average_pool_backward, x)
    assert convolution.max_pool(x)[0][0, 1, 0, 1] == x[0, 1, :2, 2:4].max()
    y, cache = convolution.max_pool(np.zeros((1, 1, 2, 2)))  # four equal ones: the gradient goes to the first
    assert convolution.max_pool_backward(y + 1, cache).tolist() == [[[[1, 0], [0, 0]]]]


# Adam


def test_adam_takes_steps_of_the_learning_rate_and_finds_the_minimum():
    target = np.array([1.0, -2.0, 30.0])
    P = {"w": np.zeros(3), "w.running": np.ones(2)}
    state = optim.adam_state(P)
    optim.adam(P, {"w": 2 * (P["w"] - target)}, state, 0.1)
    np.testing.assert_allclose(P["w"], 0.1 * np.sign(target), rtol=1e-6)
    for _ in range(3000):
        optim.adam(P, {"w": 2 * (P["w"] - target)}, state, 0.05)
    np.testing.assert_allclose(P["w"], target, atol=1e-3)
    assert P["w.running"].tolist() == [1, 1]


def test_the_learning_rate_falls_from_its_start_to_the_end():
    assert [optim.falling(step, 8, 0.5) for step in range(1, 9)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [optim.falling(step, 8, 1.0) for step in range(1, 9)] == [1] * 8


def test_clip():
    grads = {"a": np.array([3.0]), "b": np.array([[0.0, 4.0]])}
    assert optim.clip(grads, 6.0) == (grads, 5.0)
    clipped, norm = optim.clip(grads, 1.0)
    assert norm == 5.0
    np.testing.assert_allclose(clipped["a"], 0.6)
    np.testing.assert_allclose(clipped["b"], [[0.0, 0.8]])


# Data


def test_the_data_are_there():
    pairs = data.load_pairs()
    assert [len(part) for part in pairs] == [19_190, 1000, 1000]
    assert all(english and german for english, german in pairs.train)
    assert len(data.load_verses()) == 37_473
    assert data.load_emoji()["noto"].shape == (1641, 32, 32, 3)
    assert data.load_fashion()["x"].shape == (10_000, 28, 28)


def test_tokens():
    text = 'Das E-Mail-Fenster (neu), „Feld“ und "Format - Absatz" und Kopf- oder -zeilen: 2,5 @ %…'
    tokens = data.tokenize(text)
    assert tokens[1:6] == ["E", "@-@", "Mail", "@-@", "Fenster"]
    assert tokens[-10:] == ["Kopf", "@-", "oder", "-@", "zeilen", ":", "2,5", "@", "%", "…"]
    assert data.detokenize(tokens) == text.replace(" %", "%")
    sentences = [german for _, german in data.load_pairs().test]
    restored = sum(data.detokenize(data.tokenize(sentence)) == sentence for sentence in sentences)
    assert restored > 0.94 * len(sentences)


def test_vocabulary():
    vocabulary = data.Vocabulary.of([["b", "a"], ["a", "b", "c"], ["d", "d", "d"]], minimum=2)
    assert vocabulary.words == (*data.SPECIAL, "d", "a", "b")
    assert vocabulary.encode(["a", "c"]) == [5, data.UNKNOWN]
    assert vocabulary.decode([data.START, 5, 6, data.END, 4]) == ["a", "b"]


def test_batches_have_one_length_and_every_example_once(rng):
    lengths, targets = rng.integers(3, 9, 500), rng.integers(3, 30, 500)
    batches = data.batches_of_one_length(lengths, 16, rng, then_by=targets)
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(set(lengths[batch])) == 1 and len(batch) <= 16 for batch in batches)
    again = data.batches_of_one_length(lengths, 16, rng, then_by=targets)
    assert [batch.tolist() for batch in again] != [batch.tolist() for batch in batches]
    padding = sum(targets[batch].max() * len(batch) for batch in batches) / targets.sum()
    unsorted = data.batches_of_one_length(lengths, 16, rng)
    assert padding < 1.2 < sum(targets[batch].max() * len(batch) for batch in unsorted) / targets.sum()


def test_padded():
    ids, mask = data.padded([[5, 6], [7]])
    assert ids.tolist() == [[5, 7], [6, data.PAD]]
    assert mask.tolist() == [[1, 1], [1, 0]]


# Models

TRANSLATION = {"source_words": 9, "target_words": 8, "batch": 3, "example_length": 3}
TINY = {"rnnsearch": {**TRANSLATION, "embedding": 3, "encoder": 2, "decoder": 4, "read": 5}}
TINY["transformer"] = {**TRANSLATION, "layers": 1, "d": 6, "ffn": 5, "heads": 2, "warmup": 10, "smoothing": 0.0}
MODEL_KINDS = [("rnnsearch", kind) for kind in ("none", "layer", "rms", "prms", "l2")]


@pytest.mark.parametrize(("name", "kind"), MODEL_KINDS)
def test_gradient_of_a_whole_model(name, kind, rng):
    model = importlib.import_module(name)
    config = model.Config(**TINY[name], norm=norms.Norm(kind, fused=False, p=0.5), dropout=0.3)
    P = {key: value.astype(float) for key, value in model.init(config, rng).items()}
    P = {key: value + 0.1 * rng.normal(size=value.shape) for key, value in P.items()}
    batch = model.example_batch(config, rng)
    batch.weights[-1, 0] = 0.0  # padding

    trained = model.loss_and_gradients(P, batch, config, np.random.default_rng(0))[1].keys()
    assert trained == {key for key in P if not key.endswith(".running")}
    ends = np.cumsum([P[key].size for key in trained])[:-1]

    def loss_and_gradients(flat):  # all parameters as one vector: one check, whose tolerance leaves room for none
        parts = zip(trained, np.split(flat, ends), strict=True)
        named = {**P, **{key: values.reshape(P[key].shape) for key, values in parts}}
        return model.loss_and_gradients(named, batch, config, np.random.default_rng(0))

    def gradient(dy, flat):
        grads = loss_and_gradients(flat)[1]
        return dy * np.concatenate([grads[key].ravel() for key in trained])

    flat = np.concatenate([P[key].ravel() for key in trained])
    report = check_gradient(lambda flat: np.asarray(loss_and_gradients(flat)[0]), gradient, flat, directions=3)
    assert report.ok, report


@pytest.mark.parametrize("name", TINY)
def test_a_model_learns_one_batch(name, rng):
    model = importlib.import_module(name)
    config = model.Config(**TINY[name], norm=norms.Norm("rms", fused=False), dropout=0.0, learning_rate=0.03)
    P, batch = model.init(config, rng), model.example_batch(config, rng)
    state, losses = optim.adam_state(P), []
    for _ in range(60):
        loss, size = training.train_step(model, P, state, batch, config, None)
        losses.append(loss)
        assert np.isfinite(size)
    assert all(value.dtype == np.float32 for value in P.values())
    assert losses[-1] < 0.2 * losses[0]


def test_rnnsearch_translates_what_it_has_learnt(rng):
    import rnnsearch
    import translation

    pairs = [("the big house", "das große Haus"), ("the house", "das Haus"), ("big and old", "groß - und alt")] * 2
    tokens = [(data.tokenize(english), data.tokenize(german)) for english, german in pairs]
    source, target = (data.Vocabulary.of((pair[side] for pair in tokens), 1) for side in (0, 1))
    numbers = [(source.encode(s), target.encode(t)) for s, t in tokens]
    loaded = translation.Data(
        dict.fromkeys(("train", "validation", "test"), numbers),
        dict.fromkeys(("train", "validation", "test"), pairs),
        source,
        target,
    )
    config = rnnsearch.Config(
        norms.Norm("rms", fused=False), 8, 8, 8, 8, len(source), len(target), batch=4, learning_rate=0.02, steps=80
    )
    run = training.train(rnnsearch, loaded, config, 0, Path("no checkpoint"))
    assert [entry["translation"] for entry in run["translations"]] == [german for _, german in pairs]
    assert run["test"]["bleu"] == pytest.approx(100)
    assert run["test"]["loss"] < 0.1
    assert [step for step, *_ in run["curve"]] == [20, 40, 60, 80]
    assert list(run["hidden_to_hidden"]) == ["1", "2", "3", "4", "all"]


def test_the_statistics_of_table_5_are_of_the_decoders_states_without_padding(rng):
    import rnnsearch
    import translation

    pairs = [([4, 5], [4, 5, 6, 7, 5]), ([6, 7], [5, 4, 6, 6])]
    loaded = translation.Data({"validation": pairs}, {}, None, None)
    config = rnnsearch.Config(norms.Norm("none"), 3, 2, 4, 5, source_words=9, target_words=8, batch=2)
    P = rnnsearch.init(config, rng)
    together = rnnsearch.hidden_to_hidden(P, loaded, config)
    alone = rnnsearch.hidden_to_hidden(P, loaded, dataclasses.replace(config, batch=1))
    for name in together:
        assert together[name] == pytest.approx(alone[name], rel=1e-4)

    P["decoder.U_proposal"][:] = 0.0
    source = np.array([[4, 5, data.END], [6, 7, data.END]]).T
    first = rnnsearch.encode(P, source, config)[0][2]
    values = np.concatenate([first @ P["decoder.U_gates"], np.zeros((2, 4))], axis=1)
    expected = {"mean": values.mean(), "sd": values.std()}
    assert rnnsearch.hidden_to_hidden(P, loaded, config)["1"] == pytest.approx(expected, rel=1e-4)


# Runs: a model whose parameter walks to the mean of its batches


class Walk:
    METRIC = "distance"
    NORMS = ("none", "layer", "rms")

    @dataclasses.dataclass(frozen=True)
    class Config:
        norm: norms.Norm = norms.Norm("rms", fused=False)  # noqa: RUF009
        steps: int = 50
        evaluate_every: int = 20
        clip: float | None = None

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def init(self, config, rng):
        return {"w": rng.normal(size=3)}

    def batches(self, loaded, config, rng):
        yield from rng.permutation(loaded)

    def example_batch(self, config, rng):
        return rng.normal(size=3)

    def learning_rate(self, config, step):
        return 0.1 / step

    def loss_and_gradients(self, P, batch, config, rng):
        if batch is None or self.stop_at == 0:
            raise KeyboardInterrupt
        self.stop_at = None if self.stop_at is None else self.stop_at - 1
        difference = P["w"] - batch + 0.01 * rng.normal(size=3)
        return np.sum(difference**2), {"w": 2 * difference}, {}

    def evaluate(self, P, loaded, config, name):
        return {"distance": float(np.sum((P["w"] - loaded.mean(0)) ** 2))}

    def report(self, P, loaded, config):
        return {"w": P["w"].tolist()}


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", -1.0)
    loaded, checkpoint = rng.normal(size=(7, 3)), tmp_path / "unfinished" / "walk.npz"
    whole = training.train(Walk(), loaded, Walk.Config(), 5, tmp_path / "another.npz")
    with pytest.raises(KeyboardInterrupt):
        training.train(Walk(stop_at=33), loaded, Walk.Config(), 5, checkpoint)
    steps = []
    again = training.train(Walk(), loaded, Walk.Config(), 5, checkpoint, lambda step, **_: steps.append(step))
    assert steps == list(range(34, 51))
    assert again["w"] == whole["w"]
    assert [(step, loss) for step, _, loss in again["curve"]] == [(step, loss) for step, _, loss in whole["curve"]]
    assert [entry["step"] for entry in again["history"]] == [20, 40, 50]
    assert training.train(Walk(), loaded, Walk.Config(), 6, tmp_path / "third.npz")["w"] != whole["w"]


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    loaded = np.arange(30)

    def first(seed, epoch):
        return [batch for batch, _ in zip(training.stream(Walk(), loaded, None, seed), range(60), strict=False)][
            30 * epoch : 30 * epoch + 30
        ]

    assert sorted(first(1, 0)) == sorted(first(1, 1)) == loaded.tolist()
    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(1, 1) != first(2, 1) != first(2, 0) != first(1, 0)


def test_a_run_that_diverges_says_when_and_ends(tmp_path, rng):
    model, loaded = Walk(), rng.normal(size=(7, 3))
    loaded[3] = np.inf
    run = training.train(model, loaded, Walk.Config(), 5, tmp_path / "no.npz")
    assert 1 <= run["diverged"] <= 7
    assert "test" not in run


def test_time_is_measured_on_parameters_that_stay(rng):
    model = Walk()
    seen = []
    original = model.loss_and_gradients
    model.loss_and_gradients = lambda P, *rest: seen.append(P["w"].copy()) or original(P, *rest)
    rows = timing.measure(model, Walk.Config(), 3, seed=1)
    assert [(row["norm"], row["fused"]) for row in rows] == [
        ("none", None),
        ("layer", False),
        ("layer", True),
        ("rms", False),
        ("rms", True),
    ]
    assert all(len(row["seconds"]) == 3 for row in rows)
    np.testing.assert_array_equal(seen, [seen[0]] * 20)


def test_savings_are_against_layer_norm_computed_in_the_same_way():
    how = [norms.Norm(kind, fused) for kind in ("layer", "rms") for fused in (False, True)]
    rows = timing.summary(how, [[9.0, 10.0, 20.0], [5.0], [8.0], [4.0]])
    assert [row["saving"] for row in rows] == pytest.approx([0, 0, 0.2, 0.2])


def test_command_line(tmp_path, monkeypatch, capsys):
    walk = Walk()
    walk.SIZES = {"small": Walk.Config(), "paper": Walk.Config(steps=500)}
    walk.load = lambda config: (np.arange(12.0).reshape(4, 3), config)
    monkeypatch.setitem(sys.modules, "rnnsearch", walk)
    command = ["rnnsearch", "--norm", "prms", "--set", "p=0.5", "--steps", "30", "--results", str(tmp_path)]
    assert run.main([*command, "--seed", "4"]) == 0
    (stored,) = tmp_path.glob("*.json")
    assert stored.name == "rnnsearch-small-prms-p=0.5-steps=30-seed4.json"
    result = json.loads(stored.read_text())
    assert result["config"]["norm"] == {"kind": "prms", "fused": False, "p": 0.5, "eps": 1e-6, "training": True}
    assert (result["seed"], result["config"]["steps"], result["test"].keys()) == (4, 30, {"distance"})
    assert result["versions"]["numpy"] == np.__version__
    assert result["machine"]["cores"] >= 1

    before = stored.read_bytes()
    assert run.main([*command, "--seed", "4"]) == 0  # not again
    assert "there already" in capsys.readouterr().out
    assert stored.read_bytes() == before

    walk.stop_at = 3
    assert run.main([*command, "--seed", "5"]) == 130
    assert len(list(tmp_path.glob("*.json"))) == 1
    walk.stop_at = None

    assert run.main([*command[:1], "--time", "--steps", "2", "--results", str(tmp_path)]) == 0
    timed = json.loads((tmp_path / "rnnsearch-small-time-steps=2-seed1.json").read_text())
    assert [len(row["seconds"]) for row in timed["time"]] == [2] * 5
    with pytest.raises(ValueError, match="setting is 'q', expected one of p, fused, norm, steps"):
        run.main(["rnnsearch", "--set", "q=1", "--results", str(tmp_path)])


def test_equation_10_is_not_timed(capsys):
    with pytest.raises(SystemExit):
        run.main(["equation10", "--time"])
    assert "without --time" in capsys.readouterr().err


def test_all_makes_what_is_not_there_yet(tmp_path, monkeypatch, capsys):
    walk = Walk()
    walk.SIZES = {"small": Walk.Config(steps=3), "paper": Walk.Config(steps=3)}
    walk.EXPERIMENTS = ({"norm": "rms"}, {"norm": "prms", "p": 0.5, "seeds": 1})
    walk.load = lambda config: (np.arange(12.0).reshape(4, 3), config)
    monkeypatch.setitem(sys.modules, "rnnsearch", walk)
    monkeypatch.setattr(run, "MODELS", ("rnnsearch",))
    monkeypatch.setattr(run.equation10, "measure", lambda *_: [])
    trained = ["rms-seed1", "rms-seed2", "rms-seed3", "prms-p=0.5-seed1"]
    names = ["small-time-seed1", "paper-time-seed1", *(f"small-{name}" for name in trained)]
    walk.stop_at = None
    assert run.main(["all", "--results", str(tmp_path)]) == 0
    stored = {f"rnnsearch-{name}" for name in names} | {"equation10-small-seed1"}
    assert {path.stem for path in tmp_path.glob("*.json")} == stored
    (tmp_path / "rnnsearch-small-rms-seed2.json").unlink()
    capsys.readouterr()
    assert run.main(["all", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("there already") == 6
    assert (tmp_path / "rnnsearch-small-rms-seed2.json").exists()
