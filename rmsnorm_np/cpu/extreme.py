"""The kernels for rows that the others left, as their sums leave the range of the type they are computed in.

Such a row is copied, and the copy brought into the range. float64 rows are scaled by a power of two, which is exact,
and eps by its square: the norm of s·x with eps·s² is the norm of x with eps. Half-precision rows, computed in float32,
are copied to float32 and computed in float64. A copy is a block of one row for :mod:`rmsnorm_np.cpu.blocks`.

These are kernels of their own for they are seldom needed: within the others they took a third of the time that those
take to compile.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rmsnorm_np.cpu.blocks import backward_block, forward_block
from rmsnorm_np.cpu.gradients import absent_with
from rmsnorm_np.cpu.jit import Kernel, piece, unless_exact
from rmsnorm_np.cpu.kernels import add_partials, part_start
from rmsnorm_np.cpu.simd import BLOCK, LANES, data, float64, hold, load, store, zeros
from rmsnorm_np.cpu.threads import in_parallel

# --------------------------------------------------------------------------------------------------------- forward


def _forward(
    x: Any, weight: Any, bias: Any, k: int, m: int, bias_m: int, offset: Any, eps: float, centred: Any, left: Any,
    threads: int, y: Any,
) -> None:  # fmt: skip
    """The rows of y for which `left` is not 0."""
    rows, n = x.shape
    in_parallel(
        _forward_piece, (rows + BLOCK - 1) // BLOCK, threads,
        (data(x), data(weight), data(bias), data(y), rows, n, k, m, bias_m, offset, eps, centred, data(left)),
    )  # fmt: skip


@piece
def _forward_piece(
    p: int, x: Any, weight: Any, bias: Any, y: Any, rows: int, n: int, k: int, m: int, bias_m: int, offset: Any,
    eps: float, centred: Any, left: Any,
) -> None:  # fmt: skip
    room = room_of(x, n)
    row, result = data(room[0]), data(room[1])
    for r in range(p * BLOCK, min(p * BLOCK + BLOCK, rows)):
        if left[r] != 0:
            copy_row(x, r * n, row, 0, n)
            e = exponent_of(row, k, math.sqrt(eps), 2.0**400)  # what is outside the RMS may be of any size
            scale_row(row, -e, n)
            forward_block(
                row, weight, bias, result, 0, r, 1, n, k, m, bias_m, offset, math.ldexp(eps, -2 * e), 0, centred, None
            )
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
    left: Any, threads: int, dx: Any, weight_partial: Any, bias_partial: Any, dweight: Any, dbias: Any,
) -> None:  # fmt: skip
    """The rows of dx for which `left` is not 0; their shares join the partial sums, and these are added up."""
    rows, n = x.shape
    in_parallel(
        _backward_piece, chunks * m, threads,
        (data(dy), data(x), data(weight), data(dx), data(weight_partial), data(bias_partial), rows, n, k, weight_m, m,
         chunks, offset, eps, centred, data(left)),
    )  # fmt: skip
    add_partials(weight_partial, dweight, threads)
    add_partials(bias_partial, dbias, threads)


@piece
def _backward_piece(
    t: int, dy: Any, x: Any, weight: Any, dx: Any, weight_partial: Any, bias_partial: Any, rows: int, n: int, k: int,
    weight_m: int, m: int, chunks: int, offset: Any, eps: float, centred: Any, left: Any,
) -> None:  # fmt: skip
    """The rows whose shares are in row t of the partial sums."""
    zero = n - n  # a literal is a type of its own, and would have `backward_block` compiled for each
    room = np.empty((4, n))
    row, gradient, result, unused = data(room[0]), data(room[1]), data(room[2]), data(room[3])
    shift = t % m % weight_m * n
    for g in range(part_start(t // m, rows // m, chunks), part_start(t // m + 1, rows // m, chunks)):
        r = g * m + t % m
        if left[r] == 0:
            continue
        copy_row(x, r * n, row, zero, n)
        copy_row(dy, r * n, gradient, zero, n)
        # the root of n above 1: then rstd is below 1, and dy · rstd no larger than dy
        e = exponent_of(row, k, math.sqrt(eps), 1.0) - math.frexp(float(n))[1] // 2 - 2
        scale_row(row, -e, n)
        scaled_eps = math.ldexp(eps, -2 * e)
        # xhat does not depend on the scale of x: the shares of dweight and dbias come from dy as it is
        backward_block(
            gradient, row, weight, result, weight_partial, bias_partial, 1, zero, zero, n, k, shift, t * n,
            offset, scaled_eps, zero, centred, None,
        )  # fmt: skip
        dy_e = exponent_of(gradient, n, 0.0, 2.0**100)  # the sum of g · x has to stay in range, too
        if dy_e != 0:
            scale_row(gradient, -dy_e, n)
            backward_block(
                gradient, row, weight, result, absent_with(weight_partial, unused), absent_with(bias_partial, unused),
                1, zero, zero, n, k, shift, zero, offset, scaled_eps, zero, centred, None,
            )  # fmt: skip
        scale_row(result, dy_e - e, n)
        copy_row(result, zero, dx, r * n, n)
    hold(room)


# ------------------------------------------------------------------------------------------------------- both


@piece
def exponent_of(row: Any, count: int, least: float, most: float) -> int:
    """That of the largest of `count` elements and of `least`; 0 where that is between 1 / most and most, or no
    number but 0.
    """
    largest = least
    for i in range(count):
        largest = max(largest, abs(row[i]))
    if not 0.0 < largest < math.inf or 1.0 / most < largest < most:
        return 0
    return math.frexp(largest)[1]


@piece
def scale_row(row: Any, exponent: int, n: int) -> None:
    """Times 2**exponent, which may itself be out of range, but hardly its root."""
    if exponent != 0:
        half, rest = math.ldexp(1.0, exponent // 2), math.ldexp(1.0, exponent - exponent // 2)
        for i in range(n):
            row[i] = row[i] * half * rest


@piece
def copy_row(source: Any, start: int, target: Any, target_start: int, n: int) -> None:
    like = zeros(source, float64)
    for i in range(0, n, LANES):
        count = min(LANES, n - i)
        store(target, target_start + i, load(source, start + i, like, count), count)


left_forward = Kernel(_forward)
left_backward = Kernel(_backward)
