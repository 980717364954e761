"""The machine's limit: the traffic of a norm with next to no arithmetic, measured in the same run as the norms.

Forward reads one array and writes one (copy); backward reads two and writes one (triad). Stores go past the cache
where the engine's would. Nothing that moves the same bytes with the same processor can be much faster.

These kernels are compiled in each process: the cache on disk keeps those of `rmsnorm_np.cpu` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rmsnorm_np.cpu import memory, threads
from rmsnorm_np.cpu.jit import Kernel, piece
from rmsnorm_np.cpu.simd import LANES, data, float64, load, rounded, store, stream
from rmsnorm_np.cpu.threads import in_parallel

PIECE = 1 << 14  # float64 that a thread takes at a time, 128 KiB


def calls(nbytes: int) -> dict[str, Callable[[], None]]:
    """The copy and the copy followed by the triad, on arrays of about `nbytes`; by the direction they are limits of."""
    count = -(-nbytes // (8 * LANES)) * LANES  # whole vectors of float64: bytes are bytes, and these need no conversion
    x, z, y = (memory.empty((1, count), np.dtype(np.float64)) for _ in range(3))
    for array in (x, z, y):
        array[...] = 1.0
    streaming = memory.streams(y)

    def run(kernel: Kernel, *args: Any) -> None:
        args = (*args, threads.choose(2 * count))
        (kernel.compiled.get(None) or kernel.compile(None, args))(*args)

    def forward() -> None:
        run(copy, x[0], y[0], streaming)

    def both() -> None:
        forward()
        run(triad, x[0], z[0], y[0], streaming)

    return {"forward": forward, "forward+backward": both}


def _copy(x: Any, y: Any, streaming: int, on_threads: int) -> None:
    in_parallel(_copy_piece, -(-len(x) // PIECE), on_threads, (data(x), data(y), len(x), streaming))


@piece
def _copy_piece(p: int, x: Any, y: Any, count: int, streaming: int) -> None:
    start, stop = p * PIECE, min(p * PIECE + PIECE, count)
    if streaming:
        for i in range(start, stop, LANES):
            stream(y, i, rounded(load(x, i, float64)))
    else:
        for i in range(start, stop, LANES):
            store(y, i, rounded(load(x, i, float64)))


def _triad(x: Any, z: Any, y: Any, streaming: int, on_threads: int) -> None:
    in_parallel(_triad_piece, -(-len(x) // PIECE), on_threads, (data(x), data(z), data(y), len(x), streaming))


@piece
def _triad_piece(p: int, x: Any, z: Any, y: Any, count: int, streaming: int) -> None:
    start, stop = p * PIECE, min(p * PIECE + PIECE, count)
    if streaming:
        for i in range(start, stop, LANES):
            stream(y, i, rounded(load(x, i, float64)) + rounded(load(z, i, float64)))
    else:
        for i in range(start, stop, LANES):
            store(y, i, rounded(load(x, i, float64)) + rounded(load(z, i, float64)))


copy = Kernel(_copy)
triad = Kernel(_triad)
