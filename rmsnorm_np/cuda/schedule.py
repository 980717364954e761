"""The kernels: which team takes which row, or piece of a row that is too long for one team; and sums over rows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from rmsnorm_np.cuda.elements import Arrays, Place, RowScales, Size
from rmsnorm_np.cuda.kernel import Capability, Kernel, array_of
from rmsnorm_np.cuda.launch import ROUNDS_TO_BFLOAT16, WARP, Plan
from rmsnorm_np.cuda.number import LONG
from rmsnorm_np.cuda.row import Program
from rmsnorm_np.cuda.team import (
    WARP_LEVELS,
    adder_of,
    inlined,
    levels_of,
    mark_finder,
    numbers_finder,
    picker,
    put,
    put_value,
    scale_giver,
    settings_of,
    total_of,
    width_of,
)
from rmsnorm_np.cuda.tracing import step, zeros
from rmsnorm_np.cuda.words import ALONE, ITEMSIZE, encoded, store
from rmsnorm_np.ops.records import given

COLUMNS = WARP  # of a block that adds up partial sums

FLOAT64S = types.CPointer(types.float64)
SIZE = types.NamedTuple([types.int64] * 3 + [types.float64] * 4 + [types.int64] * 4, Size)


def arguments_of(plan: Plan) -> tuple[Any, ...]:
    """Numba's types of a kernel's arguments: arrays, marks, size, and what pieces leave, of each stage."""
    kinds = plan.kinds
    stored = lambda name: types.none if name is None else array_of(ITEMSIZE[name])  # noqa: E731
    record = lambda names, kind_of: types.NamedTuple([kind_of(name) for name in names], type(names))  # noqa: E731
    columns = kinds.columns._replace(weight_offset=None)
    totals = record(kinds.totals, lambda there: FLOAT64S if there else types.none)
    scales = types.Tuple(())
    if kinds.scales:
        scales = types.NamedTuple([types.float64, stored(kinds.scales.given), stored(kinds.scales.found)], RowScales)
    parts = [record(kinds.reads, stored), record(columns, stored), record(kinds.writes, stored), totals, scales]
    kept = types.UniTuple(array_of(4), len(kinds.operation.stages) if plan.split and not plan.rare else 0)
    return types.NamedTuple(parts, Arrays), array_of(1), SIZE, kept


@lru_cache(maxsize=1024)
def widths(plan: Plan) -> tuple[int, ...]:
    """Words of the sums of each stage."""
    return tuple(map(width_of, Program(plan).sums))


def piece_finder(plan: Plan) -> Any:
    """piece_of(i, size): (the row of piece i, where in the row it begins, its length); of whole rows, row i."""
    length = plan.length
    if not plan.split:
        return inlined(lambda i, size: (i, 0, size.n))

    @inlined
    def piece_of(i: Any, size: Any) -> Any:
        pieces = (size.n + length - 1) // length
        row, begin = i // pieces, i % pieces * length  # in this order one division is enough
        return row, begin, min(length, size.n - begin)

    return piece_of


def adder(program: Program, s: int) -> Any:
    """add(row, m, place, size, arrays): this thread's part of the sums of stage s over the row.

    row: (number of the row, the words that this thread has of it, what the pieces of all rows have left).
    """
    if not program.plan.split:
        add = program.add(s)
        return inlined(lambda row, m, place, size, arrays: add((row[1], m, place, size, arrays, None)))
    if program.plan.reduced:
        pick = picker(program.joined[s])
        return inlined(lambda row, m, place, size, arrays: pick((row[2][s], row[0], None)))
    add_pieces = pieces_adder(program, s)
    return inlined(lambda row, m, place, size, arrays: add_pieces(row[2][s], row[0], size.n))


def pieces_adder(program: Program, s: int) -> Any:
    """add(kept, row, n): this thread's part of the sums of stage s over what the pieces of a row have left."""
    pick, (nothing, plus) = picker(program.sums[s]), adder_of(program, s)
    block, length = program.plan.block, program.plan.length

    @inlined
    def add(kept: Any, row: Any, n: Any) -> Any:
        sums, pieces = nothing(()), (n + length - 1) // length
        for piece in range(cuda.threadIdx.x, pieces, block):
            sums = plus((sums, pick((kept, row * pieces + piece, None))))
        return sums

    return add


def row_runner(program: Program) -> Any:
    """run(row, place, columns, sums, arrays, marks, size, kept): the life of a row, or of a piece of one.

    It is read, summed and written, and has its share in the sums over rows, which are returned. One that is out of
    range is marked in place of that.
    """
    plan = program.plan
    read, write, find_mark = program.read(not plan.split), program.write(), mark_finder(program)
    find = numbers_finder(program, [adder(program, s) for s in range(len(program.op.stages))])
    settings, give_scale = settings_of(program), scale_giver(program)
    teams, marks_rows, gives = plan.teams, plan.marks, program.op.scales is not None

    @inlined
    def run(row: Any, place: Any, columns: Any, sums: Any, arrays: Any, marks: Any, size: Any, kept: Any) -> Any:
        words = (read((arrays, place)), columns)
        m = find((row, words, kept), place, size, arrays, settings(size.eps, arrays, row))
        mark = find_mark(m, arrays, place)
        if marks_rows and place.lane == 0 and place.stop > 0 and place.start == row * size.n:
            marks[row] = mark
        if gives and mark == 0 and place.lane == 0 and place.stop > 0 and place.start == row * size.n:
            give_scale(arrays, row, m)
        if mark == 0 and (teams == 1 or place.stop > 0):
            sums = write((words, arrays, place, size, m, sums, None))
        return sums

    return run


@lru_cache
def rows_kernel(plan: Plan) -> Kernel:
    """kernel(arrays, marks, size, kept): a row for each team, or a block for each piece; the outputs of all rows.

    Where there are sums over rows, block `chunk * m + h` takes one of `chunks` parts of the rows h, h + m, …, which
    share row h of the totals. Its sums are row `chunk * m + h` of the partial sums. So do the blocks for each piece.
    """
    kernel = _looping_rows(plan) if plan.backward else _single_rows(plan)
    return Kernel(kernel, plan.capability, plan.block, plan.demanded, arguments_of(plan))


def _single_rows(plan: Plan) -> Any:
    program, team, teams, levels, split = Program(plan), plan.team, plan.teams, levels_of(plan.team), plan.split
    run, nothing, piece_of = row_runner(program), zeros(program.added), piece_finder(plan)

    def rows_forward(arrays: Any, marks: Any, size: Any, kept: Any) -> None:
        row, begin, length = piece_of(np.int64(cuda.blockIdx.x), size)
        if split:
            row = size.rows - 1 - row  # what was read last is still in L2
        row = row * teams + (cuda.threadIdx.x >> levels)
        lane = np.int64(cuda.threadIdx.x & (team - 1) if teams > 1 else cuda.threadIdx.x)
        stop = length if row < size.rows else 0  # teams without a row do the same steps, on the last
        row = min(row, size.rows - 1)
        weight, bias = row % size.weight_m * size.n + begin, row % size.bias_m * size.n + begin
        place = Place(row * size.n + begin, lane, stop, weight, bias, size.k - begin)
        run(row, place, None, nothing(()), arrays, marks, size, kept)

    return rows_forward


def _looping_rows(plan: Plan) -> Any:
    program, team, teams, levels = Program(plan), plan.team, plan.teams, levels_of(plan.team)
    run, nothing, piece_of = row_runner(program), zeros(program.added), piece_finder(plan)
    read_columns, write_sums, has_totals = program.read_columns(), totals_writer(program), any(plan.kinds.totals)

    def rows_backward(arrays: Any, marks: Any, size: Any, kept: Any) -> None:
        task, begin, length = piece_of(np.int64(cuda.blockIdx.x), size)
        lane = np.int64(cuda.threadIdx.x & (team - 1) if teams > 1 else cuda.threadIdx.x)
        h, chunk, groups = task % size.m, task // size.m, size.rows // size.m
        first, last = groups * chunk // size.chunks, groups * (chunk + 1) // size.chunks
        weight, bias = h % size.weight_m * size.n + begin, h % size.bias_m * size.n + begin
        columns, sums = read_columns((arrays, Place(0, lane, length, weight, bias, size.k))), nothing(())
        for base in range(first, last, teams):
            group = base + (cuda.threadIdx.x >> levels)
            stop = length if group < last else 0  # teams without a row do the same steps, on the last
            row = min(group, last - 1) * size.m + h
            place = Place(row * size.n + begin, lane, stop, weight, bias, size.k - begin)
            sums = run(row, place, columns, sums, arrays, marks, size, kept)
        if has_totals:
            write_sums(arrays, Place(task * size.n + begin, lane, length, 0, 0, size.k), sums)

    return rows_backward


@lru_cache
def pieces_kernel(plan: Plan, s: int) -> Kernel:
    """kernel(arrays, marks, size, kept): block `row * pieces + piece` leaves stage s's sums over that piece."""
    program, backward = Program(plan), plan.backward
    read, read_columns, add = program.read(s == 0), program.read_columns(), program.add(s)
    find = numbers_finder(program, [adder(program, earlier) for earlier in range(s)])
    total, piece_of = total_of(plan.team, program.sums[s], program.join(s)), piece_finder(plan)
    settings = settings_of(program)

    def piece_sums(arrays: Any, marks: Any, size: Any, kept: Any) -> None:
        lane, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        row, begin, length = piece_of(block, size)
        weight, bias = row % size.weight_m * size.n + begin, row % size.bias_m * size.n + begin
        place = Place(row * size.n + begin, lane, length, weight, bias, size.k - begin)
        words = (read((arrays, place)), read_columns((arrays, place)) if backward else None)
        m = find((row, words, kept), place, size, arrays, settings(size.eps, arrays, row))
        sums = total(add((words, m, place, size, arrays, None)))
        if lane == 0:
            put_value((kept[s], block, sums))

    return Kernel(piece_sums, plan.capability, plan.block, 0, arguments_of(plan))


# ----------------------------------------------------------------------------------------------- dweight and dbias


def totals_writer(program: Program) -> Any:
    """write_sums(arrays, place, sums): a block's sums over rows, those of all teams added up in shared memory."""
    plan, write = program.plan, program.write_totals()
    if plan.teams == 1:
        return inlined(lambda arrays, place, sums: write((arrays.totals, place, sums)))
    shape, lanes = given(plan.kinds.totals, lambda _: program.kind), plan.lanes
    teams, length, block, levels = plan.teams, plan.length, plan.block, levels_of(plan.team)
    words, pick = teams * length * width_of(shape), picker(shape)

    def put_all(b: Any, table: Any, start: Any, place: Place, sums: Any) -> None:
        for v in program.vectors(b, place):
            for e in range(lanes):
                i, j = b.add(b.add(start, v.i), LONG(e)), v.t * lanes + e
                put(b, table, i, given(sums, lambda a, j=j: a[j]))

    def add(b: Any, total: Any, more: Any) -> Any:
        return given(total, lambda a, one: a + one.to("f64"), more)

    def save(b: Any, totals: Any, i: Any, sums: Any) -> None:
        given(sums, lambda number, pointer: b.store(number.value, b.gep(pointer, [i])), totals)

    wide = given(plan.kinds.totals, lambda _: "f64")
    put_step, plus, save_step, nothing = step(put_all), step(add, wide), step(save), zeros(wide)

    @inlined
    def write_sums(arrays: Any, place: Any, sums: Any) -> None:
        table = cuda.shared.array(words, np.uint32)
        put_step((table, np.int64(cuda.threadIdx.x >> levels) * length, place, sums))
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, place.stop, block):
            total = nothing(())
            for s in range(teams):
                total = plus((total, pick((table, np.int64(s * length + i), None))))
            save_step((arrays.totals, place.start + i, total))

    return write_sums


@lru_cache
def add_partials(name: str, capability: Capability, slices: int) -> Kernel:
    """kernel(partial, tasks, m, n, total): rows h, h + m, … of the partial sums, added in an order fixed by the shape,
    are row h of the total.
    """
    native, table_shape = capability >= ROUNDS_TO_BFLOAT16, (slices, COLUMNS)

    def body(b: Any, total: Any, i: Any, number: Any) -> None:
        store(b, total, i, name, encoded(b, [number], name, native), ALONE)

    save = step(body)

    def partial_sums(partial: Any, tasks: Any, m: Any, n: Any, total: Any) -> None:
        table = cuda.shared.array(table_shape, np.float64)
        column, slice_ = cuda.threadIdx.x & (COLUMNS - 1), cuda.threadIdx.x >> WARP_LEVELS
        pieces = (n + COLUMNS - 1) // COLUMNS
        h = np.int64(cuda.blockIdx.x) // pieces
        i = np.int64(cuda.blockIdx.x) % pieces * COLUMNS + column
        sum_ = 0.0
        if i < n:
            for t in range(h + m * slice_, tasks, m * slices):
                sum_ += partial[t * n + i]
        table[slice_, column] = sum_
        cuda.syncthreads()
        if slice_ == 0:
            for s in range(1, slices):
                sum_ += table[s, column]
            if i < n:
                save((total, h * n + i, sum_))

    types_ = (FLOAT64S, types.int64, types.int64, types.int64, array_of(ITEMSIZE[name]))
    return Kernel(partial_sums, capability, COLUMNS * slices, 0, types_)
