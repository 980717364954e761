"""Device arrays for the tests of the CUDA engine: a GPU's, or those of Numba's simulator."""

from __future__ import annotations

import numpy as np
from numba import config, cuda

SIMULATED = bool(config.ENABLE_CUDASIM)
if SIMULATED:
    import simulated

    simulated.install()  # before the engine asks Numba for what the simulator lacks

from rmsnorm_np.cuda import arrays, copies, launch  # noqa: E402
from rmsnorm_np.cuda.vector import STORED  # noqa: E402


def to_device(host):
    """A copy there; its bits travel, for Numba knows no bfloat16."""
    if SIMULATED:
        return simulated.to_device(host)
    if host.dtype.name not in STORED:
        return cuda.to_device(host)
    return arrays.to_device(host)


def to_host(array):
    if array is None:
        return None
    if SIMULATED:
        return array.copy_to_host()
    bits = np.dtype(STORED[array.dtype.name])
    return arrays.viewed(array, array.shape, array.strides, bits).copy_to_host().view(array.dtype)


def view_of(array, shape, strides, dtype):
    return arrays.viewed(array, shape, strides, np.dtype(dtype))


def fill(array, host):
    copies.copy(arrays.seen("host", to_device(host)), arrays.seen("array", array), arrays.capability_here(), 0)


def limit(**limits):
    """Let the engine have these limits in place of those of `launch`."""
    for name, value in limits.items():
        assert hasattr(launch, name), name
        setattr(launch, name, value)
