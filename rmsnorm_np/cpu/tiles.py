"""Rows whose elements lie apart: x is (outer, n, inner) and is normalised over n, so `inner` rows lie side by side.

A block of such rows is copied to a room that stays in the cache, as rows of their own; the block program runs there, and
what it writes is copied back. Both ways go by squares of elements, as wide as a cache line, which are transposed in
registers. So each operation and each dtype has the bits that it has in contiguous rows, and no array is copied as a whole.
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
from rmsnorm_np.cpu.row import BLOCK
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import ITEMSIZE, STORED, Writer
from rmsnorm_np.ops.records import given, like

LINE = 64  # bytes of a cache line
ROOM_BYTES = 1 << 16  # of the arrays of a block together, where a block is more than one square wide


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of a square: bit by bit, an element's numbers of row and column are exchanged."""
    found, count, bit = list(rows), len(rows), 1
    while bit < count:
        places = [e - bit + count if e & bit else e for e in range(count)], [e + (count if e & bit else bit) for e in range(count)]
        for i in range(count):
            if not i & bit:
                pair = found[i], found[i | bit]
                for j, at in zip((i, i | bit), places, strict=True):
                    found[j] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, count), at))
        bit *= 2
    return found


def copies(name: str) -> tuple[Any, Any, Any]:
    """gather(data, room, n, inner, count, ahead): count rows that lie side by side from data on, to the room.
    scatter(data, room, n, inner, count, streaming): back to data. put_back(data, room, n, inner): one row to the room.
    """
    square = LINE // ITEMSIZE[name]
    vector, align = ir.VectorType(STORED[name], square), ITEMSIZE[name]

    def places(w: Writer, data: Any, first: Any, apart: Any) -> list[Any]:
        b = w.builder
        starts = [b.add(first, b.mul(apart, ir.Constant(apart.type, r))) for r in range(square)]
        return [b.bitcast(w.pointer(data, start), vector.as_pointer()) for start in starts]

    def square_in(w: Writer, data: Any, at: Any, inner: Any, room: Any, to: Any, n: Any, count: Any, ahead: Any) -> None:
        b = w.builder
        sources = places(w, data, at, inner)
        if count is None:
            rows = [b.load(source, align=align) for source in sources]
        else:
            rows = [llvm.masked_load(b, source, vector, align, count) for source in sources]
        if ahead is not None:
            for r in range(square):
                w.prefetch(data, b.add(b.add(at, ahead), b.mul(inner, ir.Constant(inner.type, r))), 2)
        for column, target in zip(transposed(b, rows), places(w, room, to, n), strict=True):
            b.store(column, target, align=align)

    def square_out(w: Writer, data: Any, at: Any, inner: Any, room: Any, to: Any, n: Any, count: Any, streaming: bool) -> None:
        b = w.builder
        rows = transposed(b, [b.load(source, align=align) for source in places(w, room, to, n)])
        for row, target in zip(rows, places(w, data, at, inner), strict=True):
            if count is not None:
                llvm.masked_store(b, target, row, align, count)
            elif streaming:
                instruction = b.store(row, target, align=LINE)
                instruction.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))
            else:
                b.store(row, target, align=align)

    whole_in = step(lambda w, data, at, inner, room, to, n: square_in(w, data, at, inner, room, to, n, None, None))
    whole_ahead = step(lambda w, data, at, inner, room, to, n, ahead: square_in(w, data, at, inner, room, to, n, None, ahead))
    part_in = step(lambda w, data, at, inner, room, to, n, count: square_in(w, data, at, inner, room, to, n, count, None))
    whole_out = step(lambda w, data, at, inner, room, to, n: square_out(w, data, at, inner, room, to, n, None, False))
    stream_out = step(lambda w, data, at, inner, room, to, n: square_out(w, data, at, inner, room, to, n, None, True))
    part_out = step(lambda w, data, at, inner, room, to, n, count: square_out(w, data, at, inner, room, to, n, count, False))

    @inlined
    def squares(n: Any) -> Any:
        return (n + square - 1) // square

    @piece
    def gather(data: Any, room: Any, n: Any, inner: Any, count: Any, ahead: Any) -> Any:
        if n < square:
            for i in range(n):
                for c in range(count):
                    room[c * n + i] = data[i * inner + c]
            return
        for s in range(squares(n)):
            i = min(s * square, n - square)  # the last begins where it ends with the row
            for c in range(0, count, square):
                if c + square > count:
                    part_in((data, i * inner + c, inner, room, c * n + i, n, count - c))
                elif ahead:
                    whole_ahead((data, i * inner + c, inner, room, c * n + i, n, ahead))
                else:
                    whole_in((data, i * inner + c, inner, room, c * n + i, n))

    @piece
    def scatter(data: Any, room: Any, n: Any, inner: Any, count: Any, streaming: Any) -> Any:
        if n < square:
            for i in range(n):
                for c in range(count):
                    data[i * inner + c] = room[c * n + i]
            return
        for s in range(squares(n)):
            i = min(s * square, n - square)
            for c in range(0, count, square):
                if c + square > count:
                    part_out((data, i * inner + c, inner, room, c * n + i, n, count - c))
                elif streaming:
                    stream_out((data, i * inner + c, inner, room, c * n + i, n))
                else:
                    whole_out((data, i * inner + c, inner, room, c * n + i, n))

    @piece
    def put_back(data: Any, room: Any, n: Any, inner: Any) -> Any:
        for i in range(n):
            room[i] = data[i * inner]

    return gather, scatter, put_back


def _each(functions: list[Any]) -> Any:
    """One function that calls all of these."""
    if not functions:
        return inlined(lambda tile, rows, *rest: None)
    first, others = functions[0], _each(functions[1:])

    @inlined
    def call(tile: Any, rows: Any, *rest: Any) -> Any:
        first(tile, rows, *rest)
        others(tile, rows, *rest)

    return call


def tiles(kinds: Kinds, block: Any) -> tuple[Any, Any, Any]:
    """height(n), how many rows to work on together; new_room(size), memory for them; and run(room, …), which is
    `blocks.block` of what is in that room for rows of arrays (outer, n, inner).

    What is written takes the place of what is read: output f has the dtype of array f. A row that is marked is left as
    it is in the output, which may be what is read.
    """
    made = {name: copies(name) for name in {*kinds.reads, *kinds.writes} if name}
    move = moved(kinds)
    sizes = [ITEMSIZE[name] for name in kinds.reads if name]
    item, smallest = sum(sizes), LINE // min(sizes)  # rows side by side that fill a line in each array
    spare = smallest  # rows: a square is written whole

    def fields(record: Any, part: int, name: str, kept: str | None = None) -> Any:
        """The functions number `part` of `copies`, as calls with the pointers of a tile and those of its rows."""

        def one(f: int, function: Any) -> Any:
            if name == "reads":
                return inlined(lambda tile, rows, *rest: function(tile.reads[f], rows.reads[f], *rest))
            return inlined(lambda tile, rows, *rest: function(tile.writes[f], rows.writes[f], *rest))

        return _each(
            [one(f, made[dtype][part]) for f, dtype in enumerate(record) if dtype and record._fields[f] != kept]
        )

    copy_in, copy_out = fields(kinds.reads, 0, "reads"), fields(kinds.writes, 1, "writes")
    put_back = fields(kinds.writes, 2, "writes", kinds.operation.keep)

    def in_room(w: Writer, room: Any, arrays: Arrays, rows: Any, n: Any) -> Arrays:
        b = w.builder
        start = b.and_(b.add(b.ptrtoint(room, I64), ir.Constant(I64, LINE - 1)), ir.Constant(I64, -LINE))
        elements = b.and_(b.add(b.mul(rows, n), ir.Constant(I64, LINE - 1)), ir.Constant(I64, -LINE))
        at = []
        for data, name in zip(arrays.reads, kinds.reads, strict=True):
            at.append(None if name is None else b.inttoptr(start, data.type))
            if name is not None:
                start = b.add(start, b.mul(elements, ir.Constant(I64, ITEMSIZE[name])))
        writes = [None if data is None else at[f] for f, data in enumerate(arrays.writes)]
        return Arrays(like(arrays.reads, at), arrays.columns, like(arrays.writes, writes), arrays.totals)

    rooms = step(in_room, pointer_types(kinds))
    if kinds.marks:
        marks_from = step(lambda w, marks, first: w.pointer(marks, first), types.CPointer(types.uint8))
    else:
        marks_from = step(lambda w, marks, first: None, types.none)
    has_marks = kinds.marks

    @inlined
    def height(n: Any) -> Any:
        return max(smallest, min(BLOCK, ROOM_BYTES // (item * n) // smallest * smallest))

    @inlined
    def new_room(size: Any) -> Any:
        return np.empty(((size.block + spare) * size.n + LINE) * item + LINE, np.uint8)

    @inlined
    def next_to(r: Any, count: Any, inner: Any) -> Any:
        """How many rows, of count from row r on, lie side by side; the first begin a cache line if the second do."""
        place = r % inner
        found, before = min(count, inner - place), place % smallest
        return min(found, smallest - before) if before else found

    @piece
    def run(room: Any, arrays: Any, size: Any, marks: Any, first: Any, step_: Any, count: Any, total_start: Any) -> Any:
        n, inner = size.n, size.inner
        own = rooms((room, arrays, size.block + spare, n))
        ahead = size.block if size.streaming else 0
        j = 0
        while j < count:
            r = first + j
            some = next_to(r, count - j, inner)
            start = r // inner * n * inner + r % inner
            copy_in(move((arrays, start, 0, 0, 0)), move((own, j * n, 0, 0, 0)), n, inner, some, ahead)
            j += some
        of_rows = Size(
            size.k, size.eps, 0, 1, size.chunks, size.block, n, 1, size.weight_m, size.bias_m, size.block
        )
        marked = block(own, of_rows, marks_from((marks, first)), 0, 1, count, total_start)
        if has_marks and marked > 0:
            for j in range(count):
                if marks[first + j]:
                    r = first + j
                    start = r // inner * n * inner + r % inner
                    put_back(move((arrays, start, 0, 0, 0)), move((own, j * n, 0, 0, 0)), n, inner)
        j = 0
        while j < count:
            r = first + j
            some = next_to(r, count - j, inner)
            start = r // inner * n * inner + r % inner
            streaming = size.streaming if r % inner % smallest == 0 else 0
            copy_out(move((arrays, start, 0, 0, 0)), move((own, j * n, 0, 0, 0)), n, inner, some, streaming)
            j += some
        return marked

    return height, new_room, run
