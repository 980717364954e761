"""What a fresh interpreter loads. Every statement runs in a process of its own, as this one has loaded everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[1])


def run(code):
    """The last line that a fresh interpreter prints."""
    command = [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {ROOT!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["numba", "llvmlite", "scipy", "rich", "ml_dtypes", "torch"])
def test_import_leaves_heavy_packages_alone(name):
    assert run(f"import rmsnorm_np\nprint({name!r} in sys.modules)") == "False"


def test_import_loads_little_beyond_numpy():
    """Modules of the standard library count as well: `inspect` or `email` cost more than this package."""
    code = "import numpy; before = set(sys.modules); import rmsnorm_np\nprint(*set(sys.modules) - before)"
    loaded = set(run(code).split())
    assert {name for name in loaded if name.partition(".")[0] != "rmsnorm_np"} <= {"__future__"}


def test_reference_needs_numpy_alone():
    """Its readers may have nothing else installed; bfloat16 arrays bring their own package."""
    code = """
for name in ("numba", "llvmlite", "scipy", "rich", "ml_dtypes"):
    sys.modules[name] = None  # importing it raises
import numpy as np
import rmsnorm_np as rn
print(rn.rms_norm(np.array([[3.0, 4.0]]), eps=0.0, backend="reference").round(4).tolist())
"""
    assert run(code) == "[[0.8485, 1.1314]]"


def test_cpu_without_numba_names_what_to_install():
    code = """
sys.modules["numba"] = None
import rmsnorm_np as rn
try:
    rn.rms_norm([1.0, 2.0])
except ImportError as error:
    print(error)
"""
    assert run(code) == "backend 'cpu' needs numba: pip install numba"


def test_version_is_that_of_the_distribution():
    import rmsnorm_np

    text = (Path(ROOT) / "pyproject.toml").read_text()
    assert f'version = "{rmsnorm_np.__version__}"' in text
