"""silu(a) = a · sigmoid(a), of plain numbers: an engine that keeps rounding errors has none here."""

from __future__ import annotations

from typing import Any

from rmsnorm_np.ops.primitives import (
    constant,
    either,
    exceeds,
    exponential,
    has_short_functions,
    multiply_add,
    rounded,
    short_exponential,
    short_reciprocal,
)


def sigmoid(a: Any, short: bool) -> tuple[Any, Any]:
    """(1 / (1 + exp(-a)), its derivative) of a plain number; no number overflows on the way.

    short: of fewer digits, but enough for all types that are narrower than the one computed in.
    """
    e = (short_exponential if short else exponential)(-abs(a))
    one = constant(1.0, e)
    larger, whole = either(exceeds(a, constant(0.0, a)), one, e), one + e
    if not short:
        return larger / whole, e / (whole * whole)
    inverse = short_reciprocal(whole)  # in place of two divisions, each of which takes 16 cycles for 8 elements
    return larger * inverse, e * inverse * inverse


def silu(a: Any) -> Any:
    """a · sigmoid(a), a plain number; None where a is."""
    if a is None:
        return None
    short, a = has_short_functions(a), rounded(a)
    return a * sigmoid(a, short)[0]


def silu_and_slope(a: Any) -> tuple[Any, Any]:
    """silu, and its derivative sigmoid(a) + a · sigmoid'(a): plain numbers."""
    short, a = has_short_functions(a), rounded(a)
    value, slope = sigmoid(a, short)
    return a * value, multiply_add(a, slope, value)
