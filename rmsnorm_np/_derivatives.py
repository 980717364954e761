"""The derivative of a function along a line through its inputs, measured by complex step or by differences.

:mod:`rmsnorm_np.gradcheck` tells what the two are, and compares what they give with what a gradient claims.
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

# The complex step, in units of x: its square is lost even beside 1e-40, and it is still a normal float32.
_COMPLEX_STEP = 1e-30
# The first, largest step of the differences, in units of x: RMSNorm has its nearest poles about one unit away. The
# others are for inputs with parts of very different size, and for a function whose domain ends close to x.
_FIRST_STEPS = (1.0, 2.0**-6, 2.0**-12)
# The 8th-order formula on ±h, ±h/2, ±h/4, ±h/8 multiplies independent errors of phi by 8.3/h, its weights' 2-norm.
_NOISE_GAIN = 8.3
# A gradient so small that a step of one unit moves y by less than this share of itself is compared with that share:
# else nobody could confirm a gradient of exactly zero.
SMALLEST_SHARE = 1e-3


@dataclass(frozen=True)
class Line:
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
        moved = widened(self.x) + t * self.v
        moved = moved if isinstance(t, complex) else moved.astype(self.x.dtype)
        # A step may leave the function's domain. That it gives NaN there is an answer and no reason for a warning.
        with np.errstate(all="ignore"):
            return call(self.function, (*self.point[: self.position], moved, *self.point[self.position + 1 :]))

    def terms(self, y: Array) -> Array:
        """The products whose sum is <dy, y>."""
        return widened(self.dy) * widened(y)

    def phi(self, t: Array) -> Array:
        return np.array([float(np.sum(self.terms(self.y(float(step))))) for step in t.flat]).reshape(t.shape)

    def in_double(self) -> Line:
        return replace(self, point=tuple(widened(x) if is_float(x) else x for x in self.point))


class Estimate(NamedTuple):
    value: float  # of d phi / dt at t = 0
    error: float  # that the value may have


class NotConfirmedError(ValueError):
    """Complex step and finite differences disagree."""


def complex_step(line: Line) -> Estimate:
    with warnings.catch_warnings():
        # A cast to real is found by what it does to the result, here and in `_confirm_complex_step`.
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        y = line.in_double().y(1j * _COMPLEX_STEP)
    if not np.iscomplexobj(y):
        raise TypeError(f"the complex step needs a complex output for complex input, function returned {y.dtype}")
    terms = line.terms(y.imag / _COMPLEX_STEP)
    # Nothing cancels on the way to the terms, so that 16 roundings of each is generous.
    return Estimate(float(np.sum(terms)), 16 * eps(y.imag) * float(np.sum(np.abs(terms))))


def finite_difference(line: Line) -> Estimate:
    noise = _NOISE_GAIN * _noise(line)
    best = Estimate(np.nan, np.inf)
    for first_step in _FIRST_STEPS:
        estimate, noise_was_reached = _shrinking_differences(line, first_step, noise)
        best = min(best, estimate, key=lambda estimate: estimate.error)
        if noise_was_reached:
            break
    return best


def _noise(line: Line) -> float:
    """How much of phi is rounding: that of y, and that of x as four random changes of its last digit show it."""
    y, x, rng = line.y(0.0), line.x, np.random.default_rng(0)
    nudges = [replace(line, v=rng.choice([-1.0, 1.0], x.shape) * widened(x)).y(eps(x)) for _ in range(4)]
    changes = [np.sum(line.terms(nudged) - line.terms(y)) for nudged in nudges]
    return eps(y) * norm(line.terms(y)) + norm(np.array(changes))


def _shrinking_differences(line: Line, first_step: float, noise: float) -> tuple[Estimate, bool]:
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
    estimate = Estimate(float(result.df), error) if np.isfinite(error) else Estimate(np.nan, np.inf)
    return estimate, bool(result.error <= rounding(result))


def choose(method: Literal["auto"] | Method, lines: Sequence[Line]) -> Method:
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


def _confirm_complex_step(line: Line) -> None:
    """Raise unless differences, of the same function in the same precision, give the complex step's derivative.

    A function that drops an imaginary part, or takes a modulus or conjugate of it, is found here. Differences that
    are off by more than 1 % themselves confirm nothing.
    """
    line = line.in_double()
    step, difference = complex_step(line), finite_difference(line)
    size = max(abs(step.value), SMALLEST_SHARE * norm(line.terms(line.y(0.0))))
    apart = abs(step.value - difference.value)
    if not (apart <= step.error + difference.error and difference.error <= 0.01 * size):
        raise NotConfirmedError(
            f"the complex step of input {line.position} gives {step.value!r}, finite differences give "
            f"{difference.value!r} with an error up to {difference.error:.1e}: expected the same. The function may "
            "not be analytic: abs, conj, real, maximum and casts are not"
        )


def _refusals() -> tuple[type[Exception], ...]:
    """What says that the complex step cannot be taken: TypeError, and Numba's own kind of it where Numba is in use."""
    numba_errors = sys.modules.get("numba.core.errors")
    ours = (TypeError, NotConfirmedError)
    return ours if numba_errors is None else (*ours, numba_errors.TypingError)


def call(function: Callable[..., Any], point: Point) -> Array:
    """The output, with copies going in and a copy coming out: the function may reuse its buffers."""
    return np.array(function(*copies(point)))


def copies(point: Point) -> list[Array | None]:
    return [None if x is None else x.copy() for x in point]


def is_float(x: Array | None) -> bool:
    # ml_dtypes' bfloat16 is of NumPy's kind "void": only its name tells.
    return x is not None and (x.dtype.kind == "f" or "float" in x.dtype.name)


def widened(x: Array) -> Array:
    return x.astype(np.promote_types(x.dtype, np.float64))


def eps(x: Array) -> float:
    """Distance of 1 from the next number of x's dtype; `numpy.finfo` does not know bfloat16."""
    return float(np.spacing(np.ones((), x.dtype)))


def norm(terms: Array) -> float:
    return float(np.linalg.norm(terms.ravel()))
