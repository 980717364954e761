"""LLVM code for vectors: constants, masks, intrinsics, and the conversions of 16-bit floats.

Plain functions on an llvmlite builder and its values; nothing here knows Numba's types.
"""

from __future__ import annotations

import math
import platform
import sys
from typing import Any

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()

_SUFFIX = {I8: "i8", I16: "i16", I32: "i32", FLOAT: "f32", DOUBLE: "f64"}


def intrinsic(builder: Any, name: str, result: Any, operands: list[Any]) -> Any:
    """A call of an LLVM intrinsic."""
    function_type = ir.FunctionType(result, [value.type for value in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), operands)


def constant(vector: Any, value: Any) -> Any:
    """The same number in each lane."""
    return ir.Constant(vector, [value] * vector.count)


def splat(builder: Any, scalar: Any, count: int) -> Any:
    """A vector of `count` times the scalar."""
    vector = ir.VectorType(scalar.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, count), None)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def mask(builder: Any, count: Any, width: int) -> Any:
    """Lane < count, for each of `width` lanes."""
    lanes = _numbers(ir.VectorType(I32, width))
    count = builder.trunc(count, I32) if count.type.width > 32 else count
    return builder.icmp_signed("<", lanes, splat(builder, count, width))


def _numbers(vector: Any) -> Any:
    return ir.Constant(vector, list(range(vector.count)))


def _last(builder: Any, pointer: Any, count: Any) -> Any:
    """The address of element count - 1."""
    first = builder.bitcast(pointer, I16.as_pointer())
    return builder.gep(first, [builder.sub(count, ir.Constant(count.type, 1))])


def masked_load(context: Any, builder: Any, pointer: Any, vector: Any, align: int, count: Any) -> Any:
    """The first `count` (at least 1) elements of a vector of this type, zeros behind; what lies behind is not touched.

    For 16-bit elements LLVM makes a branch each, but with AVX-512. Here words of two are loaded at once, and the last
    element by itself: forward, 4000 rows of 40 bfloat16 take 0.8 of the time.
    """
    if vector.element == I16 and not _has(context, "avx512bw"):
        pairs = ir.VectorType(I32, vector.count // 2)
        two = builder.lshr(count, ir.Constant(count.type, 1))
        words = masked_load(context, builder, builder.bitcast(pointer, pairs.as_pointer()), pairs, align, two)
        last = splat(builder, builder.load(_last(builder, pointer, count), align=align), vector.count)
        place = builder.sub(count, ir.Constant(count.type, 1))
        is_last = builder.icmp_signed("==", _numbers(vector), splat(builder, builder.trunc(place, I16), vector.count))
        return builder.select(is_last, last, builder.bitcast(words, vector))
    name = f"llvm.masked.load.v{vector.count}{_SUFFIX[vector.element]}.p0"
    operands = [pointer, ir.Constant(I32, align), mask(builder, count, vector.count), ir.Constant(vector, None)]
    return intrinsic(builder, name, vector, operands)


def masked_store(context: Any, builder: Any, pointer: Any, value: Any, align: int, count: Any) -> None:
    """Write the first `count` (at least 1) elements; what lies behind is not touched."""
    if value.type.element == I16 and not _has(context, "avx512bw"):
        pairs = ir.VectorType(I32, value.type.count // 2)
        two = builder.lshr(count, ir.Constant(count.type, 1))
        words = builder.bitcast(pointer, pairs.as_pointer())
        masked_store(context, builder, words, builder.bitcast(value, pairs), align, two)
        place = builder.sub(count, ir.Constant(count.type, 1))
        builder.store(builder.extract_element(value, place), _last(builder, pointer, count), align=align)
        return
    name = f"llvm.masked.store.v{value.type.count}{_SUFFIX[value.type.element]}.p0"
    operands = [value, pointer, ir.Constant(I32, align), mask(builder, count, value.type.count)]
    intrinsic(builder, name, ir.VoidType(), operands)


def _has(context: Any, feature: str) -> bool:
    return f"+{feature}" in context.codegen()._tm_features.split(",")  # Numba offers no public way to ask


def _has_float16_conversion(context: Any) -> bool:
    return _has(context, "f16c") or platform.machine().lower() in ("aarch64", "arm64")


def from_float16(context: Any, builder: Any, bits: Any) -> Any:
    """float16 bits to float32, by instruction where there is one."""
    width = bits.type.count
    floats, words = ir.VectorType(FLOAT, width), ir.VectorType(I32, width)
    if _has_float16_conversion(context):
        return builder.fpext(builder.bitcast(bits, ir.VectorType(HALF, width)), floats)
    wide = builder.zext(bits, words)
    sign = builder.shl(builder.and_(wide, constant(words, 0x8000)), constant(words, 16))
    magnitude = builder.shl(builder.and_(wide, constant(words, 0x7FFF)), constant(words, 13))
    # the exponent is biased by 15 there and by 127 here: multiplying by 2^112 mends it, subnormals included
    scaled = builder.fmul(builder.bitcast(magnitude, floats), constant(floats, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, constant(words, 0x7C00 << 13))
    infinite = builder.or_(magnitude, constant(words, 0x7F800000))
    result = builder.select(special, infinite, builder.bitcast(scaled, words))
    return builder.bitcast(builder.or_(result, sign), floats)


def to_float16(context: Any, builder: Any, value: Any) -> Any:
    """float32 to float16 bits, ties to even, by instruction where there is one."""
    width = value.type.count
    words, floats = ir.VectorType(I32, width), ir.VectorType(FLOAT, width)
    if _has_float16_conversion(context):
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(HALF, width)), ir.VectorType(I16, width))
    bits = builder.bitcast(value, words)
    sign = builder.and_(builder.lshr(bits, constant(words, 16)), constant(words, 0x8000))
    magnitude = builder.and_(bits, constant(words, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, constant(words, 13)), constant(words, 1))
    rebias = ((15 - 127) << 23) % 2**32
    rounded = builder.add(builder.add(magnitude, odd), constant(words, (0xFFF + rebias) % 2**32))
    normal = builder.lshr(rounded, constant(words, 13))
    # adding 0.5 shifts a float16 subnormal's last bit to the last bit of the float32, which rounds it
    shifted = builder.fadd(builder.bitcast(magnitude, floats), constant(floats, 0.5))
    subnormal = builder.sub(builder.bitcast(shifted, words), constant(words, 0x3F000000))
    result = builder.select(builder.icmp_unsigned("<", magnitude, constant(words, 0x38800000)), subnormal, normal)
    too_large = builder.icmp_unsigned(">=", magnitude, constant(words, 0x47800000))
    result = builder.select(too_large, constant(words, 0x7C00), result)
    is_nan = builder.icmp_unsigned(">", magnitude, constant(words, 0x7F800000))
    result = builder.select(is_nan, constant(words, 0x7E00), result)
    return builder.trunc(builder.or_(result, sign), ir.VectorType(I16, width))


def from_bfloat16(builder: Any, bits: Any) -> Any:
    """bfloat16 bits to float32: they are its upper half."""
    words = ir.VectorType(I32, bits.type.count)
    shifted = builder.shl(builder.zext(bits, words), constant(words, 16))
    return builder.bitcast(shifted, ir.VectorType(FLOAT, bits.type.count))


def _rounded_to_bfloat16(builder: Any, bits: Any) -> Any:
    """Words of float32 to words whose upper halves are the nearest bfloat16, ties to even; not for each NaN."""
    words = bits.type
    odd = builder.and_(builder.lshr(bits, constant(words, 16)), constant(words, 1))
    return builder.add(bits, builder.add(odd, constant(words, 0x7FFF)))


def to_bfloat16(builder: Any, value: Any) -> Any:
    """float32 to bfloat16 bits, ties to even; NaN stays NaN."""
    width = value.type.count
    bits = builder.bitcast(value, ir.VectorType(I32, width))
    quiet = builder.or_(bits, constant(bits.type, 0x400000))
    is_nan = builder.fcmp_unordered("uno", value, value)
    result = builder.select(is_nan, quiet, _rounded_to_bfloat16(builder, bits))
    # the upper halves by one shuffle: on AVX-512 one instruction, where shifting and narrowing take seven
    halves = builder.bitcast(result, ir.VectorType(I16, 2 * width))
    upper = ir.Constant(ir.VectorType(I32, width), [2 * i + (sys.byteorder == "little") for i in range(width)])
    return builder.shuffle_vector(halves, halves, upper)


def _half(builder: Any, vector: Any, first: int, step: int) -> Any:
    """Every `step`-th element from `first` on, half of them."""
    count = vector.type.count // 2
    places = ir.Constant(ir.VectorType(I32, count), [first + step * i for i in range(count)])
    return builder.shuffle_vector(vector, vector, places)


def _joined(builder: Any, first: Any, second: Any) -> Any:
    places = ir.Constant(ir.VectorType(I32, 2 * first.type.count), list(range(2 * first.type.count)))
    return builder.shuffle_vector(first, second, places)


def even_then_odd(builder: Any, vector: Any) -> Any:
    """The elements with even numbers, and then those with odd ones."""
    return _joined(builder, _half(builder, vector, 0, 2), _half(builder, vector, 1, 2))


def in_memory_order(builder: Any, vector: Any) -> Any:
    """Undoes `even_then_odd`."""
    half = vector.type.count // 2
    places = [i // 2 + half * (i % 2) for i in range(2 * half)]
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, 2 * half), places))


def with_short_nan(builder: Any, value: Any) -> Any:
    """The same numbers; each NaN is one whose bits are those of a bfloat16."""
    return builder.select(builder.fcmp_ordered("ord", value, value), value, constant(value.type, math.nan))


def from_bfloat16_words(builder: Any, bits: Any) -> Any:
    """bfloat16 bits to float32, in the order of `even_then_odd`: two of them are a word, each its upper half once."""
    words = ir.VectorType(I32, bits.type.count // 2)
    both = builder.bitcast(bits, words)
    lower, upper = builder.shl(both, constant(words, 16)), builder.and_(both, constant(words, 0xFFFF0000))
    first, second = (lower, upper) if sys.byteorder == "little" else (upper, lower)
    return builder.bitcast(_joined(builder, first, second), ir.VectorType(FLOAT, bits.type.count))


def to_bfloat16_words(builder: Any, value: Any) -> Any:
    """float32 in the order of `even_then_odd` to bfloat16 bits in that of memory, ties to even.

    Rounding would carry a NaN into the sign if all its upper bits were set and some of its lower half, so there must
    be none like that: none comes from bfloat16, nor from arithmetic with such numbers (see `with_short_nan`).
    """
    rounded = _rounded_to_bfloat16(builder, builder.bitcast(value, ir.VectorType(I32, value.type.count)))
    halves = [_half(builder, rounded, first, 1) for first in (0, value.type.count // 2)]
    lower, upper = halves if sys.byteorder == "little" else reversed(halves)
    words = lower.type
    both = builder.or_(builder.lshr(lower, constant(words, 16)), builder.and_(upper, constant(words, 0xFFFF0000)))
    return builder.bitcast(both, ir.VectorType(I16, value.type.count))
