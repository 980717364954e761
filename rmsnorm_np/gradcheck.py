"""Is this gradient the gradient of that function? A numerical check, for this package's kernels and for yours.

The function's outputs y are reduced to one number, phi = <dy, y>, with a random dy. For each input x and several
random directions v, the derivative of phi along v is measured and compared with what the gradient claims:

    d/dt <dy, function(x + t v)> at t = 0    against    <dx, v>    with dx = gradient(dy, x)

It is measured in one of two ways, and either one tells how far its own figure may be off:

    complex-step         the imaginary part of function(x + ih v), over h, with an h so small that its square is
                         nothing beside 1. No difference is taken, so nothing cancels: exact but for rounding. It needs
                         a function that takes complex arrays and is analytic: no abs, conj, maximum or cast to real.
    finite-difference    central differences of 8th order at shrinking steps, `scipy.differentiate.derivative`,
                         until the rounding of the outputs weighs more than the step. It asks nothing of the function
                         but to be smooth near x.

A check must not blame a right gradient, nor pass a wrong one for want of precision. So there is a third verdict,
"inconclusive", for a measurement too inexact to decide at the tolerance that was asked for.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]
    Point: TypeAlias = tuple[Any, ...]  # the inputs: arrays, and None where none was given

Method: TypeAlias = Literal["complex-step", "finite-difference"]
Verdict: TypeAlias = Literal["right", "wrong", "inconclusive"]

# The complex step, in units of x: its square is lost even beside 1e-40, and it is still a normal float32.
_COMPLEX_STEP = 1e-30
# The first, largest step of the differences, in units of x: RMSNorm has its nearest poles about one unit away. The
# others are for inputs with parts of very different size, and for a function whose domain ends close to x.
_FIRST_STEPS = (1.0, 2.0**-6, 2.0**-12)
# The 8th-order formula on ±h, ±h/2, ±h/4, ±h/8 multiplies independent errors of phi by 8.3/h, its weights' 2-norm.
_NOISE_GAIN = 8.3
# A gradient so small that a step of one unit moves y by less than this share of itself is compared with that share:
# else nobody could confirm a gradient of exactly zero.
_SMALLEST_SHARE = 1e-3


class GradientError(AssertionError):
    """A gradient that did not pass, from ``check_gradient(..., raise_on_error=True)``. ``report`` has the figures."""

    def __init__(self, report: GradientReport) -> None:
        super().__init__(str(report))
        self.report = report


class InputReport(NamedTuple):
    """What was found for one input. All three figures are relative: 1e-3 means off by 0.1 % of the gradient.

    Attributes
    ----------
    position : int
        Which of the inputs, counted from 0.
    verdict : {"right", "wrong", "inconclusive"}
        "right" if the gradient is within the tolerance even where the estimate is off by all of its own error, "wrong"
        if it is outside even then, in any direction. Between the two it cannot be told: "inconclusive".
    error : float
        Largest difference of gradient and estimate over the directions.
    estimate_error : float
        Largest error that the estimate itself may have.
    tolerance : float
        Largest error accepted.
    """

    position: int
    verdict: Verdict
    error: float
    estimate_error: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"input {self.position} {self.verdict}: error {self.error:.1e}, "
            f"of which the estimate's own up to {self.estimate_error:.1e}, tolerance {self.tolerance:.1e}"
        )


@dataclass(frozen=True)
class GradientReport:
    """The outcome of `check_gradient`; ``print(report)`` shows it in words.

    Attributes
    ----------
    inputs : tuple of InputReport
        One for each input that was checked.
    method : {"complex-step", "finite-difference"}
        How the estimates were made.
    """

    inputs: tuple[InputReport, ...]
    method: Method

    @property
    def verdict(self) -> Verdict:
        """The worst of all inputs: wrong if any gradient is, else inconclusive if any is, else right."""
        return _worst([part.verdict for part in self.inputs])

    @property
    def ok(self) -> bool:
        """Whether every gradient was found right. Inconclusive is not ok."""
        return self.verdict == "right"

    @property
    def error(self) -> float:
        """Largest relative error of any input's gradient."""
        return max(part.error for part in self.inputs)

    @property
    def estimate_error(self) -> float:
        """Largest relative error that the estimates themselves may have."""
        return max(part.estimate_error for part in self.inputs)

    def __str__(self) -> str:
        lines = [f"gradient {self.verdict} ({self.method})", *(f"  {part}" for part in self.inputs)]
        if self.verdict == "inconclusive":
            lines.append("  too inexact to decide: check the same code on float64 inputs, or pass a larger rtol")
        return "\n".join(lines)


def check_gradient(
    function: Callable[..., Any],
    gradient: Callable[..., Any],
    *inputs: Any,
    rtol: float | None = None,
    method: Literal["auto", "complex-step", "finite-difference"] = "auto",
    directions: int = 8,
    seed: int = 0,
    raise_on_error: bool = False,
) -> GradientReport:
    """Compare a gradient with numerical derivatives of its function.

    Parameters
    ----------
    function : callable
        ``function(*inputs)`` returns the output y, one array of floats of any shape. It is called with copies, so
        it may write to its arguments, and it must give the same output for the same input.
    gradient : callable
        ``gradient(dy, *inputs)`` returns the gradients of ``sum(dy * y)``: a sequence with one array for each input,
        of that input's shape, or None for an input not to be checked; for a single input, the bare array will do.
        dy has y's shape and dtype. More values than inputs may follow if they are None, so that
        ``rms_norm_backward`` can be checked with ``x`` alone.
    *inputs : array_like or None
        The point at which to check: at least one array of floats, bfloat16 included. None, and arrays of other
        types, are handed through; their gradient must be None.
    rtol : float, optional
        Largest relative error accepted in the derivative along a direction. By default ``eps ** 0.6`` of the least
        precise of y, the input and its gradient: 4e-10 for float64, 7e-5 for float32, 1.6e-2 for float16 and
        5.4e-2 for bfloat16. That leaves room for the rounding of a plain kernel and none for a wrong formula.
    method : {"auto", "complex-step", "finite-difference"}, default "auto"
        How to measure; see the module's text. "auto" takes the complex step if the function accepts complex input and
        the result agrees with finite differences, tried on one direction for each input; else finite differences.
    directions : int, default 8
        Random directions for each input. No element of a direction is near zero, so an error in one element shows.
    seed : int, default 0
        Seed of dy and of the directions. The same seed gives the same report.
    raise_on_error : bool, default False
        Raise `GradientError` unless every gradient is found right.

    Returns
    -------
    GradientReport
        ``report.ok``, ``report.verdict``, ``report.error``, and one `InputReport` for each input checked.

    Raises
    ------
    GradientError
        If ``raise_on_error`` and the verdict is "wrong" or "inconclusive".
    ValueError
        If there is nothing to check, an input is empty or not finite, a gradient is missing or has another shape than
        its input, an option is out of range, or the complex step was asked for and finite differences do not
        confirm it.
    TypeError
        If a gradient is given for an input that is not of floats, if y is not of floats, or if the complex step was
        asked for and the function does not take complex input or returns real output for it.

    Notes
    -----
    Let v be a direction, of the size of the input's mean absolute value, and J v the change of y along it. The
    error is ``|<dy, J v> - <dx, v>|`` over the 2-norm of the terms of ``<dx, v>``, which is what that sum of random
    signs comes to. A gradient that changes y by less than 0.1 % of itself in a step of one v is compared with those
    0.1 %, as differences cannot tell it from zero.

    *Low precision.* Finite differences see a float32 kernel through its rounded outputs. They take large steps then
    and count the rounding as an error of the estimate, about 1e-5: a right gradient passes at the default tolerance
    and one wrong by 0.1 % fails. Where the rounding counts for more (outputs of
    float16 and bfloat16, a row with next to no variance) the verdict is "inconclusive": check the code on float64
    inputs instead, where the mathematics is the same. The complex step has no such limit: it runs the function in
    double precision whatever the inputs' dtypes.

    The complex step: Squire and Trapp, "Using complex variables to estimate derivatives of real functions",
    SIAM Review 40, 1998.

    Examples
    --------
    A kernel of your own, whose gradient forgets that the RMS depends on x as well:

    >>> import numpy as np
    >>> from rmsnorm_np.gradcheck import check_gradient
    >>> def my_norm(x, w):
    ...     return x * w / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    >>> def my_norm_backward(dy, x, w):
    ...     rstd = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    ...     return dy * w * rstd, np.sum(dy * x * rstd, axis=0)
    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.normal(size=(4, 7)), rng.normal(size=7)
    >>> report = check_gradient(my_norm, my_norm_backward, x, w)
    >>> report.ok
    False
    >>> [(part.position, part.verdict) for part in report.inputs]
    [(0, 'wrong'), (1, 'right')]

    This package's gradient of the same function:

    >>> import rmsnorm_np as rn
    >>> check_gradient(my_norm, lambda *args: rn.rms_norm_backward(*args, eps=0.0), x, w).ok
    True
    """
    if method not in ("auto", "complex-step", "finite-difference"):
        raise ValueError(f"method is {method!r}, expected 'auto', 'complex-step' or 'finite-difference'")
    if directions < 1:
        raise ValueError(f"directions is {directions!r}, expected at least 1")
    if rtol is not None and not 0.0 < rtol < 1.0:
        raise ValueError(f"rtol is {rtol!r}, expected a number with 0 < rtol < 1")

    point: Point = tuple(None if x is None else np.array(x) for x in inputs)
    y = _call(function, point)
    if not _is_float(y):
        raise TypeError(f"function returned {y.dtype}, expected an array of floats")
    rng = np.random.default_rng(seed)
    dy = _random(rng, y.shape).astype(y.dtype)
    claims = _claims(gradient, dy, point)
    lines = {
        position: [_Line(function, point, position, _direction(rng, point[position]), dy) for _ in range(directions)]
        for position in claims
    }
    method = _choose(method, [along[0] for along in lines.values()])

    parts = []
    for position, dx in claims.items():
        tolerance = max(_eps(y), _eps(point[position]), _eps(dx)) ** 0.6 if rtol is None else rtol
        figures = [_compare(line, dx, y, method) for line in lines[position]]
        verdict = _worst([_verdict(error, slack, tolerance) for error, slack in figures])
        errors, slacks = zip(*figures, strict=True)
        parts.append(InputReport(position, verdict, max(errors), max(slacks), tolerance))
    report = GradientReport(tuple(parts), method)
    if raise_on_error and not report.ok:
        raise GradientError(report)
    return report


# The line through x along v, and how phi is differentiated on it


@dataclass(frozen=True)
class _Line:
    """phi(t) = <dy, function(x + t v)>, where x is the input at `position` and the other inputs stay."""

    function: Callable[..., Any]
    point: Point
    position: int
    v: Array
    dy: Array

    @property
    def x(self) -> Array:
        x: Array = self.point[self.position]
        return x

    def y(self, t: complex) -> Array:
        """The function's output at x + t v; x keeps its dtype for a real t, and is complex for a complex one."""
        moved = _widened(self.x) + t * self.v
        moved = moved if isinstance(t, complex) else moved.astype(self.x.dtype)
        # A step may leave the function's domain. That it gives NaN there is an answer and no reason for a warning.
        with np.errstate(all="ignore"):
            return _call(self.function, (*self.point[: self.position], moved, *self.point[self.position + 1 :]))

    def terms(self, y: Array) -> Array:
        """The products whose sum is <dy, y>."""
        return _widened(self.dy) * _widened(y)

    def phi(self, t: Array) -> Array:
        return np.array([float(np.sum(self.terms(self.y(float(step))))) for step in t.flat]).reshape(t.shape)

    def in_double(self) -> _Line:
        return replace(self, point=tuple(_widened(x) if _is_float(x) else x for x in self.point))


class _Estimate(NamedTuple):
    value: float  # of d phi / dt at t = 0
    error: float  # that the value may have


class _NotConfirmedError(ValueError):
    """Complex step and finite differences disagree."""


def _complex_step(line: _Line) -> _Estimate:
    with warnings.catch_warnings():
        # A cast to real is found by what it does to the result, here and in `_confirm_complex_step`.
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        y = line.in_double().y(1j * _COMPLEX_STEP)
    if not np.iscomplexobj(y):
        raise TypeError(f"the complex step needs a complex output for complex input, function returned {y.dtype}")
    terms = line.terms(y.imag / _COMPLEX_STEP)
    # Nothing cancels on the way to the terms, so that 16 roundings of each is generous.
    return _Estimate(float(np.sum(terms)), 16 * _eps(y.imag) * float(np.sum(np.abs(terms))))


def _finite_difference(line: _Line) -> _Estimate:
    noise = _NOISE_GAIN * _noise(line)
    best = _Estimate(np.nan, np.inf)
    for first_step in _FIRST_STEPS:
        estimate, noise_was_reached = _shrinking_differences(line, first_step, noise)
        best = min(best, estimate, key=lambda estimate: estimate.error)
        if noise_was_reached:
            break
    return best


def _noise(line: _Line) -> float:
    """How much of phi is rounding: that of y, and that of x as four random changes of its last digit show it."""
    y, x, rng = line.y(0.0), line.x, np.random.default_rng(0)
    nudges = [replace(line, v=rng.choice([-1.0, 1.0], x.shape) * _widened(x)).y(_eps(x)) for _ in range(4)]
    changes = [np.sum(line.terms(nudged) - line.terms(y)) for nudged in nudges]
    return _eps(y) * _norm(line.terms(y)) + _norm(np.array(changes))


def _shrinking_differences(line: _Line, first_step: float, noise: float) -> tuple[_Estimate, bool]:
    """Halve the step until the outputs' rounding outweighs the change from one estimate to the next.

    Both make up the error: the last change, which bounds what is left of the formula's own error, and the rounding.
    """
    from scipy.differentiate import derivative

    def rounding(result: Any) -> float:
        return float(noise / first_step * 2.0 ** (result.nit - 1))

    def stop_at_noise(result: Any) -> None:
        if result.error <= rounding(result):
            raise StopIteration

    result = derivative(
        line.phi,
        0.0,
        initial_step=first_step,
        maxiter=40,
        tolerances={"atol": 0.0, "rtol": 0.0},
        callback=stop_at_noise,
    )
    error = float(result.error + rounding(result))
    estimate = _Estimate(float(result.df), error) if np.isfinite(error) else _Estimate(np.nan, np.inf)
    return estimate, bool(result.error <= rounding(result))


def _choose(method: Literal["auto"] | Method, lines: Sequence[_Line]) -> Method:
    """The method that "auto" stands for, tried on `lines`."""
    if method == "finite-difference":
        return method
    try:
        for line in lines:
            _confirm_complex_step(line)
    except _refusals():
        if method == "complex-step":
            raise
        return "finite-difference"
    return "complex-step"


def _confirm_complex_step(line: _Line) -> None:
    """Raise unless differences, of the same function in the same precision, give the complex step's derivative.

    A function that drops an imaginary part, or takes a modulus or conjugate of it, is found here. Differences that
    are off by more than 1 % themselves confirm nothing.
    """
    line = line.in_double()
    step, difference = _complex_step(line), _finite_difference(line)
    size = max(abs(step.value), _SMALLEST_SHARE * _norm(line.terms(line.y(0.0))))
    apart = abs(step.value - difference.value)
    if not (apart <= step.error + difference.error and difference.error <= 0.01 * size):
        raise _NotConfirmedError(
            f"the complex step of input {line.position} gives {step.value!r}, finite differences give "
            f"{difference.value!r} with an error up to {difference.error:.1e}: expected the same. The function may "
            "not be analytic: abs, conj, real, maximum and casts are not"
        )


def _refusals() -> tuple[type[Exception], ...]:
    """What says that the complex step cannot be taken: TypeError, and Numba's own kind of it where Numba is in use."""
    numba_errors = sys.modules.get("numba.core.errors")
    ours = (TypeError, _NotConfirmedError)
    return ours if numba_errors is None else (*ours, numba_errors.TypingError)


# Verdicts


def _compare(line: _Line, dx: Array, y: Array, method: Method) -> tuple[float, float]:
    """Error of <dx, v> and error of the estimate it is compared with, relative to the size of the terms."""
    estimate = _complex_step(line) if method == "complex-step" else _finite_difference(line)
    claimed = _widened(dx) * line.v
    if not np.all(np.isfinite(claimed)):
        return np.inf, estimate.error
    size = max(_norm(claimed), _SMALLEST_SHARE * _norm(line.terms(y))) or 1.0
    error = abs(float(np.sum(claimed)) - estimate.value) / size
    return (error if np.isfinite(error) else np.inf), estimate.error / size


def _verdict(error: float, slack: float, tolerance: float) -> Verdict:
    """The true error lies within error ± slack: right if all of that is within the tolerance, wrong if none is."""
    if np.isfinite(slack):
        if error + slack <= tolerance:
            return "right"
        if error - slack > tolerance:
            return "wrong"
    return "inconclusive"


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=("right", "inconclusive", "wrong").index)


# Arguments and arrays


def _claims(gradient: Callable[..., Any], dy: Array, point: Point) -> dict[int, Array]:
    """The gradients to check, by the position of their input."""
    result = gradient(dy.copy(), *_copies(point))
    gradients = (result,) if isinstance(result, np.ndarray) else tuple(result)
    if len(gradients) < len(point) or any(dx is not None for dx in gradients[len(point) :]):
        raise ValueError(f"gradient returned {len(gradients)} values, expected one for each of {len(point)} inputs")
    claims = {}
    for position, (x, dx) in enumerate(zip(point, gradients, strict=False)):
        if dx is None:
            continue
        dx = np.array(dx)
        if not (_is_float(x) and _is_float(dx)):
            given = None if x is None else x.dtype
            raise TypeError(f"input {position} is {given}, its gradient {dx.dtype}, expected floats or gradient None")
        if dx.shape != x.shape:
            raise ValueError(f"gradient of input {position} has shape {dx.shape}, expected the input's {x.shape}")
        if x.size == 0 or not np.all(np.isfinite(_widened(x))):
            raise ValueError(f"input {position} has shape {x.shape}, expected at least one element, and all finite")
        claims[position] = dx
    if not claims:
        raise ValueError("every gradient is None, expected at least one to check")
    return claims


def _call(function: Callable[..., Any], point: Point) -> Array:
    """The output, with copies going in and a copy coming out: the function may reuse its buffers."""
    return np.array(function(*_copies(point)))


def _copies(point: Point) -> list[Array | None]:
    return [None if x is None else x.copy() for x in point]


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Random signs and sizes, none near zero: no element can hide, and no two cancel each other."""
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape)


def _direction(rng: np.random.Generator, x: Array) -> Array:
    """A random direction of the size of x: a step of one along it changes x by about itself."""
    return _random(rng, x.shape) * (float(np.mean(np.abs(_widened(x)))) or 1.0)


def _is_float(x: Array | None) -> bool:
    # ml_dtypes' bfloat16 is of NumPy's kind "void": only its name tells.
    return x is not None and (x.dtype.kind == "f" or "float" in x.dtype.name)


def _widened(x: Array) -> Array:
    return x.astype(np.promote_types(x.dtype, np.float64))


def _eps(x: Array) -> float:
    """Distance of 1 from the next number of x's dtype; `numpy.finfo` does not know bfloat16."""
    return float(np.spacing(np.ones((), x.dtype)))


def _norm(terms: Array) -> float:
    return float(np.linalg.norm(terms.ravel()))
