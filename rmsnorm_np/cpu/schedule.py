"""How the rows of a call are cut into blocks for the cache and for threads.

A task takes units of rows: forward a block of rows that stays in the first-level cache; backward a chunk of blocks,
whose shares of dweight and dbias are added up in one row of partial sums; these are added in order at the end.

Work is cut by shape alone, never by the number of threads, so the bits are the same for any number of them.
"""

from __future__ import annotations

from typing import Any

from rmsnorm_np.cpu.arrays import Size, add_atomically, aligner, clearer, counters, hold, lengths, pointers
from rmsnorm_np.cpu.blocks import blocks
from rmsnorm_np.cpu.extremes import is_modest
from rmsnorm_np.cpu.jit import inlined, piece
from rmsnorm_np.cpu.kinds import Arrays, Kinds
from rmsnorm_np.cpu.row import BLOCK, SEGMENT, Program
from rmsnorm_np.cpu.threads import PARALLEL_ELEMENTS, in_parallel
from rmsnorm_np.cpu.tiles import tiles
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import LANES, Work, Writer
from rmsnorm_np.ops.operation import Totals

# Elements in a block of rows, which is read twice: in float32 x alone, or x and dy, fit a first-level cache of 32 KiB.
# (Backward with 16384: 5 % slower.) Forward, twice as many halves do, and that is 3 to 8 % faster.
BLOCK_ELEMENTS = 4096
NO_TOTALS = Totals()  # of a kernel: a record without arrays
# Each thread has its part of the work in a queue. When that is empty it takes from the others' queues: a core that is
# slow or busy does less, and yet the same rows meet the same core's cache in each call.
APART = 8  # places between two queues: a cache line


@inlined
def part_start(part: Any, items: Any, parts: Any) -> Any:
    return items * part // parts


def totals_task(name: str) -> Any:
    """add(p, partial, total, rows, m, n): columns of piece p. Rows h, h + m, … of the partial sums, added in this
    order, are row h of the total.
    """
    plain = Work("double", LANES)

    def load(w: Writer, partial: Any, i: Any, count: Any) -> Any:
        return w.load(partial, "float64", i, plain, count)

    first = step(load, plain.leaf)
    add = step(lambda w, sums, partial, i, count: sums + load(w, partial, i, count), plain.leaf)
    put = step(lambda w, total, i, sums, count: w.store(total, name, i, sums, count) and None)

    @piece
    def task(p: Any, partial: Any, total: Any, rows: Any, m: Any, n: Any) -> Any:
        for h in range(m):
            for i in range(p * SEGMENT, min(p * SEGMENT + SEGMENT, n), LANES):
                count = min(LANES, n - i)
                sums = first((partial, h * n + i, count))
                for t in range(h + m, rows, m):
                    sums = add((sums, partial, t * n + i, count))
                put((total, h * n + i, sums, count))

    return task


def adder(name: str | None) -> Any:
    """add(partial, rows, total, threads): the rows of partial sums added up, rounded to the dtype of this name."""
    if name is None:
        return inlined(lambda partial, rows, total, threads: None)
    task = totals_task(name)

    @inlined
    def add(partial: Any, rows: Any, total: Any, threads: Any) -> Any:
        m, n = total.shape
        pieces = (n + SEGMENT - 1) // SEGMENT
        adders = threads if rows * n >= PARALLEL_ELEMENTS else 1
        in_parallel(task, pieces, adders, (partial, pointers(total), rows, m, n))

    return add


def adding_kernel(name: str) -> Any:
    """kernel(partial, total, threads): `adder` by itself."""
    add = adder(name)
    return lambda partial, total, threads: add(pointers(partial), len(partial), total, threads)


def ways(kinds: Kinds) -> tuple[Any, Any, Any, Any]:
    """How blocks are taken: height(n), rows of one; count_of(g, end, size), rows of that which begins with row g;
    new_room(size), memory of a thread's; run(room, …), which is `blocks.block`.
    """
    block, elements = blocks(kinds), BLOCK_ELEMENTS * (2 if kinds.work.name == "single" else 1)
    height = inlined(lambda n: min(BLOCK, max(1, elements // n)))
    if kinds.apart:
        return tiles(kinds, block, height)
    count_of = inlined(lambda g, end, size: min(size.block, end - g))
    return height, count_of, inlined(lambda size: None), inlined(lambda room, *arguments: block(*arguments))


def rows_kernel(kinds: Kinds) -> Any:
    """The kernel for blocks of rows, and how many rows it marks.

    Forward: kernel(reads, columns, writes, k, eps, streaming, marks, threads).
    Backward: kernel(reads, columns, writes, partials, totals, (k, eps, streaming, m, chunks), marks, threads), with
    room for chunks * m * n partial sums from its first cache line on, and totals that they are added up in if no row
    was marked.
    """
    clear, (height, count_of, new_room, block) = clearer(), ways(kinds)
    aligned, modest = aligner(kinds), is_modest(Program(kinds))
    has_totals = kinds.operation.share is not None
    add_dweight, add_dbias = map(adder, kinds.totals)

    if has_totals:

        @inlined
        def groups_of(unit: Any, size: Any) -> Any:
            """(h, first, last): the unit has the rows g · m + h, for g from first to last."""
            h, chunk, groups = unit % size.m, unit // size.m, size.rows // size.m
            return h, part_start(chunk, groups, size.chunks), part_start(chunk + 1, groups, size.chunks)

    else:

        @inlined
        def groups_of(unit: Any, size: Any) -> Any:
            first = unit * size.block
            return 0, first, min(first + size.block, size.rows)

    @piece
    def task(t: Any, tasks: Any, queues: Any, arrays: Any, size: Any, marks: Any) -> Any:
        units = size.chunks * size.m
        held = new_room(size)
        room = pointers(held)
        share = 1 if has_totals else max(1, min(16, units // (8 * tasks)))
        marked = 0
        for turn in range(tasks):
            part = (t + turn) % tasks
            first, stop = part_start(part, units, tasks), part_start(part + 1, units, tasks)
            # taking waits until all that was written past the cache has arrived: not to be done for each few rows
            u = first + add_atomically(queues, part * APART, share)
            while u < stop:
                for unit in range(u, min(u + share, stop)):
                    h, begin, end = groups_of(unit, size)
                    clear((arrays.totals, unit * size.n, size.n))
                    g = begin
                    while g < end:
                        count = count_of(g, end, size)
                        marked += block(room, arrays, size, marks, g * size.m + h, size.m, count, unit * size.n)
                        g += count
                u = first + add_atomically(queues, part * APART, share)
        hold(held)
        if marked > 0:
            add_atomically(queues, tasks * APART, marked)

    def forward(
        reads: Any, columns: Any, writes: Any, k: Any, eps: Any, streaming: Any, marks: Any, threads: Any
    ) -> Any:
        rows, n, inner, weight_m, bias_m = lengths(reads, columns)
        chunks = (rows + height(n) - 1) // height(n)
        arrays = Arrays(pointers(reads), pointers(columns), pointers(writes), NO_TOTALS)
        are_modest = modest(arrays, n) if weight_m == 1 else 1
        size = Size(k, pointers(eps), streaming, 1, chunks, rows, n, n, inner, weight_m, bias_m, height(n), are_modest)
        queues = counters(threads * APART + 1)
        in_parallel(task, threads, threads, (threads, queues, arrays, size, pointers(marks)))
        return queues[threads * APART]

    def backward(
        reads: Any, columns: Any, writes: Any, partials: Any, totals: Any, settings: Any, marks: Any, threads: Any
    ) -> Any:
        rows, n, inner, weight_m, bias_m = lengths(reads, columns)
        k, eps, streaming, m, chunks = settings
        own = aligned((pointers(partials),))
        arrays = Arrays(pointers(reads), pointers(columns), pointers(writes), own)
        are_modest = modest(arrays, n) if weight_m == 1 else 1
        size = Size(k, eps, streaming, m, chunks, rows, n, n, inner, weight_m, bias_m, height(n), are_modest)
        queues = counters(threads * APART + 1)
        in_parallel(task, threads, threads, (threads, queues, arrays, size, pointers(marks)))
        marked = queues[threads * APART]
        if marked == 0:
            add_dweight(own.dweight, chunks * m, totals.dweight, threads)
            add_dbias(own.dbias, chunks * m, totals.dbias, threads)
        return marked

    return backward if has_totals else forward
