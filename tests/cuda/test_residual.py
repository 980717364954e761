"""The functions for a residual stream, by the facade, on executed PTX."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from bounds import ULP
from device import pretend, to_device, to_host
from tolerances import worst_ulp

import rmsnorm_np as rn


@pytest.fixture(autouse=True)
def device(monkeypatch):
    pretend(monkeypatch)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_residual_by_the_facade(norm, rng):
    x, residual, dy, dh = rng.standard_normal((4, 3, 40)).astype(np.float32)
    weight = rng.uniform(0.5, 1.5, 40).astype(np.float32)
    forward, backward = (getattr(rn, f"add_{norm}_norm{end}") for end in ("", "_backward"))
    y, h = forward(to_device(x), to_device(residual), to_device(weight), backend="cuda")
    want = getattr(rn.reference, f"add_{norm}_norm")(x, residual, weight)
    assert np.array_equal(to_host(h), want.h)
    assert worst_ulp(to_host(y), want.y) <= ULP["float32"] + 0.5
    stream = to_device(residual)
    assert forward(to_device(x), stream, to_device(weight), residual_out=stream, backend="cuda").h is stream
    assert np.array_equal(to_host(stream), want.h)
    grads = backward(to_device(dy), to_device(dh), h, to_device(weight), backend="cuda")
    exact = getattr(rn.reference, f"add_{norm}_norm_backward")(dy, dh, want.h, weight)
    assert worst_ulp(to_host(grads.dx), exact.dx, np.abs(exact.dx).max(axis=1, keepdims=True)) <= ULP["float32"] + 0.5
    assert np.allclose(to_host(grads.dweight), exact.dweight, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="share memory"):
        forward(to_device(x), stream, out=stream, residual_out=stream, backend="cuda")
    with pytest.raises(TypeError, match="residual is None"):
        forward(to_device(x), None, backend="cuda")
