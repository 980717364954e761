"""Rows whose sums left the range of the type they are computed in: done again from a copy that is in range.

float64 rows are scaled by a power of two, which is exact, and eps by its square: the norm of s·x with eps·s² is the
norm of x with eps. Half-precision rows, computed in float32, are copied to float32 and computed in float64.
``wide`` carries both: its dtype is the copy's, its element the bound that an ordinary sum stays within. It is None
where nothing can leave the range (float32 in float64), and then Numba drops this code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rmsnorm_np.cpu.gradients import absent_with, keep_gradient_numbers, keep_moments, write_row_gradient
from rmsnorm_np.cpu.jit import inlined, piece
from rmsnorm_np.cpu.rows import (
    forward_precision,
    keep_mean,
    keep_statistics,
    kept_mean,
    reciprocal_root,
    write_output,
)
from rmsnorm_np.cpu.simd import (
    LANES,
    add_product,
    data,
    float64,
    hold,
    kept,
    load,
    minus,
    rounded,
    scratch,
    store,
    zeros,
)


@inlined
def is_ordinary(total: Any, k: int, eps: float, wide: Any) -> Any:
    """Whether the mean square + eps is inside the bounds."""
    if wide is None:
        return True
    mean_square = rounded(total) / k + eps
    return 1.0 / wide[0] < mean_square < wide[0]


@inlined
def is_ordinary_gradient(sums: Any, products: Any, wide: Any) -> Any:
    """Whether the sums of g and of g·x are inside the bounds; a row of zeros is not, and comes to no harm."""
    if wide is None:
        return True
    size = abs(rounded(products))
    return 1.0 / wide[0] < size < wide[0] and abs(rounded(sums)) < wide[0]


@piece
def power_of_two(row: Any, count: int, least: float, most: float) -> float:
    """2**-e that brings the largest of `count` elements and of `least` near 1; 1 where that cannot be, or need not,
    for it is between 1 / most and most.
    """
    largest = least
    for i in range(count):
        largest = max(largest, abs(row[i]))
    if not 0.0 < largest < math.inf or 1.0 / most < largest < most:
        return 1.0
    exponent = math.frexp(largest)[1]
    return math.ldexp(1.0, min(-exponent, 1023))


@piece
def copy_row(source: Any, start: int, target: Any, target_start: int, n: int) -> None:
    like = zeros(source, float64)
    for i in range(0, n, LANES):
        count = min(LANES, n - i)
        store(target, target_start + i, load(source, start + i, like, count), count)


@piece
def forward_extreme_row(
    x: Any, weight: Any, bias: Any, y: Any, start: int, n: int, k: int, shift: int, bias_shift: int, offset: Any,
    eps: float, centred: Any, wide: Any,
) -> None:  # fmt: skip
    zero = n - n  # a literal would have all it is passed to compiled once more
    room = np.empty((2, n), wide.dtype)
    row, result = data(room[0]), data(room[1])
    copy_row(x, start, row, zero, n)
    scale = power_of_two(row, k, math.sqrt(eps), 2.0**400)  # what is outside the RMS may be of any size
    if scale != 1.0:
        for i in range(n):
            row[i] *= scale
    eps = eps * scale * scale  # not scale * scale, which can overflow
    means, totals = scratch(), scratch()
    work = forward_precision(centred)  # means nothing for the copy, and gives the code that ordinary float64 rows have
    keep_statistics(row, zero, n, k, means, totals, zero, centred, work, zero)
    rstd = reciprocal_root(kept(totals, zero, row), k, eps)
    mean = kept_mean(means, zero, row, centred)
    write_output(row, weight, bias, result, zero, n, shift, bias_shift, offset, mean, rstd, zero, zero, work)
    copy_row(result, zero, y, start, n)
    hold(room)


@piece
def write_extreme_gradient(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, start: int, n: int, k: int, shift: int,
    sum_shift: int, offset: Any, eps: float, centred: Any, wide: Any,
) -> None:  # fmt: skip
    """One row: dx, and its share of dweight and dbias."""
    zero = n - n  # a literal would have all it is passed to compiled once more
    room = np.empty((4, n), wide.dtype)
    row, gradient, result, unused = data(room[0]), data(room[1]), data(room[2]), data(room[3])
    copy_row(x, start, row, zero, n)
    copy_row(dy, start, gradient, zero, n)
    scale = power_of_two(row, k, math.sqrt(eps), 2.0**100)  # what is outside the RMS may be of any size; rstd³ times
    dy_scale = power_of_two(gradient, n, 0.0, 2.0**100)  # the sum of g · x has to stay in range
    for i in range(n):
        row[i] *= scale
        gradient[i] *= dy_scale
    eps = eps * scale * scale  # not scale * scale, which can overflow
    means, rstds, bs, cs = scratch(), scratch(), scratch(), scratch()
    keep_mean(row, zero, n, means, zero, centred)
    mean = kept_mean(means, zero, row, centred)
    keep_moments(gradient, row, weight, zero, n, k, shift, offset, mean, zero, rstds, bs, cs, zero)
    keep_gradient_numbers(row, k, eps, rstds, bs, cs, zero)
    # xhat does not depend on the scale of x: the shares of dweight and dbias come from dy as it is
    add_shares(dy, start, row, dweight, dbias, sum_shift, n, mean, kept(rstds, zero, row))
    write_row_gradient(
        gradient, row, weight, result, absent_with(dweight, unused), absent_with(dbias, unused), 0, n, zero, k, shift,
        zero, offset, means, rstds, bs, cs, zero, zero, zero, centred,
    )  # fmt: skip
    exponent = math.frexp(scale)[1] - math.frexp(dy_scale)[1]
    for i in range(n):
        result[i] = math.ldexp(result[i], exponent)
    copy_row(result, zero, dx, start, n)
    hold(room)


@piece
def add_shares(
    dy: Any, start: int, x: Any, dweight: Any, dbias: Any, sum_shift: int, n: int, mean: Any, rstd: Any
) -> None:
    """dy · xhat and dy of one row, added to what stands at sum_shift; that row of dy is at `start`, of x at 0."""
    like = rounded(zeros(x, float64))
    for i in range(0, n, LANES):
        count = min(LANES, n - i)
        lanes = load(dy, start + i, like, count)
        if dweight is not None:
            xhat = minus(load(x, i, float64, count), mean) * rstd
            sums = rounded(load(dweight, sum_shift + i, like, count))
            store(dweight, sum_shift + i, add_product(sums, xhat, lanes), count)
        if dbias is not None:
            sums = rounded(load(dbias, sum_shift + i, like, count))
            store(dbias, sum_shift + i, sums + rounded(lanes), count)
