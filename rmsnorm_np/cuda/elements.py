"""What a team has of a row: the elements of its vectors, as numbers that formulas take."""

from __future__ import annotations

from typing import Any, NamedTuple

from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.number import LONG, Condition, Number, opaque
from rmsnorm_np.cuda.tracing import given, like, mapped, step
from rmsnorm_np.cuda.words import ITEMSIZE, Apart, Together, element, encoded, load, store, words_of
from rmsnorm_np.ops.operation import Columns
from rmsnorm_np.ops.primitives import Pair


class Place(NamedTuple):
    """Where a team is: the row's first element, this thread's place in the team, elements that are there; the first
    elements of weight and of bias; elements that are in the RMS.
    """

    start: Any
    lane: Any
    stop: Any
    weight: Any
    bias: Any
    k: Any


class Size(NamedTuple):
    """The numbers of a call: rows of n elements, k of them in the RMS.

    m: rows of the totals; weight_m, bias_m: of weight and bias, where row r uses row r % weight_m. chunks: how many
    blocks share a row of the totals.
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
    """Pointers to all arrays of a call. totals: partial sums, of float64."""

    reads: Any
    columns: Any
    writes: Any
    totals: Any


class Scales(NamedTuple):
    """What brings a row into the range: x' = (x - first) · x, and so on. The factors are powers of two.

    undo: of what has the scale of dy · rstd, in two factors, as is dh.
    """

    first: Any
    x: Any
    dy: Any
    dh: Any
    dh_again: Any
    undo: Any
    undo_again: Any


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
        self.held = like(kinds.reads, [kept, *[None] * (len(kinds.reads) - 1)]) if kept else kinds.reads
        self.words = given(self.held, lambda name: ("u32",) * (plan.trips * words_of(name, plan.lanes)))
        # 16-bit columns that stay in registers are widened once: the compiler would do it anyhow, and keep both
        wider = lambda name: "float32" if ITEMSIZE[name] == 2 and plan.backward else name  # noqa: E731
        self.columns = given(Columns(*kinds.columns[:2]), wider)
        self.column_words = given(self.columns, lambda name: ("u32",) * (plan.trips * words_of(name, plan.lanes)))
        self.added = given(kinds.totals, lambda _: (self.kind,) * (plan.trips * plan.lanes))

    def _at(self, b: Any, start: Any, lane: Any, t: int) -> Any:
        vector = b.add(LONG(t * self.plan.team), lane)
        return b.add(start, b.mul(vector, LONG(self.plan.lanes)))

    def _place(self, b: Any, place: tuple[Any, ...]) -> Place:
        """The place, in steps that come after another: for rows that are not aligned new to the compiler, which would
        keep the conditions of all elements from one step to the next.
        """
        at = Place(*place)
        hide = not (self.plan.aligned or self.plan.full)
        return at._replace(stop=opaque(b, at.stop), lane=opaque(b, at.lane)) if hide else at

    def _there(self, b: Any, place: Place, t: int) -> Any:
        """Which elements of vector t are there."""
        i, plan = self._at(b, LONG(0), place.lane, t), self.plan
        checked = not plan.full
        if plan.aligned:
            return Together(plan.lanes, b.icmp_signed("<", i, place.stop) if checked else None)
        left = b.sub(place.stop, i)  # one subtraction, and not an addition for each element
        below = lambda e: b.icmp_signed("<", LONG(e), left) if checked else None  # noqa: E731
        return Apart([below(e) for e in range(plan.lanes)])

    def _there_of_row(self, b: Any, place: Place, there: Any) -> Any:
        """The same, but nothing of a row that is not there, which a team without a row reads in place of its own."""
        if not (self.plan.full and self.plan.teams > 1):
            return there
        exists = b.icmp_signed("<", LONG(0), place.stop)
        return Together(there.lanes, exists) if self.plan.aligned else Apart([exists] * there.lanes)

    def _inside(self, b: Any, place: Place, t: int, e: int) -> Any:
        """Where element e of vector t is in the RMS; None for everywhere."""
        if not self.kinds.first_k:
            return None
        i = b.add(self._at(b, LONG(0), place.lane, t), LONG(e))
        return Condition(b, b.icmp_signed("<", i, place.k))

    def _vector(self, names: Any, words: Any, t: int) -> Any:
        """Vector t of each array."""
        count = lambda name: words_of(name, self.plan.lanes)  # noqa: E731
        return given(names, lambda name, w: list(w[t * count(name) : (t + 1) * count(name)]), words)

    def _numbers(self, b: Any, names: Any, vector: Any, e: int, how: str, again: bool = False) -> Any:
        """Element e of each array. how: "plain", "pair", whose rounding errors are kept, or "wide", float64."""
        kind = "f64" if how == "wide" else self.kind
        one = lambda name, w: element(b, w, e, name, again).to(kind)  # noqa: E731
        return given(names, lambda name, w: Pair(one(name, w), None) if how == "pair" else one(name, w), vector)

    def _columns(self, b: Any, vector: Any, e: int, offset: Number, how: str, again: bool = False) -> Any:
        """weight, bias and weight_offset of an element; the offset to all its digits."""
        found = self._numbers(b, self.columns, vector, e, how, again)
        if not self.kinds.columns.weight_offset:
            return Columns(*found[:2])
        if self.kind == "f64" or how == "wide":
            return found._replace(weight_offset=Pair(offset, None) if how == "pair" else offset)
        head = offset.to("f32")
        return found._replace(weight_offset=Pair(head, (offset - head).to("f32")))

    def _entered(self, e: Any) -> Any:
        return e[0] if self.kept else self.op.enter(e)

    def _scaled(self, e: Any, scales: Scales | None, but: str | None = None) -> Any:
        """The element in the range; `but`: a field that stays as it is."""
        if scales is None:
            return e
        moved = {
            "x": lambda a: (a - scales.first) * scales.x,
            "dy": lambda a: a * scales.dy,
            "dh": lambda a: a * scales.dh * scales.dh_again,
        }
        change = lambda f, a: a if f == but or a is None else mapped(moved[f], a)  # noqa: E731
        return like(e, [change(f, a) for f, a in zip(e._fields, e, strict=True)])

    # --------------------------------------------------------------------------------------------------- reading

    def read(self, first: bool) -> Any:
        """read(arrays, place): the words of a row. first: what is kept is made now, and written; else it is read."""
        plan, kinds = self.plan, self.kinds

        def body(b: Any, arrays: Arrays, place: tuple[Any, ...]) -> Any:
            at, found = Place(*place), given(self.held, lambda name: ())
            for t in range(plan.trips):
                i, there = self._at(b, at.start, at.lane, t), self._there(b, at, t)
                if not self.kept:
                    words = given(kinds.reads, lambda name, a: load(b, a, i, name, there), arrays.reads)
                else:
                    name, pointer = self.held[0], getattr(arrays.writes, self.kept)
                    if first:
                        read = given(kinds.reads, lambda name, a: load(b, a, i, name, there), arrays.reads)
                        how = "pair" if self.exact else "plain"
                        entered = [
                            self.op.enter(self._numbers(b, kinds.reads, read, e, how)) for e in range(plan.lanes)
                        ]
                        made = encoded(b, entered, name, plan.native_bfloat16)
                        store(b, pointer, i, name, made, self._there_of_row(b, at, there))
                    else:
                        made = load(b, pointer, i, name, there)
                    words = like(self.held, [made, *[None] * (len(self.held) - 1)])
                found = given(found, lambda old, new: (*old, *new), words)
            return found

        return step(body, self.words)

    def read_columns(self) -> Any:
        """read(arrays, start, lane, stop): the words of the columns, for all rows to come; start: of each column."""
        plan, kinds = self.plan, self.kinds

        def body(b: Any, arrays: Arrays, place: tuple[Any, ...]) -> Any:
            at, found = Place(*place), given(self.columns, lambda name: ())
            for t in range(plan.trips):
                vector = self._load_columns(b, arrays, at, t)
                for field in ("weight", "bias"):
                    name, words = getattr(kinds.columns, field), getattr(vector, field)
                    if name and name != getattr(self.columns, field):
                        numbers = [element(b, words, e, name) for e in range(plan.lanes)]
                        words = [opaque(b, word) for number in numbers for word in number.words()]
                    if name:
                        found = found._replace(**{field: (*getattr(found, field), *words)})
            return found

        return step(body, self.column_words)

    def _load_columns(self, b: Any, arrays: Arrays, at: Place, t: int) -> Any:
        starts, there = Columns(at.weight, at.bias), self._there(b, at, t)
        fetch = lambda name, a, start: load(b, a, self._at(b, start, at.lane, t), name, there)  # noqa: E731
        return given(Columns(*self.kinds.columns[:2]), fetch, Columns(*arrays.columns[:2]), starts)

    @staticmethod
    def one(b: Any, pointer: Any, name: str, i: Any) -> Number:
        """A single element of an array."""
        return element(b, load(b, pointer, i, name, Apart([None])), 0, name)
