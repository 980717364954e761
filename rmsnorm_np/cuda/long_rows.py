"""The kernels for long rows, cut into pieces: one launch leaves the moments of each piece, a small one makes of them
the numbers of each row, a third writes the pieces.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np.cuda.elements import gradient_writer, row_writer
from rmsnorm_np.cuda.kernel import NUMBERS_OF, Kernel, array_of, kernel
from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.moments import (
    DY_SCALE,
    DY_TIMES,
    G_SUM,
    G_TAIL,
    MOMENTS,
    NUMBERS,
    PAIRS,
    PRODUCTS,
    PRODUCTS_TAIL,
    SHARED,
    SQUARES,
    SUM,
    SUM_TAIL,
    TARGET,
    X_SCALE,
    X_TIMES,
    exponent_of,
    finisher,
    inverse_of_power,
    measurer,
    power_of_two,
)
from rmsnorm_np.cuda.pairs import add_to_pair, pair_storer, pair_tail, pair_total, remainder
from rmsnorm_np.cuda.parameters import clearer, partial_writer
from rmsnorm_np.cuda.reduce import WARP, adder, leads, sharer, team_maximum
from rmsnorm_np.cuda.rows import rescaler, row_reader, weight_kept, weight_reader
from rmsnorm_np.cuda.vector import ITEMSIZE, inlined, unrolled, words_of

PLACES = 2 * PAIRS

FAR = {np.float32: 2.0**40, np.float64: 2.0**400}  # between the means of pieces: beyond, squares may leave the range


@lru_cache
def piece_moments(plan: Plan) -> Kernel:
    """Block `row * pieces + piece` leaves the moments of that piece of that row, in float64."""
    work, lanes, trips = plan.work, plan.lanes, plan.trips
    row_words, warps, length, backward = plan.row_words, plan.warps, plan.length, plan.dy is not None
    scratch_shape = (warps, 2 * PAIRS)
    dy_name = plan.dy or "float32"
    has_weight = backward and plan.weight is not None
    dy_words = trips * words_of(dy_name, lanes) if backward else 1
    weight_words = trips * words_of(weight_kept(plan), lanes) if backward else 1
    read_x, read_dy = row_reader(plan, plan.x), row_reader(plan, dy_name)
    read_weight = weight_reader(plan)
    measure, inverse_length = measurer(plan), 1.0 / length

    x_array, dy_array, weight_array = (array_of(ITEMSIZE[name]) for name in (plan.x, dy_name, plan.weight or "float32"))

    @kernel(
        plan.capability, plan.block, dy=dy_array, x=x_array, weight=weight_array, kept=NUMBERS_OF[np.float64]
    )  # fmt: skip
    def piece_moments_kernel(
        dy: Any, x: Any, weight: Any, n: Any, k: Any, inverse_last: Any, weight_rows: Any, offset: Any,
        eps: Any, kept: Any,
    ) -> None:  # fmt: skip
        x_words = cuda.local.array(row_words, np.uint32)
        d_words = cuda.local.array(dy_words, np.uint32)
        w_words = cuda.local.array(weight_words, np.uint32)
        moments = cuda.local.array(MOMENTS, np.float64)
        scratch = cuda.shared.array(scratch_shape, np.float64)
        shared = cuda.shared.array(SHARED, work)
        maxima = cuda.shared.array(warps, np.float64)
        lane = np.int64(cuda.threadIdx.x)
        pieces = (n + length - 1) // length
        row = np.int64(cuda.blockIdx.x) // pieces
        begin = np.int64(cuda.blockIdx.x) % pieces * length
        stop = min(length, n - begin)
        start = row * n + begin
        read_x(x, start, lane, stop, x_words)
        if backward:
            read_dy(dy, start, lane, stop, d_words)
        if has_weight:
            read_weight(weight, row % weight_rows * n + begin, lane, stop, w_words)
        measure(
            x_words, d_words, w_words, lane, stop, stop, inverse_length if stop == length else inverse_last, k - begin,
            k, eps, work(offset), moments, scratch, shared, maxima,
        )  # fmt: skip
        if lane == 0:
            for j in range(MOMENTS):
                kept[np.int64(cuda.blockIdx.x) * MOMENTS + j] = moments[j]

    return piece_moments_kernel


@lru_cache
def merger(plan: Plan, block: int) -> Any:
    """merge(kept, first, n, inverse, inverse_last, moments, …): the moments of a row from those of its pieces.

    inverse: 1 / n; inverse_last: 1 / the elements of the last piece. The pieces of LayerNorm are centred around their
    own means: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    1979. The result is in the threads that lead.
    """
    length, centred, backward = plan.length, plan.centred, plan.dy is not None
    add_up, add_up_x = adder(block, PAIRS, np.float64), adder(block, 1, np.float64)
    share_mean, maximum, inverse_length = sharer(block, 2, 0), team_maximum(block), 1.0 / length
    store_pair = pair_storer(np.float64)
    far = FAR[plan.work]

    @inlined
    def distance_of(kept: Any, at: Any, scale: Any, p: Any, n: Any, inverse_last: Any, mean: Any) -> Any:
        """The mean of piece p minus that of the row: the rest of a division, as two rounded means could cancel."""
        count = min(length, n - p * length)
        tail = kept[at + SUM_TAIL] * scale - mean[1] * count
        rest = remainder(kept[at + SUM] * scale, tail, mean[0], count)
        return rest * (inverse_length if count == length else inverse_last)

    @inlined
    def merge(
        kept: Any, first: Any, n: Any, inverse: Any, inverse_last: Any, moments: Any, scratch: Any, shared: Any,
        maxima: Any,
    ) -> None:  # fmt: skip
        sums = cuda.local.array(PLACES, np.float64)
        mean = cuda.local.array(2, np.float64)
        pieces = (n + length - 1) // length
        x_inverse, dy_inverse = 0.0, 0.0  # of the smallest scale, a power of two
        for p in range(cuda.threadIdx.x, pieces, block):
            at = (first + p) * MOMENTS
            x_inverse = max(x_inverse, inverse_of_power(kept[at + X_SCALE]))
            dy_inverse = max(dy_inverse, inverse_of_power(kept[at + DY_SCALE]))
        x_scale = inverse_of_power(maximum(x_inverse, maxima))
        dy_scale = inverse_of_power(maximum(dy_inverse, maxima)) if backward else 1.0
        moments[SUM], moments[SUM_TAIL] = 0.0, 0.0
        if centred:
            sums[0], sums[1] = 0.0, 0.0
            for p in range(cuda.threadIdx.x, pieces, block):
                at = (first + p) * MOMENTS
                scale = x_scale * inverse_of_power(kept[at + X_SCALE])
                add_to_pair(sums, 0, kept[at + SUM] * scale)
                sums[1] += kept[at + SUM_TAIL] * scale
            add_up_x(sums, scratch)
            if leads(block):
                moments[SUM], moments[SUM_TAIL] = sums[0], sums[1]
                store_pair(mean, 0, moments[SUM], moments[SUM_TAIL], n, inverse)
            share_mean(mean, shared)
            farthest = 0.0
            for p in range(cuda.threadIdx.x, pieces, block):
                at = (first + p) * MOMENTS
                scale = x_scale * inverse_of_power(kept[at + X_SCALE])
                farthest = max(farthest, abs(distance_of(kept, at, scale, p, n, inverse_last, mean)))
            farthest = maximum(farthest, maxima)
            if far < farthest < math.inf:  # between pieces, each of which is in range
                times = power_of_two(TARGET - exponent_of(farthest))
                x_scale *= times
                for j in range(2):
                    moments[SUM + j] *= times
                    mean[j] *= times
        for j in range(2 * PAIRS):
            sums[j] = 0.0
        for p in range(cuda.threadIdx.x, pieces, block):
            at = (first + p) * MOMENTS
            scale = x_scale * inverse_of_power(kept[at + X_SCALE])
            add_to_pair(sums, 0, kept[at + SQUARES] * scale * scale)
            distance = 0.0
            if centred:
                distance = distance_of(kept, at, scale, p, n, inverse_last, mean)
                add_to_pair(sums, 0, distance * distance * min(length, n - p * length))
            if backward:
                dy_times = dy_scale * inverse_of_power(kept[at + DY_SCALE])
                add_to_pair(sums, 2, kept[at + PRODUCTS] * scale * dy_times)
                sums[3] += kept[at + PRODUCTS_TAIL] * scale * dy_times
                if centred:
                    g_sum = kept[at + G_SUM] * dy_times
                    add_to_pair(sums, 2, g_sum * distance)
                    add_to_pair(sums, 4, g_sum)
                    sums[5] += kept[at + G_TAIL] * dy_times
        add_up(sums, scratch)
        if leads(block):
            moments[SQUARES] = pair_total(sums, 0)
            moments[PRODUCTS], moments[PRODUCTS_TAIL] = sums[2], pair_tail(sums, 2)
            moments[G_SUM], moments[G_TAIL] = sums[4], pair_tail(sums, 4)
            moments[X_SCALE], moments[DY_SCALE] = x_scale, dy_scale

    return merge


@lru_cache
def row_numbers(plan: Plan, block: int) -> Kernel:
    """Block `row`, of so many threads, leaves what the elements of that row need, from the moments of its pieces."""
    work, warps, length = plan.work, max(1, block // WARP), plan.length
    scratch_shape = (warps, 2 * PAIRS)
    merge, finish = merger(plan, block), finisher(plan)

    @kernel(plan.capability, block, kept=NUMBERS_OF[np.float64], row_numbers=NUMBERS_OF[work])
    def row_numbers_kernel(
        kept: Any, n: Any, k: Any, inverse: Any, inverse_last: Any, eps: Any, row_numbers: Any
    ) -> None:
        moments = cuda.local.array(MOMENTS, np.float64)
        numbers = cuda.local.array(NUMBERS, work)
        scratch = cuda.shared.array(scratch_shape, np.float64)
        means = cuda.shared.array(2, np.float64)
        maxima = cuda.shared.array(warps, np.float64)
        row = np.int64(cuda.blockIdx.x)
        merge(kept, row * ((n + length - 1) // length), n, inverse, inverse_last, moments, scratch, means, maxima)
        if leads(block):
            finish(moments, k, inverse, eps, numbers)
        if cuda.threadIdx.x == 0:
            for j in range(NUMBERS):
                row_numbers[row * NUMBERS + j] = numbers[j]

    return row_numbers_kernel


@inlined
def fetch_number(j: Any, row_numbers: Any, first: Any, numbers: Any) -> None:
    """One of the numbers of a row."""
    numbers[j] = row_numbers[first + j]


fetch_numbers = unrolled(fetch_number, NUMBERS)


@lru_cache
def piece_forward(plan: Plan) -> Kernel:
    """Block `(rows - 1 - row) * pieces + piece` writes that piece of y: what was read last is still in L2."""
    work, row_words, length = plan.work, plan.row_words, plan.length
    read_row, write_row = row_reader(plan, plan.x), row_writer(plan)
    rescale, scalable = rescaler(plan, plan.x), plan.x != "float16"
    x_array, weight_array, bias_array = (
        array_of(ITEMSIZE[name or "float32"]) for name in (plan.x, plan.weight, plan.bias)
    )

    @kernel(
        plan.capability, plan.block, x=x_array, weight=weight_array, bias=bias_array, row_numbers=NUMBERS_OF[work],
        y=x_array,
    )  # fmt: skip
    def piece_forward_kernel(
        x: Any, weight: Any, bias: Any, row_numbers: Any, rows: Any, n: Any, weight_rows: Any, bias_rows: Any,
        offset: Any, y: Any,
    ) -> None:  # fmt: skip
        words = cuda.local.array(row_words, np.uint32)
        numbers = cuda.local.array(NUMBERS, work)
        lane = np.int64(cuda.threadIdx.x)
        pieces = (n + length - 1) // length
        row = rows - 1 - np.int64(cuda.blockIdx.x) // pieces
        begin = np.int64(cuda.blockIdx.x) % pieces * length
        stop = min(length, n - begin)
        start = row * n + begin
        read_row(x, start, lane, stop, words)
        fetch_numbers(row_numbers, row * NUMBERS, numbers)
        if scalable and numbers[X_TIMES] != 1:
            rescale(words, numbers[X_TIMES])
        write_row(
            words, weight, bias, y, start, row % weight_rows * n + begin, row % bias_rows * n + begin, lane, stop,
            work(offset), numbers,
        )  # fmt: skip

    return piece_forward_kernel


@lru_cache
def piece_backward(plan: Plan) -> Kernel:
    """Block `(chunk * m + h) * pieces + piece` takes that piece of the rows h, h + m, … of one of `chunks` parts.

    Its sums are a piece of row `chunk * m + h` of the partial sums.
    """
    work, lanes, trips, length = plan.work, plan.lanes, plan.trips, plan.length
    row_words = plan.row_words
    dy_name = plan.dy or "float32"
    dy_words, weight_words = trips * words_of(dy_name, lanes), trips * words_of(weight_kept(plan), lanes)
    read_x, read_dy = row_reader(plan, plan.x), row_reader(plan, dy_name)
    read_weight = weight_reader(plan)
    has_weight, has_bias = plan.weight is not None, plan.bias is not None
    write_gradient, write_sums = gradient_writer(plan), partial_writer(plan)
    rescale_x, rescale_dy = rescaler(plan, plan.x), rescaler(plan, dy_name)
    x_scalable, dy_scalable = plan.x != "float16", dy_name != "float16"
    elements = trips * lanes
    clear = clearer(elements, work)
    x_array, dy_array, weight_array = (array_of(ITEMSIZE[name]) for name in (plan.x, dy_name, plan.weight or "float32"))
    sums_array = array_of(np.dtype(work).itemsize)

    @kernel(
        plan.capability, plan.block, dy=dy_array, x=x_array, weight=weight_array, row_numbers=NUMBERS_OF[work],
        dx=x_array, dweight=sums_array, dbias=sums_array,
    )  # fmt: skip
    def piece_backward_kernel(
        dy: Any, x: Any, weight: Any, row_numbers: Any, rows: Any, n: Any, weight_rows: Any, m: Any, chunks: Any,
        k: Any, offset: Any, dx: Any, dweight: Any, dbias: Any,
    ) -> None:  # fmt: skip
        x_words = cuda.local.array(row_words, np.uint32)
        d_words = cuda.local.array(dy_words, np.uint32)
        w_words = cuda.local.array(weight_words, np.uint32)
        weight_sums = cuda.local.array(elements, work)
        bias_sums = cuda.local.array(elements, work)
        numbers = cuda.local.array(NUMBERS, work)
        lane = np.int64(cuda.threadIdx.x)
        pieces = (n + length - 1) // length
        task, begin = np.int64(cuda.blockIdx.x) // pieces, np.int64(cuda.blockIdx.x) % pieces * length
        h, chunk, groups = task % m, task // m, rows // m
        first, last = groups * chunk // chunks, groups * (chunk + 1) // chunks
        stop = min(length, n - begin)
        clear(weight_sums, bias_sums)
        if has_weight:
            read_weight(weight, h % weight_rows * n + begin, lane, stop, w_words)
        for group in range(first, last):
            row = group * m + h
            start = row * n + begin
            read_x(x, start, lane, stop, x_words)
            read_dy(dy, start, lane, stop, d_words)
            fetch_numbers(row_numbers, row * NUMBERS, numbers)
            if x_scalable and numbers[X_TIMES] != 1:
                rescale_x(x_words, numbers[X_TIMES])
            if dy_scalable and numbers[DY_TIMES] != 1:
                rescale_dy(d_words, numbers[DY_TIMES])
            write_gradient(
                x_words,
                d_words,
                w_words,
                dx,
                start,
                lane,
                stop,
                k - begin,
                work(offset),
                numbers,
                weight_sums,
                bias_sums,
            )
        if has_weight:
            write_sums(weight_sums, task * n + begin, stop, lane, dweight)
        if has_bias:
            write_sums(bias_sums, task * n + begin, stop, lane, dbias)

    return piece_backward_kernel
