"""What a thread moves: 16 bytes in one access, kept as 32-bit words, seen as numbers one at a time.

Arrays reach the kernels as unsigned integers of their item's size, so float16 and bfloat16 need no type of their own.
A vector is as many elements as fill 16 bytes of x; of an array with another item size it takes as many elements, in
fewer or more bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np.cuda.intrinsics import (
    WORD,
    bits_of_float32,
    bits_of_float64,
    float16_to_float32,
    float32_of_bits,
    float32_to_bfloat16,
    float32_to_float16,
    float64_of_bits,
    load_1,
    load_2,
    load_4,
    opaque,
    store_1,
    store_2,
    store_4,
)

BYTES = 16  # of one access, the widest there is on every GPU

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
STORED = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}


def inlined(function: Any) -> Any:
    """A device function that becomes part of its caller, so that the caller's arrays can stay in registers.

    LLVM does it (`forceinline`), not Numba (`inline="always"`), which would type every copy anew and take four times
    as long.
    """
    return cuda.jit(device=True, forceinline=True)(function)


def unrolled(step: Any, count: int) -> Any:
    """each(*args): step(0, *args), step(1, *args), … step(count - 1, *args), one after the other, without a loop.

    An array lies in registers only if the compiler knows all indices into it when it places it. Compilers for compute
    capability 10.0 and more unroll a loop later than that, and loops over `range` not at all at times.
    """
    steps = _steps_from(step, count)

    @inlined
    def each(*args: Any) -> None:
        steps(np.int64(0), *args)  # a literal 0 would have `step` compiled once more, for this literal

    return each


@lru_cache
def _steps_from(step: Any, count: int) -> Any:
    """steps(first, *args): `count` steps, first its first half, then its second, often the same function."""
    if count == 1:
        return step
    half = count // 2
    first_half, second_half = _steps_from(step, half), _steps_from(step, count - half)

    @inlined
    def steps(first: Any, *args: Any) -> None:
        first_half(first, *args)
        second_half(first + half, *args)

    return steps


def words_of(name: str, lanes: int) -> int:
    """Words that a vector of this many elements fills."""
    return max(1, ITEMSIZE[name] * lanes // WORD)


@inlined
def fetched(words: Any, at: int) -> Any:
    """A word, as it is."""
    return words[at]


@inlined
def again_fetched(words: Any, at: int) -> Any:
    """A word that the compiler takes for a new one."""
    return opaque(words[at])


@inlined
def rounded_to_bfloat16(value: Any) -> Any:
    """As `float32_to_bfloat16`, on every GPU: half of what is cut off is added first, ties go to even."""
    bits = bits_of_float32(value)
    upper = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded if value == value else np.uint32(0x7FFF))


@lru_cache
def decoder(name: str, work: Any, again: bool = False) -> Any:
    """element(words, at, e): number e of the vector whose words start at `at`.

    again: of words that were decoded before. Without it the compiler keeps the numbers of the pass that sums them for
    the pass that uses them, in twice the registers that the words take.
    """
    fetch = again_fetched if again else fetched
    if name == "float64":

        @inlined
        def element(words: Any, at: int, e: int) -> Any:
            low, high = np.uint64(fetch(words, at + 2 * e)), np.uint64(fetch(words, at + 2 * e + 1))
            return work(float64_of_bits(low | (high << np.uint64(32))))

    elif name == "float32":

        @inlined
        def element(words: Any, at: int, e: int) -> Any:
            return work(float32_of_bits(fetch(words, at + e)))

    elif name == "bfloat16":

        @inlined
        def element(words: Any, at: int, e: int) -> Any:
            pair = fetch(words, at + e // 2)
            upper = pair & np.uint32(0xFFFF0000) if e % 2 else pair << np.uint32(16)
            return work(float32_of_bits(np.uint32(upper)))

    else:

        @inlined
        def element(words: Any, at: int, e: int) -> Any:
            pair = fetch(words, at + e // 2)
            return work(float16_to_float32(np.uint16(pair >> np.uint32(16) if e % 2 else pair & np.uint32(0xFFFF))))

    return element


@lru_cache
def encoder(name: str, native_bfloat16: bool) -> Any:
    """put(words, at, e, value): value, rounded, becomes number e of the vector; e counts up from 0."""
    if name == "float64":

        @inlined
        def put(words: Any, at: int, e: int, value: Any) -> None:
            bits = bits_of_float64(np.float64(value))
            words[at + 2 * e] = np.uint32(bits & np.uint64(0xFFFFFFFF))
            words[at + 2 * e + 1] = np.uint32(bits >> np.uint64(32))

    elif name == "float32":

        @inlined
        def put(words: Any, at: int, e: int, value: Any) -> None:
            words[at + e] = bits_of_float32(np.float32(value))

    else:
        round_ = float32_to_float16
        if name == "bfloat16":
            round_ = float32_to_bfloat16 if native_bfloat16 else rounded_to_bfloat16

        @inlined
        def put(words: Any, at: int, e: int, value: Any) -> None:
            bits = np.uint32(round_(np.float32(value)))
            if e % 2:
                words[at + e // 2] |= np.uint32(bits << np.uint32(16))
            else:
                words[at + e // 2] = bits

    return put


@inlined
def keep_1(loaded: Any, words: Any, at: int) -> None:
    """What was loaded becomes words[at]."""
    words[at] = loaded[0]


@inlined
def keep_2(loaded: Any, words: Any, at: int) -> None:
    """What was loaded becomes words[at] and the next."""
    words[at], words[at + 1] = loaded[0], loaded[1]


@inlined
def keep_4(loaded: Any, words: Any, at: int) -> None:
    """What was loaded becomes words[at] and the next three."""
    words[at], words[at + 1], words[at + 2], words[at + 3] = loaded[0], loaded[1], loaded[2], loaded[3]


NO_WORDS = (np.uint32(0),) * 4


@lru_cache
def reader(name: str, lanes: int, aligned: bool) -> Any:
    """read(array, i, stop, words, at): the vector from array[i], with zeros for elements from `stop` on."""
    total, itemsize = words_of(name, lanes), ITEMSIZE[name]
    count = min(total, BYTES // WORD)
    load = {1: load_1, 2: load_2, 4: load_4}[count]
    step = count * WORD // itemsize
    word = WORD // itemsize if itemsize < WORD else 1
    keep = {1: keep_1, 2: keep_2, 4: keep_4}[count]

    if aligned:

        @inlined
        def read_one(c: Any, array: Any, i: int, stop: int, words: Any, at: int) -> None:
            first = at + c * count
            if i < stop:
                keep(load(array, i + c * step), words, first)
            else:
                keep(NO_WORDS, words, first)

        return unrolled(read_one, total // count)

    if itemsize == 8:

        @inlined
        def read_one(e: Any, array: Any, i: int, stop: int, words: Any, at: int) -> None:
            bits = np.uint64(array[i + e]) if i + e < stop else np.uint64(0)
            words[at + 2 * e] = np.uint32(bits & np.uint64(0xFFFFFFFF))
            words[at + 2 * e + 1] = np.uint32(bits >> np.uint64(32))

    else:

        @inlined
        def read_one(e: Any, array: Any, i: int, stop: int, words: Any, at: int) -> None:
            bits = np.uint32(array[i + e]) if i + e < stop else np.uint32(0)
            if e % word == 0:
                words[at + e // word] = bits
            else:
                words[at + e // word] |= np.uint32(bits << np.uint32(16))

    return unrolled(read_one, lanes)


@lru_cache
def writer(name: str, lanes: int, aligned: bool) -> Any:
    """write(array, i, stop, words): the vector, from word 0 on, to array[i] and on, up to `stop`."""
    total, itemsize = words_of(name, lanes), ITEMSIZE[name]
    count = min(total, BYTES // WORD)
    store = {1: store_1, 2: store_2, 4: store_4}[count]
    step = count * WORD // itemsize
    word = WORD // itemsize if itemsize < WORD else 1

    if aligned and count == 4:

        @inlined
        def write_one(c: Any, array: Any, i: int, stop: int, words: Any) -> None:
            at = 4 * c
            if i < stop:
                store(array, i + c * step, (words[at], words[at + 1], words[at + 2], words[at + 3]))

        return unrolled(write_one, total // 4)

    if itemsize == 8:

        @inlined
        def write_one(e: Any, array: Any, i: int, stop: int, words: Any) -> None:
            if i + e < stop:
                array[i + e] = np.uint64(words[2 * e]) | (np.uint64(words[2 * e + 1]) << np.uint64(32))

    elif itemsize == 4:

        @inlined
        def write_one(e: Any, array: Any, i: int, stop: int, words: Any) -> None:
            if i + e < stop:
                array[i + e] = words[e]

    else:

        @inlined
        def write_one(e: Any, array: Any, i: int, stop: int, words: Any) -> None:
            if i + e < stop:
                array[i + e] = np.uint16((words[e // word] >> np.uint32(16 * (e % word))) & np.uint32(0xFFFF))

    return unrolled(write_one, lanes)
