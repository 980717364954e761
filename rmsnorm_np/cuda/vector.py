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


def _steps_from(step: Any, count: int) -> Any:
    """steps(first, *args): `count` steps, first its first half, then its second."""
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
def product(typing_context: Any, a: Any, b: Any) -> Any:
    """a · b, rounded. The compiler does not fuse it with an addition: what it rounds off can be computed."""
    name = f"f{a.bitwidth}"
    letter = {"f32": "f", "f64": "d"}[name]

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_value_type(signature.return_type)
        kind = ir.FunctionType(number, [number, number])
        constraints = f"={letter},{letter},{letter}"
        return builder.asm(kind, f"mul.rn.{name} $0, $1, $2;", constraints, arguments, side_effect=False)

    return a(a, a), codegen


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
