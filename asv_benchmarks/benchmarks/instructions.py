"""Instructions per element, counted by valgrind: the one figure of speed that no other process can change.

Counted for one thread and one kind of processor, AVX2 with multiply-add, whatever the machine has: so that machines
agree, and because valgrind knows no AVX-512.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import common

ROWS, N = 64, 768
FEW, MANY = 5, 55  # calls; what surrounds them is in both counts
TARGET = {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "", "NUMBA_NUM_THREADS": "1"}

# Run first to compile for the target, then under valgrind. A dump has what was counted since the last one.
PROGRAM = f"""
import os, subprocess, sys, time
import numpy as np
import rmsnorm_np as rn

def valgrind(*command):
    teller = subprocess.Popen(["vgdb", f"--pid={{os.getpid()}}", *command], stdout=subprocess.DEVNULL)
    while teller.poll() is None:  # a sleeping process does not listen
        time.sleep(0.001)

x, dy, weight = np.ones(({ROWS}, {N}), np.float32), np.ones(({ROWS}, {N}), np.float32), np.ones({N}, np.float32)
calls = []
for op in {common.OPS}:
    forward, backward = getattr(rn, op), getattr(rn, op + "_backward")
    calls.append(lambda forward=forward: forward(x, weight))
    calls.append(lambda backward=backward: backward(dy, x, weight))
for call in calls:
    call()
if sys.argv[1:] == ["count"]:
    valgrind("instrumentation", "on")
    for call in calls:
        call()
        for count in {FEW}, {MANY}:
            valgrind("dump")
            for _ in range(count):
                call()
        valgrind("dump")
    valgrind("instrumentation", "off")
"""


class Instructions:
    params = (common.OPS, ["forward", "backward"])
    param_names = ("op", "direction")
    unit = "instructions per element"

    def setup_cache(self):
        return common.outcome(self.measure)

    setup_cache.timeout = 600

    def measure(self):
        if platform.machine() != "x86_64":
            raise NotImplementedError("the processor that is counted for is another")
        for tool in "valgrind", "vgdb":
            if shutil.which(tool) is None:
                raise NotImplementedError(f"{tool} is not installed")
        environment = {**os.environ, **TARGET}
        with tempfile.TemporaryDirectory() as folder:
            program, out = Path(folder, "program.py"), Path(folder, "counts")
            program.write_text(PROGRAM)
            subprocess.run([sys.executable, program], env=environment, check=True)
            valgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
            subprocess.run([*valgrind, sys.executable, program, "count"], env=environment, check=True)
            dumps = [self.total(Path(f"{out}.{number}")) for number in range(1, 3 * 4 + 1)]
        cases = [(op, direction) for op in common.OPS for direction in ("forward", "backward")]
        per_element = ROWS * N * (MANY - FEW)
        counts = zip(cases, dumps[1::3], dumps[2::3], strict=True)
        return {case: (many - few) / per_element for case, few, many in counts}

    def total(self, dump):
        for line in dump.read_text().splitlines():
            if line.startswith("summary: "):
                return int(line.split()[1])
        raise ValueError(f"{dump} has no summary")

    def setup(self, counted, op, direction):
        common.skip_without(counted)

    def track_per_element(self, counted, op, direction):
        return counted[op, direction]
