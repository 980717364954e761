"""Rows whose sums leave the range of the type they are computed in: found by their marks, and run once more.

A block takes such a row a vector at a time, in float64: of 16 or 32 bits, nothing leaves its range. Where an array is
of float64, the row is brought into the range by powers of two, which is exact: the norm of s·x with eps·s² is the norm
of x with eps, and the gradient of s·x and t·dy is t / s times that of x and dy; of other outputs an operation
says what they depend on. dweight takes dy as it is, for xhat does not depend on s.
"""

from __future__ import annotations

from functools import lru_cache, reduce
from typing import Any, NamedTuple

import numpy as np
from numba import cuda
from numba.cuda import types

from rmsnorm_np.cuda.elements import Place, Scales, Size
from rmsnorm_np.cuda.kernel import Kernel
from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.number import DOUBLE, LONG, Condition, Number, exponent, mantissa, power
from rmsnorm_np.cuda.row import Program
from rmsnorm_np.cuda.schedule import arguments_of
from rmsnorm_np.cuda.team import adder_of, agreed, inlined, numbers_finder, scale_giver, settings_of
from rmsnorm_np.cuda.tracing import step, zeros
from rmsnorm_np.ops.operation import scale
from rmsnorm_np.ops.primitives import either
from rmsnorm_np.ops.records import given, leaves, like

# Exponents. The largest of x becomes 2**14, so that in rows of up to 2**24 elements rstd is at most 1, and dy · rstd in
# the range; where other arrays have the scale of x, and may be larger, it becomes 1. g = dy · weight may be as large as
# is safe: beside a large g, a small one must stay what it is.
X_TARGET, MOST_G, LEAST_G = 14, 900, -300
SHIFT = 8192  # is added to an exponent, so that each is above zero


class Largest(NamedTuple):
    """The largest of a row, as exponents + SHIFT, 0 for zeros alone: of what the row is about, in the RMS; of x less
    its first element; of g. far: 1 if an x less the first one is more than half of that one, else 0.
    """

    about: Any
    apart: Any
    g: Any
    far: Any


LARGEST = Largest(*["f64"] * 4)
SCALES = (Scales(*["f64"] * 3), "f64")


def larger(b: Any, one: Largest, other: Largest) -> Any:
    """The larger of each."""
    return given(one, Number.maximum, other)


def survey(program: Program) -> Any:
    """A step: survey(row, arrays, place, start, size, largest), with what this thread has of one vector of the row."""

    def body(b: Any, row: Any, arrays: Any, place: Place, start: Any, size: Size, largest: Largest) -> Largest:
        (v,), first = program.vectors(b, place), _first(b, program, arrays, start)
        vector = program.vector_of(program.held, row[0], 0)
        columns = program.vector_of(program.columns, row[1], 0) if row[1] is not None else None
        for e, exists in enumerate(v.there.conditions):
            read = program.numbers_of(b, vector, e, "plain")
            x, nothing = read[0], largest.g.constant(0.0)
            about = leaves(program.entered(like(read, [mantissa(b, x), *read[1:]])))[0]  # x may leave the range there
            found = either(v.inside[e], _of_product(b, x, about), nothing)
            largest = largest._replace(about=largest.about.maximum(found))
            if program.op.recentring:
                apart = abs(x - first)
                apart = apart if exists is None else Condition(b, exists).either(apart, nothing)
                far = either(apart.exceeds(abs(first) * 0.5), nothing + 1.0, nothing)
                apart = _of_product(b, apart)
                largest = largest._replace(apart=largest.apart.maximum(apart), far=largest.far.maximum(far))
            if getattr(read, "dy", None) is not None:
                c = program.columns_of(b, columns, e, size.offset, "plain")
                largest = largest._replace(g=largest.g.maximum(_of_g(b, program, read, c)))
        return largest

    return step(body, LARGEST)


def _of_product(b: Any, *factors: Number) -> Number:
    """The exponent of a product, or one less, + SHIFT; 0 where a factor is zero or NaN."""
    total = LONG(SHIFT)
    for a in factors:
        total = b.add(total, exponent(b, a))
    found = Number(b, b.sitofp(total, DOUBLE))
    for a in factors:
        found = abs(a).exceeds(0.0).either(found, found.constant(0.0))
    return found


def _of_g(b: Any, program: Program, read: Any, c: Any) -> Number:
    """That of the largest product of dy with a column, and with what else is a factor of it."""
    own = ("x", "dy", "dh", *program.op.scaled)
    more = [a for field, a in zip(read._fields, read, strict=True) if a is not None and field not in own]
    one = read.dy.constant(1.0)
    at_least_one = [abs(a).maximum(one) for a in more]  # it may be a function of the array, which is not known here
    weights = [a for field, a in zip(c._fields[1:-1], c[1:-1], strict=True) if a is not None and "bias" not in field]
    weights.append(one if c.weight is None else scale(c))
    found = [_of_product(b, read.dy, *at_least_one, weight) for weight in weights]
    return reduce(Number.maximum, found)


def _first(b: Any, program: Program, arrays: Any, start: Any) -> Number:
    """The first element of the row."""
    return program.one(b, program.pointer(arrays), program.held[0], start).to("f64")


def _limited(b: Any, e: Any) -> Any:
    e = b.select(b.icmp_signed("<", e, LONG(-1022)), LONG(-1022), e)
    return b.select(b.icmp_signed(">", e, LONG(1023)), LONG(1023), e)


def scales_finder(program: Program) -> Any:
    """find(row, size, arrays): the scales of a row, and eps for the scaled row. row: see `vector_reader`."""
    read, look, nothing, length = vector_reader(program), survey(program), zeros(LARGEST), program.plan.length
    finish = lambda b, largest, more: _scales_of(b, program, largest, *more)  # noqa: E731
    agree = agreed(program.plan.team, larger, LARGEST, finish, SCALES)

    @inlined
    def find(row: Any, size: Any, arrays: Any) -> Any:
        largest = nothing(())
        for begin in range(0, size.n, length):
            place, words = read(row, begin, size, arrays)
            largest = look((words, arrays, place, row[0], size, largest))
        return agree(largest, (row[0], size, arrays))

    return find


def _scales_of(b: Any, program: Program, largest: Largest, start: Any, size: Size, arrays: Any) -> Any:
    first, about = largest.about.constant(0.0), largest.about
    if program.op.recentring:  # exact, if no element is too far from the first: Sterbenz' lemma
        near = largest.far.compared("==", 0.0)
        first = near.either(_first(b, program, arrays, start), first)
        about = near.either(largest.apart, about)
    e, g = (b.sub(b.fptosi(a.value, LONG), LONG(SHIFT)) for a in (about, largest.g))
    root = b.ashr(exponent(b, size.eps), LONG(1))
    root = b.select(size.eps.exceeds(0.0).value, root, LONG(-1023))
    e = b.select(b.icmp_signed("<", e, root), root, e)
    s = _limited(b, b.sub(LONG(0 if program.op.scaled else X_TARGET), e))
    t = b.select(b.icmp_signed(">", g, LONG(MOST_G)), b.sub(LONG(MOST_G), g), LONG(0))
    t = b.select(b.icmp_signed("<", g, LONG(LEAST_G)), b.neg(g), t)
    t = b.select(largest.g.exceeds(0.0).value, _limited(b, t), LONG(0))
    factor = power(b, s)
    return Scales(first, factor, power(b, t)), size.eps * factor * factor


def vector_reader(program: Program) -> Any:
    """read(row, begin, size, arrays): the place at `begin` in a row, and the words that this thread has there.

    row: where its elements begin, and those of its columns like weight and like bias.
    """
    read, read_columns, backward = program.read(False), program.read_columns(), program.plan.backward

    @inlined
    def read_vector(row: Any, begin: Any, size: Any, arrays: Any) -> Any:
        lane, left = np.int64(cuda.threadIdx.x), size.n - begin
        place = Place(row[0] + begin, lane, left, row[1] + begin, row[2] + begin, size.k - begin)
        return place, (read((arrays, place)), read_columns((arrays, place)) if backward else None)

    return read_vector


def rare_adder(program: Program, s: int) -> Any:
    """add((row, scales), m, None, size, arrays): stage s's sums over this thread's vectors of a row."""
    read, add, length = vector_reader(program), program.add(s), program.plan.length
    nothing, plus = adder_of(program, s)

    @inlined
    def adder(row: Any, m: Any, place: Any, size: Any, arrays: Any) -> Any:
        sums = nothing(())
        for begin in range(0, size.n, length):
            place, words = read(row[0], begin, size, arrays)
            sums = plus((sums, add((words, m, place, size, arrays, row[1]))))
        return sums

    return adder


def row_runner(program: Program) -> Any:
    """run(arrays, row, size, task): one row, a vector at a time."""
    plan = program.plan
    length, has_totals, in_range = plan.length, any(plan.kinds.totals), "float64" not in plan.kinds.names
    read, write, find_scales = vector_reader(program), program.write(), scales_finder(program)
    read_totals, write_totals = program.read_totals(), program.write_totals()
    find = numbers_finder(program, [rare_adder(program, s) for s in range(len(program.op.stages))])
    settings, give_scale = settings_of(program), scale_giver(program)
    scales_in, eps_in = step(lambda b, found: found[0], SCALES[0]), step(lambda b, found: found[1], types.float64)

    @inlined
    def run(arrays: Any, row: Any, size: Any, task: Any) -> None:
        place = (row * size.n, row % size.weight_m * size.n, row % size.bias_m * size.n)
        if in_range:
            scales, eps = None, size.eps
        else:
            found = find_scales(place, size, arrays)
            scales, eps = scales_in((found,)), eps_in((found,))
        m = find((place, scales), None, size, arrays, settings(eps, arrays, row))
        if cuda.threadIdx.x == 0:
            give_scale(arrays, row, m)
        for begin in range(0, size.n, length):
            here, words = read(place, begin, size, arrays)
            there = Place(task * size.n + begin, here.lane, here.stop, 0, 0, size.k)
            sums = write((words, arrays, here, size, m, read_totals((arrays.totals, there)), scales))
            if has_totals:
                write_totals((arrays.totals, there, sums))
        cuda.syncthreads()

    return run


@lru_cache
def rare_kernel(plan: Plan) -> Kernel:
    """kernel(arrays, marks, size): the rows that are marked, of a plan that `launch.rare_plan` made.

    Block `chunk * m + h` takes those of the rows h, h + m, … of one of `chunks` parts, and adds to row `chunk * m + h`
    of the partial sums.
    """
    run_row, team = row_runner(Program(plan)), plan.team

    def rare_rows(arrays: Any, marks: Any, size: Any, kept: Any) -> None:
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
    return Kernel(rare_rows, plan.capability, plan.block, 2, arguments_of(plan))
