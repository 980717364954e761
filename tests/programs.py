"""Programs in interpreters of their own: what ends or blocks a process must not end or block the tests."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("omp", "tbb", "workqueue")
PATIENCE = 600  # seconds until a program counts as blocked, on a machine that does much else


def tbb():
    """The folder of pip's TBB, which is not where the loader looks; None if it is not installed."""
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate().resolve().parent) for file in files if file.name.startswith("libtbb.so")), None)


def environment(package=ROOT, **variables):
    """This process's environment with two threads, the package as it lies there, and these variables; None unsets."""
    libraries = os.pathsep.join(filter(None, (tbb(), os.environ.get("LD_LIBRARY_PATH"))))
    default = {"PYTHONPATH": str(package), "NUMBA_NUM_THREADS": "2", "LD_LIBRARY_PATH": libraries}
    merged = os.environ | default | {name: None if value is None else str(value) for name, value in variables.items()}
    return {name: value for name, value in merged.items() if value is not None}


def command(code, *arguments):
    """The command line that runs a file, or some code, and turns warnings into errors."""
    # Python 3.12 warns of every fork in a process with threads; that it goes well is what is tested here
    warnings = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    start = [str(code)] if isinstance(code, Path) else ["-c", code]
    return [sys.executable, "-X", "faulthandler", *warnings, *start, *map(str, arguments)]


def run(code, *arguments, preexec_fn=None, **variables):
    """What a program prints. It must end well; a threading layer that this system lacks skips the test."""
    out = subprocess.run(
        command(code, *arguments),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=tempfile.gettempdir(),  # Python looks for packages where it is started, before it looks elsewhere
        preexec_fn=preexec_fn,
    )
    if "No threading layer could be loaded" in out.stderr:
        layer = variables["NUMBA_THREADING_LAYER"]
        assert layer != "tbb" or tbb() is None, f"TBB is installed in {tbb()}, and Numba cannot load it"
        pytest.skip(f"Numba has no threading layer {layer} on this system")
    assert out.returncode == 0, f"{code if isinstance(code, Path) else ''} ended with {out.returncode}\n{out.stderr}"
    return out.stdout
