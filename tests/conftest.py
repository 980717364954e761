from __future__ import annotations

import importlib.util
import os

import ml_dtypes
import numba
import numpy as np
import pytest

# The CUDA engine's tests import numba-cuda, an extra of its own; doctest collection would import every file there. Two
# of them run in processes of their own: see cuda/test_on_device.py. (All this stands here and
# not in a conftest.py there: `from conftest import ...` would find that one, whenever it was loaded later.)
collect_ignore = ["reliability/fuzz_arguments.py"]  # a program, which needs atheris
if importlib.util.find_spec("numba_cuda") is None:
    collect_ignore += ["cuda"]
elif "ON_DEVICE_PART" not in os.environ:
    collect_ignore += ["cuda/on_device.py", "cuda/device.py", "cuda/simulated.py"]

BACKENDS = ("reference", "cpu")
DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes or gigabytes, too")


def pytest_collection_modifyitems(config, items):
    # each process of cuda/test_on_device.py takes its share: every so many-th test, so that long ones are spread
    part, parts = map(int, os.environ.get("ON_DEVICE_PART", "0/1").split("/"))
    items[:] = items[part::parts]
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes or gigabytes: run with --slow"))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of an engine on the host."""
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: dtype.name)
def dtype(request):
    """A dtype of x."""
    return request.param


@pytest.fixture
def rng():
    """Random numbers, the same ones in every run."""
    return np.random.default_rng(1910_07467)


@pytest.fixture(autouse=numba.config.DISABLE_JIT)
def kernels_in_python_are_as_silent_as_compiled_ones():
    """Without the JIT the kernels run on NumPy, which warns of an overflow that compiled code takes in silence."""
    with np.errstate(all="ignore"):
        yield
