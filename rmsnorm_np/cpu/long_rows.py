"""The program for rows longer than LONG_ROW, each cut into pieces over all threads.

A row is read twice, and the second time from its end: what was read last may still be in the cache. Its sums are added
in the order in which :mod:`rmsnorm_np.cpu.blocks` adds them, so they have the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from rmsnorm_np.cpu.arrays import Size, clearer, hold, lengths, moved, pointer_types, pointers, room_for, totals_type
from rmsnorm_np.cpu.blocks import keeping
from rmsnorm_np.cpu.extremes import is_modest, verdicts
from rmsnorm_np.cpu.jit import inlined, piece
from rmsnorm_np.cpu.kinds import Arrays, Kinds
from rmsnorm_np.cpu.mode import restore_mode, standard_mode
from rmsnorm_np.cpu.row import SEGMENT, Program
from rmsnorm_np.cpu.threads import in_parallel
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import LANES, Work, Writer
from rmsnorm_np.ops.operation import Totals
from rmsnorm_np.ops.records import given

LONG_ROW = 65536
NO_TOTALS = Totals()  # of a kernel: a record without arrays
PIECE = 16 * SEGMENT  # what a thread takes at a time
AHEAD = 512  # elements that are asked for ahead within a piece: 1.05 to 1.08 times as fast as none
TILE = 1024  # columns whose sums over the rows stay in the first-level cache from row to row


@inlined
def pieces_of(n: Any) -> Any:
    return (n + PIECE - 1) // PIECE


def measured(kinds: Kinds, program: Program, s: int) -> Any:
    """measure(row, size, numbers, r, parts, threads): the sums of stage s of row r, and the numbers, in place r."""
    segment, get_before = program.segment(s), program.get_numbers(s - 1)
    sums = program.sums[s]
    put_part, get_part = program.put(sums, 0), program.get(sums, 0)
    put, find = program.put(sums, program.places[2 * s]), program.find_numbers(s)
    add, zero = program.adding(s)
    eps_of = program.eps_of()
    stops_at_k = kinds.operation.stages[s].first_k and kinds.first_k
    keeps, keep, give_scale = bool(stops_at_k and s == 0 and program.kept), keeping(program), program.give_scale(s)

    @piece
    def sum_piece(p: Any, row: Any, size: Any, numbers: Any, r: Any, parts: Any, segments: Any) -> Any:
        m = get_before((numbers, size.rows, r))
        stop = size.k if stops_at_k else size.n
        for first in range(p * PIECE, min(p * PIECE + PIECE, stop), SEGMENT):
            found = segment(row, first, min(first + SEGMENT, stop), size.k, m, AHEAD)
            put_part((parts, segments, first // SEGMENT, found))

    @piece
    def keep_piece(p: Any, row: Any, size: Any) -> Any:
        keep(row, max(p * PIECE, size.k), min(p * PIECE + PIECE, size.n))

    @piece
    def measure(row: Any, size: Any, numbers: Any, r: Any, parts: Any, threads: Any) -> Any:
        if keeps:
            in_parallel(keep_piece, pieces_of(size.n), threads, (row, size))
        stop = size.k if stops_at_k else size.n
        segments = (stop + SEGMENT - 1) // SEGMENT
        in_parallel(sum_piece, pieces_of(stop), threads, (row, size, numbers, r, parts, segments))
        total = zero(())
        for j in range(segments):
            total = add((total, get_part((parts, segments, j))))
        put((numbers, size.rows, r, total))
        find((numbers, size.rows, r, size.n, size.k, eps_of(size.eps, r)))
        give_scale(numbers, size.rows, r, size.eps, r)

    return measure


def column_sums(kinds: Kinds, program: Program) -> Any:
    """task(turn, arrays, totals, size, marks, numbers): the columns of a piece, in the rows h, h + m, … that share row
    h of the totals (with m = 1: all rows). Each adds dweight and dbias over the rows by itself.

    No partial sums stand between: at this n those would cost more traffic than reading x and dy again.
    """
    move, clear, write = moved(kinds._replace(totals=Totals())), clearer(), program.write()[1]
    room, get_numbers = room_for(2 * TILE), program.get_numbers(len(kinds.operation.stages) - 1)
    write_always = program.write_always()
    plain = Work("double", LANES)

    def tile_at(w: Writer, data: Any, shift: Any) -> Any:
        """The sums of both, whose element 0 is `shift` behind the beginning."""
        places = Totals(*(w.builder.add(shift, ir.Constant(shift.type, j * TILE)) for j in range(2)))
        return given(kinds.totals, lambda name, place: w.pointer(data, place), places)

    def put_sums(w: Writer, totals: Totals, place: Any, tile: Totals, i: Any, count: Any) -> None:
        def one(name: str, total: Any, data: Any) -> None:
            w.store(total, name, place, w.load(data, "float64", i, plain, count), count)

        given(kinds.totals, one, totals, tile)

    tile_of = step(tile_at, totals_type(kinds))
    put = step(put_sums)
    with_tile = step(lambda w, row, tile: row._replace(totals=tile), pointer_types(kinds))
    has_marks = kinds.marks

    @piece
    def task(turn: Any, arrays: Any, totals: Any, size: Any, marks: Any, numbers: Any) -> Any:
        p, h = pieces_of(size.n) - 1 - turn // size.m, turn % size.m
        data = room(())
        for first in range(p * PIECE, min(p * PIECE + PIECE, size.n), TILE):
            last = min(first + TILE, size.n)
            clear((tile_of((data, 0)), 0, last - first))
            for r in range(h, size.rows, size.m):
                weight, bias = r % size.weight_m * size.n, r % size.bias_m * size.n
                row = with_tile((move((arrays, r * size.n, weight, bias, 0)), tile_of((data, -first))))
                if has_marks and marks[r] != 0:
                    write_always(row, first, last)
                    continue
                m = get_numbers((numbers, size.rows, r))
                write(row, first, last, size.k, m, size.streaming, AHEAD)
            for i in range(first, last, LANES):
                put((totals, h * size.n + i, tile_of((data, -first)), i, min(LANES, last - i)))

    return task


def long_kernel(kinds: Kinds) -> Any:
    """The kernel for long rows; arguments and result as of `schedule.rows_kernel`, but no partial sums.

    Forward each row is finished before the next. Backward, first the sums of all rows, then the columns, if no row was
    marked; rows that are marked already are left out.
    """
    program, move = Program(kinds), moved(kinds._replace(totals=Totals()))
    stages = len(kinds.operation.stages)
    measure, measure_second = (measured(kinds, program, s) for s in (0, stages - 1))
    two, has_totals, has_marks = stages == 2, any(kinds.totals), kinds.marks
    judge, left_out = verdicts(program)
    eps_of, modest = program.eps_of(), is_modest(program)
    get_numbers, write = program.get_numbers(stages - 1), program.write()[1]
    columns_task: Any = column_sums(kinds, program) if has_totals else None
    count = program.size

    @piece
    def write_piece(turn: Any, row: Any, size: Any, numbers: Any, r: Any) -> Any:
        p = pieces_of(size.n) - 1 - turn  # from the back: what was read last is still in the cache
        m = get_numbers((numbers, size.rows, r))
        write(row, p * PIECE, min(p * PIECE + PIECE, size.n), size.k, m, size.streaming, AHEAD)

    @inlined
    def run(arrays: Any, totals: Any, size: Any, marks: Any, threads: Any) -> Any:
        room = np.empty((count, size.rows))
        parts_room = np.empty((count, (size.n + SEGMENT - 1) // SEGMENT))
        numbers, parts = pointers(room), pointers(parts_room)
        marked = 0
        before = standard_mode()
        for r in range(size.rows):
            weight, bias = r % size.weight_m * size.n, r % size.bias_m * size.n
            row = move((arrays, r * size.n, weight, bias, 0))
            measure(row, size, numbers, r, parts, threads)
            if two:
                measure_second(row, size, numbers, r, parts, threads)
            if has_marks:
                fine = modest(row, size.n)
                judge((numbers, size.rows, r, size.n, size.k, eps_of(size.eps, r), fine))
                if left_out(row, size.n, numbers, size.rows, r):
                    marked += marks[r] == 0
                    marks[r] = 1
                    continue
            if not has_totals:
                in_parallel(write_piece, pieces_of(size.n), threads, (row, size, numbers, r))
        if has_totals and marked == 0:
            shared = (arrays, totals, size, marks, numbers)
            in_parallel(columns_task, pieces_of(size.n) * size.m, threads, shared)
        restore_mode(before)
        hold(room)
        hold(parts_room)
        return marked

    def forward(
        reads: Any, columns: Any, writes: Any, k: Any, eps: Any, streaming: Any, marks: Any, threads: Any
    ) -> Any:
        rows, n, inner, weight_m, bias_m = lengths(reads, columns)
        arrays = Arrays(pointers(reads), pointers(columns), pointers(writes), NO_TOTALS)
        size = Size(k, pointers(eps), streaming, 1, 1, rows, n, n, inner, weight_m, bias_m, 1, 1)
        return run(arrays, NO_TOTALS, size, pointers(marks), threads)

    def backward(
        reads: Any, columns: Any, writes: Any, partials: Any, totals: Any, settings: Any, marks: Any, threads: Any
    ) -> Any:
        rows, n, inner, weight_m, bias_m = lengths(reads, columns)
        k, eps, streaming, m, chunks = settings
        arrays = Arrays(pointers(reads), pointers(columns), pointers(writes), NO_TOTALS)
        size = Size(k, eps, streaming, m, chunks, rows, n, n, inner, weight_m, bias_m, 1, 1)
        return run(arrays, pointers(totals), size, pointers(marks), threads)

    return forward if kinds.operation.share is None else backward
