"""More than 2**31 elements: nothing counts in 32 bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("big.py")
SHAPES = ["many rows", "one long row", "single elements"]

pytestmark = [
    pytest.mark.engine,
]


def run(*args):
    out = subprocess.run([sys.executable, str(PROGRAM), *args], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    return out.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="maps the same memory many times over")
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_both_ends_in_little_memory(op):
    """The middle of each array is the same few megabytes again and again; the ends are memory of their own."""
    run("many rows", op, "--mapped")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element(shape, op):
    """In place, so that 4.3 GB are enough."""
    if available() < 6 << 30:
        pytest.skip("needs 6 GB of free memory")
    sys.stdout.write(run(shape, op))


def available():
    """Bytes of memory, where the system tells."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 8 << 30
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10
