"""The unit of the last place: counted as a dtype's own neighbours say."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tolerances import LONGDOUBLE_IS_WIDER, worst_ulp

from rmsnorm_np.ulp import ulp_error

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, 1.9375, 2.0, -96.0])  # the first, last and first number of a binade, a negative
def test_neighbours_are_one_ulp_apart(dtype, value):
    got = np.full(3, value, dtype)
    got[1] = np.nextafter(got[1], np.array(np.inf, dtype))
    exact = np.full(3, value)
    # -96 moves towards zero, and the others away from it: all of these steps are one ULP of the binade of `value`
    assert ulp_error(got, exact) == 1.0
    assert ulp_error(got, exact, scale=4 * abs(value)) == 0.25
    assert ulp_error(got, exact, scale=[0.0, 4 * abs(value), 0.0]) == 0.25
    assert ulp_error(got, exact, forgiven=1.0) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_and_zero_count_in_the_smallest(dtype):
    smallest = np.spacing(np.zeros((), dtype))
    assert ulp_error(np.array([smallest * 2], dtype), np.zeros(1)) == 2.0
    assert ulp_error(np.array([smallest * 3], dtype), np.array([smallest], np.float64)) == 2.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan(dtype):
    largest = float(np.nextafter(np.array(np.inf, dtype), np.zeros((), dtype)))
    half = (largest - float(np.nextafter(np.array(largest, dtype), np.zeros((), dtype)))) / 2
    infinite, nan = np.array([np.inf], dtype), np.array([np.nan], dtype)
    assert ulp_error(infinite, [np.inf]) == 0.0
    assert ulp_error(infinite, [largest + half]) == 0.0  # rounds to infinity
    assert ulp_error(infinite, [largest]) == np.inf
    assert ulp_error(infinite, [-np.inf]) == np.inf
    assert ulp_error(np.array([largest], dtype), [np.inf]) == np.inf
    assert ulp_error(nan, [np.nan]) == 0.0
    assert ulp_error(nan, [1.0]) == np.inf
    assert ulp_error(np.ones(1, dtype), [np.nan]) == np.inf


@pytest.mark.skipif(not LONGDOUBLE_IS_WIDER, reason="nothing is wider than float64 here")
def test_float64_is_judged_by_longdouble():
    exact = np.longdouble(1) + np.longdouble(2) ** -54
    assert ulp_error(np.float64(1.0), exact) == 0.25


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_agrees_with_the_definition_of_the_tests(dtype):
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(30, 40)) * 2.0 ** rng.integers(-12, 12, (30, 40))
    got = (exact * (1 + rng.uniform(-3, 3, exact.shape) * float(np.spacing(np.ones((), dtype))))).astype(dtype)
    assert ulp_error(got, exact) == pytest.approx(float(worst_ulp(got, exact)), rel=1e-12)


def test_no_elements():
    assert ulp_error(np.empty((0, 3), np.float32), np.empty((0, 3))) == 0.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exact": np.ones(3)}, ValueError, r"exact has shape \(3,\), expected that of got, \(2, 3\)"),
        ({"exact": 1.0}, ValueError, r"exact has shape \(\), expected that of got, \(2, 3\)"),
        ({"scale": np.ones(2)}, ValueError, r"scale has shape \(2,\), expected one that broadcasts to .* \(2, 3\)"),
        ({"forgiven": np.ones((3, 2, 3))}, ValueError, r"forgiven has shape \(3, 2, 3\), expected one that broadcasts"),
        ({"got": np.ones((2, 3), int)}, TypeError, "got is int64, expected floats"),
        ({"got": np.ones((2, 3), complex)}, TypeError, "got is complex128, expected floats"),
        ({"exact": np.ones((2, 3), complex)}, TypeError, "exact is complex128, expected real numbers"),
    ],
)
def test_mistakes_in_the_call(change, error, message):
    arguments = {"got": np.ones((2, 3), np.float32), "exact": np.ones((2, 3))} | change
    with pytest.raises(error, match=message):
        ulp_error(arguments.pop("got"), arguments.pop("exact"), **arguments)
