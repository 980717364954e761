"""The kernels for long rows, cut into pieces: one launch leaves the moments of each piece; in a second one each block
puts the moments of its row together and writes its piece.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np.cuda.elements import gradient_writer, row_writer
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
    X_SCALE,
    X_TIMES,
    finisher,
    inverse_of_power,
    measurer,
)
from rmsnorm_np.cuda.pairs import add_to_pair, pair_tail, pair_total
from rmsnorm_np.cuda.parameters import clearer, partial_writer
from rmsnorm_np.cuda.reduce import adder, leads, sharer, team_maximum
from rmsnorm_np.cuda.rows import rescaler, row_reader
from rmsnorm_np.cuda.vector import compiled, inlined, words_of

PLACES = 2 * PAIRS


@lru_cache
def piece_moments(plan: Plan) -> Any:
    """Block `row * pieces + piece` leaves the moments of that piece of that row, in float64."""
    work, lanes, trips = plan.work, plan.lanes, plan.trips
    row_words, warps, length, backward = plan.row_words, plan.warps, plan.length, plan.dy is not None
    scratch_shape = (warps, 2 * PAIRS)
    dy_name, weight_name = plan.dy or "float32", plan.weight or "float32"
    has_weight = backward and plan.weight is not None
    dy_words = trips * words_of(dy_name, lanes) if backward else 1
    weight_words = trips * words_of(weight_name, lanes) if backward else 1
    read_x, read_dy = row_reader(plan, plan.x), row_reader(plan, dy_name)
    read_weight = row_reader(plan, weight_name)
    measure, inverse_length = measurer(plan), 1.0 / length

    @compiled(plan.block)
    def piece_moments_kernel(
        dy: Any, x: Any, weight: Any, first_row: Any, n: Any, k: Any, inverse_last: Any, weight_rows: Any, offset: Any,
        eps: Any, kept: Any,
    ) -> None:  # fmt: skip
        x_words = cuda.local.array(row_words, np.uint32)
        d_words = cuda.local.array(dy_words, np.uint32)
        w_words = cuda.local.array(weight_words, np.uint32)
        moments = cuda.local.array(MOMENTS, np.float64)
        scratch = cuda.shared.array(scratch_shape, work)
        shared = cuda.shared.array(SHARED, work)
        maxima = cuda.shared.array(warps, np.float64)
        lane = np.int64(cuda.threadIdx.x)
        pieces = (n + length - 1) // length
        row = first_row + np.int64(cuda.blockIdx.x) // pieces
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
def merger(plan: Plan) -> Any:
    """merge(kept, first, n, inverse, inverse_last, moments, …): the moments of a row from those of its pieces.

    inverse: 1 / n; inverse_last: 1 / the elements of the last piece. The pieces of LayerNorm are centred around their
    own means: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    1979. The result is in the threads that lead.
    """
    block, length, centred, backward = plan.block, plan.length, plan.centred, plan.dy is not None
    add_up, add_up_x = adder(block, PAIRS, np.float64), adder(block, 1, np.float64)
    share_mean, maximum, inverse_length = sharer(block, 1, 0), team_maximum(block), 1.0 / length

    @inlined
    def merge(
        kept: Any, first: Any, n: Any, inverse: Any, inverse_last: Any, moments: Any, scratch: Any, shared: Any,
        maxima: Any,
    ) -> None:  # fmt: skip
        sums = cuda.local.array(PLACES, np.float64)
        mean = cuda.local.array(1, np.float64)
        pieces = (n + length - 1) // length
        x_inverse, dy_inverse = 0.0, 0.0  # of the smallest scale, a power of two
        for p in range(cuda.threadIdx.x, pieces, block):
            at = (first + p) * MOMENTS
            x_inverse = max(x_inverse, inverse_of_power(kept[at + X_SCALE]))
            dy_inverse = max(dy_inverse, inverse_of_power(kept[at + DY_SCALE]))
        x_scale = inverse_of_power(maximum(x_inverse, maxima))
        dy_scale = inverse_of_power(maximum(dy_inverse, maxima)) if backward else 1.0
        mean[0] = 0.0
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
                mean[0] = pair_total(sums, 0) * inverse
            share_mean(mean, shared)
        for j in range(2 * PAIRS):
            sums[j] = 0.0
        for p in range(cuda.threadIdx.x, pieces, block):
            at = (first + p) * MOMENTS
            scale = x_scale * inverse_of_power(kept[at + X_SCALE])
            add_to_pair(sums, 0, kept[at + SQUARES] * scale * scale)
            distance = 0.0
            if centred:
                count = min(length, n - p * length)
                inverse_count = inverse_length if count == length else inverse_last
                distance = (kept[at + SUM] + kept[at + SUM_TAIL]) * inverse_count * scale - mean[0]
                add_to_pair(sums, 0, distance * distance * count)
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
def piece_forward(plan: Plan) -> Any:
    """Block `row * pieces + piece` writes that piece of y."""
    block, work, row_words, warps, length = plan.block, plan.work, plan.row_words, plan.warps, plan.length
    scratch_shape = (warps, 2 * PAIRS)
    read_row, merge, finish = row_reader(plan, plan.x), merger(plan), finisher(plan)
    share, write_row = sharer(block, NUMBERS, 0), row_writer(plan)
    rescale, scalable = rescaler(plan, plan.x), plan.x != "float16"

    @compiled(plan.block)
    def piece_forward_kernel(
        x: Any, weight: Any, bias: Any, kept: Any, first_row: Any, n: Any, k: Any, inverse: Any, inverse_last: Any,
        weight_rows: Any, bias_rows: Any, offset: Any, eps: Any, y: Any,
    ) -> None:  # fmt: skip
        words = cuda.local.array(row_words, np.uint32)
        moments = cuda.local.array(MOMENTS, np.float64)
        numbers = cuda.local.array(NUMBERS, work)
        scratch = cuda.shared.array(scratch_shape, np.float64)
        means = cuda.shared.array(1, np.float64)
        shared = cuda.shared.array(NUMBERS, work)
        maxima = cuda.shared.array(warps, np.float64)
        lane = np.int64(cuda.threadIdx.x)
        pieces = (n + length - 1) // length
        row_here, piece = np.int64(cuda.blockIdx.x) // pieces, np.int64(cuda.blockIdx.x) % pieces
        row = first_row + row_here
        begin = piece * length
        stop = min(length, n - begin)
        start = row * n + begin
        read_row(x, start, lane, stop, words)
        merge(kept, row_here * pieces, n, inverse, inverse_last, moments, scratch, means, maxima)
        if leads(block):
            finish(moments, k, inverse, eps, numbers)
        share(numbers, shared)
        if scalable and numbers[X_TIMES] != 1:
            rescale(words, numbers[X_TIMES])
        write_row(
            words, weight, bias, y, start, row % weight_rows * n + begin, row % bias_rows * n + begin, lane, stop,
            work(offset), numbers,
        )  # fmt: skip

    return piece_forward_kernel


@lru_cache
def piece_backward(plan: Plan) -> Any:
    """Block `(chunk * m + h) * pieces + piece` takes that piece of the rows h, h + m, … of one of `chunks` parts.

    Its sums are a piece of row `first_task + chunk * m + h` of the partial sums.
    """
    block, work, lanes, trips, length = plan.block, plan.work, plan.lanes, plan.trips, plan.length
    row_words, warps = plan.row_words, plan.warps
    scratch_shape = (warps, 2 * PAIRS)
    dy_name, weight_name = plan.dy or "float32", plan.weight or "float32"
    dy_words, weight_words = trips * words_of(dy_name, lanes), trips * words_of(weight_name, lanes)
    read_x, read_dy = row_reader(plan, plan.x), row_reader(plan, dy_name)
    read_weight = row_reader(plan, weight_name)
    has_weight, has_bias = plan.weight is not None, plan.bias is not None
    merge, finish, share = merger(plan), finisher(plan), sharer(block, NUMBERS, 0)
    write_gradient, write_sums = gradient_writer(plan), partial_writer(plan)
    rescale_x, rescale_dy = rescaler(plan, plan.x), rescaler(plan, dy_name)
    x_scalable, dy_scalable = plan.x != "float16", dy_name != "float16"
    elements = trips * lanes
    clear = clearer(elements, work)

    @compiled(plan.block)
    def piece_backward_kernel(
        dy: Any, x: Any, weight: Any, kept: Any, first_row: Any, rows: Any, first_task: Any, n: Any, k: Any,
        inverse: Any, inverse_last: Any, weight_rows: Any, m: Any, chunks: Any, offset: Any, eps: Any, dx: Any,
        dweight: Any, dbias: Any,
    ) -> None:  # fmt: skip
        x_words = cuda.local.array(row_words, np.uint32)
        d_words = cuda.local.array(dy_words, np.uint32)
        w_words = cuda.local.array(weight_words, np.uint32)
        weight_sums = cuda.local.array(elements, work)
        bias_sums = cuda.local.array(elements, work)
        moments = cuda.local.array(MOMENTS, np.float64)
        numbers = cuda.local.array(NUMBERS, work)
        scratch = cuda.shared.array(scratch_shape, np.float64)
        means = cuda.shared.array(1, np.float64)
        shared = cuda.shared.array(NUMBERS, work)
        maxima = cuda.shared.array(warps, np.float64)
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
            row_here = group * m + h
            start = (first_row + row_here) * n + begin
            read_x(x, start, lane, stop, x_words)
            read_dy(dy, start, lane, stop, d_words)
            merge(kept, row_here * pieces, n, inverse, inverse_last, moments, scratch, means, maxima)
            if leads(block):
                finish(moments, k, inverse, eps, numbers)
            share(numbers, shared)
            if x_scalable and numbers[X_TIMES] != 1:
                rescale_x(x_words, numbers[X_TIMES])
            if dy_scalable and numbers[DY_TIMES] != 1:
                rescale_dy(d_words, numbers[DY_TIMES])
            write_gradient(
                x_words, d_words, w_words, dx, start, lane, stop, k - begin, work(offset), numbers, weight_sums,
                bias_sums,
            )  # fmt: skip
        if has_weight:
            write_sums(weight_sums, (first_task + task) * n + begin, stop, lane, dweight)
        if has_bias:
            write_sums(bias_sums, (first_task + task) * n + begin, stop, lane, dbias)

    return piece_backward_kernel
