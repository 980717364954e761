"""Six versions of RMSNorm's forward pass, one for each step of the page "From formula to fast kernel".

Each step takes (x, w, eps, y), float32 arrays, and writes y. measurements/speed.py times them.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import prange
from rmsnorm_np.cpu.simd import (
    LANES,
    across,
    add_exact_square,
    data,
    float64,
    load,
    prefetch,
    store,
    stream,
    zeros,
)

from rmsnorm_np.cpu import jit  # noqa: F401  (tells Numba how lanes compile)

BLOCK = 4096  # elements: a block of rows that is read twice stays in a first-level cache


def naive(x, w, eps, y):
    """The formula in NumPy: five passes over memory with an intermediate array after each."""
    y[...] = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * w


@numba.njit
def one_loop(x, w, eps, y):
    """Sum a row, then write it while it is in the cache. Sums are in float64 from here on."""
    for r in range(x.shape[0]):
        total = 0.0
        for j in range(x.shape[1]):
            total += np.float64(x[r, j]) ** 2
        rstd = 1.0 / np.sqrt(total / x.shape[1] + eps)
        for j in range(x.shape[1]):
            y[r, j] = x[r, j] * rstd * w[j]


@numba.njit(parallel=True)
def parallel(x, w, eps, y):
    """The same, with the rows distributed over the cores."""
    for r in prange(x.shape[0]):
        total = 0.0
        for j in range(x.shape[1]):
            total += np.float64(x[r, j]) ** 2
        rstd = 1.0 / np.sqrt(total / x.shape[1] + eps)
        for j in range(x.shape[1]):
            y[r, j] = x[r, j] * rstd * w[j]


@numba.njit(forceinline=True)
def rstd_of_row(x, start, n, eps):
    """Eight elements at a time, converted to float64 when loaded, in four independent sums, because an addition takes
    four cycles.
    """
    a, b, c, d = zeros(x, float64), zeros(x, float64), zeros(x, float64), zeros(x, float64)
    for i in range(start, start + n, 4 * LANES):
        a = add_exact_square(a, load(x, i, float64))
        b = add_exact_square(b, load(x, i + LANES, float64))
        c = add_exact_square(c, load(x, i + 2 * LANES, float64))
        d = add_exact_square(d, load(x, i + 3 * LANES, float64))
    return 1.0 / np.sqrt(across((a + b) + (c + d)) / n + eps)


@numba.njit(parallel=True)
def vectors(x, w, eps, y):
    """Explicit vectors. n must be a multiple of 32 here; the library's kernels take any n."""
    n = x.shape[1]
    for r in prange(x.shape[0]):
        source, weight, target = data(x), data(w), data(y)
        rstd = rstd_of_row(source, r * n, n, eps)
        for j in range(0, n, LANES):
            lanes = load(source, r * n + j, float64)
            store(target, r * n + j, lanes * rstd * load(weight, j, lanes))


@numba.njit(parallel=True)
def streaming(x, w, eps, y):
    """Streaming stores, and a prefetch of the next block while this one is written."""
    rows, n = x.shape
    block = max(1, BLOCK // n)
    for b in prange(-(-rows // block)):
        source, weight, target = data(x), data(w), data(y)
        for r in range(b * block, min(rows, (b + 1) * block)):
            rstd = rstd_of_row(source, r * n, n, eps)
            for j in range(0, n, LANES):
                lanes = load(source, r * n + j, float64)
                stream(target, r * n + j, lanes * rstd * load(weight, j, lanes))
                prefetch(source, r * n + j + block * n)


def library(x, w, eps, y):
    """The library: any n and dtype, with the work balanced over the cores."""
    import rmsnorm_np as rn

    rn.rms_norm(x, w, eps=eps, out=y)


STEPS = (naive, one_loop, parallel, vectors, streaming, library)


def vectors_float32(x, w, eps, y):
    """`vectors` computed in float32, to measure the cost of float64."""
    _vectors_float32(x, w, np.float32(eps), y)


@numba.njit(parallel=True, fastmath={"reassoc", "contract"})
def _vectors_float32(x, w, eps, y):
    n = x.shape[1]
    for r in prange(x.shape[0]):
        total = np.float32(0.0)
        for j in range(n):
            total += x[r, j] * x[r, j]
        rstd = np.float32(1.0) / np.sqrt(total / np.float32(n) + eps)
        for j in range(n):
            y[r, j] = x[r, j] * rstd * w[j]
