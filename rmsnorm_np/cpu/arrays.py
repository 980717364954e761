"""What kernels are handed: the pointers and numbers of a call, and memory of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic

from rmsnorm_np.cpu.kinds import STORAGE, Arrays, Kinds
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import Writer
from rmsnorm_np.ops.operation import Totals
from rmsnorm_np.ops.records import given


class Size(NamedTuple):
    """The numbers of a call. k: elements in the RMS (None: n). eps: a number, or an array with one for each row.

    streaming: whether to write past the cache. m, chunks: rows of the totals, and how many rows of partial sums each of
    them has. stride, inner: from a row to the next, and from an element of a row to the next, in elements. weight_m,
    bias_m: rows of weight and bias; row r uses row r % weight_m. block: rows worked on together. modest: 1 if the
    weights, where there is one row of them, are: see `extremes.is_modest`.
    """

    k: Any
    eps: Any
    streaming: Any
    m: Any
    chunks: Any
    rows: Any
    n: Any
    stride: Any
    inner: Any
    weight_m: Any
    bias_m: Any
    block: Any
    modest: Any


def is_like_bias(field: str) -> bool:
    """Whether this field of columns has as many rows as the bias; else it has as many as the weight."""
    return "bias" in field


@intrinsic
def lengths(typing_context: Any, reads: Any, columns: Any) -> Any:
    """(rows, n, inner, rows of weight, rows of bias) of arrays (rows, n), where inner is 1, or (outer, n, inner).

    All columns like weight have as many rows, and all those like bias.
    """

    def shape(context: Any, builder: Any, kind: Any, record: Any, j: Any) -> Any:
        if isinstance(kind[j], types.NoneType):
            return [context.get_constant(types.intp, 1)]
        array = context.make_array(kind[j])(context, builder, value=builder.extract_value(record, j))
        return cgutils.unpack_tuple(builder, array.shape)

    fields = columns.fields[:-1]
    groups = [[j for j, field in enumerate(fields) if is_like_bias(field) == which] for which in (False, True)]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given_ones = [[j for j in group if not isinstance(columns[j], types.NoneType)] or group for group in groups]
        weight, bias = (shape(context, builder, columns, args[1], ones[0])[0] for ones in given_ones)
        outer, n, *inner = shape(context, builder, reads, args[0], 0)
        rows = builder.mul(outer, inner[0]) if inner else outer
        found = [rows, n, *(inner or [context.get_constant(types.intp, 1)]), weight, bias]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.intp, 5)(reads, columns), codegen


@intrinsic
def counters(typing_context: Any, count: Any) -> Any:
    """Room on the stack for so many int64, all zero. Stack that a loop asks for is not given back before the end."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        room = builder.alloca(ir.IntType(64), args[0])
        cgutils.memset(builder, room, builder.mul(args[0], ir.Constant(args[0].type, 8)), 0)
        return room

    return types.CPointer(types.int64)(count), codegen


@intrinsic
def add_atomically(typing_context: Any, numbers: Any, i: Any, number: Any) -> Any:
    """Add to the int64 in place i while no other thread does; returns what it was before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "monotonic")

    return types.int64(numbers, i, number), codegen


@intrinsic
def pointers(typing_context: Any, record: Any) -> Any:
    """A record of arrays and numbers as one of pointers to their first elements.

    Pointers count no references: passing an array to a function costs two atomic additions, on one cache line for all
    threads (measured: 6 times slower at n = 64).
    """

    def kind_of(kind: Any) -> Any:
        if isinstance(kind, types.NoneType):
            return types.none
        if isinstance(kind, types.Array):
            return types.CPointer(kind.dtype)
        if isinstance(kind, types.Float):
            return kind
        kinds = [kind_of(k) for k in kind]
        return types.NamedTuple(kinds, kind.instance_class) if hasattr(kind, "instance_class") else types.Tuple(kinds)

    def found(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        if isinstance(kind, types.NoneType):
            return context.get_dummy_value()
        if isinstance(kind, types.Array):
            return context.make_array(kind)(context, builder, value=value).data
        if isinstance(kind, types.Float):
            return value
        items = [found(context, builder, k, builder.extract_value(value, j)) for j, k in enumerate(kind)]
        return context.make_tuple(builder, kind_of(kind), items)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return found(context, builder, record, args[0])

    return kind_of(record)(record), codegen


def room_for(size: Any) -> Any:
    """A step: room on the stack for so many float64."""

    def body(w: Writer) -> Any:
        with w.builder.goto_entry_block():  # not cgutils.alloca_once, which would fill it with zeros at each call
            room = w.builder.alloca(ir.ArrayType(ir.DoubleType(), size))
        return w.builder.bitcast(room, ir.DoubleType().as_pointer())

    return step(body, types.CPointer(types.float64))


def pointer_types(kinds: Kinds) -> Any:
    """Numba's type of `Arrays` of these kinds."""

    def pointers_to(names: Any, kind_of: Any = STORAGE.__getitem__) -> list[Any]:
        return [types.none if name is None else types.CPointer(kind_of(name)) for name in names]

    parts = (
        types.NamedTuple(pointers_to(kinds.reads), type(kinds.reads)),
        types.NamedTuple([*pointers_to(kinds.columns[:-1]), types.float64], type(kinds.columns)),
        types.NamedTuple(pointers_to(kinds.writes), type(kinds.writes)),
        totals_type(kinds),
    )
    return types.NamedTuple(parts, Arrays)


def totals_type(kinds: Kinds) -> Any:
    """Numba's type of pointers to sums of these totals."""
    return types.NamedTuple(
        [types.none if name is None else types.CPointer(types.float64) for name in kinds.totals], Totals
    )


def aligner(kinds: Kinds) -> Any:
    """A step: aligned(totals), the pointers from the first cache line on.

    Backward reads and writes the sums for each row: 1.05 to 1.1 times as fast as across lines.
    """
    return step(lambda w, totals: given(totals, w.from_line), totals_type(kinds))


def moved(kinds: Kinds) -> Any:
    """A step: moved(arrays, start, weight_start, bias_start, total_start), the pointers from these elements on."""

    def body(w: Writer, arrays: Arrays, start: Any, weight: Any, bias: Any, total: Any) -> Arrays:
        by = lambda record, place: given(record, lambda data: w.pointer(data, place))  # noqa: E731
        columns = arrays.columns
        for field, data in zip(columns._fields[:-1], columns, strict=False):
            if data is not None:
                columns = columns._replace(**{field: w.pointer(data, bias if is_like_bias(field) else weight)})
        return Arrays(by(arrays.reads, start), columns, by(arrays.writes, start), by(arrays.totals, total))

    return step(body, pointer_types(kinds))


def clearer() -> Any:
    """A step: clear(totals, start, n), n float64 of each from start on."""

    def body(w: Writer, totals: Any, start: Any, n: Any) -> None:
        size = w.builder.mul(n, ir.Constant(n.type, 8))
        given(totals, lambda data: cgutils.memset(w.builder, w.pointer(data, start), size, 0))

    return step(body)


@intrinsic
def hold(typing_context: Any, array: Any) -> Any:
    """Keep the memory of an array that a kernel made for itself until here, where its pointers were used last. Compiled
    code gives it back after the last line that names the array, and a pointer does not.
    """
    return types.none(array), lambda context, builder, signature, args: context.get_dummy_value()
