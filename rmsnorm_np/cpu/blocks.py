"""What happens to a block of rows that stays in the first-level cache: the sums of each row, then what it gives."""

from __future__ import annotations

from typing import Any

from rmsnorm_np.cpu.arrays import moved, room_for
from rmsnorm_np.cpu.extremes import is_modest, verdicts
from rmsnorm_np.cpu.jit import block_piece, inlined, piece
from rmsnorm_np.cpu.kinds import Arrays, Kinds
from rmsnorm_np.cpu.row import BLOCK, SEGMENT, Program
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import Writer

SHORT_ROW = 64  # up to here what is done once a row counts: with 16 elements 1.35 times as fast, with 64 the same


def keeping(program: Program) -> Any:
    """keep(row, first, last): write what is kept of elements first to last, of which no sums are taken."""
    width = program.width

    def body(w: Writer, row: Arrays, i: Any, count: Any) -> None:
        program.element(w, row, i, count, True)

    put = step(body)

    @piece
    def keep(row: Any, first: Any, last: Any) -> Any:
        for i in range(first, last, width):
            put((row, i, min(width, last - i)))

    return keep


def blocks(kinds: Kinds) -> Any:
    """block(arrays, size, marks, first, step, count, total_start): rows first, first + step, …, count of them.

    Returns how many rows were marked and left out, as their sums leave the range.
    """
    program = Program(kinds)
    stages = len(kinds.operation.stages)
    move, room = moved(kinds), room_for(program.size * BLOCK)
    whole, write = program.write()
    width = program.width
    numbers_of_row = program.get_numbers(stages - 1)
    has_marks = kinds.marks
    (judge, left_out), modest = verdicts(program), is_modest(program)
    write_always = program.write_always()

    eps_of = program.eps_of()

    # Rows of weight and bias: a division a row costs as much as 16 elements. Backward all rows of a block share one.
    turns = kinds.operation.share is None

    @inlined
    def start_of(first: Any, m: Any) -> Any:
        return 0 if m == 1 else first % m

    @inlined
    def next_of(h: Any, m: Any) -> Any:
        return h + 1 if turns and h + 1 < m else 0 if turns else h

    def measured(s: int) -> Any:
        """The sums of stage s of all rows, then their numbers."""
        segment, get = program.segment(s), program.get_numbers(s - 1)
        put, find = program.put(program.sums[s], program.places[2 * s]), program.find_numbers(s)
        add, zero = program.adding(s)
        first_k = kinds.operation.stages[s].first_k and kinds.first_k
        keeps, keep, give_scale = bool(first_k and s == 0 and program.kept), keeping(program), program.give_scale(s)

        @inlined
        def measure(arrays: Any, size: Any, first: Any, step_: Any, count: Any, room: Any, ahead: Any) -> Any:
            h, bias_h = start_of(first, size.weight_m), start_of(first, size.bias_m)
            for j in range(count):
                row = move((arrays, (first + j * step_) * size.stride, h * size.n, bias_h * size.n, 0))
                h, bias_h = next_of(h, size.weight_m), next_of(bias_h, size.bias_m)
                m = get((room, BLOCK, j))
                sums = zero(())
                stop = size.k if first_k else size.n
                for begin in range(0, stop, SEGMENT):
                    sums = add((sums, segment(row, begin, min(begin + SEGMENT, stop), size.k, m, ahead)))
                put((room, BLOCK, j, sums))
                if keeps:
                    keep(row, stop, size.n)
            for j in range(count):  # a loop of its own: LLVM takes several roots and divisions at once
                find((room, BLOCK, j, size.n, size.k, eps_of(size.eps, first + j * step_)))
                give_scale(room, BLOCK, j, size.eps, first + j * step_)

        return measure

    measure = measured(0)
    if stages == 2:
        measure_first, measure_second = measure, measured(1)

        @inlined
        def measure(arrays: Any, size: Any, first: Any, step_: Any, count: Any, room: Any, ahead: Any) -> Any:
            measure_first(arrays, size, first, step_, count, room, ahead)
            measure_second(arrays, size, first, step_, count, room, ahead)

    @block_piece
    def block(arrays: Any, size: Any, marks: Any, first: Any, step_: Any, count: Any, total_start: Any) -> Any:
        numbers = room(())
        # while this block's sums are taken, and its outputs written, the next block is fetched
        ahead = count * step_ * size.n if size.streaming else 0
        measure(arrays, size, first, step_, count, numbers, ahead)
        if has_marks:
            h, fine = start_of(first, size.weight_m), size.modest
            for j in range(count):
                if size.weight_m > 1:
                    fine = modest(move((arrays, 0, h * size.n, 0, 0)), size.n)
                    h = next_of(h, size.weight_m)
                judge((numbers, BLOCK, j, size.n, size.k, eps_of(size.eps, first + j * step_), fine))
        # then memory.streams has seen to it that rows are aligned
        short = size.n <= SHORT_ROW and size.n % width == 0
        marked = 0
        h, bias_h = start_of(first, size.weight_m), start_of(first, size.bias_m)
        for j in range(count):
            r = first + j * step_
            row = move((arrays, r * size.stride, h * size.n, bias_h * size.n, total_start))
            h, bias_h = next_of(h, size.weight_m), next_of(bias_h, size.bias_m)
            if has_marks and left_out(row, size.n, numbers, BLOCK, j):
                marked += marks[r] == 0  # not those that were marked before
                marks[r] = 1
                write_always(row, 0, size.n)
                continue
            m = numbers_of_row((numbers, BLOCK, j))
            if short:
                whole(row, size.n, size.k, m, size.streaming, ahead)
            else:
                write(row, 0, size.n, size.k, m, size.streaming, ahead)
        return marked

    return block
