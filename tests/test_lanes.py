"""The vectors themselves: conversions of 16-bit floats, and the same bits on a processor without any extension."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from llvmlite import ir
from tolerances import worst_ulp

import rmsnorm_np as rn
from rmsnorm_np import cpu
from rmsnorm_np.cpu import kernel, llvm, long_rows
from rmsnorm_np.cpu.arrays import pointers
from rmsnorm_np.cpu.jit import compiled
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import Work

ALL_BITS = np.arange(65536, dtype=np.uint16)

# float32 on both sides of every border of the narrower type: all its values, their neighbours, the middles between
# them (ties) and the neighbours of those; and NaN with a payload that rounding must not carry away
with np.errstate(all="ignore"):
    _edges = [
        kind.astype(np.float32)[np.isfinite(kind.astype(np.float32))]
        for kind in (ALL_BITS.view(np.float16), ALL_BITS.view(ml_dtypes.bfloat16))
    ]
    _middles = [(np.sort(values)[1:] / 2 + np.sort(values)[:-1] / 2).astype(np.float32) for values in _edges]
    _points = np.concatenate([*_edges, *_middles])
    FLOATS = np.concatenate(
        [_points, np.nextafter(_points, np.float32(np.inf)), np.nextafter(_points, np.float32(-np.inf))]
    )
SPECIAL = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001, 1, 0x80000001], np.uint32)
FLOATS = np.concatenate([FLOATS, SPECIAL.view(np.float32), np.zeros(-(len(FLOATS) + 8) % 32, np.float32)])


SINGLE, WIDE = Work("single", 8), Work("single", 16)


def converter(source, target, work):
    """A fresh compilation of: load each vector of elements, store them in the other type."""

    def move(w, s, t, i):
        w.store(t, target.dtype.name, i, w.load(s, source.dtype.name, i, work))

    move, width = step(move), work.width

    def convert(source, target):
        s, t = pointers(source), pointers(target)
        for i in range(0, source.size, width):
            move((s, t, i))

    bits = [bits_of(array) for array in (source, target)]
    return lambda: compiled(None, lambda: convert, tuple(bits))(*bits)


def bits_of(array):
    return array if array.itemsize > 2 else array.view(np.uint16)


@pytest.fixture(params=["instruction", "software"])
def convert(request, monkeypatch):
    """The conversion by an instruction of the processor, if it has one, and the one for processors that have none."""
    if request.param == "software":
        monkeypatch.setattr(llvm, "_has_float16_conversion", lambda context: False)

    def convert(source, target):
        converter(source, target, WIDE if "bfloat16" in (source.dtype.name, target.dtype.name) else SINGLE)()

    return convert


def same_numbers(got, want):
    """The same bits, but for NaN, which has many."""
    nan = np.isnan(want.astype(np.float32))
    assert np.array_equal(np.isnan(got.astype(np.float32)), nan)
    assert got[~nan].tobytes() == want[~nan].tobytes()


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_every_half_is_read_and_written_exactly(kind, convert):
    halves = ALL_BITS.view(kind)
    wide = np.empty(65536, np.float32)
    convert(halves, wide)
    with np.errstate(invalid="ignore"):
        same_numbers(wide, halves.astype(np.float32))
    back = np.empty(65536, kind)
    convert(wide, back)
    same_numbers(back, halves)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_float32_is_rounded_to_half_with_ties_to_even(kind, convert):
    got = np.empty(len(FLOATS), kind)
    convert(FLOATS, got)
    with np.errstate(all="ignore"):
        same_numbers(got, FLOATS.astype(kind))


@pytest.mark.parametrize("source", [FLOATS, ALL_BITS.view(np.float16), ALL_BITS.view(ml_dtypes.bfloat16)])
@pytest.mark.parametrize("work", [SINGLE, WIDE], ids=["8", "16"])
def test_vectors_are_rounded_to_bfloat16(source, work):
    """No NaN becomes a number, whatever its bits; what comes from bfloat16 comes back."""
    got = np.empty(len(source), ml_dtypes.bfloat16)
    converter(source, got, work)()
    with np.errstate(all="ignore"):
        same_numbers(got, source.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("work", [SINGLE, WIDE], ids=["8", "16"])
def test_a_part_of_a_vector(kind, work):
    """The first `count` elements, zeros behind them; nothing behind them is written."""
    name, width = np.dtype(kind).name, work.width

    def move(w, s, t, count):
        lanes = w.load(s, name, ir.Constant(llvm.I64, 0), work, count)
        w.store(t, name, ir.Constant(llvm.I64, 0), lanes)
        w.store(t, name, ir.Constant(llvm.I64, 16), lanes, count)

    move = step(move)

    def copy(source, target, count):
        move((pointers(source), pointers(target), count))

    source, target = np.arange(1, 17).astype(kind), np.empty(32, kind)
    code = compiled(None, lambda: copy, (bits_of(source), bits_of(target), 1))
    for count in range(1, width + 1):
        target[...] = source[0]
        code(bits_of(source), bits_of(target), count)
        assert np.array_equal(target[:width], np.where(np.arange(width) < count, source[:width], 0))
        assert np.array_equal(target[16:], np.where(np.arange(16) < count, source, source[0]))


def test_no_later_call_compiles_what_warmup_has_not(monkeypatch):
    """Half-precision backward from 128 rows on did, where the weight is converted beforehand, and so did long rows."""

    def code(*args):
        """In place of a kernel: it marks the last row, as out of range."""
        marks = args[-2]
        if marks is None:
            return 0
        marks[-1] = 1
        return 1

    monkeypatch.setattr(kernel, "compiled", lambda label, make, args: code)
    monkeypatch.setattr(kernel, "entries", {})
    monkeypatch.setattr(kernel, "add_rows", lambda *args: None)
    steps = []
    cpu.warmup(report=steps.append)
    assert len(steps) == 4 * 3
    keys = set(kernel.entries)
    for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        for shape in ((7, 3), (130, 5), (2, long_rows.LONG_ROW + 2)):
            x, w = np.ones(shape, kind), np.ones(shape[1], kind)
            for weight, bias in ((w, None), (None, None), (w, w)):
                rn.rms_norm(x, weight, bias)
                rn.rms_norm_backward(x, x, weight, bias)
                rn.layer_norm(x, weight, bias)
                rn.layer_norm_backward(x, x, weight, bias)
    assert set(kernel.entries) == keys


PROGRAM = """
import sys
import ml_dtypes
import numpy as np
import rmsnorm_np as rn

rng = np.random.default_rng(0)
x, dy, w = rng.standard_normal((5, 3001)), rng.standard_normal((5, 3001)), rng.standard_normal(3001)
results = {}
for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
    arrays = [a.astype(dtype) for a in (x, dy, w)]
    name = np.dtype(dtype).name
    results["y " + name] = rn.rms_norm(arrays[0], arrays[2])
    results["dx " + name] = rn.rms_norm_backward(arrays[1], arrays[0], arrays[2]).dx
np.savez(sys.argv[1], **{name: result.view(np.uint8) for name, result in results.items()})
"""


@pytest.mark.engine
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the generic processor is an x86-64 without extensions")
def test_a_processor_without_extensions(tmp_path):
    """Forward the same bits: nothing but exact products is fused, and no F16C, AVX or FMA is needed for the result.

    Backward, multiply-add rounds once what is rounded twice without it: in float64, so only a tie can tell.
    """
    results = []
    cache = tmp_path / "cache"
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(cache)}
    for name, more in (("generic", generic), ("host", {})):
        environment = {**os.environ, **more}
        path = tmp_path / f"{name}.npz"
        command = [sys.executable, "-c", PROGRAM, str(path)]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr
        results.append(dict(np.load(path)))
    for name in ("float16", "bfloat16", "float32", "float64"):
        generic, host = (result["y " + name] for result in results)
        assert generic.tobytes() == host.tobytes()
        dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
        generic, host = (result["dx " + name].view(dtype) for result in results)
        assert worst_ulp(generic, host, np.abs(host).max()) <= 1
    assert len(list((cache / "rmsnorm_np").iterdir())) == 8  # and none was the host's
