"""Six versions of RMSNorm's forward pass, one for each step of the page "From formula to fast kernel".

Each step takes (x, w, eps, y), float32 arrays, and writes y. measurements/speed.py times them.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import prange, types

from rmsnorm_np.cpu.arrays import pointers
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import LANES, Work
from rmsnorm_np.ops.primitives import plus_square

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


FLOAT64 = Work("double", LANES)


def load(w, data, i):
    """Eight float32, converted to float64."""
    return w.load(data, "float32", i, FLOAT64)


def scaled(w, x, i, rstd, weight, j):
    """Eight elements of y, before they are rounded."""
    return load(w, x, i) * rstd * load(w, weight, j)


zeros = step(lambda w: w.zeros(FLOAT64.leaf), FLOAT64.leaf)
add_squares = step(lambda w, total, x, i: plus_square(total, load(w, x, i)), FLOAT64.leaf)
across = step(lambda w, a, b, c, d: w.across((a + b) + (c + d)), types.float64)
store = step(lambda w, y, i, *row: w.store(y, "float32", i, scaled(w, *row)))
stream = step(lambda w, y, i, *row: w.stream(y, "float32", i, scaled(w, *row)))
prefetch = step(lambda w, x, i: w.prefetch(x, i))


@numba.njit(forceinline=True)
def rstd_of_row(x, start, n, eps):
    """In four independent sums, because an addition takes four cycles."""
    a, b, c, d = zeros(()), zeros(()), zeros(()), zeros(())
    for i in range(start, start + n, 4 * LANES):
        a = add_squares((a, x, i))
        b = add_squares((b, x, i + LANES))
        c = add_squares((c, x, i + 2 * LANES))
        d = add_squares((d, x, i + 3 * LANES))
    return 1.0 / np.sqrt(across((a, b, c, d)) / n + eps)


@numba.njit(parallel=True)
def vectors(x, w, eps, y):
    """Explicit vectors. n must be a multiple of 32 here; the library's kernels take any n."""
    n = x.shape[1]
    for r in prange(x.shape[0]):
        source, weight, target = pointers(x), pointers(w), pointers(y)
        rstd = rstd_of_row(source, r * n, n, eps)
        for j in range(0, n, LANES):
            store((target, r * n + j, source, r * n + j, rstd, weight, j))


@numba.njit(parallel=True)
def streaming(x, w, eps, y):
    """Streaming stores, and a prefetch of the next block while this one is written."""
    rows, n = x.shape
    block = max(1, BLOCK // n)
    for b in prange(-(-rows // block)):
        source, weight, target = pointers(x), pointers(w), pointers(y)
        for r in range(b * block, min(rows, (b + 1) * block)):
            rstd = rstd_of_row(source, r * n, n, eps)
            for j in range(0, n, LANES):
                stream((target, r * n + j, source, r * n + j, rstd, weight, j))
                prefetch((source, r * n + j + block * n))


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
