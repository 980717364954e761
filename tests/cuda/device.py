"""Device arrays for the tests of the CUDA engine: a GPU's or, without one, arrays on which compiled PTX is executed."""

from __future__ import annotations

import types
from functools import lru_cache

import numpy as np
import ptx
from numba import cuda
from numba.cuda import dispatcher

from rmsnorm_np import cuda as engine
from rmsnorm_np.cuda import arrays, copies, kernel, launch
from rmsnorm_np.cuda.words import STORED

EXECUTED = not cuda.is_available()
CAPABILITY = (9, 0)
GUARD = 256  # bytes around each array, that are out of bounds


class HostArray:
    """An array in host memory that says it lies on a GPU."""

    stream = 0

    def __init__(self, host):
        self.host, self.shape, self.dtype, self.strides = host, host.shape, host.dtype, host.strides

    @property
    def __cuda_array_interface__(self):
        typestr = "<V2" if self.dtype.name == "bfloat16" else self.dtype.str
        data = self.host.ctypes.data, False
        return {"shape": self.shape, "strides": self.strides, "typestr": typestr, "data": data, "version": 3}

    def __getitem__(self, index):
        return HostArray(self.host[index])


class Device:
    """The memory of all arrays, and what has been launched on it."""

    def __init__(self):
        self.memory, self.launched = [], []

    def array(self, host):
        host = np.asarray(host)
        room = np.full(host.nbytes + 2 * GUARD, 0xFF, np.uint8)
        start = GUARD - room.ctypes.data % GUARD
        place = room[start : start + host.nbytes].view(host.dtype).reshape(host.shape)
        place[...] = host
        self.memory.append(place)
        return HostArray(place)

    def launch(self, kernel_, blocks, stream, *arguments):
        module = compiled(kernel_)
        bits = [np.array(a, np.float64 if isinstance(a, float) else np.int64).view(np.uint64)[()] for a in arguments]
        machine = ptx.Machine(module, blocks, kernel_.threads, bits, ptx.Memory(self.memory))
        self.launched.append((kernel_.function.__name__, machine.run()))


@lru_cache
def compiled(kernel_):
    code = cuda.compile(
        kernel_.function, kernel_.arguments, device=False, abi="numba", output="ptx", cc=kernel_.capability,
        launch_bounds=kernel_.bounds,
    )[0]  # fmt: skip
    return ptx.Module(code if isinstance(code, str) else code.decode())


device = Device()


def viewed(array, shape, strides, dtype):
    memory = array.host.reshape(-1).view(np.uint8)
    return HostArray(np.ndarray(shape, dtype, memory, 0, strides))


def pretend(monkeypatch):
    """Without a GPU: let the engine work on host memory."""
    engine._plan_for.cache_clear()  # of plans with the limits of another test
    device.memory, device.launched = [], []
    if not EXECUTED:
        return
    here = types.SimpleNamespace(compute_capability=CAPABILITY)
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: here)
    monkeypatch.setattr(arrays, "capability_here", lambda: CAPABILITY)
    monkeypatch.setattr(arrays, "empty", lambda shape, dtype, stream: device.array(np.zeros(shape, dtype)))
    # full of NaN: nothing may be read that was not written
    room = lambda size: device.array(np.full(size, 0xFF, np.uint8)).host.ctypes.data  # noqa: E731
    monkeypatch.setattr(arrays, "scratch", lambda sizes, stream: list(map(room, sizes)))
    monkeypatch.setattr(arrays, "viewed", viewed)
    monkeypatch.setattr(kernel.Kernel, "__call__", lambda self, *a: device.launch(self, *a))


def to_device(host):
    """A copy there; its bits travel, for Numba knows no bfloat16."""
    if EXECUTED:
        return device.array(host)
    if host.dtype.name.startswith("float8"):
        return arrays.viewed(cuda.to_device(host.view(np.uint8)), host.shape, host.strides, host.dtype)
    return cuda.to_device(host) if host.dtype.name not in STORED else arrays.to_device(host)


def to_host(array):
    if array is None:
        return None
    if EXECUTED:
        return np.array(array.host)
    bits = np.dtype(STORED.get(array.dtype.name, np.uint8))
    return arrays.viewed(array, array.shape, array.strides, bits).copy_to_host().view(array.dtype)


def view_of(array, shape, strides, dtype):
    return arrays.viewed(array, shape, strides, np.dtype(dtype))


def fill(array, host):
    copies.copy(arrays.seen("host", to_device(host)), arrays.seen("array", array), arrays.capability_here(), 0)


SMALL = {
    "MAX_TEAM": 64, "BLOCK": 32, "PIECE_TEAM": 64, "FORWARD_TRIPS": 2, "FORWARD_WARP_TRIPS": 2,
    "FORWARD_LONG_TRIPS": 2, "BACKWARD_TRIPS": 2, "MULTIPROCESSORS": 3, "ROWS_PER_CHUNK": 2, "RARE_BLOCKS": 3,
    "SLICES": (4, 2), "MANY_TASKS": 3,
}  # fmt: skip


def pretend_small(monkeypatch):
    """And with small limits: a block is two warps, a thread has two vectors at most, small rows cross every border."""
    pretend(monkeypatch)
    for name, value in SMALL.items():
        monkeypatch.setattr(launch, name, value)
