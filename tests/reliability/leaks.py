"""Many calls, and what the process holds before and after; `test_leaks` starts it.

By three counts: resident memory, as the system sees it; objects of Python; allocations of compiled kernels.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from numba.core.runtime import rtsys

import rmsnorm_np as rn
from rmsnorm_np.cpu import memory

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def kernel_allocations():
    stats = rtsys.get_allocation_stats()
    return stats.alloc - stats.free


def refused(function, *args, **options):
    """A call with a bad argument: its traceback holds on to nothing."""
    try:
        function(*args, **options)
    except (TypeError, ValueError):
        return
    raise AssertionError("nothing was raised")


def small_calls(rng):
    """One after the other: all functions, dtypes and layouts, with out and without, rows out of range, and errors."""
    calls = []
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        x, dy = (rng.standard_normal((4, 40)).astype(dtype) for _ in range(2))
        weight, bias = (rng.standard_normal(40).astype(dtype) for _ in range(2))
        extreme = (x.astype(np.float64) * {"float16": 1e4, "float64": 1e300}.get(x.dtype.name, 1e30)).astype(dtype)
        calls += [
            lambda x=x, weight=weight, bias=bias: rn.rms_norm(x, weight, bias),
            lambda x=x, weight=weight, bias=bias: rn.layer_norm(x, weight, bias, out=np.empty_like(x)),
            lambda x=x, weight=weight, bias=bias, dy=dy: rn.rms_norm_backward(dy, x, weight, bias, p=0.3),
            lambda x=x, weight=weight, bias=bias, dy=dy: rn.layer_norm_backward(dy, x, weight, bias),
            lambda x=x.T, weight=weight, bias=bias: rn.rms_norm(x, weight, bias, axis=0),
            lambda x=extreme, weight=weight, bias=bias: rn.rms_norm(x, weight, bias),
            lambda x=extreme, weight=weight, bias=bias, dy=dy: rn.rms_norm_backward(dy, x, weight, bias),
            lambda x=x, weight=weight[1:]: refused(rn.rms_norm, x, weight),
            lambda x=x, out=x[1:]: refused(rn.layer_norm, x, out=out),
        ]
    return calls


def large_calls(rng):
    """Sizes from 8 to 16 MiB, so that recycled memory often does not fit, and rows that are cut into pieces."""
    calls = []
    for rows, n in ((600, 4096), (1000, 2500), (20, 120_001), (1024, 4096), (700, 3072)):
        x, dy = (rng.standard_normal((rows, n), dtype=np.float32) for _ in range(2))
        weight, bias = (rng.standard_normal(n, dtype=np.float32) for _ in range(2))
        calls += [
            lambda x=x, weight=weight, bias=bias: rn.rms_norm(x, weight, bias),
            lambda x=x, weight=weight, bias=bias: rn.layer_norm(x, weight, bias),
            lambda x=x, weight=weight, bias=bias, dy=dy: rn.rms_norm_backward(dy, x, weight, bias, p=0.3),
            lambda x=x, weight=weight, bias=bias, dy=dy: rn.layer_norm_backward(dy, x, weight, bias),
        ]
    return calls


def repeat(calls, count):
    """Each in its turn; the last result lives until the next one is there."""
    result = None
    for i in range(count):
        result = calls[i % len(calls)]()  # noqa: F841


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("size", choices=("small", "large"))
    parser.add_argument("count", type=int)
    args = parser.parse_args()
    memory.set_limit(64 * MIB)
    calls = (small_calls if args.size == "small" else large_calls)(np.random.default_rng(0))
    held = []
    for _ in range(4):  # the first quarter compiles, fills the pool and what the C library keeps for itself
        repeat(calls, max(args.count // 4, 2 * len(calls)))
        gc.collect()
        held.append((resident(), len(gc.get_objects()), kernel_allocations()))
    (bytes_before, objects_before, allocations_before), (bytes_after, objects_after, allocations_after) = held[1::2]
    grown = bytes_after - bytes_before
    recycled = sum(map(len, memory._pool.free))
    sys.stdout.write(
        f"{args.count} {args.size} calls: {bytes_before / MIB:.1f} to {bytes_after / MIB:.1f} MiB resident, "
        f"{objects_after - objects_before} objects more, {allocations_after - allocations_before} allocations more, "
        f"{recycled / MIB:.0f} MiB recycled\n"
    )
    # calls that lost 64 bytes would lose 960 kB in 15,000; large outputs may come and go between NumPy and the pool
    assert grown < (MIB // 2 if args.size == "small" else 32 * MIB)
    assert objects_after - objects_before < 100
    assert allocations_after == allocations_before
    assert recycled <= memory.limit()


if __name__ == "__main__":
    main()
