"""Functions of numbers in registers that are no instruction: the exponential, rounding to a dtype, 8 bits."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core.registry import cpu_target

from rmsnorm_np.cpu import llvm
from rmsnorm_np.cpu.llvm import DOUBLE, FLOAT, I8, I32, I64, constant
from rmsnorm_np.cpu.shapes import Leaf

_LN2_HIGH = float.fromhex("0x1.62e42fefa0000p-1")  # ln 2: times an integer below 2**11 it is exact
_LN2_LOW = float.fromhex("0x1.cf79abc9e3b39p-40")
_ROUNDING = 1.5 * 2.0**52  # added and taken away, it leaves the nearest integer; in between that is in the last bits
_LEAST = -746.0  # exp of this and less is zero
# the bits of a float32 that a number of the format has behind the exponent, the difference of the biases of the
# exponents, and the bits of NaN; int8 has no exponent
EIGHT_BITS = {"int8": None, "float8_e4m3fn": (3, 120, 0x7F), "float8_e5m2": (2, 112, 0x7E)}
_TERMS = 14  # of the series, for |r| <= ln(2) / 2: the next one is below 2**-57


def exponential(a: Any) -> Any:
    """exp(a) for a <= 0: 2**k · exp(r), with a = k ln 2 + r, |r| <= ln(2) / 2, and the series of exp(r)."""
    b, leaf = a.builder, a.leaf
    a = a.to(Leaf("f64", leaf.lanes))
    a = a.at_most(_LEAST).either(a.constant(_LEAST), a)  # NaN stays
    shifted = a * (1 / math.log(2)) + _ROUNDING
    k = shifted - _ROUNDING
    r = (-k).fma(_LN2_LOW, (-k).fma(_LN2_HIGH, a))
    square = r * r
    even, odd = (_polynomial(square, [1 / math.factorial(j) for j in range(first, _TERMS, 2)]) for first in (2, 1))
    value = even.multiply_add(square, odd * r) + 1.0  # the one last: what is added to it is smaller
    words = ir.VectorType(I64, leaf.lanes) if leaf.lanes else I64
    whole = b.sub(b.bitcast(shifted.value, words), b.bitcast(shifted.constant(_ROUNDING).value, words))
    half = b.ashr(whole, _all(words, 1))
    for part in (half, b.sub(whole, half)):  # in two steps, as the result may be subnormal
        bits = b.shl(b.add(part, _all(words, 1023)), _all(words, 52))
        value = value * type(a)(b, b.bitcast(bits, value.value.type))
    return value.to(leaf)


@cache
def _short_series() -> list[float]:
    """Factors of the polynomial of ninth degree that is nearest to exp(r), off by 2**-46 at most."""
    half = math.log(2) / 2
    near = np.polynomial.Chebyshev.interpolate(np.exp, 9, (-half, half))
    return [float(factor) for factor in near.convert(kind=np.polynomial.Polynomial).coef]


def short_exponential(a: Any) -> Any:
    """exp(a) to 2**-45, for a <= 0: the same with fewer terms, ln 2 in one piece, and no subnormal numbers."""
    b, leaf = a.builder, a.leaf
    shifted = a.multiply_add(a.constant(1 / math.log(2)), a.constant(_ROUNDING))
    r = (-(shifted - _ROUNDING)).fma(math.log(2), a)
    series = _short_series()
    square = r * r
    even, odd = (_polynomial(square, series[first::2]) for first in (0, 1))
    value = odd.multiply_add(r, even)
    words = ir.VectorType(I64, leaf.lanes) if leaf.lanes else I64
    # the last bits of `shifted` are k, which is added to the exponent
    bits = b.add(b.bitcast(value.value, words), b.shl(b.bitcast(shifted.value, words), _all(words, 52)))
    found = type(a)(b, b.bitcast(bits, value.value.type))
    return a.at_most(-700.0).either(a.constant(0.0), found)  # NaN stays


def short_reciprocal(a: Any) -> Any:
    """1 / a to 2**-46, for a float64 in the range of float32: a division of 24 bits, and a step of Newton's method."""
    near = (1.0 / a.to(Leaf("f32", a.leaf.lanes))).to(a.leaf)
    return near * (-a).fma(near, a.constant(2.0))


def _all(kind: Any, value: int) -> Any:
    return constant(kind, value) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)


def _polynomial(x: Any, factors: list[float]) -> Any:
    value = x.constant(factors[-1])
    for factor in reversed(factors[:-1]):
        value = value.multiply_add(x, factor)
    return value


def in_dtype(a: Any, name: str) -> Any:
    """a, a vector, rounded once to what this dtype can hold."""
    b, leaf = a.builder, a.leaf
    if name == "float64":
        return a
    if name == "float32":
        return a.as_single()
    value, context = _to_odd(b, a), cpu_target.target_context
    if name == "float16":
        value = llvm.from_float16(context, b, llvm.to_float16(context, b, value))
    else:
        value = llvm.from_bfloat16(b, llvm.to_bfloat16(b, value))
    return type(a)(b, value).to(leaf)


def _to_odd(b: Any, a: Any) -> Any:
    """float64 as float32; where that is not exact, of its two neighbours the one whose last bit is 1. Such a number can
    be rounded once more, to fewer bits, as if it had not been rounded before.
    """
    near = a.to(Leaf("f32", a.leaf.lanes))
    words = ir.VectorType(I32, a.leaf.lanes)
    back, bits = near.to(a.leaf), b.bitcast(near.value, words)
    farther = abs(back).exceeds(abs(a)).value
    inexact = (abs(back).exceeds(abs(a)) | abs(a).exceeds(abs(back))).value
    bits = b.sub(bits, b.zext(farther, words))
    return b.bitcast(b.or_(bits, b.zext(inexact, words)), near.value.type)


def power_below(a: Any) -> Any:
    """The power of two that |a|, float64, has as its exponent; zero for subnormal numbers."""
    b, words = a.builder, ir.VectorType(I64, a.leaf.lanes)
    bits = b.and_(b.bitcast(a.value, words), constant(words, 0x7FF0000000000000))
    return type(a)(b, b.bitcast(bits, a.value.type))


def in_eight_bits(b: Any, value: Any, name: str) -> Any:
    """float64 that are numbers of this format, or NaN, as its bits; NaN is 0 for int8."""
    lanes = value.type.count
    narrow, words, floats = (ir.VectorType(kind, lanes) for kind in (I8, I32, FLOAT))
    is_nan = b.fcmp_unordered("uno", value, value)
    layout = EIGHT_BITS[name]
    if layout is None:
        value = b.select(is_nan, constant(ir.VectorType(DOUBLE, lanes), 0.0), value)
        return b.trunc(b.fptosi(value, words), narrow)
    digits, bias, nan = layout
    sign = b.and_(b.lshr(b.bitcast(b.fptrunc(value, floats), words), constant(words, 24)), constant(words, 0x80))
    # so much less that the exponent's bits are those of the format, subnormal where it is there
    small = b.fmul(b.fptrunc(value, floats), constant(floats, 2.0**-bias))
    bits = b.and_(b.lshr(b.bitcast(small, words), constant(words, 23 - digits)), constant(words, 0x7F))
    bits = b.select(is_nan, constant(words, nan), b.or_(bits, sign))
    return b.trunc(bits, narrow)
