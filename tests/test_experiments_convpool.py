"""docs/experiments/convpool.py: every gradient against a numerical one, and that it learns."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import convpool
import norms
import optim
import training
from rmsnorm_np.gradcheck import check_gradient

KINDS = {kind: norms.Norm(kind, fused=False, p=0.5) for kind in convpool.NORMS}
TINY = convpool.Config(channels=2, image=16, width=2, classes=3, batch=3)
by_kind = pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def perturbed(P, rng):
    """Parameters in float64 away from 0 and 1: {name: value} of those with a gradient, and of the others."""
    P = {name: value + 0.1 * rng.normal(size=value.shape) for name, value in P.items()}
    fixed = {name: P.pop(name) for name in list(P) if name.endswith("running")}
    return P, fixed


def check(function, gradient, P, *inputs):
    """`function(*inputs, P)` -> array, `gradient(dy, *inputs, P)` -> (a gradient for each input, a dict of them)."""

    def split(values):
        return values[: len(inputs)], dict(zip(P, values[len(inputs) :], strict=True))

    def forward(*values):
        given, named = split(values)
        return np.asarray(function(*given, named))

    def backward(dy, *values):
        given, named = split(values)
        *dinputs, grads = gradient(dy, *given, named)
        assert grads.keys() == P.keys()
        return *dinputs, *(grads[name] for name in P)

    report = check_gradient(forward, backward, *inputs, *P.values(), method="complex-step", directions=2)
    names = [*range(len(inputs)), *P]
    assert report.ok, [(key, part) for key, part in zip(names, report.inputs, strict=True) if part.verdict != "right"]


@by_kind
@pytest.mark.parametrize("name", ["conv1", "conv7", "conv9"])
def test_gradient_of_a_convolution(name, how, rng):
    (conv,) = (conv for conv in convpool.convolutions(TINY) if conv.name == name)
    P = convpool.init(dataclasses.replace(TINY, norm=how), rng)
    P, fixed = perturbed(convpool.part(P, name), rng)
    P["b"] = np.array([8.0, -8.0, 8.0, -8.0])[: conv.outputs]  # far from the leaky ReLU's branch, on both sides

    def function(x, P):
        return convpool.convolve(x, P | fixed, conv.padding, how)[0]

    def gradient(dy, x, P):
        return convpool.convolve_backward(dy, convpool.convolve(x, P | fixed, conv.padding, how)[1])

    check(function, gradient, P, rng.normal(size=(conv.inputs, 3, 4, 5)))


@by_kind
def test_gradient_of_the_dense_layer(how, rng):
    P = convpool.init(dataclasses.replace(TINY, norm=how), rng)
    P, fixed = perturbed({name: value for name, value in P.items() if name.startswith("dense")}, rng)

    def gradient(dy, x, P):
        return convpool.dense_backward(dy, convpool.dense(x, P | fixed, how)[1])

    check(lambda x, P: convpool.dense(x, P | fixed, how)[0], gradient, P, rng.normal(size=(5, 4)))


@by_kind
def test_gradient_of_the_whole_model(how, rng):
    config = dataclasses.replace(TINY, norm=how)
    P, fixed = perturbed(convpool.init(config, rng), rng)
    ends = np.cumsum([value.size for value in P.values()])
    batch = convpool.example_batch(config, rng)
    batch = batch._replace(x=batch.x.astype(float))

    def loss_and_gradients(vector):  # all parameters in one vector: a direction moves every one of them
        values = (part.reshape(P[name].shape) for name, part in zip(P, np.split(vector, ends[:-1]), strict=True))
        named = dict(zip(P, values, strict=True))
        return convpool.loss_and_gradients(named | fixed, batch, config, np.random.default_rng(0))

    def gradient(dy, vector):
        grads = loss_and_gradients(vector)[1]
        assert grads.keys() == P.keys()
        return dy * np.concatenate([grads[name].ravel() for name in P])

    vector = np.concatenate([value.ravel() for value in P.values()])
    report = check_gradient(
        lambda vector: np.asarray(loss_and_gradients(vector)[0]), gradient, vector, method="complex-step", directions=2
    )
    assert report.ok, report


def test_the_architecture_is_the_papers():
    config = convpool.SIZES["paper"]
    expected = [(96, 3, 3, 3), *[(96, 96, 3, 3)] * 2, (192, 96, 3, 3), *[(192, 192, 3, 3)] * 3, *[(192, 192, 1, 1)] * 2]
    P = convpool.init(config, np.random.default_rng(0))
    assert [P[f"conv{i}.W"].shape for i in range(1, 10)] == expected
    assert P["dense.W"].shape == (10, 192)
    image = np.random.default_rng(0).standard_normal((3, 1, 32, 32), np.float32)
    logits, (caches, average, _) = convpool.forward(P, image, config)
    assert [conv.name for conv, _, pool, _ in caches if pool is not None] == ["conv3", "conv6"]
    assert average == (192, 1, 6, 6)
    assert logits.shape == (1, 10)
    assert logits.dtype == np.float32


def test_the_kernels_and_the_separate_operations_agree(rng):
    batch, results = convpool.example_batch(TINY, rng), []
    for fused in (True, False):
        config = dataclasses.replace(TINY, norm=norms.Norm("layer", fused))
        P = convpool.init(config, np.random.default_rng(0))
        loss, grads, _ = convpool.loss_and_gradients(P, batch, config, np.random.default_rng(1))
        assert all(grad.dtype == np.float32 for grad in grads.values())
        results.append({"loss": loss, **grads})
    for name, value in results[0].items():
        np.testing.assert_allclose(value, results[1][name], rtol=1e-3, atol=1e-4, err_msg=name)


@by_kind
def test_it_learns_one_batch(how, rng):
    config = dataclasses.replace(TINY, norm=how, width=4, noise=0.0, dropout=0.0, learning_rate=0.01, steps=100)
    P, batch = convpool.init(config, rng), convpool.example_batch(config, rng)
    state = optim.adam_state(P)
    losses = [training.train_step(convpool, P, state, batch, config, None)[0] for _ in range(config.steps)]
    assert all(value.dtype == np.float32 for value in P.values())
    assert losses[-1] < 0.3 * losses[0]
    if how.kind == "batch":
        assert np.all(P["conv9.running"][0] != 0)


def test_noise_and_dropout_are_for_training_alone(rng):
    config = dataclasses.replace(TINY, norm=norms.Norm("none"))
    P, (x, _) = convpool.init(config, rng), convpool.example_batch(config, rng)
    quiet = dataclasses.replace(config, noise=0.0, dropout=0.0)
    expected = convpool.forward(P, x, config)[0]
    np.testing.assert_allclose(convpool.forward(P, x, quiet, rng)[0], expected, rtol=1e-4, atol=1e-5)
    for changed in ({"noise": 0.15}, {"dropout": 0.5}):
        logits, _ = convpool.forward(P, x, dataclasses.replace(quiet, **changed), rng)
        assert np.abs(logits - expected).max() > 1e-2 * np.abs(expected).max()


def test_evaluation_uses_batch_norms_running_statistics_and_leaves_them(rng):
    config = dataclasses.replace(TINY, norm=norms.Norm("batch"))
    P, batch = convpool.init(config, rng), convpool.example_batch(config, rng)
    for _ in range(3):
        convpool.loss_and_gradients(P, batch, config)
    before = P["conv1.running"].copy()
    together = convpool.evaluate(P, {"test": batch}, config, "test")
    alone = convpool.evaluate(P, {"test": batch}, dataclasses.replace(config, batch=1), "test")
    assert together == pytest.approx(alone, rel=1e-4)
    np.testing.assert_array_equal(P["conv1.running"], before)


def test_the_parts_of_the_data_are_apart_and_normalised():
    loaded, _ = convpool.load(convpool.SIZES["small"])
    assert {name: part.x.shape for name, part in loaded.items()} == {
        "train": (1, 9000, 28, 28),
        "validation": (1, 1000, 28, 28),
        "test": (1, 2000, 28, 28),
    }
    assert all(part.x.dtype == np.float32 and len(part.y) == part.x.shape[1] for part in loaded.values())
    assert abs(loaded["train"].x.mean()) < 1e-3
    assert loaded["train"].x.std() == pytest.approx(1, abs=1e-3)
    seen = {image.tobytes() for image in loaded["train"].x[0]}
    assert sum(image.tobytes() in seen for image in loaded["test"].x[0]) == 0


def test_an_epoch_has_every_image_once_beside_its_class(rng):
    x = np.arange(250.0).reshape(1, 250, 1, 1)
    epoch = list(convpool.batches({"train": convpool.Images(x, np.arange(250))}, TINY, rng))
    assert [len(batch.y) for batch in epoch] == [3] * 83 + [1]
    labels = np.concatenate([batch.y for batch in epoch])
    assert sorted(labels) == list(range(250)) != labels.tolist()
    np.testing.assert_array_equal(np.concatenate([batch.x[0, :, 0, 0] for batch in epoch]), labels)


def test_the_learning_rate_falls_linearly_from_the_middle_on():
    config = convpool.Config(steps=100, learning_rate=1.0)
    rates = [convpool.learning_rate(config, step) for step in range(1, 101)]
    assert rates[:51] == [1.0] * 51
    np.testing.assert_allclose(rates[50:], np.arange(50, 0, -1) / 50)
