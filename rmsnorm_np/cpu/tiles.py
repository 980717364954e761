"""Rows whose elements lie apart: x is (outer, n, inner) and normalised over n, so `inner` rows lie side by side.

A block of such rows is copied to a room in the cache, as contiguous rows; the block program runs there, and what it
writes is copied back. Both ways go by squares of elements, as wide as a cache line, which are transposed in registers.
So any operation gives the bits that it gives for contiguous rows, and no array is copied as a whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from rmsnorm_np.cpu import llvm
from rmsnorm_np.cpu.arrays import Size, moved, pointer_types
from rmsnorm_np.cpu.jit import inlined, piece
from rmsnorm_np.cpu.kinds import Arrays, Kinds
from rmsnorm_np.cpu.llvm import I32, I64
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import ITEMSIZE, LINE, STORED, Writer
from rmsnorm_np.ops.records import like

# How wide a block is: lines that follow one another in memory, of the narrowest dtype. With one line (32, 256, 3136)
# float32 takes 1.7 times as long, with four bfloat16 1.15 times; with 16 as long.
LINES = 8
ROOM_BYTES = 1 << 19  # a block is less wide where its arrays would take more than this together


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of a square: bit by bit, the numbers of an element's row and column are exchanged."""
    found, count, bit = list(rows), len(rows), 1
    while bit < count:
        upper = [e - bit + count if e & bit else e for e in range(count)]
        lower = [e + count if e & bit else e + bit for e in range(count)]
        for i in (i for i in range(count) if not i & bit):
            a, b = found[i], found[i | bit]
            for j, places in ((i, upper), (i | bit, lower)):
                found[j] = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, count), places))
        bit *= 2
    return found


def copies(name: str) -> tuple[Any, Any, Any]:
    """Between an array and the room; `data` points at the first element of the first row, `room` at where it is there.

    gather(data, room, stride, n, inner, count, ahead): count rows to the room; asks for those `ahead` of them.
    scatter(data, room, stride, n, inner, count, streaming): count rows back.
    fetch(data, room, n, inner): one row to the room.
    """
    square, align = LINE // ITEMSIZE[name], ITEMSIZE[name]
    vector = ir.VectorType(STORED[name], square)

    def places(w: Writer, data: Any, first: Any, apart: Any) -> list[Any]:
        b = w.builder
        starts = (b.add(first, b.mul(apart, ir.Constant(apart.type, r))) for r in range(square))
        return [b.bitcast(w.pointer(data, start), vector.as_pointer()) for start in starts]

    # a place: where a square is in the array, and in the room

    def take(w: Writer, place: Any, count: Any, ahead: Any) -> None:
        b, (data, at, inner, room, to, stride) = w.builder, place
        sources = places(w, data, at, inner)
        if count is None:
            rows = [b.load(source, align=align) for source in sources]
        else:
            rows = [llvm.masked_load(w.context, b, source, vector, align, count) for source in sources]
        if ahead is not None:
            for r in range(square):
                line = b.add(at, b.mul(inner, ir.Constant(inner.type, r)))
                w.prefetch(data, b.add(line, ahead), 2)
        for column, target in zip(transposed(b, rows), places(w, room, to, stride), strict=True):
            b.store(column, target, align=align)

    def give(w: Writer, place: Any, count: Any, past: bool) -> None:
        b, (data, at, inner, room, to, stride) = w.builder, place
        rows = transposed(b, [b.load(source, align=align) for source in places(w, room, to, stride)])
        for row, target in zip(rows, places(w, data, at, inner), strict=True):
            if count is not None:
                llvm.masked_store(w.context, b, target, row, align, count)
            elif past:
                instruction = b.store(row, target, align=LINE)
                instruction.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))
            else:
                b.store(row, target, align=align)

    take_whole = step(lambda w, place: take(w, place, None, None))
    take_part = step(lambda w, place, count: take(w, place, count, None))
    take_ahead = step(lambda w, place, ahead: take(w, place, None, ahead))
    give_whole = step(lambda w, place: give(w, place, None, False))
    give_part = step(lambda w, place, count: give(w, place, count, False))
    give_past = step(lambda w, place: give(w, place, None, True))

    @piece
    def gather(data: Any, room: Any, stride: Any, n: Any, inner: Any, count: Any, ahead: Any) -> Any:
        for i in range(n if n < square else 0):
            for c in range(count):
                room[c * stride + i] = data[i * inner + c]
        for first in range(0, n if n >= square else 0, square):
            i = min(first, n - square)  # the last square ends with the row, and repeats some of the one before
            for c in range(0, count, square):
                place = data, i * inner + c, inner, room, c * stride + i, stride
                if c + square > count:
                    take_part((place, count - c))
                elif ahead > 0:
                    take_ahead((place, ahead))
                else:
                    take_whole((place,))

    @piece
    def scatter(data: Any, room: Any, stride: Any, n: Any, inner: Any, count: Any, streaming: Any) -> Any:
        for i in range(n if n < square else 0):
            for c in range(count):
                data[i * inner + c] = room[c * stride + i]
        for first in range(0, n if n >= square else 0, square):
            i = min(first, n - square)
            for c in range(0, count, square):
                place = data, i * inner + c, inner, room, c * stride + i, stride
                if c + square > count:
                    give_part((place, count - c))
                elif streaming:
                    give_past((place,))
                else:
                    give_whole((place,))

    @piece
    def fetch(data: Any, room: Any, n: Any, inner: Any) -> Any:
        for i in range(n):
            room[i] = data[i * inner]

    return gather, scatter, fetch


def _all(functions: list[Any]) -> Any:
    """One function that calls all of these."""
    if not functions:
        return inlined(lambda *arguments: None)
    first, others = functions[0], _all(functions[1:])

    @inlined
    def call(*arguments: Any) -> Any:
        first(*arguments)
        others(*arguments)

    return call


def tiles(kinds: Kinds, block: Any, rows_in_cache: Any) -> tuple[Any, Any, Any, Any]:
    """What `schedule.ways` gives, for rows whose elements lie apart. rows_in_cache(n): how many rows `block` takes.

    What is written takes the place of what is read: output f has the dtype of array f. A row that is marked stays what
    it was in the output, which may be an array that is read, too.
    """
    made = {name: copies(name) for name in {*kinds.reads} if name}
    itemsizes = [ITEMSIZE[name] for name in kinds.reads if name]
    side = LINE // min(itemsizes)  # rows that fill a line, or several, in each array
    move = moved(kinds)

    def of_reads(part: int) -> Any:
        def one(f: int, function: Any) -> Any:
            return inlined(lambda tile, rows, *rest: function(tile.reads[f], rows.reads[f], *rest))

        return _all([one(f, made[name][part]) for f, name in enumerate(kinds.reads) if name])

    def of_writes(part: int, kept: str | None = None) -> Any:
        def one(f: int, function: Any) -> Any:
            return inlined(lambda tile, rows, *rest: function(tile.writes[f], rows.writes[f], *rest))

        names = enumerate(kinds.writes)
        return _all([one(f, made[name][part]) for f, name in names if name and kinds.writes._fields[f] != kept])

    gather, scatter, fetch = of_reads(0), of_writes(1), of_writes(2, kinds.operation.keep)

    def in_room(w: Writer, room: Any, arrays: Arrays, elements: Any) -> Arrays:
        """The arrays' places in the room, each on a cache line; elements: of each of them, whole lines."""
        b = w.builder
        up = b.add(b.ptrtoint(room, I64), ir.Constant(I64, LINE - 1))
        address, found = b.and_(up, ir.Constant(I64, -LINE)), []
        for data, name in zip(arrays.reads, kinds.reads, strict=True):
            found.append(None if name is None else b.inttoptr(address, data.type))
            if name is not None:
                address = b.add(address, b.mul(elements, ir.Constant(I64, ITEMSIZE[name])))
        writes = [None if data is None else found[f] for f, data in enumerate(arrays.writes)]
        return Arrays(like(arrays.reads, found), arrays.columns, like(arrays.writes, writes), arrays.totals)

    enter = step(in_room, pointer_types(kinds))
    has_marks, bytes_of_all = kinds.marks, sum(itemsizes)
    if has_marks:
        marks_from = step(lambda w, marks, first: w.pointer(marks, first), types.CPointer(types.uint8))
    else:
        marks_from = step(lambda w, marks, first: None, types.none)

    @inlined
    def height(n: Any) -> Any:
        return max(side, min(LINES * side, ROOM_BYTES // (bytes_of_all * n) // side * side))

    @inlined
    def count_of(g: Any, end: Any, size: Any) -> Any:
        return min(size.block - g % size.inner % side, end - g)  # the next ones begin with a line

    @inlined
    def stride_of(n: Any) -> Any:
        # an odd number of lines: with an even one the rows share a few of the sets of a first-level cache
        return ((n + side - 1) // side | 1) * side

    @inlined
    def elements_of(size: Any) -> Any:
        return (size.block + side) * stride_of(size.n)  # squares are whole, the last one too

    @inlined
    def new_room(size: Any) -> Any:
        return np.empty(elements_of(size) * bytes_of_all + LINE, np.uint8)

    @inlined
    def beside(r: Any, count: Any, inner: Any) -> Any:
        """How many rows from r on, of count, lie side by side, up to where a line begins if r lies within one."""
        place = r % inner
        return min(count, inner - place, side - place % side if place % side else count)

    @inlined
    def start_of(r: Any, n: Any, inner: Any) -> Any:
        return r // inner * n * inner + r % inner

    @piece
    def run(room: Any, arrays: Any, size: Any, marks: Any, first: Any, step_: Any, count: Any, total_start: Any) -> Any:
        n, inner, stride = size.n, size.inner, stride_of(size.n)
        rows = enter((room, arrays, elements_of(size)))
        ahead = size.block if size.streaming else 0
        j = 0
        while j < count:
            some = beside(first + j, count - j, inner)
            tile = move((arrays, start_of(first + j, n, inner), 0, 0, 0))
            gather(tile, move((rows, j * stride, 0, 0, 0)), stride, n, inner, some, ahead)
            j += some

        size_here = Size(size.k, size.eps, 0, 1, 1, count, n, stride, 1, 1, 1, count, size.modest)
        here, marked, some = marks_from((marks, first)), 0, rows_in_cache(n)
        for j in range(0, count, some):
            marked += block(rows, size_here, here, j, 1, min(some, count - j), total_start)
        if has_marks and marked > 0:
            for j in range(count):
                if here[j] != 0:
                    tile = move((arrays, start_of(first + j, n, inner), 0, 0, 0))
                    fetch(tile, move((rows, j * stride, 0, 0, 0)), n, inner)

        j = 0
        while j < count:
            r = first + j
            some, past = beside(r, count - j, inner), size.streaming > 1 and r % inner % side == 0
            tile = move((arrays, start_of(r, n, inner), 0, 0, 0))
            scatter(tile, move((rows, j * stride, 0, 0, 0)), stride, n, inner, some, past)
            j += some
        return marked

    return height, count_of, new_room, run
