"""LLVM code for pairs: the unevaluated sum of two float64, high and low, about 106 bits.

The classic error-free kind: Knuth's two-sum, and the error of a product by fused multiply-add (Ogita, Rump and Oishi,
"Accurate sum and dot product", 2005). Operands are (high, low); low is None where it is zero by construction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from rmsnorm_np.cpu.llvm import FLOAT, constant, intrinsic


def parts(kind: str, value: Any, builder: Any) -> tuple[Any, Any]:
    """High and low part; the low part is None where it is zero by construction."""
    if kind == "pair":
        return builder.extract_value(value, 0), builder.extract_value(value, 1)
    return value, None


def pair(builder: Any, high: Any, low: Any) -> Any:
    """High and low part as one value."""
    value = ir.Constant(ir.LiteralStructType([high.type, low.type]), ir.Undefined)
    return builder.insert_value(builder.insert_value(value, high, 0), low, 1)


def collapse(builder: Any, value: Any) -> Any:
    """The pair as one float64; where an error term met an infinity, the high part alone is the result."""
    high, low = parts("pair", value, builder)
    total = builder.fadd(high, low)
    return builder.select(builder.fcmp_ordered("ord", total, total), total, high)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""
    suffix = "f32" if a.type.element == FLOAT else "f64"
    return intrinsic(builder, f"llvm.fma.v{a.type.count}{suffix}", a.type, [a, b, c])


def add_parts(builder: Any, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
    """Knuth's two-sum of the high parts; its error and the low parts are the new low part."""
    total = builder.fadd(a[0], b[0])
    second = builder.fsub(total, a[0])
    low = builder.fadd(builder.fsub(a[0], builder.fsub(total, second)), builder.fsub(b[0], second))
    for part in (a[1], b[1]):
        if part is not None:
            low = builder.fadd(low, part)
    return pair(builder, total, low)


def negate_parts(builder: Any, a: tuple[Any, Any]) -> tuple[Any, Any]:
    """Minus a, exact."""
    return builder.fneg(a[0]), None if a[1] is None else builder.fneg(a[1])


def multiply_parts(builder: Any, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
    """The product of the high parts and its error; the low parts add to the error."""
    product = builder.fmul(a[0], b[0])
    low = fma(builder, a[0], b[0], builder.fneg(product))
    if a[1] is not None:
        low = fma(builder, a[1], b[0], low)
    if b[1] is not None:
        low = fma(builder, a[0], b[1], low)
    if a[1] is not None and b[1] is not None:  # not small where high parts have cancelled, as in x - mean
        low = fma(builder, a[1], b[1], low)
    return pair(builder, product, low)


def add_square_parts(builder: Any, total: tuple[Any, Any], factor: tuple[Any, Any]) -> Any:
    """The pair plus a square: Knuth's two-sum with the square unrounded inside a multiply-add, which takes 7 operations
    in place of 10. What is left of the square is rounded, some 2**-53 of the total times 2**-53.

    A factor's low part must be small beside the high one, for its own square is left out.
    """
    first, second = factor
    high = fma(builder, first, first, total[0])
    added = builder.fsub(high, total[0])
    low = builder.fsub(total[0], builder.fsub(high, added))
    low = builder.fadd(low, fma(builder, first, first, builder.fneg(added)))
    if second is not None:
        low = fma(builder, builder.fadd(first, first), second, low)
    return pair(builder, high, builder.fadd(total[1], low))


def rounded_product(builder: Any, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
    """The product as one float64, rounded once: the low parts add to the error before the high parts are multiplied.

    Where that meets an infinity it may be infinite or NaN itself; then the high parts alone are the result.
    """
    low = None
    for part, other in ((a[1], b[0]), (b[1], a[0])):
        if part is not None:
            low = builder.fmul(part, other) if low is None else fma(builder, part, other, low)
    if low is None:
        return builder.fmul(a[0], b[0])
    size = intrinsic(builder, f"llvm.fabs.v{low.type.count}f64", low.type, [low])
    finite = builder.fcmp_ordered("<=", size, constant(low.type, float(np.finfo(np.float64).max)))
    low = builder.select(finite, low, constant(low.type, 0.0))
    return fma(builder, a[0], b[0], low)


def divide_parts(builder: Any, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
    """The quotient of the high parts; what is left of a, divided, is the low part. The high part of the result is the
    sum of both: were it one bit off, differences from a mean would be two parts that cancel.
    """
    quotient = builder.fdiv(a[0], b[0])
    rest = fma(builder, builder.fneg(quotient), b[0], a[0])
    if a[1] is not None:
        rest = builder.fadd(rest, a[1])
    if b[1] is not None:
        rest = fma(builder, builder.fneg(quotient), b[1], rest)
    low = builder.fdiv(rest, b[0])
    total = builder.fadd(quotient, low)
    finite = builder.fcmp_ordered("ord", total, total)  # infinities, and zero from them, leave NaN in the low part
    high = builder.select(finite, total, quotient)
    return pair(builder, high, builder.select(finite, builder.fsub(low, builder.fsub(total, quotient)), low))
