"""The norms of a sum that is kept, and their gradients."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from tolerances import DX_ULP, Y_ULP, worst_ulp

import rmsnorm_np as rn
from rmsnorm_np import reference

NORMS = ["rms", "layer"]
L = np.longdouble
UNITS = {"float16": 2**13, "bfloat16": 2**16}  # ULP of these in ULP of float32
# x and residual: the same dtype, and a residual stream kept in a wider one
SAME = ["float32", "float64", "float16", "bfloat16"]
SAME_AND_LONG = [*((name, 130) for name in SAME), ("float32", 70_001)]
PAIRS = [*zip(SAME, SAME, strict=True), ("bfloat16", "float32"), ("float32", "float64"), ("float16", "bfloat16")]


def functions(norm, module=rn):
    return getattr(module, f"add_{norm}_norm"), getattr(module, f"add_{norm}_norm_backward")


def dtype_named(name):
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def arrays(rng, shape, x_dtype, residual_dtype):
    x, residual, dy, dh = rng.standard_normal((4, *shape))
    weight, bias = rng.uniform(0.5, 1.5, shape[-1]), rng.standard_normal(shape[-1])
    x_dtype, residual_dtype = map(dtype_named, (x_dtype, residual_dtype))
    wide = (residual.astype(residual_dtype), dh.astype(residual_dtype))
    return x.astype(x_dtype), wide[0], dy.astype(x_dtype), wide[1], weight.astype(x_dtype), bias.astype(x_dtype)


def _tiers(pair):
    """float16 has the path of bfloat16, and kernels of its own: for a release, but beside another dtype."""
    return [*[pytest.mark.engine] * (pair != ("float32",) * 2), *[pytest.mark.slow] * (pair == ("float16",) * 2)]


@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype"),
    [pytest.param(*pair, marks=_tiers(pair)) for pair in PAIRS],
)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(5, 37), (2, 3, 130), (1, 1)], ids=str)
def test_sum_norm_and_gradients(norm, x_dtype, residual_dtype, shape, rng):
    x, residual, dy, dh, weight, bias = arrays(rng, shape, x_dtype, residual_dtype)
    before = [a.tobytes() for a in (x, residual, dy, dh, weight, bias)]
    forward, backward = functions(norm)
    y, h = forward(x, residual, weight, bias, weight_offset=0.5)
    want = functions(norm, reference)[0](x, residual, weight, bias, weight_offset=0.5)
    assert (y.dtype, h.dtype) == (x.dtype, residual.dtype)
    assert h.tobytes() == want.h.tobytes()
    if x_dtype == residual_dtype:
        assert h.tobytes() == (x + residual).tobytes()
    # the reference is rounded itself
    scale = np.abs(want.y.astype(L)).max(axis=-1, keepdims=True)
    assert worst_ulp(y, want.y.astype(L), scale) <= Y_ULP[x_dtype] + 0.5
    for other in (dh, None):
        grads = backward(dy, other, h, weight, bias, weight_offset=0.5)
        want_grads = functions(norm, reference)[1](dy, other, h, weight, bias, weight_offset=0.5)
        assert grads.dx.dtype == residual.dtype
        scale = np.abs(want_grads.dx.astype(L)).max(axis=-1, keepdims=True) + np.abs(dh.astype(L)).max()
        assert worst_ulp(grads.dx, want_grads.dx.astype(L), scale) <= DX_ULP[residual_dtype] + 0.5
        for got, exact in zip(grads[1:], want_grads[1:], strict=True):
            unit = np.spacing(np.abs(exact.astype(np.float32)).max()) * {"float16": 2**13, "bfloat16": 2**16}.get(
                x_dtype, 1
            )
            assert np.max(np.abs(got.astype(L) - exact.astype(L))) <= unit
    assert before == [a.tobytes() for a in (x, residual, dy, dh, weight, bias)]


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_the_norm_of_the_sum(norm, rng):
    """Bit by bit: h is all that the backward pass needs."""
    x, residual, dy, _, weight, bias = arrays(rng, (70, 64), "float32", "float32")
    y, h = functions(norm)[0](x, residual, weight, bias)
    assert np.array_equal(y, getattr(rn, f"{norm}_norm")(h, weight, bias))
    grads = functions(norm)[1](dy, None, h, weight, bias)
    for got, want in zip(grads, getattr(rn, f"{norm}_norm_backward")(dy, h, weight, bias), strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("norm", NORMS)
def test_in_place(norm, rng):
    x, residual, dy, dh, weight, _ = arrays(rng, (30, 100), "float32", "float32")
    y, h = functions(norm)[0](x, residual, weight)
    for out, residual_out in (("x", "residual"), ("residual", "x"), ("x", None), (None, "x"), (None, "residual")):
        own = {"x": x.copy(), "residual": residual.copy(), None: None}
        got = functions(norm)[0](own["x"], own["residual"], weight, out=own[out], residual_out=own[residual_out])
        assert np.array_equal(got.y, y)
        assert np.array_equal(got.h, h)
        assert out is None or got.y is own[out]
        assert residual_out is None or got.h is own[residual_out]
    want = functions(norm)[1](dy, dh, h, weight).dx
    for name in ("dy", "dh", "h"):
        own = {"dy": dy.copy(), "dh": dh.copy(), "h": h.copy()}
        assert np.array_equal(functions(norm)[1](*own.values(), weight, out=own[name]).dx, want)


@pytest.mark.engine
@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("norm", NORMS)
def test_rows_out_of_range(norm, scale, rng):
    x, residual, dy, dh, weight, bias = arrays(rng, (4, 50), "float64", "float64")
    x[1::2] *= scale
    residual[1::2] *= scale
    dh[1::2] /= scale
    y, h = functions(norm)[0](x, residual, weight, bias, eps=0.0)
    want = functions(norm, reference)[0](x, residual, weight, bias, eps=0.0)
    assert worst_ulp(y, want.y.astype(L), np.abs(want.y).max(axis=1, keepdims=True)) <= 1.5
    got = functions(norm)[1](dy, dh, h, weight, bias, eps=0.0)
    want = functions(norm, reference)[1](dy, dh, h, weight, bias, eps=0.0)
    assert worst_ulp(got.dx, want.dx.astype(L), np.abs(want.dx).max(axis=1, keepdims=True)) <= 1.5


@pytest.mark.parametrize(
    ("dtype", "n"),
    [("float32", 37), *(pytest.param(*case, marks=pytest.mark.engine) for case in SAME_AND_LONG)],
)
def test_a_part_of_each_row(dtype, n, rng):
    """Elements that are not in the RMS are in the sum all the same: h was written only where sums are taken."""
    x, residual, dy, dh, weight, _ = arrays(rng, (3, n), dtype, dtype)
    junk = np.full_like(residual, 7)
    y, h = rn.add_rms_norm(x, residual, weight, p=0.3, residual_out=junk)
    assert h is junk
    assert h.tobytes() == (x + residual).tobytes()
    assert y.tobytes() == rn.rms_norm(h, weight, p=0.3).tobytes()
    stream = residual.copy()
    again = rn.add_rms_norm(x, stream, weight, p=0.3, residual_out=stream)
    assert (again.y.tobytes(), stream.tobytes()) == (y.tobytes(), h.tobytes())
    dx = rn.add_rms_norm_backward(dy, dh, h, weight, p=0.3).dx
    want = reference.add_rms_norm_backward(dy, dh, h, weight, p=0.3).dx.astype(L)
    assert worst_ulp(dx, want, np.abs(want).max(axis=-1, keepdims=True) + np.abs(dh.astype(L)).max()) <= 1.0


@pytest.mark.engine
@pytest.mark.parametrize("residual_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_result_wider_than_the_residual(norm, residual_dtype, rng):
    """y of float64 has its bound also where h has fewer digits; there no more than float64 was computed in."""
    x, residual, _, _, weight, _ = arrays(rng, (300, 129), "float64", residual_dtype)
    y, h = functions(norm)[0](x, residual, weight)
    exact = h.astype(L)
    exact = exact - exact.mean(axis=1, keepdims=True) if norm == "layer" else exact
    exact = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + L(1e-6)) * weight.astype(L)
    scale = np.maximum(np.abs(exact), 0.01)  # next to the mean, `exact` is rounded itself
    assert worst_ulp(y, exact, scale) <= Y_ULP["float64"]


@pytest.mark.engine
@pytest.mark.parametrize("norm", NORMS)
def test_dh_counts_beside_a_row_of_another_scale(norm):
    """A row out of range is scaled, dh is not: 1.2345 was lost beside a gradient of 1e227."""
    h, dy = np.array([[1e-28, -1e-28, 1e-28, -1e-28, 0, 0]]), np.array([[1e300, -1e300, 1e300, 1e300, 0, 0]])
    dh = np.array([[0, 0, 0, 0, 0, 1.2345]])
    weight = np.full(6, 1e-100)
    dx = functions(norm)[1](dy, dh, h, weight, eps=0.0).dx
    alone = functions(norm)[1](dy, None, h, weight, eps=0.0).dx
    assert np.array_equal(dx, alone + dh)
    assert np.isfinite(alone).all()


@pytest.mark.engine
@pytest.mark.parametrize("norm", NORMS)
def test_a_constant_x_does_not_make_the_row_trivial(norm, rng):
    """Whether a row is constant, and need not be brought into the range, is asked of the sum."""
    x, residual = np.zeros((1, 50)), 1e-320 * rng.standard_normal((1, 50))
    one = {"rms": rn.rms_norm, "layer": rn.layer_norm}[norm]
    assert np.array_equal(functions(norm)[0](x, residual, eps=1e-30).y, one(residual, eps=1e-30))


@pytest.mark.parametrize("norm", NORMS)
def test_errors(norm, backend):
    forward, backward = functions(norm)
    x = np.ones((3, 4))
    with pytest.raises(TypeError, match=r"residual is None, expected an array"):
        forward(x, None, backend=backend)
    with pytest.raises(ValueError, match=r"residual has shape \(4,\), expected x.shape \(3, 4\)"):
        forward(x, np.ones(4), backend=backend)
    out = np.empty((3, 4))
    with pytest.raises(ValueError, match=r"out and residual_out share memory"):
        forward(x, x, out=out, residual_out=out, backend=backend)
    with pytest.raises(ValueError, match=r"residual_out has shape"):
        forward(x, x, residual_out=np.empty(4), backend=backend)
    with pytest.raises(TypeError, match=r"residual_out has dtype float32, expected float64"):
        forward(x, x, residual_out=np.empty((3, 4), np.float32), backend=backend)
    with pytest.raises(ValueError, match=r"dh has shape \(4,\), expected h.shape \(3, 4\)"):
        backward(x, np.ones(4), x, backend=backend)
    with pytest.raises(TypeError, match=r"dy is None"):
        backward(None, None, x, backend=backend)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("direction", [0, 1])
def test_the_reference_has_the_same_signatures(norm, direction):
    public, readable = functions(norm)[direction], functions(norm, reference)[direction]
    assert inspect.signature(public) == inspect.signature(readable)


def test_a_read_only_residual_out_is_refused():
    x, h = np.ones((2, 6), np.float32), np.zeros((2, 6), np.float32)
    h.flags.writeable = False
    with pytest.raises(ValueError, match="residual_out is read-only, expected a writable array"):
        rn.add_rms_norm(x, x, residual_out=h)
    assert not h.any()
