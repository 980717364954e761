"""The machine's limit: the traffic of a norm with next to no arithmetic, measured in the same run as the norms.

Forward reads one array and writes one (copy), or two and two where a residual is added; backward reads two, or three,
and writes one (triad). Stores go past the cache where the engine's would. Nothing that moves the same bytes with the
same processor can be much faster.

These kernels are compiled in each process: the cache on disk keeps those of `rmsnorm_np.cpu` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from rmsnorm_np.cpu import memory, threads
from rmsnorm_np.cpu.arrays import pointers
from rmsnorm_np.cpu.jit import compiled, piece
from rmsnorm_np.cpu.threads import in_parallel
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import LANES, Work, Writer

PIECE = 1 << 14  # float64 that a thread takes at a time, 128 KiB


def calls(nbytes: int, adds: bool = False) -> dict[str, Callable[[], None]]:
    """The copy and the copy followed by the triad, on arrays of about `nbytes`; by the direction they are limits of.

    adds: with the residual's arrays: two copies, and a triad that reads three.
    """
    count = -(-nbytes // (8 * LANES)) * LANES  # whole vectors of float64: bytes are bytes, and these need no conversion
    arrays = [memory.empty((1, count), np.dtype(np.float64)) for _ in range(5 if adds else 3)]
    for array in arrays:
        array[...] = 1.0
    streaming = bool(memory.streams(arrays[2]))
    x, z, y, *more = (array[0] for array in arrays)  # more: residual and h

    def run(y: Any, *reads: Any) -> None:
        _kernel(len(reads), streaming)(reads, y, threads.choose(2 * count))

    def forward() -> None:
        run(y, x)
        if adds:
            run(more[1], more[0])

    def both() -> None:
        forward()
        run(y, x, z, *more[1:])

    return {"forward": forward, "forward+backward": both}


@cache
def _kernel(count: int, streaming: bool) -> Callable[..., None]:
    """kernel(reads, y, threads): y = the sum of so many arrays."""
    doubles = Work("double", LANES)

    def move(w: Writer, reads: Any, y: Any, i: Any) -> None:
        number = sum(
            (w.load(data, "float64", i, doubles) for data in reads[1:]), w.load(reads[0], "float64", i, doubles)
        )
        (w.stream if streaming else w.store)(y, "float64", i, number)

    move_vector = step(move)

    @piece
    def move_piece(p: Any, reads: Any, y: Any, n: Any) -> Any:
        for i in range(p * PIECE, min(p * PIECE + PIECE, n), LANES):
            move_vector((reads, y, i))

    def kernel(reads: Any, y: Any, on_threads: Any) -> Any:
        in_parallel(move_piece, -(-len(y) // PIECE), on_threads, (pointers(reads), pointers(y), len(y)))

    array = np.empty(LANES)
    return compiled(None, lambda: kernel, ((array,) * count, array, 1))
