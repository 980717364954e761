"""Where outputs live: aligned to cache lines, and those of large calls in memory that was used before.

A fresh array of tens of megabytes costs more than the norm: the kernel of the operating system hands out its pages one
by one, zeroed. So the memory of a large output goes back to a pool when the last array, view or export of it is gone,
and the next output of about that size takes it from there.

The pool never holds more than a limit: 512 MiB, or ``RMSNORM_NP_RECYCLE_MB`` megabytes, or what `set_limit` says; 0
switches it off. When the pool is full, memory goes back to the operating system.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
from typing import Any

import numpy as np

from rmsnorm_np.cpu.vector import LINE

PAGE = 4096  # bytes; the sets of a first-level cache repeat with it
STREAM_BYTES = 8 << 20  # outputs from this size on are written past the cache: they would not stay in it
# Smaller results of a call, in sum, are NumPy's, for a lease takes 5 µs. The C library recycles larger ones too, but
# not in every process: beside torch and JAX, 4 MiB from np.empty made a norm of 0.2 ms take 1.9. It hands back to the
# system what is freed together: where dx and dgate had 1.5 MiB each, their pages came anew in each call, which took
# 1.2 ms in place of 0.5.
RECYCLE_BYTES = 2 << 20
DEFAULT_LIMIT_MB = 512
_HUGE = 1 << 21  # of a huge page; sizes are multiples of it, where that adds a quarter at most
_ROUND = 1 << 16
# A copy for each process: by default, what is forked would go on writing to the memory of its parent. Windows does not
# fork, and would reserve memory for the copy as well.
_ACCESS = mmap.ACCESS_COPY if hasattr(os, "fork") else mmap.ACCESS_WRITE


class _Buffer:
    """Memory of the operating system's, and its address, which takes a microsecond to find out."""

    __slots__ = ("address", "mapped")

    def __init__(self, size: int) -> None:
        try:
            self.mapped = mmap.mmap(-1, size, access=_ACCESS)
        except OSError as error:
            raise MemoryError(f"{size} bytes for an output could not be allocated") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # Linux can be built without huge pages
                self.mapped.madvise(mmap.MADV_HUGEPAGE)
        self.address = _address(np.frombuffer(self.mapped, np.uint8))

    def __len__(self) -> int:
        return len(self.mapped)


class _Pool:
    """Free buffers, the latest last."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.free: list[_Buffer] = []
        # re-entrant: collecting garbage while the lock is held can end a lease, which comes here again
        self.lock = threading.RLock()

    def take(self, size: int) -> _Buffer:
        """A free buffer of this size or up to a quarter more, or a new one."""
        unit = _HUGE if size >= 4 * _HUGE else _ROUND
        size = -(-size // unit) * unit
        with self.lock:
            for i in reversed(range(len(self.free))):
                if size <= len(self.free[i]) <= size + size // 4:
                    return self.free.pop(i)
        return _Buffer(size)

    def give(self, buffer: _Buffer) -> None:
        with self.lock:
            self.free.append(buffer)
            self.trim()

    def trim(self) -> None:
        """Drop the oldest buffers until the rest is within the limit."""
        with self.lock:
            while sum(map(len, self.free)) > self.limit:
                del self.free[0]


class _Lease:
    """A buffer while an array lives in it: each view and each export of it keeps the lease, too."""

    __slots__ = ("__array_interface__", "_buffer", "_pool")

    def __init__(self, pool: _Pool, buffer: _Buffer, offset: int, size: int) -> None:
        self._pool = pool
        self._buffer = buffer
        self.__array_interface__ = {
            "version": 3, "shape": (size,), "typestr": "|u1", "data": (buffer.address + offset, False)
        }  # fmt: skip

    def __del__(self) -> None:
        self._pool.give(self._buffer)


def _limit_from_environment() -> int:
    text = os.environ.get("RMSNORM_NP_RECYCLE_MB", "")
    if not text:
        return DEFAULT_LIMIT_MB << 20
    if not text.isdecimal():
        raise ValueError(f"RMSNORM_NP_RECYCLE_MB is {text!r}, expected a whole number of megabytes")
    return int(text) << 20


_pool = _Pool(_limit_from_environment())


def _renew_lock() -> None:
    _pool.lock = threading.RLock()  # another thread may have held it when the process was forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def limit() -> int:
    """Bytes of unused memory that the pool keeps at most."""
    return _pool.limit


def set_limit(limit: int) -> int:
    """Keep at most `limit` bytes of unused memory, 0 for none, and free the rest; returns the limit before."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit is {limit!r}, expected a number of bytes >= 0")
    before, _pool.limit = _pool.limit, limit
    _pool.trim()
    return before


def empty(shape: tuple[int, ...], dtype: Any, *beside: Any, results: int = 1) -> Any:
    """An array with unset elements, C-contiguous; a large one aligned to a cache line, and one that is written past the
    cache far from `beside`, arrays or None, in a page.

    Element i of x and element i of y are worked on together. Where their addresses agree modulo a page, they fall
    into the same set of the first-level cache: a large forward pass is 1.2 to 1.35 times slower then.

    results: how many arrays of about this size the call returns.
    """
    size = math.prod(shape) * dtype.itemsize
    if size * results < RECYCLE_BYTES or _pool.limit == 0:
        return np.empty(shape, dtype)
    taken = (_address(array) % PAGE for array in beside if array is not None)
    offset = 0 if size < STREAM_BYTES else _offset_in_page(*taken)
    return np.asarray(_Lease(_pool, _pool.take(size + PAGE), offset, size)).view(dtype).reshape(shape)


def from_line(room: Any, shape: tuple[int, int]) -> Any:
    """What lies in room, float64, from the first address on a cache line on."""
    skip = -_address(room) % LINE // 8
    return room[skip : skip + math.prod(shape)].reshape(shape)


def _address(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]  # array.ctypes.data takes three times as long
    return address


def _offset_in_page(*taken: int) -> int:
    """The middle of the largest gap between offsets that are taken, on a cache line."""
    if not taken:
        return 0
    around = sorted(taken)
    nexts = (*around[1:], around[0] + PAGE)
    gap, start = max((after - before, before) for before, after in zip(around, nexts, strict=True))
    return (start + gap // 2) % PAGE // LINE * LINE


def streams(y: Any, *others: Any) -> int:
    """1 where writing past the cache pays: a result that would not stay in the cache, in rows that fill lines.

    Of an array (outer, n, inner): 1 for a result that would not stay in the cache, 2 where its inner elements fill
    lines as well. Of several results: 1 where all have one alignment.
    """
    if y.nbytes < STREAM_BYTES:
        return 0
    if any(a.itemsize != y.itemsize or (_address(a) - _address(y)) % LINE for a in others):
        return 0
    row = y.shape[-1] * y.itemsize
    aligned = row % LINE == 0 and _address(y) % LINE == 0
    return 1 + aligned if y.ndim == 3 else int(row >= 8192 or aligned)
