"""Calls in which a kernel would reach outside an array, or write to an address that faults, without a check before it.

Kernels check nothing themselves. `test_unchecked_access` runs each of these cases in a process of its own, because
without its rule a case ends the process or gives other results. The sizes are those at which the rule matters.
"""

from __future__ import annotations

import mmap
import sys
import tempfile

import ml_dtypes
import numpy as np
from guarded import Room

import rmsnorm_np as rn
from rmsnorm_np.cpu import long_rows, memory

FLOAT = np.dtype(np.float32)
ULP = 2.0**-23  # of a float32, relative: results are off by half of it


def arrays(rows, n):
    """x, dy and weight."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in ((rows, n), (rows, n), n)]


def at(byte, shape):
    """An array that begins so many bytes behind a page boundary."""
    size = int(np.prod(shape)) * FLOAT.itemsize
    room = np.empty(size + 2 * memory.PAGE, np.uint8)
    start = -room.ctypes.data % memory.PAGE + byte
    return room[start : start + size].view(FLOAT).reshape(shape)


def before_a_protected_page(shape):
    """An array whose last byte is followed by a page that nobody may touch."""
    return Room(int(np.prod(shape)) * FLOAT.itemsize).lay(shape, FLOAT, at_end=True)


def assert_same(got, want):
    assert got.tobytes() == want.tobytes(), "other results"


def in_small_calls(x, dy, weight, rows=500):
    """y and dx from calls that are too small for any rule about large outputs."""
    parts = [slice(first, first + rows) for first in range(0, len(x), rows)]
    y = [rn.rms_norm(x[some], weight) for some in parts]
    dx = [rn.rms_norm_backward(dy[some], x[some], weight).dx for some in parts]
    return np.concatenate(y), np.concatenate(dx)


def out_beside_a_cache_line():
    """Rows of 16 elements have no head that would lead to an aligned address: `memory.streams` looks at the first."""
    x, dy, weight = arrays(1 << 18, 16)
    y, dx = in_small_calls(x, dy, weight, 2000)
    for byte in (4, 16, 60):
        assert_same(rn.rms_norm(x, weight, out=at(byte, x.shape)), y)
        assert_same(rn.rms_norm_backward(dy, x, weight, out=at(byte, x.shape)).dx, dx)


def output_of_numpy():
    """Without recycled memory, a large output begins 16 bytes behind a page boundary."""
    memory.set_limit(0)
    x, dy, weight = arrays(1 << 18, 16)
    y, dx = in_small_calls(x, dy, weight, 2000)
    assert_same(rn.rms_norm(x, weight), y)
    assert_same(rn.rms_norm_backward(dy, x, weight).dx, dx)


def rows_beside_a_cache_line():
    """Rows from 8192 bytes on are written past the cache from the first aligned element of each."""
    x, dy, weight = arrays(1024, 2051)
    y, dx = in_small_calls(x, dy, weight, 10)
    for byte in (0, 4, 28, 60):
        assert_same(rn.rms_norm(x, weight, out=at(byte, x.shape)), y)
        assert_same(rn.rms_norm_backward(dy, x, weight, out=at(byte, x.shape)).dx, dx)


def out_between_two_elements():
    """Such an array is not aligned to its own dtype: no vector of it is at an aligned address."""
    x, dy, weight = arrays(1024, 2048)
    y, dx = in_small_calls(x, dy, weight, 10)
    assert_same(rn.rms_norm(x, weight, out=at(2, x.shape)), y)
    assert_same(rn.rms_norm_backward(dy, x, weight, out=at(2, x.shape)).dx, dx)
    assert_same(rn.rms_norm(x, weight[None].repeat(2, 0)[0], axis=(-1,), out=at(2, x.shape)), y)  # the longer check


def inputs_at_odd_places():
    """The output is placed half-way between its inputs in a page; half of an odd distance is no element."""
    x, dy, weight = arrays(1024, 2048)
    y, dx = in_small_calls(x, dy, weight, 10)
    x_there, dy_there = at(0, x.shape), at(4, x.shape)
    x_there[...], dy_there[...] = x, dy
    assert_same(rn.rms_norm(x_there, weight), y)
    assert_same(rn.rms_norm_backward(dy_there, x_there, weight).dx, dx)


def the_last_element_of_a_long_row():
    """One element is left for the last piece: fewer than lie before the next aligned address."""
    x, dy, weight = arrays(33, long_rows.LONG_ROW + 1)
    y, dx = in_small_calls(x, dy, weight, 1)
    assert_same(rn.rms_norm(x, weight, out=before_a_protected_page(x.shape)), y)
    assert_same(rn.rms_norm_backward(dy, x, weight, out=before_a_protected_page(x.shape)).dx, dx)
    # what is written behind a row is the beginning of the next, which in place is still to be read
    for position in (0, 1):
        copies = [dy.copy(), x.copy()]
        assert_same(rn.rms_norm_backward(*copies, weight, out=copies[position]).dx, dx)
    assert_same(rn.rms_norm(x, weight, out=x), y)


def dweight_of_long_rows():
    """dweight of long rows is written past the cache, too, where it begins at an aligned address."""
    x, dy, weight = arrays(33, long_rows.LONG_ROW + 8)
    exact = (dy.astype(float) * x / np.sqrt((x.astype(float) ** 2).mean(axis=1, keepdims=True) + 1e-6)).sum(axis=0)
    np.testing.assert_allclose(rn.rms_norm_backward(dy, x, weight).dweight, exact, rtol=ULP, atol=1e-12)


def rows_of_one_element():
    """A block has room for the numbers of 64 rows, however many of them fit the cache."""
    for n in (1, 3):
        x, dy, weight = arrays(100_003, n)
        scale = 1 / np.sqrt((x.astype(float) ** 2).mean(axis=1, keepdims=True) + 1e-6)
        y = rn.rms_norm(x, weight, out=before_a_protected_page(x.shape))
        np.testing.assert_allclose(y, x * scale * weight, rtol=ULP)
        g = dy.astype(float) * weight
        dx = rn.rms_norm_backward(dy, x, weight, out=before_a_protected_page(x.shape)).dx
        want = scale * (g - x * scale * (g * x * scale).mean(axis=1, keepdims=True))
        largest = np.abs(scale * g).max(axis=1, keepdims=True) * np.maximum(1, np.abs(x * scale))
        assert np.all(np.abs(dx - want) <= ULP * largest)


class GuardedBuffer(memory._Buffer):
    """The pool's memory, followed by a page that nobody may touch."""

    __slots__ = ("room",)

    def __init__(self, size):
        self.room = Room(size)
        self.mapped = self.room.bytes
        self.address = self.room.bytes.ctypes.data


def recycled_memory_of_another_size():
    """An output fits what the pool gives it: with its place in a page, and where the last one was smaller."""
    memory._Buffer = GuardedBuffer
    for rows in (1024, 1024, 2048, 1500, 1024, 3072):  # 8 MiB, a multiple of what sizes are rounded to, and others
        x, dy, weight = arrays(rows, 2048)
        assert_same(rn.rms_norm(x, weight)[-10:], rn.rms_norm(x[-10:], weight))
        assert_same(rn.rms_norm_backward(dy, x, weight).dx[-10:], rn.rms_norm_backward(dy[-10:], x[-10:], weight).dx)


def refused(function, *args, **options):
    try:
        function(*args, **options)
    except ValueError:
        return
    raise AssertionError("accepted")


def arrays_that_are_too_short():
    """The kernels take every size from x."""
    x, dy, weight = arrays(1 << 10, 1 << 12)
    for short in (weight[:1], weight[:-1], before_a_protected_page((1,))):
        refused(rn.rms_norm, x, short)
        refused(rn.rms_norm_backward, dy, x, short)
        refused(rn.rms_norm, x, None, short)
    for short in (x[:1], x[:-1], x[:, :-1].copy()):
        refused(rn.rms_norm, x, weight, out=short)
        refused(rn.rms_norm_backward, short, x, weight)
        refused(rn.rms_norm_backward, dy, x, weight, out=short)
    for p in (1.0000001, 2, 1e9):
        refused(rn.rms_norm, x, weight, p=p)
    refused(rn.rms_norm, x.reshape(2, -1, 1 << 12), weight[None].repeat(3, 0))  # its rows do not divide those of x


def out_that_may_not_be_written():
    """A file that is mapped for reading: a write to it ends the process."""
    x, dy, weight = arrays(1 << 10, 1 << 10)
    with tempfile.TemporaryFile() as file:
        file.write(x.tobytes())
        file.flush()
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), FLOAT).reshape(x.shape)
        refused(rn.rms_norm, mapped, weight, out=mapped)
        refused(rn.rms_norm_backward, dy, mapped, weight, out=mapped)
        assert_same(rn.rms_norm(mapped, weight), rn.rms_norm(x, weight))


def arguments_of_other_types():
    """Each combination has a kernel of its own; that of the one before would read other bytes, or fewer."""
    x, dy, weight = arrays(1 << 12, 1 << 10)
    for kind in ("float64", "float16", ml_dtypes.bfloat16, "float32", None):
        one = None if kind is None else weight.astype(kind)
        wide = None if one is None else one.astype(np.float64)
        y = rn.rms_norm(x, one)
        np.testing.assert_allclose(y, rn.rms_norm(x.astype(np.float64), wide, backend="reference"), rtol=ULP)
        grads = rn.rms_norm_backward(dy.astype(kind or "float32"), x, one)
        for row in (0, -1):
            alone = rn.rms_norm_backward(dy[row].astype(kind or "float32"), x[row], one, backend="reference").dx
            np.testing.assert_allclose(grads.dx[row], alone, rtol=ULP, atol=ULP * np.abs(alone).max())


_CASES = [
    out_beside_a_cache_line, output_of_numpy, rows_beside_a_cache_line, out_between_two_elements, inputs_at_odd_places,
    the_last_element_of_a_long_row, dweight_of_long_rows, rows_of_one_element, recycled_memory_of_another_size,
    arrays_that_are_too_short, out_that_may_not_be_written, arguments_of_other_types,
]  # fmt: skip
CASES = {case.__name__: case for case in _CASES}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
