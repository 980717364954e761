"""Sums over the threads that share a row: its team. A sum is right to twice the digits of the type inside.

A team is part of a warp, a warp, or a whole block. The order of additions follows from the team's size alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np.cuda.pairs import sums_of
from rmsnorm_np.cuda.vector import inlined

WARP = 32
WARP_LEVELS = 5
ALL_LANES = 0xFFFFFFFF


@lru_cache
def adder(team: int, count: int, work: Any) -> Any:
    """add_up(sums, scratch): `count` sums of each thread become the team's, in all threads that `leads` names.

    sums: as in `sums_of`. scratch: for teams of more than one warp, shared memory of (warps, 2 * count), free again at
    the next barrier.
    """
    warps, levels = max(1, team // WARP), levels_of(min(team, WARP))
    warp_levels = levels_of(warps)
    add, tails = sums_of(work)[0], work is np.float64
    step = 1 if tails else 2

    @inlined
    def across(sums: Any, mask: Any, level: int) -> None:
        for c in range(count):
            head = cuda.shfl_xor_sync(mask, sums[2 * c], 1 << level)
            tail = cuda.shfl_xor_sync(mask, sums[2 * c + 1], 1 << level) if tails else 0.0
            add(sums, 2 * c, head, tail)

    if warps == 1:

        @inlined
        def add_up(sums: Any, scratch: Any) -> None:
            mask = team_mask(team)
            for level in range(levels):
                across(sums, mask, level)

    else:

        @inlined
        def add_up(sums: Any, scratch: Any) -> None:
            thread = cuda.threadIdx.x
            for level in range(levels):
                across(sums, ALL_LANES, level)
            if lane_of(WARP) == 0:
                for j in range(0, 2 * count, step):
                    scratch[thread >> WARP_LEVELS, j] = sums[j]
            cuda.syncthreads()
            if thread < WARP:
                for j in range(0, 2 * count, step):
                    sums[j] = scratch[thread, j] if thread < warps else 0.0
                for level in range(warp_levels):
                    across(sums, ALL_LANES, level)

    return add_up


def levels_of(threads: int) -> int:
    """Shuffles that bring the values of so many threads together."""
    return (threads - 1).bit_length()


@inlined
def lane_of(team: int) -> Any:
    """Place of this thread in its team, which is a power of two in a block of several teams."""
    return cuda.threadIdx.x & (team - 1)


@inlined
def team_mask(team: int) -> Any:
    """The lanes of this thread's warp that share its row."""
    if team >= WARP:
        return ALL_LANES
    lane = lane_of(WARP)
    return ((1 << team) - 1) << (lane - lane_of(team))


@inlined
def leads(team: int) -> bool:
    """Whether this thread has the sums: all of a team within a warp, the first warp of a larger one."""
    return team <= WARP or cuda.threadIdx.x < WARP


@lru_cache
def sharer(team: int, count: int, place: int) -> Any:
    """share(values, shared): the first `count` values of those that lead go to the whole team, by way of shared[place].

    The place is free again after the next barrier.
    """

    @inlined
    def share(values: Any, shared: Any) -> None:
        if team > WARP:
            if cuda.threadIdx.x == 0:
                for j in range(count):
                    shared[place + j] = values[j]
            cuda.syncthreads()
            for j in range(count):
                values[j] = shared[place + j]

    return share


@lru_cache
def team_maximum(team: int) -> Any:
    """maximum(value, maxima): the largest of the team's values, in all its threads; NaN is passed over."""
    warps, levels = max(1, team // WARP), levels_of(min(team, WARP))

    @inlined
    def maximum(value: Any, maxima: Any) -> Any:
        for level in range(levels):
            value = max(value, cuda.shfl_xor_sync(team_mask(team), value, 1 << level))
        if warps > 1:
            cuda.syncthreads()
            if lane_of(WARP) == 0:
                maxima[cuda.threadIdx.x >> WARP_LEVELS] = value
            cuda.syncthreads()
            for warp in range(warps):
                value = max(value, maxima[warp])
            cuda.syncthreads()
        return value

    return maximum
