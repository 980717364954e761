"""The program for one row, or a piece of one, of any operation: what its team reads, sums, finds and writes.

`Program` makes it from the formulas of an operation (:mod:`rmsnorm_np.ops`) and a `Plan`. A team of threads holds its
row as 32-bit words in registers, decodes them for the sums and again for what it writes. Trip t of thread `lane` is the
vector at element (t * team + lane) * lanes.
"""

from __future__ import annotations

from typing import Any

from numba.cuda import types

from rmsnorm_np.cuda.elements import Arrays, Elements, Place, Size
from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.number import DOUBLE, WORD, Condition, Number
from rmsnorm_np.cuda.tracing import step, tried, zero
from rmsnorm_np.cuda.words import element, encoded, load, store
from rmsnorm_np.ops.primitives import Pair, either, is_pair, largest_magnitude, normalised, plus, rounded
from rmsnorm_np.ops.records import given, mapped

# Squares and products between these and their inverses lose nothing that counts.
BOUNDS = {"single": 2.0**90, "pair": 2.0**90, "double": 2.0**300, "exact": 2.0**300}
REDUCED_BOUND = 2.0**900  # as far as pairs have tails: there is no other way to compute such a row
LEAST_NUMBER, MOST_NUMBER = 2.0**-110, 2.0**120  # of a row's numbers in float32, so that tails have their digits
# Of what is summed over rows in float32: far from the end of the range, in any number of rows. And where that is a
# product of two arrays, beside a row's number, of each of the two.
MOST_SHARE, MOST_FACTOR = 2.0**80, 2.0**26


class Program(Elements):
    """The steps of an operation on arrays of a plan's kinds."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        last = len(self.op.stages) - 1
        one = Pair("f64", "f64") if plan.work == "exact" else "f64"
        self.sums = [  # no guards: `_mark` looks at the row's numbers and shares themselves
            stage.Sums(
                *(
                    None if name in stage.Sums._field_defaults else "f64" if stage.largest else one
                    for name in stage.Sums._fields
                )
            )
            for stage in self.op.stages
        ]
        # how the elements of a stage are summed: sums before the last need every digit, as a mean far from zero does
        longer = {"single": "plain", "double": "plain", "exact": "pair"}
        self.how = [
            longer.get(plan.work) or ("wide" if s < last else "pair" if plan.short else "plain")
            for s in range(last + 1)
        ]
        # what the numbers are found from: the sums, and where these are reduced the number of elements before them
        self.joined = [("f64", sums) if plan.reduced else sums for sums in self.sums]
        self.numbers: list[Any] = []
        for s in range(last + 1):
            before = self.numbers[-1] if s else None
            size = Size(*["u32"] * 3, *["f64"] * 4, *["u32"] * 4)
            eps = ("f64", "f64", "f64") if self.op.scales else "f64"
            self.numbers.append(tried(lambda b, *a, s=s: self.finish(b, s, *a), self.joined[s], size, before, eps))

    # ----------------------------------------------------------------------------------------------- sums, numbers

    def join(self, s: int) -> Any:
        """join(builder, one, other): two records of the sums of stage s as one."""
        join = largest_magnitude if self.op.stages[s].largest else plus
        return lambda b, one, other: given(one, join, other)

    def add(self, s: int) -> Any:
        """add(row, m, place, size, arrays, scales): the sums of stage s over what this thread has of the row."""
        plan, stage, how, shape = self.plan, self.op.stages[s], self.how[s], self.sums[s]
        last = s == len(self.op.stages) - 1
        part_kind = {"wide": "f64", "plain": self.kind, "pair": Pair(self.kind, self.kind)}[how]
        part_shape = shape if stage.largest else given(shape, lambda _: part_kind)
        weighed = plan.backward or stage.largest  # largest magnitudes are those of an output
        # sums over rows in float32: a row that could make one of them infinite has to be marked
        reach = last and any(self.kinds.totals) and self.kind == "f32" and plan.marks
        factors = [field for field in self.op.Reads._fields[1:] if field != "dh"]
        most = MOST_SHARE if len(factors) == 1 else MOST_FACTOR
        again = s > 0 and not plan.backward  # with both, backward, there are too many registers for it to help

        def add_element(e: Any, c: Any, m: Any, old: Any, there: Any, inside: Any) -> Any:
            new = stage.add(old, e, c, m, inside)
            if stage.first_k:
                there = inside if there is None else there & inside if inside is not None else there
            return new if there is None else given(new, lambda a, z: either(there, a, z), old)

        def body(b: Any, row: Any, m: Any, place: Place, size: Size, arrays: Arrays, scales: Any) -> Any:
            found, largest = zero(b, shape), None
            # elements that are not there are zeros, but with numbers of a stage before their terms need not be
            masked = (m is not None or scales is not None) and not plan.full
            m = m[0] if m is not None else None
            for v in self.vectors(b, place, anew=True):
                vector = self.vector_of(self.held, row[0], v.t)
                columns = None
                if plan.backward:
                    columns = self.vector_of(self.columns, row[1], v.t)
                elif weighed:
                    columns = self.load_columns(b, arrays, v, place)
                before = part = found if part_shape == shape else zero(b, part_shape)
                for e, there in enumerate(v.there.conditions):
                    read = self.scaled(b, self.numbers_of(b, vector, e, how, again), scales)
                    c = self.columns_of(b, columns, e, size.offset, how) if weighed else None
                    for a in read[1:] if reach else ():
                        size_of = None if a is None else abs(a.head if is_pair(a) else a)
                        largest = largest if a is None else size_of if largest is None else largest.maximum(size_of)
                    alone = Condition(b, there) if masked and not v.there.together else None
                    part = add_element(self.entered(read), c, m, part, alone, v.inside[e])
                if masked and v.there.together:
                    part = given(part, lambda a, z: either(Condition(b, there), a, z), before)
                if part_shape != shape:
                    part = given(part, lambda a, z: plus(z, rounded(mapped(lambda c: c.to("f64"), a))), found)
                found = part
            if largest is not None:
                poison = either(largest.exceeds(most), largest.constant(float("inf")), largest.constant(0.0))
                found = given(found, lambda a: a + poison.to("f64"))
            return found

        return step(body, shape)

    def finish(self, b: Any, s: int, sums: Any, size: Size, m: Any, eps: Any) -> Any:
        """(The numbers of stage s as elements take them, a mark), see `_mark`. eps: or what takes its place."""
        n, k = (
            Number(b, b.sitofp(count, DOUBLE), inverse=inverse)
            for count, inverse in ((size.n, size.inverse_n), (size.k, size.inverse_k))
        )
        if self.plan.reduced:
            n, sums = sums
            k, sums = n, given(sums, normalised)
        before = None if m is None else given(m[0], self._widened)
        found = self.op.stages[s].numbers(sums, n, k, eps, before)
        numbers = given(found, self._narrowed)
        unknown = self.plan.reduced and self.plan.work == "exact"
        if s < len(self.op.stages) - 1 or not (self.plan.marks or unknown) or self.plan.rare:
            return numbers, WORD(0)
        mark = self._mark(b, self.op.extent(sums, n, k, eps, before), found, numbers)
        if unknown:  # NaN, and not the zeros that rows of infinite squares become
            known = Condition(b, b.icmp_signed("<", mark, WORD(2)))
            return mapped(lambda a: known.either(a, a.constant(float("nan"))), numbers), WORD(0)
        return numbers, mark

    def _widened(self, a: Any) -> Any:
        if self.kind == "f64":
            return a
        return a.head.to("f64") + a.tail.to("f64") if is_pair(a) else a.to("f64")

    def _narrowed(self, a: Any) -> Any:
        """A number as elements meet it: for pairs of float32 as a pair, but for one that a float32 can hold."""
        if self.kind == "f64":
            return a
        head = a.to("f32")
        if self.plan.work == "single" or a.single:
            return head
        tail = (a - head).to("f32")
        return Pair(head, either(tail.is_number(), tail, tail.constant(0.0)))

    def _mark(self, b: Any, extent: Any, wide: Any, narrow: Any) -> Any:
        """0 for a row in range, 1 for one that is if it is trivial, 2 for one that is not."""
        bound = REDUCED_BOUND if self.plan.reduced else BOUNDS[self.plan.work]
        large = [abs(a).compared("<=", bound) for a in (*extent.within, *extent.nontrivial, *extent.below)]
        fine = [*large, *(abs(a).compared(">=", 1 / bound) for a in extent.within)]
        if self.kind == "f32":
            for a, found in zip(narrow, wide, strict=True):
                size = abs(a.head if is_pair(a) else a)
                fine.append(size.compared("<", MOST_NUMBER))
                fine.append(size.compared(">", LEAST_NUMBER) | found.compared("==", 0.0))
        wanted = [abs(a).compared(">=", 1 / bound) for a in extent.nontrivial]
        mark = WORD(0)
        for conditions, otherwise in ((wanted, WORD(1)), (fine, WORD(2))):
            for condition in conditions:
                mark = b.select(condition.value, mark, otherwise)
        return mark

    def equal(self) -> Any:
        """equal(arrays, start, i): bit j for the j-th test of `Operation.trivial`, of element i of the row at start."""

        def body(b: Any, arrays: Arrays, start: Any, i: Any) -> Any:
            bits = WORD(0)
            for j, (field, number) in enumerate(self.op.trivial):
                f = self.held._fields.index(field)
                if self.held[f] is None:  # as if it were zero
                    bits = b.or_(bits, WORD(1 << j))
                    continue
                a, first = (self.one(b, self.pointer(arrays, f), self.held[f], at) for at in (b.add(start, i), start))
                same = a.compared("==", first if number is None else a.constant(number))
                bits = b.or_(bits, b.select(same.value, WORD(1 << j), WORD(0)))
            return bits

        return step(body, types.uint32)

    # -------------------------------------------------------------------------------------------- what a row gives

    def write(self) -> Any:
        """write(row, arrays, place, size, m, added, scales): the outputs; returns the sums over rows with its share."""
        plan, kinds, op = self.plan, self.kinds, self.op
        how = "pair" if self.exact else "plain"

        def body(b: Any, row: Any, arrays: Arrays, place: Place, size: Size, m: Any, added: Any, scales: Any) -> Any:
            total = given(self.added, lambda _, a: list(a), added)
            m = m[0]
            if op.scales == "in" and plan.work == "exact":
                m.scale.any_size = True
            heads = given(m, lambda a: a.head if is_pair(a) else a)  # sums over rows have digits enough without tails
            for v in self.vectors(b, place, anew=True):
                vector = self.vector_of(self.held, row[0], v.t)
                if plan.backward:
                    columns = self.vector_of(self.columns, row[1], v.t)
                else:
                    columns = self.load_columns(b, arrays, v, place)
                left = []
                for e in range(plan.lanes):
                    read = self.numbers_of(b, vector, e, how, True)
                    c = self.columns_of(b, columns, e, size.offset, how, plan.backward)
                    entered = self.entered(self.scaled(b, read, scales))
                    left.append(op.leave(entered, m, c, v.inside[e]))
                    if op.share is not None:
                        j = v.t * plan.lanes + e
                        plain = self.scaled(b, given(read, rounded), scales, "dy")
                        old = given(total, lambda a, j=j: a[j])
                        for sums, new in zip(total, op.share(old, self.entered(plain), heads), strict=True):
                            if sums is not None:
                                sums[j] = new
                for field, name in zip(kinds.writes._fields, kinds.writes, strict=True):
                    if name and field != self.kept:
                        numbers = [self.unscaled(b, field, getattr(outputs, field), scales) for outputs in left]
                        words = encoded(b, numbers, name, plan.native_bfloat16)
                        store(b, getattr(arrays.writes, field), b.add(place.start, v.i), name, words, v.there)
            return given(total, tuple)

        return step(body, self.added)

    def write_totals(self) -> Any:
        """write(totals, place, added): the sums over rows of this thread's columns."""

        def body(b: Any, totals: Any, place: Place, added: Any) -> None:
            for v in self.vectors(b, place):
                for pointer, sums in zip(totals, added, strict=True):
                    if pointer is not None:
                        numbers = sums[v.t * self.plan.lanes : (v.t + 1) * self.plan.lanes]
                        words = encoded(b, numbers, "float64", False)
                        store(b, pointer, b.add(place.start, v.i), "float64", words, v.there)

        return step(body)

    def read_totals(self) -> Any:
        """read(totals, place): what `write_totals` left there, for a program in float64."""

        def body(b: Any, totals: Any, place: Place) -> Any:
            found = given(self.added, lambda _: ())
            for v in self.vectors(b, place):
                words = given(
                    self.added, lambda _, p, v=v: load(b, p, b.add(place.start, v.i), "float64", v.there), totals
                )
                one = lambda old, w: (*old, *(element(b, w, e, "float64") for e in range(self.plan.lanes)))  # noqa: E731
                found = given(found, one, words)
            return found

        return step(body, self.added)
