"""One row, or a piece of a long one, in the registers of its team, as 32-bit words.

Each function is made for a `Plan`; what the plan leaves out is not compiled. Trip t of thread `lane` is the vector at
element (t * team + lane) * lanes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np.cuda.intrinsics import bits_of_float32, opaque, product
from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.pairs import lost_in_difference
from rmsnorm_np.cuda.vector import decoder, encoder, inlined, reader, unrolled, words_of


@lru_cache
def row_reader(plan: Plan, name: str) -> Any:
    """read_row(array, start, lane, stop, words): this thread's vectors of array[start : start + stop]."""
    read = reader(name, plan.lanes, plan.aligned)
    words_per_vector, team, trips, lanes = words_of(name, plan.lanes), plan.team, plan.trips, plan.lanes

    @inlined
    def read_vector(t: Any, array: Any, start: Any, lane: Any, stop: Any, words: Any) -> None:
        read(array, start + (t * team + lane) * lanes, start + stop, words, t * words_per_vector)

    return unrolled(read_vector, trips)


def weight_kept(plan: Plan) -> str:
    """The dtype in which a thread keeps its weights from row to row: half floats are widened once.

    The compiler would widen them before the loop anyhow, and keep both; packed words alone would cost 2 instructions
    for an element of each row.
    """
    return "float32" if plan.weight in (None, "float16", "bfloat16") else plan.weight


@lru_cache
def weight_reader(plan: Plan) -> Any:
    """read_weight(array, start, lane, stop, words): as `row_reader`, with words of the dtype `weight_kept`."""
    name = plan.weight or "float32"
    if name == weight_kept(plan):
        return row_reader(plan, name)
    read, element = reader(name, plan.lanes, plan.aligned), decoder(name, np.float32)
    packed_words, team, trips, lanes = words_of(name, plan.lanes), plan.team, plan.trips, plan.lanes

    @inlined
    def widen(e: Any, t: Any, packed: Any, words: Any) -> None:
        words[t * lanes + e] = opaque(bits_of_float32(element(packed, 0, e)))

    widen_all = unrolled(widen, lanes)

    @inlined
    def read_vector(t: Any, array: Any, start: Any, lane: Any, stop: Any, words: Any) -> None:
        packed = cuda.local.array(packed_words, np.uint32)
        read(array, start + (t * team + lane) * lanes, start + stop, packed, 0)
        widen_all(t, packed, words)

    return unrolled(read_vector, trips)


@lru_cache
def factor(plan: Plan, again: bool = False) -> Any:
    """scaled(value, words, at, e, offset): value · (weight_offset + weight[e]). Backward: words as `weight_kept`."""
    if plan.weight is None:

        @inlined
        def unscaled(value: Any, words: Any, at: int, e: int, offset: Any) -> Any:
            return value

        return unscaled
    element = decoder(plan.weight if plan.dy is None else weight_kept(plan), plan.work, again and plan.exact)
    has_offset = plan.offset

    @inlined
    def scaled(value: Any, words: Any, at: int, e: int, offset: Any) -> Any:
        weight = element(words, at, e)
        return value * (offset + weight if has_offset else weight)

    return scaled


@lru_cache
def factor_pair(plan: Plan) -> Any:
    """scaled_pair(value, words, at, e, offset): value · (weight_offset + weight[e]), as a pair."""
    if plan.weight is None:
        zero = plan.work(0)

        @inlined
        def unscaled(value: Any, words: Any, at: int, e: int, offset: Any) -> Any:
            return value, zero

        return unscaled
    element = decoder(plan.weight if plan.dy is None else weight_kept(plan), plan.work, again=True)
    has_offset = plan.offset

    @inlined
    def scaled_pair(value: Any, words: Any, at: int, e: int, offset: Any) -> Any:
        weight = element(words, at, e)
        scale = offset + weight if has_offset else weight
        head = product(value, scale)
        tail = cuda.fma(value, scale, -head)
        if has_offset:
            tail += value * lost_in_difference(offset, -weight, scale)
        return head, tail

    return scaled_pair


@lru_cache
def rescaler(plan: Plan, name: str) -> Any:
    """rescale(words, scale): every element times a power of two, in place."""
    element, put = decoder(name, plan.work, again=True), encoder(name, plan.native_bfloat16)
    trips, lanes, per_vector = plan.trips, plan.lanes, words_of(name, plan.lanes)

    @inlined
    def rescale_element(e: Any, t: Any, words: Any, scale: Any, vector: Any) -> None:
        put(vector, 0, e, element(words, t * per_vector, e) * scale)

    @inlined
    def put_back(j: Any, t: Any, words: Any, vector: Any) -> None:
        words[t * per_vector + j] = vector[j]

    rescale_all, put_all_back = unrolled(rescale_element, lanes), unrolled(put_back, per_vector)

    @inlined
    def rescale_vector(t: Any, words: Any, scale: Any) -> None:
        vector = cuda.local.array(per_vector, np.uint32)
        rescale_all(t, words, scale, vector)
        put_all_back(t, words, vector)

    return unrolled(rescale_vector, trips)
