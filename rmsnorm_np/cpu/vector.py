"""Numbers that write LLVM: vectors of float32 or float64, and single numbers, with the operations of the formulas.

LANES is the same on every machine, LLVM cuts the vectors to what the processor has, and nothing is reordered: so the
bits are the same with SSE2, AVX-512 or NEON. Only a `multiply_add` is rounded once or twice as the processor has it.

What the lanes hold depends on what is read (`Work`):

=======  =============================  ==========================================================
name     loaded from                    arithmetic
=======  =============================  ==========================================================
single   float16, bfloat16              float32, where the operation says that is enough
double   float32; 16 bits otherwise     float64: the product of two such numbers is exact
exact    float64                        float64 in pairs, which keep their rounding errors
=======  =============================  ==========================================================

Twice as many bfloat16 fill a vector as 32-bit words do. Forward they are read as words: a word shifted to the left is
the element in its lower half, a word with its lower half cleared the other, and no element has to change its place.
So `Work.words` lanes hold the elements with even numbers and then those with odd ones, whatever is to meet them is
loaded in the same order, and `store` undoes it: forward takes 11 operations for eight elements in place of 17.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from rmsnorm_np.cpu import functions, llvm
from rmsnorm_np.cpu.llvm import DOUBLE, FLOAT, I8, I16, I32, I64
from rmsnorm_np.cpu.shapes import Leaf
from rmsnorm_np.ops.primitives import Pair, is_pair, plus, rounded
from rmsnorm_np.ops.records import leaves, rebuilt

LINE = 64  # bytes of a cache line, and of the widest vector
LANES = 8  # of float64: one AVX-512 register, two AVX2 registers

BYTES = dict.fromkeys(functions.EIGHT_BITS, I8)  # only written
STORED = {"float16": I16, "bfloat16": I16, "float32": FLOAT, "float64": DOUBLE, **BYTES}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, **dict.fromkeys(BYTES, 1)}


class Work(NamedTuple):
    """How a kernel computes: see the table above. words: in which order, see below it."""

    name: str
    width: int
    words: bool = False

    @property
    def leaf(self) -> Leaf:
        return Leaf("f32" if self.name == "single" else "f64", self.width)

    @property
    def exact(self) -> bool:
        return self.name == "exact"


class Condition:
    """One truth value, or one for each lane."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def either(self, a: Any, b: Any) -> Any:
        """a where it holds, b elsewhere."""
        return Number(self.builder, self.builder.select(self.value, a.value, b.value))

    def __and__(self, other: Condition) -> Condition:
        return Condition(self.builder, self.builder.and_(self.value, other.value))

    def __invert__(self) -> Condition:
        return Condition(self.builder, self.builder.not_(self.value))

    def __or__(self, other: Condition) -> Condition:
        return Condition(self.builder, self.builder.or_(self.value, other.value))


class Number:
    """A float32 or float64 in a register, or a vector of them, and the builder that writes code about it.

    narrow: loaded from a narrower type than its own, so that a product of two such numbers is exact.
    """

    __slots__ = ("builder", "narrow", "value")

    def __init__(self, builder: Any, value: Any, narrow: bool = False) -> None:
        self.builder, self.value, self.narrow = builder, value, narrow

    @property
    def leaf(self) -> Leaf:
        return Leaf.of(self.value)

    def constant(self, number: float) -> Number:
        """The same number in each lane."""
        kind = self.value.type
        value = [number] * kind.count if isinstance(kind, ir.VectorType) else number
        return Number(self.builder, ir.Constant(kind, value))

    def to(self, leaf: Leaf) -> Number:
        """In another type, rounded if need be; one number in each lane of a vector."""
        b, value = self.builder, self.value
        if self.leaf.element != leaf.element:
            kind = Leaf(leaf.element, self.leaf.lanes).llvm
            value = b.fpext(value, kind) if leaf.element == "f64" else b.fptrunc(value, kind)
        if leaf.lanes and not self.leaf.lanes:
            value = llvm.splat(b, value, leaf.lanes)
        return Number(b, value)

    def _both(self, other: Any) -> tuple[Number, Number]:
        """Both in one type: a single number takes that of the vector beside it, float32 that of float64."""
        if not isinstance(other, Number):
            return self, self.constant(float(other))
        mine, its = self.leaf, other.leaf
        if mine == its:
            return self, other
        leaf = Leaf("f64", mine.lanes)
        if bool(mine.lanes) != bool(its.lanes):
            leaf = mine if mine.lanes else its
        return self.to(leaf), other.to(leaf)

    def _do(self, name: str, other: Any) -> Number:
        a, b = self._both(other)
        return Number(self.builder, getattr(self.builder, name)(a.value, b.value))

    def __add__(self, other: Any) -> Number:
        return self._do("fadd", other)

    def __sub__(self, other: Any) -> Number:
        return self._do("fsub", other)

    def __mul__(self, other: Any) -> Number:
        return self._do("fmul", other)

    def __truediv__(self, other: Any) -> Number:
        return self._do("fdiv", other)

    def __rtruediv__(self, other: Any) -> Number:
        return self.constant(other) / self

    def __neg__(self) -> Number:
        return Number(self.builder, self.builder.fneg(self.value))

    def __abs__(self) -> Number:
        return self._call("fabs")

    def _call(self, name: str, *others: Number) -> Number:
        kind, leaf = self.value.type, self.leaf
        suffix = f"v{leaf.lanes}{leaf.element}" if leaf.lanes else leaf.element
        operands = [self.value, *(other.value for other in others)]
        return Number(self.builder, llvm.intrinsic(self.builder, f"llvm.{name}.{suffix}", kind, operands))

    def _fused(self, name: str, b: Any, c: Any) -> Number:
        a, b = self._both(b)
        a, c = a._both(c)
        b, c = b._both(c)
        return a._call(name, b, c)

    def fma(self, b: Any, c: Any) -> Number:
        return self._fused("fma", b, c)

    def multiply_add(self, b: Any, c: Any) -> Number:
        return self._fused("fmuladd", b, c)

    def root(self) -> Number:
        return self._call("sqrt")

    def with_sign(self, other: Number) -> Number:
        return self._call("copysign", other)

    def power_below(self) -> Number:
        return functions.power_below(self)  # type: ignore[no-any-return]

    def exponential(self) -> Number:
        return functions.exponential(self)  # type: ignore[no-any-return]

    def short_exponential(self) -> Number:
        return functions.short_exponential(self)  # type: ignore[no-any-return]

    def short_reciprocal(self) -> Number:
        return functions.short_reciprocal(self)  # type: ignore[no-any-return]

    def in_dtype(self, name: str, tail: Number | None = None) -> Number:
        return functions.in_dtype(rounded(Pair(self, tail)), name)  # type: ignore[no-any-return]

    def as_single(self) -> Number:
        return self.to(Leaf("f32", self.leaf.lanes)).to(self.leaf)

    def _compared(self, how: str, other: Any) -> Condition:
        a, b = self._both(other)
        return Condition(self.builder, self.builder.fcmp_ordered(how, a.value, b.value))

    def is_number(self) -> Condition:
        return self._compared("ord", self)

    def is_finite(self) -> Condition:
        largest = np.finfo(np.float32 if self.leaf.element == "f32" else np.float64).max
        return abs(self)._compared("<=", float(largest))

    def exceeds(self, other: Any) -> Condition:
        return self._compared(">", other)

    def at_most(self, other: Any) -> Condition:
        return self._compared("<=", other)

    def equals(self, other: Any) -> Condition:
        return self._compared("==", other)


class Writer:
    """What steps write code with, beside the numbers: memory, masks, sums over lanes."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def number(self, integer: Any) -> Number:
        """An integer as float64."""
        return Number(self.builder, self.builder.sitofp(integer, DOUBLE))

    def constant(self, leaf: Leaf, number: float) -> Number:
        return Number(self.builder, ir.Constant(leaf.llvm, [number] * leaf.lanes if leaf.lanes else number))

    def zeros(self, shape: Any) -> Any:
        """A record of this shape, all of it zero."""
        return rebuilt(shape, [self.constant(leaf, 0.0) for leaf in leaves(shape)])

    def before(self, count: Any, work: Work) -> Condition | None:
        """Where the number of a lane's element is below count; None for None."""
        if count is None:
            return None
        mask = llvm.mask(self.builder, count, work.width)
        return Condition(self.builder, llvm.even_then_odd(self.builder, mask) if work.words else mask)

    def any(self, condition: Condition) -> Any:
        """Whether it holds in any lane."""
        b, lanes = self.builder, condition.value.type.count
        bits = b.bitcast(condition.value, ir.IntType(lanes))
        return b.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    def pointer(self, data: Any, i: Any) -> Any:
        return self.builder.gep(data, [i])

    def load(self, data: Any, name: str, i: Any, work: Work, count: Any = None) -> Any:
        """Elements i, i + 1, … of an array of this dtype; of count elements, and zeros behind, where that is given."""
        b, width = self.builder, work.width
        vector = ir.VectorType(STORED[name], width)
        pointer = b.bitcast(self.pointer(data, i), vector.as_pointer())
        if count is None:
            bits = b.load(pointer, align=ITEMSIZE[name])
        else:
            bits = llvm.masked_load(self.context, b, pointer, vector, ITEMSIZE[name], count)
        return self.decoded(bits, name, work)

    def decoded(self, bits: Any, name: str, work: Work) -> Any:
        """What is stored, as a number of the kernel's."""
        b, value = self.builder, bits
        if name == "float16":
            value = llvm.from_float16(self.context, b, bits)
        elif name == "bfloat16":
            value = llvm.from_bfloat16_words(b, bits) if work.words else llvm.from_bfloat16(b, bits)
        if name != "bfloat16" and work.words:
            value = llvm.with_short_nan(b, llvm.even_then_odd(b, value))
        element = "f64" if name == "float64" else work.leaf.element
        number = Number(b, value).to(Leaf(element, work.width))
        number.narrow = name != "float64"
        return Pair(number, None) if work.exact else number

    def encoded(self, number: Any, name: str, words: bool) -> Any:
        """A number, rounded to what is stored of it. words: its lanes are in the order of `Work.words`."""
        b, value = self.builder, rounded(number).value
        if name in BYTES:
            return functions.in_eight_bits(b, value, name)
        if words and name != "bfloat16":
            value = llvm.in_memory_order(b, value)
        element = "f64" if name == "float64" else "f32"
        value = Number(b, value).to(Leaf(element, value.type.count)).value
        if name == "float16":
            return llvm.to_float16(self.context, b, value)
        if name == "bfloat16":
            return llvm.to_bfloat16_words(b, value) if words else llvm.to_bfloat16(b, value)
        return value

    def store(self, data: Any, name: str, i: Any, number: Any, count: Any = None, words: bool = False) -> Any:
        """Write the lanes, rounded once, from element i on: the first count of them where that is given.

        Returns what was stored, for `decoded`.
        """
        b, bits = self.builder, self.encoded(number, name, words)
        pointer = b.bitcast(self.pointer(data, i), bits.type.as_pointer())
        if count is None:
            b.store(bits, pointer, align=ITEMSIZE[name])
        else:
            llvm.masked_store(self.context, b, pointer, bits, ITEMSIZE[name], count)
        return bits

    def stream(self, data: Any, name: str, i: Any, number: Any, words: bool = False) -> None:
        """`store` past the cache: the line is not read first. The address must be aligned to the bytes written."""
        b, bits = self.builder, self.encoded(number, name, words)
        pointer = b.bitcast(self.pointer(data, i), bits.type.as_pointer())
        instruction = b.store(bits, pointer, align=bits.type.count * ITEMSIZE[name])
        instruction.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))

    def until_aligned(self, data: Any, name: str, i: Any, count: int) -> Any:
        """How many elements lie between i and the next address to which `stream` can write count elements."""
        b, size = self.builder, ITEMSIZE[name]
        address = b.ptrtoint(self.pointer(data, i), I64)
        left = b.and_(b.neg(address), ir.Constant(I64, count * size - 1))
        return b.udiv(left, ir.Constant(I64, size))

    def from_line(self, data: Any) -> Any:
        """The first address from data on that is on a cache line."""
        b = self.builder
        address = b.add(b.ptrtoint(data, I64), ir.Constant(I64, LINE - 1))
        return b.inttoptr(b.and_(address, ir.Constant(I64, -LINE)), data.type)

    def prefetch(self, data: Any, i: Any, level: int = 1) -> None:
        """Ask for the cache line of element i, into the first- or second-level cache; harmless where there is none."""
        b = self.builder
        address = b.bitcast(self.pointer(data, i), ir.IntType(8).as_pointer())
        read, locality, kind = (ir.Constant(I32, value) for value in (0, 4 - level, 1))
        llvm.intrinsic(b, "llvm.prefetch.p0", ir.VoidType(), [address, read, locality, kind])

    def across(self, number: Any, join: Any = plus) -> Any:
        """The sum over the lanes in float64, or what else they are joined by, by halves: 8 to 4 to 2 to 1."""
        b = self.builder
        parts = list(number) if is_pair(number) else [number.to(Leaf("f64", number.leaf.lanes))]
        while (half := parts[0].leaf.lanes // 2) > 0:
            places = [ir.Constant(ir.VectorType(I32, half), list(range(f, f + half))) for f in (0, half)]
            sides = [[Number(b, b.shuffle_vector(p.value, p.value, at)) for p in parts] for at in places]
            total = join(*(Pair(*side) if len(side) == 2 else side[0] for side in sides))
            parts = list(total) if is_pair(total) else [total]
        first = [Number(b, b.extract_element(p.value, ir.Constant(I32, 0))) for p in parts]
        return Pair(*first) if is_pair(number) else first[0]

    def get(self, room: Any, place: Any) -> Number:
        """The float64 in this place."""
        return Number(self.builder, self.builder.load(self.pointer(room, place)))

    def put(self, room: Any, place: Any, number: Number) -> None:
        self.builder.store(number.value, self.pointer(room, place))
