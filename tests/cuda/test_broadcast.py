"""Weights and biases that broadcast against x, on the CUDA engine: as if they had been spread over x before."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from device import pretend_small, to_device, to_host

import rmsnorm_np as rn

CASES = [
    ((2, 3, 5), (2, 1, 5), (2, 1, 5)),
    ((2, 3, 5), (2, 1, 5), (5,)),
    ((2, 3, 5), (1, 5), (2, 1, 5)),
    ((2, 4, 3, 5), (4, 1, 5), (2, 4, 1, 5)),
    ((2, 4, 3, 5), (2, 1, 3, 5), None),
    ((2, 1, 3, 5), (2, 1, 1, 5), (2, 1, 3, 5)),  # no order of the rows suits both
    ((2, 3, 5), (2, 1, 5), (3, 5)),
]


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    pretend_small(monkeypatch)


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def device(a):
    return None if a is None else to_device(a)


@pytest.mark.parametrize(("shape", "weight_shape", "bias_shape"), CASES, ids=str)
def test_forward_and_backward(shape, weight_shape, bias_shape, rng):
    x, dy = rng.standard_normal((2, *shape))
    weight, bias = (None if s is None else rng.standard_normal(s) for s in (weight_shape, bias_shape))
    wide = [None if a is None else np.broadcast_to(a, shape).copy() for a in (weight, bias)]
    y = to_host(rn.rms_norm(*map(device, (x, weight, bias)), backend="cuda"))
    assert np.array_equal(y, to_host(rn.rms_norm(*map(device, (x, *wide)), backend="cuda")))
    grads = rn.rms_norm_backward(*map(device, (dy, x, weight, bias)), backend="cuda")
    want = rn.reference.rms_norm_backward(dy, x, weight, bias)
    np.testing.assert_allclose(to_host(grads.dx), want.dx, rtol=1e-13, atol=1e-14)
    for got, exact in zip(grads[1:], want[1:], strict=True):
        if exact is not None:
            assert got.shape == exact.shape
            np.testing.assert_allclose(to_host(got), exact, rtol=1e-13, atol=1e-14)


def test_out(rng):
    x, weight = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 1, 5))
    want, place = to_host(rn.rms_norm(*map(to_device, (x, weight)), backend="cuda")), to_device(x)
    assert rn.rms_norm(place, to_device(weight), out=place, backend="cuda") is place
    assert np.array_equal(to_host(place), want)
    place, dy, bias = to_device(x), to_device(x + 1), to_device(rng.standard_normal((3, 5)))
    want = rn.rms_norm_backward(dy, place, to_device(weight), bias, backend="cuda")
    got = rn.rms_norm_backward(dy, place, to_device(weight), bias, out=dy, backend="cuda")
    assert got.dx is dy
    for one, two in zip(got, want, strict=True):
        assert np.array_equal(to_host(one), to_host(two))


def test_a_weight_that_is_not_contiguous(rng):
    x, weight = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 2, 5))
    y = to_host(rn.rms_norm(to_device(x), to_device(weight)[:, :1], backend="cuda"))
    assert np.array_equal(y, to_host(rn.rms_norm(to_device(x), to_device(weight[:, :1].copy()), backend="cuda")))
    grads = rn.rms_norm_backward(to_device(x), to_device(x), to_device(weight)[:, :1], backend="cuda")
    assert grads.dweight.shape == (2, 1, 5)
