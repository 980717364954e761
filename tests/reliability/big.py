"""One call on more than 2**31 float16 elements that repeat a block, so that the result has to repeat a block, too.

`test_big` starts it, for the memory it takes is measured and goes back to the system.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import resource
import sys
import time

import numpy as np

import rmsnorm_np as rn

ELEMENTS = 2**31
BLOCK = 2**20  # elements: what repeats, 2 MiB of them
DTYPE = np.dtype(np.float16)
EPS = 0.25  # of the size of the mean square: dx of dy = x is not lost in the cancellation

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)


def mapped(blocks, block):
    """So many blocks one after the other, of which all but the first and the last are the same memory."""
    size = BLOCK * DTYPE.itemsize
    file = os.memfd_create("block")
    os.ftruncate(file, size)
    array = np.frombuffer(mmap.mmap(-1, blocks * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), DTYPE)
    fixed = 0x10  # the module mmap does not have Linux's MAP_FIXED
    for i in range(1, blocks - 1):
        place = array.ctypes.data + i * size
        if libc.mmap(place, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | fixed, file, 0) != place:
            raise OSError(ctypes.get_errno(), "mmap")
    for i in (0, 1, blocks - 1):
        array[i * BLOCK : (i + 1) * BLOCK] = block
    return array


def repeated(blocks, block):
    array = np.empty(blocks * BLOCK, DTYPE)
    for i in range(blocks):
        array[i * BLOCK : (i + 1) * BLOCK] = block
    return array


def check_repeats(array, rows):
    """The result of all rows is what one block of them gave."""
    first = rows.reshape(-1).view(np.uint16)
    flat = array.reshape(-1).view(np.uint16)
    for start in range(0, len(flat), len(first)):
        part = flat[start : start + len(first)]
        if not np.array_equal(part, first[: len(part)]):
            raise AssertionError(f"other results from element {start} on")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=("many rows", "one long row", "single elements"))
    parser.add_argument("op", choices=("forward", "backward"))
    parser.add_argument("--mapped", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    block = rng.standard_normal(BLOCK).astype(DTYPE)
    blocks = ELEMENTS // BLOCK + 2
    x = (mapped if args.mapped else repeated)(blocks, block)
    assert x.size > ELEMENTS
    out = mapped(blocks, np.zeros(BLOCK, DTYPE)) if args.mapped else x
    n = {"many rows": 4096, "one long row": x.size, "single elements": 1}[args.shape]
    weight = rng.standard_normal(n).astype(np.float32) if n <= 4096 else None

    # the same rows by a call on one block; a row longer than that has a root mean square of its own
    small = block.reshape(-1, min(n, BLOCK))
    if args.op == "forward":
        want = rn.rms_norm(small, weight, eps=EPS)
    else:
        want, dweight, _ = rn.rms_norm_backward(small, small, weight, eps=EPS)
    rows, out = x.reshape(-1, n), out.reshape(-1, n)
    began = time.perf_counter()
    if args.op == "forward":
        got = rn.rms_norm(rows, weight, eps=EPS, out=out)
    else:
        got, total, _ = rn.rms_norm_backward(rows, rows, weight, eps=EPS, out=out)
        if weight is not None:
            np.testing.assert_allclose(total, dweight.astype(np.float64) * blocks, rtol=1e-6, atol=1e-6 * blocks)
    took = time.perf_counter() - began
    assert got is out
    check_repeats(got, want)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    assert args.mapped or peak < 5 << 10, f"{peak} MiB of memory"
    sys.stdout.write(f"{args.shape}, {args.op}: {x.size} elements, {took:.1f} s, {peak:.0f} MiB\n")


if __name__ == "__main__":
    main()
