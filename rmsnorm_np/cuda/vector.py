"""What a thread moves: 16 bytes in one access, kept as 32-bit words, seen as numbers one at a time.

Arrays reach the kernels as unsigned integers of their item's size, so float16 and bfloat16 need no type of their own.
A vector is as many elements as fill 16 bytes of x; of an array with another item size it takes as many elements, in
fewer or more bytes. The few functions made with `intrinsic` are all that Python cannot say.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

BYTES = 16  # of one access, the widest there is on every GPU
WORD = 4

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
STORED = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}

_GLOBAL = 1  # LLVM's number for the address space of device memory


def inlined(function: Any) -> Any:
    """A device function that becomes part of its caller, so that the caller's arrays can stay in registers."""
    return cuda.jit(device=True, forceinline=True)(function)


def words_of(name: str, lanes: int) -> int:
    """Words that a vector of this many elements fills."""
    return max(1, ITEMSIZE[name] * lanes // WORD)


# ------------------------------------------------------------------------------------------------------ intrinsics


def _address(context: Any, builder: Any, array_type: Any, pointee: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.gep(data, [index])
    return builder.addrspacecast(builder.bitcast(pointer, pointee.as_pointer()), pointee.as_pointer(_GLOBAL))


def _loader(count: int) -> Any:
    word = ir.IntType(32)
    vector = word if count == 1 else ir.VectorType(word, count)

    @intrinsic
    def load_words(typing_context: Any, array: Any, index: Any) -> Any:
        """`count` words from array[index] on, in one access."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(_address(context, builder, array, vector, *arguments), align=WORD * count)
            parts = [value] if count == 1 else [builder.extract_element(value, word(j)) for j in range(count)]
            return context.make_tuple(builder, signature.return_type, parts)

        return types.UniTuple(types.uint32, count)(array, types.int64), codegen

    return load_words


def _storer(count: int) -> Any:
    word = ir.IntType(32)
    vector = word if count == 1 else ir.VectorType(word, count)

    @intrinsic
    def store_words(typing_context: Any, array: Any, index: Any, words: Any) -> Any:
        """The tuple `words` to array[index] and on, in one access."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, index, words = arguments
            value = builder.extract_value(words, 0)
            if count > 1:
                value = ir.Constant(vector, ir.Undefined)
                for j in range(count):
                    value = builder.insert_element(value, builder.extract_value(words, j), word(j))
            builder.store(value, _address(context, builder, array, vector, target, index), align=WORD * count)
            return context.get_dummy_value()

        return types.void(array, types.int64, types.UniTuple(types.uint32, count)), codegen

    return store_words


def _bitcast(source: Any, target: Any) -> Any:
    @intrinsic
    def bits(typing_context: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), codegen

    return bits


load_1, load_2, load_4 = _loader(1), _loader(2), _loader(4)
store_1, store_2, store_4 = _storer(1), _storer(2), _storer(4)
float32_of_bits = _bitcast(types.uint32, types.float32)
bits_of_float32 = _bitcast(types.float32, types.uint32)
float64_of_bits = _bitcast(types.uint64, types.float64)
bits_of_float64 = _bitcast(types.float64, types.uint64)


@intrinsic
def float16_to_float32(typing_context: Any, bits: Any) -> Any:
    """The number with these 16 bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def float32_to_float16(typing_context: Any, value: Any) -> Any:
    """The bits of the nearest float16."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def float32_to_bfloat16(typing_context: Any, value: Any) -> Any:
    """The bits of the nearest bfloat16, by the instruction that GPUs have from compute capability 8.0 on."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(16), [ir.FloatType()])
        return builder.asm(kind, "cvt.rn.bf16.f32 $0, $1;", "=h,f", arguments, side_effect=False)

    return types.uint16(types.float32), codegen


@intrinsic
def opaque(typing_context: Any, word: Any) -> Any:
    """The same word, in no instruction: the compiler takes it for a new one."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
        return builder.asm(kind, "", "=r,0", arguments, side_effect=True)

    return types.uint32(types.uint32), codegen


# ---------------------------------------------------------------------------------------- device functions in Python


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


@lru_cache
def reader(name: str, lanes: int, aligned: bool) -> Any:
    """read(array, i, stop, words, at): the vector from array[i], with zeros for elements from `stop` on."""
    total, itemsize = words_of(name, lanes), ITEMSIZE[name]
    count = min(total, BYTES // WORD)
    load = {1: load_1, 2: load_2, 4: load_4}[count]
    step = count * WORD // itemsize
    word = WORD // itemsize if itemsize < WORD else 1

    if aligned:

        @inlined
        def read(array: Any, i: int, stop: int, words: Any, at: int) -> None:
            for c in range(total // count):
                if i < stop:
                    loaded = load(array, i + c * step)
                    for j in range(count):
                        words[at + c * count + j] = loaded[j]
                else:
                    for j in range(count):
                        words[at + c * count + j] = np.uint32(0)

    elif itemsize == 8:

        @inlined
        def read(array: Any, i: int, stop: int, words: Any, at: int) -> None:
            for e in range(lanes):
                bits = np.uint64(array[i + e]) if i + e < stop else np.uint64(0)
                words[at + 2 * e] = np.uint32(bits & np.uint64(0xFFFFFFFF))
                words[at + 2 * e + 1] = np.uint32(bits >> np.uint64(32))

    else:

        @inlined
        def read(array: Any, i: int, stop: int, words: Any, at: int) -> None:
            for e in range(lanes):
                bits = np.uint32(array[i + e]) if i + e < stop else np.uint32(0)
                if e % word == 0:
                    words[at + e // word] = bits
                else:
                    words[at + e // word] |= np.uint32(bits << np.uint32(16))

    return read


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
        def write(array: Any, i: int, stop: int, words: Any) -> None:
            if i < stop:
                for c in range(total // 4):
                    at = 4 * c
                    store(array, i + c * step, (words[at], words[at + 1], words[at + 2], words[at + 3]))

    elif itemsize == 8:

        @inlined
        def write(array: Any, i: int, stop: int, words: Any) -> None:
            for e in range(lanes):
                if i + e < stop:
                    array[i + e] = np.uint64(words[2 * e]) | (np.uint64(words[2 * e + 1]) << np.uint64(32))

    elif itemsize == 4:

        @inlined
        def write(array: Any, i: int, stop: int, words: Any) -> None:
            for e in range(lanes):
                if i + e < stop:
                    array[i + e] = words[e]

    else:

        @inlined
        def write(array: Any, i: int, stop: int, words: Any) -> None:
            for e in range(lanes):
                if i + e < stop:
                    array[i + e] = np.uint16((words[e // word] >> np.uint32(16 * (e % word))) & np.uint32(0xFFFF))

    return write
