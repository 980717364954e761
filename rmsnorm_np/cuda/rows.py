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
    pair_tail,
    pair_total,
    team_mask,
)
from rmsnorm_np.cuda.vector import (
    bits_of_float64,
    decoder,
    encoder,
    float64_of_bits,
    inlined,
    product,
    reader,
    unrolled,
    words_of,
    writer,
)

# numba-cuda knows math.sqrt, not np.sqrt: the same code, with another module for np.
reciprocal_root = inlined(FunctionType(_formulas.reciprocal_root.__code__, {"np": math}))
rms_gradient = inlined(_formulas.rms_gradient)
layer_gradient = inlined(_formulas.layer_gradient)

# Places of the moments, and of the numbers.
SUM, SUM_TAIL, SQUARES, G_SUM, G_TAIL, PRODUCTS, PRODUCTS_TAIL, X_SCALE, DY_SCALE, MOMENTS = range(10)
(
    MEAN, MEAN_TAIL, RSTD, RSTD_TAIL, B, B_TAIL, C, C_TAIL, X_TIMES, DY_TIMES, DY_UNDO, UNDO, UNDO_AGAIN, NUMBERS,
) = range(14)  # fmt: skip
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
def inverse_of_power(value: Any) -> Any:
    """1 / value, for a power of two that `power_of_two` made."""
    return power_of_two(-exponent_of(value))


@inlined
def lost_in_difference(a: Any, b: Any, difference: Any) -> Any:
    """a - b - difference, what the difference a - b rounded off: Knuth's TwoSum, as in `add_to_pair`."""
    taken = difference - a
    return (a - (difference - taken)) - (b + taken)


@inlined
def add_product_to_pair(sums: Any, j: int, a: Any, a_tail: Any, b: Any, b_tail: Any) -> None:
    """The pair sums[j] + sums[j + 1] plus (a + a_tail) · (b + b_tail), with what all roundings lose."""
    head = product(a, b)
    add_to_pair(sums, j, head)
    sums[j + 1] += cuda.fma(a, b, -head) + (a * b_tail + a_tail * b)


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
    def read_vector(t: Any, array: Any, start: Any, lane: Any, stop: Any, words: Any) -> None:
        read(array, start + (t * team + lane) * lanes, start + stop, words, t * words_per_vector)

    return unrolled(read_vector, trips)


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
def factor_pair(plan: Plan) -> Any:
    """scaled_pair(value, words, at, e, offset): value · (weight_offset + weight[e]), as a pair."""
    if plan.weight is None:
        zero = plan.work(0)

        @inlined
        def unscaled(value: Any, words: Any, at: int, e: int, offset: Any) -> Any:
            return value, zero

        return unscaled
    element = decoder(plan.weight, plan.work, again=True)
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
    """store(pair, j, head, tail, count): (head + tail) / count, all float64, as a pair of the type inside.

    A division of float64 is a call, with registers kept around it. The compiler sees that several have one inverse.
    """
    tail_or_zero = tail_of(work)
    if work is np.float32:

        @inlined
        def store(pair: Any, j: int, head: Any, tail: Any, count: Any) -> None:
            quotient = (head + tail) * (1.0 / count)
            pair[j] = np.float32(quotient)
            pair[j + 1] = tail_or_zero(quotient - np.float64(pair[j]))

    else:

        @inlined
        def store(pair: Any, j: int, head: Any, tail: Any, count: Any) -> None:
            inverse = 1.0 / count
            quotient = head * inverse
            pair[j] = quotient
            pair[j + 1] = tail_or_zero((cuda.fma(-quotient, np.float64(count), head) + tail) * inverse)

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
    wide = plan.exact
    zero, one, places = work(0), work(1), 2 * PAIRS

    @inlined
    def add_x_element(e: Any, t: Any, x: Any, parts: Any) -> None:
        if wide:
            add_to_pair(parts, 0, x_element(x, 4 * t, e))
        else:
            parts[0] += x_element(x, 4 * t, e)

    add_x_elements = unrolled(add_x_element, lanes)

    @inlined
    def add_vector_of_x(t: Any, x: Any, sums: Any) -> None:
        if wide:
            add_x_elements(t, x, sums)
        else:
            parts = cuda.local.array(1, work)
            parts[0] = zero
            add_x_elements(t, x, parts)
            add_to_pair(sums, 0, parts[0])

    @inlined
    def add_element(
        e: Any, t: Any, i: Any, x: Any, dy: Any, weight: Any, stop: Any, k: Any, offset: Any, mean: Any, parts: Any
    ) -> None:
        value = x_element(x, 4 * t, e)
        if centred:
            value = (value - mean[0]) - mean[1]
            if checked and i + e * per_element >= stop:
                value = zero
        parts[0] += value * value if not partial or i + e < k else zero
        if backward:
            g = scaled(dy_element(dy, t * dy_words, e), weight, t * weight_words, e, offset)
            parts[1] += g * value
            parts[2] += g

    scaled_pair = factor_pair(plan)

    @inlined
    def add_exact_element(
        e: Any, t: Any, i: Any, x: Any, dy: Any, weight: Any, stop: Any, k: Any, offset: Any, mean: Any, sums: Any
    ) -> None:
        value, tail = x_element(x, 4 * t, e), zero
        if centred:
            distance = value - mean[0]
            tail = lost_in_difference(value, mean[0], distance) - mean[1]
            value = distance
            if checked and i + e * per_element >= stop:
                value, tail = zero, zero
        if not partial or i + e < k:
            add_product_to_pair(sums, 0, value, tail, value, tail)
        if backward:
            g, g_tail = scaled_pair(dy_element(dy, t * dy_words, e), weight, t * weight_words, e, offset)
            add_product_to_pair(sums, 2, g, g_tail, value, tail)
            if centred:
                add_to_pair(sums, 4, g)
                sums[5] += g_tail

    exact = plan.exact and plan.short
    add_elements = unrolled(add_exact_element if exact else add_element, lanes)

    @inlined
    def add_vector_of_products(
        t: Any, x: Any, dy: Any, weight: Any, lane: Any, stop: Any, k: Any, offset: Any, mean: Any, sums: Any
    ) -> None:
        i = (t * team + lane) * lanes
        if exact:
            add_elements(t, i, x, dy, weight, stop, k, offset, mean, sums)
        else:
            parts = cuda.local.array(3, work)  # of squares, products and g
            parts[0], parts[1], parts[2] = zero, zero, zero
            add_elements(t, i, x, dy, weight, stop, k, offset, mean, parts)
            add_to_pair(sums, 0, parts[0])
            if backward:
                add_to_pair(sums, 2, parts[1])
                if centred:
                    add_to_pair(sums, 4, parts[2])

    @inlined
    def take_x(e: Any, t: Any, i: Any, x: Any, k: Any, largest: Any) -> None:
        if not partial or i + e < k:
            largest[0] = max(largest[0], abs(np.float64(x_again(x, 4 * t, e))))

    @inlined
    def take_g(e: Any, t: Any, dy: Any, weight: Any, offset: Any, largest: Any) -> None:
        d = np.float64(dy_again(dy, t * dy_words, e))
        largest[0] = max(largest[0], abs(weighed(d, weight, t * weight_words, e, offset)))

    take_all_x, take_all_g = unrolled(take_x, lanes), unrolled(take_g, lanes)

    @inlined
    def largest_x_of_vector(t: Any, x: Any, lane: Any, k: Any, largest: Any) -> None:
        take_all_x(t, (t * team + lane) * lanes, x, k, largest)

    @inlined
    def largest_g_of_vector(t: Any, dy: Any, weight: Any, offset: Any, largest: Any) -> None:
        take_all_g(t, dy, weight, offset, largest)

    add_x, add_products = unrolled(add_vector_of_x, trips), unrolled(add_vector_of_products, trips)
    largest_x, largest_g = unrolled(largest_x_of_vector, trips), unrolled(largest_g_of_vector, trips)

    @inlined
    def measure(
        x: Any, dy: Any, weight: Any, lane: Any, stop: Any, count: Any, k: Any, k_row: Any, eps: Any, offset: Any,
        moments: Any, scratch: Any, shared: Any, maxima: Any,
    ) -> None:  # fmt: skip
        sums = cuda.local.array(places, work)
        mean = cuda.local.array(2, work)
        flag = cuda.local.array(1, work)
        largest = cuda.local.array(1, np.float64)
        x_scale, dy_scale = 1.0, 1.0
        again = True
        while again:
            again = False
            moments[SUM], moments[SUM_TAIL], moments[G_SUM], moments[G_TAIL] = 0.0, 0.0, 0.0, 0.0
            moments[PRODUCTS], moments[PRODUCTS_TAIL] = 0.0, 0.0
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
                    moments[PRODUCTS], moments[PRODUCTS_TAIL] = np.float64(sums[2]), pair_tail(sums, 2)
                    ordinary = ordinary and least < abs(moments[PRODUCTS]) < most
                    if centred:
                        moments[G_SUM], moments[G_TAIL] = np.float64(sums[4]), pair_tail(sums, 4)
                        ordinary = ordinary and abs(moments[G_SUM]) < most
                flag[0] = one if ordinary else zero
            if scalable and x_scale == 1.0 and dy_scale == 1.0:
                share_flag(flag, shared)
                if flag[0] == zero:
                    if x_scalable:
                        largest[0] = math.sqrt(eps)
                        largest_x(x, lane, k, largest)
                        x_scale = power(maximum(largest[0], maxima))
                        rescale_x(x, work(x_scale))
                    if dy_scalable:
                        largest[0] = 0.0
                        largest_g(dy, weight, offset, largest)
                        dy_scale = power(maximum(largest[0], maxima))
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
            products, rstd_tail = moments[PRODUCTS], 0.0 if work is np.float32 else np.float64(numbers[RSTD_TAIL])
            c = products * rstd
            c_tail = cuda.fma(products, rstd, -c) + products * rstd_tail + moments[PRODUCTS_TAIL] * rstd
            store_pair(numbers, C, c, c_tail if c_tail == c_tail else 0.0, k)
            if centred:
                store_pair(numbers, B, moments[G_SUM], moments[G_TAIL], k)
            exponent = exponent_of(x_scale) - exponent_of(dy_scale)
            numbers[DY_TIMES] = work(dy_scale)
            numbers[DY_UNDO] = work(inverse_of_power(dy_scale))
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
    """standardised(value, numbers): xhat for half types.

    They need the whole mean, of which little may be left in the difference, but not the whole rstd.
    """
    centred = plan.centred

    @inlined
    def standardised(value: Any, numbers: Any) -> Any:
        distance = (value - numbers[MEAN]) - numbers[MEAN_TAIL] if centred else value
        return distance * numbers[RSTD]

    return standardised


@lru_cache
def standardiser_pair(plan: Plan) -> Any:
    """standardised_pair(value, numbers): xhat, as a pair."""
    centred = plan.centred

    @inlined
    def standardised_pair(value: Any, numbers: Any) -> Any:
        rstd, rstd_tail = numbers[RSTD], numbers[RSTD_TAIL]
        if centred:
            distance = value - numbers[MEAN]
            lost = numbers[MEAN_TAIL] - lost_in_difference(value, numbers[MEAN], distance)
            head = product(distance, rstd)
            tail = cuda.fma(distance, rstd, -head) + (distance * rstd_tail - lost * rstd)
        else:
            head = product(value, rstd)
            tail = cuda.fma(value, rstd, -head) + value * rstd_tail
        return head, tail

    return standardised_pair


@lru_cache
def simple_value(plan: Plan) -> Any:
    """value_of(x, weight, e, bias, offset, numbers): y of one element, for half types."""
    standardised, scaled, has_bias = standardiser(plan), factor(plan), plan.bias is not None

    @inlined
    def value_of(x: Any, weight: Any, e: Any, bias: Any, offset: Any, numbers: Any) -> Any:
        value = scaled(standardised(x, numbers), weight, 0, e, offset)
        return value + bias if has_bias else value

    return value_of


@lru_cache
def exact_value(plan: Plan) -> Any:
    """As `simple_value`, where the result has as many digits as the type inside: one rounding counts, the last."""
    standardised_pair, scaled_pair, scaled = standardiser_pair(plan), factor_pair(plan), factor(plan)
    has_bias, zero = plan.bias is not None, plan.work(0)

    @inlined
    def value_of(x: Any, weight: Any, e: Any, bias: Any, offset: Any, numbers: Any) -> Any:
        xhat, xhat_tail = standardised_pair(x, numbers)
        value, tail = scaled_pair(xhat, weight, 0, e, offset)
        tail += scaled(xhat_tail, weight, 0, e, offset)
        if has_bias:
            shifted = value + bias
            tail += lost_in_difference(value, -bias, shifted)
            value = shifted
        # an infinite number has no tail: infinity less infinity is NaN
        return value + (tail if abs(tail) < math.inf else zero)

    return value_of


@lru_cache
def simple_gradient(plan: Plan) -> Any:
    """gradient_of(x, d, weight, at, e, inside, offset, numbers): (dx, xhat) of one element; inside: it is in the RMS.

    For half types: float32 inside has digits to spare.
    """
    centred = plan.centred
    scaled, standardised = factor(plan, again=True), standardiser(plan)

    @inlined
    def gradient_of(x: Any, d: Any, weight: Any, at: Any, e: Any, inside: Any, offset: Any, numbers: Any) -> Any:
        xhat, g = standardised(x, numbers), scaled(d, weight, at, e, offset)
        if centred:
            gradient = layer_gradient(g, xhat, numbers[B], numbers[C])
        else:
            gradient = rms_gradient(g, xhat, numbers[C]) if inside else g
        return gradient * numbers[RSTD], xhat

    return gradient_of


@lru_cache
def exact_gradient(plan: Plan) -> Any:
    """As `simple_gradient`, where the result has as many digits as the type inside.

    g, b, c and xhat are pairs. The formula of their heads rounds once; the tails, and what g - b rounds off, go through
    the same formula, which is linear in each. Two roundings count: that of the difference, and that of the result.
    """
    centred, zero = plan.centred, plan.work(0)
    scaled_pair, standardised_pair = factor_pair(plan), standardiser_pair(plan)

    @inlined
    def gradient_of(x: Any, d: Any, weight: Any, at: Any, e: Any, inside: Any, offset: Any, numbers: Any) -> Any:
        xhat, xhat_tail = standardised_pair(x, numbers)
        g, g_tail = scaled_pair(d, weight, at, e, offset)
        c, c_tail, rstd = numbers[C], numbers[C_TAIL], numbers[RSTD]
        gradient, tail = g, g_tail
        if centred:
            b = numbers[B]
            gradient = layer_gradient(g, xhat, b, c)
            tail += lost_in_difference(g, b, g - b)
            tail = rms_gradient(layer_gradient(tail, xhat, numbers[B_TAIL], c_tail), xhat_tail, c)
        elif inside:
            gradient = rms_gradient(g, xhat, c)
            tail = rms_gradient(rms_gradient(tail, xhat, c_tail), xhat_tail, c)
        correction = gradient * numbers[RSTD_TAIL] + tail * rstd
        # an infinite number has no correction: infinity less infinity is NaN
        gradient = cuda.fma(gradient, rstd, correction if abs(correction) < math.inf else zero)
        return gradient, xhat + (xhat_tail if abs(xhat_tail) < math.inf else zero)

    return gradient_of


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
    bias_element, zero = decoder(bias_name, work), work(0)
    write = writer(plan.x, lanes, plan.aligned)
    value_of = exact_value(plan) if plan.exact else simple_value(plan)

    @inlined
    def put_element(e: Any, t: Any, x: Any, w: Any, b: Any, offset: Any, numbers: Any, result: Any) -> None:
        bias = bias_element(b, 0, e) if has_bias else zero
        put(result, 0, e, value_of(x_element(x, 4 * t, e), w, e, bias, offset, numbers))

    put_elements = unrolled(put_element, lanes)

    @inlined
    def write_vector(
        t: Any, x: Any, weight: Any, bias: Any, y: Any, start: Any, weight_start: Any, bias_start: Any, lane: Any,
        stop: Any, offset: Any, numbers: Any,
    ) -> None:  # fmt: skip
        w = cuda.local.array(weight_words, np.uint32)
        b = cuda.local.array(bias_words, np.uint32)
        result = cuda.local.array(4, np.uint32)
        i = (t * team + lane) * lanes
        if has_weight:
            read_weight(weight, weight_start + i, weight_start + stop, w, 0)
        if has_bias:
            read_bias(bias, bias_start + i, bias_start + stop, b, 0)
        put_elements(t, x, w, b, offset, numbers, result)
        write(y, start + i, start + stop, result)

    return unrolled(write_vector, trips)


@lru_cache
def gradient_writer(plan: Plan) -> Any:
    """write_gradient(x, dy, weight, dx, start, lane, stop, k, offset, numbers, dweight, dbias): dx of one row.

    x, dy, weight: words, the same elements of each. dweight and dbias, this thread's sums, take their share.
    """
    work, lanes, trips, team = plan.work, plan.lanes, plan.trips, plan.team
    partial = plan.partial
    has_weight, has_bias = plan.weight is not None, plan.bias is not None
    dy_name = plan.dy or "float32"
    x_element, dy_element = decoder(plan.x, work, again=True), decoder(dy_name, work, again=True)
    put = encoder(plan.x, plan.native_bfloat16)
    dy_words, weight_words = words_of(dy_name, lanes), words_of(plan.weight or "float32", lanes)
    gradient_of = exact_gradient(plan) if plan.exact else simple_gradient(plan)
    write = writer(plan.x, lanes, plan.aligned)

    @inlined
    def put_element(
        e: Any, t: Any, i: Any, x: Any, dy: Any, weight: Any, k: Any, offset: Any, numbers: Any, result: Any,
        dweight: Any, dbias: Any,
    ) -> None:  # fmt: skip
        d = dy_element(dy, t * dy_words, e)
        inside = not partial or i + e < k
        gradient, xhat = gradient_of(x_element(x, 4 * t, e), d, weight, t * weight_words, e, inside, offset, numbers)
        put(result, 0, e, gradient * numbers[UNDO] * numbers[UNDO_AGAIN])
        if has_weight or has_bias:
            d *= numbers[DY_UNDO]
        if has_weight:
            dweight[t * lanes + e] += d * xhat
        if has_bias:
            dbias[t * lanes + e] += d

    put_elements = unrolled(put_element, lanes)

    @inlined
    def write_vector(
        t: Any, x: Any, dy: Any, weight: Any, dx: Any, start: Any, lane: Any, stop: Any, k: Any, offset: Any,
        numbers: Any, dweight: Any, dbias: Any,
    ) -> None:  # fmt: skip
        result = cuda.local.array(4, np.uint32)
        i = (t * team + lane) * lanes
        put_elements(t, i, x, dy, weight, k, offset, numbers, result, dweight, dbias)
        write(dx, start + i, start + stop, result)

    return unrolled(write_vector, trips)
