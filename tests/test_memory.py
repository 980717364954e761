"""Where large outputs live: memory is used again, and never while anything can still see it."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import rmsnorm_np as rn
from rmsnorm_np.cpu import memory

SHAPE, DTYPE = (256, 8192), np.dtype(np.float32)  # 8 MiB: recycled, and written past the cache
NBYTES = 256 * 8192 * 4


@pytest.fixture(autouse=True)
def own_pool(monkeypatch):
    """A pool of 64 MiB for one test."""
    pool = memory._Pool(64 << 20)
    monkeypatch.setattr(memory, "_pool", pool)
    return pool


def filled(value):
    array = memory.empty(SHAPE, DTYPE)
    array[...] = value
    return array


def test_memory_is_used_again():
    array = filled(1.0)
    address = array.ctypes.data
    del array
    assert memory.empty(SHAPE, DTYPE).ctypes.data == address


@pytest.mark.parametrize(
    "export",
    [
        lambda array: array[3:5, ::7],
        lambda array: array.T,
        lambda array: array.view(np.uint32).reshape(-1)[1:],
        memoryview,
        lambda array: memoryview(array)[1:],
        np.from_dlpack,
        lambda array: array.__dlpack__(),
        lambda array: np.frombuffer(array, np.uint8),
        lambda array: array.flat,
        lambda array: array.ctypes,
        lambda array: [array[0]],
    ],
    ids=[
        "slice",
        "transpose",
        "view",
        "memoryview",
        "its part",
        "dlpack",
        "capsule",
        "buffer",
        "flat",
        "ctypes",
        "row",
    ],
)
def test_memory_is_not_used_again_while_it_can_be_seen(export):
    array = filled(1.0)
    address = array.ctypes.data
    kept = export(array)
    del array
    gc.collect(1)  # a whole collection takes a second in a process with all tests
    others = [filled(2.0) for _ in range(4)]
    assert address not in [other.ctypes.data for other in others]
    del kept, others
    gc.collect(1)  # a whole collection takes a second in a process with all tests
    assert address in [one.ctypes.data for one in [memory.empty(SHAPE, DTYPE) for _ in range(6)]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_memory_of_its_own(own_pool):
    """What it computes there is not seen in its parent, nor in another child: in outputs, and in free memory."""
    kept, freed = filled(1.0), filled(1.0)
    address = freed.ctypes.data
    del freed
    child = os.fork()
    if child == 0:
        kept[...] = 2.0
        again = filled(2.0)
        os._exit(0 if again.ctypes.data == address else 3)
    assert os.waitpid(child, 0)[1] == 0
    assert (kept == 1.0).all()
    assert (np.frombuffer(own_pool.free[0].mapped, DTYPE, SHAPE[0] * SHAPE[1]) == 1.0).all()


def test_outputs_are_aligned_and_far_from_their_inputs():
    for offset in (0, 16, 1024, 2048, 4032):
        room = np.zeros(NBYTES + 8192, np.uint8)
        start = -room.ctypes.data % memory.PAGE + offset
        x = room[start : start + NBYTES].view(DTYPE).reshape(SHAPE)
        y = memory.empty(SHAPE, DTYPE, x)
        assert y.ctypes.data % memory.LINE == 0
        assert y.flags.c_contiguous
        assert y.flags.writeable
        distance = (y.ctypes.data - x.ctypes.data) % memory.PAGE
        assert min(distance, memory.PAGE - distance) >= 1984
        z = memory.empty(SHAPE, DTYPE, x, y)
        for other in (x, y):
            distance = (z.ctypes.data - other.ctypes.data) % memory.PAGE
            assert min(distance, memory.PAGE - distance) >= 896


def test_huge_pages_are_not_needed(monkeypatch):
    """A Linux that was built without them refuses the advice to use them."""

    class Mapped(mmap.mmap):
        def madvise(self, *args):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Mapped)
    assert (filled(1.0) == 1.0).all()


def test_small_outputs_are_numpys():
    assert memory.empty((4, 8), DTYPE).base is None


@pytest.mark.parametrize(
    "call",
    [rn.add_rms_norm, pytest.param(lambda x, y: rn.gated_rms_norm_backward(x, x, y)[:2], marks=pytest.mark.engine)],
)
def test_results_that_are_large_together_are_used_again(call):
    """The C library gives back what is freed at once: 736 pages anew in each call took 1.2 ms in place of 0.5."""
    x = np.ones((512, 768), DTYPE)
    assert x.nbytes < memory.RECYCLE_BYTES < 2 * x.nbytes
    assert memory.empty(x.shape, DTYPE).base is None
    assert all(a.base is not None for a in call(x, x))


@pytest.mark.parametrize("size", [memory.RECYCLE_BYTES // 2, memory.RECYCLE_BYTES, 8 << 20, 33 << 20])
def test_little_is_taken_beyond_what_is_asked_for(size, own_pool):
    """Who keeps the results of many layers has all of it: 1 MiB took 2 when sizes were multiples of a huge page."""
    taken = len(own_pool.take(size + memory.PAGE))
    assert size + memory.PAGE <= taken <= size * 5 // 4
    assert taken <= size * 1.1 or size >= 8 << 20


def test_the_pool_is_bounded(own_pool):
    arrays = [filled(1.0) for _ in range(20)]
    assert not own_pool.free
    del arrays
    assert 0 < sum(map(len, own_pool.free)) <= own_pool.limit


def test_a_limit_of_zero_gives_everything_back_and_switches_off(own_pool):
    del_me = filled(1.0)
    del del_me
    assert own_pool.free
    assert memory.set_limit(0) == 64 << 20
    assert not own_pool.free
    assert memory.limit() == 0
    assert memory.empty(SHAPE, DTYPE).base is None


def test_memory_given_back_is_gone_from_the_process():
    """By the operating system's own count."""
    if not os.path.exists("/proc/self/statm"):  # noqa: PTH110
        pytest.skip("the resident size is read from /proc")

    def resident():
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    memory.set_limit(1 << 30)
    before = resident()
    big = memory.empty((64, 1 << 20), DTYPE)
    big[...] = 1.0
    used = resident() - before
    assert used > 200 << 20
    del big
    assert resident() - before > 200 << 20  # kept for the next
    memory.set_limit(0)
    assert resident() - before < 60 << 20


@pytest.mark.parametrize("limit", [-1, 1.5, True, "1", None])
def test_a_limit_is_a_number_of_bytes(limit):
    with pytest.raises(ValueError, match=r"^limit is .*, expected a number of bytes >= 0$"):
        memory.set_limit(limit)


def test_the_limit_comes_from_the_environment():
    code = "from rmsnorm_np.cpu import memory; print(memory.limit())"
    for text, limit in (("0", 0), ("7", 7 << 20), ("", 512 << 20)):
        environment = {**os.environ, "RMSNORM_NP_RECYCLE_MB": text}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert int(out.stdout) == limit
    environment = {**os.environ, "RMSNORM_NP_RECYCLE_MB": "lots"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "RMSNORM_NP_RECYCLE_MB is 'lots', expected a whole number of megabytes" in out.stderr


def test_threads_never_share_a_buffer():
    errors = []

    def work(value):
        for _ in range(30):
            array = filled(value)
            if not (array == value).all():
                errors.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
