"""What a team has of a row: the elements of its vectors, as numbers that formulas take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from numba.cuda import types

from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.number import LONG, Condition, Number, exponent, opaque, power_in_two
from rmsnorm_np.cuda.tracing import step
from rmsnorm_np.cuda.words import ALONE, ITEMSIZE, There, element, encoded, load, store, words_of
from rmsnorm_np.ops.primitives import Pair, rounded
from rmsnorm_np.ops.records import given, like, mapped


class Place(NamedTuple):
    """Where a team is: the row's first element, this thread's place in the team, elements that are there; the first
    elements of columns like weight and like bias; elements that are in the RMS.
    """

    start: Any
    lane: Any
    stop: Any
    weight: Any
    bias: Any
    k: Any


class Size(NamedTuple):
    """The numbers of a call: rows of n elements, k of them in the RMS.

    m: rows of the totals; weight_m, bias_m: of columns like weight and like bias, where row r uses row r % weight_m.
    chunks: how many blocks share a row of the totals.
    """

    rows: Any
    n: Any
    k: Any
    inverse_n: Any
    inverse_k: Any
    eps: Any
    offset: Any
    weight_m: Any
    bias_m: Any
    m: Any
    chunks: Any


class Arrays(NamedTuple):
    """Pointers to all arrays of a call. totals: partial sums, of float64. scales: `RowScales`, or () without them."""

    reads: Any
    columns: Any
    writes: Any
    totals: Any
    scales: Any


class RowScales(NamedTuple):
    """The scales of rows: `number`, that of all or a bound of their own; or those that are given, one for each row; and
    where they are written.
    """

    number: Any
    given: Any
    found: Any


class Scales(NamedTuple):
    """What brings a row into the range: x' = (x - first) · x, dy' = dy · dy. The factors are powers of two."""

    first: Any
    x: Any
    dy: Any


class Vector(NamedTuple):
    """One of a thread's vectors: trip t, at element i of the row or piece."""

    t: int
    i: Any
    there: There
    inside: list[Any]  # for each element, where it is in the RMS; None for everywhere


class Elements:
    """Steps that read, and what the steps of a `row.Program` see."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.kinds, self.op = plan, plan.kinds, plan.kinds.operation
        self.kind = "f32" if plan.work in ("single", "pair") else "f64"
        self.exact = plan.work in ("pair", "exact")  # whether what is written has as many digits as the type inside
        kinds = self.kinds
        kept = self.op.keep and getattr(kinds.writes, self.op.keep)
        self.kept = self.op.keep if kept else None
        # what is kept lies where the first array would
        self.held = self._instead(kept) if kept else kinds.reads
        words = lambda name: ("u32",) * (plan.trips * words_of(name, plan.lanes))  # noqa: E731
        self.words = given(self.held, words)
        # 16-bit columns that stay in registers are widened once: the compiler would do it anyhow, and keep both
        wider = lambda name: "float32" if ITEMSIZE[name] == 2 and plan.backward else name  # noqa: E731
        self.columns = given(kinds.columns._replace(weight_offset=None), wider)
        self.column_words = given(self.columns, words)
        self.added = given(kinds.totals, lambda _: (self.kind,) * (plan.trips * plan.lanes))

    def _instead(self, first: Any) -> Any:
        """A record of what is read with one array alone, the first."""
        return like(self.kinds.reads, [first, *[None] * (len(self.kinds.reads) - 1)])

    def pointer(self, arrays: Arrays, f: int = 0) -> Any:
        """The address of the f-th of the arrays that are held."""
        return getattr(arrays.writes, self.kept) if self.kept else arrays.reads[f]

    def vectors(self, b: Any, place: Place, anew: bool = False) -> Iterator[Vector]:
        """Each vector of this thread.

        anew: in steps that come after another. The compiler would keep the conditions of all elements of rows that are
        not aligned from one step to the next; the place is new to it then.
        """
        plan = self.plan
        hide = anew and not (plan.aligned or plan.full)
        for t in range(plan.trips):
            at = place._replace(stop=opaque(b, place.stop), lane=opaque(b, place.lane)) if hide else place
            i = b.mul(b.add(LONG(t * plan.team), at.lane), LONG(plan.lanes))
            if plan.full:
                there = [None] * plan.lanes
            elif plan.aligned:
                there = [b.icmp_signed("<", i, at.stop)] * plan.lanes
            else:
                left = b.sub(at.stop, i)  # one subtraction, and not an addition for each element
                there = [b.icmp_signed("<", LONG(e), left) for e in range(plan.lanes)]
            below = lambda e, i=i, at=at: Condition(b, b.icmp_signed("<", b.add(i, LONG(e)), at.k))  # noqa: E731
            inside = [below(e) if self.kinds.first_k else None for e in range(plan.lanes)]
            yield Vector(t, i, There(there, plan.aligned), inside)

    def _there_of_row(self, b: Any, place: Place, there: There) -> There:
        """The same, but nothing of a row that is not there, which a team without a row reads in place of its own."""
        if not (self.plan.full and self.plan.teams > 1):
            return there
        return there._replace(conditions=[b.icmp_signed("<", LONG(0), place.stop)] * self.plan.lanes)

    def vector_of(self, names: Any, words: Any, t: int) -> Any:
        """Vector t of each array."""
        count = lambda name: words_of(name, self.plan.lanes)  # noqa: E731
        return given(names, lambda name, w: list(w[t * count(name) : (t + 1) * count(name)]), words)

    def numbers_of(self, b: Any, vector: Any, e: int, how: str, again: bool = False, names: Any = None) -> Any:
        """Element e of each array that is held, or of those with these names.

        how: "plain", "pair", whose rounding errors are kept, or "wide", float64.
        """
        kind = "f64" if how == "wide" else self.kind
        one = lambda name, w: element(b, w, e, name, again).to(kind)  # noqa: E731
        made = lambda name, w: Pair(one(name, w), None) if how == "pair" else one(name, w)  # noqa: E731
        return given(names or self.held, made, vector)

    def columns_of(self, b: Any, vector: Any, e: int, offset: Number, how: str, again: bool = False) -> Any:
        """The columns of an element; weight_offset to all its digits."""
        found = self.numbers_of(b, vector, e, how, again, self.columns)
        if not self.kinds.columns.weight_offset:
            return found
        if self.kind == "f64" or how == "wide":
            return found._replace(weight_offset=Pair(offset, None) if how == "pair" else offset)
        head = offset.to("f32")
        return found._replace(weight_offset=Pair(head, (offset - head).to("f32")))

    def entered(self, e: Any) -> Any:
        """What the formulas are about."""
        return e[0] if self.kept else self.op.enter(e)

    def scaled(self, b: Any, e: Any, scales: Scales | None, but: str | None = None) -> Any:
        """The element in the range; `but`: a field that stays as it is."""
        if scales is None:
            return e
        moved = dict.fromkeys(self.op.scaled, lambda a: a * scales.x) | {
            "x": lambda a: (a - scales.first) * scales.x,
            "dy": lambda a: a * scales.dy,
            "dh": lambda a: self._undone(b, a, scales, 1, -1),
        }
        change = lambda f, a: a if f == but or a is None or f not in moved else mapped(moved[f], a)  # noqa: E731
        return like(e, [change(f, a) for f, a in zip(e._fields, e, strict=True)])

    def unscaled(self, b: Any, field: str, a: Any, scales: Scales | None) -> Any:
        """An output of a row that was brought into the range."""
        divided, linear = field in self.op.divided, field in self.op.linear
        return self._undone(b, rounded(a), scales, -divided, linear) if scales and (divided or linear) else a

    @staticmethod
    def _undone(b: Any, a: Number, scales: Scales, x: int, dy: int) -> Number:
        """What has been multiplied by these powers of the scales, without them."""
        exponents = (b.mul(exponent(b, scale), LONG(-by)) for scale, by in ((scales.x, x), (scales.dy, dy)))
        one, other = power_in_two(b, b.add(*exponents))
        return a * one * other

    # ---------------------------------------------------------------------------------------- the scale of a row

    def given_scale(self) -> Any:
        """given(arrays, row): the scale that a row has been given, rounded to the dtype that they are written in."""

        def body(b: Any, arrays: Arrays, row: Any) -> Number:
            scale = self.one(b, arrays.scales.given, self.kinds.scales.given, row).to("f64")
            return scale if self.kinds.scales.found == "float64" else scale.as_single()

        return step(body, types.float64)

    def give_scale(self) -> Any:
        """give(arrays, row, m): writes that of the row's numbers."""

        def body(b: Any, arrays: Arrays, row: Any, m: Any) -> None:
            name = self.kinds.scales.found
            store(b, arrays.scales.found, row, name, encoded(b, [m[0].scale], name, False), ALONE)

        return step(body)

    # --------------------------------------------------------------------------------------------------- reading

    def read(self, first: bool) -> Any:
        """read(arrays, place): the words of a row. first: what is kept is made now, and written; else it is read."""
        kinds = self.kinds

        def body(b: Any, arrays: Arrays, place: Place) -> Any:
            found = given(self.held, lambda name: ())
            for v in self.vectors(b, place):
                i = b.add(place.start, v.i)
                fetch = lambda name, a, v=v, i=i: load(b, a, i, name, v.there)  # noqa: E731
                if self.kept and not first:
                    words = self._instead(fetch(self.held[0], self.pointer(arrays)))
                else:
                    words = given(kinds.reads, fetch, arrays.reads)
                if self.kept and first:
                    words = self._instead(self._entered_words(b, words))
                    store(b, self.pointer(arrays), i, self.held[0], words[0], self._there_of_row(b, place, v.there))
                found = given(found, lambda old, new: (*old, *new), words)
            return found

        return step(body, self.words)

    def _entered_words(self, b: Any, words: Any) -> list[Any]:
        """The words of what is kept of a vector, from those of what is read."""
        how, elements = "pair" if self.exact else "plain", range(self.plan.lanes)
        numbers = [self.op.enter(self.numbers_of(b, words, e, how, names=self.kinds.reads)) for e in elements]
        return encoded(b, numbers, self.held[0], self.plan.native_bfloat16)

    def read_columns(self) -> Any:
        """read(arrays, place): the words of the columns, for all rows to come."""

        def body(b: Any, arrays: Arrays, place: Place) -> Any:
            found = given(self.columns, lambda name: ())
            for v in self.vectors(b, place):
                words = given(self.columns, lambda to, name, w: self._widened_words(b, w, name, to),
                              self.kinds.columns, self.load_columns(b, arrays, v, place))  # fmt: skip
                found = given(found, lambda old, new: (*old, *new), words)
            return found

        return step(body, self.column_words)

    def _widened_words(self, b: Any, words: list[Any], name: str, to: str) -> list[Any]:
        if name == to:
            return words
        numbers = [element(b, words, e, name) for e in range(self.plan.lanes)]
        return [opaque(b, word) for number in numbers for word in number.words()]

    def load_columns(self, b: Any, arrays: Arrays, v: Vector, place: Place) -> Any:
        """The words of a vector of each column."""
        fetch = lambda name, a, start: load(b, a, b.add(start, v.i), name, v.there)  # noqa: E731
        starts = [place.bias if "bias" in field else place.weight for field in self.columns._fields]
        return given(self.kinds.columns._replace(weight_offset=None), fetch, arrays.columns, starts)

    @staticmethod
    def one(b: Any, pointer: Any, name: str, i: Any) -> Number:
        """A single element of an array."""
        return element(b, load(b, pointer, i, name, ALONE), 0, name)
