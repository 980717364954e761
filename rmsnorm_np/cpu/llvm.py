"""LLVM code for vectors: constants, masks, intrinsics, and the conversions of 16-bit floats.

Plain functions on an llvmlite builder and its values; nothing here knows Numba's types.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

from llvmlite import ir
from numba.core import cgutils

I16, I32, I64 = (ir.IntType(bits) for bits in (16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()

_SUFFIX = {I16: "i16", FLOAT: "f32", DOUBLE: "f64"}


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
    lanes = ir.Constant(ir.VectorType(I32, width), list(range(width)))
    count = builder.trunc(count, I32) if count.type.width > 32 else count
    return builder.icmp_signed("<", lanes, splat(builder, count, width))


def masked_load(builder: Any, pointer: Any, vector: Any, align: int, count: Any) -> Any:
    """The first `count` elements of a vector of this type, zeros behind; what lies behind is not touched."""
    name = f"llvm.masked.load.v{vector.count}{_SUFFIX[vector.element]}.p0"
    operands = [pointer, ir.Constant(I32, align), mask(builder, count, vector.count), ir.Constant(vector, None)]
    return intrinsic(builder, name, vector, operands)


def masked_store(builder: Any, pointer: Any, value: Any, align: int, count: Any) -> None:
    """Write the first `count` elements; what lies behind is not touched."""
    name = f"llvm.masked.store.v{value.type.count}{_SUFFIX[value.type.element]}.p0"
    operands = [value, pointer, ir.Constant(I32, align), mask(builder, count, value.type.count)]
    intrinsic(builder, name, ir.VoidType(), operands)


def _has_float16_conversion(context: Any) -> bool:
    features = context.codegen()._tm_features.split(",")  # Numba offers no public way to ask
    return "+f16c" in features or platform.machine().lower() in ("aarch64", "arm64")


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


def to_bfloat16(builder: Any, value: Any) -> Any:
    """float32 to bfloat16 bits, ties to even; NaN stays NaN."""
    width = value.type.count
    words = ir.VectorType(I32, width)
    bits = builder.bitcast(value, words)
    sixteen = constant(words, 16)
    odd = builder.and_(builder.lshr(bits, sixteen), constant(words, 1))
    even = builder.add(bits, builder.add(odd, constant(words, 0x7FFF)))
    quiet = builder.or_(bits, constant(words, 0x400000))
    result = builder.select(builder.fcmp_unordered("uno", value, value), quiet, even)
    # the upper halves by one shuffle: on AVX-512 one instruction, where shifting and narrowing take seven
    halves = builder.bitcast(result, ir.VectorType(I16, 2 * width))
    upper = ir.Constant(ir.VectorType(I32, width), [2 * i + (sys.byteorder == "little") for i in range(width)])
    return builder.shuffle_vector(halves, halves, upper)
