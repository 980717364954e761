"""The CUDA engine as the compiler leaves it, without a GPU: PTX from libNVVM, machine code from ptxas."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from numba import cuda
from numba.cuda import dispatcher
from numba.cuda.np import numpy_support

from rmsnorm_np.cuda import kernels, launch
from rmsnorm_np.cuda.vector import STORED

CAPABILITIES = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))


@pytest.fixture(autouse=True)
def no_device_is_asked(monkeypatch):
    """Numba asks the driver for the GPU's capability before it types a device function, which has none yet."""
    device = types.SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)


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


def ptx_of(kernel, signature, capability, threads):
    return cuda.compile_ptx(kernel.py_func, signature, cc=capability, launch_bounds=threads)[0]


def machine_code(ptx, capability, folder):
    """(registers, spilled bytes, stack bytes, shared bytes, the instructions as text) of the one kernel in this PTX."""
    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    command = [ptxas, "-v", f"-arch=sm_{capability[0]}{capability[1]}", str(source), "-o", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    stack, *spills = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", report).groups())
    shared = re.search(r"(\d+) bytes smem", report)
    text = subprocess.run([nvdisasm, "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    return registers, sum(spills), stack, int(shared[1]) if shared else 0, text


CASES = {
    "warp": (256, {}),
    "block": (4096, {}),
    "largest block": (None, {}),
    "pieces": (2**18, {}),
}
LARGEST = {False: 4096 * 16, True: 1024 * 16}  # bytes of the longest row that one block holds


# One launch of each kind, of each dtype, and what takes the most registers.
COMPILED = [
    {"n": 1024, "x": "bfloat16"},
    {"n": 1024, "x": "bfloat16", "backward": True},
    {"n": 1024, "x": "float32"},
    {"n": 1024, "x": "float32", "backward": True, "op": "layer", "bias": "float32"},
    {"n": 32, "x": "float32", "backward": True, "op": "layer", "bias": "float32"},
    {"n": 32768, "x": "float16", "op": "layer", "bias": "float16"},
    {"n": 2048, "x": "float64", "backward": True, "op": "layer", "bias": "float64"},
    {"n": 2**18, "x": "bfloat16", "op": "layer", "bias": "bfloat16"},
    {"n": 2**18, "x": "float32", "backward": True, "op": "layer", "bias": "float32"},
]


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: "-".join(map(str, case.values())))
def test_compiles_for_every_gpu(case):
    """For each generation that the CUDA 13 compiler knows, without local memory."""
    for capability in CAPABILITIES:
        p = plan(**case, capability=capability)
        for kernel, signature in kernels_of(p):
            ptx = ptx_of(kernel, signature, capability, p.block)
            assert f".target sm_{capability[0]}{capability[1]}" in ptx
            assert ".local" not in ptx, capability
            assert "ld.global.v4" in ptx
            writes = kernel.py_func.__name__ != "piece_moments_kernel"
            assert not writes or "st.global.v4" in ptx
            rounds = writes and p.x == "bfloat16" and p.native_bfloat16
            assert ("cvt.rn.bf16.f32" in ptx) == rounds or not writes


def test_rows_of_several_warps_have_a_block_of_their_own():
    """Their threads meet at barriers of the whole block, in one piece of its shared memory."""
    for backward in (False, True):
        for name in ("bfloat16", "float32", "float64"):
            for n in (*range(1, 3000, 7), 2**14, 2**15, 2**20):
                p = plan(n, name, backward=backward)
                assert p.teams == 1 or p.team <= 32
                assert p.split or p.length >= n
                assert p.block % 32 == 0


# LayerNorm holds more than RMSNorm does; the largest block has the fewest registers for it.
HELD = [("layer", name, case) for name in ("bfloat16", "float32") for case in CASES]
HELD += [("layer", name, "largest block") for name in ("float16", "float64")]
HELD += [("rms", name, "block") for name in ("bfloat16", "float32")]
SPILLS = {("layer", "float64", "largest block", True): 48}  # bytes, to mend


@pytest.mark.skipif(
    ptxas is None or nvdisasm is None, reason="needs ptxas and nvdisasm: pip install rmsnorm_np[cuda13,inspect]"
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("op", "name", "case"), HELD)
def test_stays_in_registers(op, name, case, backward, tmp_path, request):
    """No spill, no stack, registers for the largest block, and 16 bytes in each access to a row."""
    if (op, name, case, backward) in SPILLS:
        reason = f"ptxas spills {SPILLS[op, name, case, backward]} bytes"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    itemsize = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[name]
    n = CASES[case][0] or LARGEST[backward] // itemsize
    p = plan(n, name, backward=backward, op=op, bias=name if op == "layer" else None)
    for kernel, signature in kernels_of(p):
        found = machine_code(ptx_of(kernel, signature, (9, 0), p.block), (9, 0), tmp_path)
        registers, spilled, stack, _, text = found
        assert (spilled, stack) == (0, 0)
        assert registers <= p.registers
        loads, stores = (re.findall(rf"\b{kind}\.E[\w.]*", text) for kind in ("LDG", "STG"))
        wide = [access for access in loads if ".128" in access]
        assert len(wide) >= p.trips * (2 if backward else 1)
        assert not re.search(r"\b(LDL|STL)\b", text)
        if kernel.py_func.__name__ != "piece_moments_kernel":
            assert any(".128" in access for access in stores)
