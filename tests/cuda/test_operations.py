"""`run` of the CUDA engine: residuals, gradients that come on another way; numbers that were once wrong."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from bounds import DX_ULP, ULP, exact_backward, exact_forward, parameter_tolerance
from device import EXECUTED, device, pretend, to_device, to_host
from tolerances import worst_ulp

from rmsnorm_np import cuda as engine
from rmsnorm_np.cuda.arrays import seen
from rmsnorm_np.ops.layer import LAYER_NORM, LAYER_NORM_BACKWARD
from rmsnorm_np.ops.operation import Columns, GradientReads, GradientWrites, Reads, Writes
from rmsnorm_np.ops.rms import RMS_NORM, RMS_NORM_BACKWARD

DTYPES = {name: np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name) for name in ULP}
FORWARD = {"rms": RMS_NORM, "layer": LAYER_NORM}
BACKWARD = {"rms": RMS_NORM_BACKWARD, "layer": LAYER_NORM_BACKWARD}
L = np.longdouble


@pytest.fixture(autouse=True)
def a_device(monkeypatch):
    pretend(monkeypatch)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def numbers(rng, shape, dtype, shift=0.0):
    return (rng.standard_normal(shape) + shift).astype(dtype)


def put(record):
    return type(record)(*(None if a is None else seen("array", to_device(a)) for a in record))


def run(operation, reads, columns, k, eps, out=None):
    out = out or (Writes(None) if operation.share is None else GradientWrites(None))
    columns = put(columns._replace(weight_offset=None))._replace(weight_offset=columns.weight_offset)
    writes, totals = engine.run(operation, put(reads), columns, out, k or reads[0].shape[1], eps)
    return [to_host(a) for a in writes], [to_host(a) for a in totals]


def check_forward(op, x, weight=None, bias=None, k=None, eps=1e-6, offset=0.0, residual=None):
    (y, h), totals = run(FORWARD[op], Reads(x, residual), Columns(weight, bias, offset), k, eps)
    assert totals == [None, None]
    assert (h is None) == (residual is None)
    if residual is not None:
        assert h.dtype == residual.dtype
        assert worst_ulp(h, x.astype(L) + residual.astype(L)) <= 0.5
    about = x if h is None else h
    assert y.dtype == x.dtype
    with np.errstate(all="ignore"):
        exact, magnitude = exact_forward(op, about, weight, bias, k or x.shape[1], eps, L(offset))
        assert worst_ulp(y, exact, magnitude) <= ULP[x.dtype.name]


def check_backward(op, x, dy, weight=None, bias=None, dh=None, **numbers):
    k, eps, offset = ({"k": None, "eps": 1e-6, "offset": 0.0} | numbers).values()
    (dx,), totals = run(BACKWARD[op], GradientReads(x, dy, dh), Columns(weight, bias, offset), k, eps)
    with np.errstate(all="ignore"):
        exact, magnitude, *sums = exact_backward(op, dy, x, weight, bias, k or x.shape[1], eps, L(offset))
        if dh is not None:
            exact, magnitude = exact + dh.astype(L), np.maximum(magnitude, np.abs(dh.astype(L)))
        assert dx.dtype == x.dtype
        assert worst_ulp(dx, exact, magnitude) <= DX_ULP[x.dtype.name]
        work = np.result_type(
            *(np.float64 for a in (x, dy, weight, bias) if a is not None and a.itemsize == 8), np.float32
        )
        for total, parameter, sum_ in zip(totals, (weight, bias), sums, strict=True):
            assert (total is None) == (parameter is None)
            if total is not None:
                assert (total.dtype, total.shape) == (parameter.dtype, parameter.shape)
                limit = parameter_tolerance(*sum_, len(x), work, parameter.dtype) + 2 * len(x) * L(5e-324)
                too_large = np.abs(sum_[0]) > L(ml_dtypes.finfo(total.dtype).max)
                assert np.all((np.abs(total.astype(L) - sum_[0]) <= limit) | (too_large & np.isinf(total)))


RESIDUALS = [
    ("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64"),
    ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float32", "float64"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("x", "residual", "n"),
    [(*kinds, n) for n in (24, 37, 1032) for kinds in RESIDUALS[: 3 if n == 1032 else None]],
)
def test_residual(x, residual, n, rng):
    op = "layer" if n == 37 else "rms"
    x, weight = numbers(rng, (3, n), DTYPES[x]), numbers(rng, (1, n), DTYPES[x])
    check_forward(op, x, weight, residual=numbers(rng, (3, n), DTYPES[residual]))


@pytest.mark.parametrize("n", [37, 1032])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_on_another_way(dtype, n, rng):
    op, dtype = "layer" if n == 37 else "rms", DTYPES[dtype]
    x, dy, dh = (numbers(rng, (3, n), dtype) for _ in range(3))
    check_backward(op, x, dy, numbers(rng, (1, n), dtype), dh=dh)


def test_kept_in_the_residual_itself(rng):
    """h takes the place of residual, and y that of x."""
    x, residual = numbers(rng, (5, 24), np.float32), numbers(rng, (5, 24), np.float32)
    a, b = (seen("array", to_device(v)) for v in (x, residual))
    writes, _ = engine.run(RMS_NORM, Reads(a, b), Columns(), Writes(a, b), 24, 1e-6)
    y, h = map(to_host, writes)
    np.testing.assert_array_equal(h, x + residual)
    assert worst_ulp(y, *exact_forward("rms", h, None, None, 24, 1e-6, 0)) <= ULP["float32"]


@pytest.mark.skipif(not EXECUTED, reason="counts the accesses of executed PTX")
@pytest.mark.parametrize(("op", "dtype", "n"), [("layer", "bfloat16", 4096), ("rms", "float32", 4096)])
def test_rows_are_fetched_once(op, dtype, n, rng):
    dtype = DTYPES[dtype]
    x, dy, weight = numbers(rng, (3, n), dtype), numbers(rng, (3, n), dtype), numbers(rng, (1, n), dtype)
    check_backward(op, x, dy, weight)
    name, machine = device.launched[0]
    assert name == "rows_backward"
    arrays = {a.ctypes.data: a.nbytes for a in device.memory[1:3]}  # x and dy, behind weight
    for address, size in arrays.items():
        assert machine.sectors["ld"][address] * 32 == size
    assert {size for kind, size in machine.accesses if kind == "ld"} == {16}


# ------------------------------------------------------------------------------ numbers that were wrong once, or nearly


@pytest.mark.parametrize("mean", [1e3, 1e6])
@pytest.mark.parametrize(("dtype", "n"), [("float32", 40), ("float64", 40), ("float64", 9000)])
def test_layer_norm_of_a_large_mean(dtype, n, mean, rng):
    x = numbers(rng, (2, n), DTYPES[dtype], mean)
    check_forward("layer", x, eps=0.0)
    check_backward("layer", x, numbers(rng, (2, n), DTYPES[dtype]), eps=0.0)


def row(values, dtype=np.float64):
    return np.array([values]).astype(dtype)


def test_constant_rows_near_the_end_of_the_range():
    check_backward("layer", row([1e200]), row([2.0]))
    for dtype in (np.float32, np.float64):
        x = row([np.finfo(dtype).max] * 2, dtype)
        check_forward("layer", x)
        check_backward("layer", x, row([1, 2], dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("op", FORWARD)
def test_subnormal_rows(op, dtype):
    dtype = DTYPES[dtype]
    x = row([1, 2, 2]) * float(ml_dtypes.finfo(dtype).smallest_subnormal)
    x = x.astype(dtype)
    for eps in (1e-12, 0.0) if op == "layer" else (1e-12,):
        check_forward(op, x, eps=eps)
        check_backward(op, x, row([1, 2, 4], dtype), row([1, 0.5, 3], dtype), eps=eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pieces_outside_a_partial_rms(dtype, rng):
    """Without eps, and with pieces that have no part in the RMS."""
    n = 8196 if dtype == np.float64 else 16500
    x, dy, weight = numbers(rng, (2, n), dtype), numbers(rng, (2, n), dtype), numbers(rng, (1, n), dtype)
    check_backward("rms", x, dy, weight, k=2458, eps=0.0)


@pytest.mark.parametrize(
    ("op", "dtype"), [("rms", "float32"), ("layer", "float32"), ("rms", "bfloat16"), ("rms", "float64")]
)
def test_weight_offset_that_cancels(op, dtype, rng):
    dtype = DTYPES[dtype]
    x, dy = numbers(rng, (3, 4), dtype, 3), numbers(rng, (3, 4), dtype)
    weight = row([-0.0999, -0.1, -0.10001, 2], dtype)
    check_forward(op, x, weight, offset=0.1)
    check_backward(op, x, dy, weight, offset=0.1)


@pytest.mark.parametrize("op", FORWARD)
def test_gradients_far_from_each_other(op):
    check_backward(op, row([1, 2]), row([1e308, 0]), row([4, 4]))
    check_backward(op, row([3e200, 2e200]), row([1e308, 1e-100]), row([4, 4]))
    check_backward(op, row([0, 0, 1e-200]), row([1e-250, 1e300, 1]), row([1, 1, 1]))
    for last in (0, 1e-20):
        check_backward(op, row([0, 0, last], np.float32), row([1e-25, 1e30, 1], np.float32), row([1, 1, 1], np.float32))


@pytest.mark.parametrize("n", [3, 264])
@pytest.mark.parametrize("op", FORWARD)
def test_running_sums_that_would_overflow(op, n, rng):
    x = numbers(rng, (3, n), np.float32)
    dy = np.repeat(np.float32([[3e38], [3e38], [-3e38]]), n, axis=1)
    ones = np.ones((1, n), np.float32)
    check_backward(op, x, dy, ones, ones)
