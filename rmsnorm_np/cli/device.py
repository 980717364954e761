"""What `bench` needs on a GPU: arrays there, the same bytes copied on the device, and time by CUDA events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rmsnorm_np import _backends
from rmsnorm_np.cli.peers import Problem
from rmsnorm_np.cli.timing import Call


def require() -> None:
    """Leave the command, saying what is missing, where the CUDA engine cannot run."""
    try:
        _backends.select(None, "cuda")
    except ImportError as error:
        raise SystemExit(str(error)) from error
    from numba import cuda

    if not cuda.is_available():
        raise SystemExit("backend 'cuda' needs a CUDA device and its driver, none was found")


def moved(problem: Problem) -> Problem:
    """The same problem with its arrays on the device."""
    from rmsnorm_np.cuda.arrays import to_device

    arrays = {name: to_device(getattr(problem, name)) for name in ("x", "weight", "dy")}
    return replace(problem, **arrays)


def empty_like(array: Any) -> Any:
    """A new device array."""
    from numba import cuda

    return cuda.device_array(array.shape, array.dtype)


def copies(nbytes: int) -> Call:
    """A call that moves this many bytes on the device: half of them read, half written."""
    from numba import cuda

    source, target = (cuda.device_array(nbytes // 2, "uint8") for _ in range(2))
    return lambda: target.copy_to_device(source)


def seconds(call: Call, calls: int) -> float:
    """Seconds per call over ``calls`` calls in a row, between two events on the default stream."""
    from numba import cuda

    first, last = cuda.event(), cuda.event()
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / calls
