"""LayerNorm far from zero: each element of y, the ones beside the mean too; rows of one number at every magnitude.

A mean that is rounded to the type it is computed in is of no matter to most elements, and all that is left of those
beside it.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tolerances import DX_ULP, LONGDOUBLE_IS_WIDER, Y_ULP, dx_terms, parameter_tolerance, worst_ulp

import rmsnorm_np as rn

L = np.longdouble
LONG = [pytest.param(70_001, marks=pytest.mark.engine)]
LENGTHS = [2, 3, 16, 33, 300, 1000, 4096, *LONG]

pytestmark = pytest.mark.skipif(not LONGDOUBLE_IS_WIDER, reason="longdouble is float64 here: nothing to judge by")


def rows_near(base, unit, n, dtype, rng):
    """Rows of `base`, but for some steps of one unit in its last place."""
    steps = np.zeros((4, n), int)
    steps[0, 0] = 1
    steps[1, -1] = -1
    steps[2] = np.arange(n) % 3 == 1
    steps[3] = rng.integers(-3, 3, n)
    steps[3, 0] = 3
    x = (L(base) + steps * L(unit)).astype(dtype)
    assert len(np.unique(x[:2])) == 3  # else the unit was too small for the dtype
    return x


def centred(x):
    """x - mean, exact for rows whose differences are few units: the sum is subtracted before the division."""
    difference = x.astype(L) - x.astype(L)[:, :1]
    n = x.shape[1]
    return (n * difference - difference.sum(axis=1, keepdims=True)) / n


def assert_each_element(x, weight, dy, eps, backend, bias=None):
    name, n = x.dtype.name, x.shape[1]
    before = [a.tobytes() for a in (x, weight, dy)]
    y = rn.layer_norm(x, weight, bias, eps=eps, backend=backend)
    dx, dweight, _ = rn.layer_norm_backward(dy, x, weight, bias, eps=eps, backend=backend)
    assert before == [a.tobytes() for a in (x, weight, dy)]
    difference = centred(x)
    rstd = 1 / np.sqrt((difference**2).mean(axis=1, keepdims=True) + L(eps))
    xhat, g = difference * rstd, dy.astype(L) * weight.astype(L)
    assert worst_ulp(y, xhat * weight.astype(L)) <= Y_ULP[name]
    want = rstd * (g - g.mean(axis=1, keepdims=True) - xhat * (g * xhat).mean(axis=1, keepdims=True))
    assert worst_ulp(dx, want, dx_terms(g, xhat, rstd, n, centred=True)) <= DX_ULP[name]
    terms = dy.astype(L) * xhat
    tolerance = parameter_tolerance(terms.sum(axis=0), np.abs(terms).sum(axis=0), len(x), x.dtype, dweight.dtype)
    assert np.all(np.abs(dweight.astype(L) - terms.sum(axis=0)) <= tolerance)


# A number of each dtype, and the distance to its neighbour: plain ones, large ones, and the smallest there are.
BASES = [
    (np.float16, 3.0, 2.0**-9), (np.float16, 6e4, 2.0**5),
    (ml_dtypes.bfloat16, 3.0, 2.0**-6), (ml_dtypes.bfloat16, 1e38, 2.0**119),
    (np.float32, 3.0, 2.0**-22), (np.float32, 1e6, 2.0**-4), (np.float32, 3e38, 2.0**104), (np.float32, 0.0, 2.0**-149),
    (np.float64, 0.1, 2.0**-56), (np.float64, 1e6, 2.0**-33), (np.float64, 1e160, 2.0**479),
    (np.float64, 1.7e308, 2.0**971), (np.float64, -1e-300, 2.0**-1049), (np.float64, 0.0, 2.0**-1074),
]  # fmt: skip


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(
    ("kind", "base", "unit"),
    [pytest.param(*case, marks=[pytest.mark.engine] * (case[0] is not np.float32)) for case in BASES],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_rows_of_neighbours(kind, base, unit, n, backend, rng):
    """x of 3.0 with one neighbour was 3 ULP off in float32, of 0.1 by 2,496 in float64."""
    x = rows_near(base, unit, n, np.dtype(kind), rng)
    weight, dy = (rng.standard_normal(shape).astype(kind) for shape in (n, (4, n)))
    weight[::3] = 0
    assert_each_element(x, weight, dy, 0.0, backend)
    eps = float(L(2 * unit) ** 2)
    if 0 < eps < np.inf:
        assert_each_element(x, weight, dy, eps, backend, np.zeros(n, kind))


@pytest.mark.parametrize("kind", [np.float32, pytest.param(np.float64, marks=pytest.mark.engine)])
def test_normal_numbers_around_a_large_mean(kind, backend, rng):
    """Rows of 304 float32 around 1e6 were off by 2.3 ULP somewhere, ordinary as they look."""
    x = (1e6 + rng.standard_normal((1000, 304))).astype(kind)
    weight, dy = rng.standard_normal(304).astype(kind), rng.standard_normal(x.shape).astype(kind)
    assert_each_element(x, weight, dy, 1e-6, backend)


@pytest.mark.parametrize("n", [1, 2, 3, 77, *LONG])
def test_rows_of_one_number(n, dtype, backend, rng):
    """y is the bias, xhat zero: a row of 1e160 made all of dweight NaN, one of the lowest number y.

    dx is what is left of its formula, rstd · (g - mean(g)).
    """
    finfo = ml_dtypes.finfo(dtype)
    values = [finfo.smallest_subnormal, finfo.smallest_normal, 1, 3, 1e4, finfo.max, finfo.min]
    values += [1e-300, 1e100, 1e155, 1e160, 1e300] if dtype == np.float64 else []
    x = np.repeat(np.array(values, L).astype(dtype)[:, None], n, axis=1)
    weight, bias = (rng.standard_normal(n).astype(dtype) for _ in range(2))
    dy = rng.standard_normal(x.shape).astype(dtype)
    for eps in (1e-6, 1.0):
        y = rn.layer_norm(x, weight, bias, eps=eps, backend=backend)
        dx, dweight, dbias = rn.layer_norm_backward(dy, x, weight, bias, eps=eps, backend=backend)
        assert np.array_equal(y, np.broadcast_to(bias, x.shape))
        assert not dweight.any()
        want, terms = dy.astype(L).sum(axis=0), np.abs(dy.astype(L)).sum(axis=0)
        assert np.all(np.abs(dbias - want) <= parameter_tolerance(want, terms, len(x), dtype, dtype))
        g, rstd = dy.astype(L) * weight.astype(L), 1 / np.sqrt(L(eps))
        with np.errstate(over="ignore"):
            want = rstd * (g - g.mean(axis=1, keepdims=True))
        terms = dx_terms(g, np.zeros_like(g), rstd, n, centred=True)
        assert worst_ulp(dx, want, terms) <= DX_ULP[dtype.name]
        if n == 1:
            assert not dx.any()


@pytest.mark.parametrize("row", [[1, 1, -1], [1, 1, 0.5], [1, -1, 0], [1, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.engine)])
def test_rows_with_the_largest_numbers(row, dtype, backend, rng):
    """Their sum, and differences between them, are out of range."""
    x = (np.array([row] * 2, dtype) * np.finfo(dtype).max).astype(dtype)
    weight, dy = rng.standard_normal(3).astype(dtype), rng.standard_normal((2, 3)).astype(dtype)
    difference = x.astype(L) - x.astype(L).mean(axis=1, keepdims=True)
    xhat = difference / np.sqrt((difference**2).mean(axis=1, keepdims=True))
    y = rn.layer_norm(x, weight, backend=backend)
    assert worst_ulp(y, xhat * weight.astype(L), np.abs(weight.astype(L))) <= Y_ULP[np.dtype(dtype).name]
    _, dweight, _ = rn.layer_norm_backward(dy, x, weight, backend=backend)
    want = (dy * xhat).sum(axis=0)
    assert np.all(np.abs(dweight - want) <= parameter_tolerance(want, np.abs(dy * xhat).sum(axis=0), 2, dtype, dtype))
