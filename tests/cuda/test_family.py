"""The operations made from the norms: with a gate, along a direction, double backward, of the L2 norm, rounded."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

import exact
from bounds import DGATE_ULP, DX_ULP, GATED_ULP, ULP, exact_forward, parameter_tolerance
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
SIZES = [  # the last ones are for a release: each compiles kernels for seconds
    ("float32", 1, None), ("float32", 7, 2), ("bfloat16", 1000, 300), ("float64", 7, 3),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("float32", 1000, None), ("bfloat16", 7, None), ("float64", 1000, None), ("float16", 40, None),
        )
    ),
]  # fmt: skip


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
    made = [None] * len(operation.Writes._fields)
    made[: len(dtypes)] = (np.zeros(arrays[0].shape, DTYPES[name]) for name in dtypes)
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
def test_rows_in_pieces(dtype, rng, monkeypatch):
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
FAR_SIZES = [("float32", 7), pytest.param("float32", 264, marks=pytest.mark.slow), ("bfloat16", 24), ("float64", 264)]


def scaled(rng, n, dtype, *sizes):
    """An ordinary row, then one of each size."""
    return (numbers(rng, (1 + len(sizes), n), np.float64) * np.array([1, *sizes], L)[:, None]).astype(dtype)


@pytest.mark.parametrize("op", JVP)
@pytest.mark.parametrize(("dtype", "n"), FAR_SIZES)
def test_along_a_direction_out_of_range(op, dtype, n, rng):
    """x far from 1, and its direction as far, so that what is computed is in the range, or of ordinary size."""
    large, small = FAR[dtype]
    dtype = DTYPES[dtype]
    x = scaled(rng, n, dtype, large, small, large, small)
    v = scaled(rng, n, dtype, large, small, 1.0, small * 1e4)
    dy = scaled(rng, n, dtype, large**0.5, small**0.5, 1.0, small)
    weight, along, shift = (numbers(rng, (1, n), dtype) for _ in range(3))
    check_along(op, x, v, dy, weight, along, shift, eps=0.0)
    check_along(op, x, v, dy, eps=0.0)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("dtype", "n"), FAR_SIZES)
def test_gated_out_of_range(norm_first, dtype, n, rng):
    """x, or what x becomes by its gate, is out of the range; so is dy."""
    large, small = FAR[dtype]
    dtype = DTYPES[dtype]
    x = scaled(rng, n, dtype, large, small, large, large**0.75, 1.0)
    gate = scaled(rng, n, dtype, 1.0, 1.0, small**0.75, large**0.75, large**0.25)
    dy = scaled(rng, n, dtype, large**0.5, small**0.5, 1.0, small**0.75, 1.0)
    weight, bias = numbers(rng, (1, n), dtype), numbers(rng, (1, n), dtype)
    check_gated(norm_first, x, gate, dy, weight, bias, eps=0.0)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gates_far_from_zero(norm_first, dtype, rng):
    """No exponential overflows; where silu vanishes beside others, nothing but zero is left."""
    dtype = DTYPES[dtype]
    x, dy = numbers(rng, (2, 6), dtype), numbers(rng, (2, 6), dtype)
    gate = np.array([[-1e4, 1e4, -85, 85, 0, -0.0], [-1e6, 1e6, -30, 30, 1e-30, -20]], dtype)
    check_gated(norm_first, x, gate, dy, eps=0.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_gates_closed(dtype, rng):
    """x · silu(gate) is as small as its square is not: in float32 such a row is computed in float64."""
    dtype = DTYPES[dtype]
    x, dy, weight = numbers(rng, (2, 6), dtype), numbers(rng, (2, 6), dtype), numbers(rng, (1, 6), dtype)
    gate = (rng.uniform(-1, 0, (2, 6)) * [[1], [20]] - [[0], [60 if dtype == np.float32 else 400]]).astype(dtype)
    check_gated(False, x, gate, dy, weight, eps=0.0)


def test_nan_stays_in_its_row(rng):
    x, v, dy = (numbers(rng, (4, 40), np.float32) for _ in range(3))
    columns = [numbers(rng, (1, 40), np.float32) for _ in range(3)]
    for operation in (*GATED.values(), *GATED_BACKWARD.values(), *JVP.values(), *DOUBLE.values()):
        for f, field in enumerate(operation.Reads._fields):
            arrays = [a.copy() for a in (x, v, dy)[: len(operation.Reads._fields)]]
            arrays[f][1, 3] = np.nan
            some = columns[: len(operation.Columns._fields) - 1]
            run = engine.forward if operation.share is None else engine.backward
            args = (*map(put, some), 0.0), [None] * len(operation.Writes._fields), 40, 1e-6
            found = run(operation, [put(a) for a in arrays], *args)
            found = found if operation.share is None else found[0]
            for output, name in zip(found, operation.Writes._fields, strict=True):
                reached = (field, name) != ("dy", "ddy")  # the one does not depend on the other
                rows = np.isnan(to_host(output)).any(axis=1).tolist()
                assert rows == [False, reached, False, False], (operation.name, field, name)


# ------------------------------------------------------------------------------------------- rounding, other outputs


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounded_xhat(norm, dtype, rng):
    """To the nearest number of x's dtype, of as many as make a second rounding felt."""
    n, name, dtype = 4096, dtype, DTYPES[dtype]
    x, weight, bias = numbers(rng, (8, n), dtype), numbers(rng, (1, n), dtype), numbers(rng, (1, n), dtype)
    operation = {"rms": rms.RMS_NORM, "layer": layer.LAYER_NORM}[norm]
    xhat = exact_forward(norm, x, None, None, n, 1e-6, 0.0)[0].astype(np.float64).astype(dtype)
    y = (seen("y", to_device(np.zeros(x.shape, np.float64))), None)
    rounding = rounding_xhat(operation, name)
    found = to_host(engine.forward(rounding, (put(x), None), (None, None, 0.0), y, n, 1e-6)[0])
    assert np.array_equal(found, xhat)
    found = to_host(engine.forward(rounding, (put(x), None), (None, None, 0.0), (None, None), n, 1e-6)[0])
    if name != "float32":  # computed in pairs of it, xhat is off by less than that from the exact one
        assert np.array_equal(found, xhat)
    scaled = found.astype(L) * weight.astype(L)
    want = [(scaled + bias.astype(L), np.maximum(np.abs(scaled), np.abs(bias.astype(L))))]
    check(rounding, (x, None), (weight, bias), want, [ULP], n)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param(
            x, y, marks=[pytest.mark.slow] * ((x, y) not in (("float32", "bfloat16"), ("bfloat16", "float64")))
        )
        for x in DTYPES
        for y in DTYPES
    ],
)
def test_outputs_of_another_dtype(x, y, rng):
    x, v, weight = (numbers(rng, (m, 24), DTYPES[x]) for m in (3, 3, 1))
    want = [exact_forward("layer", x, weight, None, 24, 1e-6, 0.0)]
    check(layer.LAYER_NORM, (x, None), (weight, None), want, [ULP], 24, dtypes=(y,))
    if x.dtype.name == "bfloat16":
        check(jvp.RMS_NORM_JVP, (x, v), (weight, None, None), exact.jvp("rms", x, v, weight, None, None, 24, 1e-6),
              [ULP], 24, dtypes=(y,))  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_l2_norm(dtype, rng):
    """The RMS norm of rows divided by a root of n, as is eps."""
    dtype, n = DTYPES[dtype], 40
    x, dy = scaled(rng, n, dtype, *FAR[dtype.name]), numbers(rng, (3, n), dtype)
    weight, bias = numbers(rng, (1, n), dtype), numbers(rng, (1, n), dtype)
    rstd = 1 / np.sqrt(np.sum(x.astype(L) ** 2, axis=1, keepdims=True))
    xhat = x.astype(L) * rstd
    scaled_ = xhat * weight
    want = [(scaled_ + bias, np.maximum(np.abs(scaled_), np.abs(bias.astype(L))))]
    check(l2.L2_NORM, (x, None), (weight, bias), want, [ULP], n, eps=0.0)
    g = dy.astype(L) * weight
    dx = (g - xhat * exact.total(g * xhat)) * rstd
    terms = exact.largest(g, xhat * exact.total(np.abs(g * xhat))) * rstd
    totals = [exact.sums(weight, dy * xhat), exact.sums(bias, dy.astype(L))]
    check(l2.L2_NORM_BACKWARD, (x, dy, None), (weight, bias), ([(dx, terms)], totals), [DX_ULP], n, eps=0.0)
