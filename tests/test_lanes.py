"""The vectors themselves: conversions of 16-bit floats, and the same bits on a processor without any extension."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import ml_dtypes
import numba
import numpy as np
import pytest
from tolerances import worst_ulp

import rmsnorm_np as rn
from rmsnorm_np import cpu
from rmsnorm_np.cpu import extreme, jit, kernels, llvm, long_rows, simd  # noqa: F401  (jit registers how simd compiles)

JIT_OFF = bool(numba.config.DISABLE_JIT)

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


def converter():
    """A fresh compilation of: load each vector of elements, store them in the other type."""

    def convert(source, target):
        s, t = simd.data(source), simd.data(target)
        for i in range(0, source.size, simd.width(s, simd.float32)):
            simd.store(t, i, simd.load(s, i, simd.float32))

    return numba.njit(convert)


def converter_beside_bfloat16():
    """The same with vectors in the order that bfloat16 is loaded in."""

    def convert(source, target):
        s, t = simd.data(source), simd.data(target)
        like = simd.zeros(t, simd.float32)
        for i in range(0, source.size, simd.width(t, simd.float32)):
            simd.store(t, i, simd.load(s, i, like))

    return numba.njit(convert)


@pytest.fixture(params=["instruction", "software"])
def convert(request, monkeypatch):
    """The conversion by an instruction of the processor, if it has one, and the one for processors that have none."""
    if request.param == "software":
        monkeypatch.setattr(llvm, "_has_float16_conversion", lambda context: False)
    return converter()


def same_numbers(got, want):
    """The same bits, but for NaN, which has many."""
    nan = np.isnan(want.astype(np.float32))
    assert np.array_equal(np.isnan(got.astype(np.float32)), nan)
    assert got[~nan].tobytes() == want[~nan].tobytes()


@pytest.mark.parametrize(("kind", "stored"), [(np.float16, np.uint16), (ml_dtypes.bfloat16, np.int16)])
def test_every_half_is_read_and_written_exactly(kind, stored, convert):
    halves = ALL_BITS.view(kind)
    wide = np.empty(65536, np.float32)
    convert(ALL_BITS.view(stored), wide)
    with np.errstate(invalid="ignore"):
        same_numbers(wide, halves.astype(np.float32))
    back = np.empty(65536, stored)
    convert(wide, back)
    same_numbers(back.view(kind), halves)


@pytest.mark.parametrize(("kind", "stored"), [(np.float16, np.uint16), (ml_dtypes.bfloat16, np.int16)])
def test_float32_is_rounded_to_half_with_ties_to_even(kind, stored, convert):
    got = np.empty(len(FLOATS), stored)
    convert(FLOATS, got)
    with np.errstate(all="ignore"):
        same_numbers(got.view(kind), FLOATS.astype(kind))


@pytest.mark.parametrize("source", [FLOATS, ALL_BITS.view(np.float16), ALL_BITS.view(ml_dtypes.bfloat16)])
def test_vectors_of_sixteen_are_rounded_to_bfloat16(source):
    """No NaN becomes a number, whatever its bits; what comes from bfloat16 comes back."""
    got = np.empty(len(source), np.int16)
    stored = {np.float32: np.float32, np.float16: np.uint16}.get(source.dtype.type, np.int16)
    converter_beside_bfloat16()(source.view(stored), got)
    with np.errstate(all="ignore"):
        same_numbers(got.view(ml_dtypes.bfloat16), source.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("stored", [np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("wide", [False, True])
def test_a_part_of_a_vector(stored, wide):
    """The first `count` elements, zeros behind them; nothing behind them is written."""

    def copy(source, target, like, count):
        s, t = simd.data(source), simd.data(target)
        zeros = simd.zeros(simd.data(like), simd.float32)
        simd.store(t, 0, simd.load(s, 0, zeros, count))
        simd.store(t, 16, simd.load(s, 0, zeros, count), count)

    copy = numba.njit(copy)
    like = np.empty(1, np.int16 if wide else np.uint16)
    source = np.arange(1, 17).astype(np.float32)
    if stored != np.float32:
        source = source.astype(np.float16 if stored == np.uint16 else ml_dtypes.bfloat16).view(stored)
    width = 16 if wide else 8
    for count in range(1, width + 1):
        target = np.full(32, source[0])
        copy(source, target, like, count)
        assert np.array_equal(target[:width], np.where(np.arange(width) < count, source[:width], 0))
        assert np.array_equal(target[16:], np.where(np.arange(16) < count, source, source[0]))


KERNELS = {
    "forward": kernels.forward, "backward": kernels.backward, "extreme forward": extreme.forward,
    "extreme backward": extreme.backward, "long forward": long_rows.long_forward,
    "long backward": long_rows.long_backward,
}  # fmt: skip


@pytest.mark.skipif(not JIT_OFF, reason="compiles for minutes; without the JIT a kernel's key tells the same")
def test_no_later_call_compiles_what_warmup_has_not(monkeypatch):
    """Half-precision backward from 128 rows on did, where the weight is converted beforehand, and so did long rows."""
    monkeypatch.setattr(long_rows, "LONG_ROW", 99)
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "compiled", {})
    steps = []
    cpu.warmup(report=steps.append)
    assert len(steps) == 4 * 3
    keys = {name: set(kernel.compiled) for name, kernel in KERNELS.items()}
    # of float64 both norms, and of half types RMSNorm forward, with each of three sets of parameters
    assert len(keys["extreme forward"]) == 3 * 4
    for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        for shape in ((7, 3), (130, 5), (2, 101)):
            x = np.ones(shape, kind)
            x[-1], w = np.inf, np.ones(shape[1], kind)
            for weight, bias in ((w, None), (None, None), (w, w)):
                for p in (1.0, 0.5):
                    rn.rms_norm(x, weight, bias, p=p)
                    rn.rms_norm_backward(x, x, weight, bias, p=p)
                rn.layer_norm(x, weight, bias)
                rn.layer_norm_backward(x, x, weight, bias)
    for name, kernel in KERNELS.items():
        assert set(kernel.compiled) == keys[name]


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
@pytest.mark.skipif(JIT_OFF, reason="nothing is compiled without the JIT")
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
