"""The kernels for rows that a team holds: who takes which row. Those for longer rows are in `long_rows`.

Arrays are addresses of unsigned integers of their item's size (see `vector`). An array that a plan does without is any
other address, never looked at. All offsets have 64 bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np.cuda.elements import gradient_writer, row_writer
from rmsnorm_np.cuda.kernel import Kernel, array_of, kernel
from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.moments import MOMENTS, NUMBERS, PAIRS, SHARED, finisher, measurer
from rmsnorm_np.cuda.parameters import clearer, partial_writer
from rmsnorm_np.cuda.reduce import lane_of, leads, levels_of, sharer
from rmsnorm_np.cuda.rows import row_reader, weight_kept, weight_reader
from rmsnorm_np.cuda.vector import ITEMSIZE, words_of


@lru_cache
def forward(plan: Plan) -> Kernel:
    """One row per team."""
    team, teams, work = plan.team, plan.teams, plan.work
    row_words, warps, levels = plan.row_words, plan.warps, levels_of(team)
    scratch_shape = (warps, 2 * PAIRS)
    read_row, measure, finish = row_reader(plan, plan.x), measurer(plan), finisher(plan)
    share, write_row = sharer(team, NUMBERS, 0), row_writer(plan)

    x_array, weight_array, bias_array = (
        array_of(ITEMSIZE[name or "float32"]) for name in (plan.x, plan.weight, plan.bias)
    )

    @kernel(plan.capability, plan.block, plan.demanded, x=x_array, weight=weight_array, bias=bias_array, y=x_array)
    def forward_kernel(
        x: Any, weight: Any, bias: Any, rows: Any, n: Any, k: Any, inverse: Any, weight_rows: Any, bias_rows: Any,
        offset: Any, eps: Any, y: Any,
    ) -> None:  # fmt: skip
        words = cuda.local.array(row_words, np.uint32)
        moments = cuda.local.array(MOMENTS, np.float64)
        numbers = cuda.local.array(NUMBERS, work)
        scratch = cuda.shared.array(scratch_shape, np.float64)
        shared = cuda.shared.array(SHARED, work)
        maxima = cuda.shared.array(warps, np.float64)
        row = np.int64(cuda.blockIdx.x) * teams + (cuda.threadIdx.x >> levels)
        lane = np.int64(lane_of(team) if teams > 1 else cuda.threadIdx.x)
        start = row * n
        stop = n if row < rows else 0  # teams without a row do the same steps, on zeros
        read_row(x, start, lane, stop, words)
        measure(words, words, words, lane, stop, n, inverse, k, k, eps, work(offset), moments, scratch, shared, maxima)
        if leads(team):
            finish(moments, k, inverse, eps, numbers)
        share(numbers, shared)
        write_row(
            words, weight, bias, y, start, row % weight_rows * n, row % bias_rows * n, lane, stop, work(offset), numbers
        )

    return forward_kernel


@lru_cache
def backward(plan: Plan) -> Kernel:
    """Block `chunk * m + h` takes one of `chunks` parts of the rows h, h + m, …, which share row h of the parameters.

    Its sums for dweight and dbias are row `chunk * m + h` of the partial sums.
    """
    team, teams, work, lanes, trips = plan.team, plan.teams, plan.work, plan.lanes, plan.trips
    row_words, warps, levels = plan.row_words, plan.warps, levels_of(team)
    scratch_shape = (warps, 2 * PAIRS)
    dy_name = plan.dy or "float32"
    dy_words, weight_words = trips * words_of(dy_name, lanes), trips * words_of(weight_kept(plan), lanes)
    read_x, read_dy = row_reader(plan, plan.x), row_reader(plan, dy_name)
    read_weight = weight_reader(plan)
    has_weight, has_bias = plan.weight is not None, plan.bias is not None
    measure, finish, share = measurer(plan), finisher(plan), sharer(team, NUMBERS, 0)
    write_gradient, write_sums = gradient_writer(plan), partial_writer(plan)
    elements = trips * lanes
    clear = clearer(elements, work)

    x_array, dy_array, weight_array = (array_of(ITEMSIZE[name]) for name in (plan.x, dy_name, plan.weight or "float32"))
    sums_array = array_of(np.dtype(work).itemsize)

    @kernel(
        plan.capability, plan.block, plan.demanded, dy=dy_array, x=x_array, weight=weight_array, dx=x_array,
        dweight=sums_array, dbias=sums_array,
    )  # fmt: skip
    def backward_kernel(
        dy: Any, x: Any, weight: Any, rows: Any, n: Any, k: Any, inverse: Any, weight_rows: Any, m: Any, chunks: Any,
        offset: Any, eps: Any, dx: Any, dweight: Any, dbias: Any,
    ) -> None:  # fmt: skip
        x_words = cuda.local.array(row_words, np.uint32)
        d_words = cuda.local.array(dy_words, np.uint32)
        w_words = cuda.local.array(weight_words, np.uint32)
        weight_sums = cuda.local.array(elements, work)
        bias_sums = cuda.local.array(elements, work)
        moments = cuda.local.array(MOMENTS, np.float64)
        numbers = cuda.local.array(NUMBERS, work)
        scratch = cuda.shared.array(scratch_shape, np.float64)
        shared = cuda.shared.array(SHARED, work)
        maxima = cuda.shared.array(warps, np.float64)
        task = np.int64(cuda.blockIdx.x)
        lane = np.int64(lane_of(team) if teams > 1 else cuda.threadIdx.x)
        h, chunk, groups = task % m, task // m, rows // m
        first, last = groups * chunk // chunks, groups * (chunk + 1) // chunks
        clear(weight_sums, bias_sums)
        if has_weight:
            read_weight(weight, h % weight_rows * n, lane, n, w_words)
        for base in range(first, last, teams):
            group = base + (cuda.threadIdx.x >> levels)
            start = (group * m + h) * n
            stop = n if group < last else 0  # teams without a row do the same steps, on zeros
            read_x(x, start, lane, stop, x_words)
            read_dy(dy, start, lane, stop, d_words)
            measure(
                x_words,
                d_words,
                w_words,
                lane,
                stop,
                n,
                inverse,
                k,
                k,
                eps,
                work(offset),
                moments,
                scratch,
                shared,
                maxima,
            )
            if leads(team):
                finish(moments, k, inverse, eps, numbers)
            share(numbers, shared)
            if teams == 1 or stop > 0:
                write_gradient(
                    x_words, d_words, w_words, dx, start, lane, stop, k, work(offset), numbers, weight_sums, bias_sums
                )
        if has_weight:
            write_sums(weight_sums, task * n, n, lane, dweight)
        if has_bias:
            write_sums(bias_sums, task * n, n, lane, dbias)

    return backward_kernel
