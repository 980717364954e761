"""What `bench` needs on a GPU: arrays there, the same bytes copied on the device, and time by CUDA events."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from rmsnorm_np import _backends
from rmsnorm_np.cli.peers import Problem
from rmsnorm_np.cli.timing import Call


def missing() -> str | None:
    """What the CUDA engine lacks on this machine, None where it can run."""
    try:
        _backends.select(None, "cuda")
    except ImportError as error:
        return str(error)
    from numba import cuda

    try:
        if cuda.is_available():
            return None
        reason = cuda.cuda_error()  # None where the driver works
    except RuntimeError as error:  # a driver that lacks a function
        reason = str(error)
    if reason is None:
        return 'the CUDA toolkit was not found: pip install "rmsnorm_np[cuda13]", or [cuda12] for a CUDA 12 driver'
    if "NO_DEVICE" in reason:
        return "the NVIDIA driver finds no CUDA device"
    if "cannot be found" in reason:
        return "no NVIDIA driver was found"
    return f"the NVIDIA driver does not start: {' '.join(reason.split())}"


def require() -> None:
    """Refuse, with `argparse.ArgumentError`, where the CUDA engine cannot run."""
    reason = missing()
    if reason is not None:
        raise argparse.ArgumentError(None, f"argument --backend: {reason}")


def moved(problem: Problem) -> Problem:
    """The same problem with its arrays on the device."""
    from rmsnorm_np.cuda.arrays import to_device

    arrays = {name: getattr(problem, name) for name in ("x", "weight", "dy", "residual", "dh")}
    return replace(problem, **{name: to_device(array) for name, array in arrays.items() if array is not None})


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
