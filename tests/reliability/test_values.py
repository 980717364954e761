"""Every kind of number in every place: right where it stands, and without a trace in any other row or column."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from test_engines import OPS, Exact, call, k_of
from tolerances import DX_ULP, LONGDOUBLE_IS_WIDER, Y_ULP, ulp_distance

import rmsnorm_np as rn

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not LONGDOUBLE_IS_WIDER, reason="longdouble is float64 here: nothing to judge by"),
]

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
PATTERNS = np.arange(65536, dtype=np.uint16)


def assert_follows(op, x, weight, bias, dy, eps):
    """y and dx of each row, NaN where the formula has NaN and nowhere else; and the sign of zeros and infinities."""
    copies = [a.tobytes() for a in (x, weight, bias, dy)]
    with np.errstate(all="ignore"):
        exact = Exact(op, x, weight, bias, dy, eps, k_of(op, x.shape[1]))
    y, dx, *_ = call(op, x, weight, bias, dy, eps, "cpu")
    assert copies == [a.tobytes() for a in (x, weight, bias, dy)]
    for got, want, terms, bound in ((y, exact.y, exact.y_terms, Y_ULP), (dx, exact.dx, exact.dx_terms, DX_ULP)):
        with np.errstate(all="ignore"):
            wrong = ulp_distance(got, want, np.where(np.isfinite(terms), terms, 0.0)) > bound[x.dtype.name]
        if got is dx and x.dtype == np.float64:
            # Nothing wider to compute in: a number near the largest makes a sum of the row overflow that the formula
            # divides again, and a row with an infinity is not scaled, so its subnormal results are rounded twice.
            with np.errstate(all="ignore"):
                sizes = np.maximum(np.abs(x), np.abs(dy))
                wrong &= ~((sizes > 1e300) & np.isfinite(sizes)).any(axis=1, keepdims=True)
                wrong &= np.isfinite(sizes).all(axis=1, keepdims=True) | (ulp_distance(got, want) > 1.0)
        rows = np.flatnonzero(wrong.any(axis=1))[:3]
        assert not len(rows), f"{len(rows)} or more rows: x {x[rows]}, dy {dy[rows]}, got {got[rows]}, not {want[rows]}"


def ordinary(rng, shape, dtype):
    """x, weight, bias and dy of a magnitude from 0.5 to 1.5, of either sign."""
    return [
        (rng.uniform(0.5, 1.5, s) * rng.choice([-1.0, 1.0], s)).astype(dtype)
        for s in (shape, shape[-1:], shape[-1:], shape)
    ]


@pytest.mark.parametrize("place", ["in a vector", "behind the last vector", "in the whole row"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_half_as_x(op, dtype, place, rng):
    x, weight, bias, dy = ordinary(rng, (65536, 9), dtype)
    columns = {"in a vector": 2, "behind the last vector": 8, "in the whole row": slice(None)}[place]
    x.view(np.uint16)[:, columns] = PATTERNS[:, None] if place == "in the whole row" else PATTERNS
    assert_follows(op, x, weight, bias, dy, 1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_half_as_dy(op, dtype, rng):
    x, weight, bias, dy = ordinary(rng, (65536, 9), dtype)
    dy.view(np.uint16)[:, 2] = PATTERNS
    dy.view(np.uint16)[:, 8] = PATTERNS[::-1]
    assert_follows(op, x, weight, bias, dy, 1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_half_as_weight_and_as_bias(op, dtype, rng):
    """A column each; backward, a NaN among the weights makes all of dx NaN."""
    x, weight, bias, dy = ordinary(rng, (2, 65536), dtype)
    for parameter in (weight, bias):
        kept = parameter.copy()
        parameter.view(np.uint16)[:] = PATTERNS
        assert_follows(op, x, weight, bias, dy, 1e-6)
        parameter[:] = kept


def specials(dtype):
    """Zeros, infinities, NaN of several payloads, and finite numbers at the borders of the format; of either sign."""
    info = ml_dtypes.finfo(dtype)
    bits = np.dtype(f"u{dtype.itemsize}")
    infinity = int(np.array(np.inf, dtype).view(bits))
    lowest = infinity & -infinity  # bit of the exponent; those below are a payload, its upper half means "quiet"
    nans = [infinity + 1, infinity + lowest // 2, infinity + lowest - 1, 2**info.bits - 1]
    nans = np.array(nans, bits).view(dtype)
    numbers = [0.0, info.smallest_subnormal, info.smallest_normal, info.max, np.inf, 1.0]
    numbers = np.array([*numbers, *np.negative(numbers)], dtype)
    largest_subnormal = (np.array(info.smallest_normal, dtype).view(bits) - bits.type(1)).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs are numbers like any other here
        return np.concatenate([numbers, nans, [largest_subnormal, -largest_subnormal]]).astype(dtype)


ROWS_OF_PAIRS = 11
PATHS = ["in one piece", "past the cache", "cut into pieces"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """How the engine goes about a small array: as ever, or as if it were larger, or longer."""
    from rmsnorm_np.cpu import long_rows, memory, threads

    if request.param != "in one piece":
        monkeypatch.setattr(threads, "PARALLEL_ELEMENTS", 0)
        monkeypatch.setattr(memory, "streams", lambda y: 1)
    if request.param == "cut into pieces":
        monkeypatch.setattr(long_rows, "LONG_ROW", 0)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("op", OPS)
def test_two_special_values_in_a_row(op, dtype, eps, path, rng, request):
    """In x or in dy: inside and outside of the RMS of pRMSNorm, in a vector and behind the last one."""
    if op == "partial" and dtype.name == "float64":
        reason = "known: outside the RMS, x times rstd overflows before the weight makes it finite again"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    one, other = np.meshgrid(specials(dtype), specials(dtype))
    pairs = np.stack([one.ravel(), other.ravel()], axis=1)
    for places in ((1, 10), (10, 3), (5, 6)):
        for special in ("x", "dy"):
            x, weight, bias, dy = ordinary(rng, (len(pairs), ROWS_OF_PAIRS), dtype)
            (x if special == "x" else dy)[:, places] = pairs
            assert_follows(op, x, weight, bias, dy, eps)


@pytest.mark.parametrize("op", OPS)
def test_signalling_nans_are_silent(op, dtype, rng):
    """In each argument: NumPy warns when it converts one, and warnings are errors here."""
    arrays = ordinary(rng, (2, 9), dtype)
    for array in arrays:
        array[..., 4] = specials(dtype)[12]
        y = call(op, *arrays, 1e-6, "cpu")[0]
        assert np.isnan(y[:, 4].astype(np.float32)).all()


@pytest.mark.parametrize("op", ["rms", "layer"])
def test_an_infinity_without_a_bias(op, dtype, rng):
    """RMSNorm makes what stands beside it zero, LayerNorm NaN: what an error of zero is, must not be the result."""
    x, weight, _, _ = ordinary(rng, (1, 19), dtype)
    x[0, 3] = np.inf
    y = (rn.rms_norm(x, weight) if op == "rms" else rn.layer_norm(x, weight)).astype(np.float64)
    beside = np.delete(y, 3)
    assert np.isnan(y[0, 3])
    assert (beside == 0.0).all() if op == "rms" else np.isnan(beside).all()
