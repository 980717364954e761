"""What numba's CUDA simulator lacks, for the tests only: shuffles, intrinsics, one array per `shared.array`, views.

`install` puts these in place of what the engine uses. The engine's own code has no second path.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from fractions import Fraction

import numpy as np
from numba import cuda
from numba.cuda import types
from numba.cuda.simulator import kernel, kernelapi
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

PATIENCE = 60  # seconds that lanes wait for each other before the test fails
_lock = threading.Lock()


# Threads and warps. The simulator's own manager polls its threads all the time and takes ten times as long.


class Meeting:
    """A barrier for a fixed number of threads: the last to come lets the others go."""

    def __init__(self, count):
        self.count, self.gates, self.lock, self.broken = count, [], threading.Lock(), False

    def wait(self):
        gate = threading.Lock()
        gate.acquire()
        with self.lock:
            self.gates.append(gate)
            gates, self.gates = (self.gates, []) if len(self.gates) == self.count else ((), self.gates)
        for other in gates:
            other.release()
        # second by second: a process that was stopped for minutes goes on
        if not any(gate.acquire(timeout=1) for _ in range(PATIENCE)) or self.broken:
            raise threading.BrokenBarrierError("not every thread came to the barrier or the shuffle")

    def abort(self):
        with self.lock:
            self.broken, gates, self.gates = True, self.gates, []
        for gate in gates:
            gate.release()


def run_block(self, grid_point, *args):
    threads = [
        kernel.BlockThread(lambda: self._f(*args), self, grid_point, point, self._debug)
        for point in np.ndindex(*self._block_dim)
    ]
    self.barrier, self.meetings = Meeting(len(threads)), {}
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures = [thread.exception for thread in threads if thread.exception]
    for error, trace in sorted(failures, key=lambda failure: isinstance(failure[0], threading.BrokenBarrierError)):
        raise error.with_traceback(trace)


def run_thread(self):
    try:  # what it raises, of any kind, `run_block` raises again
        with np.errstate(all="ignore"):  # registers wrap around and become infinite in silence
            threading.Thread.run(self)
    except Exception as error:  # noqa: BLE001
        self.exception = (error, error.__traceback__)
        for meeting in (self._manager.barrier, *(meeting for meeting, _ in self._manager.meetings.values())):
            meeting.abort()


def syncthreads(self):
    """Every thread of the block must come, also one that has returned: stricter than a GPU."""
    self._manager.barrier.wait()


def shfl_xor_sync(self, mask, value, lane_mask):
    """All lanes that the mask names put their value down, meet, and read.

    The next shuffle uses the other of two tables, and nobody passes it who has not read from this one.
    """
    thread = threading.current_thread()
    warp, lane = divmod(thread.thread_id, 32)
    threads = int(np.prod(thread._manager._block_dim)) - 32 * warp
    lanes = {i for i in range(min(32, threads)) if mask >> i & 1}
    assert {lane, lane ^ lane_mask} <= lanes, "a shuffle with a lane that its mask does not name, or that is not there"
    with _lock:
        meeting, tables = thread._manager.meetings.setdefault((warp, mask), (Meeting(len(lanes)), ({}, {})))
    thread.shuffles = getattr(thread, "shuffles", 0) + 1
    table = tables[thread.shuffles % 2]
    table[lane] = value
    meeting.wait()
    return table[lane ^ lane_mask]


def fma(self, a, b, c):
    """a · b + c, rounded once."""
    if isinstance(a, np.float32):
        # float64 has room for the product. The sum is rounded to an odd last digit there, which no tie of float32 has.
        product, c = float(a) * float(b), float(c)
        total = product + c
        if math.isfinite(total):
            added = total - product
            lost = (product - (total - added)) + (c - added)
            if lost and not np.float64(total).view(np.int64) & 1:
                total = math.nextafter(total, math.copysign(math.inf, lost))
        return np.float32(total)
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return a * b + c
    return np.float64(float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))))


def shared_array(self, shape, dtype, alignment=None):
    """The simulator's, which looks up the caller's line: two threads must not do that at once."""
    key = (sys._getframe(1).f_code.co_filename, sys._getframe(1).f_lineno)
    with _lock:
        if key not in self._allocations:
            self._allocations[key] = np.empty(shape, dtype)
        return self._allocations[key]


# Intrinsics.


def _loader(count):
    def load(array, i):
        itemsize = array.dtype.itemsize
        elements = np.array([array[i + j] for j in range(4 * count // itemsize)], array.dtype)
        assert i * itemsize % (4 * count) == 0, "a vector that is not aligned"
        return tuple(elements.view(np.uint32))

    return load


def _storer(count):
    def store(array, i, words):
        assert len(words) == count
        assert i * array.dtype.itemsize % (4 * count) == 0, "a vector that is not aligned"
        for j, element in enumerate(np.array(words, np.uint32).view(array.dtype)):
            array[i + j] = element

    return store


def _bitcast(source, target):
    return lambda value: source(value).view(target)


def _upper_half(value):
    """A float64 without the lower half of its bits."""
    return (value.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


INTRINSICS = {
    **{f"load_{count}": _loader(count) for count in (1, 2, 4)},
    **{f"store_{count}": _storer(count) for count in (1, 2, 4)},
    "float32_of_bits": _bitcast(np.uint32, np.float32),
    "bits_of_float32": _bitcast(np.float32, np.uint32),
    "float64_of_bits": _bitcast(np.uint64, np.float64),
    "bits_of_float64": _bitcast(np.float64, np.uint64),
    "float16_to_float32": lambda bits: np.float32(np.uint16(bits).view(np.float16)),
    "float32_to_float16": lambda value: np.float16(value).view(np.uint16),
    "opaque": lambda word: word,
    "product": lambda a, b: a * b,
    "rough_reciprocal_root": lambda value: _upper_half(1 / np.sqrt(np.float64(value))),
}


# Arrays.

_memory = []  # of the device: (address, bytes)


def at(address, dtype):
    """What a kernel sees of a pointer: the memory from there on, to its end. Whatever is beyond raises IndexError."""
    for first, room in reversed(_memory):
        if first <= address < first + room.size:
            return room[address - first :][: (first + room.size - address) // dtype.itemsize * dtype.itemsize].view(
                dtype
            )
    return np.empty(0, dtype)  # an array of no elements has no memory


def pointer_to(array):
    """The address of an array, also of one that `empty` did not make."""
    first = array._ary.ctypes.data
    if array._ary.size and not at(first, np.dtype(np.uint8)).size:
        low, high = np.lib.array_utils.byte_bounds(array._ary)
        _memory.append((low, np.asarray(_Span(array._ary, low, high - low))))
    return ctypes.c_void_p(first)


def launch(self, blocks, stream, *arguments):
    left, given = list(arguments), []
    for kind in self.arguments:
        if isinstance(kind, types.UniTuple):
            given.append(tuple(left.pop(0) for _ in range(kind.count)))
        else:
            value = left.pop(0)
            given.append(at(value, np.dtype(str(kind.dtype))) if isinstance(kind, types.CPointer) else value)
    assert not left
    cuda.jit(self.function)[blocks, self.threads, stream](*given)


def view_of(array, shape, strides, dtype):
    host = array._ary
    low, high = np.lib.array_utils.byte_bounds(host)
    whole = np.asarray(_Span(host, low, max(high - low, 1)))
    result = np.ndarray(tuple(shape), dtype, buffer=whole, offset=host.ctypes.data - low, strides=tuple(strides))
    return FakeCUDAArray(result)


class _Span:
    def __init__(self, host, low, size):
        self.host = host  # kept alive by the array made from this
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "version": 3, "data": (low, False)}


def empty(shape, dtype, stream):
    """At a multiple of 256 bytes, as on a device, and full of NaN: what a kernel does not write shows."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.full(size + 256, 0xFF, np.uint8)
    start = -room.ctypes.data % 256
    room = room[start : start + size]
    if size:
        _memory.append((room.ctypes.data, room))
    return FakeCUDAArray(room.view(dtype).reshape(shape))


def scratch(sizes, stream):
    """New for each call, so that what an earlier one left is not taken for this one's."""
    return [empty((size,), np.uint8, stream)._ary.ctypes.data for size in sizes]


def to_device(host):
    target = empty(host.shape, host.dtype, 0)
    target._ary[...] = host
    return target


class _Cuda:
    """numba.cuda outside a kernel, the simulator's threads and barriers inside."""

    def __getattr__(self, name):
        inside = kernel._get_kernel_context()
        return getattr(cuda if inside is None else inside, name)


def install():
    """Make the engine run in the simulator."""
    jit = cuda.jit
    cuda.jit = lambda *args, forceinline=False, **options: jit(*args, **options)
    from rmsnorm_np.cuda import arrays
    from rmsnorm_np.cuda.kernel import Kernel

    kernelapi.FakeCUDAModule.shfl_xor_sync = shfl_xor_sync
    kernelapi.FakeCUDAModule.fma = fma
    kernel.BlockManager.run, kernel.BlockThread.run, kernel.BlockThread.syncthreads = run_block, run_thread, syncthreads
    kernelapi.FakeCUDAShared.array = shared_array
    modules = [module for name, module in sys.modules.items() if name.startswith("rmsnorm_np.cuda.")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if name in INTRINSICS:
                setattr(module, name, INTRINSICS[name])
            elif isinstance(value, kernel.FakeCUDAKernel):
                setattr(module, name, value.fn)  # a device function is called as it is: hundreds of times faster
        if hasattr(module, "inlined"):
            module.inlined = lambda function: function
        if hasattr(module, "cuda"):
            module.cuda = _Cuda()
    Kernel.__call__ = launch
    arrays.viewed, arrays.empty, arrays.scratch, arrays.to_device = view_of, empty, scratch, to_device
    FakeCUDAArray.device_ctypes_pointer = property(pointer_to)
    FakeCUDAArray.stream = 0
    arrays.capability_here = lambda: (7, 5)  # which does not round to bfloat16 itself
