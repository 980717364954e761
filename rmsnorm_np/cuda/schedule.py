"""The kernels: who takes which row. Rows that a team holds (`rows_kernel`), long rows in pieces, sums over rows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from rmsnorm_np.cuda.elements import Arrays, Size
from rmsnorm_np.cuda.kernel import Capability, Kernel, array_of
from rmsnorm_np.cuda.launch import WARP, Plan, rounds_to_bfloat16
from rmsnorm_np.cuda.row import Program
from rmsnorm_np.cuda.team import (
    WARP_LEVELS,
    added,
    completer,
    inlined,
    levels_of,
    mark_of,
    picker,
    putter,
    total_of,
    voter,
    width_of,
)
from rmsnorm_np.cuda.tracing import step, zeros
from rmsnorm_np.cuda.words import ITEMSIZE, Apart, encoded, store

COLUMNS = WARP  # of a block that adds up partial sums

FLOAT64S = types.CPointer(types.float64)
MARKS = types.CPointer(types.uint8)
SIZE = types.NamedTuple([types.int64] * 3 + [types.float64] * 4 + [types.int64] * 4, Size)


def arrays_type(plan: Plan) -> Any:
    """Numba's type of `Arrays`."""
    kinds = plan.kinds
    stored = lambda name: types.none if name is None else array_of(ITEMSIZE[name])  # noqa: E731
    record = lambda names, kind_of: types.NamedTuple([kind_of(name) for name in names], type(names))  # noqa: E731
    columns = kinds.columns._replace(weight_offset=None)
    totals = record(kinds.totals, lambda there: FLOAT64S if there else types.none)
    parts = [record(kinds.reads, stored), record(columns, stored), record(kinds.writes, stored), totals]
    return types.NamedTuple(parts, Arrays)


def numbers_finder(program: Program, adders: list[Any]) -> Any:
    """find(row, place, size, arrays): the numbers of a row and its mark, from each stage's sums by its adder."""
    stages = [completer(program, s) for s in range(len(adders))]
    first, first_numbers = adders[0], stages[0]
    if len(stages) == 1:
        return inlined(
            lambda row, place, size, arrays: first_numbers(first(row, None, place, size, arrays), size, None, size.eps)
        )
    second, second_numbers = adders[1], stages[1]

    @inlined
    def find(row: Any, place: Any, size: Any, arrays: Any) -> Any:
        m = first_numbers(first(row, None, place, size, arrays), size, None, size.eps)
        return second_numbers(second(row, m, place, size, arrays), size, m, size.eps)

    return find


def row_adder(program: Program, s: int) -> Any:
    """add(row, m, place, size, arrays): stage s's sums over what this thread has of the row."""
    add = program.add(s)
    return inlined(lambda row, m, place, size, arrays: add((row, m, place, size, None)))


def mark_finder(program: Program) -> Any:
    """mark(m, arrays, place): whether the row is out of range. One that is trivial is not.

    The elements are fetched once more: words that were still needed here would have to be kept, in registers, for all
    rows.
    """
    given_mark, equal, team = mark_of(program), program.equal(), program.plan.team
    vote, all_tests = voter(team), (1 << len(program.op.trivial)) - 1
    if not program.op.trivial:
        return inlined(lambda m, arrays, place: given_mark((m,)))

    @inlined
    def find(m: Any, arrays: Any, place: Any) -> Any:
        mark = given_mark((m,))
        if mark == 1:  # the same in all threads of the team
            bits = np.uint32(all_tests)
            i = place[1]
            while i < place[2] and bits != 0:
                bits = np.uint32(bits & equal((arrays, place[0], i)))
                i += team
            if vote(bits) != 0:
                mark = np.uint32(0)
        return mark

    return find


@lru_cache
def rows_kernel(plan: Plan) -> Kernel:
    """kernel(arrays, marks, size): a row for each team; for operations with sums over rows, block after block."""
    return _looping_kernel(plan) if plan.backward else _single_kernel(plan)


def _single_kernel(plan: Plan) -> Kernel:
    program, team, teams, levels, marks_rows = Program(plan), plan.team, plan.teams, levels_of(plan.team), plan.marks
    read, write = program.read(True), program.write()
    find = numbers_finder(program, [row_adder(program, s) for s in range(len(program.op.stages))])
    find_mark, nothing = mark_finder(program), zeros(program.added)

    def rows_forward(arrays: Any, marks: Any, size: Any) -> None:
        row = np.int64(cuda.blockIdx.x) * teams + (cuda.threadIdx.x >> levels)
        lane = np.int64(cuda.threadIdx.x & (team - 1) if teams > 1 else cuda.threadIdx.x)
        stop = size.n if row < size.rows else 0  # teams without a row do the same steps, on the last
        row = min(row, size.rows - 1)
        place = (row * size.n, lane, stop, row % size.weight_m * size.n, row % size.bias_m * size.n, size.k)
        words = (read((arrays, place)), None)
        m = find(words, place, size, arrays)
        mark = find_mark(m, arrays, place)
        if marks_rows and lane == 0 and stop > 0:
            marks[row] = mark
        if mark == 0 and (teams == 1 or stop > 0):
            write((words, arrays, place, size, m, nothing(()), None))

    return Kernel(rows_forward, plan.capability, plan.block, plan.demanded, (arrays_type(plan), MARKS, SIZE))


def _looping_kernel(plan: Plan) -> Kernel:
    """Block `chunk * m + h` takes one of `chunks` parts of the rows h, h + m, …, which share row h of the totals.

    Its sums are row `chunk * m + h` of the partial sums.
    """
    program, team, teams, levels, marks_rows = Program(plan), plan.team, plan.teams, levels_of(plan.team), plan.marks
    read, read_columns, write = program.read(True), program.read_columns(), program.write()
    find = numbers_finder(program, [row_adder(program, s) for s in range(len(program.op.stages))])
    find_mark, nothing, write_sums = mark_finder(program), zeros(program.added), totals_writer(program)
    has_totals = any(plan.kinds.totals)

    def rows_backward(arrays: Any, marks: Any, size: Any) -> None:
        task = np.int64(cuda.blockIdx.x)
        lane = np.int64(cuda.threadIdx.x & (team - 1) if teams > 1 else cuda.threadIdx.x)
        h, chunk, groups = task % size.m, task // size.m, size.rows // size.m
        first, last = groups * chunk // size.chunks, groups * (chunk + 1) // size.chunks
        weight = h % size.weight_m * size.n
        columns = read_columns((arrays, (0, lane, size.n, weight, 0, size.k)))
        sums = nothing(())
        for base in range(first, last, teams):
            group = base + (cuda.threadIdx.x >> levels)
            stop = size.n if group < last else 0  # teams without a row do the same steps, on the last
            row = min(group, last - 1) * size.m + h
            place = (row * size.n, lane, stop, weight, 0, size.k)
            words = (read((arrays, place)), columns)
            m = find(words, place, size, arrays)
            mark = find_mark(m, arrays, place)
            if marks_rows and lane == 0 and stop > 0:
                marks[row] = mark
            if mark == 0 and (teams == 1 or stop > 0):
                sums = write((words, arrays, place, size, m, sums, None))
        if has_totals:
            write_sums(arrays, task, size, lane, sums)

    return Kernel(rows_backward, plan.capability, plan.block, plan.demanded, (arrays_type(plan), MARKS, SIZE))


def totals_writer(program: Program) -> Any:
    """write_sums(arrays, task, size, lane, sums): a block's sums to row `task` of the partial sums."""
    plan = program.plan
    if plan.teams == 1:
        write = program.write_totals()
        return inlined(
            lambda arrays, task, size, lane, sums: write(
                (arrays.totals, (task * size.n, lane, size.n, 0, 0, size.k), sums)
            )
        )
    nothing = inlined(lambda arrays, task, size, lane, sums: None)
    first, second = (team_totals_writer(program, f) if there else nothing for f, there in enumerate(plan.kinds.totals))

    @inlined
    def both(arrays: Any, task: Any, size: Any, lane: Any, sums: Any) -> None:
        first(arrays, task, size, lane, sums)
        second(arrays, task, size, lane, sums)

    return both


def team_totals_writer(program: Program, f: int) -> Any:
    """write(arrays, task, size, lane, sums): the sums of one total, those of all teams added up in shared memory."""
    plan, put, pick = program.plan, program.put_sums(f), picker(program.kind)
    teams, length, block, levels = plan.teams, plan.length, plan.block, levels_of(plan.team)
    as_float64 = step(lambda b, a: a.to("f64"), types.float64)
    words = teams * length * width_of(program.kind)

    @inlined
    def write(arrays: Any, task: Any, size: Any, lane: Any, sums: Any) -> None:
        table = cuda.shared.array(words, np.uint32)
        put((table, np.int64(cuda.threadIdx.x >> levels) * length, lane, sums))
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, size.n, block):
            total = 0.0
            for s in range(teams):
                total += as_float64((pick((table, np.int64(s * length + i), None)),))
            arrays.totals[f][task * size.n + i] = total

    return write


# ------------------------------------------------------------------------------------------------------- long rows

KEPT = types.CPointer(types.uint32)


def kept_type(plan: Plan) -> Any:
    """Numba's type of the addresses of what pieces leave, one for each stage."""
    return types.UniTuple(KEPT, len(plan.kinds.operation.stages))


def piece_adder(program: Program, s: int) -> Any:
    """add(row, m, pieces, size, kept): stage s's sums over those of the row's pieces that this thread takes."""
    pick, plus, nothing = (
        picker(program.sums[s]),
        step(lambda b, *a: added(*a), program.sums[s]),
        zeros(program.sums[s]),
    )
    block = program.plan.block

    @inlined
    def add(row: Any, m: Any, pieces: Any, size: Any, kept: Any) -> Any:
        sums = nothing(())
        for piece in range(cuda.threadIdx.x, pieces, block):
            sums = plus((sums, pick((kept[s], row * pieces + piece, None))))
        return sums

    return add


@lru_cache
def pieces_kernel(plan: Plan, s: int) -> Kernel:
    """kernel(arrays, marks, size, kept): block `row * pieces + piece` leaves stage s's sums over that piece of that
    row.
    """
    program, length = Program(plan), plan.length
    read, read_columns, add = program.read(s == 0), program.read_columns(), program.add(s)
    total, put = total_of(plan.team, program.sums[s], added), putter(program.sums[s])
    backward = plan.backward
    if s > 0:
        find = numbers_finder(program, [piece_adder(program, earlier) for earlier in range(s)])
    else:
        find = inlined(lambda row, pieces, size, kept: None)

    def piece_sums(arrays: Any, marks: Any, size: Any, kept: Any) -> None:
        lane, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        pieces = (size.n + length - 1) // length
        row, begin = block // pieces, block % pieces * length
        stop = min(length, size.n - begin)
        place = (row * size.n + begin, lane, stop, row % size.weight_m * size.n + begin, 0, size.k - begin)
        words = read((arrays, place))
        columns = read_columns((arrays, place)) if backward else None
        m = find(row, pieces, size, kept)
        sums = total(add(((words, columns), m, place, size, None)))
        if lane == 0:
            put((kept[s], block, sums))

    types_ = (arrays_type(plan), MARKS, SIZE, kept_type(plan))
    return Kernel(piece_sums, plan.capability, plan.block, 0, types_)


@lru_cache
def piece_outputs_kernel(plan: Plan) -> Kernel:
    """kernel(arrays, marks, size, kept): the outputs of all pieces, from the sums that the pieces left.

    Forward, block `(rows - 1 - row) * pieces + piece` takes that piece: what was read last is still in L2. Backward,
    block `(chunk * m + h) * pieces + piece` takes that piece of all rows of a chunk, see `rows_kernel`.
    """
    program, length = Program(plan), plan.length
    read, read_columns, write = program.read(False), program.read_columns(), program.write()
    find = numbers_finder(program, [piece_adder(program, s) for s in range(len(program.op.stages))])
    mark_of_row, nothing, backward, marks_rows = mark_of(program), zeros(program.added), plan.backward, plan.marks
    has_totals, write_sums = any(plan.kinds.totals), program.write_totals()

    def piece_outputs(arrays: Any, marks: Any, size: Any, kept: Any) -> None:
        lane, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        pieces = (size.n + length - 1) // length
        task, begin = block // pieces, block % pieces * length
        stop = min(length, size.n - begin)
        h, chunk, groups = task % size.m, task // size.m, size.rows // size.m
        first, last = groups * chunk // size.chunks, groups * (chunk + 1) // size.chunks
        if not backward:
            h, first, last = size.rows - 1 - task, 0, 1
        weight = h % size.weight_m * size.n + begin
        bias = h % size.bias_m * size.n + begin
        columns = read_columns((arrays, (0, lane, stop, weight, 0, size.k))) if backward else None
        sums = nothing(())
        for group in range(first, last):
            row = group * size.m + h
            place = (row * size.n + begin, lane, stop, weight, bias, size.k - begin)
            words = (read((arrays, place)), columns)
            m = find(row, pieces, size, kept)
            mark = mark_of_row((m,))
            if marks_rows and lane == 0 and begin == 0:
                marks[row] = mark
            if mark == 0:
                sums = write((words, arrays, place, size, m, sums, None))
        if has_totals:
            write_sums((arrays.totals, (task * size.n + begin, lane, stop, 0, 0, size.k), sums))

    types_ = (arrays_type(plan), MARKS, SIZE, kept_type(plan))
    return Kernel(piece_outputs, plan.capability, plan.block, plan.demanded, types_)


# ----------------------------------------------------------------------------------------------- dweight and dbias


@lru_cache
def add_partials(name: str, capability: Capability, slices: int) -> Kernel:
    """kernel(partial, tasks, m, n, total): rows h, h + m, … of the partial sums, added in an order fixed by the shape,
    are row h of the total.
    """
    native, alone, table_shape = rounds_to_bfloat16(capability), Apart([None]), (slices, COLUMNS)

    def body(b: Any, total: Any, i: Any, number: Any) -> None:
        store(b, total, i, name, encoded(b, [number], name, native), alone)

    put = step(body)

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
                put((total, h * n + i, sum_))

    types_ = (FLOAT64S, types.int64, types.int64, types.int64, array_of(ITEMSIZE[name]))
    return Kernel(partial_sums, capability, COLUMNS * slices, 0, types_)
