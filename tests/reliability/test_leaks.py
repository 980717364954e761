"""Nothing is lost from call to call: not a byte, not an object of Python, not an allocation of a kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("leaks.py")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident size is read from /proc"),
]


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("small", 30_000),
        ("large", 150),
        pytest.param("small", 1_000_000, marks=pytest.mark.slow),
        pytest.param("large", 10_000, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost(size, count):
    environment = {**os.environ, "NUMBA_NRT_STATS": "1"}
    command = [sys.executable, str(PROGRAM), size, str(count)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr[-2000:]
    sys.stdout.write(out.stdout)
