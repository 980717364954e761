"""What a thread moves: 16 bytes in one access, kept as 32-bit words, seen as numbers one at a time.

Arrays reach the kernels as addresses of unsigned integers of their item's size. A vector is as many elements as fill 16
bytes of x; of an array with another item size it takes as many elements, in fewer or more bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from rmsnorm_np.cuda.number import BYTE, FLOAT, HALF, LONG, SHORT, WORD, Number, opaque, round_upper_half
from rmsnorm_np.ops.primitives import rounded

BYTES = 16  # of one access, the widest there is on every GPU
_GLOBAL = 1  # LLVM's number for the address space of device memory

# Only written. How many bits of a float32 behind the exponent the format has, the difference of the biases of the
# exponents, and the bits of NaN; int8 has no exponent.
EIGHT_BITS = {"int8": None, "float8_e4m3fn": (3, 120, 0x7F), "float8_e5m2": (2, 112, 0x7E)}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, **dict.fromkeys(EIGHT_BITS, 1)}
STORED = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}


class There(NamedTuple):
    """Which elements of a vector are there: a condition for each, None for always.

    together: they have one condition, and the vector begins at a multiple of its size.
    """

    conditions: list[Any]
    together: bool


ALONE = There([None], False)  # a single element


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


def _accesses(name: str, there: There) -> tuple[int, Any, list[tuple[Any, list[int]]]]:
    """Bytes and type of one access, and for each condition the elements at which its accesses begin."""
    count, size = len(there.conditions) if there.together else 1, ITEMSIZE[name]
    width = min(BYTES, count * size)
    kind = {1: BYTE, 2: SHORT}.get(width) or ir.VectorType(WORD, width // 4)
    parts = range(0, len(there.conditions), count)
    return width, kind, [(there.conditions[e], list(range(e, e + count, width // size))) for e in parts]


def _place(b: Any, pointer: Any, index: Any, kind: Any) -> Any:
    return b.addrspacecast(b.bitcast(b.gep(pointer, [index]), kind.as_pointer()), kind.as_pointer(_GLOBAL))


def load(b: Any, pointer: Any, index: Any, name: str, there: There) -> list[Any]:
    """The words of a vector that begins at pointer[index]; zeros for what is not there."""
    (width, kind, parts), found = _accesses(name, there), []
    for condition, elements in parts:
        fetch = lambda e: b.load(_place(b, pointer, b.add(index, LONG(e)), kind), align=width)  # noqa: E731
        make = lambda elements=elements: [fetch(e) for e in elements]  # noqa: E731
        found += where(b, condition, make, [ir.Constant(kind, None if width > 2 else 0)] * len(elements))
    if width > 2:
        return [b.extract_element(value, WORD(j)) for value in found for j in range(width // 4)]
    halves = [b.zext(value, WORD) for value in found]
    return _packed(b, halves, 16)


def store(b: Any, pointer: Any, index: Any, name: str, words: list[Any], there: There) -> None:
    """The words of a vector to pointer[index] and on; of what is not there, nothing."""
    width, kind, parts = _accesses(name, there)
    if width < 4:
        count = len(there.conditions) * ITEMSIZE[name] // width
        values = [_part(b, words[j * width // 4], j, kind) for j in range(count)]
    else:
        values = [_vector(b, kind, words[j : j + width // 4]) for j in range(0, len(words), width // 4)]
    for condition, elements in parts:
        moved = [(e, values.pop(0)) for e in elements]

        def put(moved: list[tuple[int, Any]] = moved) -> list[Any]:
            for e, value in moved:
                b.store(value, _place(b, pointer, b.add(index, LONG(e)), kind), align=width)
            return []

        where(b, condition, put, [])


def _vector(b: Any, kind: Any, words: list[Any]) -> Any:
    value = ir.Constant(kind, ir.Undefined)
    for j, word in enumerate(words):
        value = b.insert_element(value, word, WORD(j))
    return value


def _part(b: Any, word: Any, e: int, kind: Any) -> Any:
    """Element e of an array of this type, in its word."""
    first = e * kind.width % 32
    return b.trunc(b.lshr(word, WORD(first)) if first else word, kind)


def _packed(b: Any, parts: list[Any], bits: int) -> list[Any]:
    """Words of so many bits each as full words; the last may be filled in part."""
    words: list[Any] = []
    for j, part in enumerate(parts):
        first = j * bits % 32
        if first:
            words[-1] = b.or_(words[-1], b.shl(part, WORD(first)))
        else:
            words.append(part)
    return words


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
    return Number(b, b.fpext(b.bitcast(_part(b, word, e, SHORT), HALF), FLOAT))


def encoded(b: Any, numbers: list[Any], name: str, native_bfloat16: bool) -> list[Any]:
    """The words of a vector of these numbers, each rounded to what is stored of it."""
    kind = "f64" if name == "float64" else "f32"
    plain = [rounded(number).to(kind) for number in numbers]
    if ITEMSIZE[name] > 2:
        return [word for number in plain for word in number.words()]
    if name in EIGHT_BITS:
        return _packed(b, [_eight_bits(b, a, name) for a in plain], 8)
    if name == "float16":
        halves = [b.zext(b.bitcast(b.fptrunc(a.value, HALF), SHORT), WORD) for a in plain]
    elif native_bfloat16:
        convert = ir.FunctionType(SHORT, [FLOAT])
        instruction = "cvt.rn.bf16.f32 $0, $1;"
        halves = [b.zext(b.asm(convert, instruction, "=h,f", [a.value], side_effect=False), WORD) for a in plain]
    else:
        halves = [_rounded_to_bfloat16(b, a) for a in plain]
    return _packed(b, halves, 16)


def _eight_bits(b: Any, number: Number, name: str) -> Any:
    """The bits of a float32 that is a number of the format, or NaN, which is zero where there is none."""
    layout, is_number = EIGHT_BITS[name], number.is_number()
    if layout is None:
        return b.and_(b.fptosi(is_number.either(number, 0.0).value, WORD), WORD(0xFF))
    digits, bias, nan = layout
    sign = b.and_(b.lshr(*number.words(), WORD(24)), WORD(0x80))
    # so much less that the exponent's bits are those of the format, subnormal where it is there
    bits = b.lshr(*(number * 2.0**-bias).words(), WORD(23 - digits))
    return b.select(is_number.value, b.or_(b.and_(bits, WORD(0x7F)), sign), WORD(nan))


def _rounded_to_bfloat16(b: Any, number: Number) -> Any:
    """Its 16 bits, where the GPU has no instruction for it."""
    (bits,) = number.words()
    return b.select(number.is_number().value, b.lshr(round_upper_half(b, bits), WORD(16)), WORD(0x7FFF))
