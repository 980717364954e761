from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

# Tests that need an extra of the package: doctest collection would import every file there. (All this stands here and
# not in a conftest.py there: `from conftest import ...` would find that one, whenever it was loaded later.)
EXTRAS = {  # tier: folder, module, how to install
    "cuda": ("cuda", "numba_cuda", '--cuda needs numba-cuda: pip install ".[cuda13,inspect]"'),
    "torch": ("pytorch", "torch", '--torch needs PyTorch: pip install ".[torch-test]"'),
}
collect_ignore = [
    "reliability/fuzz_arguments.py",  # a program, which needs atheris
    "sharded_ranks.py",  # and one that needs MPI
    "cuda/device.py",
    *(folder for folder, module, _ in EXTRAS.values() if importlib.util.find_spec(module) is None),
]

BACKENDS = ("reference", "cpu")
DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64))

# `pytest` alone runs the tests that have none of these marks, and nothing of the folders in `EXTRAS`. A test that has
# some runs if each of them is asked for.
TIERS = {
    "engine": "every dtype and combination of arguments, threads, processes",
    "slow": "long fuzzing, leaks, memory safety",
    "cuda": "the CUDA engine, compiled and executed",
    "torch": "PyTorch operators and modules",
}


def pytest_addoption(parser):
    for tier, content in TIERS.items():
        parser.addoption(f"--{tier}", action="store_true", help=f"also run: {content}")


def pytest_configure(config):
    for tier, (_, module, message) in EXTRAS.items():
        if config.getoption(tier) and importlib.util.find_spec(module) is None:
            raise pytest.UsageError(message)


def pytest_ignore_collect(collection_path, config):
    """Tests that need an extra are not even imported unless they are asked for."""
    left_out = [folder for tier, (folder, *_) in EXTRAS.items() if not config.getoption(tier)]
    folders = (collection_path, *collection_path.parents)
    return True if any(Path(__file__).with_name(folder) in folders for folder in left_out) else None


def pytest_collection_modifyitems(config, items):
    kept, left_out = [], []
    for item in items:
        (kept if all(map(config.getoption, tiers_of(item))) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def tiers_of(item):
    """The marks of a test; but what runs on the reference has no kernels to compile, and needs no --engine."""
    on_reference = hasattr(item, "callspec") and item.callspec.params.get("backend") == "reference"
    return [tier for tier in TIERS if item.get_closest_marker(tier) and not (on_reference and tier == "engine")]


def pytest_terminal_summary(terminalreporter, config):
    left_out = [f"--{tier} ({content})" for tier, content in TIERS.items() if not config.getoption(tier)]
    terminalreporter.write_line(f"left out: {', '.join(left_out) or 'nothing'}")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of an engine on the host."""
    return request.param


@pytest.fixture(
    params=[pytest.param(kind, id=kind.name, marks=[pytest.mark.engine] * (kind != np.float32)) for kind in DTYPES]
)
def dtype(request):
    """A dtype of x; compiled kernels for those other than float32 are for --engine."""
    return request.param


@pytest.fixture
def rng():
    """Random numbers, the same ones in every run."""
    return np.random.default_rng(1910_07467)
