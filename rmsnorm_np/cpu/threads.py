"""On how many threads a kernel runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba

if TYPE_CHECKING:
    from rmsnorm_np.cpu.jit import Kernel

# Starting threads costs 2 to 5 µs, as long as one thread needs for so many elements (forward, float32).
PARALLEL_ELEMENTS = 16384


def launch(kernel: Kernel, elements: int, *arguments: Any) -> None:
    """Run the kernel on all of Numba's threads, or serially where that is sooner done."""
    if elements < PARALLEL_ELEMENTS or numba.get_num_threads() == 1:
        kernel.serial(*arguments)
    else:
        kernel.parallel(*arguments)
