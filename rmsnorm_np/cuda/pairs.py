"""Numbers with twice the digits of their type: unevaluated pairs, a head and a tail."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np.cuda.intrinsics import product
from rmsnorm_np.cuda.vector import inlined


@inlined
def add_to_pair(sums: Any, j: int, value: Any) -> None:
    """sums[j] + sums[j + 1], a pair, plus value: what the sum in sums[j] rounds off goes to sums[j + 1].

    Knuth's TwoSum (The Art of Computer Programming, vol. 2, 4.2.2), exact for any two numbers.
    """
    head = sums[j]
    total = head + value
    added = total - head
    sums[j + 1] += (head - (total - added)) + (value - added)
    sums[j] = total


@inlined
def add_product_to_pair(sums: Any, j: int, a: Any, a_tail: Any, b: Any, b_tail: Any) -> None:
    """The pair sums[j] + sums[j + 1] plus (a + a_tail) · (b + b_tail), with what all roundings lose."""
    head = product(a, b)
    add_to_pair(sums, j, head)
    sums[j + 1] += cuda.fma(a, b, -head) + (a * b_tail + a_tail * b)


@inlined
def lost_in_difference(a: Any, b: Any, difference: Any) -> Any:
    """a - b - difference, what the difference a - b rounded off: Knuth's TwoSum, as in `add_to_pair`."""
    taken = difference - a
    return (a - (difference - taken)) - (b + taken)


@inlined
def distance_pair(value: Any, mean: Any, mean_tail: Any) -> Any:
    """value - (mean + mean_tail), as a pair whose head is the distance, rounded.

    The head of value - mean alone will not do: it is zero in an element whose nearest neighbour is the mean. It is zero
    or at least as large as what it lacks, because mean + mean_tail is rounded to mean; so Dekker's FastTwoSum is exact.
    """
    difference = value - mean
    lost = lost_in_difference(value, mean, difference) - mean_tail
    distance = difference + lost
    return distance, lost - (distance - difference)


@inlined
def pair_total(sums: Any, j: int) -> Any:
    """The pair as a float64. A head of infinity leaves NaN in the tail, which must not hide it."""
    head = np.float64(sums[j])
    total = head + np.float64(sums[j + 1])
    return total if total == total else head


@inlined
def pair_tail(sums: Any, j: int) -> Any:
    """The tail as a float64, zero for the NaN that a head of infinity leaves there."""
    tail = np.float64(sums[j + 1])
    return tail if tail == tail else 0.0


@lru_cache
def sums_of(work: Any) -> tuple[Any, Any, Any]:
    """(add, total, tail): a sum of numbers of the type inside, in sums[j] and sums[j + 1], both float64.

    add(sums, j, head, tail) adds a number, or another sum. float32 inside: a float64 has digits enough, and the tail
    stays zero; an addition is 1 instruction instead of 8, and between threads a sum is 2 words instead of 4.
    """
    if work is np.float32:

        @inlined
        def add(sums: Any, j: int, head: Any, tail: Any) -> None:
            sums[j] += np.float64(head)

        @inlined
        def total(sums: Any, j: int) -> Any:
            return sums[j]

        @inlined
        def tail(sums: Any, j: int) -> Any:
            return 0.0

        return add, total, tail

    @inlined
    def add_pair(sums: Any, j: int, head: Any, tail: Any) -> None:
        add_to_pair(sums, j, head)
        sums[j + 1] += tail

    return add_pair, pair_total, pair_tail


@lru_cache
def tail_of(work: Any) -> Any:
    """tail(value): the value, or zero for the NaN that an infinite head leaves; it would turn infinity into NaN."""
    zero = work(0)

    @inlined
    def tail(value: Any) -> Any:
        return work(value) if value == value else zero

    return tail


@lru_cache
def pair_storer(work: Any) -> Any:
    """store(pair, j, head, tail, count, inverse): (head + tail) / count, all float64, as a pair of the type inside.

    pair[j] is the quotient rounded to that type; pair[j + 1] comes from the remainder, so it has all its digits however
    small it is: next to the mean it is all of x - mean. The inverse of count comes from outside: a division of float64
    is a call, and some 16 bytes were spilled around it.
    """
    tail_or_zero, wide = tail_of(work), work is np.float64

    @inlined
    def store(pair: Any, j: int, head: Any, tail: Any, count: Any, inverse: Any) -> None:
        quotient = product(head, inverse)
        if wide:  # the roundings of inverse and product are some ULP, which the nearest float64 must not have
            quotient += tail_or_zero(remainder(head, tail, quotient, count) * inverse)
        pair[j] = work(quotient)
        pair[j + 1] = tail_or_zero(remainder(head, tail, np.float64(pair[j]), count) * inverse)

    return store


@inlined
def remainder(head: Any, tail: Any, quotient: Any, count: Any) -> Any:
    """head + tail - quotient · count, in float64: of a quotient that is nearly right, to the last bit but one."""
    return cuda.fma(-quotient, np.float64(count), head) + tail
