"""The operations made from the norms: with a gate, along a direction, double backward, of the L2 norm, rounded."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

import exact
from bounds import DGATE_ULP, DX_ULP, GATED_ULP, ULP, exact_backward, exact_forward, parameter_tolerance
from device import pretend, pretend_small, to_device, to_host
from tolerances import worst_ulp

from rmsnorm_np import cuda as engine
from rmsnorm_np.cuda.arrays import seen
from rmsnorm_np.ops import double, gated, jvp, l2, layer, rms, rounding_xhat

DTYPES = {name: np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name) for name in ULP}
GATED = {True: gated.NORM_FIRST, False: gated.GATE_FIRST}
GATED_BACKWARD = {True: gated.NORM_FIRST_BACKWARD, False: gated.GATE_FIRST_BACKWARD}
JVP = {"rms": jvp.RMS_NORM_JVP, "layer": jvp.LAYER_NORM_JVP}
DOUBLE = {"rms": double.RMS_NORM_DOUBLE_BACKWARD, "layer": double.LAYER_NORM_DOUBLE_BACKWARD}
L = np.longdouble
SIZES = [("float32", 1, None), ("float32", 7, None), ("float32", 7, 2), ("float32", 1000, None), ("bfloat16", 1000, 300),
         ("bfloat16", 7, None), ("float64", 1000, None), ("float64", 7, 3), ("float16", 40, None)]  # fmt: skip


@pytest.fixture(autouse=True)
def a_device(monkeypatch):
    pretend(monkeypatch)


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def numbers(rng, shape, dtype, size=1.0):
    return (rng.standard_normal(shape) * size).astype(dtype)


def put(a):
    return None if a is None else seen("array", to_device(a))


def check(operation, arrays, columns, want, bounds, k, eps=1e-6, offset=0.0, dtypes=()):
    """All results against (outputs, totals) in longdouble; each output within its bound."""
    made = [np.zeros(arrays[0].shape, DTYPES[name]) for name in dtypes] or [None] * len(operation.Writes._fields)
    args = [put(a) for a in arrays], (*(put(c) for c in columns), offset), [put(a) for a in made], k, eps
    totals = []
    if operation.share is None:
        outputs = engine.forward(operation, *args)
    else:
        outputs, totals = engine.backward(operation, *args)
    expected, sums = want if isinstance(want, tuple) else (want, [])
    for output, like, result, bound in zip(outputs, arrays, expected, bounds, strict=False):
        output = to_host(output)
        assert output.dtype.name == (dtypes[0] if dtypes else like.dtype.name)
        assert worst_ulp(output, *result) <= bound[output.dtype.name]
    work = np.result_type(*(np.float64 for a in (*arrays, *columns) if a is not None and a.itemsize == 8), np.float32)
    for total, parameter, sum_ in zip(totals, columns[:2], sums, strict=bool(sums)):
        assert (total is None) == (sum_ is None)
        if total is not None:
            total = to_host(total)
            assert (total.dtype, total.shape) == (parameter.dtype, parameter.shape)
            limit = parameter_tolerance(*sum_, len(arrays[0]), work, total.dtype, roundings=12)
            assert np.all(np.abs(total.astype(L) - sum_[0]) <= limit)


@np.errstate(all="ignore")
def check_gated(norm_first, x, gate, dy, weight=None, bias=None, k=None, eps=1e-6, offset=0.0):
    options, columns = (k or x.shape[1], eps, offset), (weight, bias)
    want = exact.gated(norm_first, x, gate, *columns, *options)
    check(GATED[norm_first], (x, gate), columns, want, [GATED_ULP], *options)
    want = exact.gated_backward(norm_first, x, gate, dy, *columns, *options)
    check(GATED_BACKWARD[norm_first], (x, gate, dy), columns, want, [GATED_ULP, DGATE_ULP], *options)


@np.errstate(all="ignore")
def check_along(op, x, v, dy, weight=None, along=None, shift=None, k=None, eps=1e-6, offset=0.0):
    """v: x_dot of one function, ddx of the other; along, shift: directions of weight and bias, likewise."""
    options, columns = (k or x.shape[1], eps, offset), (weight, along, shift)
    if v is not None or along is not None or shift is not None:
        check(JVP[op], (x, v), columns, exact.jvp(op, x, v, *columns, *options), [ULP], *options)
    if v is not None:
        want = exact.double_backward(op, x, dy, v, *columns, *options)
        check(DOUBLE[op], (x, dy, v), columns, want, [DX_ULP, ULP], *options)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("dtype", "n", "k"), SIZES)
def test_gated(norm_first, dtype, n, k, rng):
    """Weights of three rows, a bias of one."""
    dtype = DTYPES[dtype]
    x, dy = (numbers(rng, (6, n), dtype) for _ in range(2))
    weight, bias = numbers(rng, (3, n), dtype), numbers(rng, (1, n), dtype)
    check_gated(norm_first, x, numbers(rng, (6, n), dtype, 4), dy, weight, bias, k)


@pytest.mark.parametrize("op", JVP)
@pytest.mark.parametrize(("dtype", "n", "k"), SIZES)
def test_along_a_direction(op, dtype, n, k, rng):
    dtype = DTYPES[dtype]
    x, v, dy = (numbers(rng, (6, n), dtype) for _ in range(3))
    weight, along, shift = numbers(rng, (3, n), dtype), numbers(rng, (3, n), dtype), numbers(rng, (1, n), dtype)
    check_along(op, x, v, dy, weight, along, shift, k if op == "rms" else None)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("x", "other"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float64")])
def test_gated_of_mixed_dtypes(norm_first, x, other, rng):
    arrays = [numbers(rng, (4, 40), DTYPES[name]) for name in (x, other, x)]
    check_gated(norm_first, *arrays, numbers(rng, (2, 40), DTYPES[other]), numbers(rng, (4, 40), DTYPES[x]), offset=1.0)


@pytest.mark.parametrize("op", JVP)
def test_what_may_be_absent(op, rng):
    x, v, dy = (numbers(rng, (4, 12), np.float32) for _ in range(3))
    weight, along, shift = (numbers(rng, (m, 12), np.float32) for m in (2, 2, 4))
    check_along(op, x, v, dy)
    check_along(op, x, None, dy, weight, along, shift, offset=1.0)
    check_along(op, x, None, dy, None, None, shift)
    check_along(op, x, v, dy, None, along, offset=0.0)
    check_along(op, x, v, dy, weight, None, shift, offset=1.0)
    for norm_first in GATED:
        check_gated(norm_first, x, v, dy)
        check_gated(norm_first, x, v, dy, None, shift)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_pieces(dtype, rng, monkeypatch):
    pretend_small(monkeypatch)
    dtype = DTYPES[dtype]
    n = 2200 // dtype.itemsize
    x, v, dy = (numbers(rng, (4, n), dtype) for _ in range(3))
    weight, along, shift = numbers(rng, (2, n), dtype), numbers(rng, (2, n), dtype), numbers(rng, (1, n), dtype)
    for op in JVP:
        check_along(op, x, v, dy, weight, along, shift)
    for norm_first in GATED:
        check_gated(norm_first, x, v, dy, weight, shift, n // 3)


# ------------------------------------------------------------------------------------------------- rows out of range

FAR = {"float32": (1e37, 1e-40), "bfloat16": (1e37, 1e-40), "float64": (1e300, 1e-300)}


def scaled(rng, rows, n, dtype, sizes):
    """The first rows ordinary, then one of each size."""
    return numbers(rng, (rows, n), np.float64).astype(L) * np.array([1.0] * (rows - len(sizes)) + list(sizes), L)[:, None]


@pytest.mark.parametrize("op", JVP)
@pytest.mark.parametrize(("dtype", "n"), [("float32", 7), ("float32", 264), ("bfloat16", 24), ("float64", 7), ("float64", 264)])
def test_along_a_direction_out_of_range(op, dtype, n, rng):
    """x far from 1, and its direction as far, so that what is computed is in the range, or of ordinary size."""
    large, small = FAR[dtype]
    dtype = DTYPES[dtype]
    x = scaled(rng, 5, n, dtype, (large, small, large, small)).astype(dtype)
    v = scaled(rng, 5, n, dtype, (large, small, 1.0, small * 1e4)).astype(dtype)
    dy = scaled(rng, 5, n, dtype, (large**0.5, small**0.5, 1.0, small)).astype(dtype)
    weight, along, shift = (numbers(rng, (1, n), dtype) for _ in range(3))
    check_along(op, x, v, dy, weight, along, shift, eps=0.0)
    check_along(op, x, v, dy, eps=0.0)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("dtype", "n"), [("float32", 7), ("float32", 264), ("bfloat16", 24), ("float64", 7), ("float64", 264)])
def test_gated_out_of_range(norm_first, dtype, n, rng):
    """x, or what x becomes by its gate, is out of the range; so is dy."""
    large, small = FAR[dtype]
    dtype = DTYPES[dtype]
    x = scaled(rng, 6, n, dtype, (large, small, large, large**0.75, 1.0)).astype(dtype)
    gate = scaled(rng, 6, n, dtype, (1.0, 1.0, small, large**0.75, large**0.25)).astype(dtype)
    dy = scaled(rng, 6, n, dtype, (large**0.5, small**0.5, 1.0, small**0.75, 1.0)).astype(dtype)
    weight, bias = numbers(rng, (1, n), dtype), numbers(rng, (1, n), dtype)
    check_gated(norm_first, x, gate, dy, weight, bias, eps=0.0)
