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
    Central differences of 8th order at a ladder of steps, each half the one before. The best is the one that agrees
    best with smaller steps; how far it disagrees with them is its error. The function needs to be smooth near x.

Every direction changes elements of one scale alone: rows of 1e16 are measured apart from rows of 1.

A check must not blame a right gradient, nor pass a wrong one for want of precision. So there is a third verdict,
"inconclusive", for a measurement too inexact to decide at the tolerance that was asked for. A report is true only if
the verdict is "right"::

    assert check_gradient(function, gradient, x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from rmsnorm_np._derivatives import Method, choose
from rmsnorm_np._lines import Line, call, copies, directions_of, eps, is_float, random_signs, widened
from rmsnorm_np._verdicts import Verdict, compare, worst

if TYPE_CHECKING:
    from collections.abc import Callable

    from rmsnorm_np._lines import Array, Point


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
    dtype : str
        The least precise dtype among the output, the input and its gradient.
    """

    position: int
    verdict: Verdict
    error: float
    estimate_error: float
    tolerance: float
    dtype: str

    def __str__(self) -> str:
        return (
            f"input {self.position} {self.verdict}: error {self.error:.1e}, "
            f"of which the estimate's own up to {self.estimate_error:.1e}, tolerance {self.tolerance:.1e}"
        )


@dataclass(frozen=True)
class GradientReport:
    """The outcome of `check_gradient`; ``print(report)`` shows it in words.

    ``bool(report)`` is ``report.ok``: False for "wrong" and for "inconclusive", so ``assert report`` fails for both.

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
        return worst([part.verdict for part in self.inputs])

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

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [f"gradient {self.verdict} ({self.method})", *(f"  {part}" for part in self.inputs)]
        if self.verdict == "inconclusive":
            lines.append(f"  too inexact to decide: {self._advice()}, or pass a larger rtol")
        return "\n".join(lines)

    def _advice(self) -> str:
        undecided = [part for part in self.inputs if part.verdict == "inconclusive"]
        if any(part.dtype != "float64" for part in undecided):
            return "check the same code on float64 inputs"
        return "the function has a kink, jumps, or digits lost to cancellation near this input; choose another input"


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
        ``function(*inputs)`` returns the output y: one array of floats of any shape, not a tuple. It is called with
        copies, so it may write to its arguments, and it must give the same output for the same input.
    gradient : callable
        ``gradient(dy, *inputs)`` returns the gradients of ``sum(dy * y)``: a sequence with one array for each input,
        of that input's shape, or None for an input not to be checked; for a single input, the bare array will do.
        A NumPy scalar or a float counts as an array of shape (). dy has y's shape and dtype. More values than inputs
        may follow if they are None, so that ``rms_norm_backward`` can be checked with ``x`` alone.
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
        Random directions for each scale of each input: rows whose elements are of about the same size make up a scale.
        No element of a direction is near zero, so an error in one element shows.
    seed : int, default 0
        Seed of dy and of the directions. The same seed gives the same report.
    raise_on_error : bool, default False
        Raise `GradientError` unless every gradient is found right.

    Returns
    -------
    GradientReport
        True if the verdict is "right", False if it is "wrong" or "inconclusive"; ``report.verdict``, ``report.error``,
        and one `InputReport` for each input checked.

    Raises
    ------
    GradientError
        If ``raise_on_error`` and the verdict is "wrong" or "inconclusive".
    ValueError
        If there is nothing to check, an input is empty, not finite or a list of arrays of different shapes, a
        gradient is missing or has another shape than its input, an option is out of range, or the complex step was
        asked for and finite differences do not confirm it.
    TypeError
        If the function returns a tuple or a list, or no floats; if a gradient is neither an array nor a sequence of
        arrays, or is given for an input that is not of floats; or if the complex step was asked for and the function
        does not take complex input or returns real output for it.

    Notes
    -----
    Let v be a direction and J v the change of y along it. The error is ``|<dy, J v> - <dx, v>|`` over the 2-norm of
    the terms of ``<dx, v>``, which is what that sum of random signs comes to. A direction has the size of the elements
    that it changes, and changes only elements of one scale. An element's scale is the mean magnitude of its row, or of
    its line along another axis if that is smaller; scales within a factor of 8 are taken together.

    A gradient that changes y by less than 0.1 % of itself in a step of one v (or in the larger step that y answers
    to, as where ``1 + x`` is checked at x = 1e-16) is compared with those 0.1 %: differences cannot tell it from zero.

    A gradient is "wrong" only if no step supports it. Where large and small steps give different derivatives (a
    function of rounded or quantised outputs, a kink) the verdict is "inconclusive".

    *Low precision.* Finite differences see a float32 kernel through its rounded outputs. They take large steps then
    and count the rounding as an error of the estimate, about 3e-5: a right gradient passes at the default tolerance
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
    >>> bool(report)
    False
    >>> [(part.position, part.verdict) for part in report.inputs]
    [(0, 'wrong'), (1, 'right')]

    This package's gradient of the same function:

    >>> import rmsnorm_np as rn
    >>> assert check_gradient(my_norm, lambda *args: rn.rms_norm_backward(*args, eps=0.0), x, w)
    """
    if method not in ("auto", "complex-step", "finite-difference"):
        raise ValueError(f"method is {method!r}, expected 'auto', 'complex-step' or 'finite-difference'")
    if directions < 1:
        raise ValueError(f"directions is {directions!r}, expected at least 1")
    if rtol is not None and not 0.0 < rtol < 1.0:
        raise ValueError(f"rtol is {rtol!r}, expected a number with 0 < rtol < 1")

    point: Point = tuple(_input(position, x) for position, x in enumerate(inputs))
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
    method, sizes = choose(method, [scale[0] for scales in lines.values() for scale in scales])
    sizes_of_scales = iter(sizes)

    parts = []
    for position, dx in claims.items():
        least_precise = max(y, point[position], dx, key=eps)
        tolerance = eps(least_precise) ** 0.6 if rtol is None else rtol
        findings = [
            compare(line, dx, method, size, tolerance)
            for scale, size in zip(lines[position], sizes_of_scales, strict=False)
            for line in scale
        ]
        verdicts, errors, slacks = zip(*findings, strict=True)
        parts.append(
            InputReport(position, worst(verdicts), max(errors), max(slacks), tolerance, least_precise.dtype.name)
        )
    report = GradientReport(tuple(parts), method)
    if raise_on_error and not report.ok:
        raise GradientError(report)
    return report


# Arguments and arrays


def _input(position: int, x: Any) -> Array | None:
    try:
        return None if x is None else np.array(x)
    except ValueError:
        raise ValueError(
            f"input {position} is a {type(x).__name__} of arrays of different shapes, expected one array: give each as "
            "an input of its own, as in check_gradient(function, gradient, *arrays)"
        ) from None


def _claims(gradient: Callable[..., Any], dy: Array, point: Point) -> dict[int, Array]:
    """The gradients to check, by the position of their input."""
    result = gradient(dy.copy(), *copies(point))
    gradients = (result,) if isinstance(result, (np.ndarray, np.generic, float)) else result
    if not isinstance(gradients, (tuple, list)):
        raise TypeError(
            f"gradient returned {type(result).__name__}, expected an array for each input, or a tuple of them"
        )
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
