"""The kernels: how rows are cut into blocks for the cache and for threads.

Both are made of what :mod:`rmsnorm_np.cpu.rows` and :mod:`rmsnorm_np.cpu.gradients` do with one row:

- `forward`: blocks of rows that stay in the first-level cache, in two passes: the sums of each row, then the output.
- `backward`: the same with x and dy; each task adds up its share of dweight and dbias in a row of `partial`, and the
  shares are added in order at the end.

Rows that are too long for one thread are in :mod:`rmsnorm_np.cpu.long_rows`.

Work is cut by shape alone, never by the number of threads, and a row's sums are added in an order that depends on n
alone: so the bits are the same for any batch and any number of threads.

Shapes: x, dy, y, dx (rows, n); weight, bias (m, n), where row r uses row r % m.
"""

from __future__ import annotations

from typing import Any

from rmsnorm_np.cpu.extreme import forward_extreme_row, is_ordinary, is_ordinary_gradient, write_extreme_gradient
from rmsnorm_np.cpu.gradients import (
    clear,
    keep_gradient_numbers,
    keep_moments,
    write_row_gradient,
    write_short_gradient,
)
from rmsnorm_np.cpu.jit import Kernel, inlined, piece
from rmsnorm_np.cpu.rows import (
    forward_precision,
    keep_mean,
    keep_statistics,
    kept_mean,
    reciprocal_root,
    write_output,
    write_short_output,
)
from rmsnorm_np.cpu.simd import (
    BLOCK,
    LANES,
    SEGMENT,
    add_atomically,
    counters,
    data,
    float64,
    keep,
    kept,
    load,
    rounded,
    scratch,
    store,
    width,
    zeros,
)
from rmsnorm_np.cpu.threads import PARALLEL_ELEMENTS, in_parallel

# Elements in a block of rows, which is read twice: in float32 x alone, or x and dy, fit a first-level cache of 32 KiB.
# (Backward with 16384: 5 % slower.) Forward, twice as many halves do, and that is 3 to 8 % faster.
BLOCK_ELEMENTS = 4096
SHORT_ROW = 64  # up to here what is done once a row counts: with 16 elements 1.35 times as fast, with 64 the same
# Each thread has its part of the work in a queue. When that is empty it takes from the others' queues: a core that is
# slow or busy does less, and yet the same rows meet the same core's cache in each call.
APART = 8  # places between two queues: a cache line


@inlined
def part_start(part: int, items: int, parts: int) -> int:
    return items * part // parts


@inlined
def take(queues: Any, part: int, first: int, count: int) -> int:
    """The next number of a part whose numbers begin with `first`; it and the `count` from it on are this thread's.

    It waits until all that was written past the cache has arrived: not to be done for each few rows.
    """
    return first + add_atomically(queues, part * APART, count)


@inlined
def block_rows(n: int, elements: int) -> int:
    return min(BLOCK, max(1, elements // n))


# --------------------------------------------------------------------------------------------------------- forward


@piece
def _forward_block(
    x: Any, weight: Any, bias: Any, y: Any, first: int, rows: int, n: int, k: int, m: int, bias_m: int, offset: Any,
    eps: float, streaming: int, centred: Any, wide: Any,
) -> None:  # fmt: skip
    work = forward_precision(centred)
    means, totals, rstds = scratch(), scratch(), scratch()
    for j in range(rows):
        keep_statistics(x, (first + j) * n, n, k, means, totals, j, centred, work, rows * n if streaming else 0)
    for j in range(rows):  # a loop of its own: LLVM takes several roots and divisions at once
        keep(rstds, j, reciprocal_root(kept(totals, j, x), k, eps))
    h, bias_h = first % m, first % bias_m
    short = n <= SHORT_ROW and n % width(x, work) == 0  # then memory.streams has seen to it that rows begin on lines
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


@piece
def _forward_task(
    task: int, tasks: int, queues: Any, x: Any, weight: Any, bias: Any, y: Any, rows: int, n: int, k: int, m: int,
    bias_m: int, offset: Any, eps: float, streaming: int, centred: Any, wide: Any, block: int,
) -> None:  # fmt: skip
    blocks = (rows + block - 1) // block
    share = max(1, min(16, blocks // (8 * tasks)))
    for turn in range(tasks):
        part = (task + turn) % tasks
        stop = part_start(part + 1, blocks, tasks)
        b = take(queues, part, part_start(part, blocks, tasks), share)
        while b < stop:
            for first in range(b * block, min(min(b + share, stop) * block, rows), block):
                _forward_block(
                    x, weight, bias, y, first, min(block, rows - first), n, k, m, bias_m, offset, eps, streaming,
                    centred, wide,
                )  # fmt: skip
            b = take(queues, part, part_start(part, blocks, tasks), share)


def _forward(
    x: Any, weight: Any, bias: Any, k: int, m: int, bias_m: int, offset: Any, eps: float, streaming: int,
    centred: Any, wide: Any, threads: int, y: Any,
) -> None:  # fmt: skip
    rows, n = x.shape
    queues = counters(threads * APART)
    in_parallel(
        _forward_task, threads, threads,
        (threads, queues, data(x), data(weight), data(bias), data(y), rows, n, k, m, bias_m, offset, eps, streaming,
         centred, wide, block_rows(n, BLOCK_ELEMENTS * (2 if x.itemsize == 2 else 1))),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- backward


@piece
def _backward_block(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, rows: int, base: int, step: int, n: int, k: int,
    shift: int, sum_shift: int, offset: Any, eps: float, streaming: int, centred: Any, wide: Any,
) -> None:  # fmt: skip
    """Rows that start at base, base + step, …; shift and sum_shift: where their row of weight and of dweight starts."""
    means, rstds, bs, cs = scratch(), scratch(), scratch(), scratch()
    # while this block's sums are taken, dy of the next is fetched, and x while its gradients are written: neither
    # memory nor arithmetic waits for the other (measured: x and dy both at the end 1.1, not at all 1.3 times as long)
    ahead = rows * step if streaming else 0
    for j in range(rows):
        start = base + j * step
        keep_mean(x, start, n, means, j, centred)
        keep_moments(
            dy, x, weight, start, n, k, shift - start, offset, kept_mean(means, j, x, centred), ahead, rstds, bs, cs, j
        )
    ordinary = True
    for j in range(rows):  # a loop of its own, as in forward
        ordinary &= is_ordinary(kept(rstds, j, x), k, eps, wide)
        ordinary &= is_ordinary_gradient(kept(bs, j, x), kept(cs, j, x), wide)
        keep_gradient_numbers(x, k, eps, rstds, bs, cs, j)
    if ordinary:
        short = n <= SHORT_ROW and n % LANES == 0 and k == n
        for j in range(rows):
            if short:
                write_short_gradient(
                    dy, x, weight, dx, dweight, dbias, base + j * step, n, shift, sum_shift, offset, means, rstds, bs,
                    cs, j, streaming, ahead, centred,
                )  # fmt: skip
            else:
                write_row_gradient(
                    dy, x, weight, dx, dweight, dbias, 0, n, base + j * step, k, shift, sum_shift, offset, means, rstds,
                    bs, cs, j, streaming, ahead, centred,
                )  # fmt: skip
    elif wide is not None:
        for j in range(rows):
            write_extreme_gradient(
                dy, x, weight, dx, dweight, dbias, base + j * step, n, k, shift, sum_shift, offset, eps, centred, wide
            )


@piece
def _backward_task(
    task: int, tasks: int, queues: Any, dy: Any, x: Any, weight: Any, dx: Any, weight_partial: Any, bias_partial: Any,
    rows: int, n: int, k: int, weight_m: int, m: int, chunks: int, offset: Any, eps: float, streaming: int,
    centred: Any, wide: Any,
) -> None:  # fmt: skip
    """Rows t % m, t % m + m, … of one of `chunks` parts of them, added up in row t of the partial sums; for some t."""
    groups = rows // m
    block = block_rows(n, BLOCK_ELEMENTS)
    for turn in range(tasks):
        part = (task + turn) % tasks
        t = take(queues, part, part_start(part, chunks * m, tasks), 1)
        while t < part_start(part + 1, chunks * m, tasks):
            first, stop = groups * (t // m) // chunks, groups * (t // m + 1) // chunks
            clear(weight_partial, t * n, n)
            clear(bias_partial, t * n, n)
            for g in range(first, stop, block):
                _backward_block(
                    dy, x, weight, dx, weight_partial, bias_partial, min(block, stop - g), (g * m + t % m) * n, m * n,
                    n, k, t % m % weight_m * n, t * n, offset, eps, streaming, centred, wide,
                )  # fmt: skip
            t = take(queues, part, part_start(part, chunks * m, tasks), 1)


def _backward(
    dy: Any, x: Any, weight: Any, k: int, weight_m: int, m: int, chunks: int, offset: Any, eps: float, streaming: int,
    centred: Any, wide: Any, threads: int, dx: Any, weight_partial: Any, bias_partial: Any, dweight: Any, dbias: Any,
) -> None:  # fmt: skip
    rows, n = x.shape
    queues = counters(threads * APART)
    in_parallel(
        _backward_task, threads, threads,
        (threads, queues, data(dy), data(x), data(weight), data(dx), data(weight_partial), data(bias_partial), rows, n,
         k, weight_m, m, chunks, offset, eps, streaming, centred, wide),
    )  # fmt: skip
    pieces = (n + SEGMENT - 1) // SEGMENT
    adders = threads if chunks * m * n >= PARALLEL_ELEMENTS else 1
    if dweight is not None:
        in_parallel(
            _add_partials, pieces, adders, (data(weight_partial), data(dweight), chunks * m, dweight.shape[0], n)
        )
    if dbias is not None:
        in_parallel(_add_partials, pieces, adders, (data(bias_partial), data(dbias), chunks * m, dbias.shape[0], n))


@piece
def _add_partials(p: int, partial: Any, total: Any, partials: int, m: int, n: int) -> None:
    """Rows h, h + m, … of the partial sums, added in this order, are row h of the total."""
    like = rounded(zeros(partial, float64))
    for h in range(m):
        for i in range(p * SEGMENT, min(p * SEGMENT + SEGMENT, n), LANES):
            count = min(LANES, n - i)
            lanes = load(partial, h * n + i, like, count)
            for t in range(h + m, partials, m):
                lanes = lanes + load(partial, t * n + i, like, count)
            store(total, h * n + i, lanes, count)


forward = Kernel(_forward)
backward = Kernel(_backward)
