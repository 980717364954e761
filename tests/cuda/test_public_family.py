"""The functions beside the norms by their public names, on device arrays: what arrives is what the reference gives."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from device import pretend_small, to_device, to_host
from tolerances import worst_ulp

import rmsnorm_np as rn
from rmsnorm_np.cuda import arguments, arrays

ULP = 8.5  # of the largest of each result: with a gate, see `test_family`; half for the reference
CALLS = {
    "l2_norm": lambda f, a, w: f(a[0], *w),
    "l2_norm_backward": lambda f, a, w: f(*a[:2], *w),
    "gated_rms_norm": lambda f, a, w: f(*a[:2], *w),
    "gated_rms_norm_backward": lambda f, a, w: f(*a, *w),
    "rms_norm_jvp": lambda f, a, w: f(a[0], *w, a[1], *w[::-1]),
    "layer_norm_jvp": lambda f, a, w: f(a[0], *w, a[1], *w[::-1]),
    "rms_norm_double_backward": lambda f, a, w: f(a[0], *w[::-1], *a[1:], *w),
    "layer_norm_double_backward": lambda f, a, w: f(a[0], *w[::-1], *a[1:], *w),
}


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    pretend_small(monkeypatch)


@pytest.mark.parametrize("name", CALLS)
def test_public_function(name):
    """x of three axes, one weight for each item of a batch: the rows are put in another order."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((3, 2, 3, 40)).astype(np.float32)
    parameters = rng.uniform(0.5, 1.5, (2, 2, 1, 40)).astype(np.float32)
    want = CALLS[name](getattr(rn.reference, name), list(rows), list(parameters))
    device = [to_device(a) for a in rows], [to_device(a) for a in parameters]
    got = CALLS[name](getattr(rn, name), *device)
    for one, exact in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
        one = to_host(one)
        assert (one.shape, one.dtype) == (exact.shape, exact.dtype)
        assert worst_ulp(one, exact, np.abs(exact).max()) <= ULP


def test_parameters_that_no_order_of_rows_suits():
    x = to_device(np.ones((2, 3, 5), np.float32))
    weight, bias = (to_device(np.ones(shape, np.float32)) for shape in ((2, 1, 5), (3, 5)))
    with pytest.raises(ValueError, match="broadcast along different axes"):
        rn.gated_rms_norm_backward(x, x, x, weight, bias)
    with pytest.raises(ValueError, match="broadcast along different axes"):
        rn.rms_norm_jvp(x, weight, bias, x, weight, bias)


def test_a_direction_that_lies_across_out_is_copied():
    """On a device it might be read after it was written to, for the rows that come later."""
    memory, weight = to_device(np.ones((6, 40), np.float32)), to_device(np.ones(40, np.float32))
    out, own = arrays.seen("out", memory), arrays.seen("weight_dot", memory[2])
    prepared = arrays.seen("weight", weight)._replace(shape=(1, 40))
    given = "weight_dot", memory[2], "weight", weight, prepared
    assert arguments.column(*given, (None,)).address == own.address
    copied = arguments.column(*given, (None, out))
    assert not arrays.overlaps(copied, out)
    assert (copied.shape, copied.dtype) == ((1, 40), np.float32)
