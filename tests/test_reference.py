"""The first links of the oracle chain.

The exact value of each formula, in longdouble and in the most naive way: one row after another, one element after
another. Against it, the reference's forward and backward for each dtype, to its ULP bound. Then the complex step of
the reference's forward against its backward: it knows nothing of the derivation of the gradients.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tolerances import (
    COMPLEX_STEP,
    DX_ULP,
    LONGDOUBLE_IS_WIDER,
    Y_ULP,
    dx_terms,
    parameter_tolerance,
    worst_ulp,
)

from rmsnorm_np import reference

L = np.longdouble

# One element; an odd row; a row that does not fit the blocks of NumPy's pairwise sum; a longer one.
SHAPES = [(1, 1), (3, 7), (5, 130), (2, 1000)]

# x · scale: the ordinary, and rows whose squares leave the range of the dtype, or of float32.
SCALES = {"float16": [1.0, 2e-5, 1e4], "bfloat16": [1.0, 1e-30, 1e30], "float32": [1.0, 1e-30, 1e30]}
SCALES["float64"] = [1.0, 1e-300, 1e300]
CASES = [(name, scale) for name, scales in SCALES.items() for scale in scales]

needs_longdouble = pytest.mark.skipif(
    not LONGDOUBLE_IS_WIDER, reason="longdouble is float64 here: nothing to judge float64 by"
)


def total(values):
    """The sum of longdoubles, right to the last bit: what each addition rounds off is kept (Neumaier)."""
    high, low = L(0), L(0)
    for value in values:
        new = high + value
        low += (high - new) + value if abs(high) >= abs(value) else (value - new) + high
        high = new
    return high + low if np.isfinite(low) else high


class Exact:
    """Both norms and their gradients for 2-D arrays, element by element in longdouble."""

    def __init__(self, x, weight, bias, dy, *, k, eps, weight_offset, centred):
        rows, n = x.shape
        self.y, self.y_terms, self.dx, self.xhat, self.g = (np.zeros((rows, n), L) for _ in range(5))
        self.rstd = np.zeros((rows, 1), L)
        for r in range(rows):
            row = [L(value) for value in x[r]]
            for _ in range(2 if centred else 0):  # twice, as the first mean is rounded
                mean = total(row) / n
                row = [value - mean for value in row]
            rstd = 1 / np.sqrt(total(value * value for value in row[:k]) / k + L(eps))
            self.rstd[r] = rstd
            for i in range(n):
                xhat = row[i] * rstd
                scale = L(1) if weight is None else L(weight_offset) + L(weight[i])
                shift = L(0) if bias is None else L(bias[i])
                self.xhat[r, i], self.g[r, i] = xhat, L(dy[r, i]) * scale
                self.y[r, i] = xhat * scale + shift
                self.y_terms[r, i] = max(abs(xhat * scale), abs(shift))
            c = total(self.g[r] * self.xhat[r]) / k
            mean_g = total(self.g[r]) / n if centred else L(0)
            for i in range(n):
                self.dx[r, i] = rstd * (self.g[r, i] - mean_g - (self.xhat[r, i] * c if i < k else L(0)))
        self.dx_terms = dx_terms(self.g, self.xhat, self.rstd, k, centred=centred)
        products, wide_dy = dy.astype(L) * self.xhat, dy.astype(L)
        self.dweight, self.dweight_terms = products.sum(axis=0), np.abs(products).sum(axis=0)
        self.dbias, self.dbias_terms = wide_dy.sum(axis=0), np.abs(wide_dy).sum(axis=0)


def arrays(rng, shape, dtype, scale=1.0):
    """x, weight, bias and dy of one dtype; `scale` goes to x alone."""
    x = (rng.normal(size=shape) * scale).astype(dtype)
    weight, bias = (rng.normal(size=shape[-1]).astype(dtype) for _ in range(2))
    return x, weight, bias, rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize(("name", "scale"), CASES)
@needs_longdouble
def test_forward_and_backward_are_the_exact_result_rounded_once(name, scale, centred, shape, rng):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    undefined = centred and shape[1] == 1  # 0 / 0 without eps
    eps = 1e-6 if scale == 1.0 or undefined else 0.0
    x, weight, bias, dy = arrays(rng, shape, dtype, scale)
    dy = (dy.astype(np.float64) * min(scale, 1.0)).astype(dtype)  # a dx that is in range
    for given in [(None, None), (weight, None), (weight, bias)]:
        for p in (1.0,) if centred else (1.0, 0.3):
            options = {"eps": eps, "weight_offset": 0.0 if given[0] is None else 1.0}
            k = max(1, -(-3 * shape[1] // 10)) if p == 0.3 else shape[1]
            with np.errstate(all="ignore"):  # the variance of one element is 0
                exact = Exact(x, *given, dy, k=k, centred=centred, **options)
            if centred:
                y = reference.layer_norm(x, *given, **options)
                grads = reference.layer_norm_backward(dy, x, *given, **options)
            else:
                y = reference.rms_norm(x, *given, p=p, **options)
                grads = reference.rms_norm_backward(dy, x, *given, p=p, **options)
            assert y.dtype == grads.dx.dtype == dtype
            assert worst_ulp(y, exact.y, exact.y_terms) <= Y_ULP[name]
            assert worst_ulp(grads.dx, exact.dx, exact.dx_terms) <= DX_ULP[name]
            for parameter, which in zip(given, ("dweight", "dbias"), strict=True):
                gradient = getattr(grads, which)
                if parameter is None:
                    assert gradient is None
                    continue
                want, terms = getattr(exact, which), getattr(exact, which + "_terms")
                assert gradient.dtype == dtype
                assert np.all(
                    np.abs(gradient.astype(L) - want) <= parameter_tolerance(want, terms, shape[0], dtype, dtype)
                )


@pytest.mark.parametrize("name", list(SCALES))
def test_a_row_far_from_zero_is_centred_exactly(name, rng):
    """LayerNorm of a row whose mean is as large against its spread as the dtype can hold."""
    bits = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[name]
    offsets = rng.integers(-4, 5, size=(3, 100))
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    far = (2.0 ** (bits - 1) * 1.25 + offsets).astype(dtype)
    near = reference.layer_norm(offsets.astype(dtype))
    assert np.array_equal(reference.layer_norm(far).astype(np.float64), near.astype(np.float64))


@pytest.mark.parametrize("backward", [False, True])
def test_nan_and_inf_stay_in_their_row(backward, rng):
    x, weight, bias, dy = arrays(rng, (4, 6), np.float64)
    clean = x[[0, 3]]
    x[1, 2], x[2, 3] = np.nan, np.inf
    if backward:
        bad = reference.rms_norm_backward(dy, x, weight, bias).dx
        good = reference.rms_norm_backward(dy[[0, 3]], clean, weight, bias).dx
        assert np.isnan(bad[1]).all()
    else:
        bad, good = reference.rms_norm(x, weight, bias), reference.rms_norm(clean, weight, bias)
        assert np.isnan(bad[1]).all()
        assert np.isnan(bad[2, 3])  # inf · 0
        assert np.array_equal(np.delete(bad[2], 3), np.delete(bias, 3))  # finite · 0, so the bias alone
    assert np.array_equal(bad[[0, 3]], good)


def test_no_spread_and_no_eps_is_nan_in_silence():
    assert np.isnan(reference.layer_norm([[3.0]], eps=0.0)).all()
    assert np.isnan(reference.rms_norm([[0.0, 0.0]], eps=0.0)).all()
    assert np.array_equal(reference.rms_norm([[0.0, -0.0]]), [[0.0, 0.0]])


# The complex step


def complex_step(function, arrays, position):
    """d function / d arrays[position], element by element: the imaginary part after an imaginary step."""
    step = 1e-100  # its square is nothing beside 1: no difference is taken that could cancel
    arrays = [None if a is None else a.astype(np.complex128) for a in arrays]
    gradient = np.zeros(arrays[position].shape)
    for index in np.ndindex(gradient.shape):
        arrays[position][index] += 1j * step
        gradient[index] = function(*arrays).imag / step
        arrays[position][index] -= 1j * step
    return gradient


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# shape, axis, shape of weight and bias
LAYOUTS = [
    ((3, 7), -1, (7,)),
    ((2, 3, 4), -1, (3, 4)),  # per head
    ((2, 3, 4), (1, 2), (3, 4)),
    ((3, 4, 2), (0, 2), (3, 2)),  # not trailing
    ((5, 3), 0, (5,)),
]


@pytest.mark.parametrize(("shape", "axis", "parameter_shape"), LAYOUTS, ids=str)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("op", ["rms", "rms p=0.4", "layer"])
def test_backward_agrees_with_the_complex_step(op, eps, weight_offset, shape, axis, parameter_shape, rng):
    x, dy = rng.normal(size=shape), rng.normal(size=shape)
    weight, bias = rng.normal(size=parameter_shape), rng.normal(size=parameter_shape)
    options = {"eps": eps, "axis": axis, "weight_offset": weight_offset}
    if op == "layer":
        forward, backward = reference.layer_norm, reference.layer_norm_backward
    else:
        forward, backward = reference.rms_norm, reference.rms_norm_backward
        options["p"] = 0.4 if op.endswith("0.4") else 1.0

    def loss(x, weight, bias):
        return np.sum(dy * forward(x, weight, bias, **options))

    grads = backward(dy, x, weight, bias, **options)
    for position, gradient in enumerate(grads):
        want = complex_step(loss, (x, weight, bias), position)
        assert gradient.shape == want.shape
        assert relative(gradient, want) <= COMPLEX_STEP


def test_a_complex_weight_alone_makes_a_complex_result(rng):
    x, weight, _, _ = arrays(rng, (3, 5), np.float64)
    y = reference.rms_norm(x, weight * 1j)
    assert y.dtype == np.complex128
    assert np.array_equal(y, 1j * reference.rms_norm(x, weight))


def test_complex_input_is_continued_analytically(rng):
    """x · x and not |x|²: a turn of x by i turns the mean square by -1."""
    x = rng.normal(size=(3, 5))
    y = reference.rms_norm(1j * x, eps=0.0)
    assert np.allclose(y * y, reference.rms_norm(x, eps=0.0) ** 2, rtol=1e-15)
    assert np.allclose(reference.rms_norm(1j * x, eps=np.mean(x * x) * 10).imag.any(axis=-1), True)
