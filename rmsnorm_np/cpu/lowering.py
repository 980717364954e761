"""How the lanes of :mod:`rmsnorm_np.cpu.simd` compile: their Numba type, and what loads, stores and keeps them.

Lanes are LLVM vectors in registers, a ``pair`` is two of them. The arithmetic is in :mod:`rmsnorm_np.cpu.arithmetic`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import lower_builtin, models, register_model, type_callable

from rmsnorm_np.cpu import simd
from rmsnorm_np.cpu.llvm import (
    DOUBLE,
    FLOAT,
    I16,
    I32,
    I64,
    even_then_odd,
    from_bfloat16,
    from_bfloat16_words,
    from_float16,
    in_memory_order,
    intrinsic,
    masked_load,
    masked_store,
    splat,
    to_bfloat16,
    to_bfloat16_words,
    to_float16,
    with_short_nan,
)
from rmsnorm_np.cpu.pairs import collapse, pair, parts
from rmsnorm_np.cpu.simd import BLOCK, LANES


class LanesType(types.Type):  # type: ignore[misc]
    """``count`` numbers of one kind: LANES; twice as many (even elements, then odd ones); or 1 for a pair that is a
    scalar.
    """

    def __init__(self, kind: str, count: int = LANES) -> None:
        self.kind = kind
        self.count = count
        super().__init__(name=f"Lanes({kind}, {count})")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: LanesType) -> None:
        vector = ir.VectorType(FLOAT if lanes.kind == "single" else DOUBLE, lanes.count)
        llvm_type = ir.LiteralStructType([vector, vector]) if lanes.kind == "pair" else vector
        super().__init__(manager, lanes, llvm_type)


def _loaded_type(source: Any, work: Any) -> LanesType:
    if isinstance(work, LanesType):
        if work.kind in ("exact", "pair"):
            return LanesType("exact")
        return LanesType("double", work.count) if source.dtype == types.float64 else work
    if source.dtype == types.float64:
        return LanesType("exact")
    if work.dtype == types.float32 and source.dtype in (types.uint16, types.int16):
        return LanesType("single", 2 * LANES if source.dtype == types.int16 else LANES)
    return LanesType("double")


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


@type_callable(simd.hold)
def _type_hold(context: Any) -> Any:
    return lambda array: types.none


@lower_builtin(simd.hold, types.Array)
def _hold(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return context.get_dummy_value()


@type_callable(simd.width)
def _type_width(context: Any) -> Any:
    return lambda source, work: types.intp


@lower_builtin(simd.width, types.CPointer, types.Any)
def _width(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return ir.Constant(I64, _loaded_type(*sig.args).count)


@type_callable(simd.load)
def _type_load(context: Any) -> Any:
    def typer(array: Any, start: Any, work: Any, count: Any = None) -> Any:
        if isinstance(array, types.NoneType):
            return types.none
        if isinstance(array, types.CPointer) and isinstance(start, types.Integer):
            return _loaded_type(array, work)

    return typer


@lower_builtin(simd.load, types.CPointer, types.Integer, types.Any)
@lower_builtin(simd.load, types.CPointer, types.Integer, types.Any, types.NoneType)
@lower_builtin(simd.load, types.CPointer, types.Integer, types.Any, types.Integer)
def _load(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    array = sig.args[0]
    vector = ir.VectorType(_stored_type(array.dtype), sig.return_type.count)
    pointer = _pointer(builder, args, vector)
    align = array.dtype.bitwidth // 8
    if isinstance(sig.args[-1], types.Integer) and len(args) == 4:
        value = masked_load(builder, pointer, vector, align, args[3])
    else:
        value = builder.load(pointer, align=align)
    return _convert_loaded(context, builder, array.dtype, value, sig.return_type)


@lower_builtin(simd.load, types.NoneType, types.VarArg(types.Any))
def _load_nothing(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return context.get_dummy_value()


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
    value = _convert_to_stored(context, builder, lanes, args[2], array.dtype)
    pointer = _pointer(builder, args, value.type)
    align = array.dtype.bitwidth // 8
    if isinstance(sig.args[-1], types.Integer) and len(args) == 4:
        masked_store(builder, pointer, value, align, args[3])
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
    value = _convert_to_stored(context, builder, lanes, args[2], array.dtype)
    pointer = _pointer(builder, args, value.type)
    instruction = builder.store(value, pointer, align=lanes.count * array.dtype.bitwidth // 8)
    instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
    return context.get_dummy_value()


def _prefetch(function: Any, level: int) -> None:
    """Locality 3 is LLVM's name for the first-level cache, 2 for the second."""
    type_callable(function)(lambda context: lambda source, start: types.none)

    @lower_builtin(function, types.CPointer, types.Integer)
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _pointer(builder, args, ir.IntType(8))
        read, locality, data = (ir.Constant(I32, value) for value in (0, 4 - level, 1))
        intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), [address, read, locality, data])
        return context.get_dummy_value()


_prefetch(simd.prefetch, 1)
_prefetch(simd.prefetch_second, 2)


@type_callable(simd.until_aligned)
def _type_until_aligned(context: Any) -> Any:
    return lambda array, start, count: types.intp


@lower_builtin(simd.until_aligned, types.CPointer, types.Integer, types.Integer)
def _until_aligned(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    array = sig.args[0]
    address = builder.ptrtoint(_pointer(builder, args, ir.IntType(8)), I64)
    itemsize = array.dtype.bitwidth // 8
    vector_bytes = builder.mul(args[2], ir.Constant(args[2].type, itemsize))
    bytes_left = builder.and_(builder.neg(address), builder.sub(vector_bytes, ir.Constant(I64, 1)))
    return builder.udiv(bytes_left, ir.Constant(I64, itemsize))


@type_callable(simd.add_atomically)
def _type_add_atomically(context: Any) -> Any:
    return lambda numbers, i, number: types.int64


@lower_builtin(simd.add_atomically, types.CPointer, types.Integer, types.Integer)
def _add_atomically(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "monotonic")


@type_callable(simd.zeros)
def _type_zeros(context: Any) -> Any:
    def typer(array: Any, work: Any) -> Any:
        lanes = _loaded_type(array, work)
        return LanesType("pair") if lanes.kind == "exact" else lanes

    return typer


@lower_builtin(simd.zeros, types.CPointer, types.Any)
def _zeros(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return ir.Constant(context.get_value_type(sig.return_type), None)


@type_callable(simd.scratch)
def _type_scratch(context: Any) -> Any:
    return lambda: types.CPointer(types.float64)


@lower_builtin(simd.scratch)
def _scratch(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    with builder.goto_entry_block():  # not cgutils.alloca_once, which would fill it with zeros at each call
        room = builder.alloca(ir.ArrayType(DOUBLE, 4 * BLOCK))
    return builder.bitcast(room, DOUBLE.as_pointer())


@type_callable(simd.counters)
def _type_counters(context: Any) -> Any:
    return lambda count: types.CPointer(types.int64)


@lower_builtin(simd.counters, types.Integer)
def _counters(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    room = builder.alloca(I64, args[0])
    cgutils.memset(builder, room, builder.mul(args[0], ir.Constant(args[0].type, 8)), 0)
    return room


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
    zero = ir.Constant(I32, 0)
    for place, part in zip(_pair_places(builder, room, j), parts("pair", number, builder), strict=True):
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
    parts = [splat(builder, builder.load(place), 1) for place in _pair_places(builder, room, j)]
    return pair(builder, *parts)


def _pair_places(builder: Any, room: Any, j: Any) -> list[Any]:
    first = builder.shl(j, ir.Constant(j.type, 1))
    return [builder.gep(room, [place]) for place in (first, builder.add(first, ir.Constant(j.type, 1)))]


def _stored_type(dtype: Any) -> Any:
    return {
        types.uint16: I16,
        types.int16: I16,
        types.float32: FLOAT,
        types.float64: DOUBLE,
    }[dtype]


def _pointer(builder: Any, args: Any, target: Any) -> Any:
    """The address of element ``args[1]`` of ``args[0]``, as a pointer to the LLVM type `target`."""
    data, start = args[:2]
    if start.type.width < 64:
        start = builder.sext(start, I64)
    return builder.bitcast(builder.gep(data, [start]), target.as_pointer())


def _convert_loaded(context: Any, builder: Any, dtype: Any, value: Any, lanes: LanesType) -> Any:
    if dtype == types.uint16:
        value = from_float16(context, builder, value)
    elif dtype == types.int16 and lanes.count == LANES:
        value = from_bfloat16(builder, value)
    elif dtype == types.int16:
        value = from_bfloat16_words(builder, value)
    if dtype != types.int16 and lanes.count > LANES:
        value = with_short_nan(builder, even_then_odd(builder, value))
    element = FLOAT if lanes.kind == "single" else DOUBLE
    if value.type.element == element:
        return value
    return builder.fpext(value, ir.VectorType(element, value.type.count))


def _convert_to_stored(context: Any, builder: Any, lanes: LanesType, value: Any, dtype: Any) -> Any:
    if lanes.kind == "pair":
        value = collapse(builder, value)
    if lanes.count > LANES and dtype != types.int16:
        value = in_memory_order(builder, value)
    if dtype == types.float64:
        return value if value.type.element == DOUBLE else builder.fpext(value, ir.VectorType(DOUBLE, lanes.count))
    if value.type.element == DOUBLE:
        value = builder.fptrunc(value, ir.VectorType(FLOAT, lanes.count))
    if dtype == types.uint16:
        return to_float16(context, builder, value)
    if dtype == types.int16:
        return to_bfloat16(builder, value) if lanes.count == LANES else to_bfloat16_words(builder, value)
    return value
