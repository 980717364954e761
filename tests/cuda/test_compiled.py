"""The CUDA engine as the compiler leaves it, without a GPU: machine code from libNVVM and nvJitLink."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from numba.cuda import dispatcher
from numba.cuda.cudadrv import nvvm

from rmsnorm_np.cuda import launch, rare, schedule
from rmsnorm_np.cuda.elements import RowScales
from rmsnorm_np.cuda.kernel import linker
from rmsnorm_np.cuda.words import STORED
from rmsnorm_np.ops.double import LAYER_NORM_DOUBLE_BACKWARD
from rmsnorm_np.ops.gated import GATE_FIRST, GATE_FIRST_BACKWARD, NORM_FIRST_BACKWARD
from rmsnorm_np.ops.jvp import LAYER_NORM_JVP
from rmsnorm_np.ops.layer import LAYER_NORM, LAYER_NORM_BACKWARD
from rmsnorm_np.ops.operation import Columns, Totals
from rmsnorm_np.ops.quantized import quantized_rms_norm
from rmsnorm_np.ops.rms import RMS_NORM, RMS_NORM_BACKWARD

CAPABILITIES = ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))


@pytest.fixture(autouse=True)
def no_device_is_asked(monkeypatch):
    """Numba asks the driver for the GPU's capability before it types a device function, which has none yet."""
    device = types.SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)


def tool(name):
    """The program, from nvidia-cuda-nvdisasm or from the path."""
    for folder in map(Path, sys.path):
        for found in folder.glob(f"nvidia/cu*/bin/{name}"):
            return str(found)
    return shutil.which(name)


nvdisasm = tool("nvdisasm")
if nvdisasm is None:
    pytest.skip("needs nvdisasm: pip install rmsnorm_np[cuda13,inspect]", allow_module_level=True)


OPERATIONS = {
    ("rms", False): RMS_NORM,
    ("rms", True): RMS_NORM_BACKWARD,
    ("layer", False): LAYER_NORM,
    ("layer", True): LAYER_NORM_BACKWARD,
    ("gated", False): GATE_FIRST,
    ("gated", True): GATE_FIRST_BACKWARD,
    ("norm first", True): NORM_FIRST_BACKWARD,
    ("along", False): LAYER_NORM_JVP,
    ("along", True): LAYER_NORM_DOUBLE_BACKWARD,
    ("8 bits", False): quantized_rms_norm("float8_e4m3fn", given=False, single=True),
}


def plan(n, x, *, backward=False, op="layer", weight=None, aligned=True, partial=False, capability=(9, 0)):
    """LayerNorm holds more than RMSNorm does: weight, bias and weight_offset; other operations hold all they can."""
    operation, centred, weight = OPERATIONS[op, backward], op == "layer", weight or x
    if op not in ("rms", "layer"):
        reads, writes = (kind(*[x] * len(kind._fields)) for kind in (operation.Reads, operation.Writes))
        columns = operation.Columns(*[weight] * (len(operation.Columns._fields) - 1))
        totals = Totals(backward or None, (backward and hasattr(columns, "bias")) or None)
        if operation.scales:
            writes = writes._replace(q="float8_e4m3fn")
    else:
        reads, writes = operation.Reads(*[x] * (1 + backward)), operation.Writes(x)
        totals = Totals(True, centred or None) if backward else Totals()
        columns = Columns(weight, weight if centred and not backward else None, centred or None)
    scales = RowScales(True, None, "float32") if operation.scales else None
    kinds = launch.Kinds(operation, reads, columns, writes, totals, partial, scales)
    return launch.plan_for(n, kinds, aligned, capability)


def plan_of(case, **changes):
    """Of one of the CASES."""
    return plan(**{name: value for name, value in (case | changes).items() if name != "spills"})


def kernels_of(p):
    """(kernel, whether it reads rows, whether it writes them as wide) of each launch that a plan takes, but that for
    rare rows.
    """
    if not p.split:
        return [(schedule.rows_kernel(p), True, True)]
    scaled = p.kinds.scales is not None  # h is written with the first sums then, and q is narrow
    pieces = [(schedule.pieces_kernel(p, s), True, scaled and s == 0) for s in range(len(p.kinds.operation.stages))]
    return [*pieces, (schedule.rows_kernel(p), True, not scaled)]


def machine_codes(kernel, capabilities):
    """(capability, registers, spilled bytes, stack bytes, the instructions as text) of the kernel for each of them.

    Numba types the kernel once: that takes four times as long as libNVVM does.
    """
    given = {}

    def compile_ir(modules, **options):
        given.update(modules=modules, options=options)
        return nvvm_compile(modules, **options)

    nvvm_compile = nvvm.compile_ir
    with mock.patch.object(nvvm, "compile_ir", compile_ir):
        kernel.intermediate_code(capabilities[0])
    for major, minor in capabilities:
        code = nvvm_compile(given["modules"], **given["options"] | {"arch": f"compute_{major}{minor}"})
        link = linker(code, (major, minor), ptxas_options=["-v"])
        cubin, report = bytes(link.link("cubin").code), link.get_info_log()
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        frame = re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", report)
        stack, *spills = map(int, frame.groups())
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            text = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
        yield (major, minor), registers, sum(spills), stack, text


# The registers a thread needs grow with the vectors it holds; what it may have shrinks with the block. So of each kind
# of plan, the one with most of both. `test_cases_are_the_largest_of_their_kind` knows the kinds.
#
# spills: bytes, stores and loads together. Where a multiprocessor is to hold more blocks (`Plan.resident`) than the
# compiler would make room for, a few sums lie in memory, in the first-level cache; it is faster so, by up to 60 %.
# Blocks of 512 threads have no more than 128 registers each, too few for some.
CASES = [
    {"n": 2048, "x": "bfloat16"},  # a warp, 8 vectors to a thread
    {"n": 1024, "x": "float32"},
    {"n": 512, "x": "float64"},
    {"n": 128, "x": "float32"},  # so few that every rounding error is kept
    {"n": 64, "x": "float64"},
    {"n": 32768, "x": "float16"},  # the longest row of a block
    {"n": 16384, "x": "float32"},
    {"n": 16384, "x": "float32", "op": "rms"},
    {"n": 8192, "x": "float64"},
    {"n": 2**18, "x": "bfloat16"},  # pieces
    {"n": 2**18, "x": "float32"},
    {"n": 2**18, "x": "float64"},
    {"n": 1024, "x": "float16", "backward": True},
    {"n": 512, "x": "float32", "backward": True},
    {"n": 256, "x": "float64", "backward": True},
    {"n": 128, "x": "float32", "backward": True, "spills": 32},
    {"n": 64, "x": "float64", "backward": True},
    {"n": 8192, "x": "bfloat16", "backward": True},
    {"n": 8192, "x": "float32", "backward": True},
    {"n": 4096, "x": "float64", "backward": True, "spills": 320},
    {"n": 2**18, "x": "bfloat16", "backward": True},
    {"n": 2**18, "x": "float32", "backward": True},
    {"n": 2**18, "x": "float64", "backward": True},
    # and what is different in other ways
    {"n": 16384, "x": "bfloat16", "backward": True, "op": "rms"},  # with one sum, not two
    {"n": 1024, "x": "bfloat16", "backward": True, "op": "rms"},
    {"n": 4096, "x": "float32", "op": "rms", "partial": True},
    {"n": 4095, "x": "float32", "backward": True, "aligned": False},
    {"n": 2**15 - 1, "x": "bfloat16", "aligned": False},
    {"n": 2**18 - 1, "x": "float32", "backward": True, "aligned": False},
    {"n": 4096, "x": "bfloat16", "backward": True, "weight": "float32"},
    {"n": 2**18, "x": "bfloat16", "backward": True, "weight": "float32"},
    {"n": 2**18, "x": "float16", "backward": True, "weight": "float64"},
    {"n": 4096, "x": "bfloat16", "backward": True, "op": "rms", "capability": (7, 5)},  # rounds to bfloat16 itself
    # and of other operations
    {"n": 16384, "x": "bfloat16", "op": "gated"},
    {"n": 8192, "x": "float32", "op": "gated"},
    {"n": 2**18, "x": "float32", "op": "gated"},
    {"n": 8192, "x": "float32", "op": "along"},
    {"n": 4096, "x": "float64", "op": "along"},
    {"n": 16384, "x": "float32", "op": "8 bits"},
    {"n": 32768, "x": "bfloat16", "op": "8 bits"},
    {"n": 8192, "x": "float64", "op": "8 bits"},
    {"n": 2**18, "x": "float32", "op": "8 bits"},
    {"n": 2**18, "x": "float64", "op": "8 bits"},
    {"n": 4096, "x": "bfloat16", "backward": True, "op": "gated"},
    {"n": 4096, "x": "float32", "backward": True, "op": "norm first"},
    {"n": 2048, "x": "float64", "backward": True, "op": "norm first"},
    {"n": 2**18, "x": "bfloat16", "backward": True, "op": "gated"},
    {"n": 4096, "x": "float32", "backward": True, "op": "along"},
    {"n": 2048, "x": "float64", "backward": True, "op": "along", "spills": 320},
    {"n": 2**18, "x": "float64", "backward": True, "op": "along"},
]
EVERYWHERE = [*CASES[9:11], *CASES[18:19], CASES[21]]  # each kernel, on each generation of GPUs
NEWEST = (10, 0)  # libNVVM has another, newer LLVM from here on


def kind(p):
    """What has a code of its own, but for the number of vectors and threads."""
    return p.work, p.backward, p.split, p.teams > 1, p.work in ("pair", "exact") and p.short


def test_cases_are_the_largest_of_their_kind():
    """Of any plan for arrays of one dtype, one of the same kind, with as many vectors and threads, is compiled here."""
    compiled = [plan_of(case) for case in CASES]
    lengths = (*range(1, 40000, 7), 2**20)
    for p in {plan(n, name, backward=backward) for backward in (False, True) for name in STORED for n in lengths}:
        assert any(
            kind(p) == kind(c) and p.trips <= c.trips and (p.teams > 1 or p.block <= c.block) for c in compiled
        ), p


def plans(case):
    """[(plan, its capabilities)]: where they are compiled differently, the first, and all of the cases EVERYWHERE."""
    first = case.get("capability", (9, 0))
    capabilities = CAPABILITIES if case in EVERYWHERE else (first, NEWEST)
    together = {}
    for capability in capabilities:
        p = plan_of(case, capability=capability)
        together.setdefault((p.native_bfloat16 or p.work != "single", p.demanded), (p, []))[1].append(capability)
    return list(together.values())[: None if case in EVERYWHERE else 1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_stays_in_registers(case):
    """No local memory, no stack, registers for the blocks that are to fit, and 16 bytes in each access to a row."""
    for p, capabilities in plans(case):
        for kernel, reads, writes in kernels_of(p):
            name = kernel.function.__name__
            for capability, registers, spilled, stack, text in machine_codes(kernel, capabilities):
                assert spilled <= case.get("spills", 0), (name, capability, spilled)
                assert (stack == 0) == (spilled == 0), (name, capability)
                assert registers <= p.registers
                assert spilled or not re.search(r"\b(LDL|STL)\b", text)
                loads, stores = (re.findall(rf"\b{kind}\.E[\w.]*", text) for kind in ("LDG", "STG"))
                rows = [load for load in loads if ".128" in load]
                assert bool(rows) == (p.aligned and reads)
                assert any(".128" in store for store in stores) == (p.aligned and writes)
                if p.aligned:  # x and dy; of pieces the first sums need x alone
                    assert len(rows) >= p.trips * (2 if p.backward and not p.split else 1)
                if writes:
                    assert bool(re.search(r"F2F\w*\.BF16", text)) == (case["x"] == "bfloat16" and p.native_bfloat16)


@pytest.mark.parametrize(("name", "backward"), [("float32", True), ("float64", False), ("float64", True)])
def test_rare_rows_stay_in_registers(name, backward):
    kernel = rare.rare_kernel(launch.rare_plan(plan(4096, name, backward=backward)))
    for _, _, spilled, _, _ in machine_codes(kernel, ((9, 0), NEWEST)):
        assert spilled == 0


@pytest.mark.parametrize("name", STORED)
def test_partial_sums_are_added_in_registers(name):
    kernel = schedule.add_partials(name, (9, 0), 32)
    for _, _, spilled, stack, _ in machine_codes(kernel, ((9, 0), NEWEST)):
        assert spilled == stack == 0


def test_rows_of_several_warps_have_a_block_of_their_own():
    """Their threads meet at barriers of the whole block, in one piece of its shared memory."""
    for backward in (False, True):
        for name in ("bfloat16", "float32", "float64"):
            for n in (*range(1, 3000, 7), 2**14, 2**15, 2**20):
                p = plan(n, name, backward=backward)
                assert p.teams == 1 or p.team <= 32
                assert p.split or p.length >= n
                assert p.block % 32 == 0
