"""Is this gradient the gradient of that function? A numerical check, for this package's kernels and for yours.

The function's outputs y are reduced to one number, phi = <dy, y>, with a random dy. For each input x and several
random directions v, the derivative of phi along v is measured and compared with what the gradient claims::

    d/dt <dy, function(x + t v)> at t = 0    against    <dx, v>    with dx = gradient(dy, x)

It is measured in one of two ways, and either one tells how far its own figure may be off:

complex-step
    The imaginary part of function(x + ih v), over h, with an h so small that its square is nothing beside 1. No
    difference is taken, so nothing cancels: exact but for rounding. It needs a function that takes complex arrays and
    is analytic: no abs, conj, maximum or cast to real.

finite-difference
    Central differences of 8th order at shrinking steps, `scipy.differentiate.derivative`, until the rounding of the
    outputs weighs more than the step. It asks nothing of the function but to be smooth near x.

A check must not blame a right gradient, nor pass a wrong one for want of precision. So there is a third verdict,
"inconclusive", for a measurement too inexact to decide at the tolerance that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from rmsnorm_np._derivatives import Differences, Estimate, Method, choose, complex_step
from rmsnorm_np._lines import Line, call, copies, directions_of, eps, is_float, norm, random_signs, widened

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rmsnorm_np._lines import Array, Point

Verdict: TypeAlias = Literal["right", "wrong", "inconclusive"]


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
    y = call(function, point)
    if not is_float(y):
        raise TypeError(f"function returned {y.dtype}, expected an array of floats")
    rng = np.random.default_rng(seed)
    dy = random_signs(rng, y.shape).astype(y.dtype)
    claims = _claims(gradient, dy, point)
    lines = {
        position: [
            [Line(function, point, position, v, dy) for v in scale]
            for scale in directions_of(rng, point[position], directions)
        ]
        for position in claims
    }
    method, units = choose(method, [scale[0] for scales in lines.values() for scale in scales])
    of_scale = iter(units)

    parts = []
    for position, dx in claims.items():
        tolerance = max(eps(y), eps(point[position]), eps(dx)) ** 0.6 if rtol is None else rtol
        findings = [
            _compare(line, dx, method, unit, tolerance)
            for scale, unit in zip(lines[position], of_scale, strict=False)
            for line in scale
        ]
        verdicts, errors, slacks = zip(*findings, strict=True)
        parts.append(InputReport(position, _worst(verdicts), max(errors), max(slacks), tolerance))
    report = GradientReport(tuple(parts), method)
    if raise_on_error and not report.ok:
        raise GradientError(report)
    return report


# Verdicts


class _Finding(NamedTuple):
    verdict: Verdict
    error: float  # of <dx, v>, and of the estimate that it is compared with; both relative to the size of the terms
    estimate_error: float


def _compare(line: Line, dx: Array, method: Method, unit: float, tolerance: float) -> _Finding:
    """Compare <dx, v> with the derivative along v."""
    with np.errstate(all="ignore"):
        claimed = np.where(line.v == 0.0, 0.0, widened(dx) * line.v)
    total, claimed_size = float(np.sum(claimed)), norm(claimed)
    if claimed_size == 0.0 and np.any(widened(dx)[line.v != 0.0]):
        return _Finding("inconclusive", 0.0, np.inf)  # every term is below the smallest number
    if not np.isfinite(total) and not np.all(np.isfinite(widened(line.y(0.0)))):
        return _Finding("inconclusive", np.inf, np.inf)  # where the function overflows, its gradient may

    if method == "complex-step":
        estimate, least = complex_step(line)
        return _finding(total, estimate, max(claimed_size, least / unit), tolerance)
    differences = Differences(line)
    found = _finding(total, differences.best, max(claimed_size, differences.size), tolerance)
    if found.verdict == "wrong":
        differences.exhaust()
        size = max(claimed_size, differences.size)
        found = _finding(total, differences.best, size, tolerance)
        if differences.supports(total, tolerance * size):
            return _Finding("inconclusive", found.error, max(found.error, found.estimate_error))
    if found.verdict == "inconclusive":
        finest = _finding(total, differences.finest, max(claimed_size, differences.size), tolerance)
        found = finest if finest.verdict == "right" else found
    return found


def _finding(claimed: float, estimate: Estimate, size: float, tolerance: float) -> _Finding:
    """The true error lies within error ± slack: right if all of that is within the tolerance, wrong if none is."""
    size = size if 0.0 < size < np.inf else 1.0
    error, slack = abs(claimed - estimate.value) / size, estimate.error / size
    error = error if np.isfinite(error) else np.inf
    verdict: Verdict = "inconclusive"
    if np.isfinite(slack):
        if error + slack <= tolerance:
            verdict = "right"
        elif error - slack > tolerance:
            verdict = "wrong"
    return _Finding(verdict, error, slack)


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=("right", "inconclusive", "wrong").index)


# Arguments and arrays


def _claims(gradient: Callable[..., Any], dy: Array, point: Point) -> dict[int, Array]:
    """The gradients to check, by the position of their input."""
    result = gradient(dy.copy(), *copies(point))
    gradients = tuple(result) if isinstance(result, (tuple, list)) else (np.asarray(result),)
    if len(gradients) < len(point) or any(dx is not None for dx in gradients[len(point) :]):
        raise ValueError(f"gradient returned {len(gradients)} values, expected one for each of {len(point)} inputs")
    claims = {}
    for position, (x, dx) in enumerate(zip(point, gradients, strict=False)):
        if dx is None:
            continue
        dx = np.array(dx)
        if not (is_float(x) and is_float(dx)):
            given = None if x is None else x.dtype
            raise TypeError(f"input {position} is {given}, its gradient {dx.dtype}, expected floats or gradient None")
        if dx.shape != x.shape:
            raise ValueError(f"gradient of input {position} has shape {dx.shape}, expected the input's {x.shape}")
        if x.size == 0 or not np.all(np.isfinite(widened(x))):
            raise ValueError(f"input {position} has shape {x.shape}, expected at least one element, and all finite")
        claims[position] = dx
    if not claims:
        raise ValueError("every gradient is None, expected at least one to check")
    return claims

