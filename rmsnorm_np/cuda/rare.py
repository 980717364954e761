"""Rows whose sums leave the range of the type they are computed in: found by their marks, and run once more.

A block takes such a row a vector at a time, in float64: of 16 or 32 bits, nothing leaves its range. Where an array is
of float64, the row is brought into the range by powers of two, which is exact: the norm of s·x with eps·s² is the norm
of x with eps, and the gradient of s·x and t·dy is t / s times that of x and dy. dweight takes dy as it is, for xhat
does not depend on s.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from rmsnorm_np.cuda.elements import Place, Scales, Size
from rmsnorm_np.cuda.kernel import Kernel
from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.number import DOUBLE, LONG, Condition, Number
from rmsnorm_np.cuda.row import Program
from rmsnorm_np.cuda.schedule import MARKS, SIZE, arrays_type, numbers_finder
from rmsnorm_np.cuda.team import added, inlined, picker, putter, total_of, width_of
from rmsnorm_np.cuda.tracing import given, step, zeros
from rmsnorm_np.ops.operation import scale
from rmsnorm_np.ops.primitives import either

# Exponents. The largest of x becomes 2**14, so that in rows of up to 2**24 elements rstd is at most 1, and dy · rstd in
# the range. g = dy · weight may be as large as is safe: beside a large g, a small one must stay what it is.
X_TARGET, MOST_G, LEAST_G = 14, 900, -300
FAR = 540  # by so much both factors of g are made smaller, or larger, to find the exponent of a g out of range


class Largest(NamedTuple):
    """The largest magnitudes of a row: of x in the RMS; of x less its first element; 1 if one of these is more than
    half of that element, else 0; of g, and of g times 2**(-2 FAR) and 2**(2 FAR).
    """

    x: Any
    apart: Any
    far: Any
    g: Any
    large_g: Any
    small_g: Any


LARGEST = Largest(*["f64"] * 6)
SCALES = (Scales(*["f64"] * 7), "f64")


def larger(a: Largest, b: Largest) -> Any:
    """The larger of each."""
    return given(a, lambda one, other: one.maximum(other), b)


def survey(program: Program) -> Any:
    """A step: survey(row, arrays, place, size, largest), with what this thread has of one vector of the row."""
    kinds, recentring = program.kinds, program.op.recentring

    def body(b: Any, row: Any, arrays: Any, place: Any, size: Size, largest: Largest) -> Largest:
        at = Place(*place)
        there, first = program._there(b, at, 0), _first(b, program, arrays, at)
        vector = program._vector(program.held, row[0], 0)
        columns = program._vector(program.columns, row[1], 0) if row[1] is not None else None
        for e in range(program.plan.lanes):
            read = program._numbers(b, program.held, vector, e, "plain")
            x, dy, nothing = read[0], getattr(read, "dy", None), largest.x.constant(0.0)
            inside, exists = program._inside(b, at, 0, e), there.each(e)
            new = largest._replace(x=largest.x.maximum(either(inside, abs(x), nothing)))
            if recentring:
                apart = abs(x - first)
                apart = apart if exists is None else Condition(b, exists).either(apart, nothing)
                far = either(apart.exceeds(abs(first) * 0.5), nothing + 1.0, nothing)
                new = new._replace(apart=largest.apart.maximum(apart), far=largest.far.maximum(far))
            if dy is not None:
                c = program._columns(b, columns, e, size.offset, "plain")
                factor = nothing + 1.0 if kinds.columns.weight is None else scale(c)
                size_of = lambda power, dy=dy, factor=factor: abs(dy * power) * abs(factor * power)  # noqa: E731
                sizes = [size_of(2.0**power) for power in (0, -FAR, FAR)]
                found = [old.maximum(one) for old, one in zip(new[3:], sizes, strict=True)]
                new = Largest(*new[:3], *found)
            largest = new
        return largest

    return step(body, LARGEST)


def _first(b: Any, program: Program, arrays: Any, at: Place) -> Number:
    """The first element of the row; at.bias: where it is."""
    pointer = getattr(arrays.writes, program.kept) if program.kept else arrays.reads[0]
    return program.one(b, pointer, program.held[0], at.bias).to("f64")


def _exponent(b: Any, number: Number) -> Any:
    """The e of 1.… · 2**e; -1023 for zero and subnormal numbers, 1024 for infinity and NaN."""
    bits = b.and_(b.lshr(b.bitcast(number.value, LONG), LONG(52)), LONG(0x7FF))
    return b.sub(bits, LONG(1023))


def _power(b: Any, e: Any) -> Number:
    """2**e, for -1023 < e < 1024."""
    return Number(b, b.bitcast(b.shl(b.add(e, LONG(1023)), LONG(52)), DOUBLE))


def _limited(b: Any, e: Any) -> Any:
    e = b.select(b.icmp_signed("<", e, LONG(-1022)), LONG(-1022), e)
    return b.select(b.icmp_signed(">", e, LONG(1023)), LONG(1023), e)


def _halves(b: Any, e: Any) -> tuple[Number, Number]:
    """2**e in two factors."""
    half = b.ashr(e, LONG(1))
    return _power(b, half), _power(b, b.sub(e, half))


def scales_of(program: Program) -> Any:
    """A step: scales(largest, arrays, place, size), and eps for the scaled row."""
    recentring = program.op.recentring

    def body(b: Any, largest: Largest, arrays: Any, place: Any, size: Size) -> Any:
        zero_, x = largest.x.constant(0.0), largest.x
        first = zero_
        if recentring:  # exact, if no element is too far from the first: Sterbenz' lemma
            near = largest.far.compared("==", 0.0)
            first = near.either(_first(b, program, arrays, Place(*place)), zero_)
            x = near.either(largest.apart, x)
        root = b.ashr(_exponent(b, size.eps), LONG(1))
        root = b.select(size.eps.exceeds(0.0).value, root, LONG(-1023))
        e = _exponent(b, x)
        e = b.select(b.icmp_signed("<", e, root), root, e)
        s = _limited(b, b.sub(LONG(X_TARGET), e))
        g = _exponent(b, largest.g)
        g = b.select(b.icmp_signed(">", g, LONG(1023)), b.add(_exponent(b, largest.large_g), LONG(2 * FAR)), g)
        g = b.select(b.icmp_signed("<", g, LONG(-900)), b.sub(_exponent(b, largest.small_g), LONG(2 * FAR)), g)
        t = b.select(b.icmp_signed(">", g, LONG(MOST_G)), b.sub(LONG(MOST_G), g), LONG(0))
        t = b.select(b.icmp_signed("<", g, LONG(LEAST_G)), b.neg(g), t)
        t = b.select(largest.small_g.exceeds(0.0).value, _limited(b, t), LONG(0))
        factor = _power(b, s)
        undo, further = _halves(b, b.sub(s, t)), _halves(b, b.sub(t, s))
        return Scales(first, factor, _power(b, t), *further, *undo), size.eps * factor * factor

    return step(body, SCALES)


def scaler(program: Program) -> Any:
    """find(start, weight, size, arrays): the scales of a row, and its eps."""
    plan = program.plan
    length, team = plan.length, plan.team
    read, read_columns, look = program.read(False), program.read_columns(), survey(program)
    nothing, total, find_scales = zeros(LARGEST), total_of(team, LARGEST, larger), scales_of(program)
    put, pick, width, backward = putter(LARGEST), picker(LARGEST), width_of(LARGEST), plan.backward

    @inlined
    def find(start: Any, weight: Any, size: Any, arrays: Any) -> Any:
        shared = cuda.shared.array(width, np.uint32)
        lane, largest = np.int64(cuda.threadIdx.x), nothing(())
        for begin in range(0, size.n, length):
            place = (start + begin, lane, size.n - begin, weight + begin, start, size.k - begin)
            words = read((arrays, place))
            columns = read_columns((arrays, place)) if backward else None
            largest = look(((words, columns), arrays, place, size, largest))
        largest = total(largest)
        if cuda.threadIdx.x == 0:
            put((shared, 0, largest))
        cuda.syncthreads()
        return find_scales((pick((shared, 0, None)), arrays, (start, lane, size.n, weight, start, size.k), size))

    return find


def rare_adder(program: Program, s: int) -> Any:
    """add((start, weight), m, scales, size, arrays): stage s's sums over this thread's vectors of a row."""
    length, backward = program.plan.length, program.plan.backward
    read, read_columns, add = program.read(False), program.read_columns(), program.add(s)
    plus, nothing = step(lambda b, *a: added(*a), program.sums[s]), zeros(program.sums[s])

    @inlined
    def adder(row: Any, m: Any, scales: Any, size: Any, arrays: Any) -> Any:
        start, weight = row
        lane, sums = np.int64(cuda.threadIdx.x), nothing(())
        for begin in range(0, size.n, length):
            place = (start + begin, lane, size.n - begin, weight + begin, 0, size.k - begin)
            words = read((arrays, place))
            columns = read_columns((arrays, place)) if backward else None
            sums = plus((sums, add(((words, columns), m, place, size, scales))))
        return sums

    return adder


@lru_cache
def rare_kernel(plan: Plan) -> Kernel:
    """kernel(arrays, marks, size): the rows that are marked, of a plan that `launch.rare_plan` made.

    Block `chunk * m + h` takes those of the rows h, h + m, … of one of `chunks` parts, and adds to row `chunk * m + h`
    of the partial sums.
    """
    program, team = Program(plan), plan.team
    run_row = row_runner(program)

    def rare_rows(arrays: Any, marks: Any, size: Any) -> None:
        task = np.int64(cuda.blockIdx.x)
        h, chunk, groups = task % size.m, task // size.m, size.rows // size.m
        first, last = groups * chunk // size.chunks, groups * (chunk + 1) // size.chunks
        for base in range(first, last, team):
            group, mark = base + cuda.threadIdx.x, 0
            if group < last:
                mark = marks[group * size.m + h]
            if cuda.syncthreads_or(mark) != 0:
                for marked in range(base, min(base + team, last)):
                    if marks[marked * size.m + h] != 0:
                        run_row(arrays, marked * size.m + h, size, task)

    # room for two blocks: left to itself, the compiler makes room for more, and keeps numbers in memory for it
    return Kernel(rare_rows, plan.capability, plan.block, 2, (arrays_type(plan), MARKS, SIZE))


def row_runner(program: Program) -> Any:
    """run(arrays, row, size, task): one row, a vector at a time."""
    plan = program.plan
    length, backward, has_totals = plan.length, plan.backward, any(plan.kinds.totals)
    read, read_columns, write = program.read(False), program.read_columns(), program.write()
    read_totals, write_totals = program.read_totals(), program.write_totals()
    find = numbers_finder(program, [rare_adder(program, s) for s in range(len(program.op.stages))])
    if "float64" in plan.kinds.names:
        find_scales = scaler(program)
        scales_part = step(lambda b, found: found[0], SCALES[0])
        eps_part = step(lambda b, found: found[1], types.float64)
        split = inlined(lambda found: (scales_part((found,)), eps_part((found,))))
    else:
        find_scales = inlined(lambda start, weight, size, arrays: size.eps)
        split = inlined(lambda eps: (None, eps))

    @inlined
    def run(arrays: Any, row: Any, size: Any, task: Any) -> None:
        start, weight, lane = row * size.n, row % size.weight_m * size.n, np.int64(cuda.threadIdx.x)
        bias = row % size.bias_m * size.n
        scales, eps = split(find_scales(start, weight, size, arrays))
        scaled = Size(
            size.rows, size.n, size.k, size.inverse_n, size.inverse_k, eps, size.offset, size.weight_m, size.bias_m,
            size.m, size.chunks,
        )  # fmt: skip
        m = find((start, weight), scales, scaled, arrays)
        for begin in range(0, size.n, length):
            place = (start + begin, lane, size.n - begin, weight + begin, bias + begin, size.k - begin)
            there = (task * size.n + begin, lane, size.n - begin, 0, 0, size.k)
            words = read((arrays, place))
            columns = read_columns((arrays, place)) if backward else None
            sums = read_totals((arrays.totals, there))
            sums = write(((words, columns), arrays, place, scaled, m, sums, scales))
            if has_totals:
                write_totals((arrays.totals, there, sums))
        cuda.syncthreads()

    return run
