"""Compile kernels in a second process while this one works: in one process Numba compiles one kernel at a time.

The second process leaves its kernels in the cache folder, where this one finds them. If it fails, nothing is lost but
time: what is not in the folder is compiled here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def compiling(dtypes: Sequence[str]) -> Iterator[Callable[[], object]]:
    """Start compiling what the checks of these dtypes need; call what this gives to wait until it is done."""
    if not _would_help():
        yield lambda: None
        return
    command = [sys.executable, "-m", "rmsnorm_np.cli.ahead", *dtypes]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process.wait
        finally:
            process.kill()


def _would_help() -> bool:
    from numba import config

    from rmsnorm_np.cpu import cache

    return (os.cpu_count() or 1) > 1 and not config.DISABLE_JIT and cache.folder() is not None


def main(dtypes: Sequence[str]) -> None:
    """Run the checks of one layer, for the kernels they compile."""
    from rmsnorm_np.cli import checks
    from rmsnorm_np.cli.inputs import NORMS, activations

    activation = activations()[0]
    for dtype in checks.dtypes():
        for norm in NORMS:
            if dtype.name in dtypes:
                checks.check_engine(norm, activation, dtype)
                if dtype.name == "float64":
                    checks.check_gradients(norm, activation, "cpu")


if __name__ == "__main__":
    main(sys.argv[1:])
