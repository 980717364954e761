"""Sums over the threads that share a row: its team, which is part of a warp, a warp, or a whole block.

The order of additions follows from the team's size alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import types

from rmsnorm_np.cuda.launch import WARP
from rmsnorm_np.cuda.number import LONG, WORD, Number, shuffle
from rmsnorm_np.cuda.row import Program
from rmsnorm_np.cuda.tracing import given, leaves, mapped, step
from rmsnorm_np.cuda.words import where
from rmsnorm_np.ops.primitives import plus

WARP_LEVELS = 5
ALL_LANES = 0xFFFFFFFF


def inlined(function: Any) -> Any:
    """A device function that becomes part of its caller, so that what it is given can stay in registers."""
    return cuda.jit(device=True, forceinline=True)(function)


def levels_of(threads: int) -> int:
    """Shuffles that bring the values of so many threads together."""
    return (threads - 1).bit_length()


def masker(team: int) -> Any:
    """mask(): the lanes of this thread's warp that share its row."""
    if team >= WARP:
        return inlined(lambda: np.uint32(ALL_LANES))
    lanes = (1 << team) - 1
    return inlined(lambda: np.uint32(lanes << (cuda.threadIdx.x & (WARP - 1) & ~(team - 1))))


def across(threads: int, shape: Any, join: Callable[[Any, Any], Any]) -> Any:
    """A step: across(value, mask), the joined values of so many lanes, in all of them."""

    def body(b: Any, value: Any, mask: Any) -> Any:
        for level in range(levels_of(threads)):
            other = mapped(lambda a, level=level: a.shuffled(mask, 1 << level), value)
            value = join(value, other)
        return value

    return step(body, shape)


def _words(b: Any, leaf: Any) -> list[Any]:
    return leaf.words() if isinstance(leaf, Number) else [leaf]


def width_of(shape: Any) -> int:
    """Words of a value of this shape."""
    return sum(2 if kind == "f64" else 1 for kind in leaves(shape))


def putter(shape: Any) -> Any:
    """A step: put(array, i, value), the value's words to place i of an array of such values."""
    width = width_of(shape)

    def body(b: Any, array: Any, i: Any, value: Any) -> None:
        words = [word for leaf in leaves(value) for word in _words(b, leaf)]
        for j, word in enumerate(words):
            b.store(word, b.gep(_data(b, array), [b.add(b.mul(i, LONG(width)), LONG(j))]))

    return step(body)


def picker(shape: Any) -> Any:
    """A step: pick(array, i, there), the value in place i, zero unless there."""
    width = width_of(shape)

    def body(b: Any, array: Any, i: Any, there: Any) -> Any:
        fetch = lambda j: b.load(b.gep(_data(b, array), [b.add(b.mul(i, LONG(width)), LONG(j))]))  # noqa: E731
        words = where(b, there, lambda: [fetch(j) for j in range(width)], [WORD(0)] * width)
        take = lambda count: [words.pop(0) for _ in range(count)]  # noqa: E731
        one = lambda kind: take(1)[0] if kind == "u32" else Number.of_words(b, take(2 if kind == "f64" else 1))  # noqa: E731
        return mapped(one, shape)

    return step(body, shape)


def _data(b: Any, array: Any) -> Any:
    """The address in an array of Numba's (meminfo, parent, nitems, itemsize, data, …), or a pointer."""
    return b.extract_value(array, 4) if isinstance(array.type, ir.LiteralStructType) else array


def total_of(team: int, shape: Any, join: Callable[[Any, Any], Any]) -> Any:
    """total(value): the joined values of a team, in all its threads or, of several warps, in those of the first."""
    warps, width, mask = max(1, team // WARP), width_of(shape), masker(team)
    in_warp, between = across(min(team, WARP), shape, join), across(1 << levels_of(warps), shape, join)
    put, pick = putter(shape), picker(shape)
    if warps == 1:
        return inlined(lambda value: in_warp((value, mask())))
    size = warps * width

    @inlined
    def total(value: Any) -> Any:
        table = cuda.shared.array(size, np.uint32)
        value = in_warp((value, mask()))
        if cuda.threadIdx.x & (WARP - 1) == 0:
            put((table, np.int64(cuda.threadIdx.x >> WARP_LEVELS), value))
        cuda.syncthreads()
        if cuda.threadIdx.x < WARP:
            value = pick((table, np.int64(cuda.threadIdx.x), cuda.threadIdx.x < warps))
            value = between((value, mask()))
        return value

    return total


def added(a: Any, b: Any) -> Any:
    """Two records of sums as one."""
    return given(a, plus, b)


def completer(program: Program, s: int) -> Any:
    """complete(sums, size, m, eps): each thread's sums become the numbers of stage s and the row's mark, in all."""
    team, shape = program.plan.team, program.numbers[s]
    warps, width = program.plan.warps, width_of(shape)
    total, finish = total_of(team, program.sums[s], added), program.finish(s)
    put, pick = putter(shape), picker(shape)
    if warps == 1:
        return inlined(lambda sums, size, m, eps: finish((total(sums), size, m, eps)))

    @inlined
    def complete(sums: Any, size: Any, m: Any, eps: Any) -> Any:
        shared = cuda.shared.array(width, np.uint32)
        sums = total(sums)
        if cuda.threadIdx.x < WARP:
            found = finish((sums, size, m, eps))
            if cuda.threadIdx.x == 0:
                put((shared, 0, found))
        cuda.syncthreads()
        return pick((shared, 0, None))

    return complete


def voter(team: int) -> Any:
    """vote(bits): the bits that all threads of the team have set, in all of them."""
    warps, mask = max(1, team // WARP), masker(team)

    def body(b: Any, bits: Any, lanes: Any) -> Any:
        for level in range(levels_of(min(team, WARP))):
            bits = b.and_(bits, shuffle(b, lanes, bits, 1 << level))
        return bits

    in_warp = step(body, types.uint32)
    if warps == 1:
        return inlined(lambda bits: in_warp((bits, mask())))

    @inlined
    def vote(bits: Any) -> Any:
        table = cuda.shared.array(warps, np.uint32)
        bits = in_warp((bits, mask()))
        if cuda.threadIdx.x & (WARP - 1) == 0:
            table[cuda.threadIdx.x >> WARP_LEVELS] = bits
        cuda.syncthreads()
        for warp in range(warps):
            bits = np.uint32(bits & table[warp])
        return bits

    return vote


def mark_of(program: Program) -> Any:
    """A step: mark(m), the mark beside the last numbers."""
    return step(lambda b, m: m[1], types.uint32)
