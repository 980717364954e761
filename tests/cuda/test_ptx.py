"""The interpreter of PTX by which the engine is tested: it finds what a GPU would not forgive."""

from __future__ import annotations

import types

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

import ptx
from numba import cuda
from numba.cuda import dispatcher
from numba.cuda import types as kinds
from ptx_instructions import PTXError, fused


@pytest.fixture(autouse=True)
def no_device_is_asked(monkeypatch):
    here = types.SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: here)


def run(function, blocks, threads, *arrays):
    """Execute function(pointers to float32 …) on these arrays."""
    signature = (kinds.CPointer(kinds.float32),) * len(arrays)
    code = cuda.compile(function, signature, device=False, abi="numba", output="ptx", cc=(9, 0))[0]
    module = ptx.Module(code if isinstance(code, str) else code.decode())
    addresses = [np.uint64(a.ctypes.data) for a in arrays]
    return ptx.Machine(module, blocks, threads, addresses, ptx.Memory(arrays)).run()


def floats(*values):
    return np.array(values, np.float32)


def test_threads_and_blocks():
    def twice(x, y):
        i = cuda.blockIdx.x * 3 + cuda.threadIdx.x
        if i < 5:
            y[i] = x[i] + x[i]

    x, y = floats(1, 2, 3, 4, 5), np.zeros(5, np.float32)
    done = run(twice, 2, 3, x, y)
    np.testing.assert_array_equal(y, x + x)
    assert done.accesses == {("ld", 4): 5, ("st", 4): 5}


def test_an_access_out_of_bounds():
    def one_too_many(x):
        x[cuda.threadIdx.x] = 1.0

    with pytest.raises(PTXError, match="out of bounds"):
        run(one_too_many, 1, 6, np.zeros(5, np.float32))


def test_a_misaligned_access():
    def first(x, y):
        y[0] = x[0]

    room = np.zeros(20, np.uint8)
    with pytest.raises(PTXError, match="misaligned"):
        run(first, 1, 1, room[room.ctypes.data % 2 + 1 :][:4], np.zeros(1, np.float32))


def exchange(barrier):
    def kernel(x, y):
        table = cuda.shared.array(64, np.float32)
        i = cuda.threadIdx.x
        table[i] = x[i]
        if barrier:
            cuda.syncthreads()
        y[i] = table[63 - i]

    return kernel


def test_a_race():
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    run(exchange(True), 1, 64, x, y)
    np.testing.assert_array_equal(y, x[::-1])
    with pytest.raises(PTXError, match=r"race in shared memory|nothing has written"):
        run(exchange(False), 1, 64, x, y)


def test_a_write_while_others_read():
    def kernel(x, y):
        table = cuda.shared.array(1, np.float32)
        i = cuda.threadIdx.x
        if i == 0:
            table[0] = x[0]
        cuda.syncthreads()
        y[i] = table[0]
        if i == 1:
            table[0] = x[1]

    with pytest.raises(PTXError, match="race in shared memory"):
        run(kernel, 1, 2, floats(1, 2), np.zeros(2, np.float32))


def test_shared_memory_that_nothing_has_written():
    def kernel(y):
        table = cuda.shared.array(4, np.float32)
        if y[0] > 0:
            table[1] = y[0]
        y[1] = table[1]

    run(kernel, 1, 1, floats(1, 0))
    with pytest.raises(PTXError, match="nothing has written"):
        run(kernel, 1, 1, floats(0, 0))


def test_a_barrier_that_some_do_not_reach():
    def kernel(x):
        if cuda.threadIdx.x > 0:
            cuda.syncthreads()
        x[cuda.threadIdx.x] = 1.0

    with pytest.raises(PTXError, match="not all threads"):
        run(kernel, 1, 2, np.zeros(2, np.float32))


def test_votes_at_a_barrier():
    def kernel(x, y):
        i = cuda.blockIdx.x * 2 + cuda.threadIdx.x
        y[i] = cuda.syncthreads_or(1 if x[i] > 0 else 0)

    y = np.zeros(4, np.float32)
    run(kernel, 2, 2, floats(0, 1, 0, 0), y)
    assert [bool(vote) for vote in y] == [True, True, False, False]


@pytest.mark.parametrize("threads", [32, 20])
def test_a_partial_warp(threads):
    """A shuffle among all lanes of a warp, some of which do not exist."""

    def kernel(x, y):
        y[cuda.threadIdx.x] = cuda.shfl_xor_sync(0xFFFFFFFF, x[cuda.threadIdx.x], 1)

    x, y = np.arange(threads, dtype=np.float32), np.zeros(threads, np.float32)
    if threads == 32:
        run(kernel, 1, threads, x, y)
        np.testing.assert_array_equal(y, x[np.arange(32) ^ 1])
    else:
        with pytest.raises(PTXError, match="not here"):
            run(kernel, 1, threads, x, y)


def test_atomics_are_refused():
    module = ptx.Module(".entry k(.param .u64 a) { atom.global.add.f32 %f1, [%rd1], %f2; ret; }")
    with pytest.raises(PTXError, match="not known: atom"):
        ptx.Machine(module, 1, 1, [np.uint64(0)], ptx.Memory([])).run()


def test_fused_multiply_add_is_rounded_once():
    x, y = np.array([1 + 2.0**-30]), np.array([1 - 2.0**-30])
    assert fused(x, y, -np.ones(1))[0] == -(2.0**-60)
    x, y = np.float32([1 + 2.0**-12]), np.float32([1 - 2.0**-12])
    assert fused(x, y, -np.ones(1, np.float32))[0] == np.float32(-(2.0**-24))
    with np.errstate(invalid="ignore"):
        assert np.isinf(fused(np.array([np.inf]), np.ones(1), np.ones(1)))[0]
