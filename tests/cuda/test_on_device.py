"""The CUDA engine's logic, thread by thread, without a GPU; and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from numba import cuda

HERE = Path(__file__).parent
PARTS = 6  # processes that share the tests: pytest-xdist runs as many of them side by side as it may


def run(part, *, simulate):
    environment = os.environ | {
        "NUMBA_ENABLE_CUDASIM": str(int(simulate)),  # chosen when Numba is imported: hence another process
        "ON_DEVICE_PART": part,
        "PYTEST_ADDOPTS": "",  # those of the outer process are not for this one
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))),
    }
    # Numbers of NumPy stand for registers in the simulator: they warn where registers wrap around or become infinite.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    done = subprocess.run(
        [*command, str(HERE / "on_device.py")], env=environment, cwd=HERE.parents[1], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("part", range(PARTS))
def test_engine_in_the_simulator(part):
    run(f"{part}/{PARTS}", simulate=True)


# not a test that is skipped elsewhere: in CI a skip among the tests of this engine is a failure
if cuda.is_available():

    def test_engine_on_the_gpu():
        run("0/1", simulate=False)
