"""Kernels check neither types, sizes nor addresses. Each rule that stands in place of such a check is held here.

Where a kernel would reach outside an array or fault, the call runs in a process of its own, at the size at which the
rule matters (`unchecked.py`). What a kernel is called with is compared with what it was compiled for without compiling.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from conftest import DTYPES
from programs import run
from unchecked import CASES

import rmsnorm_np as rn
from rmsnorm_np import cpu
from rmsnorm_np.cpu import blocks, extreme, kernels, long_rows, memory, threads
from rmsnorm_np.cpu.jit import Kernel

# Each case starts an interpreter; the others are for --engine.
FIRST = ("out_beside_a_cache_line", "recycled_memory_of_another_size", "arrays_of_the_kernels")
PROGRAM = Path(__file__).with_name("unchecked.py")


@pytest.mark.skipif(sys.platform == "win32", reason="pages are protected by mprotect")
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.engine] * (name not in FIRST)) for name in CASES],
)
def test_no_call_reaches_outside_its_arrays(case):
    run(PROGRAM, case, NUMBA_DISABLE_JIT=int(case == "arrays_of_the_kernels"))


# ------------------------------------------------------------------------ what kernels are called with


class Recorder:
    """Stands for a kernel: keeps the types that each key was called with, and looks at the arrays."""

    def __init__(self, name, kernel):
        self.name = name
        self.signature = inspect.signature(getattr(kernel.dispatcher, "py_func", kernel.dispatcher))
        self.types = {}
        self.compiled = self

    def get(self, key):
        def called(*args):
            types = tuple(map(numba.typeof, args))
            assert self.types.setdefault(key, types) == types, f"{self.name}: one key, two kinds of arguments"
            given = self.signature.bind(*args).arguments
            if self.name == "add_rows":
                return self.check_sum(**given)
            self.check(**given)
            return given["skipped"] is not None  # so that the kernels of extreme rows are called, too

        return called

    def check_sum(self, partial, total, threads):
        assert partial.shape[1] == total.shape[1]
        assert len(partial) % len(total) == 0
        assert partial.flags.carray
        assert total.flags.carray
        assert 1 <= threads <= numba.config.NUMBA_NUM_THREADS

    def check(self, x, k, skipped, **others):
        """Sizes and places, as the kernel takes them for granted."""
        rows, n = x.shape
        assert 1 <= k <= n
        assert 1 <= others["threads"] <= numba.config.NUMBA_NUM_THREADS
        assert skipped is None or skipped.shape == (rows,)
        chunks, m = others.get("chunks", 1), others["m"]
        weight_m, bias_m = others.get("weight_m", m), others.get("bias_m", m)
        lengths = {
            "dy": {rows}, "y": {rows}, "dx": {rows}, "weight": {weight_m}, "bias": {bias_m},
            "weight_partial": {chunks * m}, "bias_partial": {chunks * m},
            # of short rows the kernel repeats the sums' own length; of long ones, every row of m has its sums
            "dweight": {m} if self.name.startswith("long") else {d for d in range(1, m + 1) if m % d == 0},
        }  # fmt: skip
        lengths["dbias"] = lengths["dweight"]
        assert rows % m == rows % weight_m == rows % bias_m == 0
        for name, array in others.items():
            if isinstance(array, np.ndarray):
                assert array.flags.carray, f"{self.name}: {name} is not contiguous, aligned and writable"
                assert array.shape[1] == n, name
                assert len(array) in lengths[name], name
        if others.get("streaming") and n <= blocks.SHORT_ROW:
            assert others.get("y", others.get("dx")).ctypes.data % memory.LINE == 0


@pytest.fixture
def recorders(monkeypatch):
    """In place of every kernel of the engine."""
    recorders = []
    for module in (kernels, long_rows, extreme):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, Kernel):
                recorders.append(Recorder(name, kernel))
                monkeypatch.setattr(module, name, recorders[-1])
    assert len(recorders) == 7
    # the sizes from which calls take another way
    monkeypatch.setattr(long_rows, "LONG_ROW", 100)
    monkeypatch.setattr(threads, "PARALLEL_ELEMENTS", 1000)
    monkeypatch.setattr(memory, "STREAM_BYTES", 0)
    return recorders


def given(kind, *shape):
    return None if kind is None else np.ones(shape, kind)


@np.errstate(all="ignore")  # nothing is computed here, and unset memory holds any numbers
def test_a_key_stands_for_one_combination_of_types(recorders):
    """A kernel that was compiled for 4-byte weights and is called with 2-byte ones reads what lies behind them."""
    kinds = (None, *DTYPES)
    heads_of_both = (1, 1), (6, 1), (1, 6), (6, 12)
    for x_dtype, rows, n, (heads, bias_heads) in itertools.product(DTYPES, (12, 144), (16, 101), heads_of_both):
        x, dys = np.ones((rows, n), x_dtype), [np.ones((rows, n), kind) for kind in DTYPES]
        for kind, bias_kind, offset in itertools.product(kinds, kinds, (0.0, 1.0)):
            weight, bias = given(kind, heads, n), given(bias_kind, bias_heads, n)
            numbers = 1e-6, offset if kind is not None else 0.0, None
            cpu.rms_forward(x, weight, bias, n // 2, *numbers)
            cpu.layer_forward(x, weight, bias, *numbers)
            for dy in dys:
                cpu.rms_backward(dy, x, weight, bias, n // 2, *numbers)
                cpu.layer_backward(dy, x, weight, bias, *numbers)


def locked(a):
    a.flags.writeable = False
    return a


# The array as callers may have it.
LAYOUTS = {
    "a part": lambda a: np.concatenate([a, a], axis=-1)[..., : a.shape[-1]],
    "fortran": lambda a: np.array(a, order="F"),
    "unaligned": lambda a: np.frombuffer(bytearray(b"?" + a.tobytes()), np.uint8, offset=1).view(a.dtype),
    "read-only": locked,
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [16, 101])
@np.errstate(all="ignore")
def test_kernels_get_arrays_of_one_layout(layout, n, recorders):
    """Each argument by itself in another layout, after a call that fixed the types."""
    shapes = {"x": (12, n), "dy": (12, n), "weight": (n,), "bias": (n,), "out": (12, n)}

    def call(**changed):
        a = {name: np.ones(shape) for name, shape in shapes.items()} | changed
        for norm in ("rms_norm", "layer_norm"):
            getattr(rn, norm)(a["x"], a["weight"], a["bias"], out=a["out"])
            getattr(rn, f"{norm}_backward")(a["dy"], a["x"], a["weight"], a["bias"], out=a["out"])

    call()
    for name, shape in shapes.items():
        if (name, layout) != ("out", "read-only"):
            call(**{name: LAYOUTS[layout](np.ones(shape)).reshape(shape)})
