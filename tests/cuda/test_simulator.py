"""The CUDA engine's logic, thread by thread, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PARTS = 6  # processes that share the tests: pytest-xdist runs as many of them side by side as it may


@pytest.mark.parametrize("part", range(PARTS))
def test_engine_in_the_simulator(part):
    """In a process of its own: the simulator is chosen when numba is imported."""
    pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")
    environment = os.environ | {
        "NUMBA_ENABLE_CUDASIM": "1",
        "SIMULATOR_PART": f"{part}/{PARTS}",
        "PYTEST_ADDOPTS": "",  # those of the outer process are not for this one
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))),
    }
    # Numbers of NumPy stand for registers there: they warn where registers wrap around or become infinite.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    done = subprocess.run(
        [*command, str(HERE / "in_simulator.py")], env=environment, cwd=HERE.parents[1], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
