"""The invariances that the paper derives, on one linear layer + norm + tanh + squared loss with a backward by hand.

Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, section 4 and eq. 8 to 10. All of it in
float64 with eps = 0, where the laws are exact. A layer without a norm runs through the same code and must break each
law: else the test would pass for a reason of its own.
"""

from __future__ import annotations

import numpy as np
import pytest
from paper import DELTAS, SAME, Layer, N, inputs, target

import rmsnorm_np as rn
from rmsnorm_np.gradcheck import check_gradient

# Two float64 computations of one number that differ in some hundred roundings of 1e-16. The control is off by more
# than a tenth of the number, twelve orders of magnitude more than SAME.
DIFFERENT = 0.1


def distance(actual, expected):
    """Largest difference, relative to the largest number on either side."""
    return np.max(np.abs(actual - expected)) / max(np.max(np.abs(actual)), np.max(np.abs(expected)))


def scaling_of_x(layer, delta):
    """Law 1: x -> δx leaves dW, dg and db alone; dx scales by 1/δ."""
    x, W, g, b = inputs()
    before, after = layer.gradients(x, W, g, b), layer.gradients(delta * x, W, g, b)
    yield "dx", after.dx, before.dx / delta
    yield "dW", after.dw, before.dw
    yield "dg", after.dg, before.dg
    yield "db", after.db, before.db


def scaling_of_w(layer, delta):
    """Law 2: W -> δW leaves dx, dg and db alone; dW scales by 1/δ, which is the implicit learning-rate adaptation."""
    x, W, g, b = inputs()
    before, after = layer.gradients(x, W, g, b), layer.gradients(x, delta * W, g, b)
    yield "dx", after.dx, before.dx
    yield "dW", after.dw, before.dw / delta
    yield "dg", after.dg, before.dg
    yield "db", after.db, before.db


def scaling_of_r(layer, delta):
    """Law 3, first half: R' = R/δ (eq. 10)."""
    x, W, _, _ = inputs()
    a = W @ x[0]
    yield "R", layer.matrix(delta * a), layer.matrix(a) / delta


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("law", [scaling_of_x, scaling_of_w, scaling_of_r])
@pytest.mark.parametrize("norm", ["RMSNorm", "pRMSNorm", "LayerNorm"])
def test_law_of_scaling(norm, law, delta, backend):
    for name, actual, expected in law(Layer(norm, backend), delta):
        assert distance(actual, expected) < SAME, name


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("law", [scaling_of_x, scaling_of_w, scaling_of_r])
def test_without_a_norm_the_law_of_scaling_is_broken(law, delta):
    for name, actual, expected in law(Layer("none", None), delta):
        assert distance(actual, expected) > DIFFERENT, name


def projections(layer):
    """Laws 3 and 4: what must be zero, over what it would be if nothing cancelled."""
    x, W, g, b = inputs()
    a = W @ x[0]
    along_a = a @ layer.matrix(a)  # aᵀ R, the gradient's part along a; for p = 1, R is symmetric and this is R·a
    yield "R·a", np.max(np.abs(along_a)) / np.max(np.abs(a) @ np.abs(layer.matrix(a)))
    gradients = layer.gradients(x, W, g, b)
    yield "<W, dW>", abs(np.sum(W * gradients.dw)) / np.sum(np.abs(W * gradients.dw))


@pytest.mark.parametrize("norm", ["RMSNorm", "pRMSNorm", "LayerNorm"])
def test_law_of_projection(norm, backend):
    for name, remains in projections(Layer(norm, backend)):
        assert remains < SAME, name


def test_without_a_norm_the_law_of_projection_is_broken():
    for name, remains in projections(Layer("none", None)):
        assert remains > DIFFERENT, name


def growth(layer, lr):
    """What a gradient step adds to ‖W‖², and what it adds if the step is at right angles to W."""
    x, W, g, b = inputs()
    dW = layer.gradients(x, W, g, b).dw
    return np.sum((W - lr * dW) ** 2) - np.sum(W**2), lr**2 * np.sum(dW**2)


@pytest.mark.parametrize("norm", ["RMSNorm", "pRMSNorm", "LayerNorm"])
def test_law_of_growth(norm, backend):
    """Law 4: a step grows ‖W‖² by exactly lr² ‖dW‖²."""
    for lr in (0.1, 1.0):
        grown, expected = growth(Layer(norm, backend), lr)
        assert distance(grown, expected) < 100 * SAME  # the difference of two sums up to 100 times as large


def test_without_a_norm_the_law_of_growth_is_broken():
    for lr in (0.1, 1.0):
        assert distance(*growth(Layer("none", None), lr)) > DIFFERENT


def test_the_matrix_is_that_of_eq_9(backend):
    x, W, _, _ = inputs()
    a = W @ x[0]
    rms = np.sqrt(np.mean(a**2))
    expected = (np.eye(N) - np.outer(a, a) / (N * rms**2)) / rms
    assert distance(Layer("RMSNorm", backend).matrix(a), expected) < SAME


def test_parameter_gradients_are_eq_8(backend):
    x, W, g, b = inputs()
    a = x @ W.T
    dv = target()
    grads = rn.rms_norm_backward(dv, a, g, b, eps=0.0, backend=backend)
    assert distance(grads.dweight, np.sum(dv * a / np.sqrt(np.mean(a**2, axis=-1, keepdims=True)), axis=0)) < SAME
    assert distance(grads.dbias, np.sum(dv, axis=0)) < SAME


def test_mean_zero_rows_law_6(backend):
    """RMSNorm is LayerNorm where the mean is zero, in value and in the gradient's part without a mean."""
    x, W, g, b = inputs()
    a = x @ W.T
    centred = a - np.mean(a, axis=-1, keepdims=True)
    rms, layer = (f(centred, g, b, eps=0.0, backend=backend) for f in (rn.rms_norm, rn.layer_norm))
    assert distance(rms, layer) < SAME
    assert distance(*(f(a, g, b, eps=0.0, backend=backend) for f in (rn.rms_norm, rn.layer_norm))) > DIFFERENT

    dv = target()
    d_rms = rn.rms_norm_backward(dv, centred, g, b, eps=0.0, backend=backend)
    d_layer = rn.layer_norm_backward(dv, centred, g, b, eps=0.0, backend=backend)
    assert distance(d_rms.dx - np.mean(d_rms.dx, axis=-1, keepdims=True), d_layer.dx) < SAME
    assert distance(d_rms.dweight, d_layer.dweight) < SAME


def test_a_shift_law_6(backend):
    x, W, g, b = inputs()
    a = x @ W.T
    for shift in (-3.0, 0.5, 10.0):
        shifted, unshifted = (rn.layer_norm(v, g, b, eps=0.0, backend=backend) for v in (a + shift, a))
        assert distance(shifted, unshifted) < 10 * SAME  # a + shift has lost a digit of a
        shifted, unshifted = (rn.rms_norm(v, g, b, eps=0.0, backend=backend) for v in (a + shift, a))
        assert distance(shifted, unshifted) > DIFFERENT


@pytest.mark.parametrize("norm", ["RMSNorm", "pRMSNorm", "LayerNorm", "none"])
def test_the_backward_by_hand_is_the_gradient_of_the_loss(norm, backend):
    """The laws speak of true gradients: a backward that is wrong in the same way on both sides would obey some."""
    layer = Layer(norm, backend)
    report = check_gradient(
        lambda *args: layer.loss(*args),
        lambda dy, *args: [dy * gradient for gradient in layer.gradients(*args)],
        *inputs(),
        method="finite-difference",
    )
    assert report.ok, report
