"""Compile kernels in a second process while this one works: in one process Numba compiles one kernel at a time.

The second process leaves its kernels in the cache folder, where this one finds them. If it fails, only time is lost:
what is not in the folder is compiled here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def running(module: str, *arguments: str) -> Iterator[Callable[[], object]]:
    """Run a module whose work compiles kernels; the function that this gives waits until it has ended."""
    if not _would_help():
        yield lambda: None
        return
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process.wait
        finally:
            process.kill()


def _would_help() -> bool:
    from rmsnorm_np.cpu import cache

    return (os.cpu_count() or 1) > 1 and cache.folder() is not None
