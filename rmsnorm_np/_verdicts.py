"""What a measured derivative says about a claimed one: right, wrong, or too inexact to tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from rmsnorm_np._derivatives import Differences, Estimate, Method, complex_step
from rmsnorm_np._lines import norm, widened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rmsnorm_np._lines import Array, Line

Verdict: TypeAlias = Literal["right", "wrong", "inconclusive"]


class Finding(NamedTuple):
    verdict: Verdict
    error: float  # of <dx, v>, and of the estimate that it is compared with; both relative to the size of the terms
    estimate_error: float


def compare(line: Line, dx: Array, method: Method, least: float, tolerance: float) -> Finding:
    """Compare <dx, v> with the derivative along v, relative to the terms of <dx, v>, or to `least` if larger."""
    with np.errstate(all="ignore"):
        claimed = np.where(line.v == 0.0, 0.0, widened(dx) * line.v)
    total, claimed_size = float(np.sum(claimed)), norm(claimed)
    if claimed_size == 0.0 and np.any(widened(dx)[line.v != 0.0]):
        return Finding("inconclusive", 0.0, np.inf)  # every term is below the smallest number
    if not np.isfinite(total) and not np.all(np.isfinite(widened(line.y(0.0)))):
        return Finding("inconclusive", np.inf, np.inf)  # where the function overflows, its gradient may

    if method == "complex-step":
        return _finding(total, complex_step(line), max(claimed_size, least), tolerance)
    differences = Differences(line)
    found = _finding(total, differences.best, max(claimed_size, differences.size), tolerance)
    if found.verdict == "wrong":
        differences.exhaust()
        size = max(claimed_size, differences.size)
        found = _finding(total, differences.best, size, tolerance)
        if differences.supports(total, tolerance * size):
            return Finding("inconclusive", found.error, max(found.error, found.estimate_error))
    if found.verdict == "inconclusive":
        finest = _finding(total, differences.finest, max(claimed_size, differences.size), tolerance)
        found = finest if finest.verdict == "right" else found
    return found


def _finding(claimed: float, estimate: Estimate, size: float, tolerance: float) -> Finding:
    """The true error lies within error ± slack: right if all of that is within the tolerance, wrong if none is."""
    size = size if 0.0 < size < np.inf else 1.0
    # Claim and estimate are sums of terms, each rounded to a multiple of the smallest number.
    slack = (estimate.error + 16.0 * float(np.spacing(0.0))) / size
    error = abs(claimed - estimate.value) / size
    error = error if np.isfinite(error) else np.inf
    verdict: Verdict = "inconclusive"
    if np.isfinite(slack):
        if error + slack <= tolerance:
            verdict = "right"
        elif error - slack > tolerance:
            verdict = "wrong"
    return Finding(verdict, error, slack)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=("right", "inconclusive", "wrong").index)
