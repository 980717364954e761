"""On how many threads a kernel runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba

if TYPE_CHECKING:
    from rmsnorm_np.cpu.jit import Kernel

# Starting threads costs 3 to 5 µs, as long as one thread needs for so many elements (forward, float32).
PARALLEL_ELEMENTS = 16384


def choose(kernel: Kernel, elements: int) -> tuple[Any, int]:
    """The kernel compiled for all of Numba's threads, or the serial one where that is sooner done; and its tasks."""
    threads = numba.config.NUMBA_NUM_THREADS
    if elements < PARALLEL_ELEMENTS or threads == 1:
        return kernel.serial, 1
    return kernel.parallel, threads
