"""The kernels: how rows are cut into blocks and pieces for the cache and for threads.

Three shapes of work, all made of the pieces in :mod:`rmsnorm_np.cpu.rows`:

- `forward`: blocks of rows that stay in the first-level cache, in two passes: the sums of each row, then the output.
- `backward`: the same with x and dy; each task adds up its share of dweight and dbias in a row of `partial`, and the
  shares are added in order at the end.
- `long_forward`, `long_backward`: rows longer than LONG_ROW, each cut over all threads.

Work is cut by shape alone, never by the number of threads, and a row's sums are added in an order that depends on n
alone: so the bits are the same for any batch and any number of threads.

Shapes: x, dy, y, dx (rows, n); weight, bias (m, n), where row r uses row r % m.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from rmsnorm_np.cpu.extreme import forward_extreme_row, is_ordinary, is_ordinary_gradient, write_extreme_gradient
from rmsnorm_np.cpu.jit import Kernel, inlined, optional, piece
from rmsnorm_np.cpu.rows import (
    forward_precision,
    keep_gradient_numbers,
    keep_mean,
    keep_statistics,
    kept_mean,
    moments_of,
    reciprocal_root,
    segment_moments,
    segment_squares,
    segment_sum,
    write_gradient,
    write_output,
    write_short_output,
)
from rmsnorm_np.cpu.simd import (
    BLOCK,
    LANES,
    SEGMENT,
    add_atomically,
    data,
    float64,
    keep,
    kept,
    load,
    rounded,
    scratch,
    store,
    stream,
    until_aligned,
    zeros,
)

# Elements in a block of rows, which is read twice: in float32 x alone, or x and dy, fit a first-level cache of 32 KiB.
# (Backward with 16384: 5 % slower.)
BLOCK_ELEMENTS = 4096
# Each thread has its part of the work in a queue. When that is empty it takes from the others' queues: a core that is
# slow or busy does less, and yet the same rows meet the same core's cache in each call.
SHORT_ROW = 64  # up to here what is done once a row counts: with 16 elements 1.35 times as fast, with 64 the same
APART = 8  # places between two queues: a cache line
LONG_ROW = 65536  # a row longer than this is cut over the threads
PIECE = 16 * SEGMENT  # of a long row: what a thread takes at a time
PIECE_AHEAD = 512  # elements that are asked for ahead within a piece: 1.05 to 1.08 times as fast as none
TILE = 1024  # columns whose sums over long rows stay in the first-level cache from row to row


@inlined
def part_start(part: int, items: int, parts: int) -> int:
    return items * part // parts


@piece
def new_queues(parts: int) -> Any:
    queues = np.empty(parts * APART, np.int64)
    for i in range(len(queues)):  # np.zeros in a parallel kernel would start the threads once more to write zeros
        queues[i] = 0
    return queues


@inlined
def take(queues: Any, part: int, first: int, count: int) -> int:
    """The next number of a part whose numbers begin with `first`; it and the `count` from it on are this thread's.

    It waits until all that was written past the cache has arrived: not to be done for each few rows.
    """
    return first + add_atomically(queues, part * APART, count)


@piece
def block_rows(n: int) -> int:
    return min(BLOCK, max(1, BLOCK_ELEMENTS // n))


# --------------------------------------------------------------------------------------------------------- forward


@piece
def _forward_block(
    x: Any, weight: Any, bias: Any, y: Any, first: int, rows: int, n: int, k: int, m: int, bias_m: int, offset: Any,
    eps: float, streaming: int, centred: Any, wide: Any,
) -> None:  # fmt: skip
    work = forward_precision(centred)
    means, totals, rstds = scratch(), scratch(), scratch()
    for j in range(rows):
        keep_statistics(x, (first + j) * n, n, k, means, totals, j, centred, work)
    for j in range(rows):  # a loop of its own: LLVM takes several roots and divisions at once
        keep(rstds, j, reciprocal_root(kept(totals, j, x), k, eps))
    h, bias_h = first % m, first % bias_m
    short = n <= SHORT_ROW and n % LANES == 0  # then memory.streams has seen to it that rows begin on cache lines
    for j in range(rows):
        start = (first + j) * n
        if is_ordinary(kept(totals, j, x), k, eps, wide):
            if short:
                write_short_output(
                    x, weight, bias, y, start, n, h * n - start, bias_h * n - start, offset,
                    kept_mean(means, j, x, centred), kept(rstds, j, x), streaming, rows * n, work,
                )  # fmt: skip
            else:
                write_output(
                    x, weight, bias, y, start, start + n, h * n - start, bias_h * n - start, offset,
                    kept_mean(means, j, x, centred), kept(rstds, j, x), streaming, rows * n, work,
                )  # fmt: skip
        elif wide is not None:
            forward_extreme_row(x, weight, bias, y, start, n, k, h * n, bias_h * n, offset, eps, centred, wide)
        h = h + 1 if h + 1 < m else 0  # the next row's row of weight and of bias: a division costs as much as
        bias_h = bias_h + 1 if bias_h + 1 < bias_m else 0  # 16 elements


def _forward(
    x: Any, weight: Any, bias: Any, k: int, m: int, bias_m: int, offset: Any, eps: float, streaming: int,
    centred: Any, wide: Any, tasks: int, y: Any,
) -> None:  # fmt: skip
    rows, n = x.shape
    block = block_rows(n)
    blocks = (rows + block - 1) // block
    share = max(1, min(16, blocks // (8 * tasks)))
    queues = new_queues(tasks)
    for task in prange(tasks):
        for turn in range(tasks):
            part = (task + turn) % tasks
            stop = part_start(part + 1, blocks, tasks)
            b = take(data(queues), part, part_start(part, blocks, tasks), share)
            while b < stop:
                for first in range(b * block, min(min(b + share, stop) * block, rows), block):
                    _forward_block(
                        data(x), data(weight), data(bias), data(y), first, min(block, rows - first), n, k, m, bias_m,
                        offset, eps, streaming, centred, wide,
                    )  # fmt: skip
                b = take(data(queues), part, part_start(part, blocks, tasks), share)


def _long_forward(
    x: Any, weight: Any, bias: Any, k: int, m: int, bias_m: int, offset: Any, eps: float, streaming: int,
    centred: Any, wide: Any, tasks: int, y: Any,
) -> None:  # fmt: skip
    rows, n = x.shape
    segments = (n + SEGMENT - 1) // SEGMENT
    pieces = (n + PIECE - 1) // PIECE
    sums = np.empty((3, segments, 2))
    for r in range(rows):
        start = r * n
        if centred is not None:
            for p in prange(pieces):
                _piece_sums(data(x), start, n, p, data(sums[0]), centred)
            _add_segments(data(x), n, segments, data(sums[0]), data(sums[2]), centred)
        for p in prange(pieces):
            _piece_squares(data(x), start, n, k, p, data(sums[2]), data(sums[1]), centred)
        ordinary = _add_squares(data(x), k, eps, data(sums[1]), centred, wide)
        shift = r % m * n - start
        bias_shift = r % bias_m * n - start
        if ordinary:
            for q in prange(pieces):
                # from the back: what was read last is still in the cache
                p = pieces - 1 - q
                _piece_output(
                    data(x), data(weight), data(bias), data(y), start, n, p, shift, bias_shift, offset,
                    data(sums[2]), data(sums[1]), streaming, centred,
                )  # fmt: skip
        elif wide is not None:
            forward_extreme_row(
                data(x), data(weight), data(bias), data(y), start, n, k, shift + start, bias_shift + start, offset,
                eps, centred, wide,
            )  # fmt: skip


@piece
def _piece_sums(x: Any, start: int, n: int, p: int, sums: Any, centred: Any) -> None:
    work = forward_precision(centred)
    for first in range(p * PIECE, min(p * PIECE + PIECE, n), SEGMENT):
        keep(sums, first // SEGMENT, segment_sum(x, start + first, start + min(first + SEGMENT, n), work))


@piece
def _add_segments(x: Any, n: int, segments: int, sums: Any, means: Any, centred: Any) -> None:
    """The mean, in place 0 of `means`."""
    total = kept(sums, 0, x)
    for s in range(1, segments):
        total = total + kept(sums, s, x)
    keep(means, 0, total / n)


@piece
def _piece_squares(x: Any, start: int, n: int, k: int, p: int, means: Any, sums: Any, centred: Any) -> None:
    work = forward_precision(centred)
    mean = kept_mean(means, 0, x, centred)
    for first in range(p * PIECE, min(p * PIECE + PIECE, k), SEGMENT):
        stop = min(first + SEGMENT, k)
        keep(sums, first // SEGMENT, segment_squares(x, start + first, start + stop, mean, work))


@piece
def _add_squares(x: Any, k: int, eps: float, sums: Any, centred: Any, wide: Any) -> Any:
    """rstd, in place 0 of `sums`; returns whether the sum is ordinary."""
    total = kept(sums, 0, x)
    for s in range(1, (k + SEGMENT - 1) // SEGMENT):
        total = total + kept(sums, s, x)
    keep(sums, 0, reciprocal_root(total, k, eps))
    return is_ordinary(total, k, eps, wide)


@piece
def _piece_output(
    x: Any, weight: Any, bias: Any, y: Any, start: int, n: int, p: int, shift: int, bias_shift: int, offset: Any,
    means: Any, rstds: Any, streaming: int, centred: Any,
) -> None:  # fmt: skip
    first, last = start + p * PIECE, start + min(p * PIECE + PIECE, n)
    write_output(
        x, weight, bias, y, first, last, shift, bias_shift, offset, kept_mean(means, 0, x, centred), kept(rstds, 0, x),
        streaming, PIECE_AHEAD, forward_precision(centred),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- backward


@piece
def _backward_block(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, rows: int, base: int, step: int, n: int, k: int,
    shift: int, sum_shift: int, offset: Any, eps: float, streaming: int, centred: Any, wide: Any,
) -> None:  # fmt: skip
    """Rows that start at base, base + step, …; shift and sum_shift: where their row of weight and of dweight starts."""
    means, rstds, bs, cs = scratch(), scratch(), scratch(), scratch()
    ordinary = True
    # while this block's sums are taken, dy of the next is fetched, and x while its gradients are written: neither
    # memory nor arithmetic waits for the other (measured: x and dy both at the end 1.1, not at all 1.3 times as long)
    ahead = rows * step if streaming else 0
    for j in range(rows):
        start = base + j * step
        keep_mean(x, start, n, means, j, centred)
        squares, sums, products = moments_of(
            dy, x, weight, start, n, k, shift - start, offset, kept_mean(means, j, x, centred), ahead, float64
        )
        keep_gradient_numbers(squares, sums, products, k, eps, rstds, bs, cs, j)
        ordinary &= is_ordinary(squares, k, eps, wide) and is_ordinary_gradient(sums, products, wide)
    if ordinary:
        for j in range(rows):
            write_row_gradient(
                dy, x, weight, dx, dweight, dbias, 0, n, base + j * step, k, shift, sum_shift, offset, means, rstds, bs,
                cs, j, streaming, ahead, centred,
            )  # fmt: skip
    elif wide is not None:
        for j in range(rows):
            write_extreme_gradient(
                dy, x, weight, dx, dweight, dbias, base + j * step, n, k, shift, sum_shift, offset, eps, centred, wide
            )


@inlined
def write_row_gradient(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, first: int, last: int, start: int, k: int,
    shift: int, sum_shift: int, offset: Any, means: Any, rstds: Any, bs: Any, cs: Any, j: int, streaming: int,
    ahead: int, centred: Any,
) -> None:  # fmt: skip
    """Columns first to last of the row at `start`, whose numbers are in place j."""
    mean, b = kept_mean(means, j, x, centred), kept_mean(bs, j, x, centred)
    rstd, c = kept(rstds, j, x), kept(cs, j, x)
    border = max(first, min(k, last))  # the elements before it are in the RMS
    write_gradient(
        dy, x, weight, dx, dweight, dbias, start + first, start + border, shift - start, sum_shift - start, offset, mean,
        rstd, b, c, 1, streaming, ahead, float64,
    )  # fmt: skip
    if border < last:
        write_gradient(
            dy, x, weight, dx, dweight, dbias, start + border, start + last, shift - start, sum_shift - start, offset,
            mean, rstd, b, c, 0, streaming, ahead, float64,
        )  # fmt: skip


def _backward(
    dy: Any, x: Any, weight: Any, k: int, weight_m: int, m: int, chunks: int, offset: Any, eps: float, streaming: int,
    centred: Any, wide: Any, tasks: int, dx: Any, weight_partial: Any, bias_partial: Any, dweight: Any, dbias: Any,
) -> None:  # fmt: skip
    """Task t adds up rows t % m, t % m + m, … of one of `chunks` parts in row t of the partial sums."""
    rows, n = x.shape
    groups = rows // m
    block = block_rows(n)
    queues = new_queues(tasks)
    for task in prange(tasks):
        for turn in range(tasks):
            part = (task + turn) % tasks
            t = take(data(queues), part, part_start(part, chunks * m, tasks), 1)
            while t < part_start(part + 1, chunks * m, tasks):
                first, stop = groups * (t // m) // chunks, groups * (t // m + 1) // chunks
                clear(data(weight_partial), t * n, n)
                clear(data(bias_partial), t * n, n)
                for g in range(first, stop, block):
                    _backward_block(
                        data(dy), data(x), data(weight), data(dx), data(weight_partial), data(bias_partial),
                        min(block, stop - g), (g * m + t % m) * n, m * n, n, k, t % m % weight_m * n, t * n, offset,
                        eps, streaming, centred, wide,
                    )  # fmt: skip
                t = take(data(queues), part, part_start(part, chunks * m, tasks), 1)
    if dweight is not None:
        for p in prange((n + SEGMENT - 1) // SEGMENT):
            _add_partials(data(weight_partial), data(dweight), chunks * m, dweight.shape[0], n, p)
    if dbias is not None:
        for p in prange((n + SEGMENT - 1) // SEGMENT):
            _add_partials(data(bias_partial), data(dbias), chunks * m, dbias.shape[0], n, p)


@optional("target", lambda target, sums: None)
def absent_with(target: Any, sums: Any) -> Any:
    """The sums, or None where there is no target for them."""
    return sums


@optional("sums", lambda sums, start, n: None)
def clear(sums: Any, start: int, n: int) -> Any:
    for i in range(start, start + n):
        sums[i] = 0.0


@optional("target", lambda target, start, sums, n, streaming: None)
def put_sums(target: Any, start: int, sums: Any, n: int, streaming: int) -> Any:
    """The sums, rounded to the target's dtype, from `start` on."""
    like = rounded(zeros(sums, float64))
    if streaming and until_aligned(target, start) == 0 and n % LANES == 0:
        for i in range(0, n, LANES):
            stream(target, start + i, load(sums, i, like))
    else:
        for i in range(0, n, LANES):
            count = min(LANES, n - i)
            store(target, start + i, load(sums, i, like, count), count)


@piece
def _add_partials(partial: Any, total: Any, tasks: int, m: int, n: int, p: int) -> None:
    """Rows h, h + m, … of the partial sums, added in this order, are row h of the total."""
    like = rounded(zeros(partial, float64))
    for h in range(m):
        for i in range(p * SEGMENT, min(p * SEGMENT + SEGMENT, n), LANES):
            count = min(LANES, n - i)
            lanes = load(partial, h * n + i, like, count)
            for t in range(h + m, tasks, m):
                lanes = lanes + load(partial, t * n + i, like, count)
            store(total, h * n + i, lanes, count)


forward = Kernel(_forward)
long_forward = Kernel(_long_forward)
backward = Kernel(_backward)


def _long_backward(
    dy: Any, x: Any, weight: Any, k: int, weight_m: int, m: int, offset: Any, eps: float, streaming: int,
    centred: Any, wide: Any, tasks: int, dx: Any, dweight: Any, dbias: Any,
) -> None:  # fmt: skip
    """First the sums of all rows, then the columns: each column piece adds dweight and dbias over the rows by itself.

    dweight and dbias have shape (m, n) here and no partial sums stand between: at this n those would cost more
    traffic than reading x and dy again.
    """
    rows, n = x.shape
    segments = (n + SEGMENT - 1) // SEGMENT
    pieces = (n + PIECE - 1) // PIECE
    sums = np.empty((4, segments, 2))
    numbers = np.empty((4, m, rows // m, 2))  # mean, rstd, b, c; together for the rows that share a row of dweight
    ordinary = True
    for r in range(rows):
        start = r * n
        shift = r % weight_m * n - start
        if centred is not None:
            for p in prange(pieces):
                _piece_sums(data(x), start, n, p, data(sums[0]), centred)
            _add_segments(data(x), n, segments, data(sums[0]), data(sums[3]), centred)
        for p in prange(pieces):
            _piece_gradient_sums(
                data(dy), data(x), data(weight), start, n, k, shift, offset, p, data(sums[3]), data(sums[0]),
                data(sums[1]), data(sums[2]), centred,
            )  # fmt: skip
        ordinary &= _add_gradient_sums(
            data(x), n, k, eps, segments, data(sums[3]), data(sums[0]), data(sums[1]), data(sums[2]), r // m,
            data(numbers[0, r % m]), data(numbers[1, r % m]), data(numbers[2, r % m]), data(numbers[3, r % m]),
            centred, wide,
        )  # fmt: skip
    if ordinary:
        for t in prange(pieces * m):
            p, h = pieces - 1 - t // m, t % m
            _piece_gradient(
                data(dy), data(x), data(weight), data(dx), data(dweight), data(dbias), p, h, rows, n, k, weight_m, m,
                offset, data(numbers[0, h]), data(numbers[1, h]), data(numbers[2, h]), data(numbers[3, h]),
                streaming, centred,
            )  # fmt: skip
    elif wide is not None:
        sums = np.zeros((2, n))
        for h in range(m):
            _extreme_rows(
                data(dy), data(x), data(weight), data(dx), data(dweight), data(dbias), data(sums[0]), data(sums[1]), h,
                rows, n, k, weight_m, m, offset, eps, centred, wide,
            )  # fmt: skip


@piece
def _extreme_rows(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, weight_sums: Any, bias_sums: Any, h: int, rows: int,
    n: int, k: int, weight_m: int, m: int, offset: Any, eps: float, centred: Any, wide: Any,
) -> None:  # fmt: skip
    clear(weight_sums, 0, n)
    clear(bias_sums, 0, n)
    for r in range(h, rows, m):
        write_extreme_gradient(
            dy, x, weight, dx, absent_with(dweight, weight_sums), absent_with(dbias, bias_sums), r * n, n, k,
            h % weight_m * n, 0, offset, eps, centred, wide,
        )  # fmt: skip
    put_sums(dweight, h * n, absent_with(dweight, weight_sums), n, 0)
    put_sums(dbias, h * n, absent_with(dbias, bias_sums), n, 0)


@piece
def _piece_gradient_sums(
    dy: Any, x: Any, weight: Any, start: int, n: int, k: int, shift: int, offset: Any, p: int, means: Any,
    squares: Any, sums: Any, products: Any, centred: Any,
) -> None:  # fmt: skip
    mean = kept_mean(means, 0, x, centred)
    for first in range(p * PIECE, min(p * PIECE + PIECE, n), SEGMENT):
        s, stop = first // SEGMENT, min(first + SEGMENT, n)
        square, g_sum, product = segment_moments(
            dy, x, weight, start + first, start + stop, start + k, shift, offset, mean, PIECE_AHEAD, float64
        )
        keep(squares, s, square)
        keep(sums, s, g_sum)
        keep(products, s, product)


@piece
def _add_gradient_sums(
    x: Any, n: int, k: int, eps: float, segments: int, mean: Any, squares: Any, sums: Any, products: Any, j: int,
    means: Any, rstds: Any, bs: Any, cs: Any, centred: Any, wide: Any,
) -> Any:  # fmt: skip
    """mean, rstd, b and c of a row, in place j; returns whether all sums were ordinary."""
    square, g_sum, product = kept(squares, 0, x), kept(sums, 0, x), kept(products, 0, x)
    for s in range(1, segments):
        square = square + kept(squares, s, x)
        g_sum = g_sum + kept(sums, s, x)
        product = product + kept(products, s, x)
    if centred is not None:
        keep(means, j, kept(mean, 0, x))
    keep_gradient_numbers(square, g_sum, product, k, eps, rstds, bs, cs, j)
    return is_ordinary(square, k, eps, wide) and is_ordinary_gradient(g_sum, product, wide)


@piece
def _piece_gradient(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, p: int, h: int, rows: int, n: int, k: int,
    weight_m: int, m: int, offset: Any, means: Any, rstds: Any, bs: Any, cs: Any, streaming: int, centred: Any,
) -> None:  # fmt: skip
    """The columns of piece p, in the rows h, h + m, … that share row h of dweight; with m = 1 these are all."""
    room = np.empty((2, TILE))
    weight_sums, bias_sums = absent_with(dweight, data(room[0])), absent_with(dbias, data(room[1]))
    for first in range(p * PIECE, min(p * PIECE + PIECE, n), TILE):
        last = min(first + TILE, n)
        clear(weight_sums, 0, last - first)
        clear(bias_sums, 0, last - first)
        for j in range(rows // m):
            write_row_gradient(
                dy, x, weight, dx, weight_sums, bias_sums, first, last, (j * m + h) * n, k, h % weight_m * n, -first,
                offset, means, rstds, bs, cs, j, streaming, PIECE_AHEAD, centred,
            )  # fmt: skip
        put_sums(dweight, h * n + first, weight_sums, last - first, streaming)
        put_sums(dbias, h * n + first, bias_sums, last - first, streaming)


long_backward = Kernel(_long_backward)
