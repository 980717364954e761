"""Flush-to-zero and directed rounding, left on in a thread by another library: kernels neither see nor change them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from rmsnorm_np.cpu import mode

PROGRAM = """
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

import rmsnorm_np as rn

# x86: flush-to-zero, denormals-are-zero and rounding up beside the masked exceptions; ARM: FZ and rounding up
NAME, MODE = {"x86_64": ("llvm.x86.sse.ldmxcsr", 0x1F80 | 0x8040 | 0x4000)}.get(
    "MACHINE", ("llvm.aarch64.set.fpcr", 1 << 24 | 1 << 22)
)

@intrinsic
def set_mode(context, mode):
    def generate(context, builder, signature, args):
        value = args[0]
        if "x86" in NAME:
            room = cgutils.alloca_once_value(builder, builder.trunc(value, ir.IntType(32)))
            value = builder.bitcast(room, cgutils.voidptr_t)
        function = ir.FunctionType(ir.VoidType(), [value.type])
        builder.call(cgutils.get_or_insert_function(builder.module, function, NAME), [value])
        return context.get_dummy_value()
    return types.none(types.int64), generate

@numba.njit
def leave_on(mode):
    set_mode(mode)

def is_on():
    halved, third = np.array([1e-310]) * 0.5, np.array([1.0]) / 3
    return halved[0] == 0 and third[0] != 1 / np.longdouble(3) and third[0] == np.nextafter(0.3333333333333333, 1)

rng = np.random.default_rng(0)

def results(norm, backward, shape, heads):
    # rows of subnormal numbers, and of ordinary ones whose last bit would depend on the direction of rounding
    x = rng.integers(-1000, 1000, shape) * 5e-324 if shape[0] % 2 else rng.standard_normal(shape)
    rows = x.reshape(-1, heads, shape[1])
    weight, bias = np.full(rows.shape[1:], 1.5), np.zeros(shape[1])
    def call():
        with np.errstate(all="ignore"):
            grads = backward(x.reshape(rows.shape), rows, weight, bias, eps=0.0)
            return [a.tobytes() for a in (norm(rows, weight, bias, eps=0.0), *grads)]
    return call

cases = [
    results(norm, backward, shape, heads)
    for norm, backward in ((rn.rms_norm, rn.rms_norm_backward), (rn.layer_norm, rn.layer_norm_backward))
    for shape, heads in (((1, 5), 1), ((601, 1024), 1), ((600, 1024), 1), ((3, 70_001), 1), ((2, 70_001), 2))
]
want = [case() for case in cases]
leave_on(MODE)
assert is_on(), "this test has set no mode"
for _ in range(3):
    for case, one in zip(cases, want):
        assert case() == one
        assert is_on(), "the caller's mode is gone"
"""


@pytest.mark.engine
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"), reason="how to set its mode is not known here"
)
def test_the_mode_of_the_calling_thread_is_neither_seen_nor_changed():
    """One thread with the mode on and one without gave 10 different results in 50 calls; short rows and long ones."""
    machine = "x86_64" if platform.machine() in ("x86_64", "AMD64") else "aarch64"
    program = PROGRAM.replace("MACHINE", machine)
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize(
    ("triple", "instruction", "times"),
    [("x86_64-unknown-linux-gnu", "ldmxcsr", 2), ("aarch64-unknown-linux-gnu", "msr\tFPCR", 2), ("riscv64", "csr", 0)],
)
def test_code_for_other_processors(triple, instruction, times):
    """ARM has the mode in another register; a processor whose register is not known is left alone."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module("mode")
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.DoubleType(), [ir.DoubleType()] * 2), "add")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    before = mode.set_standard(builder)
    total = builder.fadd(*function.args)
    mode.restore(builder, before)
    builder.ret(total)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    machine = llvm.Target.from_triple(triple).create_target_machine()
    assert machine.emit_assembly(parsed).count(instruction) == times
