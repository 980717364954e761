"""What happens to one row: its moments, the numbers that follow from them, and the elements it gives.

Each function is made for a `Plan`; what the plan leaves out is not compiled. A team holds a row, or a piece of a long
one, as 32-bit words in registers. Trip t of thread `lane` is the vector at element (t * team + lane) * lanes.

Moments, in float64: the sum of x as a pair, the sum of squares (from the mean), the sums of g and of g · x (from the
mean), and the powers of two by which x and dy were multiplied so that all of these are in range. They are 1 but for
rows at the ends of the range. Numbers are what the elements need, in the type inside.
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import FunctionType
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np import _formulas
from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.reduce import (
    WARP,
    WARP_LEVELS,
    add_to_pair,
    adder,
    lane_of,
    leads,
    levels_of,
    pair_total,
    team_mask,
)
from rmsnorm_np.cuda.vector import (
    bits_of_float64,
    decoder,
    encoder,
    float64_of_bits,
    inlined,
    reader,
    words_of,
    writer,
)

# numba-cuda knows math.sqrt, not np.sqrt: the same code, with another module for np.
reciprocal_root = inlined(FunctionType(_formulas.reciprocal_root.__code__, {"np": math}))
rms_gradient = inlined(_formulas.rms_gradient)
layer_gradient = inlined(_formulas.layer_gradient)

# Places of the moments, and of the numbers.
SUM, SUM_TAIL, SQUARES, G_SUM, PRODUCTS, X_SCALE, DY_SCALE, MOMENTS = range(8)
MEAN, MEAN_TAIL, RSTD, RSTD_TAIL, B, C, X_TIMES, DY_TIMES, DY_UNDO, UNDO, UNDO_AGAIN, NUMBERS = range(12)
FLAG = NUMBERS  # behind the numbers, in shared memory

PAIRS = 3  # the most that are summed at once

# Sums are ordinary within these bounds: no square or product of note was lost below, none overflowed above.
_LEAST = {np.float32: 2.0**-80, np.float64: 2.0**-900}
_MOST = {np.float32: 2.0**90, np.float64: 2.0**900}
_MOST_SCALE = {np.float32: 120, np.float64: 1000}  # exponent
_TARGET = 20  # the largest of a rescaled row is about 2**20: the smallest, far below, still have all their digits

_LARGEST_FLOAT64 = float(np.finfo(np.float64).max)


@inlined
def exponent_of(value: Any) -> Any:
    """The e of value = 1.… · 2**e, for a normal float64 > 0."""
    return np.int64((bits_of_float64(value) >> np.uint64(52)) & np.uint64(0x7FF)) - 1023


@inlined
def power_of_two(exponent: Any) -> Any:
    """2**exponent, for -1023 < exponent < 1024."""
    return float64_of_bits(np.uint64(exponent + 1023) << np.uint64(52))


@inlined
def times_pair(value: Any, head: Any, tail: Any) -> Any:
    """value · (head + tail), with one rounding that counts."""
    return cuda.fma(value, head, value * tail)


@lru_cache
def scale_for(work: Any) -> Any:
    """power(largest): the power of two that brings a row with this largest magnitude into range."""
    most = _MOST_SCALE[work]

    @inlined
    def power(largest: Any) -> Any:
        if not largest <= _LARGEST_FLOAT64:
            return 1.0
        exponent = _TARGET - exponent_of(largest) if largest > 0.0 else most
        return power_of_two(min(max(exponent, -most), most))

    return power


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


@lru_cache
def row_reader(plan: Plan, name: str) -> Any:
    """read_row(array, start, lane, stop, words): this thread's vectors of array[start : start + stop]."""
    read = reader(name, plan.lanes, plan.aligned)
    words_per_vector, team, trips, lanes = words_of(name, plan.lanes), plan.team, plan.trips, plan.lanes

    @inlined
    def read_row(array: Any, start: Any, lane: Any, stop: Any, words: Any) -> None:
        for t in range(trips):
            read(array, start + (t * team + lane) * lanes, start + stop, words, t * words_per_vector)

    return read_row


@lru_cache
def factor(plan: Plan, again: bool = False) -> Any:
    """scaled(value, words, at, e, offset): value · (weight_offset + weight[e])."""
    if plan.weight is None:

        @inlined
        def unscaled(value: Any, words: Any, at: int, e: int, offset: Any) -> Any:
            return value

        return unscaled
    element = decoder(plan.weight, plan.work, again)
    has_offset = plan.offset

    @inlined
    def scaled(value: Any, words: Any, at: int, e: int, offset: Any) -> Any:
        weight = element(words, at, e)
        return value * (offset + weight if has_offset else weight)

    return scaled


@lru_cache
def rescaler(plan: Plan, name: str) -> Any:
    """rescale(words, scale): every element times a power of two, in place."""
    element, put = decoder(name, plan.work, again=True), encoder(name, plan.native_bfloat16)
    trips, lanes, per_vector = plan.trips, plan.lanes, words_of(name, plan.lanes)

    @inlined
    def rescale(words: Any, scale: Any) -> None:
        vector = cuda.local.array(per_vector, np.uint32)
        for t in range(trips):
            for e in range(lanes):
                put(vector, 0, e, element(words, t * per_vector, e) * scale)
            for j in range(per_vector):
                words[t * per_vector + j] = vector[j]

    return rescale


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
    """store(pair, j, head, tail, count): (head + tail) / count, all float64, as a pair of the type inside."""
    tail_or_zero = tail_of(work)
    if work is np.float32:

        @inlined
        def store(pair: Any, j: int, head: Any, tail: Any, count: Any) -> None:
            quotient = (head + tail) / count
            pair[j] = np.float32(quotient)
            pair[j + 1] = tail_or_zero(quotient - np.float64(pair[j]))

    else:

        @inlined
        def store(pair: Any, j: int, head: Any, tail: Any, count: Any) -> None:
            quotient = head / count
            pair[j] = quotient
            pair[j + 1] = tail_or_zero((cuda.fma(-quotient, np.float64(count), head) + tail) / count)

    return store


@lru_cache
def measurer(plan: Plan) -> Any:
    """measure(x, dy, weight, lane, stop, count, k, k_row, eps, offset, moments, …): the moments of a team.

    x, dy, weight: words; `stop` elements are there, `count` of the row, k of them in the RMS, k_row in that of the
    whole row. The moments are in the threads that lead.
    """
    work, lanes, trips, team = plan.work, plan.lanes, plan.trips, plan.team
    backward, centred, partial = plan.dy is not None, plan.centred, plan.partial
    x_element = decoder(plan.x, work)
    dy_element = decoder(plan.dy or "float32", work)
    x_again, dy_again = decoder(plan.x, work, again=True), decoder(plan.dy or "float32", work, again=True)
    dy_words, weight_words = words_of(plan.dy or "float32", lanes), words_of(plan.weight or "float32", lanes)
    scaled, weighed = factor(plan), factor(plan, again=True)
    pairs = (3 if centred else 2) if backward else 1
    add_up, add_up_x = adder(team, pairs, work), adder(team, 1, work)
    share_flag, share_mean = sharer(team, 1, FLAG), sharer(team, 2, MEAN)
    maximum, power, store_pair = team_maximum(team), scale_for(work), pair_storer(work)
    # float16 cannot leave the range, and would not take the scale either
    x_scalable, dy_scalable = plan.x != "float16", backward and plan.dy != "float16"
    scalable = x_scalable or dy_scalable
    rescale_x, rescale_dy = rescaler(plan, plan.x), rescaler(plan, plan.dy or "float32")
    least, most = _LEAST[work], _MOST[work]
    checked = not plan.full or plan.split
    per_element = 0 if plan.aligned else 1
    # A mean far from zero needs every digit of the sum. Half types have few digits themselves: the sum of a vector is
    # right to a small part of the distance between two of them.
    wide = plan.x in ("float32", "float64")
    zero, one, places = work(0), work(1), 2 * PAIRS

    @inlined
    def add_x(x: Any, sums: Any) -> None:
        for t in range(trips):
            if wide:
                for e in range(lanes):
                    add_to_pair(sums, 0, x_element(x, 4 * t, e))
            else:
                total = zero
                for e in range(lanes):
                    total += x_element(x, 4 * t, e)
                add_to_pair(sums, 0, total)

    @inlined
    def add_products(
        x: Any, dy: Any, weight: Any, lane: Any, stop: Any, k: Any, offset: Any, mean: Any, sums: Any
    ) -> None:
        for t in range(trips):
            i = (t * team + lane) * lanes
            squares, products, g_sum = zero, zero, zero
            for e in range(lanes):
                value = x_element(x, 4 * t, e)
                if centred:
                    value = (value - mean[0]) - mean[1]
                    if checked and i + e * per_element >= stop:
                        value = zero
                squares += value * value if not partial or i + e < k else zero
                if backward:
                    g = scaled(dy_element(dy, t * dy_words, e), weight, t * weight_words, e, offset)
                    products += g * value
                    g_sum += g
            add_to_pair(sums, 0, squares)
            if backward:
                add_to_pair(sums, 2, products)
                if centred:
                    add_to_pair(sums, 4, g_sum)

    @inlined
    def largest_x(x: Any, lane: Any, k: Any) -> Any:
        largest = 0.0
        for t in range(trips):
            i = (t * team + lane) * lanes
            for e in range(lanes):
                if not partial or i + e < k:
                    largest = max(largest, abs(np.float64(x_again(x, 4 * t, e))))
        return largest

    @inlined
    def largest_g(dy: Any, weight: Any, offset: Any) -> Any:
        largest = 0.0
        for t in range(trips):
            for e in range(lanes):
                d = np.float64(dy_again(dy, t * dy_words, e))
                largest = max(largest, abs(weighed(d, weight, t * weight_words, e, offset)))
        return largest

    @inlined
    def measure(
        x: Any, dy: Any, weight: Any, lane: Any, stop: Any, count: Any, k: Any, k_row: Any, eps: Any, offset: Any,
        moments: Any, scratch: Any, shared: Any, maxima: Any,
    ) -> None:  # fmt: skip
        sums = cuda.local.array(places, work)
        mean = cuda.local.array(2, work)
        flag = cuda.local.array(1, work)
        x_scale, dy_scale = 1.0, 1.0
        again = True
        while again:
            again = False
            moments[SUM], moments[SUM_TAIL], moments[G_SUM], moments[PRODUCTS] = 0.0, 0.0, 0.0, 0.0
            if centred:
                sums[0], sums[1] = zero, zero
                add_x(x, sums)
                add_up_x(sums, scratch)
                if leads(team):
                    moments[SUM], moments[SUM_TAIL] = np.float64(sums[0]), np.float64(sums[1])
                    store_pair(mean, 0, moments[SUM], moments[SUM_TAIL], count)
                share_mean(mean, shared)
            for j in range(2 * pairs):
                sums[j] = zero
            add_products(x, dy, weight, lane, stop, k, offset, mean, sums)
            add_up(sums, scratch)
            if leads(team):
                moments[SQUARES] = pair_total(sums, 0)
                mean_square = moments[SQUARES] / k_row + eps * x_scale * x_scale
                ordinary = least < mean_square < most
                if backward:
                    moments[PRODUCTS] = pair_total(sums, 2)
                    ordinary = ordinary and least < abs(moments[PRODUCTS]) < most
                    if centred:
                        moments[G_SUM] = pair_total(sums, 4)
                        ordinary = ordinary and abs(moments[G_SUM]) < most
                flag[0] = one if ordinary else zero
            if scalable and x_scale == 1.0 and dy_scale == 1.0:
                share_flag(flag, shared)
                if flag[0] == zero:
                    if x_scalable:
                        x_scale = power(maximum(max(largest_x(x, lane, k), math.sqrt(eps)), maxima))
                        rescale_x(x, work(x_scale))
                    if dy_scalable:
                        dy_scale = power(maximum(largest_g(dy, weight, offset), maxima))
                        rescale_dy(dy, work(dy_scale))
                    again = x_scale != 1.0 or dy_scale != 1.0
        moments[X_SCALE], moments[DY_SCALE] = x_scale, dy_scale

    return measure


@lru_cache
def finisher(plan: Plan) -> Any:
    """finish(moments, n, k, eps, numbers): the moments of a whole row become the numbers its elements need."""
    work, backward, centred = plan.work, plan.dy is not None, plan.centred
    store_pair, tail_or_zero = pair_storer(work), tail_of(work)

    @inlined
    def finish(moments: Any, n: Any, k: Any, eps: Any, numbers: Any) -> None:
        x_scale, dy_scale = moments[X_SCALE], moments[DY_SCALE]
        eps = eps * x_scale * x_scale  # not x_scale * x_scale, which can overflow
        rstd = reciprocal_root(moments[SQUARES], k, eps)
        numbers[RSTD] = work(rstd)
        if work is np.float32:
            numbers[RSTD_TAIL] = tail_or_zero(rstd - np.float64(numbers[RSTD]))
        else:
            numbers[RSTD_TAIL] = tail_or_zero(root_correction(rstd, moments[SQUARES], np.float64(k), eps))
        numbers[X_TIMES] = work(x_scale)
        if centred:
            store_pair(numbers, MEAN, moments[SUM], moments[SUM_TAIL], n)
        if backward:
            numbers[B] = work(moments[G_SUM] / k)
            numbers[C] = work(moments[PRODUCTS] * rstd / k)
            exponent = exponent_of(x_scale) - exponent_of(dy_scale)
            numbers[DY_TIMES] = work(dy_scale)
            numbers[DY_UNDO] = work(power_of_two(-exponent_of(dy_scale)))
            numbers[UNDO] = work(power_of_two(exponent >> 1))
            numbers[UNDO_AGAIN] = work(power_of_two(exponent - (exponent >> 1)))

    return finish


@inlined
def root_correction(rstd: Any, total: Any, k: Any, eps: Any) -> Any:
    """What rstd lacks to 1 / sqrt(total / k + eps): one step of Newton's method, its residual without cancellation."""
    mean = total / k
    mean_tail = cuda.fma(-mean, k, total) / k
    argument = mean + eps
    added = argument - mean
    argument_tail = (mean - (argument - added)) + (eps - added) + mean_tail
    square = rstd * rstd
    square_tail = cuda.fma(rstd, rstd, -square)
    residual = cuda.fma(-argument, square, 1.0) - argument * square_tail - argument_tail * square
    return 0.5 * rstd * residual


@lru_cache
def standardiser(plan: Plan) -> Any:
    """standardised(value, numbers): xhat, with one rounding that counts."""
    wide = plan.x in ("float32", "float64")
    if plan.centred:

        @inlined
        def standardised(value: Any, numbers: Any) -> Any:
            distance = value - numbers[MEAN]
            lost = numbers[MEAN_TAIL]
            if wide:  # what the difference rounds off, as in `add_to_pair`; half types are far from needing it
                taken = distance - value
                lost -= (value - (distance - taken)) - (numbers[MEAN] + taken)
            return cuda.fma(distance, numbers[RSTD], distance * numbers[RSTD_TAIL] - lost * numbers[RSTD])

    else:

        @inlined
        def standardised(value: Any, numbers: Any) -> Any:
            return times_pair(value, numbers[RSTD], numbers[RSTD_TAIL])

    return standardised


@lru_cache
def row_writer(plan: Plan) -> Any:
    """write_row(x, weight, bias, y, start, weight_start, bias_start, lane, n, stop, offset, numbers): y of one row.

    x: words; weight, bias, y: arrays. Element e of the piece is at start + e of y, at weight_start + e of weight.
    """
    work, lanes, trips, team = plan.work, plan.lanes, plan.trips, plan.team
    x_element, put = decoder(plan.x, work, again=True), encoder(plan.x, plan.native_bfloat16)
    has_weight, has_bias = plan.weight is not None, plan.bias is not None
    weight_name, bias_name = plan.weight or "float32", plan.bias or "float32"
    read_weight, read_bias = (reader(name, lanes, plan.aligned) for name in (weight_name, bias_name))
    weight_words, bias_words = words_of(weight_name, lanes), words_of(bias_name, lanes)
    scaled, bias_element = factor(plan), decoder(bias_name, work)
    write = writer(plan.x, lanes, plan.aligned)
    standardised = standardiser(plan)

    @inlined
    def write_row(
        x: Any, weight: Any, bias: Any, y: Any, start: Any, weight_start: Any, bias_start: Any, lane: Any, stop: Any,
        offset: Any, numbers: Any,
    ) -> None:  # fmt: skip
        w = cuda.local.array(weight_words, np.uint32)
        b = cuda.local.array(bias_words, np.uint32)
        result = cuda.local.array(4, np.uint32)
        for t in range(trips):
            i = (t * team + lane) * lanes
            if has_weight:
                read_weight(weight, weight_start + i, weight_start + stop, w, 0)
            if has_bias:
                read_bias(bias, bias_start + i, bias_start + stop, b, 0)
            for e in range(lanes):
                value = scaled(standardised(x_element(x, 4 * t, e), numbers), w, 0, e, offset)
                if has_bias:
                    value += bias_element(b, 0, e)
                put(result, 0, e, value)
            write(y, start + i, start + stop, result)

    return write_row


@lru_cache
def gradient_writer(plan: Plan) -> Any:
    """write_gradient(x, dy, weight, dx, start, lane, stop, k, offset, numbers, dweight, dbias): dx of one row.

    x, dy, weight: words, the same elements of each. dweight and dbias, this thread's sums, take their share.
    """
    work, lanes, trips, team = plan.work, plan.lanes, plan.trips, plan.team
    centred, partial = plan.centred, plan.partial
    has_weight, has_bias = plan.weight is not None, plan.bias is not None
    dy_name = plan.dy or "float32"
    x_element, dy_element = decoder(plan.x, work, again=True), decoder(dy_name, work, again=True)
    put = encoder(plan.x, plan.native_bfloat16)
    dy_words, weight_words = words_of(dy_name, lanes), words_of(plan.weight or "float32", lanes)
    scaled, standardised = factor(plan, again=True), standardiser(plan)
    write = writer(plan.x, lanes, plan.aligned)

    @inlined
    def write_gradient(
        x: Any, dy: Any, weight: Any, dx: Any, start: Any, lane: Any, stop: Any, k: Any, offset: Any, numbers: Any,
        dweight: Any, dbias: Any,
    ) -> None:  # fmt: skip
        result = cuda.local.array(4, np.uint32)
        for t in range(trips):
            i = (t * team + lane) * lanes
            for e in range(lanes):
                xhat = standardised(x_element(x, 4 * t, e), numbers)
                d = dy_element(dy, t * dy_words, e)
                g = scaled(d, weight, t * weight_words, e, offset)
                # rstd is a pair, and what the formulas give without it is multiplied by the pair
                if centred:
                    gradient = layer_gradient(g, xhat, numbers[B], numbers[C])
                elif partial and i + e >= k:
                    gradient = g
                else:
                    gradient = rms_gradient(g, xhat, numbers[C])
                gradient = times_pair(gradient, numbers[RSTD], numbers[RSTD_TAIL])
                put(result, 0, e, gradient * numbers[UNDO] * numbers[UNDO_AGAIN])
                if has_weight or has_bias:
                    d *= numbers[DY_UNDO]
                if has_weight:
                    dweight[t * lanes + e] += d * xhat
                if has_bias:
                    dbias[t * lanes + e] += d
            write(dx, start + i, start + stop, result)

    return write_gradient
