"""silu(a) = a · sigmoid(a), of plain numbers: an engine that keeps rounding errors has none here."""

from __future__ import annotations

from typing import Any

from rmsnorm_np.ops.primitives import constant, either, exceeds, exponential, multiply_add, rounded


def sigmoid(a: Any) -> tuple[Any, Any]:
    """(1 / (1 + exp(-a)), its derivative) of a plain number; no number overflows on the way."""
    e = exponential(-abs(a))
    one = constant(1.0, e)
    whole = one + e
    return either(exceeds(a, constant(0.0, a)), one, e) / whole, e / (whole * whole)


def silu(a: Any) -> Any:
    """a · sigmoid(a), a plain number; None where a is."""
    if a is None:
        return None
    a = rounded(a)
    return a * sigmoid(a)[0]


def silu_and_slope(a: Any) -> tuple[Any, Any]:
    """silu, and its derivative sigmoid(a) + a · sigmoid'(a): plain numbers."""
    a = rounded(a)
    value, slope = sigmoid(a)
    return a * value, multiply_add(a, slope, value)
