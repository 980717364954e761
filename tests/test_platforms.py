"""Other systems and processors than this one: the code for them, and the ways that take over where this one's lack."""

from __future__ import annotations

import json
import re

import pytest
from programs import run

pytestmark = pytest.mark.engine

# What Windows or macOS lack is taken away once Numba, which has its own ways there, is loaded.
LACKING = """
import mmap, os, sys
import numpy as np
from numba.np.ufunc.parallel import _launch_threads

_launch_threads()
for module, names in (
    (os, ("fork", "register_at_fork", "sched_getaffinity", "sysconf", "getuid")),
    (mmap, ("MADV_HUGEPAGE", "MADV_DONTNEED", "MAP_PRIVATE", "MAP_SHARED", "MAP_ANONYMOUS", "PROT_READ")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it raises
np.longdouble, np.clongdouble = np.float64, np.complex128  # as on Windows, and on macOS on ARM

import rmsnorm_np as rn
from rmsnorm_np.cli import main
from rmsnorm_np.cpu import memory

x = np.random.default_rng(0).standard_normal((600, 1024))
for dtype, eps in ((np.float32, 2.0**-23), (np.float64, 2.0**-52)):
    rows = x.astype(dtype)
    got, want = (rn.rms_norm(rows, rows[0], backend=backend) for backend in ("cpu", "reference"))
    # in float64 the reference rounds a sum of 1024 squares, which NumPy adds by halves, a root and two products
    assert np.all(np.abs(got - want) <= 16 * eps * np.abs(want)), dtype
    assert isinstance(got.base.base, memory._Lease)
assert memory._ACCESS == mmap.ACCESS_WRITE
assert main(["info"]) == 0
"""


def test_what_other_systems_lack_is_not_needed():
    run(LACKING, NUMBA_THREADING_LAYER="workqueue")


# Kernels are compiled for another processor, and not run: a call of one does nothing.
FOREIGN = """
import json, sys
import llvmlite.binding as llvm

triple, *calls = sys.argv[1:]
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
llvm.get_process_triple = lambda: triple
llvm.Target.from_default_triple = classmethod(lambda cls: cls.from_triple(triple))

import ml_dtypes
import numpy as np
from numba.core import codegen, cpu
import rmsnorm_np as rn
from rmsnorm_np.cpu import jit, kernel

def get_executable(self, library, fndesc, env):
    library._ensure_finalized()
    libraries.append(library)
    return [].append  # Numba wants some built-in function

def compiled(label, make, args):
    jit.compiled(None, make, args)
    codes.append(libraries[-1].get_asm_str())
    return lambda *args: 0

libraries, codes = [], []
codegen.JITCodeLibrary._finalize_specific = lambda self: None
cpu.CPUContext.get_executable = get_executable
kernel.compiled = compiled
np.seterr(all="ignore")  # the results are what the memory held before
for call in calls:
    name, dtype, arrays, *options = call.split()
    x = np.ones((4, 40), dtype)
    getattr(rn, name)(*[x] * int(arrays), x[0], **dict(option.split("=") for option in options))
print(json.dumps(codes))
"""

# What kernels may call: Numba's runtime, Python, the C library's memory functions. (LLVM makes calls of what a
# processor lacks: of __extendhfsf2 for a float16, of fma. Numba finds no library for the first.)
KNOWN = re.compile(r"_?(NRT_\w+|_?Py\w+|numba_\w+|get_num_threads|memset|memcpy|memmove|bzero|_ZN[\w.]+|__ZN[\w.]+)")
OWN = re.compile(r"L?LBB\w+|lCPI\w+|__(real|xmm)")  # labels, and constants as Windows calls them
CALLED = re.compile(
    r"(?:^\s*(?:bl|b|callq?|jmpq?)\s+|movabsq\s+\$|:\w+:)\"?([A-Za-z_]\w+)|([\w.]+)@GOTPAGE\b", re.MULTILINE
)

GATED, QUANTIZED = "gated_rms_norm float16 2", "quantized_rms_norm bfloat16 1 dtype=float8_e4m3fn"
ARM = {r"fcvtl(\.4s)?\s+v\d+(\.4s)?, v\d+(\.4h)?": 1, r"fmla(\.2d)?\s+v\d+": 100, r"msr\s+FPCR": 2}
X86 = {r"mulps": 10, r"ldmxcsr": 2}


@pytest.mark.parametrize(
    ("triple", "processor", "features", "calls", "wanted", "more"),
    [
        ("aarch64-unknown-linux-gnu", "generic", "+neon", (GATED, QUANTIZED), ARM, set()),
        ("arm64-apple-darwin", "apple-m1", "+neon", (GATED,), ARM, set()),
        # the stack is grown by a function of the system's ntdll.dll; fma is in its C library
        ("x86_64-pc-windows-msvc", "x86-64", "+sse2", (GATED,), X86, {"__chkstk", "fma"}),
    ],
    ids=("linux", "macos", "windows"),
)
def test_kernels_for_another_processor(triple, processor, features, calls, wanted, more, tmp_path):
    """They compile, to vectors, and need nothing that is not there."""
    variables = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": tmp_path}
    codes = json.loads(run(FOREIGN, triple, *calls, **variables))
    assert len(codes) == len(calls)
    for code in codes:
        called = {"".join(names) for names in CALLED.findall(code)}
        assert {"numba_parallel_for", "_numba_parallel_for"} & called
        assert {name for name in called if not KNOWN.fullmatch(name) and not OWN.fullmatch(name)} <= more
    for instruction, times in wanted.items():
        assert len(re.findall(rf"^\s*{instruction}\b", codes[0], re.MULTILINE)) >= times, instruction
