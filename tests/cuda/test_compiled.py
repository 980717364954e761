"""The CUDA engine as the compiler leaves it, without a GPU: PTX from libNVVM, machine code from ptxas."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from numba import cuda
from numba.cuda.np import numpy_support

from rmsnorm_np.cuda import kernels, launch
from rmsnorm_np.cuda.vector import STORED

CAPABILITIES = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))


def tool(name):
    """ptxas or nvdisasm, from nvidia-cuda-nvcc and nvidia-cuda-nvdisasm or from the path."""
    for folder in map(Path, sys.path):
        for found in folder.glob(f"nvidia/cu*/bin/{name}"):
            return str(found)
    return shutil.which(name)


ptxas, nvdisasm = tool("ptxas"), tool("nvdisasm")


def plan(n, x, *, backward=False, op="rms", weight=None, bias=None, aligned=True, partial=False, capability=(9, 0)):
    return launch.plan_for(
        n, x, x if backward else None, weight or x, bias, centred=op == "layer", partial=partial, offset=False,
        aligned=aligned, native_bfloat16=capability >= (8, 0),
    )  # fmt: skip


def array(dtype):
    return cuda.types.Array(numpy_support.from_dtype(np.dtype(dtype)), 1, "C")


def kernels_of(p):
    """(kernel, its argument types) for each launch that a plan takes."""
    i, f = cuda.types.int64, cuda.types.float64
    x, dy, w, b = (array(STORED[name or p.x]) for name in (p.x, p.dy, p.weight, p.bias))
    sums = array(STORED[np.dtype(p.work).name])
    dweight, dbias = (sums if name else x for name in (p.weight, p.bias))
    kept = array(np.float64)
    if p.split:
        gradient = dy if p.dy else x
        yield kernels.piece_moments(p), (gradient, x, w if p.dy else x, i, i, i, i, f, f, kept)
        if p.dy:
            yield kernels.piece_backward(p), (dy, x, w, kept, i, i, i, i, i, i, i, i, f, f, x, dweight, dbias)
        else:
            yield kernels.piece_forward(p), (x, w, b, kept, i, i, i, i, i, f, f, x)
    elif p.dy:
        yield kernels.backward(p), (dy, x, w, i, i, i, i, i, i, f, f, x, dweight, dbias)
    else:
        yield kernels.forward(p), (x, w, b, i, i, i, i, i, f, f, x)


def ptx_of(kernel, types, capability, threads):
    return cuda.compile_ptx(kernel.py_func, types, cc=capability, launch_bounds=threads)[0]


def machine_code(ptx, capability, folder):
    """(registers, spilled bytes, stack bytes, shared bytes, the instructions as text) of the one kernel in this PTX."""
    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    command = [ptxas, "-v", f"-arch=sm_{capability[0]}{capability[1]}", str(source), "-o", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    stack, *spills = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", report).groups())
    shared = re.search(r"(\d+) bytes smem", report)
    text = ""
    if nvdisasm:
        text = subprocess.run([nvdisasm, "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    return registers, sum(spills), stack, int(shared[1]) if shared else 0, text


CASES = {
    "warp": (256, {}),
    "block": (4096, {}),
    "largest block": (None, {}),
    "pieces": (2**18, {}),
}
LARGEST = {False: 4096 * 16, True: 1024 * 16}  # bytes of the longest row that one block holds


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_compiles_for(capability, name):
    """One launch of each kind, for each generation that the CUDA 13 compiler knows."""
    for p in (plan(1024, name, capability=capability), plan(1024, name, backward=True, capability=capability)):
        for kernel, types in kernels_of(p):
            ptx = ptx_of(kernel, types, capability, p.block)
            assert f".target sm_{capability[0]}{capability[1]}" in ptx
            assert "ld.global.v4" in ptx
            assert "st.global.v4" in ptx
            if capability < (10, 0):  # Blackwell's compiler unrolls too late: see docs/gpu.md
                assert ".local" not in ptx
            assert ("cvt.rn.bf16.f32" in ptx) == (name == "bfloat16" and capability >= (8, 0))


# LayerNorm holds more than RMSNorm does; the largest block has the fewest registers for it.
HELD = [("layer", name, case) for name in ("bfloat16", "float32") for case in CASES]
HELD += [("layer", name, "largest block") for name in ("float16", "float64")]
HELD += [("rms", name, "block") for name in ("bfloat16", "float32")]


@pytest.mark.skipif(ptxas is None, reason="needs ptxas: pip install nvidia-cuda-nvcc")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("op", "name", "case"), HELD)
def test_stays_in_registers(op, name, case, backward, tmp_path):
    """No spill, no stack, registers for the largest block, and 16 bytes in each access to a row."""
    itemsize = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[name]
    n = CASES[case][0] or LARGEST[backward] // itemsize
    p = plan(n, name, backward=backward, op=op, bias=name if op == "layer" else None)
    for kernel, types in kernels_of(p):
        found = machine_code(ptx_of(kernel, types, (9, 0), p.block), (9, 0), tmp_path)
        registers, spilled, stack, _, text = found
        assert (spilled, stack) == (0, 0)
        assert registers <= p.registers
        if text:
            loads, stores = (re.findall(rf"\b{kind}\.E[\w.]*", text) for kind in ("LDG", "STG"))
            wide = [access for access in loads if ".128" in access]
            assert len(wide) >= p.trips * (2 if backward else 1)
            assert not re.search(r"\b(LDL|STL)\b", text)
            if kernel.py_func.__name__ != "piece_moments_kernel":
                assert any(".128" in access for access in stores)
