"""The machine's limit: the traffic of a norm with next to no arithmetic, measured in the same run as the norms.

Forward reads one array and writes one (copy); backward reads two and writes one (triad). Stores go past the cache
where the engine's would. Nothing that moves the same bytes with the same processor can be much faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import prange

from rmsnorm_np.cpu import memory, threads
from rmsnorm_np.cpu.jit import Kernel, piece
from rmsnorm_np.cpu.simd import LANES, data, float64, load, rounded, store, stream

PIECE = 1 << 14  # float64 that a thread takes at a time, 128 KiB


def calls(nbytes: int) -> dict[str, Callable[[], None]]:
    """The copy and the copy followed by the triad, on arrays of about `nbytes`; by the direction they are limits of."""
    count = -(-nbytes // (8 * LANES)) * LANES  # whole vectors of float64: bytes are bytes, and these need no conversion
    x, z, y = (memory.empty((1, count), np.dtype(np.float64)) for _ in range(3))
    for array in (x, z, y):
        array[...] = 1.0
    streaming = memory.streams(y)

    def run(kernel: Kernel, *args: Any) -> None:
        chosen, _ = threads.choose(kernel, 2 * count)
        (chosen.compiled.get(None) or chosen.compile(None, args))(*args)

    def forward() -> None:
        run(copy, x[0], y[0], streaming)

    def both() -> None:
        forward()
        run(triad, x[0], z[0], y[0], streaming)

    return {"forward": forward, "forward+backward": both}


def _copy(x: Any, y: Any, streaming: int) -> None:
    for p in prange((len(x) + PIECE - 1) // PIECE):
        _copy_piece(data(x), data(y), p * PIECE, min(p * PIECE + PIECE, len(x)), streaming)


@piece
def _copy_piece(x: Any, y: Any, start: int, stop: int, streaming: int) -> None:
    if streaming:
        for i in range(start, stop, LANES):
            stream(y, i, rounded(load(x, i, float64)))
    else:
        for i in range(start, stop, LANES):
            store(y, i, rounded(load(x, i, float64)))


def _triad(x: Any, z: Any, y: Any, streaming: int) -> None:
    for p in prange((len(x) + PIECE - 1) // PIECE):
        _triad_piece(data(x), data(z), data(y), p * PIECE, min(p * PIECE + PIECE, len(x)), streaming)


@piece
def _triad_piece(x: Any, z: Any, y: Any, start: int, stop: int, streaming: int) -> None:
    if streaming:
        for i in range(start, stop, LANES):
            stream(y, i, rounded(load(x, i, float64)) + rounded(load(z, i, float64)))
    else:
        for i in range(start, stop, LANES):
            store(y, i, rounded(load(x, i, float64)) + rounded(load(z, i, float64)))


copy = Kernel(_copy)
triad = Kernel(_triad)
