"""What the threads that share a row find together: its team, which is part of a warp, a warp, or a whole block.

Sums, the row's numbers and its mark. The order of additions follows from the team's size alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import types

from rmsnorm_np.cuda.launch import WARP
from rmsnorm_np.cuda.number import LONG, WORD, Number, called, shuffle
from rmsnorm_np.cuda.row import Program
from rmsnorm_np.cuda.tracing import step, zeros
from rmsnorm_np.cuda.words import where
from rmsnorm_np.ops.records import leaves, mapped

WARP_LEVELS = 5
ALL_LANES = 0xFFFFFFFF

Join = Callable[[Any, Any, Any], Any]  # join(builder, a, b): one value of two


def inlined(function: Any) -> Any:
    """A device function that becomes part of its caller, so that what it is given can stay in registers."""
    return cuda.jit(device=True, forceinline=True)(function)


def levels_of(threads: int) -> int:
    """Shuffles that bring the values of so many threads together."""
    return (threads - 1).bit_length()


def across(b: Any, value: Any, shape: Any, join: Join, threads: int, team: int = WARP) -> Any:
    """The joined values of so many lanes, in all of them; no team but this thread's takes part."""
    mask = WORD(ALL_LANES)
    if team < WARP:
        first = b.and_(called(b, "llvm.nvvm.read.ptx.sreg.tid.x", WORD), WORD(WARP - team))  # of the team's lanes
        mask = b.shl(WORD((1 << team) - 1), first)
    for level in range(levels_of(threads)):
        words = [shuffle(b, mask, word, 1 << level) for leaf in leaves(value) for word in words_in(leaf)]
        value = join(b, value, made_of(b, shape, words))
    return value


def width_of(shape: Any) -> int:
    """Words of a value of this shape."""
    return sum(2 if kind == "f64" else 1 for kind in leaves(shape))


def words_in(leaf: Any) -> list[Any]:
    """The words of a number, or a word itself."""
    return leaf.words() if isinstance(leaf, Number) else [leaf]


def made_of(b: Any, shape: Any, words: list[Any]) -> Any:
    """The value of this shape that the words hold; takes them from the list."""
    take = lambda kind: [words.pop(0) for _ in range(width_of(kind))]  # noqa: E731
    return mapped(lambda kind: take(kind)[0] if kind == "u32" else Number.of_words(b, take(kind)), shape)


def put(b: Any, array: Any, i: Any, value: Any) -> None:
    """The value's words to place i of an array of such values."""
    words = [word for leaf in leaves(value) for word in words_in(leaf)]
    for j, word in enumerate(words):
        b.store(word, b.gep(_data(b, array), [b.add(b.mul(i, LONG(len(words))), LONG(j))]))


put_value = step(put)


def picker(shape: Any) -> Any:
    """A step: pick(array, i, there), the value in place i, zero unless there."""
    width = width_of(shape)

    def body(b: Any, array: Any, i: Any, there: Any) -> Any:
        fetch = lambda j: b.load(b.gep(_data(b, array), [b.add(b.mul(i, LONG(width)), LONG(j))]))  # noqa: E731
        words = where(b, there, lambda: [fetch(j) for j in range(width)], [WORD(0)] * width)
        return made_of(b, shape, words)

    return step(body, shape)


def _data(b: Any, array: Any) -> Any:
    """The address in an array of Numba's (meminfo, parent, nitems, itemsize, data, …), or a pointer."""
    return b.extract_value(array, 4) if isinstance(array.type, ir.LiteralStructType) else array


def total_of(team: int, shape: Any, join: Join) -> Any:
    """total(value): the joined values of a team of several warps, in the threads of the first."""
    warps = team // WARP
    in_warp = step(lambda b, value: across(b, value, shape, join, WARP), shape)
    between = step(lambda b, value: across(b, value, shape, join, 1 << levels_of(warps)), shape)
    pick, size = picker(shape), warps * width_of(shape)

    @inlined
    def total(value: Any) -> Any:
        table = cuda.shared.array(size, np.uint32)
        joined = in_warp((value,))
        if cuda.threadIdx.x & (WARP - 1) == 0:
            put_value((table, np.int64(cuda.threadIdx.x >> WARP_LEVELS), joined))
        cuda.syncthreads()
        if cuda.threadIdx.x < WARP:
            joined = between((pick((table, np.int64(cuda.threadIdx.x), cuda.threadIdx.x < warps)),))
        return joined

    return total


def adder_of(program: Program, s: int) -> tuple[Any, Any]:
    """Steps to join the sums of stage s: nothing(), and plus(a, b)."""
    return zeros(program.sums[s]), step(program.join(s), program.sums[s])


def agreed(team: int, join: Join, shape: Any, finish: Callable[..., Any], result: Any) -> Any:
    """agree(value, more): finish(builder, the joined values of a team, more), in all its threads.

    shape, result: of a value, and of what finish returns.
    """
    if team <= WARP:
        join_and_finish = lambda b, value, more: finish(b, across(b, value, shape, join, team, team), more)  # noqa: E731
        whole = step(join_and_finish, result)
        return inlined(lambda value, more: whole((value, more)))
    total, pick, width, end = total_of(team, shape, join), picker(result), width_of(result), step(finish, result)

    @inlined
    def agree(value: Any, more: Any) -> Any:
        shared = cuda.shared.array(width, np.uint32)
        joined = total(value)
        if cuda.threadIdx.x < WARP:
            found = end((joined, more))
            if cuda.threadIdx.x == 0:
                put_value((shared, 0, found))
        cuda.syncthreads()
        return pick((shared, 0, None))

    return agree


def numbers_finder(program: Program, adders: list[Any]) -> Any:
    """find(row, place, size, arrays, eps): a row's numbers and its mark, from the sums of each stage by its adder.

    eps: what `settings_of` gives.
    """
    if not adders:
        return inlined(lambda row, place, size, arrays, eps: None)
    s, add = len(adders) - 1, adders[-1]
    finish = lambda b, sums, more: program.finish(b, s, sums, *more)  # noqa: E731
    team = 1 if program.plan.reduced else program.plan.team  # each thread is given all there is
    agree = agreed(team, program.join(s), program.joined[s], finish, program.numbers[s])
    if s == 0:
        return inlined(
            lambda row, place, size, arrays, eps: agree(add(row, None, place, size, arrays), (size, None, eps))
        )
    before = numbers_finder(program, adders[:-1])

    @inlined
    def find(row: Any, place: Any, size: Any, arrays: Any, eps: Any) -> Any:
        m = before(row, place, size, arrays, eps)
        return agree(add(row, m, place, size, arrays), (size, m, eps))

    return find


def settings_of(program: Program) -> Any:
    """settings(eps, arrays, row): what the formulas take as eps, where rows have scales: eps, the scale, its bound."""
    if program.op.scales is None:
        return inlined(lambda eps, arrays, row: eps)
    if program.kinds.scales.given is None:
        return inlined(lambda eps, arrays, row: (eps, arrays.scales.number, arrays.scales.number))
    given_scale = program.given_scale()
    return inlined(lambda eps, arrays, row: (eps, given_scale((arrays, row)), arrays.scales.number))


def scale_giver(program: Program) -> Any:
    """give(arrays, row, m): writes the scale of a row, where rows have scales. For one thread of a row to call."""
    if program.op.scales is None:
        return inlined(lambda arrays, row, m: None)
    give_scale = program.give_scale()
    return inlined(lambda arrays, row, m: give_scale((arrays, row, m)))


def mark_finder(program: Program) -> Any:
    """mark(m, arrays, place): whether the row is out of range. One that is trivial is not.

    The elements are fetched once more: words that were still needed here would have to be kept, in registers, for all
    rows. Of a piece the row's other elements are not known; its row goes to `rare`.
    """
    mark_of, team = step(lambda b, m: m[1], types.uint32), program.plan.team
    all_tests = (1 << len(program.op.trivial)) - 1
    if all_tests == 0 or program.plan.split:
        return inlined(lambda m, arrays, place: mark_of((m,)))
    both = lambda b, one, other: b.and_(one, other)  # noqa: E731
    finish = lambda b, bits, more: (None, b.zext(b.icmp_unsigned("==", bits, WORD(0)), WORD))  # noqa: E731
    agree, equal = agreed(team, both, "u32", finish, (None, "u32")), program.equal()

    @inlined
    def find(m: Any, arrays: Any, place: Any) -> Any:
        mark = mark_of((m,))
        if mark == 1:  # the same in all threads of the team
            bits, i = np.uint32(all_tests), place.lane
            while i < place.stop and bits != 0:
                bits = np.uint32(bits & equal((arrays, place.start, i)))
                i += team
            mark = mark_of((agree(bits, None),))
        return mark

    return find
