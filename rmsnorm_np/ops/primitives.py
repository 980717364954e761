"""What the formulas of :mod:`rmsnorm_np.ops` are made of: numbers, pairs of numbers, and operations on them.

A number is anything with ``+ - * /``: a NumPy array here; in an engine, an object that writes machine code for what is
done to it. Where rounding errors matter, an engine hands in ``Pair(x, None)``, x exactly, and every operation keeps
what it rounds off. The left operand decides: a pair on the left gives a pair, a plain number gives a plain number.

None stands for what is absent: on the right of an addition or multiplication it changes nothing, on the left the
result is None.

The pairs are the classic error-free kind: Knuth's two-sum, and the error of a product by fused multiply-add (Ogita,
Rump and Oishi, "Accurate sum and dot product", 2005).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rmsnorm_np.ops import in_numpy
from rmsnorm_np.ops.in_numpy import two_sum


class Pair(NamedTuple):
    """head + tail, unevaluated: about twice the digits of one number. A tail of None is exactly zero."""

    head: Any
    tail: Any


# ------------------------------------------------------------------------------- what each kind of number does itself


def fma(a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""
    return a.fma(b, c) if hasattr(a, "fma") else in_numpy.fma(a, b, c)


def multiply_add(a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once where the processor has an instruction for it, twice elsewhere."""
    return a.multiply_add(b, c) if hasattr(a, "multiply_add") else a * b + c


def product(a: Any, b: Any) -> Any:
    """a · b, rounded: no compiler may fuse it with an addition, because its rounding error is computed next."""
    return a.product(b) if hasattr(a, "product") else a * b


def root(a: Any) -> Any:
    """The square root."""
    return a.root() if hasattr(a, "root") else np.sqrt(a)


def either(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, b elsewhere; a where the condition is None. Both pairs, or both plain numbers."""
    if condition is None:
        return a
    if is_pair(a):
        return Pair(either(condition, a.head, b.head), either(condition, a.tail, b.tail))
    return condition.either(a, b) if hasattr(condition, "either") else np.where(condition, a, b)


def is_number(a: Any) -> Any:
    """Where a is not NaN."""
    return a.is_number() if hasattr(a, "is_number") else a == a


def is_finite(a: Any) -> Any:
    """Where a is neither NaN nor infinite."""
    return a.is_finite() if hasattr(a, "is_finite") else np.isfinite(a)


def exceeds(a: Any, b: Any) -> Any:
    """Where a > b, of plain numbers."""
    return a.exceeds(b) if hasattr(a, "exceeds") else a > b


def as_single(a: Any) -> Any:
    """The nearest float32, in a's own type; of a longdouble the nearest float64."""
    if hasattr(a, "as_single"):
        return a.as_single()
    dtype = np.result_type(a)
    return np.asarray(a, np.float32 if dtype.itemsize <= 8 else np.float64).astype(dtype)


def exponential(a: Any) -> Any:
    """e to the power of a, a <= 0, to an ULP or so."""
    return a.exponential() if hasattr(a, "exponential") else np.exp(a)


def has_short_functions(a: Any) -> bool:
    """Whether a is of more digits than results have, and has functions that do with fewer."""
    return is_narrow(a) and hasattr(a, "short_exponential")


def short_exponential(a: Any) -> Any:
    """e to the power of a, a <= 0, to 2**-45 of it; zero below e**-700."""
    return a.short_exponential()


def short_reciprocal(a: Any) -> Any:
    """1 / a, to 2**-45 of it, for a in the range of float32."""
    return a.short_reciprocal()


def in_dtype(a: Any, name: str) -> Any:
    """What a number of this dtype can hold of a, of a's own type; of a pair, exact."""
    head, tail = _pair(a)
    if hasattr(head, "in_dtype"):
        found = head.in_dtype(name, tail)
    else:
        plain = np.asarray(rounded(a))
        found = plain.astype(in_numpy.dtype_of(name)).astype(plain.dtype)
    return Pair(found, None) if is_pair(a) else found


def power_below(a: Any) -> Any:
    """The largest power of two that is at most |a|, zero or less than the smallest normal number for what is less."""
    return a.power_below() if hasattr(a, "power_below") else np.ldexp(0.5, np.frexp(a)[1]) * (a != 0)


def with_sign(a: Any, b: Any) -> Any:
    """|a| with the sign of b."""
    return a.with_sign(b) if hasattr(a, "with_sign") else np.copysign(a, b)


def constant(number: float, like: Any) -> Any:
    """A number, of the type of another."""
    return like.constant(number) if hasattr(like, "constant") else np.result_type(like).type(number)


def is_narrow(a: Any) -> bool:
    """Whether a product of two such numbers is exact: they were loaded from a narrower type than the one they have."""
    return bool(getattr(a, "narrow", False))


# ---------------------------------------------------------------------------------------------------------- pairs


def is_pair(a: Any) -> bool:
    """Whether a keeps its rounding errors."""
    return isinstance(a, Pair)


def _pair(a: Any) -> Pair:
    return a if is_pair(a) else Pair(a, None)


def _add(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def two_product(a: Any, b: Any) -> tuple[Any, Any]:
    """(a · b, what it rounds off)."""
    head = product(a, b)
    return head, fma(a, b, -head)


def negative(a: Any) -> Any:
    """-a, exact."""
    return None if a is None else Pair(-a.head, negative(a.tail)) if is_pair(a) else -a


def rounded(a: Any) -> Any:
    """One plain number. Where an error term met an infinity, the head alone is the result."""
    if not is_pair(a):
        return a
    if a.tail is None:
        return a.head
    total = a.head + a.tail
    return either(is_number(total), total, a.head)


def normalised(a: Any) -> Any:
    """The same number, the head of a pair the nearest one number to it: after a subtraction all may be in the tail."""
    if not is_pair(a) or a.tail is None:
        return a
    head = a.head + a.tail
    return Pair(head, a.tail - (head - a.head))


# ------------------------------------------------------------------------------------------- what formulas call


def plus(a: Any, b: Any) -> Any:
    """a + b; a where b is None; None where a is."""
    if a is None or b is None:
        return a
    if not is_pair(a):
        return _add(a + b.head, b.tail) if is_pair(b) else a + b
    b = _pair(b)
    head, tail = two_sum(a.head, b.head)
    return Pair(head, _add(_add(tail, a.tail), b.tail))


def minus(a: Any, b: Any) -> Any:
    """a - b; a where b is None."""
    return plus(a, negative(b))


def times(a: Any, b: Any) -> Any:
    """a · b; a where b is None; None where a is.

    The product of two tails counts: where heads have cancelled, as in x - mean, the tail is all there is.
    """
    if a is None or b is None:
        return a
    if not is_pair(a):
        return a * rounded(b)
    b = _pair(b)
    head, tail = two_product(a.head, b.head)
    for u, v in ((a.tail, b.head), (a.head, b.tail), (a.tail, b.tail)):
        if u is not None and v is not None:
            tail = fma(u, v, tail)
    return Pair(head, tail)


def over(a: Any, b: Any) -> Any:
    """a / b. Of pairs, the head of the result is the nearest one number to it."""
    if not is_pair(a):
        return a / rounded(b)
    if getattr(a.head, "renormalised", False):
        a = _normalised(a)
    b = _pair(b)
    quotient = a.head / b.head
    rest = fma(-quotient, b.head, a.head)
    rest = rest if a.tail is None else rest + a.tail
    rest = rest if b.tail is None else fma(-quotient, b.tail, rest)
    return _normalised(Pair(quotient, rest / b.head))


def over_known(a: Any, b: Any, inverse: Any) -> Any:
    """a / b with inverse = 1 / b: the quotient, and what a multiply-add says that it is off by, as divisions do it.

    In plain numbers that is four operations in place of a division, which takes 16 cycles for 8 elements.
    """
    if is_pair(a):
        return over(a, b)
    quotient = a * inverse
    better = with_sign(fma(fma(-quotient, b, a), inverse, quotient), quotient)  # the sum of -0 and 0 is 0
    return either(is_number(better), better, quotient)  # infinities leave NaN in the rest


def _normalised(a: Any) -> Any:
    """The same pair, its head the nearest one number to it."""
    if a.tail is None:
        return a
    total = a.head + a.tail
    finite = is_number(total)  # infinities, and zero from them, leave NaN in the tail
    return Pair(either(finite, total, a.head), either(finite, a.tail - (total - a.head), a.tail))


def reciprocal_root(a: Any) -> Any:
    """1 / sqrt(a)."""
    if hasattr(a.head if is_pair(a) else a, "reciprocal_root"):
        return _refined(a)
    if not is_pair(a):
        return 1.0 / root(a)
    head = root(a.head)
    rest = fma(-head, head, a.head)
    rest = rest if a.tail is None else rest + a.tail
    return over(Pair(constant(1.0, head), None), Pair(head, rest / (head + head)))


def _refined(a: Any) -> Any:
    """1 / sqrt(a) of numbers that know it; of pairs with a step of Newton's method, which divides nothing."""
    if not is_pair(a):
        return a.reciprocal_root()
    near = a.head.reciprocal_root()
    square, tail = two_product(near, near)
    rest = fma(-a.head, square, 1.0) - a.head * tail
    rest = rest if a.tail is None else rest - a.tail * square
    tail = near * rest * 0.5
    return Pair(near, either(is_number(tail), tail, constant(0.0, tail)))


def nearest(a: Any) -> Any:
    """What the dtype of x can hold of a: for pairs one number, else `as_single` (as narrow as x, or wider)."""
    return rounded(a) if is_pair(a) else as_single(a)


def plus_square(total: Any, a: Any) -> Any:
    """total + a²."""
    if not is_pair(total):
        return multiply_add(a, a, total) if is_narrow(a) else total + a * a
    # Knuth's two-sum with the square unrounded inside a multiply-add: 7 operations in place of 10. What is left of the
    # square is rounded, some 2**-53 of the total times 2**-53. a's tail must be small beside its head.
    first, second = _pair(a)
    head = fma(first, first, total.head)
    added = head - total.head
    tail = total.head - (head - added)
    tail = tail + fma(first, first, -added)
    if second is not None:
        tail = fma(first + first, second, tail)
    return Pair(head, _add(total.tail, tail))


def larger(a: Any, b: Any) -> Any:
    """a or |b|, whichever is larger; a where b is NaN; None where a is. Of plain numbers."""
    if a is None:
        return a
    size = abs(b)
    return either(exceeds(size, a), size, a)


def largest_magnitude(a: Any, b: Any) -> Any:
    """a or |b|, whichever is larger; NaN if one is. b is a plain number; of a pair a, the head counts."""
    if is_pair(a):
        return Pair(largest_magnitude(a.head, b), a.tail)
    size = abs(rounded(b))
    return either(is_number(size), either(exceeds(size, a), size, a), size)


def plus_product(total: Any, a: Any, b: Any) -> Any:
    """total + a · b; the total where one of the three is None."""
    if total is None or a is None or b is None:
        return total
    if is_pair(total):
        return plus(total, times(_pair(a), b))
    if is_pair(a):
        return total + rounded(times(a, b))
    return multiply_add(a, b, total)


def minus_product(a: Any, b: Any, c: Any) -> Any:
    """a - b · c."""
    return minus(a, times(_pair(b), c)) if is_pair(a) else multiply_add(-b, c, a)


def scaled_and_shifted(xhat: Any, scale: Any, shift: Any) -> Any:
    """xhat · scale + shift, either of which may be None.

    A product of pairs that nothing is added to is rounded at once: one plain number.
    """
    if shift is not None:
        return plus(times(xhat, scale), shift)
    if scale is None or not (is_pair(xhat) or is_pair(scale)):
        return times(xhat, scale)
    a, b, tail = _pair(xhat), _pair(scale), None
    for part, other in ((a.tail, b.head), (b.tail, a.head)):
        if part is not None:
            tail = part * other if tail is None else fma(part, other, tail)
    if tail is None:
        return a.head * b.head
    return fma(a.head, b.head, either(is_finite(tail), tail, constant(0.0, tail)))
