"""Numbers that write LLVM: a float32 or float64 in a register of a thread, with the operations of the formulas.

libNVVM fuses a product with the addition after it. So products whose rounding error is computed are written as
instructions of their own (`Number.product`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from llvmlite import ir

from rmsnorm_np.ops.primitives import Pair, rounded

HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
BIT, BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
KINDS = {FLOAT: "f32", DOUBLE: "f64", WORD: "u32"}
LLVM = {kind: llvm for llvm, kind in KINDS.items()}
LETTERS = {"f32": "f", "f64": "d"}  # of registers, in inline PTX
TWO_WORDS = ir.VectorType(WORD, 2)


class Exponential(NamedTuple):
    """How exp(a) is computed in a type, for a <= 0: 2**k · exp(r), a = k ln 2 + r, |r| <= ln(2) / 2."""

    high: float  # ln 2: times k it is exact
    low: float  # the rest of ln 2
    rounding: float  # added and taken away, it leaves the nearest integer; in between that is in the last bits
    least: float  # exp of this and less is zero
    terms: int  # of the series of exp(r): the next one is below an eighth of an ULP
    word: Any  # an integer of the same size
    digits: int  # of a number, behind the first
    bias: int  # of its exponent


_HIGH = float.fromhex("0x1.62e4p-1")
EXPONENTIALS = {
    "f32": Exponential(_HIGH, math.log(2) - _HIGH, 1.5 * 2.0**23, -105.0, 8, WORD, 23, 127),
    "f64": Exponential(float.fromhex("0x1.62e42fefa0000p-1"), float.fromhex("0x1.cf79abc9e3b39p-40"),
                       1.5 * 2.0**52, -746.0, 14, LONG, 52, 1023),
}  # fmt: skip


class Condition:
    """A truth value in a register."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def either(self, a: Number, b: Any) -> Number:
        """a where it holds, b elsewhere."""
        a, b = a.both(b)
        return Number(self.builder, self.builder.select(self.value, a.value, b.value))

    def __and__(self, other: Condition) -> Condition:
        return Condition(self.builder, self.builder.and_(self.value, other.value))

    def __or__(self, other: Condition) -> Condition:
        return Condition(self.builder, self.builder.or_(self.value, other.value))


class Number:
    """A number, and the builder that writes code about it.

    single: a float64 that a float32 can hold. inverse: 1 / it, rounded, where something is to be divided by it.
    any_size: it may be so small or large that a division by it takes the long way, and has no inverse.
    """

    __slots__ = ("any_size", "builder", "inverse", "single", "value")
    narrow = True  # a square is added in one step
    renormalised = True  # a pair is, before it is divided: its head may have cancelled

    def __init__(self, builder: Any, value: Any, single: bool = False, inverse: Number | None = None) -> None:
        self.builder, self.value, self.single, self.inverse = builder, value, single, inverse
        self.any_size = False

    @property
    def kind(self) -> str:
        """Which of the types of `KINDS` it has."""
        return KINDS[self.value.type]

    def to(self, kind: str) -> Number:
        """In another type, rounded if need be."""
        if kind == self.kind:
            return self
        if kind == "f64":
            return Number(self.builder, self.builder.fpext(self.value, DOUBLE), True)
        return Number(self.builder, self.builder.fptrunc(self.value, FLOAT))

    def constant(self, number: float) -> Number:
        """A number of the same type."""
        return Number(self.builder, ir.Constant(self.value.type, float(number)))

    def both(self, other: Any) -> tuple[Number, Number]:
        """Both in one type."""
        if not isinstance(other, Number):
            return self, self.constant(other)
        kind = "f64" if "f64" in (self.kind, other.kind) else "f32"
        return self.to(kind), other.to(kind)

    def _do(self, name: str, other: Any) -> Number:
        a, b = self.both(other)
        return Number(self.builder, getattr(self.builder, name)(a.value, b.value))

    def __add__(self, other: Any) -> Number:
        return self._do("fadd", other)

    def __sub__(self, other: Any) -> Number:
        return self._do("fsub", other)

    def __mul__(self, other: Any) -> Number:
        return self._do("fmul", other)

    def __truediv__(self, other: Any) -> Number:
        a, b = self.both(other)
        if isinstance(b.value, ir.Constant) and b.value.constant == 1.0:
            return a
        if getattr(other, "any_size", False):
            return a.asm("div.rn.{} $0, $1, $2;", b)
        # a division as processors have it is a call, and takes registers for it
        inverse = getattr(other, "inverse", None) or b.reciprocal()
        quotient = a.product(inverse)
        better = (-quotient).fma(b, a).fma(inverse, quotient)
        return better.is_number().either(better, quotient)

    def __neg__(self) -> Number:
        return self.constant(-0.0)._do("fsub", self)  # libNVVM's older LLVM knows no fneg

    def __abs__(self) -> Number:
        return self.asm("abs.{} $0, $1;")

    def asm(self, text: str, *others: Number) -> Number:
        """One instruction of PTX, of numbers of one type."""
        kind, letter, values = self.value.type, LETTERS[self.kind], [self.value, *(o.value for o in others)]
        signature = ir.FunctionType(kind, [kind] * len(values))
        constraints = ",".join([f"={letter}"] + [letter] * len(values))
        return Number(
            self.builder, self.builder.asm(signature, text.format(self.kind), constraints, values, side_effect=False)
        )

    def with_sign(self, other: Number) -> Number:
        """Its magnitude with the sign of another number of the same type."""
        return other.asm("copysign.{} $0, $1, $2;", self)

    def product(self, other: Any) -> Number:
        """Rounded: not fused with what is added to it."""
        a, b = self.both(other)
        return a.asm("mul.rn.{} $0, $1, $2;", b)

    def maximum(self, other: Any) -> Number:
        """The larger of the two; of NaN and a number, the number."""
        a, b = self.both(other)
        return a.asm("max.{} $0, $1, $2;", b)

    def fma(self, b: Any, c: Any) -> Number:
        """it · b + c, rounded once."""
        a, b = self.both(b)
        a, c = a.both(c)
        b, c = b.both(c)
        values = [a.value, b.value, c.value]
        return Number(self.builder, called(self.builder, f"llvm.fma.{a.kind}", a.value.type, *values))

    multiply_add = fma

    def reciprocal_root(self) -> Number:
        """1 / sqrt(it), to an ULP or so: a step of third order from 20 bits.

        A square root and a division, each right to the last bit, would be three times as many instructions, and two
        calls; one warp computes while the others wait.
        """
        value = self.to("f64")
        start = value.asm("rsqrt.approx.ftz.f64 $0, $1;")
        rest = (-value * start).fma(start, 1.0)
        better = (start * rest).fma(rest.fma(0.375, 0.5), start)
        return better.is_number().either(better, start).to(self.kind)  # zero and infinity leave NaN in the rest

    def reciprocal(self) -> Number:
        """1 / it, to an ULP or so, where that is no subnormal number."""
        start = self.asm("rcp.approx.ftz.{} $0, $1;")
        if self.kind == "f32":
            return start
        rest = (-self).fma(start, 1.0)  # from 20 bits, with a step of third order
        better = rest.fma(rest, rest).fma(start, start)
        return better.is_number().either(better, start)

    def exponential(self) -> Number:
        """exp(it), to an ULP or so, for numbers up to zero."""
        b, how = self.builder, EXPONENTIALS[self.kind]
        a = self.compared("<=", how.least).either(self.constant(how.least), self)  # NaN stays
        shifted = a * (1 / math.log(2)) + how.rounding
        k = shifted - how.rounding
        r = (-k).fma(how.low, (-k).fma(how.high, a))
        series = r.polynomial([1 / math.factorial(j) for j in range(2, how.terms)])
        value = series.fma(r * r, r) + 1.0  # the one last: what is added to it is smaller
        words = [b.bitcast(number.value, how.word) for number in (shifted, shifted.constant(how.rounding))]
        whole, digits = b.sub(*words), how.word(how.digits)
        half = b.ashr(whole, how.word(1))
        for part in (half, b.sub(whole, half)):  # in two steps, as the result may be subnormal
            power = b.bitcast(b.shl(b.add(part, how.word(how.bias)), digits), value.value.type)
            value = value * Number(b, power)
        return value

    def polynomial(self, factors: list[float]) -> Number:
        """Of it, with these factors, the constant one first."""
        value = self.constant(factors[-1])
        for factor in reversed(factors[:-1]):
            value = value.fma(self, factor)
        return value

    def power_below(self) -> Number:
        """Of a float64, the largest power of two that is at most |it|; zero for what is subnormal."""
        b = self.builder
        bits = b.and_(b.bitcast(self.value, LONG), LONG(0x7FF0_0000_0000_0000))
        return Number(b, b.bitcast(bits, DOUBLE))

    def in_dtype(self, name: str, tail: Number | None = None) -> Number:
        """It + tail, rounded once to what this dtype can hold, in its own type."""
        total: Number = rounded(Pair(self, tail))
        if name == "float64" or (name, self.kind) == ("float32", "f32"):
            return total
        b, near = self.builder, total.to("f32")
        if name == "float32":
            return near.to(self.kind)
        if tail is not None or self.kind == "f64":
            rest = self - near
            near = near.to_odd(rest if tail is None else rest + tail)
        if name == "float16":
            return Number(b, b.fpext(b.fptrunc(near.value, HALF), FLOAT)).to(self.kind)
        (bits,) = near.words()
        bits = b.and_(round_upper_half(b, bits), WORD(0xFFFF0000))
        return near.is_number().either(Number.of_words(b, [bits]), near).to(self.kind)

    def to_odd(self, rest: Number) -> Number:
        """A float32 from which a number is off by the rest, less than an ULP: its last bit tells that there is one, and
        the number is not rounded twice when it is rounded to fewer digits.
        """
        b, (bits,) = self.builder, self.words()
        same_sign = b.icmp_signed("==", rest.compared("<", 0.0).value, b.icmp_signed("<", bits, WORD(0)))
        moved = b.add(bits, b.select(same_sign, WORD(1), WORD(-1)))
        even = b.icmp_signed("==", b.and_(bits, WORD(1)), WORD(0))
        there = abs(rest).compared(">", 0.0).value
        return Number.of_words(b, [b.select(b.and_(even, there), moved, bits)])

    def as_single(self) -> Number:
        """The nearest float32, in its own type."""
        return self.to("f32").to(self.kind)

    def compared(self, how: str, other: Any) -> Condition:
        """How it compares; false for NaN."""
        a, b = self.both(other)
        return Condition(self.builder, self.builder.fcmp_ordered(how, a.value, b.value))

    def is_number(self) -> Condition:
        """Not NaN."""
        return self.compared("ord", self)

    def is_finite(self) -> Condition:
        """Neither NaN nor infinite."""
        return abs(self).compared("<", float("inf"))

    def exceeds(self, other: Any) -> Condition:
        """It is larger."""
        return self.compared(">", other)

    def words(self) -> list[Any]:
        """The 32-bit words that hold it."""
        b = self.builder
        if self.kind == "f32":
            return [b.bitcast(self.value, WORD)]
        both = b.bitcast(self.value, TWO_WORDS)  # as a vector: shifts would be instructions
        return [b.extract_element(both, WORD(j)) for j in (0, 1)]

    @classmethod
    def of_words(cls, builder: Any, words: list[Any]) -> Number:
        """The number that these words hold."""
        if len(words) == 1:
            return cls(builder, builder.bitcast(words[0], FLOAT))
        both = builder.insert_element(ir.Constant(TWO_WORDS, ir.Undefined), words[0], WORD(0))
        return cls(builder, builder.bitcast(builder.insert_element(both, words[1], WORD(1)), DOUBLE))


def round_upper_half(builder: Any, bits: Any) -> Any:
    """The bits of a float32, whose upper half is rounded: half of what is cut off is added, ties go to even."""
    odd = builder.and_(builder.lshr(bits, WORD(16)), WORD(1))
    return builder.add(bits, builder.add(WORD(0x7FFF), odd))


# ------------------------------------------------------------------------------------------------- powers of two


def exponent(builder: Any, number: Number) -> Any:
    """The e of a float64 1.… · 2**e; -1023 for zero and subnormal numbers, 1024 for infinity and NaN."""
    bits = builder.and_(builder.lshr(builder.bitcast(number.value, LONG), LONG(52)), LONG(0x7FF))
    return builder.sub(bits, LONG(1023))


def mantissa(builder: Any, number: Number) -> Number:
    """The float64 with an exponent of 0."""
    bits = builder.and_(builder.bitcast(number.value, LONG), LONG(0x800F_FFFF_FFFF_FFFF))
    return Number(builder, builder.bitcast(builder.or_(bits, LONG(1023 << 52)), DOUBLE))


def power(builder: Any, e: Any) -> Number:
    """2**e, for -1023 < e < 1024."""
    return Number(builder, builder.bitcast(builder.shl(builder.add(e, LONG(1023)), LONG(52)), DOUBLE))


def power_in_two(builder: Any, e: Any) -> tuple[Number, Number]:
    """2**e in two factors: one may be out of the range."""
    half = builder.ashr(e, LONG(1))
    return power(builder, half), power(builder, builder.sub(e, half))


def called(builder: Any, name: str, result: Any, *values: Any) -> Any:
    """What an intrinsic function of LLVM returns."""
    kind = ir.FunctionType(result, [value.type for value in values])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, values)


def shuffle(builder: Any, mask: Any, word: Any, distance: int) -> Any:
    """The word of the lane whose place in the warp differs in this bit."""
    found = ir.LiteralStructType((WORD, BIT))  # mode 3: places differ in the bits of the distance
    values = mask, WORD(3), word, WORD(distance), WORD(31)
    return builder.extract_value(called(builder, "llvm.nvvm.shfl.sync.i32", found, *values), 0)


def opaque(builder: Any, word: Any) -> Any:
    """The same word, or long word, in no instruction: the compiler takes it for a new one."""
    letter = "r" if word.type == WORD else "l"
    return builder.asm(ir.FunctionType(word.type, [word.type]), "", f"={letter},0", [word], side_effect=True)
