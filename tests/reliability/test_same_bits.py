"""The same bits for a row, whatever stands around it: other rows, other addresses, other work on the machine."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import numba
import numpy as np
import pytest
from conftest import DTYPES
from test_engines import OPS, arrays, call, same

EPS = 1e-6

pytestmark = [
    pytest.mark.engine,
]


@pytest.fixture(params=[pytest.param(d, id=d.name, marks=[pytest.mark.slow] * (d != np.float32)) for d in DTYPES])
def dtype(request):
    """A dtype of x; not conftest's, so that float32 alone is run each time."""
    return request.param


def at(array, offset):
    """A copy whose first byte is `offset` bytes behind a cache line: not a multiple of the element's size either."""
    room = np.empty(array.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("op", OPS)
def test_at_every_address(op, dtype, rng):
    """Inputs and output at each byte behind a cache line, each of them at another one; and nothing beside `out`."""
    inputs = arrays(rng, (5, 77), dtype)
    want = call(op, *inputs, EPS, "cpu")
    for offset in range(64):
        moved = [at(a, (offset + 13 * i) % 64) for i, a in enumerate(inputs)]
        assert same(call(op, *moved, EPS, "cpu"), want)
        assert same(call(op, *moved, EPS, "cpu", out=at(inputs[0], -offset % 64)), want)


@pytest.mark.parametrize(("rows", "n"), [(40, 100), (20, 64), (33, 2500)])
@pytest.mark.parametrize("op", OPS)
def test_every_split_of_a_batch(op, rows, n, dtype, rng):
    """From one row on; for 16 rows and more the weight is converted beforehand."""
    x, weight, bias, dy = arrays(rng, (rows, n), dtype)
    want = call(op, x, weight, bias, dy, EPS, "cpu")[:2]
    for split in range(1, rows):
        parts = [call(op, x[s], weight, bias, dy[s], EPS, "cpu")[:2] for s in (slice(split), slice(split, None))]
        assert same([np.concatenate(one) for one in zip(*parts, strict=True)], want)


@pytest.mark.parametrize("op", OPS)
def test_size_does_not_tell(op, dtype, rng):
    """A batch that is written past the cache, and its rows in calls that are not."""
    n = 1024
    x, weight, bias, dy = arrays(rng, ((9 << 20) // dtype.itemsize // n, n), dtype)
    want = call(op, x, weight, bias, dy, EPS, "cpu")[:2]
    for first in range(0, len(x), 500):
        some = slice(first, first + 500)
        got = call(op, x[some], weight, bias, dy[some], EPS, "cpu")
        assert same(got[:2], [one[some] for one in want])


@contextlib.contextmanager
def other_work(processes):
    """Processes that keep the machine busy meanwhile."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: sum(range(10**6))"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def assert_repeatable(op, inputs, times):
    before = numba.get_num_threads()
    want = call(op, *inputs, EPS, "cpu")
    try:
        with other_work(2):
            for i in range(times):
                numba.set_num_threads(1 + i % min(2, numba.config.NUMBA_NUM_THREADS))
                assert same(call(op, *inputs, EPS, "cpu"), want)
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
def test_a_hundred_times_under_load(op, dtype, rng):
    """On one thread and on two: dweight and dbias, too."""
    assert_repeatable(op, arrays(rng, (77, 1003), dtype), 100)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4000, 1024), (3, 400_001), (100_000, 24)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_large_ones_a_hundred_times_under_load(op, shape, dtype, rng):
    assert_repeatable(op, arrays(rng, shape, dtype), 100)
