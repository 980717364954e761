"""The kernels: how rows are cut into blocks for the cache and for threads.

Both are made of what :mod:`rmsnorm_np.cpu.blocks` does with a few rows:

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

from rmsnorm_np.cpu.blocks import EXTREME, backward_block, bound_for, forward_block, gradient_bound_for
from rmsnorm_np.cpu.gradients import clear
from rmsnorm_np.cpu.jit import Kernel, inlined, optional, piece
from rmsnorm_np.cpu.simd import (
    BLOCK,
    LANES,
    SEGMENT,
    add_atomically,
    counters,
    data,
    float64,
    load,
    rounded,
    store,
    zeros,
)
from rmsnorm_np.cpu.threads import PARALLEL_ELEMENTS, in_parallel

# Elements in a block of rows, which is read twice: in float32 x alone, or x and dy, fit a first-level cache of 32 KiB.
# (Backward with 16384: 5 % slower.) Forward, twice as many halves do, and that is 3 to 8 % faster.
BLOCK_ELEMENTS = 4096
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
def _forward_task(
    task: int, tasks: int, queues: Any, x: Any, weight: Any, bias: Any, y: Any, rows: int, n: int, k: int, m: int,
    bias_m: int, offset: Any, eps: float, streaming: int, centred: Any, skipped: Any, block: int,
) -> None:  # fmt: skip
    blocks = (rows + block - 1) // block
    share = max(1, min(16, blocks // (8 * tasks)))
    for turn in range(tasks):
        part = (task + turn) % tasks
        stop = part_start(part + 1, blocks, tasks)
        b = take(queues, part, part_start(part, blocks, tasks), share)
        while b < stop:
            for first in range(b * block, min(min(b + share, stop) * block, rows), block):
                count = min(block, rows - first)
                some = forward_block(
                    x, weight, bias, y, first * n, first, count, n, k, m, bias_m, offset, eps, streaming, centred,
                    bound_for(skipped, x),
                )  # fmt: skip
                if skipped is not None and some != 0:
                    for j in range(count):
                        skipped[first + j] = EXTREME * (some >> j & 1)
                    add_atomically(queues, tasks * APART, 1)
            b = take(queues, part, part_start(part, blocks, tasks), share)


def _forward(
    x: Any, weight: Any, bias: Any, k: int, m: int, bias_m: int, offset: Any, eps: float, streaming: int,
    centred: Any, skipped: Any, threads: int, y: Any,
) -> bool:  # fmt: skip
    """Whether rows were skipped. Those are marked EXTREME in `skipped`, all zeros before; None: no row can be."""
    rows, n = x.shape
    queues = counters(threads * APART + 1)
    in_parallel(
        _forward_task, threads, threads,
        (threads, queues, data(x), data(weight), data(bias), data(y), rows, n, k, m, bias_m, offset, eps, streaming,
         centred, data(skipped), block_rows(n, BLOCK_ELEMENTS * (2 if x.itemsize == 2 else 1))),
    )  # fmt: skip
    return bool(queues[threads * APART] != 0)


# -------------------------------------------------------------------------------------------------------- backward


@piece
def _backward_task(
    task: int, tasks: int, queues: Any, dy: Any, x: Any, weight: Any, dx: Any, weight_partial: Any, bias_partial: Any,
    rows: int, n: int, k: int, weight_m: int, m: int, chunks: int, offset: Any, eps: float, streaming: int,
    centred: Any, skipped: Any,
) -> None:  # fmt: skip
    """Rows t % m, t % m + m, … of one of `chunks` parts of them, added up in row t of the partial sums; for some t."""
    groups = rows // m
    block = block_rows(n, BLOCK_ELEMENTS)
    for turn in range(tasks):
        part = (task + turn) % tasks
        t = take(queues, part, part_start(part, chunks * m, tasks), 1)
        while t < part_start(part + 1, chunks * m, tasks):
            first, stop = part_start(t // m, groups, chunks), part_start(t // m + 1, groups, chunks)
            clear(weight_partial, t * n, n)
            clear(bias_partial, t * n, n)
            for g in range(first, stop, block):
                count, base, shift = min(block, stop - g), (g * m + t % m) * n, t % m % weight_m * n
                some = backward_block(
                    dy, x, weight, dx, weight_partial, bias_partial, count, base, m * n, n, k, shift, t * n, offset,
                    eps, streaming, centred, gradient_bound_for(skipped),
                )  # fmt: skip
                if skipped is not None and some != 0:
                    for j in range(count):
                        skipped[(g + j) * m + t % m] = EXTREME * (some >> j & 1)
                    add_atomically(queues, tasks * APART, 1)
            t = take(queues, part, part_start(part, chunks * m, tasks), 1)


def _backward(
    dy: Any, x: Any, weight: Any, k: int, weight_m: int, m: int, chunks: int, offset: Any, eps: float, streaming: int,
    centred: Any, skipped: Any, threads: int, dx: Any, weight_partial: Any, bias_partial: Any, dweight: Any,
    dbias: Any,
) -> bool:  # fmt: skip
    """Whether rows were skipped, as in `_forward`: then the partial sums lack them, and are not added up."""
    rows, n = x.shape
    queues = counters(threads * APART + 1)
    in_parallel(
        _backward_task, threads, threads,
        (threads, queues, data(dy), data(x), data(weight), data(dx), data(weight_partial), data(bias_partial), rows, n,
         k, weight_m, m, chunks, offset, eps, streaming, centred, data(skipped)),
    )  # fmt: skip
    if queues[threads * APART] != 0:
        return True
    add_partials(weight_partial, dweight, threads)
    add_partials(bias_partial, dbias, threads)
    return False


@optional("total", lambda partial, total, threads: None)
def add_partials(partial: Any, total: Any, threads: int) -> Any:
    """The rows of partial sums, added up."""
    partials, n = partial.shape
    pieces = (n + SEGMENT - 1) // SEGMENT
    adders = threads if partials * n >= PARALLEL_ELEMENTS else 1
    in_parallel(_add_partials, pieces, adders, (data(partial), data(total), partials, total.shape[0], n))


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


def _add_rows(partial: Any, total: Any, threads: int) -> None:
    add_partials(partial, total, threads)


forward = Kernel(_forward)
backward = Kernel(_backward)
add_rows = Kernel(_add_rows)
