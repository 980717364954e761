"""Every engine, op and dtype against the exact value, at every border of the kernels; and the same bits everywhere.

The exact value is the formula in longdouble. It is computed here for whole arrays, and checked against the naive one of
`test_reference` there, through the reference.
"""

from __future__ import annotations

import contextlib
import math

import ml_dtypes
import numba
import numpy as np
import pytest
from conftest import BACKENDS, DTYPES
from tolerances import DX_ULP, LONGDOUBLE_IS_WIDER, Y_ULP, dx_terms, parameter_tolerance, worst_ulp

import rmsnorm_np as rn
from rmsnorm_np import _arguments

L = np.longdouble

pytestmark = pytest.mark.skipif(not LONGDOUBLE_IS_WIDER, reason="longdouble is float64 here: nothing to judge by")

# The CPU engine works in vectors of 8 numbers, 16 or 32 of 16-bit floats, and adds up to four side by side, cuts sums
# into segments of 2048, takes blocks of 4096 // n rows (halves: 8192 // n) but at most 64, has a path of its own for
# whole vectors up to 64 elements, splits the rows for dweight into parts of 16 or more, and goes parallel from 32768
# elements on.
N = [
    1,  # no lane but one; LayerNorm's variance is zero
    2, 3,  # fewer than a vector of any processor
    7, 8,  # below and at one vector of the engine: masked, full
    31, 32, 33,  # around four vectors, which are added side by side
    127,  # three times four vectors, three more, and all lanes but one of the last
    576,  # SmolLM2's width, whole vectors
    1000,  # rows that do not begin on a cache line
    4099,  # three segments, a prime: everything at once
]  # fmt: skip
ROWS = [
    0,  # nothing to do, dweight is zero
    1,  # one row
    2,  # the second row begins where the first ends
    63, 64, 65,  # around the largest block
    1000,  # many blocks, parts of unequal length, parallel
]  # fmt: skip

# The plain-Python twins of the vectors are slow: there, the shapes that still cross every border of a vector.
LARGEST = 600_000
SHAPES = [(rows, n) for rows in ROWS for n in N if rows * n <= LARGEST]

OPS = ["rms", "partial", "layer"]


def on_each_backend(name, values, size):
    """Parameters for the engines. The reference has no borders to cross: what is large there is for --slow."""
    return pytest.mark.parametrize(
        ("backend", name),
        [
            pytest.param(one, value, marks=[pytest.mark.slow] * (one == "reference" and size(value) > 40_000))
            for one in BACKENDS
            for value in values
        ],
        ids=str,
    )


def arrays(rng, shape, dtype):
    """x, weight, bias, dy, with a mean that LayerNorm has to take off."""
    x = (rng.standard_normal(shape) + 0.5).astype(dtype)
    weight, bias = (rng.standard_normal(shape[-1:]).astype(dtype) for _ in range(2))
    return x, weight, bias, rng.standard_normal(shape).astype(dtype)


class Exact:
    """Both norms and their gradients in longdouble, and the magnitudes of the terms that make them up."""

    def __init__(self, op, x, weight, bias, dy, eps, k):
        x, weight, bias, dy = (a.astype(L) for a in (x, weight, bias, dy))
        n = x.shape[1]
        mean_of = lambda a: a.sum(axis=1, keepdims=True) / n  # noqa: E731
        centred = op == "layer"
        if centred:
            x = x - mean_of(x)
            x = x - mean_of(x)  # the first mean was rounded
        rstd = 1 / np.sqrt((x[:, :k] ** 2).sum(axis=1, keepdims=True) / k + L(eps))
        xhat, g = x * rstd, dy * weight
        self.y = xhat * weight + bias
        self.y_terms = np.maximum(np.abs(xhat * weight), np.abs(bias))
        c = (g * xhat).sum(axis=1, keepdims=True) / k
        self.dx = rstd * (g - (mean_of(g) if centred else 0) - np.where(np.arange(n) < k, xhat * c, 0))
        self.dx_terms = dx_terms(g, xhat, rstd, k, centred=centred)
        self.weight_terms, self.bias_terms = dy * xhat, dy  # what dweight and dbias add up, of each row


def call(op, x, weight, bias, dy, eps, backend, **out):
    """y, dx, dweight, dbias."""
    if op == "layer":
        y = rn.layer_norm(x, weight, bias, eps=eps, backend=backend, **out)
        return y, *rn.layer_norm_backward(dy, x, weight, bias, eps=eps, backend=backend)
    p = 0.3 if op == "partial" else 1.0
    y = rn.rms_norm(x, weight, bias, eps=eps, p=p, backend=backend, **out)
    return y, *rn.rms_norm_backward(dy, x, weight, bias, eps=eps, p=p, backend=backend)


def k_of(op, n):
    return -(-3 * n // 10) if op == "partial" else n


def assert_exact(op, x, weight, bias, dy, eps, backend):
    """x and dy are (rows, n); row r has row r % m of a weight or bias of shape (m, n), as of one of shape (n,)."""
    name, n = x.dtype.name, x.shape[1]
    of_rows = [np.resize(parameter, x.shape) if len(x) else parameter for parameter in (weight, bias)]
    with np.errstate(all="ignore"):
        exact = Exact(op, x, *of_rows, dy, eps, k_of(op, n))
    shape = (-1, *max(weight.shape, bias.shape, key=len))
    x, dy = (a if weight.ndim == bias.ndim == 1 else a.reshape(shape) for a in (x, dy))
    y, dx, dweight, dbias = call(op, x, weight, bias, dy, eps, backend)
    assert worst_ulp(y.reshape(-1, n), exact.y, exact.y_terms) <= Y_ULP[name]
    assert worst_ulp(dx.reshape(-1, n), exact.dx, exact.dx_terms) <= DX_ULP[name]
    for got, parameter, terms in ((dweight, weight, exact.weight_terms), (dbias, bias, exact.bias_terms)):
        assert got.shape == parameter.shape
        added = terms.reshape(-1, *parameter.shape)
        want, size = added.sum(axis=0), np.abs(added).sum(axis=0)
        assert np.all(np.abs(got.astype(L) - want) <= parameter_tolerance(want, size, len(added), x.dtype, got.dtype))


@on_each_backend("shape", SHAPES, math.prod)
@pytest.mark.parametrize("op", OPS)
def test_engine_is_exact(op, shape, dtype, backend, rng):
    inputs = arrays(rng, shape, dtype)
    copies = [a.copy() for a in inputs]
    assert_exact(op, *inputs, 1e-6, backend)
    for before, after in zip(copies, inputs, strict=True):
        assert before.tobytes() == after.tobytes()


# x · scale, dy · dy_scale: rows at both ends of each type's range. Without eps, or with one of their size.
EXTREMES = [
    (np.float16, 1e4, 1.0, 0.0), (np.float16, 1e-6, 1e-6, 0.0),
    (ml_dtypes.bfloat16, 1e38, 1.0, 0.0), (ml_dtypes.bfloat16, 1e-38, 1e-35, 0.0),
    (ml_dtypes.bfloat16, 1e-39, 1e-35, 0.0),
    (np.float32, 1e38, 1.0, 0.0), (np.float32, 1e-40, 1e-36, 0.0), (np.float32, 1e-40, 1.0, 1e-6),
    (np.float64, 1e300, 1.0, 0.0), (np.float64, 1e307, 1e300, 0.0), (np.float64, 1e-300, 1e-280, 0.0),
    (np.float64, 1e-310, 1e-290, 0.0), (np.float64, 1e-200, 1e-170, 1e-300), (np.float64, 1.0, 1e-300, 1e-6),
]  # fmt: skip
EXTREMES = [pytest.param(*case, marks=[pytest.mark.engine] * (case[0] != np.float32)) for case in EXTREMES]


@pytest.mark.engine
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_plus_offset_is_not_rounded(op, backend, rng):
    """Rounded to float64, the sum would add half an ULP of its own to float64 results: 1.3 in all."""
    x, weight, bias, _ = arrays(rng, (5000, 6), np.float64)
    k = 2 if op == "partial" else 6
    xw = x.astype(L) - (x.astype(L).mean(axis=1, keepdims=True) if op == "layer" else 0)
    xhat = xw / np.sqrt((xw[:, :k] ** 2).mean(axis=1, keepdims=True) + L(0.01))
    term = xhat * (weight.astype(L) + 1)
    for b in (None, bias):
        options = {"eps": 0.01, "weight_offset": 1.0, "backend": backend}
        y = rn.layer_norm(x, weight, b, **options) if op == "layer" else rn.rms_norm(x, weight, b, p=k / 6, **options)
        shift = L(0) if b is None else b.astype(L)
        magnitude = np.maximum(np.abs(term), np.abs(shift))
        if op == "layer":  # x - mean is rounded where x is near its mean
            magnitude = np.maximum(magnitude, np.abs(weight.astype(L) + 1))
        assert worst_ulp(y, term + shift, magnitude) <= Y_ULP[y.dtype.name]


@on_each_backend("n", [7, 100, 5000, 70001], int)
@pytest.mark.parametrize(
    ("kind", "scale", "dy_scale", "eps"), EXTREMES, ids=lambda value: getattr(value, "__name__", str(value))
)
@pytest.mark.parametrize("op", OPS)
def test_rows_at_the_ends_of_the_range(op, kind, scale, dy_scale, eps, n, backend, rng):
    dtype = np.dtype(kind)
    x, weight, bias, dy = arrays(rng, (3, n), np.float64)
    # bounded, so that scale · x stays finite
    x, dy = np.clip(x, -1.7, 1.7) * scale, np.clip(dy, -1.7, 1.7) * dy_scale
    assert_exact(op, x.astype(dtype), weight.astype(dtype), bias.astype(dtype), dy.astype(dtype), eps, backend)


@pytest.mark.parametrize(
    ("scale", "dy_scale", "weight_scale"),
    [
        (1.0, 1e36, 1.0),  # dy times a product of others overflows
        (1e-12, 1e30, 1e-30),  # dy · rstd overflows, and weight makes it finite
        (1.0, 1e-39, 1.0),  # dy is subnormal
        (100.0, 1e-37, 1e6),  # dy · rstd is subnormal, and weight would make its error felt
        (1e12, 1e-30, 1.0),  # the same, and x in dweight
        (1e-12, 1e-4, 1.0),  # rstd² times the mean of products is large
        (5e5, 1e-33, 1.0),  # and small: subnormal
    ],
)
@pytest.mark.parametrize("n", [48, 70001])
@pytest.mark.parametrize("op", ["rms", "layer"])
@pytest.mark.engine
def test_gradients_where_float32_is_not_enough(op, n, scale, dy_scale, weight_scale, rng):
    """Gradients of bfloat16 are computed in float32 but for such rows, beside ordinary ones and alone."""
    dtype = np.dtype(ml_dtypes.bfloat16)
    x, weight, bias, dy = arrays(rng, (3, n), np.float64)
    x[1], dy[1], weight = x[1] * scale, dy[1] * dy_scale, weight * weight_scale
    x, weight, bias, dy = (a.astype(dtype) for a in (x, weight, bias, dy))
    assert_exact(op, x, weight, bias, dy, 1e-30, "cpu")
    assert_exact(op, x[1:2], weight, bias, dy[1:2], 1e-30, "cpu")


@pytest.mark.engine
@pytest.mark.parametrize("op", ["rms", "layer"])
def test_small_terms_of_dweight_beside_large_x(op, rng):
    """dy · rstd is subnormal in float32, and dweight, itself float32, shows it."""
    x, weight, bias, dy = arrays(rng, (1, 48), np.float64)
    dy[0, :24] *= 1e-28
    x, dy = (a.astype(ml_dtypes.bfloat16) for a in (x * 1e12, dy))
    assert_exact(op, x, weight.astype(np.float32), bias.astype(np.float32), dy, 0.0, "cpu")


@pytest.mark.engine
@pytest.mark.parametrize("op", ["rms", "layer"])
def test_results_of_halves_where_float32_is_not_enough(op):
    """xhat is subnormal and weight large; xhat · weight overflows, and bias brings it back; a NaN beside large dy."""
    half = lambda *numbers: np.array(numbers).astype(ml_dtypes.bfloat16)  # noqa: E731
    small, ones = np.array([[2.0**44, -(2.0**44)] + [1.5 * 2.0**-120] * 6]), np.ones(8)
    assert_exact(op, half(*small), half(*ones * 2.0**120), half(*ones), half(*small * 0), 0.0, "cpu")
    x = half([1.5, 0.1, 0.1, 1.0])
    y, *_ = call(op, x, half(*[3e38] * 4), half(*[-3e38] * 4), x, 0.0, "cpu")
    assert np.isfinite(y[0, 0])
    x, dy = half(*[[2.0**-44, -1.5 * 2.0**-44] * 8]), half(*[[np.nan] + [2.0**100] * 15])
    dweight = call(op, x, half(*[1.0] * 16), half(*[0.0] * 16), dy, 0.0, "cpu")[2]
    assert np.isnan(dweight[0])
    assert np.isfinite(dweight[1:]).all()


@pytest.mark.engine
@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("op", ["rms", "layer"])
def test_halves_with_weights_of_float64(op, kind, rng):
    x, weight, bias, dy = arrays(rng, (5, 40), np.float64)
    assert_exact(op, x.astype(kind), weight, bias, dy.astype(kind), 1e-6, "cpu")


@pytest.mark.engine
def test_an_offset_beyond_float32(rng):
    x = rng.standard_normal((2, 40)).astype(ml_dtypes.bfloat16)
    weight = np.ones(40, x.dtype)
    results = rn.rms_norm(x, weight, weight_offset=1e39), rn.layer_norm(x, weight, weight_offset=1e39)
    dx = rn.rms_norm_backward(x / 2**20, x, weight, weight_offset=1e39).dx
    assert not any(np.isnan(a).any() for a in (*results, dx))
    assert np.isfinite(dx).all()


@pytest.mark.engine
def test_a_large_weight_of_one_head_changes_no_bit_of_another(rng):
    x, dy = rng.standard_normal((2, 400, 2, 64)).astype(np.float16)
    weight = np.ones((2, 64), np.float16)
    one = rn.rms_norm(x, weight)[:, 0], rn.rms_norm_backward(dy, x, weight).dx[:, 0]
    weight[1, 0] = 1000
    two = rn.rms_norm(x, weight)[:, 0], rn.rms_norm_backward(dy, x, weight).dx[:, 0]
    assert same(one, two)


@pytest.mark.engine
def test_a_large_weight_of_one_head_counts_for_its_rows():
    """Alone, such a weight has a row computed in float64, as xhat is subnormal in float32."""
    row = [2.0**44, -(2.0**44)] + [1.5 * 2.0**-120] * 6
    x = np.array([[row, row]] * 3).astype(ml_dtypes.bfloat16)
    weight = np.array([[1.0] * 8, [2.0**120] * 8]).astype(ml_dtypes.bfloat16)
    y = rn.rms_norm(x, weight, eps=0.0)[:, 1]
    assert y.all()
    assert same([y], [rn.rms_norm(x[:, 1].copy(), weight[1], eps=0.0)])


@pytest.mark.engine
def test_a_row_out_of_range_beside_a_residual_of_another_type(rng):
    """The row is computed once more from h, whose type is not y's."""
    residual = (rng.standard_normal((3, 40)) * [[1], [1e-20], [1]]).astype(ml_dtypes.bfloat16)
    first = rn.rms_norm(residual, eps=0.0)
    y = rn.add_rms_norm(np.zeros((3, 40), np.float16), residual, eps=0.0).y
    assert worst_ulp(y, rn.reference.rms_norm(residual.astype(np.float64), eps=0.0)) <= Y_ULP["float16"]
    assert same([first], [rn.rms_norm(residual, eps=0.0)])
    residual[1, 3] = np.inf
    x = rng.standard_normal((3, 40))
    y, want = rn.add_rms_norm(x, residual).y, rn.reference.add_rms_norm(x, residual).y
    assert np.array_equal(np.isnan(y), np.isnan(want))
    assert worst_ulp(y[::2], want[::2]) <= 2


@pytest.mark.engine
@pytest.mark.parametrize("shape", [(700, 7), (300, 100), (6, 70001)], ids=str)
@pytest.mark.parametrize(
    ("kind", "far"), [(np.float64, 1e290), (ml_dtypes.bfloat16, 1e30)], ids=["float64", "bfloat16"]
)
@pytest.mark.parametrize("op", OPS)
def test_extreme_rows_among_ordinary_ones(op, kind, far, shape, backend, rng):
    """Each row is as it would be alone, also in its input's memory; none is missing in the sums, or there twice."""
    x, weight, bias, dy = arrays(rng, shape, np.float64)
    x[1::5] *= far
    x[3::7] /= far
    x, weight, bias, dy = (a.astype(np.dtype(kind)) for a in (x, weight, bias, dy))
    assert_exact(op, x, weight, bias, dy, 0.0, backend)
    y, dx, *_ = call(op, x, weight, bias, dy, 0.0, backend)
    for r in range(6):
        alone = call(op, x[r : r + 1], weight, bias, dy[r : r + 1], 0.0, backend)
        assert same(alone[:2], [a[r : r + 1] for a in (y, dx)])
    inside = x.copy()
    assert same([call(op, inside, weight, bias, dy, 0.0, backend, out=inside)[0]], [y])
    inside = dy.copy()
    backward = rn.layer_norm_backward if op == "layer" else rn.rms_norm_backward
    p = {"p": 0.3} if op == "partial" else {}
    assert same(backward(inside, x, weight, bias, eps=0.0, backend=backend, out=inside, **p)[:1], [dx])


@pytest.mark.engine
@pytest.mark.parametrize("n", [16, 70001])
def test_an_extreme_row_changes_no_bit_of_another(n, rng):
    """An ordinary row with elements so small that they would vanish if it were scaled, alone and beside such a row."""
    x, dy = rng.standard_normal((2, n)), rng.standard_normal((2, n))
    x[1] *= 1e200
    dy[0], x[0, 3:9], x[0, 9] = dy[0] * 1e-290, x[0, 3:9] * 1e-290, 0
    weight = np.ones(n)
    dy[0, 0], weight[0] = 2.0**120, 2.0**-100
    both = rn.rms_norm_backward(dy, x, weight, eps=0.0).dx
    assert same([rn.rms_norm_backward(dy[:1], x[:1], weight, eps=0.0).dx], [both[:1]])


@pytest.mark.engine
def test_gradients_of_float64_at_the_ends_of_the_range(rng):
    """What is finite where dy · rstd is not, zero where the scale is infinite, exact where dy · rstd is subnormal."""
    x = (1 + np.arange(8) * 2.0**-45)[None]
    dweight = rn.layer_norm_backward(np.full((1, 8), 1e300), x, np.ones(8), eps=0.0).dweight
    xhat = (np.arange(8) - L(3.5)) / np.sqrt(L(5.25))
    assert np.all(np.abs(dweight / (xhat * L(1e300)) - 1) < 2.0**-51)
    x, dy = np.array([[1.5e-323, 0, 0, 0]]), np.array([[0, 0, 1e308, 0]])
    assert np.all(rn.rms_norm_backward(dy, x, np.array([1.0, 1, 0, 1]), eps=0.0).dx == 0)
    x, dy = rng.standard_normal((1, 4096)), rng.uniform(3e-308, 6e-308, (1, 4096))
    dweight = rn.rms_norm_backward(dy, x, np.ones(4096), eps=0.0).dweight
    exact = dy[0] * x[0] / np.sqrt((x[0].astype(L) ** 2).mean())
    assert np.all(np.abs(dweight - exact) <= parameter_tolerance(exact, np.abs(exact), 1, x.dtype, dweight.dtype))


@pytest.mark.engine
@pytest.mark.parametrize("n", [7, 100, 70001])
@pytest.mark.parametrize("op", OPS)
def test_padding_needs_no_kernels_of_its_own(op, n, rng, monkeypatch):
    """Rows with dy = 0 are usual, as rows out of range are not: no kernels for those need be compiled."""
    from rmsnorm_np.cpu import rare

    monkeypatch.setattr(rare, "backward", None)
    x, weight, bias, dy = arrays(rng, (5, n), np.float64)
    dy[1::2], x[2] = 0, 0
    assert_exact(op, x, weight, bias, dy, 1e-6, "cpu")


@pytest.mark.engine
@pytest.mark.parametrize("n", [7, 100])
def test_large_x_beside_large_dy(n, backend, rng):
    """The squares of x are in range, the sum of g · x is none of a large x, and rstd³ times that sum vanished."""
    x, weight, bias, dy = arrays(rng, (3, n), np.float64)
    x[:, 1::2] *= 1e112
    dy[:, 0::2] *= 1e163
    assert_exact("rms", x, weight, bias, dy, 0.0, backend)


@pytest.mark.engine
@pytest.mark.parametrize("n", [7, 100, 70001])
@pytest.mark.parametrize(("inside", "outside", "dy_scale"), [(1e-200, 1.0, 1e-250), (1.0, 1e300, 1.0)])
def test_what_is_outside_the_rms_does_not_scale_it(inside, outside, dy_scale, n, backend, rng):
    x, weight, bias, dy = arrays(rng, (3, n), np.dtype(np.float64))
    x = np.clip(x, -1.7, 1.7) * np.where(np.arange(n) < k_of("partial", n), inside, outside)
    assert_exact("partial", x, weight, bias, dy * dy_scale, 0.0, backend)


@pytest.mark.parametrize("op", OPS)
def test_special_values_follow_the_formula_and_stay_in_their_row(op, dtype, backend, rng):
    x, weight, bias, dy = arrays(rng, (6, 70), dtype)
    clean = call(op, x, weight, bias, dy, 1e-6, backend)
    x[1, 3], x[2, 3], x[3, 60] = np.nan, np.inf, -np.inf
    y, dx, _, dbias = call(op, x, weight, bias, dy, 1e-6, backend)
    for row in (0, 4, 5):
        assert y[row].tobytes() == clean[0][row].tobytes()
        assert dx[row].tobytes() == clean[1][row].tobytes()
    assert np.isnan(y[1].astype(np.float64)).all()
    # an infinite root mean square: finite elements become the bias, infinite ones NaN (LayerNorm: all NaN)
    infinite = y[2].astype(np.float64)
    assert np.isnan(infinite[3])
    if op == "layer":
        assert np.isnan(infinite).all()
    else:
        assert np.array_equal(np.delete(infinite, 3), np.delete(bias.astype(np.float64), 3))
    if op == "partial":  # element 60 is not in the root mean square
        assert np.isinf(y[3, 60].astype(np.float64))
        assert np.isfinite(np.delete(y[3], 60).astype(np.float64)).all()
    assert dbias.tobytes() == clean[3].tobytes()


@pytest.mark.parametrize("op", OPS)
def test_special_weights_stay_in_their_column(op, dtype, backend, rng):
    """An infinite weight gives infinities, also where the product's rounding error would be infinite or NaN."""
    x, weight, bias, _ = arrays(rng, (4, 70), dtype)
    x[2, 3] = 0
    weight[3], weight[40], weight[60] = np.inf, -np.inf, np.nan
    for shift in (bias, None):
        y = (
            rn.layer_norm(x, weight, shift, eps=1e-6, backend=backend)
            if op == "layer"
            else rn.rms_norm(x, weight, shift, eps=1e-6, p=0.3 if op == "partial" else 1.0, backend=backend)
        )
        y = y.astype(np.float64)
        xhat = x.astype(np.float64) - (x.astype(np.float64).mean(axis=1, keepdims=True) if op == "layer" else 0)
        with np.errstate(invalid="ignore"):
            assert np.array_equal(y[:, 3], xhat[:, 3] * np.inf, equal_nan=True)
            assert np.array_equal(y[:, 40], xhat[:, 40] * -np.inf, equal_nan=True)
        assert np.isnan(y[:, 60]).all()
        assert np.isfinite(np.delete(y, [3, 40, 60], axis=1)).all()


@pytest.mark.parametrize("n", range(1, 40))
def test_a_constant_row_is_its_mean(n, dtype, rng):
    """Exactly: a mean that is off in its last bit gave a variance below zero, and NaN."""
    x = np.repeat((rng.standard_normal((20, 1)) * (1e3 if dtype.name == "float16" else 1e14)).astype(dtype), n, axis=1)
    assert np.all(rn.layer_norm(x).astype(np.float64) == 0)


@pytest.mark.engine
@pytest.mark.parametrize("n", [2, 3, 7, 8, 33, 100])
def test_rows_of_neighbours(n, backend, rng):
    """LayerNorm of numbers that differ in their last bits, where x - mean is less than a bit of the mean. The mean is
    known to 106 bits of x, so a distance that is small among the others is known less well.
    """
    x = rng.standard_normal((20, 1)) * 1e14
    x = x + np.spacing(x) * rng.integers(0, 3, (20, n))
    ones, zeros, dy = np.ones(n), np.zeros(n), rng.standard_normal((20, n))
    exact = Exact("layer", x, ones, zeros, dy, 1e-6, n)
    y, dx, *_ = call("layer", x, ones, zeros, dy, 1e-6, backend)
    for got, want, terms in ((y, exact.y, exact.y_terms), (dx, exact.dx, exact.dx_terms)):
        assert worst_ulp(got, want, np.broadcast_to(terms.max(axis=1, keepdims=True), want.shape)) <= 1.5


@pytest.mark.parametrize("op", OPS)
def test_zero_rows(op, dtype, backend, rng):
    x, weight, bias, dy = arrays(rng, (3, 40), dtype)
    x[1] = 0
    y, *_ = call(op, x, weight, bias, dy, 1e-6, backend)
    assert np.array_equal(y[1], bias)
    y, *_ = call(op, x, weight, bias, dy, 0.0, backend)
    assert np.isnan(y[1].astype(np.float64)).all()
    assert np.isfinite(y[[0, 2]].astype(np.float64)).all()


# ------------------------------------------------------------------------------------------------------- same bits


@pytest.fixture
def problem(rng):
    """A problem for each dtype, of a shape that goes parallel and has blocks, parts and a tail."""
    rows, n = (77, 1003)
    return lambda dtype: arrays(rng, (rows, n), dtype)


def same(a, b):
    return all(one.dtype == two.dtype and one.tobytes() == two.tobytes() for one, two in zip(a, b, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_same_bits_on_one_and_two_threads(op, dtype, problem):
    inputs = problem(dtype)
    before = numba.get_num_threads()
    results = []
    try:
        for threads in (1, min(2, numba.config.NUMBA_NUM_THREADS)):
            numba.set_num_threads(threads)
            results.append(call(op, *inputs, 1e-6, "cpu"))
    finally:
        numba.set_num_threads(before)
    assert same(*results)


@pytest.mark.parametrize("op", OPS)
def test_a_row_alone_and_in_a_batch(op, dtype, problem):
    x, weight, bias, dy = problem(dtype)
    y, dx, *_ = call(op, x, weight, bias, dy, 1e-6, "cpu")
    for row in (0, len(x) // 2, len(x) - 1):
        one = slice(row, row + 1)
        alone = call(op, x[one], weight, bias, dy[one], 1e-6, "cpu")
        assert same(alone[:2], (y[one], dx[one]))


@pytest.mark.parametrize("op", OPS)
def test_a_long_row_is_cut_without_changing_a_bit(op, dtype, rng, monkeypatch):
    """The kernels for long rows against those for blocks, on the same rows."""
    from rmsnorm_np.cpu import long_rows

    inputs = arrays(rng, (3, 70001), dtype)
    results = []
    for border in (1, 10**9):
        monkeypatch.setattr(long_rows, "LONG_ROW", border)
        results.append(call(op, *inputs, 1e-6, "cpu"))
    assert same(results[0][:2], results[1][:2])


@pytest.mark.parametrize("op", OPS)
def test_alignment_and_streaming_do_not_change_a_bit(op, dtype, rng, monkeypatch):
    """Outputs at every address modulo 64, written through the cache and past it."""
    from rmsnorm_np.cpu import memory, threads

    monkeypatch.setattr(threads, "PARALLEL_ELEMENTS", 0)  # a small call is never written past the cache
    inputs = arrays(rng, (5, 100), dtype)
    want = call(op, *inputs, 1e-6, "cpu")
    for streaming in (0, 1):
        monkeypatch.setattr(memory, "streams", lambda y, on=streaming: on)
        for offset in range(0, 64, dtype.itemsize):
            room = np.zeros(500 * dtype.itemsize + 192, np.uint8)
            start = -room.ctypes.data % 64 + 64 + offset
            y = room[start : start + 500 * dtype.itemsize].view(dtype).reshape(5, 100)
            got = call(op, *inputs, 1e-6, "cpu", out=y)
            assert same(got, want)
            assert not room[:start].any()
            assert not room[start + y.nbytes :].any()


@pytest.mark.parametrize("op", OPS)
def test_streamed_gradients(op, dtype, rng, monkeypatch):
    """y and dx written past the cache, in rows of whole cache lines and in rows that are not."""
    from rmsnorm_np.cpu import memory, threads

    monkeypatch.setattr(threads, "PARALLEL_ELEMENTS", 0)
    for n in (128, 100):
        inputs = arrays(rng, (5, n), dtype)
        monkeypatch.setattr(memory, "streams", lambda y: 0)
        want = call(op, *inputs, 1e-6, "cpu")
        monkeypatch.setattr(memory, "streams", lambda y: 1)
        assert same(call(op, *inputs, 1e-6, "cpu"), want)


@pytest.mark.parametrize("op", OPS)
def test_in_place_no_row_is_done_twice(op, rng):
    """Threads share 150 blocks, nine at a time: a turn that reaches into another thread's part does its rows again."""
    x, weight, bias, dy = arrays(rng, (600, 1024), np.dtype(np.float32))
    want = call(op, x, weight, bias, dy, 1e-6, "cpu")
    got = call_in_place(op, y := x.copy(), weight, bias)
    assert got is y
    assert same([got], want[:1])


def call_in_place(op, x, weight, bias):
    if op == "layer":
        return rn.layer_norm(x, weight, bias, eps=1e-6, out=x, backend="cpu")
    return rn.rms_norm(x, weight, bias, eps=1e-6, p=0.3 if op == "partial" else 1.0, out=x, backend="cpu")


@pytest.mark.parametrize("weight_shape", [(), (3,)])
@pytest.mark.parametrize("bias_shape", [(), (2, 3)])
@pytest.mark.parametrize(
    ("backend", "n"),
    [("reference", 40), ("cpu", 40), pytest.param("cpu", 70001, marks=pytest.mark.engine)],
)
@pytest.mark.parametrize("op", OPS)
def test_parameters_per_head(op, weight_shape, bias_shape, n, dtype, backend, rng):
    """dweight and dbias of different shapes, each summed over the rows that share it; short rows and long ones."""
    x, _, _, dy = arrays(rng, (12, n), dtype)
    weight, bias = (rng.standard_normal((*shape, n)).astype(dtype) for shape in (weight_shape, bias_shape))
    assert_exact(op, x, weight, bias, dy, 1e-6, backend)


def test_every_dtype_that_is_computed_in_is_tested():
    """Integers and bools become float64, and no other type is taken."""
    known = {np.dtype(kind) for kind in (*np.sctypeDict.values(), *vars(ml_dtypes).values()) if is_number(kind)}
    computed_in = set()
    for kind in known:
        with contextlib.suppress(TypeError):
            computed_in.add(_arguments.native_dtype("x", kind))
    assert computed_in == set(DTYPES)


def is_number(kind):
    return isinstance(kind, type) and issubclass(kind, np.generic) and kind is not np.generic
