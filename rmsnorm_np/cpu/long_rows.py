"""The kernels for rows longer than LONG_ROW, each cut into pieces over all threads.

A row is read twice, and the second time from its end: what was read last may still be in the cache. Its sums are added
in the order in which :mod:`rmsnorm_np.cpu.kernels` adds them, so they have the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rmsnorm_np.cpu.blocks import (
    EXTREME,
    IN_RANGE,
    bound_for,
    gradient_bound_for,
    is_ordinary,
    is_ordinary_deviation,
    is_ordinary_gradient,
    is_ordinary_outside,
)
from rmsnorm_np.cpu.gradients import (
    absent_with,
    clear,
    keep_gradient_numbers,
    put_sums,
    segment_moments,
    write_row_gradient,
)
from rmsnorm_np.cpu.jit import Kernel, piece
from rmsnorm_np.cpu.mode import restore_mode, standard_mode
from rmsnorm_np.cpu.rows import (
    forward_precision,
    keep_mean_of,
    kept_mean,
    reciprocal_root,
    segment_squares,
    segment_sum,
    squares_minus_mean,
    write_output,
)
from rmsnorm_np.cpu.simd import SEGMENT, data, float64, hold, keep, kept
from rmsnorm_np.cpu.threads import in_parallel

LONG_ROW = 65536
PIECE = 16 * SEGMENT  # what a thread takes at a time
AHEAD = 512  # elements that are asked for ahead within a piece: 1.05 to 1.08 times as fast as none
TILE = 1024  # columns whose sums over the rows stay in the first-level cache from row to row


def _long_forward(
    x: Any, weight: Any, bias: Any, k: int, m: int, bias_m: int, offset: Any, eps: float, streaming: int,
    centred: Any, skipped: Any, threads: int, y: Any,
) -> bool:  # fmt: skip
    """Whether rows were skipped, as in :mod:`rmsnorm_np.cpu.kernels`."""
    rows, n = x.shape
    segments = (n + SEGMENT - 1) // SEGMENT
    pieces = (n + PIECE - 1) // PIECE
    sums, means = np.empty((2, segments, 2)), np.empty(4)
    some = False
    before = standard_mode()
    for r in range(rows):
        start = r * n
        if centred is not None:
            in_parallel(_piece_sums, pieces, threads, (data(x), start, n, sums[0], centred))
            _add_segments(data(x), n, segments, data(sums[0]), data(means))
        in_parallel(_piece_squares, pieces, threads, (data(x), start, n, k, means, sums[1], centred))
        ordinary = _add_squares(data(x), start, n, k, eps, data(means), data(sums[1]), centred, bound_for(skipped, x))
        shift = r % m * n - start
        bias_shift = r % bias_m * n - start
        if ordinary:
            in_parallel(
                _piece_output, pieces, threads,
                (data(x), data(weight), data(bias), data(y), start, n, pieces, shift, bias_shift, offset, means,
                 sums[1], streaming, centred),
            )  # fmt: skip
        elif skipped is not None:
            skipped[r] = EXTREME
            some = True
    restore_mode(before)
    return some


@piece
def _piece_sums(p: int, x: Any, start: int, n: int, sums: Any, centred: Any) -> None:
    work = forward_precision(centred)
    for first in range(p * PIECE, min(p * PIECE + PIECE, n), SEGMENT):
        keep(data(sums), first // SEGMENT, segment_sum(x, start + first, start + min(first + SEGMENT, n), work))


@piece
def _add_segments(x: Any, n: int, segments: int, sums: Any, means: Any) -> None:
    """Both parts of the mean, in place 0 of `means`."""
    total = kept(sums, 0, x)
    for s in range(1, segments):
        total = total + kept(sums, s, x)
    keep_mean_of(total, n, x, means, 0)


@piece
def _piece_squares(p: int, x: Any, start: int, n: int, k: int, means: Any, sums: Any, centred: Any) -> None:
    work = forward_precision(centred)
    mean = kept_mean(data(means), 0, x, centred)
    for first in range(p * PIECE, min(p * PIECE + PIECE, k), SEGMENT):
        stop = min(first + SEGMENT, k)
        keep(data(sums), first // SEGMENT, segment_squares(x, start + first, start + stop, mean, work, 0))


@piece
def _add_squares(
    x: Any, start: int, n: int, k: int, eps: float, means: Any, sums: Any, centred: Any, bound: Any
) -> Any:
    """rstd, in place 0 of `sums`; returns whether the row is ordinary."""
    total = kept(sums, 0, x)
    for s in range(1, (k + SEGMENT - 1) // SEGMENT):
        total = total + kept(sums, s, x)
    total = squares_minus_mean(total, kept_mean(means, 0, x, centred), k)
    keep(sums, 0, reciprocal_root(total, k, eps))
    return (
        is_ordinary(total, k, eps, bound)
        and is_ordinary_deviation(total, x, start, n, centred, bound)
        and is_ordinary_outside(x, start, n, k, kept(sums, 0, x), bound)
    )


@piece
def _piece_output(
    turn: int, x: Any, weight: Any, bias: Any, y: Any, start: int, n: int, pieces: int, shift: int, bias_shift: int,
    offset: Any, means: Any, rstds: Any, streaming: int, centred: Any,
) -> None:  # fmt: skip
    p = pieces - 1 - turn  # from the back: what was read last is still in the cache
    first, last = start + p * PIECE, start + min(p * PIECE + PIECE, n)
    write_output(
        x, weight, bias, y, first, last, shift, bias_shift, offset, kept_mean(data(means), 0, x, centred),
        kept(data(rstds), 0, x), streaming, AHEAD, forward_precision(centred),
    )  # fmt: skip


def _long_backward(
    dy: Any, x: Any, weight: Any, k: int, weight_m: int, m: int, offset: Any, eps: float, streaming: int,
    centred: Any, skipped: Any, threads: int, dx: Any, dweight: Any, dbias: Any,
) -> bool:  # fmt: skip
    """First the sums of all rows, then the columns: each column piece adds dweight and dbias over the rows by itself.

    dweight and dbias have shape (m, n) here and no partial sums stand between: at this n those would cost more
    traffic than reading x and dy again.

    Returns whether all rows were skipped, with their marks: one that is not ordinary is enough.
    """
    rows, n = x.shape
    segments = (n + SEGMENT - 1) // SEGMENT
    pieces = (n + PIECE - 1) // PIECE
    sums, means = np.empty((3, segments, 2)), np.empty(4)
    numbers = np.empty(
        (4, m, rows // m, 4)
    )  # mean (of two parts), rstd, b, c; together for the rows that share a row of dweight
    ordinary = True
    before = standard_mode()
    for r in range(rows):
        start = r * n
        shift = r % weight_m * n - start
        if centred is not None:
            in_parallel(_piece_sums, pieces, threads, (data(x), start, n, sums[0], centred))
            _add_segments(data(x), n, segments, data(sums[0]), data(means))
        in_parallel(
            _piece_gradient_sums, pieces, threads,
            (data(dy), data(x), data(weight), start, n, k, shift, offset, means, sums, centred),
        )  # fmt: skip
        is_in_range = _add_gradient_sums(
            data(dy), data(x), start, n, k, eps, segments, data(means), data(sums[0]), data(sums[1]), data(sums[2]),
            r // m, data(numbers[0, r % m]), data(numbers[1, r % m]), data(numbers[2, r % m]),
            data(numbers[3, r % m]), centred, gradient_bound_for(skipped),
        )  # fmt: skip
        ordinary &= is_in_range
        if skipped is not None:
            skipped[r] = IN_RANGE if is_in_range else EXTREME
    if ordinary:
        in_parallel(
            _piece_gradient, pieces * m, threads,
            (data(dy), data(x), data(weight), data(dx), data(dweight), data(dbias), pieces, rows, n, k, weight_m, m,
             offset, numbers, streaming, centred),
        )  # fmt: skip
    restore_mode(before)
    return not ordinary


@piece
def _piece_gradient_sums(
    p: int, dy: Any, x: Any, weight: Any, start: int, n: int, k: int, shift: int, offset: Any, means: Any,
    sums: Any, centred: Any,
) -> None:  # fmt: skip
    """Into sums[0] the squares of each segment, into sums[1] the sums of g, into sums[2] those of g · x."""
    mean = kept_mean(data(means), 0, x, centred)
    for first in range(p * PIECE, min(p * PIECE + PIECE, n), SEGMENT):
        s, stop = first // SEGMENT, min(first + SEGMENT, n)
        square, g_sum, product = segment_moments(
            dy, x, weight, start + first, start + stop, start + k, shift, offset, mean, AHEAD, float64
        )
        keep(data(sums[0]), s, square)
        keep(data(sums[1]), s, g_sum)
        keep(data(sums[2]), s, product)


@piece
def _add_gradient_sums(
    dy: Any, x: Any, start: int, n: int, k: int, eps: float, segments: int, mean: Any, squares: Any, sums: Any,
    products: Any, j: int, means: Any, rstds: Any, bs: Any, cs: Any, centred: Any, bound: Any,
) -> Any:  # fmt: skip
    """mean, rstd, b and c of a row, in place j; returns whether all sums were ordinary."""
    row_mean = kept_mean(mean, 0, x, centred)
    square, g_sum, product = kept(squares, 0, x), kept(sums, 0, x), kept(products, 0, x)
    for s in range(1, segments):
        square = square + kept(squares, s, x)
        g_sum = g_sum + kept(sums, s, x)
        product = product + kept(products, s, x)
    if centred is not None:
        keep(means, 2 * j, kept(mean, 0, x))
        keep(means, 2 * j + 1, kept(mean, 1, x))
    square = squares_minus_mean(square, row_mean, n)
    keep(rstds, j, square)
    keep(bs, j, g_sum)
    keep(cs, j, product)
    keep_gradient_numbers(x, k, eps, rstds, bs, cs, j, centred)
    return (
        is_ordinary(square, k, eps, bound)
        and is_ordinary_deviation(square, x, start, n, centred, bound)
        and is_ordinary_gradient(g_sum, product, dy, x, start, n, centred, bound)
    )


@piece
def _piece_gradient(
    turn: int, dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, pieces: int, rows: int, n: int, k: int,
    weight_m: int, m: int, offset: Any, numbers: Any, streaming: int, centred: Any,
) -> None:  # fmt: skip
    """The columns of a piece, in the rows h, h + m, … that share row h of dweight; with m = 1 these are all."""
    p, h = pieces - 1 - turn // m, turn % m
    room = np.empty((2, TILE))
    weight_sums, bias_sums = absent_with(dweight, data(room[0])), absent_with(dbias, data(room[1]))
    for first in range(p * PIECE, min(p * PIECE + PIECE, n), TILE):
        last = min(first + TILE, n)
        clear(weight_sums, 0, last - first)
        clear(bias_sums, 0, last - first)
        for j in range(rows // m):
            write_row_gradient(
                dy, x, weight, dx, weight_sums, bias_sums, first, last, (j * m + h) * n, k, h % weight_m * n, -first,
                offset, data(numbers[0, h]), data(numbers[1, h]), data(numbers[2, h]), data(numbers[3, h]), j,
                streaming, AHEAD, centred,
            )  # fmt: skip
        put_sums(dweight, h * n + first, weight_sums, last - first, streaming)
        put_sums(dbias, h * n + first, bias_sums, last - first, streaming)
    hold(room)


long_forward = Kernel(_long_forward)
long_backward = Kernel(_long_backward)
