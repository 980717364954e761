"""The derivative of a function along a line through its inputs, measured by complex step or by differences.

:mod:`rmsnorm_np.gradcheck` explains the two methods, and compares their results with what a gradient claims.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from rmsnorm_np._lines import eps, norm, widened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rmsnorm_np._lines import Array, Line

Method: TypeAlias = Literal["complex-step", "finite-difference"]

# A gradient so small that a step of one unit moves y by less than this share of itself is compared with that share:
# else nobody could confirm a gradient of exactly zero.
SMALLEST_SHARE = 1e-3
# The complex step, in units of x: its square is lost beside 1 even where the function changes within 1e-12 of a unit.
_COMPLEX_STEP = 1e-20

# Each step of the ladder is this much of the one before. No power of two: numbers that are only scaled by powers of two
# are rounded alike at all steps, and no two steps would show it.
_RATIO = 0.55
_WINDOW = 4


def _weights(*orders: int) -> Array:
    """Weights that extrapolate the quotients of four steps to zero, where the error has these powers of h."""
    steps = _RATIO ** np.arange(_WINDOW)
    conditions = [steps**order for order in (0, *orders)]
    return np.linalg.solve(conditions, [1.0, 0.0, 0.0, 0.0])


# Independent errors of y, in units of 1/h, are multiplied by the 2-norm of the weights over the steps, / √2.
_NOISE_GAIN = 7.1
# The roughness that is seen in a few steps is a sample: the largest error is some times that.
_SAFETY = 3.0
# How many windows of smaller steps confirm one.
_CONFIRMING = 6
# An estimate with a larger relative error is none: steps that are too large see noise, and none of the slope.
_MEASURED = 0.4
# One with a smaller error is what smaller steps can only make worse.
_CONVERGED = 0.01 * _SAFETY
# Steps below the first, and above it, at most.
_STEPS = 64


class Estimate(NamedTuple):
    value: float  # of d phi / dt at t = 0
    error: float  # that the value may have


class NotConfirmedError(ValueError):
    """Complex step and finite differences disagree."""


def complex_step(line: Line) -> Estimate:
    line = line.in_double()
    y, terms = _complex_terms(line)
    value = float(np.sum(terms))
    # Where x's last digit already changes the derivative, the rounding inside the function does, too.
    rng = np.random.default_rng(0)
    nudges = [line.x * (1.0 + eps(line.x) * rng.choice([-1.0, 1.0], line.x.shape)) for _ in range(4)]
    change = max(abs(float(np.sum(_complex_terms(line.at(x))[1])) - value) for x in nudges)
    # Nothing cancels on the way to the terms, so that 16 roundings of each is generous.
    error = 16.0 * eps(y.imag) * float(np.sum(np.abs(terms))) + _SAFETY * change
    return Estimate(value, error if np.isfinite(error) else np.inf)


def _complex_terms(line: Line) -> tuple[Array, Array]:
    """Complex y one step away, and the terms of the derivative."""
    with warnings.catch_warnings():
        # A cast to real is found by what it does to the result, here and in `_confirm_complex_step`.
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        y = line.y(1j * _COMPLEX_STEP)
    if not np.iscomplexobj(y):
        raise TypeError(f"the complex step needs a complex output for complex input, function returned {y.dtype}")
    with np.errstate(all="ignore"):
        return y, line.terms(y.imag / _COMPLEX_STEP)


class Differences:
    """Extrapolated central differences along a line: an estimate for each of a ladder of shrinking steps.

    The first step is one unit. Smaller ones follow until an estimate is confirmed by those below it, and larger ones
    while they improve it. The error of an estimate is its largest disagreement with any that has smaller steps, scaled
    as rounding errors are, by 1/step; plus what the rounding of y may do; plus the kink.
    """

    def __init__(self, line: Line) -> None:
        y0 = line.y(0.0)
        self.line, self.y0, self.y_eps = line, widened(y0), eps(y0)
        self.y_smallest = float(np.spacing(np.zeros((), y0.dtype)))  # subnormal numbers are rounded to multiples of it
        self.moved = np.zeros(y0.shape, bool)  # the outputs that changed at any step
        self.smallest_change = np.full(y0.shape, np.inf)  # of each output, zero aside
        self.steps: list[float] = []
        self.quotients: list[tuple[float, float, float]] = []  # for each step: central, kink, size
        self.largest_step = 1.0  # that leaves y as it is
        first = self._first_step()
        if first is not None:
            self.smallest_step = first * max(_RATIO**_STEPS, 2.0 * eps(line.x))
            self._measure(first)
            self._shrink_until_confirmed()
            self._grow_while_better()
            for exponent in (4, 8):
                self._change(2.0**exponent), self._change(-(2.0**exponent))

    @property
    def best(self) -> Estimate:
        """The estimate with the smallest error."""
        return self._best()[1]

    @property
    def finest(self) -> Estimate:
        """The same, for outputs that are rounded by no more than their dtype demands, and never change by jumps."""
        return min(self._estimates(jumps=False), key=lambda estimate: estimate.error, default=Estimate(np.nan, np.inf))

    @property
    def unit(self) -> float:
        """The step that y answers to, at least 1."""
        index, best = self._best()
        return max(1.0, self.steps[index]) if self.steps and np.isfinite(best.error) else 1.0

    @property
    def size(self) -> float:
        """What a derivative along this line is at least compared with."""
        return self._least(self.unit)

    def _least(self, step: float) -> float:
        reached = self.moved & np.isfinite(self.y0)
        return SMALLEST_SHARE * norm(self.line.terms(self.y0)[reached]) / max(1.0, step)

    def supports(self, value: float, slack: float) -> bool:
        """Whether some smaller steps, with a small error, contradict the best estimate and give this value."""
        best, size = self.best, self.size
        return any(
            error <= _CONVERGED * max(abs(other), abs(best.value), size)
            and abs(other - best.value) > error + best.error
            and abs(other - value) <= error + slack
            for other, error in self._estimates(jumps=False)
        )

    def exhaust(self) -> None:
        """Add all smaller steps at which y still changes by more than its rounding."""
        while self._can_shrink():
            self._measure(self.steps[-1] * _RATIO)

    def _first_step(self) -> float | None:
        """One unit, or the next step that changes any output; None if none does."""
        if not np.all(np.isfinite(self.y0)):
            return 1.0
        for exponent in (0, -8, -16, -24, *range(16, 1024, 16)):
            step = float(2.0**exponent)
            changes = self._change(step), self._change(-step)
            if exponent > 0 and not np.all(np.isfinite(changes)):
                return None
            if np.any(changes):
                return step
            self.largest_step = max(self.largest_step, step)
        return None

    def _change(self, step: float) -> Array:
        """By how much each output changes: zero where nothing does, with no rounding of what stays."""
        y = widened(self.line.y(step))
        with np.errstate(all="ignore"):
            change: Array = np.where(y == self.y0, 0.0, y - self.y0)
        self.moved |= change != 0.0
        self.smallest_change = np.fmin(self.smallest_change, np.where(change != 0.0, np.abs(change), np.inf))
        return change

    def _shrink_until_confirmed(self) -> None:
        while self._can_shrink():
            self._measure(self.steps[-1] * _RATIO)
            index, best = self._best()
            confirmed = len(self.steps) - _WINDOW - index >= _CONFIRMING
            if confirmed and best.error <= _CONVERGED * self._size_at(index):
                return

    def _grow_while_better(self) -> None:
        for _ in range(_STEPS):
            index, best = self._best()
            exact_enough = best.error <= 64.0 * self.y_eps * self._size_at(index)
            if index >= _CONFIRMING or exact_enough or not np.isfinite(self.quotients[0][2]):
                return
            self._measure(self.steps[0] / _RATIO)

    def _can_shrink(self) -> bool:
        if not self.steps or self.steps[-1] < self.smallest_step:
            return False
        # Two estimates more after the last step at which y changed by more than its rounding.
        above = -_WINDOW - 2
        few = len(self.steps) < -above
        return few or not self.quotients[above][2] * self.steps[above] <= _NOISE_GAIN * self._noise()

    def _measure(self, step: float) -> None:
        ahead, behind = self._change(step), self._change(-step)
        with np.errstate(all="ignore"):
            central, kink = self.line.terms(ahead - behind), self.line.terms(ahead + behind)
            scale = 2.0 * step
            quotients = float(np.sum(central)) / scale, norm(kink) / scale, norm(central) / scale
        index = len(self.steps) if not self.steps or step < self.steps[-1] else 0
        self.steps.insert(index, step)
        self.quotients.insert(index, quotients)

    def _estimates(self, *, jumps: bool) -> list[Estimate]:
        """An estimate for each four consecutive steps; with `jumps`, outputs may be rounded to the jumps they show."""
        if not self.steps:
            # No step changes y: a change below its rounding stays unseen.
            unseen = self.y_eps * norm(self.line.terms(self.y0)) / self.largest_step
            return [Estimate(0.0, _NOISE_GAIN * unseen)]
        if len(self.steps) < _WINDOW:
            return []
        central, one_sided, size = np.array(self.quotients).T
        # Outputs that change with large steps, and not at all with smaller ones, change by jumps.
        noise = self._noise(self.smallest_change if jumps and size[-1] == 0.0 else 0.0)
        # Central quotients have an error in h², h⁴, h⁶ …; half the difference of forward and backward ones is one in
        # h, h³, h⁵ …, and tends to zero unless the function has a kink.
        with np.errstate(all="ignore"):
            values, kinks = np.correlate(central, _weights(2, 4, 6)), np.correlate(one_sided, _weights(1, 3, 5))
            found = []
            for i, value in enumerate(values):
                finer = values[i + 1 :]
                rough = np.abs(value - finer) * _RATIO ** np.arange(len(finer))
                error = np.inf
                if len(finer) >= 2:
                    kink = np.max(np.abs(kinks[i : i + 3]))
                    error = _SAFETY * (np.max(rough) + kink) + _NOISE_GAIN * noise / self.steps[i]
                measured = error <= _MEASURED * self._size_at(i)
                found.append(Estimate(float(value), float(error) if measured else np.inf))
        return found

    def _size_at(self, index: int) -> float:
        """What the terms of the derivative come to, at the index-th step."""
        return max(self.quotients[index][2], self._least(self.steps[index]))

    def _noise(self, jump: Array | float = 0.0) -> float:
        """How much of phi is rounding of the outputs that change."""
        of_y = np.maximum(np.maximum(self.y_eps * np.abs(self.y0), 2.0 * self.y_smallest), jump)
        return norm(self.line.terms(of_y)[self.moved & np.isfinite(of_y)])

    def _best(self) -> tuple[int, Estimate]:
        estimates = enumerate(self._estimates(jumps=True))
        return min(estimates, key=lambda item: item[1].error, default=(0, Estimate(np.nan, np.inf)))


def choose(method: Literal["auto"] | Method, lines: Sequence[Line]) -> tuple[Method, list[float]]:
    """The method that "auto" stands for, tried on `lines`; for the complex step, what its results are compared with."""
    sizes = [0.0] * len(lines)
    if method == "finite-difference":
        return method, sizes
    try:
        sizes = [_confirm_complex_step(line) for line in lines]
    except _refusals():
        if method == "complex-step":
            raise
        return "finite-difference", sizes
    return "complex-step", sizes


def _confirm_complex_step(line: Line) -> float:
    """Raise unless differences, of the same function in the same precision, give the complex step's derivative.

    A function that drops an imaginary part, or takes a modulus or conjugate of it, is found here. Differences that
    are off by more than 1 % themselves confirm nothing.
    """
    line = line.in_double()
    step = complex_step(line)
    differences = Differences(line)
    size = max(abs(step.value), differences.size)
    difference = differences.best if differences.best.error <= 0.01 * size else differences.finest
    apart = abs(step.value - difference.value)
    # A part that is not analytic is missing altogether: four times the errors is still far from that.
    if not (apart <= 4.0 * (step.error + difference.error) and difference.error <= 0.01 * size):
        raise NotConfirmedError(
            f"the complex step of input {line.position} gives {step.value!r}, finite differences give "
            f"{difference.value!r} with an error up to {difference.error:.1e}: expected the same. The function may "
            "not be analytic: abs, conj, real, maximum and casts are not"
        )
    return differences.size


def _refusals() -> tuple[type[Exception], ...]:
    """What says that the complex step cannot be taken: TypeError, and Numba's own kind of it where Numba is in use."""
    numba_errors = sys.modules.get("numba.core.errors")
    ours = (TypeError, NotConfirmedError)
    return ours if numba_errors is None else (*ours, numba_errors.TypingError)
