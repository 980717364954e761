"""The kernels for rows that the others skipped, as their sums leave the range of the type they are computed in.

Such a row is copied, and the copy brought into the range. float64 rows are scaled by a power of two, which is exact,
and eps by its square: the norm of s·x with eps·s² is the norm of x with eps. Half-precision rows, computed in float32,
are copied to float32 and computed in float64.

These are kernels of their own for they are seldom needed: within the others they took a third of the time that those
take to compile.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rmsnorm_np.cpu.blocks import EXTREME, forward_block
from rmsnorm_np.cpu.gradients import (
    absent_with,
    add_bias_share,
    keep_gradient_numbers,
    keep_moments,
    write_row_gradient,
)
from rmsnorm_np.cpu.jit import Kernel, optional, piece, unless_exact
from rmsnorm_np.cpu.kernels import BLOCK_ELEMENTS, add_partials, block_rows, part_start
from rmsnorm_np.cpu.rows import keep_mean, kept_mean, minus_mean
from rmsnorm_np.cpu.simd import (
    LANES,
    add_product,
    data,
    float64,
    hold,
    kept,
    load,
    rounded,
    scratch,
    store,
    zeros,
)
from rmsnorm_np.cpu.threads import in_parallel

# --------------------------------------------------------------------------------------------------------- forward


def _forward(
    x: Any, weight: Any, bias: Any, k: int, m: int, bias_m: int, offset: Any, eps: float, centred: Any, skipped: Any,
    threads: int, y: Any,
) -> None:  # fmt: skip
    """The rows of y that were skipped."""
    rows, n = x.shape
    block = block_rows(n, BLOCK_ELEMENTS)
    in_parallel(
        _forward_rows, (rows + block - 1) // block, threads,
        (data(x), data(weight), data(bias), data(y), block, rows, n, k, m, bias_m, offset, eps, centred,
         data(skipped)),
    )  # fmt: skip


@piece
def _forward_rows(
    p: int, x: Any, weight: Any, bias: Any, y: Any, block: int, rows: int, n: int, k: int, m: int, bias_m: int,
    offset: Any, eps: float, centred: Any, skipped: Any,
) -> None:  # fmt: skip
    room = room_of(x, n)
    row, result = data(room[0]), data(room[1])
    for r in range(p * block, min(p * block + block, rows)):
        if skipped[r] == 0:
            continue
        copy_row(x, r * n, row, 0, n)
        scale = scale_of(row, k, eps, centred, FORWARD)  # of what is in the RMS: what is outside may be of any size
        scale_row(row, scale, n)
        forward_block(
            row, weight, bias, result, 0, r, 1, n, k, m, bias_m, offset,
            eps * scale * scale,  # not scale * scale, which can overflow
            0, centred, None,
        )  # fmt: skip
        copy_row(result, 0, y, r * n, n)
    hold(room)


def room_of_doubles(x: Any, n: int) -> Any:
    return np.empty((2, n), np.float64)


@unless_exact("x", room_of_doubles)
def room_of(x: Any, n: int) -> Any:
    """For a copy of a row of x, and for its result."""
    return np.empty((2, n), np.float32)


# -------------------------------------------------------------------------------------------------------- backward


def _backward(
    dy: Any, x: Any, weight: Any, k: int, weight_m: int, m: int, chunks: int, offset: Any, eps: float, centred: Any,
    skipped: Any, all_of_it: int, threads: int, dx: Any, weight_partial: Any, bias_partial: Any, dweight: Any,
    dbias: Any,
) -> None:  # fmt: skip
    """The rows of dx that were skipped; their shares join the partial sums, and these are added up.

    all_of_it: whether the shares of dbias are not there yet either.
    """
    rows, n = x.shape
    in_parallel(
        _backward_rows, chunks * m, threads,
        (data(dy), data(x), data(weight), data(dx), data(weight_partial), data(bias_partial), rows, n, k, weight_m, m,
         chunks, offset, eps, centred, data(skipped), all_of_it),
    )  # fmt: skip
    add_partials(weight_partial, dweight, threads)
    add_partials(bias_partial, dbias, threads)


@piece
def _backward_rows(
    t: int, dy: Any, x: Any, weight: Any, dx: Any, weight_partial: Any, bias_partial: Any, rows: int, n: int, k: int,
    weight_m: int, m: int, chunks: int, offset: Any, eps: float, centred: Any, skipped: Any, all_of_it: int,
) -> None:  # fmt: skip
    """The rows whose shares are in row t of the partial sums."""
    room = np.empty((4, n))
    row, gradient, result, unused = data(room[0]), data(room[1]), data(room[2]), data(room[3])
    means, rstds, bs, cs = scratch(), scratch(), scratch(), scratch()
    shift = t % m % weight_m * n
    for g in range(part_start(t // m, rows // m, chunks), part_start(t // m + 1, rows // m, chunks)):
        start = (g * m + t % m) * n
        mark = skipped[g * m + t % m]
        if mark == 0:
            continue
        copy_row(x, start, row, 0, n)
        copy_row(dy, start, gradient, 0, n)
        scale, dy_scale = 1.0, 1.0
        if mark == EXTREME:
            scale = scale_of(row, k, eps, centred, BACKWARD)
            dy_scale = power_of_two(gradient, n, 0.0, BACKWARD, 0)
            scale_row(row, scale, n)
            scale_row(gradient, dy_scale, n)
        keep_mean(row, 0, n, means, 0, centred)
        mean = kept_mean(means, 0, row, centred)
        keep_moments(gradient, row, weight, 0, n, k, shift, offset, mean, 0, rstds, bs, cs, 0)
        keep_gradient_numbers(row, k, eps * scale * scale, rstds, bs, cs, 0, centred)
        # xhat does not depend on the scale of x: the shares of dweight and dbias come from dy as it is
        add_weight_share(dy, start, row, weight_partial, t * n, n, mean, kept(rstds, 0, row))
        if all_of_it:
            add_bias_share(dy, start, x, bias_partial, t * n, n)
        write_row_gradient(
            gradient, row, weight, result, absent_with(weight_partial, unused), absent_with(bias_partial, unused), 0, n,
            0, k, shift, 0, offset, means, rstds, bs, cs, 0, 0, 0, centred,
        )  # fmt: skip
        exponent = math.frexp(scale)[1] - math.frexp(dy_scale)[1]
        if exponent != 0:
            for i in range(n):
                result[i] = np.ldexp(result[i], exponent)
        copy_row(result, 0, dx, start, n)
    hold(room)


@optional("dweight", lambda dy, start, x, dweight, sum_shift, n, mean, rstd: None)
def add_weight_share(dy: Any, start: int, x: Any, dweight: Any, sum_shift: int, n: int, mean: Any, rstd: Any) -> Any:
    """dy · xhat of one row, added to what stands at sum_shift; that row of dy is at `start`, of x at 0."""
    like = rounded(zeros(x, float64))
    for i in range(0, n, LANES):
        count = min(LANES, n - i)
        xhat = minus_mean(load(x, i, float64, count), mean) * rstd
        sums = rounded(load(dweight, sum_shift + i, like, count))
        store(dweight, sum_shift + i, add_product(sums, xhat, load(dy, start + i, like, count)), count)


# ------------------------------------------------------------------------------------------------------------ both


# Exponents within which the largest number of a row may be: its square, and backward rstd³ times the sum of g · x, have
# to stay in range.
FORWARD, BACKWARD = 400, 100


@optional("centred", lambda row, k, eps, centred, most: power_of_two(row, k, math.sqrt(eps), most, 0))
def scale_of(row: Any, k: int, eps: float, centred: Any, most: int) -> Any:
    """The power of two to multiply the row by, after an element is taken off the row where that is exact.

    What LayerNorm divides by is no larger then than about the row, so its squares and eps are in range together: in a
    row of 1e160, eps vanished beside the squares. All that is small is scaled up: as a part of x - mean it would be a
    subnormal number.
    """
    take_first_off(row, k)
    return power_of_two(row, k, math.sqrt(eps), 0, most)


@piece
def take_first_off(row: Any, n: int) -> None:
    """row - row[0], if no element is so far away that the difference is rounded (Sterbenz' lemma)."""
    first = row[0]
    for i in range(n):
        if not abs(row[i] - first) <= 0.5 * abs(first):
            return
    for i in range(n):
        row[i] -= first


@piece
def power_of_two(row: Any, count: int, least: float, most: int, goal: int) -> float:
    """What brings the largest of `count` elements and of `least` near 2**goal; 1 where that cannot be, or need not, for
    its exponent is between -most and most.
    """
    largest = least
    for i in range(count):
        largest = max(largest, abs(row[i]))
    if not 0.0 < largest < math.inf:
        return 1.0
    exponent = math.frexp(largest)[1]
    if -most < exponent < most:
        return 1.0
    return math.ldexp(1.0, min(goal - exponent, 1023))


@piece
def scale_row(row: Any, scale: float, n: int) -> None:
    if scale != 1.0:
        for i in range(n):
            row[i] = scale * np.float64(row[i])


@piece
def copy_row(source: Any, start: int, target: Any, target_start: int, n: int) -> None:
    like = zeros(source, float64)
    for i in range(0, n, LANES):
        count = min(LANES, n - i)
        store(target, target_start + i, load(source, start + i, like, count), count)


forward = Kernel(_forward)
backward = Kernel(_backward)
