"""The program for one row, of any operation: its sums, its numbers, what it gives. It names no operation.

`Program` makes it from the formulas of an operation (:mod:`rmsnorm_np.ops`) and the dtypes of a call. Its small
functions are steps (:mod:`rmsnorm_np.cpu.tracing`); the loops around them are Numba's.

Sums are added in the lanes over SEGMENT elements, then over the lanes by halves; what is longer is the sum of its
segments, in order. So a row's bits depend on n alone.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from rmsnorm_np.cpu.jit import inlined, piece
from rmsnorm_np.cpu.kinds import Arrays, Kinds
from rmsnorm_np.cpu.shapes import SCALAR, Leaf
from rmsnorm_np.cpu.tracing import step, tried
from rmsnorm_np.cpu.vector import Number, Work, Writer
from rmsnorm_np.ops.operation import Stage, Totals
from rmsnorm_np.ops.primitives import Pair, either, largest_magnitude, plus, rounded
from rmsnorm_np.ops.records import given, leaves, mapped, rebuilt

SEGMENT = 2048  # elements summed in the lanes before the lanes are added up: bounds the error of float32 sums
BLOCK = 64  # rows that are worked on together, at most


class Program:
    """The steps and loops of an operation on arrays of these kinds."""

    def __init__(self, kinds: Kinds) -> None:
        self.kinds, self.op, self.work = kinds, kinds.operation, kinds.work
        self.width = self.work.width
        # backward in float32: dy has any magnitude, and is multiplied by weight and rstd
        self.guarded = kinds.marks and self.work.name == "single" and self.op.share is not None
        kept = self.op.keep and getattr(kinds.writes, self.op.keep)
        self.kept = self.op.keep if kept else None
        number = Pair(SCALAR, SCALAR) if self.work.exact else SCALAR
        lanes = Pair(self.work.leaf, self.work.leaf) if self.work.exact else self.work.leaf
        # a mean needs more than float32: what is next to it is a small difference
        last, wide = self.op.stages[-1], lanes if self.work.exact else Leaf("f64", self.width)
        self.lane_sums = [self._sums(stage, lanes if stage is last else wide) for stage in self.op.stages]
        self.sums = [self._sums(stage, number) for stage in self.op.stages]
        self.numbers: list[Any] = []
        for stage, sums in zip(self.op.stages, self.sums, strict=True):
            before = self.numbers[-1] if self.numbers else None
            eps = (SCALAR, SCALAR, SCALAR) if self.op.scales else SCALAR
            self.numbers.append(tried(stage.numbers, sums, SCALAR, SCALAR, eps, before))
        shapes = [shape for pair in zip(self.sums, self.numbers, strict=True) for shape in pair]
        places = [0]  # where each record of a row begins, in the room for rows
        for shape in shapes:
            places.append(places[-1] + len(leaves(shape)))
        self.places, self.verdict = places[:-1], places[-1]  # the last place: see `extremes.judge`
        self.size = self.verdict + 1

    def _sums(self, stage: Stage, each: Any) -> Any:
        """The record of a stage's sums with `each` in it; guards are only taken where they are needed."""
        optional = () if self.guarded else stage.Sums._field_defaults
        return stage.Sums(*(None if name in optional else each for name in stage.Sums._fields))

    # ------------------------------------------------------------------------------------------------ elements

    def columns(self, w: Writer, columns: Any, i: Any, count: Any) -> Any:
        """weight, bias and weight_offset of elements i, i + 1, …"""
        names = self.kinds.columns
        loaded = {
            field: w.load(getattr(columns, field), getattr(names, field), i, self.work, count)
            for field in names._fields[:-1]
            if getattr(names, field)
        }
        return self.op.Columns(
            **loaded, weight_offset=self._offset(columns.weight_offset) if names.weight_offset else None
        )

    def _offset(self, offset: Number) -> Any:
        """weight_offset as weights meet it: to all its digits, whatever they have."""
        if self.work.name == "double":
            return offset
        if self.work.exact:
            return Pair(offset, None)
        head = offset.to(Leaf("f32", 0))
        return Pair(head, (offset - head.to(SCALAR)).to(Leaf("f32", 0)))

    def element(self, w: Writer, row: Arrays, i: Any, count: Any, first: bool) -> Any:
        """What elements i, i + 1, … are about. first: they are read for the first time, and kept if they are to be."""
        if self.kept and not first:
            data, name = getattr(row.writes, self.kept), getattr(self.kinds.writes, self.kept)
            return w.load(data, name, i, self.work, count)
        e = self.op.enter(
            given(self.kinds.reads, lambda name, data: w.load(data, name, i, self.work, count), row.reads)
        )
        if self.kept:
            data, name = getattr(row.writes, self.kept), getattr(self.kinds.writes, self.kept)
            e = w.decoded(w.store(data, name, i, e, count, self.work.words), name, self.work)
        return e

    # -------------------------------------------------------------------------------------------------- sums

    def adding(self, s: int) -> Any:
        """add(a, b) and zero() of the sums of stage s."""
        shape, join = self.sums[s], self.join(s)
        return step(lambda w, a, b: type(a)(*map(join, a, b)), shape), step(lambda w: w.zeros(shape), shape)

    def join(self, s: int) -> Any:
        """How two of the sums of stage s are joined."""
        return largest_magnitude if self.op.stages[s].largest else plus

    def segment(self, s: int) -> Any:
        """segment(row, start, stop, k, m, ahead): the sums of stage s over elements start to stop.

        Four sums at once, for an addition takes four cycles and two AVX2 registers are added in each; fewer where a sum
        takes more than one vector (float64: up to 1.1 times as fast as with registers that spill).
        """
        stage, width, lane_sums = self.op.stages[s], self.width, self.lane_sums[s]
        ways = 4 if len(leaves(lane_sums)) == 1 and width <= 16 else 2
        rest = ways // 4 * 2  # which of them takes what is left over

        def added(w: Writer, row: Arrays, i: Any, k: Any, m: Any, sums: Any, count: Any) -> Any:
            e, c = self.element(w, row, i, count, s == 0), self.columns(w, row.columns, i, count)
            inside = None if k is None else w.before(w.builder.sub(k, i), self.work)
            found = stage.add(sums, e, c, m, inside)
            if m is not None and count is not None:  # zeros behind the row: not what stage.add makes of them
                there = w.before(count, self.work)
                found = mapped(lambda new, old: either(there, new, old), found, sums)
            return found

        def several(w: Writer, row: Arrays, i: Any, k: Any, m: Any, sums: Any, ahead: Any, many: int) -> Any:
            b, new = w.builder, list(sums)
            for way in range(many):
                at = b.add(i, ir.Constant(i.type, way * width))
                new[way] = added(w, row, at, k, m, sums[way], None)
                if self.work.exact and self.op.share is None:
                    w.prefetch(row.reads[0], b.add(at, ahead))
            if s == len(self.op.stages) - 1:
                for data in row.reads[1:]:
                    if data is not None:
                        w.prefetch(data, b.add(i, ahead), 2)
            return tuple(new)

        def last(w: Writer, row: Arrays, i: Any, k: Any, m: Any, sums: Any, count: Any) -> Any:
            return *sums[:rest], added(w, row, i, k, m, sums[rest], count), *sums[rest + 1 :]

        join = self.join(s)

        def across(w: Writer, sums: Any) -> Any:
            while len(sums) > 1:
                sums = [type(a)(*map(join, a, b)) for a, b in zip(sums[0::2], sums[1::2], strict=True)]
            return given(sums[0], lambda number: w.across(number, join))

        shape = (lane_sums,) * ways
        zeros = step(lambda w: w.zeros(shape), shape)
        add_all = step(lambda w, row, i, k, m, sums, ahead: several(w, row, i, k, m, sums, ahead, ways), shape)
        add_two = step(lambda w, row, i, k, m, sums, ahead: several(w, row, i, k, m, sums, ahead, 2), shape)
        add_last, total = step(last, shape), step(across, self.sums[s])
        four = ways == 4

        @inlined
        def segment(row: Any, start: Any, stop: Any, k: Any, m: Any, ahead: Any) -> Any:
            sums = zeros(())
            i = start
            while i + ways * width <= stop:
                sums = add_all((row, i, k, m, sums, ahead))
                i += ways * width
            if four and i + 2 * width <= stop:
                sums = add_two((row, i, k, m, sums, ahead))
                i += 2 * width
            while i < stop:
                sums = add_last((row, i, k, m, sums, min(width, stop - i)))
                i += width
            return total((sums,))

        return segment

    # ------------------------------------------------------------------------------------- the numbers of rows
    # Room for many rows: number f of row j is in place f * stride + j, so that LLVM takes several rows at once.

    def put(self, shape: Any, place: int) -> Any:
        """put(room, stride, j, record)"""

        def body(w: Writer, room: Any, stride: Any, j: Any, record: Any) -> None:
            for f, leaf in enumerate(leaves(record)):
                w.put(room, self.place(w, place + f, stride, j), leaf)

        return step(body)

    def load(self, w: Writer, shape: Any, place: int, room: Any, stride: Any, j: Any) -> Any:
        found = [w.get(room, self.place(w, place + f, stride, j)) for f in range(len(leaves(shape)))]
        return rebuilt(shape, found)

    @staticmethod
    def place(w: Writer, f: int, stride: Any, j: Any) -> Any:
        return w.builder.add(w.builder.mul(stride, ir.Constant(stride.type, f)), j)

    def get(self, shape: Any, place: int) -> Any:
        """get(room, stride, j)"""
        return step(lambda w, room, stride, j: self.load(w, shape, place, room, stride, j), shape)

    def get_numbers(self, s: int) -> Any:
        """The numbers of stage s; None for the stage before the first."""
        if s < 0:
            return step(lambda w, room, stride, j: None, types.none)
        return self.get(self.numbers[s], self.places[2 * s + 1])

    def find_numbers(self, s: int) -> Any:
        """find(room, stride, j, n, k, eps): from the sums of stage s in place j its numbers, there too."""
        place = 2 * s

        def body(w: Writer, room: Any, stride: Any, j: Any, n: Any, k: Any, eps: Any) -> None:
            sums = self.load(w, self.sums[s], self.places[place], room, stride, j)
            before = self.load(w, self.numbers[s - 1], self.places[place - 1], room, stride, j) if s else None
            n = w.number(n)
            found = self.op.stages[s].numbers(sums, n, n if k is None else w.number(k), eps, before)
            for f, leaf in enumerate(leaves(found)):
                w.put(room, self.place(w, self.places[place + 1] + f, stride, j), leaf)

        return step(body)

    def eps_of(self) -> Any:
        """eps(size.eps, row), or what takes its place where rows have scales."""
        each = self.kinds.row_eps
        if self.op.scales:
            return inlined((lambda s, r: (s[0][r], s[1][r], s[2])) if each else (lambda s, r: (s[0], s[1][r], s[2])))
        return inlined((lambda eps, row: eps[row]) if each else (lambda eps, row: eps))

    def give_scale(self, s: int) -> Any:
        """give(room, stride, j, settings, r): the scale of row r, of what `find` left in place j, if it is wanted."""
        if self.op.scales != "out" or s < len(self.op.stages) - 1:
            return inlined(lambda room, stride, j, settings, r: None)
        shape, place = self.numbers[s], self.places[2 * s + 1]
        found = step(lambda w, *at: rounded(self.load(w, shape, place, *at).scale).value, types.float64)

        @inlined
        def give(room: Any, stride: Any, j: Any, settings: Any, r: Any) -> Any:
            settings[1][r] = found((room, stride, j))

        return give

    # ---------------------------------------------------------------------------------------- what a row gives

    def add_shares(self, w: Writer, totals: Totals, e: Any, m: Any, i: Any, count: Any) -> None:
        """Add to the totals from element i on what these elements give."""
        share: Any = self.op.share
        plain = Work("double", self.width)
        old = given(totals, lambda data: w.load(data, "float64", i, plain, count))
        if self.work.name == "single":  # a share in float32, widened then: one conversion in place of two
            nothing = given(totals, lambda data: w.constant(self.work.leaf, -0.0))  # what is added to it stays the same
            shares = share(nothing, e, m)
            new = given(old, plus, shares)
        else:
            new = share(old, e, m)
        given(totals, lambda data, t: w.store(data, "float64", i, t, count), new)

    def write_always(self) -> Any:
        """write_always(row, first, last): the shares of elements first to last that need no numbers of the row."""
        op, width = self.op, self.width
        wanted = Totals(
            *(name if f in op.always else None for f, name in zip(Totals._fields, self.kinds.totals, strict=True))
        )
        if not any(wanted):
            return piece(lambda row, first, last: None)
        none = type(self.numbers[-1])(*[None] * len(self.numbers[-1]))

        def body(w: Writer, row: Arrays, i: Any, count: Any) -> None:
            e = self.element(w, row, i, count, False)
            self.add_shares(w, given(wanted, lambda name, data: data, row.totals), e, none, i, count)

        add = step(body)

        @piece
        def write_always(row: Any, first: Any, last: Any) -> Any:
            for i in range(first, last, width):
                add((row, i, min(width, last - i)))

        return write_always

    def write(self) -> Any:
        """write(row, first, last, k, m, streaming, ahead): outputs and shares of elements first to last."""
        op, kinds, width = self.op, self.kinds, self.width
        targets = [f for f in kinds.writes._fields if f != op.keep]
        first = targets[0]

        def given_out(w: Writer, row: Arrays, i: Any, k: Any, m: Any, count: Any) -> Any:
            e, c = self.element(w, row, i, count, False), self.columns(w, row.columns, i, count)
            if op.share is not None:
                self.add_shares(w, row.totals, e, m, i, count)
            inside = None if k is None else w.before(w.builder.sub(k, i), self.work)
            found = op.leave(e, m, c, inside)
            return [(getattr(row.writes, f), getattr(kinds.writes, f), getattr(found, f)) for f in targets]

        def vector(w: Writer, row: Arrays, i: Any, k: Any, m: Any, streaming: bool, ahead: Any) -> None:
            for data, name, number in given_out(w, row, i, k, m, None):
                if streaming:
                    w.stream(data, name, i, number, self.work.words)
                else:
                    w.store(data, name, i, number, None, self.work.words)
            if streaming:
                w.prefetch(row.reads[0], w.builder.add(i, ahead), 1 if op.share is None else 2)

        def part(w: Writer, row: Arrays, i: Any, k: Any, m: Any, count: Any) -> None:
            for data, name, number in given_out(w, row, i, k, m, count):
                w.store(data, name, i, number, count, self.work.words)

        def until(w: Writer, row: Arrays, i: Any) -> Any:
            return w.until_aligned(getattr(row.writes, first), getattr(kinds.writes, first), i, width)

        store = step(lambda w, row, i, k, m, ahead: vector(w, row, i, k, m, False, ahead))
        stream = step(lambda w, row, i, k, m, ahead: vector(w, row, i, k, m, True, ahead))
        write_part, until_aligned = step(part), step(until, types.int64)

        @inlined
        def whole(row: Any, n: Any, k: Any, m: Any, streaming: Any, ahead: Any) -> Any:
            for i in range(0, n, width):
                if streaming:
                    stream((row, i, k, m, ahead))
                else:
                    store((row, i, k, m, ahead))

        @inlined
        def write(row: Any, first: Any, last: Any, k: Any, m: Any, streaming: Any, ahead: Any) -> Any:
            head = min(first + until_aligned((row, first)), last) if streaming else first
            body = last - (last - head) % width
            for i in range(head, body, width):
                if streaming:
                    stream((row, i, k, m, ahead))
                else:
                    store((row, i, k, m, ahead))
            if head > first:
                write_part((row, first, k, m, head - first))
            if body < last:
                write_part((row, body, k, m, last - body))

        return whole, write
