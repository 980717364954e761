"""How the functions of :mod:`rmsnorm_np.cpu.simd` compile: a Numba type for the lanes, and LLVM code for each.

`Lanes` values are LLVM vectors in registers; a ``pair`` is two of them. The arithmetic of ``exact`` and ``pair`` is
the classic error-free kind (Knuth's two-sum, the product's error by fused multiply-add; Ogita, Rump and Oishi,
"Accurate sum and dot product", 2005).
"""

from __future__ import annotations

import operator
import platform
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import lower_builtin, models, register_model, type_callable

from rmsnorm_np.cpu import simd
from rmsnorm_np.cpu.simd import BLOCK, LANES

KINDS = ("single", "double", "exact", "pair")  # in the order of promotion
CACHE_LINE = 64

_i1, _i16, _i32, _i64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_half, _float, _double = ir.HalfType(), ir.FloatType(), ir.DoubleType()


class LanesType(types.Type):  # type: ignore[misc]
    """``count`` numbers of one kind; ``count`` is LANES, or 1 for a pair that is a scalar."""

    def __init__(self, kind: str, count: int = LANES) -> None:
        self.kind = kind
        self.count = count
        super().__init__(name=f"Lanes({kind}, {count})")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: LanesType) -> None:
        vector = ir.VectorType(_float if lanes.kind == "single" else _double, lanes.count)
        llvm_type = ir.LiteralStructType([vector, vector]) if lanes.kind == "pair" else vector
        super().__init__(manager, lanes, llvm_type)


# ---------------------------------------------------------------------------------------------- loading and storing


def _loaded_kind(source: Any, work: Any) -> str:
    if isinstance(work, LanesType):
        if work.kind == "pair":
            return "exact"
        return "double" if work.kind == "single" and source.dtype == types.float64 else str(work.kind)
    if source.dtype == types.float64:
        return "exact"
    return "single" if source.dtype != types.float32 and work.dtype == types.float32 else "double"


@type_callable(simd.data)
def _type_data(context: Any) -> Any:
    def typer(array: Any) -> Any:
        if isinstance(array, types.Array) and array.layout == "C":
            return types.CPointer(array.dtype)
        if isinstance(array, types.NoneType):
            return types.none

    return typer


@lower_builtin(simd.data, types.Array)
def _data(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return context.make_array(sig.args[0])(context, builder, value=args[0]).data


@lower_builtin(simd.data, types.NoneType)
def _no_data(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return context.get_dummy_value()


@type_callable(simd.load)
def _type_load(context: Any) -> Any:
    def typer(array: Any, start: Any, work: Any, count: Any = None) -> Any:
        if isinstance(array, types.CPointer) and isinstance(start, types.Integer):
            return LanesType(_loaded_kind(array, work))

    return typer


@lower_builtin(simd.load, types.CPointer, types.Integer, types.Any)
@lower_builtin(simd.load, types.CPointer, types.Integer, types.Any, types.NoneType)
@lower_builtin(simd.load, types.CPointer, types.Integer, types.Any, types.Integer)
def _load(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    array = sig.args[0]
    stored = _stored_type(array.dtype)
    pointer = _pointer(context, builder, array, args, stored)
    align = array.dtype.bitwidth // 8
    if isinstance(sig.args[-1], types.Integer) and len(args) == 4:
        value = _masked_load(builder, pointer, stored, align, args[3])
    else:
        value = builder.load(pointer, align=align)
    return _convert_loaded(context, builder, array.dtype, value, sig.return_type.kind)


@type_callable(simd.store)
def _type_store(context: Any) -> Any:
    def typer(array: Any, start: Any, lanes: Any, count: Any = None) -> Any:
        if isinstance(array, types.CPointer) and isinstance(lanes, LanesType):
            return types.none

    return typer


@lower_builtin(simd.store, types.CPointer, types.Integer, LanesType)
@lower_builtin(simd.store, types.CPointer, types.Integer, LanesType, types.NoneType)
@lower_builtin(simd.store, types.CPointer, types.Integer, LanesType, types.Integer)
def _store(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    array, lanes = sig.args[0], sig.args[2]
    stored = _stored_type(array.dtype)
    pointer = _pointer(context, builder, array, args, stored)
    value = _convert_to_stored(context, builder, lanes.kind, args[2], array.dtype)
    align = array.dtype.bitwidth // 8
    if isinstance(sig.args[-1], types.Integer) and len(args) == 4:
        _masked_store(builder, pointer, value, align, args[3])
    else:
        builder.store(value, pointer, align=align)
    return context.get_dummy_value()


@type_callable(simd.stream)
def _type_stream(context: Any) -> Any:
    def typer(array: Any, start: Any, lanes: Any) -> Any:
        if isinstance(array, types.CPointer) and isinstance(lanes, LanesType):
            return types.none

    return typer


@lower_builtin(simd.stream, types.CPointer, types.Integer, LanesType)
def _stream(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    array, lanes = sig.args[0], sig.args[2]
    pointer = _pointer(context, builder, array, args, _stored_type(array.dtype))
    value = _convert_to_stored(context, builder, lanes.kind, args[2], array.dtype)
    instruction = builder.store(value, pointer, align=CACHE_LINE)
    instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_i32, 1)]))
    return context.get_dummy_value()


@type_callable(simd.prefetch)
def _type_prefetch(context: Any) -> Any:
    return lambda array, start: types.none


@lower_builtin(simd.prefetch, types.CPointer, types.Integer)
def _prefetch(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    array = sig.args[0]
    byte = ir.IntType(8).as_pointer()
    pointer = builder.bitcast(_pointer(context, builder, array, args, _stored_type(array.dtype)), byte)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, _i32, _i32, _i32]), "llvm.prefetch.p0"
    )
    for line in range(0, LANES * array.dtype.bitwidth // 8, CACHE_LINE):
        address = builder.gep(pointer, [ir.Constant(_i64, line)])
        read, most_local, data = (ir.Constant(_i32, value) for value in (0, 3, 1))
        builder.call(function, [address, read, most_local, data])
    return context.get_dummy_value()


@type_callable(simd.until_aligned)
def _type_until_aligned(context: Any) -> Any:
    return lambda array, start: types.intp


@lower_builtin(simd.until_aligned, types.CPointer, types.Integer)
def _until_aligned(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    array = sig.args[0]
    address = builder.ptrtoint(_pointer(context, builder, array, args, _stored_type(array.dtype)), _i64)
    itemsize = array.dtype.bitwidth // 8
    bytes_left = builder.and_(builder.neg(address), ir.Constant(_i64, CACHE_LINE - 1))
    return builder.udiv(bytes_left, ir.Constant(_i64, itemsize))


@type_callable(simd.zeros)
def _type_zeros(context: Any) -> Any:
    def typer(array: Any, work: Any) -> Any:
        kind = _loaded_kind(array, work)
        return LanesType("pair" if kind == "exact" else kind)

    return typer


@lower_builtin(simd.zeros, types.CPointer, types.Any)
def _zeros(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return ir.Constant(context.get_value_type(sig.return_type), None)


def _stored_type(dtype: Any) -> Any:
    return {
        types.uint16: _i16,
        types.int16: _i16,
        types.float32: _float,
        types.float64: _double,
    }[dtype]


def _pointer(context: Any, builder: Any, array: Any, args: Any, stored: Any) -> Any:
    """The address of element ``args[1]`` of ``args[0]``, as a pointer to LANES elements."""
    data, start = args[:2]
    if start.type.width < 64:
        start = builder.sext(start, _i64)
    data = builder.bitcast(data, stored.as_pointer())
    return builder.bitcast(builder.gep(data, [start]), ir.VectorType(stored, LANES).as_pointer())


def _intrinsic(builder: Any, name: str, result: Any, operands: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [value.type for value in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), operands)


def _constant(vector: Any, value: Any) -> Any:
    return ir.Constant(vector, [value] * vector.count)


def _mask(builder: Any, count: Any) -> Any:
    """Lane < count, for each lane."""
    lanes = ir.Constant(ir.VectorType(_i32, LANES), list(range(LANES)))
    count = builder.trunc(count, _i32) if count.type.width > 32 else count
    return builder.icmp_signed("<", lanes, _splat(builder, count, LANES))


_SUFFIX = {_i16: "i16", _float: "f32", _double: "f64"}


def _masked_load(builder: Any, pointer: Any, stored: Any, align: int, count: Any) -> Any:
    vector = ir.VectorType(stored, LANES)
    name = f"llvm.masked.load.v{LANES}{_SUFFIX[stored]}.p0"
    operands = [pointer, ir.Constant(_i32, align), _mask(builder, count), ir.Constant(vector, None)]
    return _intrinsic(builder, name, vector, operands)


def _masked_store(builder: Any, pointer: Any, value: Any, align: int, count: Any) -> None:
    name = f"llvm.masked.store.v{LANES}{_SUFFIX[value.type.element]}.p0"
    operands = [value, pointer, ir.Constant(_i32, align), _mask(builder, count)]
    _intrinsic(builder, name, ir.VoidType(), operands)


def _splat(builder: Any, scalar: Any, count: int) -> Any:
    vector = ir.VectorType(scalar.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_i32, 0))
    zeros = ir.Constant(ir.VectorType(_i32, count), None)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


# ------------------------------------------------------------------------------------------------------ conversions


def _convert_loaded(context: Any, builder: Any, dtype: Any, value: Any, kind: str) -> Any:
    if dtype == types.uint16:
        value = _from_float16(context, builder, value)
    elif dtype == types.int16:
        value = _from_bfloat16(builder, value)
    element = _float if kind == "single" else _double
    if value.type.element == element:
        return value
    return builder.fpext(value, ir.VectorType(element, value.type.count))


def _convert_to_stored(context: Any, builder: Any, kind: str, value: Any, dtype: Any) -> Any:
    if kind == "pair":
        value = _collapse(builder, value)
    if dtype == types.float64:
        return value if value.type.element == _double else builder.fpext(value, ir.VectorType(_double, LANES))
    if value.type.element == _double:
        value = builder.fptrunc(value, ir.VectorType(_float, LANES))
    if dtype == types.uint16:
        return _to_float16(context, builder, value)
    if dtype == types.int16:
        return _to_bfloat16(builder, value)
    return value


def _has_float16_conversion(context: Any) -> bool:
    features = context.codegen()._tm_features.split(",")  # Numba offers no public way to ask
    return "+f16c" in features or platform.machine().lower() in ("aarch64", "arm64")


def _from_float16(context: Any, builder: Any, bits: Any) -> Any:
    floats, words = ir.VectorType(_float, LANES), ir.VectorType(_i32, LANES)
    if _has_float16_conversion(context):
        return builder.fpext(builder.bitcast(bits, ir.VectorType(_half, LANES)), floats)
    wide = builder.zext(bits, words)
    sign = builder.shl(builder.and_(wide, _constant(words, 0x8000)), _constant(words, 16))
    magnitude = builder.shl(builder.and_(wide, _constant(words, 0x7FFF)), _constant(words, 13))
    # the exponent is biased by 15 there and by 127 here: multiplying by 2^112 mends it, subnormals included
    scaled = builder.fmul(builder.bitcast(magnitude, floats), _constant(floats, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, _constant(words, 0x7C00 << 13))
    infinite = builder.or_(magnitude, _constant(words, 0x7F800000))
    result = builder.select(special, infinite, builder.bitcast(scaled, words))
    return builder.bitcast(builder.or_(result, sign), floats)


def _to_float16(context: Any, builder: Any, value: Any) -> Any:
    words, floats = ir.VectorType(_i32, LANES), ir.VectorType(_float, LANES)
    if _has_float16_conversion(context):
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(_half, LANES)), ir.VectorType(_i16, LANES))
    bits = builder.bitcast(value, words)
    sign = builder.and_(builder.lshr(bits, _constant(words, 16)), _constant(words, 0x8000))
    magnitude = builder.and_(bits, _constant(words, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _constant(words, 13)), _constant(words, 1))
    rebias = ((15 - 127) << 23) % 2**32
    rounded = builder.add(builder.add(magnitude, odd), _constant(words, (0xFFF + rebias) % 2**32))
    normal = builder.lshr(rounded, _constant(words, 13))
    # adding 0.5 shifts a float16 subnormal's last bit to the last bit of the float32, which rounds it
    shifted = builder.fadd(builder.bitcast(magnitude, floats), _constant(floats, 0.5))
    subnormal = builder.sub(builder.bitcast(shifted, words), _constant(words, 0x3F000000))
    result = builder.select(
        builder.icmp_unsigned("<", magnitude, _constant(words, 0x38800000)), subnormal, normal
    )
    too_large = builder.icmp_unsigned(">=", magnitude, _constant(words, 0x47800000))
    result = builder.select(too_large, _constant(words, 0x7C00), result)
    is_nan = builder.icmp_unsigned(">", magnitude, _constant(words, 0x7F800000))
    result = builder.select(is_nan, _constant(words, 0x7E00), result)
    return builder.trunc(builder.or_(result, sign), ir.VectorType(_i16, LANES))


def _from_bfloat16(builder: Any, bits: Any) -> Any:
    words = ir.VectorType(_i32, LANES)
    shifted = builder.shl(builder.zext(bits, words), _constant(words, 16))
    return builder.bitcast(shifted, ir.VectorType(_float, LANES))


def _to_bfloat16(builder: Any, value: Any) -> Any:
    words = ir.VectorType(_i32, LANES)
    bits = builder.bitcast(value, words)
    sixteen = _constant(words, 16)
    odd = builder.and_(builder.lshr(bits, sixteen), _constant(words, 1))
    even = builder.add(bits, builder.add(odd, _constant(words, 0x7FFF)))
    quiet = builder.or_(bits, _constant(words, 0x400000))
    result = builder.select(builder.fcmp_unordered("uno", value, value), quiet, even)
    # the upper halves by one shuffle: on AVX-512 one instruction, where shifting and narrowing take seven
    halves = builder.bitcast(result, ir.VectorType(_i16, 2 * LANES))
    upper = ir.Constant(ir.VectorType(_i32, LANES), [2 * i + (sys.byteorder == "little") for i in range(LANES)])
    return builder.shuffle_vector(halves, halves, upper)


# ------------------------------------------------------------------------------------------------------- arithmetic


def _parts(kind: str, value: Any, builder: Any) -> tuple[Any, Any]:
    """High and low part; the low part is None where it is zero by construction."""
    if kind == "pair":
        return builder.extract_value(value, 0), builder.extract_value(value, 1)
    return value, None


def _pair(builder: Any, high: Any, low: Any) -> Any:
    value = ir.Constant(ir.LiteralStructType([high.type, low.type]), ir.Undefined)
    return builder.insert_value(builder.insert_value(value, high, 0), low, 1)


def _collapse(builder: Any, value: Any) -> Any:
    """The pair as one float64; where an error term met an infinity, the high part alone is the result."""
    high, low = _parts("pair", value, builder)
    total = builder.fadd(high, low)
    size = high.type.count
    magnitude = _intrinsic(builder, f"llvm.fabs.v{size}f64", high.type, [total])
    finite = builder.fcmp_ordered("<", magnitude, _constant(high.type, float("inf")))
    return builder.select(finite, total, high)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    suffix = "f32" if a.type.element == _float else "f64"
    return _intrinsic(builder, f"llvm.fma.v{a.type.count}{suffix}", a.type, [a, b, c])


def _add_parts(builder: Any, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
    """Knuth's two-sum of the high parts; its error and the low parts are the new low part."""
    total = builder.fadd(a[0], b[0])
    second = builder.fsub(total, a[0])
    low = builder.fadd(builder.fsub(a[0], builder.fsub(total, second)), builder.fsub(b[0], second))
    for part in (a[1], b[1]):
        if part is not None:
            low = builder.fadd(low, part)
    return _pair(builder, total, low)


def _multiply_parts(builder: Any, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
    product = builder.fmul(a[0], b[0])
    low = _fma(builder, a[0], b[0], builder.fneg(product))
    if a[1] is not None:
        low = _fma(builder, a[1], b[0], low)
    if b[1] is not None:
        low = _fma(builder, a[0], b[1], low)
    return _pair(builder, product, low)


def _negate_parts(builder: Any, a: tuple[Any, Any]) -> tuple[Any, Any]:
    return builder.fneg(a[0]), None if a[1] is None else builder.fneg(a[1])


def _kind_of(numba_type: Any) -> str | None:
    """A plain number takes the kind of the lanes beside it."""
    return numba_type.kind if isinstance(numba_type, LanesType) else None


def _common(a: Any, b: Any) -> tuple[str, int]:
    kind = max((kind for kind in map(_kind_of, (a, b)) if kind), key=KINDS.index)
    count = max(getattr(a, "count", 1), getattr(b, "count", 1))
    return kind, count


def _type_arithmetic(context: Any) -> Any:
    def typer(a: Any, b: Any) -> Any:
        lanes = [t for t in (a, b) if isinstance(t, LanesType)]
        if lanes and all(isinstance(t, (LanesType, types.Number)) for t in (a, b)):
            kind, count = _common(a, b)
            return LanesType("pair" if kind == "exact" else kind, count)

    return typer


def _operand(context: Any, builder: Any, numba_type: Any, value: Any, kind: str, count: int) -> tuple[Any, Any]:
    """An operand as (high, low) vectors of the common kind."""
    element = _float if kind == "single" else _double
    if not isinstance(numba_type, LanesType):
        scalar = context.cast(builder, value, numba_type, types.float32 if kind == "single" else types.float64)
        return _splat(builder, scalar, count), None
    high, low = _parts(numba_type.kind, value, builder)
    if high.type.element != element:
        high = builder.fpext(high, ir.VectorType(element, numba_type.count))
    if numba_type.count != count:
        zero = ir.Constant(_i32, 0)
        high = _splat(builder, builder.extract_element(high, zero), count)
        low = None if low is None else _splat(builder, builder.extract_element(low, zero), count)
    return high, low


def _arithmetic(function: Any, plain: str, exact: Any) -> None:
    type_callable(function)(_type_arithmetic)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, count = _common(*sig.args)
        a, b = (_operand(context, builder, t, v, kind, count) for t, v in zip(sig.args, args))
        if kind in ("single", "double"):
            return getattr(builder, plain)(a[0], b[0])
        return exact(builder, a, b)

    for signature in ((LanesType, LanesType), (LanesType, types.Number), (types.Number, LanesType)):
        lower_builtin(function, *signature)(lower)


_arithmetic(operator.add, "fadd", _add_parts)
_arithmetic(operator.sub, "fsub", lambda builder, a, b: _add_parts(builder, a, _negate_parts(builder, b)))
_arithmetic(operator.mul, "fmul", _multiply_parts)


@type_callable(simd.add_exact_square)
def _type_add_exact_square(context: Any) -> Any:
    def typer(total: Any, lanes: Any) -> Any:
        if isinstance(total, LanesType) and isinstance(lanes, LanesType):
            return total

    return typer


@lower_builtin(simd.add_exact_square, LanesType, LanesType)
def _add_exact_square(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    total, lanes = args
    kind = sig.args[1].kind
    if kind in ("single", "double"):
        suffix = "f32" if kind == "single" else "f64"
        return _intrinsic(builder, f"llvm.fmuladd.v{LANES}{suffix}", total.type, [lanes, lanes, total])
    value = _parts(kind, lanes, builder)
    square = _multiply_parts(builder, value, value)
    return _add_parts(builder, _parts("pair", total, builder), _parts("pair", square, builder))


@type_callable(simd.add_product)
def _type_add_product(context: Any) -> Any:
    def typer(total: Any, a: Any, b: Any) -> Any:
        if all(isinstance(lanes, LanesType) for lanes in (total, a, b)):
            return total

    return typer


@lower_builtin(simd.add_product, LanesType, LanesType, LanesType)
def _add_product(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    total, *factors = args
    kind, count = _common(*sig.args[1:])
    a, b = (_operand(context, builder, t, v, kind, count) for t, v in zip(sig.args[1:], factors))
    if kind in ("single", "double"):
        suffix = "f32" if kind == "single" else "f64"
        return _intrinsic(builder, f"llvm.fmuladd.v{count}{suffix}", total.type, [a[0], b[0], total])
    product = _parts("pair", _multiply_parts(builder, a, b), builder)
    if sig.args[0].kind == "pair":
        return _add_parts(builder, _parts("pair", total, builder), product)
    return builder.fadd(total, _collapse(builder, _pair(builder, *product)))


@type_callable(simd.first_lanes)
def _type_first_lanes(context: Any) -> Any:
    return lambda lanes, count: lanes


@lower_builtin(simd.first_lanes, LanesType, types.NoneType)
def _all_lanes(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return args[0]


@lower_builtin(simd.first_lanes, LanesType, types.Integer)
def _first_lanes(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    lanes, count = args
    mask = _mask(builder, count)
    parts = [
        builder.select(mask, part, ir.Constant(part.type, None))
        for part in _parts(sig.args[0].kind, lanes, builder)
        if part is not None
    ]
    return parts[0] if len(parts) == 1 else _pair(builder, *parts)


@type_callable(simd.across)
def _type_across(context: Any) -> Any:
    def typer(lanes: Any) -> Any:
        if isinstance(lanes, LanesType):
            return types.float64 if lanes.kind in ("single", "double") else LanesType("pair", 1)

    return typer


@lower_builtin(simd.across, LanesType)
def _across(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    parts = _parts(sig.args[0].kind, args[0], builder)
    if parts[0].type.element == _float:
        parts = (builder.fpext(parts[0], ir.VectorType(_double, LANES)), None)
    while (count := parts[0].type.count) > 1:
        halves = []
        for first in (0, count // 2):
            indices = ir.Constant(ir.VectorType(_i32, count // 2), list(range(first, first + count // 2)))
            halves.append(
                tuple(None if p is None else builder.shuffle_vector(p, p, indices) for p in parts)
            )
        if parts[1] is None and sig.return_type == types.float64:
            parts = (builder.fadd(halves[0][0], halves[1][0]), None)
        else:
            parts = _parts("pair", _add_parts(builder, *halves), builder)
    if sig.return_type == types.float64:
        return builder.extract_element(parts[0], ir.Constant(_i32, 0))
    return _pair(builder, *parts)


# ------------------------------------------------------------------------ scalars that are pairs: what across returns


def _divide_parts(builder: Any, a: tuple[Any, Any], b: tuple[Any, Any]) -> Any:
    quotient = builder.fdiv(a[0], b[0])
    rest = _fma(builder, builder.fneg(quotient), b[0], a[0])
    if a[1] is not None:
        rest = builder.fadd(rest, a[1])
    if b[1] is not None:
        rest = _fma(builder, builder.fneg(quotient), b[1], rest)
    return _pair(builder, quotient, builder.fdiv(rest, b[0]))


type_callable(operator.truediv)(_type_arithmetic)


@lower_builtin(operator.truediv, LanesType, types.Number)
@lower_builtin(operator.truediv, types.Number, LanesType)
def _divide(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind, count = _common(*sig.args)
    a, b = (_operand(context, builder, t, v, kind, count) for t, v in zip(sig.args, args))
    return _divide_parts(builder, a, b)


@type_callable(np.sqrt)
def _type_sqrt(context: Any) -> Any:
    def typer(number: Any) -> Any:
        if isinstance(number, LanesType) and number.kind == "pair":
            return number

    return typer


@lower_builtin(np.sqrt, LanesType)
def _sqrt(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    high, low = _parts("pair", args[0], builder)
    root = _intrinsic(builder, f"llvm.sqrt.v{high.type.count}f64", high.type, [high])
    rest = builder.fadd(_fma(builder, builder.fneg(root), root, high), low)
    return _pair(builder, root, builder.fdiv(rest, builder.fadd(root, root)))


@type_callable(simd.rounded)
def _type_rounded(context: Any) -> Any:
    def typer(number: Any) -> Any:
        if isinstance(number, LanesType) and number.count > 1:
            return LanesType("double")
        return types.float64

    return typer


@lower_builtin(simd.rounded, types.Float)
def _rounded_float(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return args[0]


@lower_builtin(simd.rounded, LanesType)
def _rounded_lanes(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    value = args[0]
    if sig.args[0].kind == "pair":
        value = _collapse(builder, value)
    if sig.args[0].kind == "single":
        value = builder.fpext(value, ir.VectorType(_double, LANES))
    return value if value.type.count > 1 else builder.extract_element(value, ir.Constant(_i32, 0))


@type_callable(simd.scratch)
def _type_scratch(context: Any) -> Any:
    return lambda: types.CPointer(types.float64)


@lower_builtin(simd.scratch)
def _scratch(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    with builder.goto_entry_block():  # not cgutils.alloca_once, which would fill it with zeros at each call
        room = builder.alloca(ir.ArrayType(_double, 2 * BLOCK))
    return builder.bitcast(room, _double.as_pointer())


@type_callable(simd.keep)
def _type_keep(context: Any) -> Any:
    return lambda room, j, number: types.none


@lower_builtin(simd.keep, types.CPointer, types.Integer, types.Float)
def _keep_float(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    room, j, number = args
    builder.store(number, builder.gep(room, [j]))
    return context.get_dummy_value()


@lower_builtin(simd.keep, types.CPointer, types.Integer, LanesType)
def _keep_pair(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    room, j, number = args
    zero = ir.Constant(_i32, 0)
    for place, part in zip(_pair_places(builder, room, j), _parts("pair", number, builder)):
        builder.store(builder.extract_element(part, zero), place)
    return context.get_dummy_value()


@type_callable(simd.kept)
def _type_kept(context: Any) -> Any:
    def typer(room: Any, j: Any, source: Any) -> Any:
        return LanesType("pair", 1) if source.dtype == types.float64 else types.float64

    return typer


@lower_builtin(simd.kept, types.CPointer, types.Integer, types.CPointer)
def _kept(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    room, j = args[:2]
    if sig.return_type == types.float64:
        return builder.load(builder.gep(room, [j]))
    parts = [_splat(builder, builder.load(place), 1) for place in _pair_places(builder, room, j)]
    return _pair(builder, *parts)


def _pair_places(builder: Any, room: Any, j: Any) -> list[Any]:
    first = builder.shl(j, ir.Constant(j.type, 1))
    return [builder.gep(room, [place]) for place in (first, builder.add(first, ir.Constant(j.type, 1)))]
