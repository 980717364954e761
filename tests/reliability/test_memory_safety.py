"""No read or write outside an array, none of memory that was given back, nothing from memory that was never written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("guarded.py")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform == "win32", reason="pages are protected by mprotect"),
]

# What the C library fills memory with that it hands out or takes back: the results must not know.
FILLS = {"by size": 0, "past the cache": 1, "long": 0xA5, "long past the cache": 0xFE}


def guarded(lengths, path, params, **environment):
    """Number of cases and digest of their results, from a process that a fault would have ended."""
    command = [sys.executable, str(PROGRAM), "--lengths", lengths, "--path", path, "--params", params]
    environment = {
        **os.environ,
        "MALLOC_PERTURB_": str(FILLS[path]),  # glibc's; elsewhere without effect, as are the next two
        "MALLOC_CHECK_": "3",  # ends the process when what is given back was written beside
        "LD_PRELOAD": "libc_malloc_debug.so.0" if sys.platform == "linux" else "",
        **environment,
    }
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = out.stdout.splitlines()[-1:] or [""]
    assert out.returncode == 0, f"status {out.returncode} at {last[0]}\n{out.stderr[-2000:]}"
    cases, digest = last[0].split()
    assert int(cases) > 0
    return digest


@pytest.mark.parametrize("paths", [("by size", "past the cache"), pytest.param(tuple(FILLS), marks=pytest.mark.slow)])
def test_short_rows_on_every_path(paths):
    """n from 1 to 300: in one piece, past the cache and on threads, and cut into pieces. The paths give the same bits,
    each beside other memory.
    """
    assert len({guarded("short", path, "both") for path in paths}) == 1


@pytest.mark.slow
def test_borders():
    """Rows around the lengths at which a kernel takes another turn."""
    guarded("borders", "by size", "both")


@pytest.mark.slow
def test_large_arrays():
    """Written past the cache, on threads, because they are that large."""
    guarded("large", "by size", "both")


@pytest.mark.slow
@pytest.mark.parametrize("params", ["weight", "none"])
@pytest.mark.parametrize("path", FILLS)
@pytest.mark.parametrize("lengths", ["short", "borders", "large"])
def test_other_parameters(lengths, path, params):
    """Each combination of parameters is compiled for itself."""
    guarded(lengths, path, params)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", ["short", "borders"])
def test_with_bounds_checked(lengths, tmp_path):
    """What kernels index as arrays raises outside them; compiled anew, for the check is part of the code."""
    guarded(lengths, "long", "both", NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))
