"""Memory between two pages that nobody may touch: what reads or writes past an array's end is ended at once.

As a program it calls the CPU engine with every array in such memory, what the engine asks for itself included. A fault
ends the process, so `test_memory_safety` starts it in one of its own; the last line it printed says which group of
cases it was at. The last line of all is a digest of the results.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import mmap
import sys

import ml_dtypes
import numpy as np

import rmsnorm_np as rn
from rmsnorm_np import cpu
from rmsnorm_np.cpu import long_rows, memory, threads
from rmsnorm_np.cpu.blocks import SHORT_ROW
from rmsnorm_np.cpu.vector import LANES

PAGE = mmap.PAGESIZE
PROT_NONE = 0
BESIDE = 0xA5  # each byte that is not an array's


class Room:
    """Some pages between two protected ones. An array lies at their very beginning or at their very end."""

    def __init__(self, size):
        size = -(-size // PAGE) * PAGE
        self.mapped = mmap.mmap(-1, size + 2 * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.mapped))
        self.bytes = np.frombuffer(self.mapped, np.uint8, size, PAGE)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for page in (first, first + PAGE + size):
            if protect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def lay(self, shape, dtype, at_end):
        """An array of this shape, all bytes BESIDE, as are those beside it."""
        size = int(np.prod(shape)) * dtype.itemsize
        start = len(self.bytes) - size if at_end else 0
        self.bytes[:] = BESIDE
        self.taken = slice(start, start + size)
        return self.bytes[self.taken].view(dtype).reshape(shape)

    def is_clean_beside(self):
        return bool(
            (self.bytes[: self.taken.start] == BESIDE).all() and (self.bytes[self.taken.stop :] == BESIDE).all()
        )


class Rooms:
    """Takes the place of NumPy's and the engine's own `empty`; gives room after room until `reset`."""

    def __init__(self, count, size):
        self.rooms = [Room(size) for _ in range(count)]
        self.used, self.at_end = 0, True

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype=np.float64, *beside, results=1):
        self.used += 1
        return self.rooms[self.used - 1].lay(shape, np.dtype(dtype), self.at_end)

    def zeros(self, shape, dtype=np.float64):
        array = self.empty(shape, dtype)
        array.fill(0)
        return array

    def copy(self, array):
        if array is None:
            return None
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        return copy

    def reset(self):
        assert all(room.is_clean_beside() for room in self.rooms[: self.used])
        self.used = 0


def inputs(rng, shape, weight_shape, dtype, params, extreme):
    """x, dy, weight, bias; extreme: with rows whose sum of squares leaves the range, at both of its ends."""
    x, dy = rng.standard_normal(shape), rng.standard_normal(shape)
    if extreme:
        scale = {"float64": 1e250, "bfloat16": 1e30}[dtype.name]
        x[0::3] *= scale
        x[1::3] /= scale
    weight, bias = rng.standard_normal(weight_shape), rng.standard_normal(shape[-1:])
    x, dy, weight, bias = (a.astype(dtype) for a in (x, dy, weight, bias))
    return x, dy, weight if params != "none" else None, bias if params == "both" else None


def call(op, x, dy, weight, bias, dx):
    """y, dx, dweight, dbias. In pRMSNorm weight_offset is added, too: it takes a path of its own.

    With a residual: h follows y. dy is what is added forward, x the gradient of h.
    """
    if op == "layer":
        return rn.layer_norm(x, weight, bias), *rn.layer_norm_backward(dy, x, weight, bias, out=dx)
    if op == "residual":
        return *rn.add_rms_norm(x, dy, weight, bias), *rn.add_rms_norm_backward(dy, x, x, weight, bias, out=dx)
    options = {"p": 0.3, "weight_offset": 0.0 if weight is None else 1.0} if op == "partial" else {}
    return rn.rms_norm(x, weight, bias, **options), *rn.rms_norm_backward(dy, x, weight, bias, out=dx, **options)


def bits(results):
    return [None if a is None else a.tobytes() for a in results]


def check(rooms, op, arrays):
    """One forward and one backward call in ordinary memory, then at both ends of guarded memory."""
    plain = cpu.np, memory.empty
    want = bits(call(op, *arrays, np.empty_like(arrays[0])))
    kept = bits(arrays)
    for rooms.at_end in (True, False):
        guarded = [rooms.copy(a) for a in arrays]
        dx = rooms.empty(arrays[0].shape, arrays[0].dtype)
        cpu.np, memory.empty = rooms, rooms.empty
        try:
            got = bits(call(op, *guarded, dx))
        finally:
            cpu.np, memory.empty = plain
        assert got == want, "other results than in ordinary memory"
        assert bits(guarded) == kept, "an input was written"
        rooms.reset()
    return want[:2]


def whatever_its_size(y):
    """`memory.streams`, but for the size of y. Short rows of whole vectors have no head: they must begin on a line."""
    n = y.shape[1]
    return int(n > SHORT_ROW or n % LANES != 0 or y.ctypes.data % memory.LINE == 0)


BORDERS = [
    base + step
    for base in (1024, 2048, 4096, 32768, 65536, 67584, 98304)  # tile, segment, two of them, piece, long row, …
    for step in (-9, -8, -7, -1, 0, 1, 7, 8, 9)
]


def shapes_of(lengths, itemsize):
    """Shapes of x and weight."""
    if lengths == "short":
        for n in range(1, 301):
            yield (3, n), (n,)
            if n <= 66:  # more rows than a block has; weights per head
                yield (67, n), (n,)
                yield (2, 3, n), (3, n)
    elif lengths == "borders":
        for n in BORDERS:
            yield (3, n), (n,)
    else:  # large enough to be written past the cache for its size alone: 8 MiB
        for n in (32, 64, 8192 // itemsize, 8192 // itemsize + 1, 65537):
            yield ((9 << 20) // itemsize // n + 1, n), (n,)


def say(*what):
    sys.stdout.write(" ".join(map(str, what)) + "\n")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", choices=("short", "borders", "large"), required=True)
    parser.add_argument("--path", choices=("by size", "past the cache", "long", "long past the cache"), required=True)
    parser.add_argument("--params", choices=("both", "weight", "none"), required=True)
    args = parser.parse_args()
    if args.path != "by size":
        threads.PARALLEL_ELEMENTS = 0  # else a small call is never written past the cache
        threads.choose = lambda elements: 1  # on a busy machine, threads for 7776 small calls take minutes
        if "past the cache" in args.path:
            memory.streams = whatever_its_size
        else:
            memory.streams = lambda y: 0
    if "long" in args.path:
        long_rows.LONG_ROW = 0
    rooms = Rooms(40, {"short": 40_000, "borders": 2_500_000, "large": 14 << 20}[args.lengths])
    rng = np.random.default_rng(0)
    digest, cases = hashlib.sha256(), 0
    kinds = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
    for dtype, op, extreme in itertools.product(kinds, ("rms", "partial", "layer", "residual"), (False, True)):
        if extreme and dtype.name in ("float16", "float32"):
            continue  # no sum of squares leaves the range in which it is taken
        for shape, weight_shape in shapes_of(args.lengths, dtype.itemsize):
            say(dtype.name, op, "extreme" if extreme else "ordinary", shape)
            for result in check(rooms, op, inputs(rng, shape, weight_shape, dtype, args.params, extreme)):
                digest.update(result)
            cases += 1
    say(cases, digest.hexdigest())


if __name__ == "__main__":
    main()
