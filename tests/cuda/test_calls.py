"""Calls of the CUDA engine by its public functions: `out`, axes and layouts, no rows, errors."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from bounds import ULP, exact_forward
from device import pretend_small, to_device, to_host, view_of
from tolerances import worst_ulp

import rmsnorm_np as rn


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    pretend_small(monkeypatch)


@pytest.fixture
def rng():
    return np.random.default_rng(4)


@pytest.mark.parametrize("n", [40, 520])
def test_out(n, rng):
    """Into x itself, into dy itself, into memory that overlaps x elsewhere, and into a strided array."""
    x, dy = rng.standard_normal((2, 4, n)).astype(np.float32)
    expected = to_host(rn.layer_norm(to_device(x), backend="cuda"))
    device = to_device(x)
    assert rn.layer_norm(device, out=device, backend="cuda") is device
    assert to_host(device).tobytes() == expected.tobytes()

    room = to_device(np.concatenate([x, x[:1]]))
    first, second = (view_of(room[i:], (4, n), (4 * n, 4), np.float32) for i in (0, 1))
    rn.layer_norm(first, out=second, backend="cuda")
    assert to_host(second).tobytes() == expected.tobytes()

    wide = to_device(np.zeros((4, 2 * n), np.float32))
    strided = view_of(wide, (4, n), (8 * n, 8), np.float32)
    assert rn.layer_norm(to_device(x), out=strided, backend="cuda") is strided
    assert to_host(strided).tobytes() == expected.tobytes()

    expected = to_host(rn.layer_norm_backward(*map(to_device, (dy, x)), backend="cuda").dx)
    device = to_device(dy)
    assert rn.layer_norm_backward(device, to_device(x), out=device, backend="cuda").dx is device
    assert to_host(device).tobytes() == expected.tobytes()


def test_axes_and_layouts(rng):
    x = rng.standard_normal((3, 4, 5))
    device = to_device(x)
    for axis in (0, 1, (0, 2), (1, 2)):
        shape = [x.shape[i] for i in (axis if isinstance(axis, tuple) else (axis,))]
        weight = rng.standard_normal(shape)
        y = to_host(rn.rms_norm(device, to_device(weight), axis=axis, backend="cuda"))
        assert worst_ulp(y, rn.reference.rms_norm(x, weight, axis=axis)) <= ULP["float64"] + 0.5  # it is rounded, too
    backwards = device[::-1, ::-1, ::-1]
    flat = x[::-1, ::-1, ::-1].reshape(12, 5)
    y = to_host(rn.layer_norm(backwards, backend="cuda")).reshape(12, 5)
    assert worst_ulp(y, *exact_forward("layer", flat, None, None, 5, 1e-6, 0.0)) <= ULP["float64"]


def test_no_rows():
    x, weight = to_device(np.zeros((0, 6), np.float32)), to_device(np.ones(6, np.float32))
    assert to_host(rn.rms_norm(x, weight, backend="cuda")).shape == (0, 6)
    grads = rn.rms_norm_backward(x, x, weight, weight, backend="cuda")
    assert to_host(grads.dx).shape == (0, 6)
    assert (to_host(grads.dweight) == 0).all()
    assert (to_host(grads.dbias) == 0).all()


def test_errors():
    device = to_device(np.ones((2, 4), np.float32))
    with pytest.raises(TypeError, match=r"x is a host array .* numba.cuda.to_device"):
        rn.rms_norm(np.ones(4, np.float32), backend="cuda")
    with pytest.raises(TypeError, match=r"weight is a host array \(ndarray\), expected a device array like x"):
        rn.rms_norm(device, np.ones(4, np.float32), backend="cuda")
    with pytest.raises(
        ValueError, match=r"weight has shape \(3,\), expected \(4,\), the axes \(1,\) of x.shape \(2, 4\)"
    ):
        rn.rms_norm(device, to_device(np.ones(3, np.float32)), backend="cuda")
    with pytest.raises(TypeError, match="x has dtype int64"):
        rn.rms_norm(to_device(np.ones((2, 4), np.int64)), backend="cuda")
    with pytest.raises(TypeError, match="out has dtype float64, expected float32"):
        rn.rms_norm(device, out=to_device(np.ones((2, 4))), backend="cuda")


def test_out_of_all_gradients(rng):
    x, dy = rng.standard_normal((2, 4, 6)).astype(np.float32)
    weight, bias = rng.standard_normal((2, 6)).astype(np.float32)
    given = tuple(map(to_device, (dy, x, weight, bias)))
    want = rn.rms_norm_backward(*given, backend="cuda")
    outs = tuple(to_device(np.zeros_like(a)) for a in (x, weight, bias))
    grads = rn.rms_norm_backward(*given, out=outs, backend="cuda")
    for got, out, exact in zip(grads, outs, want, strict=True):
        assert got is out
        assert to_host(got).tobytes() == to_host(exact).tobytes()
    some = rn.rms_norm_backward(*given, out=(None, outs[1], None), backend="cuda")
    assert some.dweight is outs[1]
    assert to_host(some.dx).tobytes() == to_host(want.dx).tobytes()
    with pytest.raises(ValueError, match=r"^out\[1\] \(dweight\) and out\[2\] \(dbias\) share memory"):
        rn.rms_norm_backward(*given, out=(None, outs[1], outs[1]), backend="cuda")
    with pytest.raises(ValueError, match=r"^out\[1\] \(dweight\) is given, expected None without a weight"):
        rn.rms_norm_backward(*given[:2], out=(None, outs[1], None), backend="cuda")
    with pytest.raises(ValueError, match=r"^out\[2\] \(dbias\) has shape \(4, 6\), expected bias.shape \(6,\)"):
        rn.rms_norm_backward(*given, out=(None, None, outs[0]), backend="cuda")
