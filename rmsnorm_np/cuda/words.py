"""What a thread moves: 16 bytes in one access, kept as 32-bit words, seen as numbers one at a time.

Arrays reach the kernels as addresses of unsigned integers of their item's size. A vector is as many elements as fill 16
bytes of x; of an array with another item size it takes as many elements, in fewer or more bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from rmsnorm_np.cuda.number import FLOAT, HALF, LONG, SHORT, WORD, Number, opaque
from rmsnorm_np.ops.primitives import rounded

BYTES = 16  # of one access, the widest there is on every GPU
_GLOBAL = 1  # LLVM's number for the address space of device memory

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
STORED = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}


def words_of(name: str, lanes: int) -> int:
    """Words that a vector of this many elements fills."""
    return max(1, ITEMSIZE[name] * lanes // 4)


def where(b: Any, condition: Any, make: Callable[[], list[Any]], otherwise: list[Any]) -> list[Any]:
    """The values that make() gives, `otherwise` where the condition is false. No condition: always."""
    if condition is None:
        return make()
    before = b.block
    with b.if_then(condition):
        found = make()
        made = b.block
    values = []
    for value, other in zip(found, otherwise, strict=True):
        values.append(b.phi(value.type))
        values[-1].add_incoming(value, made)
        values[-1].add_incoming(other, before)
    return values


def _place(b: Any, pointer: Any, index: Any, kind: Any) -> Any:
    return b.addrspacecast(b.bitcast(b.gep(pointer, [index]), kind.as_pointer()), kind.as_pointer(_GLOBAL))


def load(b: Any, pointer: Any, index: Any, name: str, there: Any) -> list[Any]:
    """The words of a vector that begins at pointer[index]; zeros for what is not there.

    there: a condition for the whole vector, which then begins at a multiple of its size, or `Apart`.
    """
    if isinstance(there, Apart):
        return _load_apart(b, pointer, index, name, there)
    total = words_of(name, there.lanes)
    count = min(4, total)
    kind = ir.VectorType(WORD, count) if count > 1 else WORD

    def loaded() -> list[Any]:
        found = []
        for first in range(0, total, count):
            place = _place(b, pointer, b.add(index, LONG(first * 4 // ITEMSIZE[name])), kind)
            value = b.load(place, align=4 * count)
            found += [b.extract_element(value, WORD(j)) for j in range(count)] if count > 1 else [value]
        return found

    return where(b, there.all, loaded, [WORD(0)] * total)


class Together:
    """A vector of so many elements, all there or, where the condition is false, none. all = None: all there."""

    def __init__(self, lanes: int, condition: Any) -> None:
        self.lanes, self.all = lanes, condition

    def each(self, e: int) -> Any:
        """The condition of element e."""
        return self.all


class Apart:
    """A vector whose elements are fetched one by one, each where its own condition holds."""

    def __init__(self, conditions: list[Any]) -> None:
        self.lanes, self.conditions = len(conditions), conditions

    def each(self, e: int) -> Any:
        """The condition of element e."""
        return self.conditions[e]


def _load_apart(b: Any, pointer: Any, index: Any, name: str, there: Apart) -> list[Any]:
    size, words = ITEMSIZE[name], []
    kind = ir.IntType(8 * size)
    for e in range(there.lanes):
        place = b.add(index, LONG(e))
        fetch = lambda place=place: [b.load(_place(b, pointer, place, kind), align=size)]  # noqa: E731
        (bits,) = where(b, there.each(e), fetch, [kind(0)])
        if size == 8:
            words += [b.trunc(bits, WORD), b.trunc(b.lshr(bits, LONG(32)), WORD)]
        elif size == 4:
            words.append(bits)
        elif e % 2:
            words[-1] = b.or_(words[-1], b.shl(b.zext(bits, WORD), WORD(16)))
        else:
            words.append(b.zext(bits, WORD))
    return words


def store(b: Any, pointer: Any, index: Any, name: str, words: list[Any], there: Any) -> None:
    """The words of a vector to pointer[index] and on; of what is not there, nothing."""
    if isinstance(there, Apart):
        _store_apart(b, pointer, index, name, words, there)
        return

    def stored() -> list[Any]:
        for first in range(0, len(words), 4):
            part = words[first : first + 4]
            kind = ir.VectorType(WORD, len(part)) if len(part) > 1 else WORD
            value = part[0] if len(part) == 1 else ir.Constant(kind, ir.Undefined)
            for j, word in enumerate(part if len(part) > 1 else ()):
                value = b.insert_element(value, word, WORD(j))
            place = _place(b, pointer, b.add(index, LONG(first * 4 // ITEMSIZE[name])), kind)
            b.store(value, place, align=4 * len(part))
        return []

    where(b, there.all, stored, [])


def _store_apart(b: Any, pointer: Any, index: Any, name: str, words: list[Any], there: Apart) -> None:
    size = ITEMSIZE[name]
    kind = ir.IntType(8 * size)
    for e in range(there.lanes):
        if size == 8:
            bits = b.or_(b.zext(words[2 * e], LONG), b.shl(b.zext(words[2 * e + 1], LONG), LONG(32)))
        elif size == 4:
            bits = words[e]
        else:
            bits = b.trunc(b.lshr(words[e // 2], WORD(16)) if e % 2 else words[e // 2], SHORT)

        def stored(e: int = e, bits: Any = bits) -> list[Any]:
            b.store(bits, _place(b, pointer, b.add(index, LONG(e)), kind), align=size)
            return []

        where(b, there.each(e), stored, [])


def element(b: Any, words: list[Any], e: int, name: str, again: bool = False) -> Number:
    """Number e of the vector, float32 or float64.

    again: of words that were decoded before. Without it the compiler keeps the numbers of the pass that sums them for
    the pass that uses them, in twice the registers that the words of 16-bit floats take.
    """
    size = ITEMSIZE[name]
    parts = words[2 * e : 2 * e + 2] if size == 8 else [words[e if size == 4 else e // 2]]
    parts = [opaque(b, word) for word in parts] if again else list(parts)
    if size > 2:
        return Number.of_words(b, parts)
    (word,) = parts
    if name == "bfloat16":
        return Number.of_words(b, [b.and_(word, WORD(0xFFFF0000)) if e % 2 else b.shl(word, WORD(16))])
    half = b.trunc(b.lshr(word, WORD(16)) if e % 2 else word, SHORT)
    return Number(b, b.fpext(b.bitcast(half, HALF), FLOAT))


def encoded(b: Any, numbers: list[Any], name: str, native_bfloat16: bool) -> list[Any]:
    """The words of a vector of these numbers, each rounded to what is stored of it."""
    kind = "f64" if name == "float64" else "f32"
    plain = [rounded(number).to(kind) for number in numbers]
    if ITEMSIZE[name] > 2:
        return [word for number in plain for word in number.words()]
    if name == "float16":
        halves = [b.zext(b.bitcast(b.fptrunc(a.value, HALF), SHORT), WORD) for a in plain]
    elif native_bfloat16:
        convert = ir.FunctionType(SHORT, [FLOAT])
        instruction = "cvt.rn.bf16.f32 $0, $1;"
        halves = [b.zext(b.asm(convert, instruction, "=h,f", [a.value], side_effect=False), WORD) for a in plain]
    else:
        halves = [_rounded_to_bfloat16(b, a) for a in plain]
    return [
        halves[j] if j + 1 == len(halves) else b.or_(halves[j], b.shl(halves[j + 1], WORD(16)))
        for j in range(0, len(halves), 2)
    ]


def _rounded_to_bfloat16(b: Any, number: Number) -> Any:
    """Half of what is cut off is added first, ties go to even."""
    (bits,) = number.words()
    upper = b.lshr(bits, WORD(16))
    half = b.add(WORD(0x7FFF), b.and_(upper, WORD(1)))
    return b.select(number.is_number().value, b.lshr(b.add(bits, half), WORD(16)), WORD(0x7FFF))
