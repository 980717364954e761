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

from rmsnorm_np.cpu.gradients import keep_gradient_numbers, moments_of, write_gradient
from rmsnorm_np.cpu.jit import inlined, piece
from rmsnorm_np.cpu.rows import keep_statistics, kept_mean, reciprocal_root, write_output
from rmsnorm_np.cpu.simd import LANES, data, float64, kept, load, rounded, scratch, store, zeros


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
def power_of_two(row: Any, n: int, least: float) -> float:
    """2**-e that brings the largest of the row and of `least` near 1; 1 where that is not needed or not possible."""
    largest = least
    for i in range(n):
        largest = max(largest, abs(row[i]))
    if not 0.0 < largest < math.inf or 2.0**-400 < largest < 2.0**400:
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
    room = np.empty((2, n), wide.dtype)
    row, result = data(room[0]), data(room[1])
    copy_row(x, start, row, 0, n)
    scale = power_of_two(row, n, math.sqrt(eps))
    if scale != 1.0:
        for i in range(n):
            row[i] *= scale
    eps = eps * scale * scale  # not scale * scale, which can overflow
    means, totals = scratch(), scratch()
    keep_statistics(row, 0, n, k, means, totals, 0, centred, float64)
    rstd = reciprocal_root(kept(totals, 0, row), k, eps)
    mean = kept_mean(means, 0, row, centred)
    write_output(row, weight, bias, result, 0, n, shift, bias_shift, offset, mean, rstd, 0, 0, float64)
    copy_row(result, 0, y, start, n)


@piece
def write_extreme_gradient(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, start: int, n: int, k: int, shift: int,
    sum_shift: int, offset: Any, eps: float, centred: Any, wide: Any,
) -> None:  # fmt: skip
    """One row: dx, and its share of dweight and dbias."""
    room = np.empty((3, n), wide.dtype)
    row, gradient, result = data(room[0]), data(room[1]), data(room[2])
    copy_row(x, start, row, 0, n)
    copy_row(dy, start, gradient, 0, n)
    scale = power_of_two(row, n, math.sqrt(eps))
    dy_scale = power_of_two(gradient, n, 0.0)
    for i in range(n):
        row[i] *= scale
    eps = eps * scale * scale  # not scale * scale, which can overflow
    means, totals, rstds, bs, cs = scratch(), scratch(), scratch(), scratch(), scratch()
    keep_statistics(row, 0, n, k, means, totals, 0, centred, float64)
    mean, squares = kept_mean(means, 0, row, centred), kept(totals, 0, row)
    none = squares - squares
    keep_gradient_numbers(squares, none, none, k, eps, rstds, bs, cs, 0)
    # xhat does not depend on the scale of x: the shares of dweight and dbias come from dy as it is
    write_gradient(
        gradient, row, weight, result, dweight, dbias, 0, n, shift, sum_shift, offset, mean, kept(rstds, 0, row),
        kept_mean(bs, 0, row, centred), kept(cs, 0, row), 0, 0, 0, float64,
    )  # fmt: skip
    for i in range(n):
        gradient[i] *= dy_scale
    _, sums, products = moments_of(gradient, row, weight, 0, n, k, shift, offset, mean, 0, float64)
    keep_gradient_numbers(squares, sums, products, k, eps, rstds, bs, cs, 0)
    for first, stop, inside in ((0, k, 1), (k, n, 0)):
        write_gradient(
            gradient, row, weight, result, None, None, first, stop, shift, 0, offset, mean, kept(rstds, 0, row),
            kept_mean(bs, 0, row, centred), kept(cs, 0, row), inside, 0, 0, float64,
        )  # fmt: skip
    exponent = math.frexp(scale)[1] - math.frexp(dy_scale)[1]
    for i in range(n):
        result[i] = math.ldexp(result[i], exponent)
    copy_row(result, 0, dx, start, n)
