"""dweight and dbias: each block's sums over its rows, and the kernel that adds up those of all blocks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np.cuda.kernel import NUMBERS_OF, Capability, Kernel, array_of, kernel
from rmsnorm_np.cuda.launch import Plan, rounds_to_bfloat16
from rmsnorm_np.cuda.reduce import WARP, WARP_LEVELS, lane_of, levels_of
from rmsnorm_np.cuda.vector import ITEMSIZE, encoder, inlined, unrolled, words_of, writer

COLUMNS = WARP  # of a block that adds up partial sums


@lru_cache
def clearer(elements: int, work: Any) -> Any:
    """clear(first, second): zeros in both arrays."""
    zero = work(0)

    @inlined
    def clear_element(j: Any, first: Any, second: Any) -> None:
        first[j], second[j] = zero, zero

    return unrolled(clear_element, elements)


@lru_cache
def partial_writer(plan: Plan) -> Any:
    """write_sums(sums, start, n, lane, partial): the block's sums to partial[start : start + n]."""
    team, teams, work, lanes, trips = plan.team, plan.teams, plan.work, plan.lanes, plan.trips
    block, length, levels = plan.block, plan.length, levels_of(team)
    name = np.dtype(work).name
    count = words_of(name, lanes)
    put, write = encoder(name, plan.native_bfloat16), writer(name, lanes, plan.aligned)

    if teams == 1:

        @inlined
        def put_element(e: Any, t: Any, sums: Any, vector: Any) -> None:
            put(vector, 0, e, sums[t * lanes + e])

        put_elements = unrolled(put_element, lanes)

        @inlined
        def write_vector(t: Any, sums: Any, start: Any, stop: Any, lane: Any, partial: Any) -> None:
            vector = cuda.local.array(count, np.uint32)
            i = (t * team + lane) * lanes
            put_elements(t, sums, vector)
            write(partial, start + i, start + stop, vector)

        write_sums = unrolled(write_vector, trips)

    else:
        put_one, write_one = encoder(name, False), writer(name, 1, False)
        one, table_shape = words_of(name, 1), (teams, length)

        @inlined
        def put_down(j: Any, sums: Any, lane: Any, table: Any) -> None:
            table[cuda.threadIdx.x >> levels, (j // lanes * team + lane) * lanes + j % lanes] = sums[j]

        put_all_down = unrolled(put_down, trips * lanes)

        @inlined
        def write_sums(sums: Any, start: Any, stop: Any, lane: Any, partial: Any) -> None:
            table = cuda.shared.array(table_shape, work)
            vector = cuda.local.array(one, np.uint32)
            cuda.syncthreads()
            put_all_down(sums, lane, table)
            cuda.syncthreads()
            for i in range(cuda.threadIdx.x, stop, block):
                total = table[0, i]
                for s in range(1, teams):
                    total += table[s, i]
                put_one(vector, 0, 0, total)
                write_one(partial, start + i, start + stop, vector)

    return write_sums


@lru_cache
def add_partials(work: Any, name: str, capability: Capability, slices: int) -> Kernel:
    """Rows h, h + m, … of the partial sums, added in float64 in an order fixed by the shape, are row h of the total."""
    put, write = encoder(name, rounds_to_bfloat16(capability)), writer(name, 1, False)
    words = words_of(name, 1)
    table_shape = (slices, COLUMNS)

    @kernel(capability, COLUMNS * slices, partial=NUMBERS_OF[work], total=array_of(ITEMSIZE[name]))
    def add_partials_kernel(partial: Any, tasks: Any, m: Any, n: Any, total: Any) -> None:
        table = cuda.shared.array(table_shape, np.float64)
        vector = cuda.local.array(words, np.uint32)
        column, slice_ = lane_of(COLUMNS), cuda.threadIdx.x >> WARP_LEVELS
        pieces = (n + COLUMNS - 1) // COLUMNS
        h = np.int64(cuda.blockIdx.x) // pieces
        i = np.int64(cuda.blockIdx.x) % pieces * COLUMNS + column
        sum_ = 0.0
        if i < n:
            for t in range(h + m * slice_, tasks, m * slices):
                sum_ += np.float64(partial[t * n + i])
        table[slice_, column] = sum_
        cuda.syncthreads()
        if slice_ == 0:
            for s in range(1, slices):
                sum_ += table[s, column]
            put(vector, 0, 0, sum_)
            write(total, h * n + i, h * n + n, vector)

    return add_partials_kernel
