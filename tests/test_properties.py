"""What must hold for every input, looked for by hypothesis: shapes, dtypes, seeds and options are its choice.

The elements are random numbers of magnitude 1/16 to 16, none near zero, so that no row is zero and no result
subnormal: what such rows do is tested elsewhere. Equal means equal in every bit, except where rounding has to differ.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from conftest import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import DX_ULP, Y_ULP, dx_terms, parameter_tolerance, spacing

import rmsnorm_np as rn

# The CPU engine goes parallel at 32768 elements. Run as plain Python, a million of them would take minutes.
MOST_ELEMENTS = 40_000
FLOAT16, _, FLOAT32, FLOAT64 = DTYPES

both_norms = pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=pytest.mark.engine)])
some = settings(deadline=None, max_examples=25)  # the first call compiles, whatever the deadline


class Problem(NamedTuple):
    x: np.ndarray  # (rows, n)
    weight: np.ndarray  # (n,)
    bias: np.ndarray  # (n,)
    dy: np.ndarray  # (rows, n)
    p: float
    seed: int

    def __repr__(self):
        """What it takes to make it again; thousands of numbers would help nobody."""
        (rows, n), dtype = self.x.shape, self.x.dtype.name
        return f"Problem(rows={rows}, n={n}, dtype={dtype}, p={self.p}, seed={self.seed})"


@st.composite
def problems(draw, dtypes=DTYPES, least_n=1):
    n = draw(st.integers(least_n, 300) | st.sampled_from([8, 32, 64, 127, 256]), label="n")
    rows = draw(st.integers(1, max(1, min(300, MOST_ELEMENTS // n))), label="rows")
    dtype = draw(st.sampled_from(dtypes), label="dtype")
    seed = draw(st.integers(0, 2**32 - 1), label="seed")
    rng = np.random.default_rng(seed)
    shapes = ((rows, n), (n,), (n,), (rows, n))
    arrays = (rng.choice([-1, 1], shape) * 2 ** rng.uniform(-4, 4, shape) for shape in shapes)
    p = draw(st.sampled_from([1.0, 0.5, 0.0625]), label="p")
    return Problem(*(array.astype(dtype) for array in arrays), p, seed)


class Norm:
    """Forward and backward of one norm with its options, that see to it that no input is written."""

    def __init__(self, name, backend, problem, **options):
        self.functions = getattr(rn, name), getattr(rn, f"{name}_backward")
        self.options = {"backend": backend, **({"p": problem.p} if name == "rms_norm" else {}), **options}

    def __call__(self, x, weight=None, bias=None, **options):
        return self._unchanged(self.functions[0], (x, weight, bias), options)

    def backward(self, dy, x, weight=None, bias=None, **options):
        return self._unchanged(self.functions[1], (dy, x, weight, bias), options)

    def _unchanged(self, function, arrays, options):
        before = [None if array is None else array.copy() for array in arrays]
        result = function(*arrays, **self.options, **options)
        for array, copy in zip(arrays, before, strict=True):
            assert array is None or array.tobytes() == copy.tobytes()
        return result


def equal(a, b):
    assert a.dtype == b.dtype
    # In float64, as NumPy does not know the NaN of bfloat16: two equal elements have no variance, at eps = 0 give NaN
    # for LayerNorm, and must do so every time.
    np.testing.assert_array_equal(a.astype(np.float64), b.astype(np.float64))


@both_norms
@each_backend
@some
@given(problem=problems(least_n=2), exponent=st.integers(-4, 4))
def test_a_power_of_two_scales_without_a_trace(norm, backend, problem, exponent):
    """At eps = 0, y(δx) = y(x) and dx(δx) = dx(x)/δ; for δ a power of two there is nothing to round."""
    call = Norm(norm, backend, problem, eps=0.0)
    x, weight, bias, dy, _, _ = problem
    delta = x.dtype.type(2.0**exponent)
    equal(call(x * delta, weight, bias), call(x, weight, bias))
    scaled, plain = (call.backward(dy, v, weight, bias) for v in (x * delta, x))
    equal(scaled.dweight, plain.dweight)
    equal(scaled.dbias, plain.dbias)
    if x.dtype != FLOAT16:  # where a small dx is subnormal, and does round
        equal(scaled.dx * delta, plain.dx)


def wide(x, weight, dy):
    return (array.astype(np.longdouble) for array in (x, weight, dy))


def rounding(dx, terms):
    """What each element of dx may be off by: the terms can cancel, and can add up to more than the largest of them."""
    return DX_ULP[dx.dtype.name] * spacing(np.maximum(np.abs(dx), terms), dx.dtype)


@each_backend
@some
@given(problem=problems([FLOAT32, FLOAT64]))
def test_rms_gradient_is_at_right_angles_to_x(backend, problem):
    """<x, dx> = 0 at eps = 0, for RMSNorm and pRMSNorm: no step along x changes y."""
    x, weight, bias, dy, p, _ = problem
    dx = Norm("rms_norm", backend, problem, eps=0.0).backward(dy, x, weight, bias).dx
    k = int(np.ceil(x.shape[1] * p))
    wide_x, wide_weight, wide_dy = wide(x, weight, dy)
    rstd = 1 / np.sqrt(np.mean(wide_x[:, :k] ** 2, axis=-1, keepdims=True))
    terms = dx_terms(wide_dy * wide_weight, wide_x * rstd, rstd, k=k, centred=False)
    allowed = np.sum(np.abs(wide_x) * rounding(dx, terms), axis=-1)
    assert np.all(np.abs(np.sum(wide_x * dx, axis=-1)) <= 1.01 * allowed)


@each_backend
@some
@given(problem=problems([FLOAT32, FLOAT64], least_n=2))
def test_layer_gradient_sums_to_zero(backend, problem):
    """Σdx = 0 whatever eps: no shift of x changes y. At eps = 0, <x, dx> = 0 as well."""
    x, weight, bias, dy, _, _ = problem
    wide_x, wide_weight, wide_dy = wide(x, weight, dy)
    centred = wide_x - np.mean(wide_x, axis=-1, keepdims=True)
    for eps in (0.0, 0.5):
        dx = Norm("layer_norm", backend, problem, eps=eps).backward(dy, x, weight, bias).dx
        rstd = 1 / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps)
        terms = dx_terms(wide_dy * wide_weight, centred * rstd, rstd, k=x.shape[1], centred=True)
        errors = rounding(dx, terms)
        assert np.all(np.abs(np.sum(dx.astype(np.longdouble), axis=-1)) <= 1.01 * np.sum(errors, axis=-1))
        if eps == 0.0:
            allowed = np.sum(np.abs(wide_x) * errors, axis=-1)
            assert np.all(np.abs(np.sum(wide_x * dx, axis=-1)) <= 1.01 * allowed)


@both_norms
@each_backend
@some
@given(problem=problems(), data=st.data())
def test_rows_are_independent_of_their_order_and_company(norm, backend, problem, data):
    """Rows in another order, or a few of them, or one alone: the same bits for each."""
    call = Norm(norm, backend, problem)
    x, weight, bias, dy, _, _ = problem
    rows = len(x)
    seed = data.draw(st.integers(0, 2**32 - 1), label="order")
    order = np.random.default_rng(seed).permutation(rows)
    few = slice(*sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows)), label="slice")))
    row = data.draw(st.integers(0, rows - 1), label="row")

    y, grads = call(x, weight, bias), call.backward(dy, x, weight, bias)
    for chosen in (order, few, slice(row, row + 1)):
        equal(call(x[chosen], weight, bias), y[chosen])
        equal(call.backward(dy[chosen], x[chosen], weight, bias).dx, grads.dx[chosen])
    equal(call(x[row], weight, bias), y[row])

    # A sum over the rows is added in their order: it may round differently, within the bound of the exact sum.
    shuffled = call.backward(dy[order], x[order], weight, bias)
    xhat = Norm(norm, "reference", problem)(x.astype(np.float64)).astype(np.longdouble)
    for name, magnitudes in (("dweight", np.abs(dy * xhat)), ("dbias", np.abs(dy.astype(np.longdouble)))):
        one, other = (getattr(gradient, name).astype(np.longdouble) for gradient in (grads, shuffled))
        allowed = parameter_tolerance(one, np.sum(magnitudes, axis=0), rows, x.dtype, x.dtype)
        assert np.all(np.abs(one - other) <= 2.1 * allowed)


@both_norms
@each_backend
@some
@given(problem=problems([FLOAT32]))
def test_a_weight_of_ones_and_a_bias_of_zeros_do_nothing(norm, backend, problem):
    call = Norm(norm, backend, problem)
    x, weight, bias, dy, _, _ = problem
    equal(call(x, np.ones_like(weight)), call(x))
    equal(call(x, None, np.zeros_like(bias)), call(x))
    equal(call.backward(dy, x, np.ones_like(weight), bias).dx, call.backward(dy, x).dx)
    nothing = call.backward(dy, x)
    assert nothing.dweight is None
    assert nothing.dbias is None


@both_norms
@each_backend
@some
@given(problem=problems([FLOAT32]))
def test_the_bias_is_added(norm, backend, problem):
    """To y, which rounds once more; dx and dweight know nothing of it, and dbias is the sum of dy."""
    call = Norm(norm, backend, problem)
    x, weight, bias, dy, _, _ = problem
    with_bias, without, shift = (v.astype(np.longdouble) for v in (call(x, weight, bias), call(x, weight), bias))
    unit = Y_ULP[x.dtype.name] * spacing(np.maximum(np.abs(without), np.abs(shift)), x.dtype)
    # Twice: each of the two y's is rounded. The sum may be of the next binade, with twice the spacing.
    assert np.all(np.abs(with_bias - (without + shift)) <= 3 * unit)

    grads, plain = call.backward(dy, x, weight, bias), call.backward(dy, x, weight)
    equal(grads.dx, plain.dx)
    equal(grads.dweight, plain.dweight)
    exact, magnitudes = (np.sum(v, axis=0) for v in (dy.astype(np.longdouble), np.abs(dy.astype(np.longdouble))))
    assert np.all(np.abs(grads.dbias - exact) <= parameter_tolerance(exact, magnitudes, len(x), x.dtype, x.dtype))


@both_norms
@each_backend
@some
@given(problem=problems([FLOAT32]))
def test_the_offset_is_added_to_the_weight(norm, backend, problem):
    """1 + w, Gemma's way, equals the weight 1 + w where that sum is exact: here for multiples of 1/16."""
    call = Norm(norm, backend, problem)
    x, weight, bias, dy, _, _ = problem
    stored = (np.rint(16 * weight) % 16 / 16).astype(x.dtype)
    whole = x.dtype.type(1) + stored
    equal(call(x, stored, bias, weight_offset=1.0), call(x, whole, bias))
    for offset, plain in zip(
        call.backward(dy, x, stored, bias, weight_offset=1.0), call.backward(dy, x, whole, bias), strict=True
    ):
        equal(offset, plain)
