"""Kernels check neither types, sizes nor addresses. Each rule that stands in place of such a check is held here.

Where a kernel would reach outside an array or fault, the call runs in a process of its own, at the size at which the
rule matters (`unchecked.py`). What a kernel is called with is compared with what it was compiled for without compiling.
"""

from __future__ import annotations

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
from rmsnorm_np.cpu import blocks, kernel, long_rows, memory, threads
from rmsnorm_np.ops import layer, rms

# Each case starts an interpreter; the others are for --engine.
FIRST = ("out_beside_a_cache_line", "recycled_memory_of_another_size")
PROGRAM = Path(__file__).with_name("unchecked.py")


@pytest.mark.skipif(sys.platform == "win32", reason="pages are protected by mprotect")
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.engine] * (name not in FIRST)) for name in CASES],
)
def test_no_call_reaches_outside_its_arrays(case):
    run(PROGRAM, case)


# ------------------------------------------------------------------------ what kernels are called with


def kind(value):
    """What a kernel is compiled for: whether an array is read-only makes no difference."""
    if isinstance(value, tuple):
        return tuple(map(kind, value))
    found = numba.typeof(value)
    return found.copy(readonly=False) if isinstance(found, numba.types.Array) else found


class Recorder:
    """Stands for the machine code of a kernel: one combination of types, as that is all it was compiled for."""

    def __init__(self, label):
        self.label, self.types = label, None

    def __call__(self, *args):
        found = kind(args)
        first = self.types is None
        self.types = self.types or found
        assert found == self.types, f"{self.label}: one key, two kinds of arguments"
        if self.label.startswith("add_rows"):
            return self.check_sum(*args)
        self.check(*args)
        marks = args[-2]
        if marks is None or not first:
            return 0
        marks[:] = 1  # so that the kernel for rows out of range is called, too
        return len(marks)

    def check_sum(self, partial, total, threads):
        assert partial.shape[1] == total.shape[1]
        assert len(partial) % len(total) == 0
        assert partial.flags.carray
        assert total.flags.carray
        assert 1 <= threads <= numba.config.NUMBA_NUM_THREADS

    def check(self, reads, columns, writes, *rest):
        """Sizes and places, as the kernel takes them for granted."""
        marks, threads = rest[-2:]
        rows, n = reads[0].shape
        weight_m, bias_m = (1 if a is None else len(a) for a in columns[:2])
        if isinstance(rest[0], tuple):  # backward
            partials, totals, (k, eps, streaming, m, chunks) = rest[:3]
            assert rows % m == 0
            long = n > long_rows.LONG_ROW
            # of short rows the kernel repeats the sums' own length; of long ones, every row of m has its sums
            self.check_arrays(totals, n, {m} if long else {d for d in range(1, m + 1) if m % d == 0})
            for room in partials:  # and what is left of a cache line before the first
                assert room is None or (room.dtype == np.float64 and room.flags.carray)
                assert room is None or room.shape == (chunks * m * n + memory.LINE // 8,)
        else:
            k, eps, streaming = rest[:3]
        assert k is None or 1 <= k < n
        assert isinstance(eps, float) or (eps.shape == (rows,) and eps.flags.carray)
        assert 1 <= threads <= numba.config.NUMBA_NUM_THREADS
        assert marks is None or marks.shape == (rows,)
        assert rows % weight_m == rows % bias_m == 0
        self.check_arrays((*reads, *writes), n, {rows})
        assert all(a is None or a.flags.writeable for a in writes), f"{self.label}: an array to write to is read-only"
        self.check_arrays(columns[:2], n, {weight_m, bias_m})
        if streaming and n <= blocks.SHORT_ROW:
            assert writes[0].ctypes.data % memory.LINE == 0

    def check_arrays(self, arrays, n, lengths):
        for array in arrays:
            if array is not None:
                assert array.flags.c_contiguous, f"{self.label}: an array is not contiguous"
                assert array.flags.aligned, f"{self.label}: an array is not aligned"
                assert array.shape[1] == n
                assert len(array) in lengths


@pytest.fixture
def recorders(monkeypatch):
    """In place of every kernel of the engine."""
    monkeypatch.setattr(kernel, "entries", {})
    monkeypatch.setattr(kernel, "_adders", {})
    monkeypatch.setattr(kernel, "compiled", lambda label, make, args: Recorder(label))
    # the sizes from which calls take another way
    monkeypatch.setattr(long_rows, "LONG_ROW", 100)
    monkeypatch.setattr(threads, "PARALLEL_ELEMENTS", 1000)
    monkeypatch.setattr(memory, "STREAM_BYTES", 0)


def given(kind, *shape):
    return None if kind is None else np.ones(shape, kind)


@np.errstate(all="ignore")  # nothing is computed here, and unset memory holds any numbers
@pytest.mark.engine
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("recorders")
def test_a_key_stands_for_one_combination_of_types(x_dtype):
    """A kernel that was compiled for 4-byte weights and is called with 2-byte ones reads what lies behind them."""
    kinds = (None, *DTYPES)
    heads_of_both = (1, 1), (6, 1), (1, 6), (6, 12)
    for rows, n, (heads, bias_heads) in itertools.product((12, 144), (16, 101), heads_of_both):
        x, *dys = (np.ones((rows, n), kind) for kind in (x_dtype, *DTYPES))
        residuals = None, dys[0], dys[-1]
        for kind, bias_kind, offset in itertools.product(kinds, kinds, (0.0, 1.0)):
            weight, bias = given(kind, heads, n), given(bias_kind, bias_heads, n)
            columns = weight, bias, offset if kind is not None else 0.0
            cpu.forward(rms.RMS_NORM, (x, None), columns, (None, None), n, 1e-6)
            for residual in residuals:
                cpu.forward(rms.RMS_NORM, (x, residual), columns, (None, None), n // 2, 1e-6)
                cpu.forward(layer.LAYER_NORM, (x, residual), columns, (None, None), n, 1e-6)
            for dy, dh in itertools.product(dys, residuals):
                cpu.backward(rms.RMS_NORM_BACKWARD, (x, dy, dh), columns, (None,), n // 2, 1e-6)
            for dy in dys:
                cpu.backward(rms.RMS_NORM_BACKWARD, (x, dy, None), columns, (None,), n, 1e-6)
                cpu.backward(layer.LAYER_NORM_BACKWARD, (x, dy, dy), columns, (None,), n, 1e-6)
    assert len(kernel.entries) > 100


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
@pytest.mark.usefixtures("recorders")
def test_kernels_get_arrays_of_one_layout(layout, n):
    """Each argument by itself in another layout, after a call that fixed the types."""
    shapes = dict.fromkeys(("x", "dy", "residual", "dh", "out", "out_h"), (12, n)) | {"weight": (n,), "bias": (n,)}

    def call(**changed):
        a = {name: np.ones(shape) for name, shape in shapes.items()} | changed
        given = a["weight"], a["bias"]
        for norm in ("rms_norm", "layer_norm"):
            getattr(rn, norm)(a["x"], *given, out=a["out"])
            getattr(rn, f"{norm}_backward")(a["dy"], a["x"], *given, out=a["out"])
            getattr(rn, f"add_{norm}")(a["x"], a["residual"], *given, out=a["out"], residual_out=a["out_h"])
            getattr(rn, f"add_{norm}_backward")(a["dy"], a["dh"], a["x"], *given, out=a["out"])

    call()
    for name, shape in shapes.items():
        if layout != "read-only" or not name.startswith("out"):
            call(**{name: LAYOUTS[layout](np.ones(shape)).reshape(shape)})
