"""The derivative of a function along a line through its inputs, measured by complex step or by differences.

:mod:`rmsnorm_np.gradcheck` explains the two methods, and compares their results with what a gradient claims.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

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

# Weights that extrapolate four quotients, of steps h, h/2, h/4, h/8, to a step of zero. Central differences have an
# error in h², h⁴, h⁶ …; the difference of forward and backward quotients is one in h, h³, h⁵ …, and zero at the end
# unless the function has a kink.
_CENTRAL = np.array([-1.0, 84.0, -1344.0, 4096.0]) / 2835.0
_KINK = np.array([-1.0, 42.0, -336.0, 512.0]) / 217.0
_WINDOW = len(_CENTRAL)
# Independent errors of y, in units of 1/h, are multiplied by the 2-norm of _CENTRAL · (1, 2, 4, 8) / √2.
_NOISE_GAIN = 8.3
# The roughness that is seen in a few steps is a sample: the largest error is some times that.
_SAFETY = 4.0
# How many windows of smaller steps confirm one.
_CONFIRMING = 6
# An estimate with a larger relative error is not one that smaller steps can only make worse.
_CONVERGED = 0.01 * _SAFETY
# Halvings and doublings of the first step at most.
_HALVINGS = 60


class Estimate(NamedTuple):
    value: float  # of d phi / dt at t = 0
    error: float  # that the value may have


class NotConfirmedError(ValueError):
    """Complex step and finite differences disagree."""


def complex_step(line: Line) -> tuple[Estimate, float]:
    """The derivative, and what it is at least compared with."""
    line = line.in_double()
    y, terms = _complex_terms(line)
    value = float(np.sum(terms))
    # Where x's last digit already changes the derivative, the rounding inside the function does, too.
    rng = np.random.default_rng(0)
    nudges = [line.x * (1.0 + eps(line.x) * rng.choice([-1.0, 1.0], line.x.shape)) for _ in range(4)]
    change = max(abs(float(np.sum(_complex_terms(line.at(x))[1])) - value) for x in nudges)
    # Nothing cancels on the way to the terms, so that 16 roundings of each is generous.
    error = 16.0 * eps(y.imag) * float(np.sum(np.abs(terms))) + _SAFETY * change
    size = SMALLEST_SHARE * norm(line.terms(y.real)[terms != 0.0])
    return Estimate(value, error if np.isfinite(error) else np.inf), size


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
    """Extrapolated central differences along a line: an estimate for each of a ladder of steps, halved from the first.

    The first step is one unit. Smaller ones follow until an estimate is confirmed by those below it, and larger ones
    while they improve it. The error of an estimate is its largest disagreement with any that has smaller steps, scaled
    as rounding errors are, by 1/step; plus what the rounding of y may do; plus the kink.
    """

    def __init__(self, line: Line) -> None:
        y0 = line.y(0.0)
        self.line, self.y0, self.y_eps = line, widened(y0), eps(y0)
        self.moved = np.zeros(y0.shape, bool)  # the outputs that changed at any step
        self.lowest_bit = _lowest_bit(self.y0)  # that any value of an output has set
        self.steps: list[float] = []
        self.quotients: list[tuple[float, float, float]] = []  # for each step: central, kink, size
        first = self._first_step()
        if first is not None:
            self._measure(first)
            self._halve_until_confirmed()
            self._double_while_better()

    @property
    def size(self) -> float:
        """What a derivative along this line is at least compared with."""
        return SMALLEST_SHARE * norm(self.line.terms(self.y0)[self.moved])

    @property
    def best(self) -> Estimate:
        """The estimate with the smallest error, if the lowest bit that an output ever has set is its rounding."""
        return self._with_smallest_error(self._estimates(self.lowest_bit))[1]

    def all(self) -> list[Estimate]:
        """The estimates at all steps, if outputs are rounded by no more than their dtype demands."""
        return self._estimates() if self.steps else [Estimate(0.0, 0.0)]

    def exhaust(self) -> None:
        """Add all smaller steps at which y still changes by more than its rounding."""
        while self._can_halve():
            self._measure(self.steps[-1] / 2.0)

    def _first_step(self) -> float | None:
        """One unit, or the next step that changes any output; None if none does."""
        for exponent in (0, -8, -16, -24, *range(16, 1024, 16)):
            ends = [self.line.y(sign * 2.0**exponent) for sign in (1.0, -1.0)]
            if not all(np.all(np.isfinite(widened(end))) for end in ends) and exponent > 0:
                return None
            if any(np.any(widened(end) != self.y0) for end in ends):
                return 2.0**exponent
        return None

    def _halve_until_confirmed(self) -> None:
        while self._can_halve():
            self._measure(self.steps[-1] / 2.0)
            index, best = self._with_smallest_error(self._estimates(self.lowest_bit))
            last = len(self.steps) - _WINDOW
            if last - index >= _CONFIRMING and best.error <= _CONVERGED * max(self.quotients[index][2], self.size):
                return

    def _double_while_better(self) -> None:
        while len(self.steps) <= 2 * _HALVINGS:
            index, best = self._with_smallest_error(self._estimates(self.lowest_bit))
            exact_enough = best.error <= 64.0 * self.y_eps * max(self.quotients[index][2], self.size)
            if index >= 3 or exact_enough or not np.isfinite(self.quotients[0][2]):
                return
            self._measure(self.steps[0] * 2.0)

    def _can_halve(self) -> bool:
        if not self.steps or len(self.steps) > _HALVINGS or self.steps[-1] < 2.0 * eps(self.line.x):
            return False
        few = len(self.steps) < _WINDOW + 2
        return few or not self.quotients[-1][2] * self.steps[-1] <= _NOISE_GAIN * self._noise()

    def _measure(self, step: float) -> None:
        with np.errstate(all="ignore"):
            ahead, behind = (widened(self.line.y(sign * step)) for sign in (1.0, -1.0))
            for y in (ahead, behind):
                self.moved |= y != self.y0
                self.lowest_bit = np.minimum(self.lowest_bit, _lowest_bit(y))
            # Differences of each output first: where nothing changes, nothing is rounded either.
            ahead, behind = ahead - self.y0, behind - self.y0
            central, kink = self.line.terms(ahead - behind), self.line.terms(ahead + behind)
            found = float(np.sum(central)), float(np.sum(kink)), norm(central)
        index = len(self.steps) if not self.steps or step < self.steps[-1] else 0
        self.steps.insert(index, step)
        self.quotients.insert(index, tuple(figure / (2.0 * step) for figure in found))

    def _estimates(self, rounding: Array | float = 0.0) -> list[Estimate]:
        """An estimate for each four consecutive steps, the outputs being multiples of `rounding`."""
        if len(self.steps) < _WINDOW:
            return []
        central, kink, _ = np.array(self.quotients).T
        noise = self._noise(rounding)
        with np.errstate(all="ignore"):
            values, kinks = np.correlate(central, _CENTRAL), np.correlate(kink, _KINK)
            found = []
            for i, value in enumerate(values):
                finer = values[i + 1 :]
                rough = np.abs(value - finer) * 2.0 ** -np.arange(1.0, 1.0 + len(finer))
                error = np.inf
                if len(finer) >= 2:
                    error = _SAFETY * np.max(rough) + abs(kinks[i]) + _NOISE_GAIN * noise / self.steps[i]
                found.append(Estimate(float(value), float(error) if np.isfinite(error) else np.inf))
        return found

    def _noise(self, rounding: Array | float = 0.0) -> float:
        """How much of phi is rounding of the outputs that change."""
        of_y = np.maximum(self.y_eps * np.abs(self.y0), rounding)
        return norm(self.line.terms(of_y)[self.moved & np.isfinite(of_y)])

    def _with_smallest_error(self, estimates: list[Estimate]) -> tuple[int, Estimate]:
        numbered = enumerate(estimates)
        return min(numbered, key=lambda item: item[1].error, default=(0, Estimate(np.nan, np.inf)))


def _lowest_bit(y: Array) -> Array:
    """The value of the lowest bit set in each element: no smaller change of it has been seen. Inf for zero."""
    mantissa, exponent = np.frexp(y.astype(np.float64))
    with np.errstate(invalid="ignore"):
        integer = np.ldexp(mantissa, 53).astype(np.int64)
        bit = np.ldexp((integer & -integer).astype(np.float64), exponent - 53)
    return np.where((y == 0.0) | ~np.isfinite(y), np.inf, bit)


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
    step, size = complex_step(line)
    differences = Differences(line)
    size = max(abs(step.value), size, differences.size)
    difference = differences.best
    if difference.error > 0.01 * size:
        difference = min(differences.all(), key=lambda estimate: estimate.error)
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
