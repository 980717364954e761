"""The checker is checked: it passes right gradients, rejects slightly wrong ones, and says so when it cannot tell."""

from __future__ import annotations

import math
import subprocess
import sys

import ml_dtypes
import numba
import numpy as np
import pytest
from tolerances import COMPLEX_STEP

import rmsnorm_np as rn
from rmsnorm_np import reference
from rmsnorm_np.gradcheck import GradientError, check_gradient

METHODS = ("complex-step", "finite-difference")
NAMES = ("dx", "dweight", "dbias")


def problem(shape=(4, 7), dtype=np.float64, seed=1):
    """x, weight and bias of ordinary size; small enough to look at every element."""
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=shape), rng.normal(size=shape[-1]), rng.normal(size=shape[-1])
    return tuple(array.astype(dtype) for array in arrays)


def off_by(position, factor):
    """The reference's RMSNorm gradient with one of its three arrays multiplied by `factor`."""

    def gradient(dy, x, weight, bias):
        grads = list(reference.rms_norm_backward(dy, x, weight, bias))
        grads[position] = (grads[position] * factor).astype(grads[position].dtype)
        return grads

    return gradient


def verdicts(report):
    return [part.verdict for part in report.inputs]


# The oracle chain: forward -> complex step and adaptive differences -> the reference's backward -> the engines.


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("p", [1.0, 0.5, 0.07])
@pytest.mark.parametrize("shape", [(4, 7), (3, 100), (2, 3, 8)])
def test_reference_rms_gradient_agrees_with_the_complex_step_to_1e_12(shape, p, eps):
    options = {"p": p, "eps": eps, "weight_offset": 0.3}
    report = check_gradient(
        lambda *args: reference.rms_norm(*args, **options),
        lambda *args: reference.rms_norm_backward(*args, **options),
        *problem(shape),
        method="complex-step",
        rtol=COMPLEX_STEP,
    )
    assert report.ok, report


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("shape", [(4, 7), (3, 100), (2, 3, 8)])
def test_reference_layer_gradient_agrees_with_the_complex_step_to_1e_12(shape, eps):
    options = {"eps": eps, "weight_offset": 0.3}
    report = check_gradient(
        lambda *args: reference.layer_norm(*args, **options),
        lambda *args: reference.layer_norm_backward(*args, **options),
        *problem(shape),
        method="complex-step",
        rtol=COMPLEX_STEP,
    )
    assert report.ok, report


@pytest.mark.parametrize("axis", [0, (0, 2), (1, 2)])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_reference_gradient_over_other_axes(norm, axis):
    rng = np.random.default_rng(5)
    shape = (2, 3, 5)
    weight = rng.normal(size=[shape[i] for i in np.atleast_1d(axis)])
    function, gradient = getattr(reference, norm), getattr(reference, f"{norm}_backward")
    report = check_gradient(
        lambda *args: function(*args, axis=axis),
        lambda *args: gradient(*args, axis=axis),
        rng.normal(size=shape),
        weight,
        -weight,
        rtol=COMPLEX_STEP,
    )
    assert report.ok, report
    assert report.method == "complex-step"


def test_reference_gradient_of_per_head_weights():
    rng = np.random.default_rng(6)
    x, weight, bias = rng.normal(size=(5, 3, 4)), rng.normal(size=(3, 4)), rng.normal(size=4)
    report = check_gradient(reference.rms_norm, reference.rms_norm_backward, x, weight, bias, rtol=COMPLEX_STEP)
    assert report.ok, report


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("norm", "options"), [("rms_norm", {}), ("rms_norm", {"p": 0.3}), ("layer_norm", {})])
def test_a_backend_s_own_pair_passes_through_its_real_outputs(norm, options, dtype, backend):
    function, gradient = getattr(rn, norm), getattr(rn, f"{norm}_backward")
    report = check_gradient(
        lambda *args: function(*args, **options, backend=backend),
        lambda *args: gradient(*args, **options, backend=backend),
        *problem(dtype=dtype),
        method="finite-difference",
    )
    assert report.ok, report


# Right and wrong


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("method", METHODS)
def test_a_right_gradient_passes(method, dtype):
    report = check_gradient(reference.rms_norm, reference.rms_norm_backward, *problem(dtype=dtype), method=method)
    assert report.ok, report
    assert report.method == method


@pytest.mark.parametrize("factor", [0.999, 1.001])
@pytest.mark.parametrize("position", range(3), ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_off_by_a_thousandth_is_rejected(method, dtype, position, factor):
    gradient = off_by(position, np.dtype(dtype).type(factor))
    report = check_gradient(reference.rms_norm, gradient, *problem(dtype=dtype), method=method)
    assert report.verdict == "wrong", report
    assert not report.ok
    assert [part.position for part in report.inputs if part.verdict != "right"] == [position]
    # 0.1 % of the gradient, seen along the direction that shows it best.
    assert 5e-4 < report.inputs[position].error < 4e-3


@pytest.mark.engine  # seconds of plain NumPy: not each time
@pytest.mark.parametrize("element", list(np.ndindex(4, 7)), ids=str)
def test_one_element_off_by_a_thousandth_is_rejected(element):
    factor = np.ones((4, 7))
    factor[element] = 1.001
    for method in METHODS:
        report = check_gradient(reference.rms_norm, off_by(0, factor), *problem(), method=method, directions=3)
        assert verdicts(report) == ["wrong", "right", "right"], report


def test_two_elements_wrong_by_opposite_amounts_are_rejected():
    # Along a direction of bare signs ±1 their errors cancel in one of two cases: here the only direction.
    def gradient(dy, x):
        dx = reference.rms_norm_backward(dy, x).dx
        return dx + np.array([1e-3, -1e-3] + 5 * [0.0])

    for seed in range(10):
        report = check_gradient(reference.rms_norm, gradient, problem((1, 7))[0], directions=1, seed=seed)
        assert report.verdict == "wrong", report


def rms_without_projection(dy, x):
    return dy / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def partial_rms_with_a_partial_sum(dy, x):
    k = 4
    rstd = 1 / np.sqrt(np.mean(x[..., :k] ** 2, axis=-1, keepdims=True) + 1e-6)
    xhat = x * rstd
    c = np.sum((dy * xhat)[..., :k], axis=-1, keepdims=True) / k
    return rstd * (dy - np.where(np.arange(x.shape[-1]) < k, xhat, 0.0) * c)


def layer_without_mean(dy, x):
    rstd = 1 / np.sqrt(np.var(x, axis=-1, keepdims=True) + 1e-6)
    xhat = (x - np.mean(x, axis=-1, keepdims=True)) * rstd
    return rstd * (dy - xhat * np.mean(dy * xhat, axis=-1, keepdims=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("function", "gradient"),
    [
        (reference.rms_norm, rms_without_projection),
        (lambda x: reference.rms_norm(x, p=0.5), partial_rms_with_a_partial_sum),
        (reference.layer_norm, layer_without_mean),
        (reference.rms_norm, lambda dy, x: np.zeros_like(x)),
        (reference.rms_norm, lambda dy, x: -reference.rms_norm_backward(dy, x).dx),
        (reference.rms_norm, lambda dy, x: np.full_like(x, np.nan)),
    ],
    ids=["no projection", "sum over k only", "no mean", "zero", "negative", "NaN"],
)
def test_classic_mistakes_are_rejected(function, gradient, method):
    report = check_gradient(function, gradient, problem()[0], method=method)
    assert report.verdict == "wrong", report


# Complex step: where it cannot be trusted


def halved(x):
    """Analytic to look at, and half of its derivative is lost: x · Re(x)."""
    return x * np.real(x)


@pytest.mark.parametrize(
    ("function", "derivative", "error"),
    [
        (lambda x: np.abs(x) ** 3, lambda x: 3 * x * np.abs(x), TypeError),
        (lambda x: np.asarray(x, dtype=np.float64) ** 2, lambda x: 2 * x, TypeError),
        (lambda x: np.array([float(v) for v in x.flat]).reshape(x.shape) ** 2, lambda x: 2 * x, TypeError),
        (np.arctan2, None, TypeError),
        (halved, lambda x: 2 * x, ValueError),
        (lambda x: x * np.conj(x), lambda x: 2 * x, ValueError),
        # Analytic in all but a small part of it.
        (lambda x: np.exp(x) + 1e-6 * np.conj(x), lambda x: np.exp(x) + 1e-6, ValueError),
    ],
    ids=["abs", "cast that warns", "float()", "no complex loop", "real part", "conj", "small conj"],
)
def test_a_function_that_is_not_analytic_is_measured_by_differences(function, derivative, error):
    if derivative is None:
        function, derivative = lambda x: np.arctan2(x, 2.0), lambda x: 2 / (4 + x * x)
    x = problem()[0]
    for factor, verdict in ((1.0, "right"), (1.001, "wrong"), (0.5, "wrong")):
        report = check_gradient(function, lambda dy, x, factor=factor: factor * dy * derivative(x), x)
        assert report.verdict == verdict, report
        assert report.method == "finite-difference"
    with pytest.raises(error, match=r"complex|imaginary|input types"):
        check_gradient(function, lambda dy, x: dy * derivative(x), x, method="complex-step")


def test_the_second_input_is_tried_too():
    # Analytic in x, not in weight: found only if the complex step is tried on each input.
    x, weight, _ = problem()
    report = check_gradient(
        lambda x, weight: x * np.abs(weight),
        lambda dy, x, weight: (dy * np.abs(weight), np.sum(dy * x, axis=0) * np.sign(weight)),
        x,
        weight,
    )
    assert report.ok, report
    assert report.method == "finite-difference"


def test_the_complex_step_sees_through_low_precision():
    for dtype in (np.float16, ml_dtypes.bfloat16):
        inputs = problem(dtype=dtype)
        assert check_gradient(reference.rms_norm, reference.rms_norm_backward, *inputs).ok
        assert check_gradient(reference.rms_norm, off_by(1, np.float32(1.2)), *inputs).verdict == "wrong"


# Low precision and rough functions: where differences cannot decide


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_outputs_are_inconclusive(dtype):
    for factor in (1.0, 1.001):
        gradient = off_by(0, np.float32(factor))
        report = check_gradient(
            reference.rms_norm, gradient, *problem(dtype=dtype), method="finite-difference", rtol=1e-3
        )
        assert report.verdict == "inconclusive", report
        assert not report.ok
        assert "float64" in str(report)


def test_rounded_outputs_are_inconclusive_below_their_rounding():
    x = problem()[0]
    for factor in (1.0, 1 + 1e-9):
        report = check_gradient(
            lambda x: np.exp(x).astype(np.float32), lambda dy, x, f=factor: f * dy * np.exp(x), x, rtol=1e-8
        )
        assert report.verdict == "inconclusive", report


@pytest.mark.engine  # seconds of plain NumPy: not each time
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_the_estimate_is_no_worse_than_it_says(norm, dtype):
    """What a right gradient is found to be off by is the estimate's error, and has to be within what it claims."""
    function, gradient = getattr(reference, norm), getattr(reference, f"{norm}_backward")
    for seed in range(6):
        for shape in ((4, 7), (2, 3), (3, 1)):
            inputs = problem(shape, dtype, seed)
            report = check_gradient(function, gradient, *inputs, method="finite-difference", seed=seed)
            assert report.verdict != "wrong", report
            rounding_of_the_gradient = 4 * np.finfo(dtype).eps
            for part in report.inputs:
                assert part.error <= part.estimate_error + rounding_of_the_gradient, report


# Scales


SCALES = [1e-300, 1e-16, 1e6, 1e16, 1e30, 1e300]


def one_row_scaled(scale, shape=(3, 9)):
    x = np.random.default_rng(3).normal(size=shape)
    x[1] *= scale
    return x


@pytest.mark.engine  # seconds of plain NumPy: not each time
@pytest.mark.parametrize("method", ["auto", "finite-difference"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("norm", "options"), [("rms_norm", {}), ("rms_norm", {"p": 0.4}), ("layer_norm", {})])
def test_one_row_of_another_scale(norm, options, scale, method):
    options = {"eps": 0.0} | options
    function, backward = getattr(reference, norm), getattr(reference, f"{norm}_backward")
    x = one_row_scaled(scale)
    for wrong_row, verdict in ((None, "right"), (0, "wrong"), (1, "wrong")):

        def gradient(dy, x, wrong_row=wrong_row):
            dx = backward(dy, x, **options).dx
            if wrong_row is not None:
                dx[wrong_row] *= 1.001
            return dx

        report = check_gradient(lambda x: function(x, **options), gradient, x, method=method, directions=2)
        assert report.verdict == verdict, (wrong_row, report)
        if verdict == "right":
            assert report.error <= report.estimate_error + 1e-15
            assert report.estimate_error < 1e-11


def softmax(x):
    e = np.exp(x - np.max(x.real, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


MATRIX = np.random.default_rng(4).normal(size=(9, 5))
FUNCTIONS = {
    "tanh": (np.tanh, lambda dy, x: dy * (1 - np.tanh(x) ** 2)),
    "softmax": (softmax, lambda dy, x: softmax(x) * (dy - np.sum(dy * softmax(x), axis=-1, keepdims=True))),
    "matmul": (lambda x: x @ MATRIX, lambda dy, x: dy @ MATRIX.T),
    "square": (np.square, lambda dy, x: 2 * x * dy),
    "log": (lambda x: np.log(x * x), lambda dy, x: 2 * dy / x),
    "relu": (lambda x: x * (x.real > 0), lambda dy, x: dy * (x > 0)),
    "shifted": (lambda x: 1 + x, lambda dy, x: dy.copy()),
    "columns": (
        lambda x: reference.rms_norm(x, axis=0),
        lambda dy, x: reference.rms_norm_backward(dy, x, axis=0).dx,
    ),
}
# Rows whose gradient is zero next to that of the others, or where only its rounding is left of it.
FLAT = {("tanh", 1e16), ("softmax", 1e16), ("columns", 1e16), ("columns", 1e-16)}


@pytest.mark.engine  # seconds of plain NumPy: not each time
@pytest.mark.parametrize("scale", [1e-16, 1e16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_user_s_function_of_rows_of_different_scales(name, scale):
    function, backward = FUNCTIONS[name]
    x = one_row_scaled(scale)
    for method in ("auto", "finite-difference"):
        report = check_gradient(function, backward, x, method=method, directions=2)
        assert report.verdict == "right", report
        for row in (0, 1):
            if row == 1 and (name, scale) in FLAT:
                continue
            factor = np.ones((3, 1))
            factor[row] = 1.001
            report = check_gradient(
                function, lambda dy, x, f=factor: f * backward(dy, x), x, method=method, directions=2
            )
            assert report.verdict == "wrong", (row, report)


def test_a_column_and_an_element_of_another_scale():
    # The gradient of the large elements cancels to nearly zero: what is left is its rounding, and no mistake.
    for index in ((slice(None), 3), (1, 3)):
        x = one_row_scaled(1.0)
        x[index] *= 1e16
        for method in ("auto", "finite-difference"):
            assert check_gradient(reference.rms_norm, reference.rms_norm_backward, x, method=method, directions=3)


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_a_ladder_of_scales(factor):
    # Neighbouring rows overlap in the size of their elements.
    x = problem()[0] * np.array([[1e4], [1.0], [1e-2], [1.0]])
    options = {"eps": 0.0}
    for row in range(4):

        def gradient(dy, x, row=row):
            dx = reference.rms_norm_backward(dy, x, **options).dx
            dx[row] *= factor
            return dx

        report = check_gradient(lambda x: reference.rms_norm(x, **options), gradient, x, method="finite-difference")
        assert report.verdict == ("right" if factor == 1.0 else "wrong"), report


# Rounded, rough and kinked functions


ROUGH = {
    "variance of rounding errors": (
        lambda x: reference.layer_norm((1e17 + x).astype(float), eps=0.0),
        lambda dy, x: reference.layer_norm_backward(dy, x, eps=0.0).dx,
    ),
    "rounded to float16": (
        lambda x: np.tanh(x).astype(np.float16) * np.float64(1.1),
        lambda dy, x: 1.1 * dy * (1 - np.tanh(x) ** 2),
    ),
    "float32 inside": (
        lambda x: rn.rms_norm(x.astype(np.float32), backend="reference").astype(np.float64),
        lambda dy, x: reference.rms_norm_backward(dy, x).dx,
    ),
    "slope of zero": (np.round, lambda dy, x: np.zeros_like(x)),
    "nothing but noise": (lambda x: np.sin(1e20 * x), lambda dy, x: 1e20 * dy * np.cos(1e20 * x)),
    "fine structure": (lambda x: x + 1e-6 * np.sin(1e6 * x), lambda dy, x: dy * (1 + np.cos(1e6 * x))),
    "kink": (lambda x: np.maximum(x, 0.0), lambda dy, x: dy * (x > 0)),
}


@pytest.mark.engine  # seconds of plain NumPy: not each time
@pytest.mark.parametrize("name", ROUGH)
def test_a_rough_function_is_never_wrong(name):
    function, gradient = ROUGH[name]
    x = np.random.default_rng(5).normal(size=(5, 9))
    if name == "kink":
        x[2, 3] = 0.0  # both 0 and 1 are slopes there
    report = check_gradient(function, gradient, x, method="finite-difference")
    assert report.verdict == "inconclusive", report
    assert not report
    assert "float64" not in str(report).splitlines()[-1]  # which it is


def test_noise_that_larger_steps_average_out():
    for function in (lambda x: (x + 1e16) - 1e16, lambda x: np.round(50 * x) / 50):
        assert check_gradient(function, lambda dy, x: dy.copy(), problem()[0], method="finite-difference")


@pytest.mark.parametrize("name", ["rounded to float16", "float32 inside"])
def test_a_rough_function_with_a_gross_error_is_wrong(name):
    function, gradient = ROUGH[name]
    x = np.random.default_rng(5).normal(size=(5, 9))
    report = check_gradient(function, lambda dy, x: 2 * gradient(dy, x), x, method="finite-difference")
    assert report.verdict == "wrong", report


def test_the_complex_step_counts_what_cancels():
    from rmsnorm_np._derivatives import complex_step
    from rmsnorm_np._lines import Line

    # mean(x²) - mean² leaves four digits of the variance, in y and in its derivative.
    rng = np.random.default_rng(6)
    x, v, dy = rng.normal(size=(3, 4, 7))
    x += 1e6

    def norm(x):
        mean = np.mean(x, axis=-1, keepdims=True)
        return (x - mean) / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) - mean**2 + 1.0)

    exact = np.sum(reference.layer_norm_backward(dy, x, eps=1.0).dx * v)
    value, error = complex_step(Line(norm, (x,), 0, v, dy))
    assert 1e-9 < abs(value - exact) <= error


def test_differences_agree_with_scipy_s():
    from scipy.differentiate import derivative

    from rmsnorm_np._derivatives import Differences
    from rmsnorm_np._lines import Line

    rng = np.random.default_rng(6)
    x, v, dy = rng.normal(size=(3, 4, 7))
    for norm in (reference.rms_norm, reference.layer_norm):

        def phi(t, norm=norm):
            return np.array([np.sum(dy * norm(x + step * v)) for step in t.flat]).reshape(t.shape)

        expected = derivative(phi, 0.0, initial_step=0.25, tolerances={"rtol": 1e-12}).df
        best = Differences(Line(norm, (x,), 0, v, dy)).best
        assert abs(best.value - expected) < 1e-10
        assert best.error < 1e-10


def test_a_domain_that_ends_near_x_gives_no_warning_and_a_verdict():
    x = np.array([0.01, 1.0, 3.0])  # the first steps reach below zero, where log warns and gives NaN
    report = check_gradient(np.log, lambda dy, x: dy / x, x, method="finite-difference")
    assert report.ok, report


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_of_exactly_zero_can_be_confirmed(method):
    # One element alone normalises to its sign: its gradient is zero, whatever dy. No relative error exists for it.
    options = {"eps": 0.0}
    report = check_gradient(
        lambda x: reference.rms_norm(x, **options),
        lambda dy, x: reference.rms_norm_backward(dy, x, **options),
        problem((4, 1))[0],
        method=method,
    )
    assert report.ok, report


def test_a_function_that_gives_nan_is_inconclusive():
    for method in METHODS:
        if method == "finite-difference":
            report = check_gradient(lambda x: x * np.nan, lambda dy, x: dy, problem()[0], method=method)
            assert report.verdict == "inconclusive", report
        else:
            with pytest.raises(ValueError, match="complex step of input 0"):
                check_gradient(lambda x: x * np.nan, lambda dy, x: dy, problem()[0], method=method)


# Kernels as users have them


@numba.njit
def numba_norm(x):  # (n,)
    total = 0.0
    for value in x:
        total += value * value
    rstd = 1.0 / math.sqrt(total / len(x))
    y = np.empty_like(x)
    for i in range(len(x)):
        y[i] = x[i] * rstd
    return y


def test_a_numba_kernel_without_a_complex_version():
    report = check_gradient(numba_norm, lambda dy, x: reference.rms_norm_backward(dy, x, eps=0.0), problem()[1])
    assert report.ok, report
    assert report.method == "finite-difference"


def test_a_float32_kernel_that_takes_nothing_else():
    def kernel(x):
        if x.dtype != np.float32:
            raise TypeError(f"float32 only, not {x.dtype}")
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))

    for factor, verdict in ((1.0, "right"), (1.001, "wrong")):
        report = check_gradient(
            kernel,
            lambda dy, x, f=factor: (f * reference.rms_norm_backward(dy, x, eps=0.0).dx).astype(np.float32),
            problem(dtype=np.float32)[0],
        )
        assert report.verdict == verdict, report


def test_a_kernel_may_reuse_its_buffers_and_overwrite_its_arguments():
    buffer = np.empty((4, 7))

    def function(x):
        np.exp(x, out=buffer)
        x[...] = np.nan
        return buffer

    def gradient(dy, x):
        dy *= np.exp(x)
        x[...] = np.nan
        return dy

    x = problem()[0]
    before = x.copy()
    report = check_gradient(function, gradient, x, method="finite-difference")
    assert report.ok, report
    assert report == check_gradient(np.exp, lambda dy, x: dy * np.exp(x), x, method="finite-difference")
    np.testing.assert_array_equal(x, before)


def test_a_scalar_loss_and_a_bare_gradient():
    report = check_gradient(lambda x: np.sum(np.sin(x)), lambda dy, x: dy * np.cos(x), problem()[0])
    assert report.ok, report


def test_a_scalar_input_and_a_scalar_gradient():
    for x in (0.3, np.float64(0.3), np.array(0.3)):
        report = check_gradient(np.sin, lambda dy, x: np.float64(dy * np.cos(x)), x)
        assert report.ok, report


def test_a_function_of_a_list_of_arrays():
    arrays = [np.random.default_rng(7).normal(size=n) for n in (2, 3, 4)]
    report = check_gradient(
        lambda *arrays: np.concatenate(arrays) ** 2,
        lambda dy, *arrays: np.split(2 * dy * np.concatenate(arrays), [2, 5]),
        *arrays,
    )
    assert verdicts(report) == ["right"] * 3, report


def test_what_is_not_differentiated_is_handed_through():
    x, weight, _ = problem()
    report = check_gradient(
        lambda x, none, power, weight: x ** int(power) * weight,
        lambda dy, x, none, power, weight: (int(power) * x * weight * dy, None, None, None),
        x,
        None,
        2,
        weight,
    )
    assert report.ok, report
    assert [part.position for part in report.inputs] == [0]
    assert check_gradient(reference.rms_norm, reference.rms_norm_backward, x).ok  # dx, None, None for x alone


# The report


def test_a_report_is_true_only_if_the_gradient_is_right():
    x = problem()[0]
    for factor, rtol, verdict in ((1.0, None, "right"), (1.001, None, "wrong"), (1.0, 1e-16, "inconclusive")):
        report = check_gradient(
            reference.rms_norm, lambda dy, x, f=factor: f * reference.rms_norm_backward(dy, x).dx, x, rtol=rtol
        )
        assert report.verdict == verdict
        assert bool(report) is (verdict == "right")


def test_raise_on_error():
    inputs = problem()
    with pytest.raises(GradientError, match=r"gradient wrong \(complex-step\)\n.*\n  input 1 wrong: error") as caught:
        check_gradient(reference.rms_norm, off_by(1, 1.001), *inputs, raise_on_error=True)
    assert caught.value.report.inputs[1].verdict == "wrong"
    with pytest.raises(GradientError, match="gradient inconclusive"):
        check_gradient(
            lambda x: x.astype(np.float32), lambda dy, x: dy.astype(float), inputs[0], rtol=1e-9, raise_on_error=True
        )
    assert check_gradient(reference.rms_norm, reference.rms_norm_backward, *inputs, raise_on_error=True).ok


def test_the_worst_input_speaks_for_the_report():
    def gradients(dy, x, weight):
        return dy * weight * 1.01, np.sum(dy * x, axis=0).astype(np.float16)

    x, weight, _ = problem()
    report = check_gradient(lambda x, weight: x * weight, gradients, x, weight)
    assert verdicts(report) == ["wrong", "right"]
    assert report.error == max(part.error for part in report.inputs)
    assert report.estimate_error == max(part.estimate_error for part in report.inputs)
    assert report.inputs[0].tolerance == pytest.approx(4e-10, rel=0.05)
    assert report.inputs[1].tolerance == pytest.approx(1.6e-2, rel=0.05)  # of float16, the least precise


def test_more_directions_find_no_smaller_error():
    x = problem()[0]
    errors = [check_gradient(np.sin, lambda dy, x: 1.01 * dy * np.cos(x), x, directions=d).error for d in (1, 3, 30)]
    assert errors[0] <= errors[1] <= errors[2]  # the first directions are the same ones
    assert errors[0] < errors[2]


def test_the_seed_decides():
    inputs = problem()
    first, again, other = (check_gradient(reference.rms_norm, off_by(0, 1.1), *inputs, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.error != other.error


# Mistakes in the call


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "guess"}, ValueError, "method is 'guess', expected 'auto'"),
        ({"directions": 0}, ValueError, "directions is 0, expected at least 1"),
        ({"rtol": 0.0}, ValueError, "rtol is 0.0"),
        ({"rtol": float("nan")}, ValueError, "rtol is nan"),
        ({"function": lambda x: np.argmax(x)}, TypeError, "function returned int64, expected an array of floats"),
        ({"function": lambda x: (x, x)}, TypeError, "function returned a tuple of 2, expected one array"),
        ({"function": lambda x: [x]}, TypeError, "function returned a list of 1, expected one array"),
        ({"gradient": lambda dy, x: dy.sum()}, ValueError, r"gradient of input 0 has shape \(\), expected .* \(4, 7\)"),
        ({"gradient": lambda dy, x: 1.0}, ValueError, r"gradient of input 0 has shape \(\), expected .* \(4, 7\)"),
        ({"gradient": lambda dy, x: {0: dy}}, TypeError, "gradient returned dict, expected an array for each input"),
        ({"x": [np.ones(2), np.ones(3)]}, ValueError, "input 0 is a list of arrays of different shapes"),
        ({"gradient": lambda dy, x: ()}, ValueError, "gradient returned 0 values, expected one for each of 1 inputs"),
        ({"gradient": lambda dy, x: (dy, dy)}, ValueError, "gradient returned 2 values"),
        ({"gradient": lambda dy, x: (None,)}, ValueError, "every gradient is None"),
        ({"gradient": lambda dy, x: dy[0]}, ValueError, r"gradient of input 0 has shape \(7,\), expected .* \(4, 7\)"),
        ({"gradient": lambda dy, x: dy > 0}, TypeError, "input 0 is float64, its gradient bool, expected floats"),
        ({"x": np.arange(7)}, TypeError, "input 0 is int64, its gradient float64, expected floats"),
        ({"x": np.full((4, 7), np.inf)}, ValueError, r"input 0 has shape \(4, 7\), expected .* all finite"),
        ({"x": np.empty((0, 7))}, ValueError, r"input 0 has shape \(0, 7\), expected at least one element"),
    ],
)
def test_mistakes_in_the_call(change, error, message):
    arguments = {"function": lambda x: x * 2.0, "gradient": lambda dy, x: dy * 2.0, "x": problem()[0]} | change
    function, gradient, x = (arguments.pop(name) for name in ("function", "gradient", "x"))
    with pytest.raises(error, match=message):
        check_gradient(function, gradient, x, **arguments)


def test_other_errors_of_the_function_are_its_own():
    def function(x):
        if np.iscomplexobj(x):
            raise KeyError("a bug, not a refusal")
        return x

    with pytest.raises(KeyError, match="a bug"):
        check_gradient(function, lambda dy, x: dy, problem()[0])


def test_importing_it_does_not_import_scipy():
    code = "import sys, rmsnorm_np.gradcheck; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
