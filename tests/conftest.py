from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

# The CUDA engine's tests import numba-cuda, an extra of its own; doctest collection would import every file there. (All
# this stands here and not in a conftest.py there: `from conftest import ...` would find that one, whenever it was
# loaded later.)
collect_ignore = ["reliability/fuzz_arguments.py", "sharded_ranks.py"]  # programs, which need atheris, and MPI
if importlib.util.find_spec("numba_cuda") is None:
    collect_ignore += ["cuda"]
else:
    collect_ignore += ["cuda/device.py"]

CUDA = Path(__file__).with_name("cuda")

BACKENDS = ("reference", "cpu")
DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64))

# `pytest` alone runs the tests that have none of these marks, and nothing of the folder `cuda`. A test that has some
# runs if each of them is asked for.
TIERS = {
    "engine": "every dtype and combination of arguments, threads, processes",
    "slow": "long fuzzing, leaks, memory safety",
    "cuda": "the CUDA engine, compiled and executed",
}


def pytest_addoption(parser):
    for tier, content in TIERS.items():
        parser.addoption(f"--{tier}", action="store_true", help=f"also run: {content}")


def pytest_configure(config):
    if config.getoption("cuda") and importlib.util.find_spec("numba_cuda") is None:
        raise pytest.UsageError('--cuda needs numba-cuda: pip install ".[cuda13,inspect]"')


def pytest_ignore_collect(collection_path, config):
    """The CUDA engine's tests are not even imported without --cuda."""
    return None if config.getoption("cuda") or CUDA not in (collection_path, *collection_path.parents) else True


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
