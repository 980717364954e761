"""The moments of one row, or of a piece of it, and the numbers that follow from them.

Moments, in float64: the sum of x as a pair, the sum of squares (from the mean), the sums of g and of g · x (from the
mean), and the powers of two by which x and dy were multiplied so that all of these are in range. They are 1 but for
rows at the ends of the range. Numbers are what the elements need, in the type inside.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np.cuda.intrinsics import bits_of_float64, float64_of_bits, product, rough_reciprocal_root
from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.pairs import (
    add_product_to_pair,
    add_to_pair,
    distance_pair,
    pair_storer,
    pair_total,
    sums_of,
    tail_of,
)
from rmsnorm_np.cuda.reduce import adder, leads, sharer, team_maximum
from rmsnorm_np.cuda.rows import factor, factor_pair, rescaler, weight_kept
from rmsnorm_np.cuda.vector import decoder, inlined, unrolled, words_of

# Places of the moments, and of the numbers.
SUM, SUM_TAIL, SQUARES, G_SUM, G_TAIL, PRODUCTS, PRODUCTS_TAIL, X_SCALE, DY_SCALE, MOMENTS = range(10)
(
    MEAN, MEAN_TAIL, RSTD, RSTD_TAIL, B, B_TAIL, C, C_TAIL, X_TIMES, DY_TIMES, DY_UNDO, UNDO, UNDO_AGAIN, NUMBERS,
) = range(14)  # fmt: skip
FLAG = NUMBERS  # behind the numbers, in shared memory
SHARED = NUMBERS + 1  # numbers and the flag

PAIRS = 3  # the most that are summed at once

# Sums are ordinary within these bounds: no square or product of note was lost below, none overflowed above.
_LEAST = {np.float32: 2.0**-80, np.float64: 2.0**-900}
_MOST = {np.float32: 2.0**90, np.float64: 2.0**900}
_MOST_SCALE = {np.float32: 120, np.float64: 1000}  # exponent
_MOST_DY_SCALE = {np.float32: 40, np.float64: 500}  # exponent: beside small dy · weight a large dy must stay finite
_FINITE_SUM = {np.float32: 100, np.float64: 900}  # exponent of numbers whose sum is finite, however many there are
TARGET = 20  # the largest of a rescaled row is about 2**20: the smallest, far below, still have all their digits

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


@lru_cache
def scale_for(work: Any) -> Any:
    """power(largest, target, most): the power of two that brings a row with this largest magnitude to 2**target.

    At most 2**most, and as much for zeros; 1 for a row with infinity.
    """
    least = -_MOST_SCALE[work]

    @inlined
    def power(largest: Any, target: Any, most: Any) -> Any:
        if not largest <= _LARGEST_FLOAT64:
            return 1.0
        return power_of_two(min(max(target - exponent_of(largest), least), most))

    return power


@lru_cache
def measurer(plan: Plan) -> Any:
    """measure(x, dy, weight, lane, stop, count, inverse, k, k_row, eps, offset, moments, …): the moments of a team.

    x, dy, weight: words; `stop` elements are there, `count` of the row or piece, k of them in the RMS, k_row in
    that of the whole row. inverse: 1 / count. The moments are in the threads that lead.
    """
    work, lanes, trips, team = plan.work, plan.lanes, plan.trips, plan.team
    backward, centred, partial = plan.dy is not None, plan.centred, plan.partial
    x_element = decoder(plan.x, work)
    dy_element = decoder(plan.dy or "float32", work)
    x_again, dy_again = decoder(plan.x, work, again=True), decoder(plan.dy or "float32", work, again=True)
    dy_words, weight_words = words_of(plan.dy or "float32", lanes), words_of(weight_kept(plan), lanes)
    scaled, weighed = factor(plan), factor(plan, again=True)
    pairs = (3 if centred else 2) if backward else 1
    add_up, add_up_x = adder(team, pairs, work), adder(team, 1, work)
    share_flag, share_mean = sharer(team, 1, FLAG), sharer(team, 2, MEAN)
    maximum = team_maximum(team)
    power, store_pair = scale_for(work), pair_storer(work)
    # float16 cannot leave the range, and would not take the scale either
    x_scalable, dy_scalable = plan.x != "float16", backward and plan.dy != "float16"
    scalable = x_scalable or dy_scalable
    rescale_x, rescale_dy = rescaler(plan, plan.x), rescaler(plan, plan.dy or "float32")
    least, most = _LEAST[work], _MOST[work]
    most_scale, most_dy_scale = _MOST_SCALE[work], _MOST_DY_SCALE[work]
    # one more where the sum of x itself can overflow
    rounds = 2 if centred and (work is np.float64 or plan.x == "bfloat16") else 1
    finite_sum = _FINITE_SUM[work]
    checked = not plan.full or plan.split
    per_element = 0 if plan.aligned else 1
    # A mean far from zero needs every digit of the sum. Half types have few digits themselves: the sum of a vector is
    # right to a small part of the distance between two of them.
    wide = plan.exact
    part_type = np.float64 if wide else work
    add, total, tail_of_sum = sums_of(work)
    zero, one, two, places = work(0), work(1), work(2), 2 * PAIRS

    @inlined
    def add_x_element(e: Any, t: Any, x: Any, parts: Any) -> None:
        if wide:
            add(parts, 0, x_element(x, 4 * t, e), 0.0)
        else:
            parts[0] += x_element(x, 4 * t, e)

    add_x_elements = unrolled(add_x_element, lanes)

    @inlined
    def add_vector_of_x(t: Any, x: Any, sums: Any) -> None:
        parts = cuda.local.array(2, part_type)
        parts[0], parts[1] = zero, zero
        add_x_elements(t, x, parts)
        add(sums, 0, parts[0], parts[1])

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
            parts[2] += g * value
            parts[4] += g

    scaled_pair = factor_pair(plan)

    @inlined
    def add_exact_element(
        e: Any, t: Any, i: Any, x: Any, dy: Any, weight: Any, stop: Any, k: Any, offset: Any, mean: Any, parts: Any
    ) -> None:
        value, tail = x_element(x, 4 * t, e), zero
        if centred:
            value, tail = distance_pair(value, mean[0], mean[1])
            if checked and i + e * per_element >= stop:
                value, tail = zero, zero
        if not partial or i + e < k:
            add_product_to_pair(parts, 0, value, tail, value, tail)
        if backward:
            g, g_tail = scaled_pair(dy_element(dy, t * dy_words, e), weight, t * weight_words, e, offset)
            add_product_to_pair(parts, 2, g, g_tail, value, tail)
            if centred:
                add_to_pair(parts, 4, g)
                parts[5] += g_tail

    exact = plan.exact and plan.short
    add_elements = unrolled(add_exact_element if exact else add_element, lanes)

    @inlined
    def add_vector_of_products(
        t: Any, x: Any, dy: Any, weight: Any, lane: Any, stop: Any, k: Any, offset: Any, mean: Any, sums: Any
    ) -> None:
        i = (t * team + lane) * lanes
        parts = cuda.local.array(places, work)  # of squares, products and g; tails are zero unless `exact`
        for j in range(places):
            parts[j] = zero
        add_elements(t, i, x, dy, weight, stop, k, offset, mean, parts)
        for j in range(0, 2 * pairs, 2):
            add(sums, j, pair_total(parts, j) if exact and work is np.float32 else parts[j], parts[j + 1])

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
        x: Any, dy: Any, weight: Any, lane: Any, stop: Any, count: Any, inverse: Any, k: Any, k_row: Any, eps: Any,
        offset: Any, moments: Any, scratch: Any, shared: Any, maxima: Any,
    ) -> None:  # fmt: skip
        sums = cuda.local.array(places, np.float64)
        mean = cuda.local.array(2, work)
        flag = cuda.local.array(1, work)
        largest = cuda.local.array(1, np.float64)
        x_scale, dy_scale = 1.0, 1.0
        again, left = True, rounds
        while again:
            again = False
            moments[SUM], moments[SUM_TAIL], moments[G_SUM], moments[G_TAIL] = 0.0, 0.0, 0.0, 0.0
            moments[PRODUCTS], moments[PRODUCTS_TAIL] = 0.0, 0.0
            if centred:
                sums[0], sums[1] = 0.0, 0.0
                add_x(x, sums)
                add_up_x(sums, scratch)
                if leads(team):
                    moments[SUM], moments[SUM_TAIL] = sums[0], sums[1]
                    store_pair(mean, 0, moments[SUM], moments[SUM_TAIL], count, inverse)
                share_mean(mean, shared)
            for j in range(2 * pairs):
                sums[j] = 0.0
            add_products(x, dy, weight, lane, stop, k, offset, mean, sums)
            add_up(sums, scratch)
            if leads(team):
                moments[SQUARES] = total(sums, 0)
                squares = moments[SQUARES] + eps * x_scale * x_scale * k_row
                ordinary = least * k_row < squares < most * k_row
                if backward:
                    moments[PRODUCTS], moments[PRODUCTS_TAIL] = sums[2], tail_of_sum(sums, 2)
                    ordinary = ordinary and least < abs(moments[PRODUCTS]) < most
                    if centred:
                        moments[G_SUM], moments[G_TAIL] = sums[4], tail_of_sum(sums, 4)
                        ordinary = ordinary and abs(moments[G_SUM]) < most
                flag[0] = zero if ordinary else one if least * k_row < squares < most * k_row else two
            if scalable and left > 0:
                left -= 1
                share_flag(flag, shared)
                if x_scalable and flag[0] == two:  # not for the products alone: it could lose eps in a constant row
                    largest[0] = math.sqrt(eps) * x_scale
                    largest_x(x, lane, k, largest)
                    finite = not centred or abs(mean[0]) < math.inf
                    scale = power(maximum(largest[0], maxima), TARGET if finite else finite_sum, most_scale)
                    rescale_x(x, work(scale))
                    x_scale *= scale
                    again = scale != 1.0
                if dy_scalable and flag[0] != zero and dy_scale == 1.0:
                    largest[0] = 0.0
                    largest_g(dy, weight, offset, largest)
                    g = maximum(largest[0], maxima)
                    dy_scale = power(g, TARGET, most_dy_scale) if g > 0.0 else 1.0
                    rescale_dy(dy, work(dy_scale))
                    again = again or dy_scale != 1.0
        moments[X_SCALE], moments[DY_SCALE] = x_scale, dy_scale

    return measure


@lru_cache
def finisher(plan: Plan) -> Any:
    """finish(moments, k, inverse, eps, numbers): the moments of a row become the numbers that its elements need.

    inverse: 1 / k. LayerNorm has k = n.
    """
    work, backward, centred = plan.work, plan.dy is not None, plan.centred
    store_pair, tail_or_zero = pair_storer(work), tail_of(work)

    @inlined
    def finish(moments: Any, k: Any, inverse: Any, eps: Any, numbers: Any) -> None:
        x_scale, dy_scale = moments[X_SCALE], moments[DY_SCALE]
        eps = eps * x_scale * x_scale  # not x_scale * x_scale, which can overflow
        mean_square = product(moments[SQUARES], inverse)
        rstd = reciprocal_root(mean_square + eps)
        numbers[RSTD] = work(rstd)
        if work is np.float32:
            numbers[RSTD_TAIL] = tail_or_zero(rstd - np.float64(numbers[RSTD]))
        else:
            square_tail = cuda.fma(-mean_square, np.float64(k), moments[SQUARES]) * inverse
            numbers[RSTD_TAIL] = tail_or_zero(root_correction(rstd, mean_square, square_tail, eps))
        numbers[X_TIMES] = work(x_scale)
        if centred:
            store_pair(numbers, MEAN, moments[SUM], moments[SUM_TAIL], k, inverse)
        if backward:
            products, c_tail = moments[PRODUCTS], 0.0
            c = products * rstd
            if work is np.float64:
                c_tail = cuda.fma(products, rstd, -c) + products * numbers[RSTD_TAIL] + moments[PRODUCTS_TAIL] * rstd
                c_tail = c_tail if c_tail == c_tail else 0.0
            store_pair(numbers, C, c, c_tail, k, inverse)
            if centred:
                store_pair(numbers, B, moments[G_SUM], moments[G_TAIL], k, inverse)
            exponent = exponent_of(x_scale) - exponent_of(dy_scale)
            numbers[DY_TIMES] = work(dy_scale)
            numbers[DY_UNDO] = work(inverse_of_power(dy_scale))
            numbers[UNDO] = work(power_of_two(exponent >> 1))
            numbers[UNDO_AGAIN] = work(power_of_two(exponent - (exponent >> 1)))

    return finish


@inlined
def reciprocal_root(value: Any) -> Any:
    """1 / sqrt(value) of a float64, to an ULP or so.

    A step of third order from 20 bits. A square root and a division, each right to the last bit, would be three times
    as many instructions, and two calls; one warp computes while the others wait.
    """
    root = rough_reciprocal_root(value)
    residual = cuda.fma(-value * root, root, 1.0)
    refined = cuda.fma(root * residual, cuda.fma(residual, 0.375, 0.5), root)
    return refined if refined == refined else root  # zero and infinity leave NaN in the residual


@inlined
def root_correction(rstd: Any, mean: Any, mean_tail: Any, eps: Any) -> Any:
    """What rstd lacks to 1 / sqrt(mean + mean_tail + eps): a step of Newton's method, its residual uncancelled."""
    argument = mean + eps
    added = argument - mean
    argument_tail = (mean - (argument - added)) + (eps - added) + mean_tail
    square = rstd * rstd
    square_tail = cuda.fma(rstd, rstd, -square)
    residual = cuda.fma(-argument, square, 1.0) - argument * square_tail - argument_tail * square
    return 0.5 * rstd * residual
