"""What benchmarks share: the names they take from the measured commit, and the arrays they put through it."""

import importlib
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np

OPS = ["rms_norm", "layer_norm"]
DIRECTIONS = ["forward", "forward+backward"]

# What a name stands for: rows, elements in a row, and how often a sample calls. asv calls setup before every sample and
# never puts two calls into one, so a sample has to be long enough by itself: a few milliseconds.
TINY = "1000 calls of 1x4096"
IN_CACHE = "20 calls of 512x768"
IN_MEMORY = "1 call of 4096x4096"
LONG_ROWS = "2 calls of 4x1048576"
SHORT_ROWS = "2 calls of 65536x64"
SHAPES = {
    TINY: (1, 4096, 1000),
    IN_CACHE: (512, 768, 20),
    IN_MEMORY: (4096, 4096, 1),
    LONG_ROWS: (4, 1 << 20, 2),
    SHORT_ROWS: (1 << 16, 64, 2),
}


def ours(path, name=None):
    """A module of the measured commit, or what has that name in it; skips where an older commit has not got it.

    In the commit that these benchmarks belong to nothing may be missing: there it is an error.
    """
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("rmsnorm_np"):
            raise  # what the package needs is not installed
        return _missing(error)
    if name is None:
        return module
    try:
        return getattr(module, name)
    except AttributeError as error:
        return _missing(error)


def _missing(error):
    if _measures_another_commit():
        raise NotImplementedError(f"this commit has it not: {error}") from error
    raise error


def _measures_another_commit():
    """Whether asv has installed another commit than the one that the benchmarks are checked out with."""
    measured = os.environ.get("ASV_COMMIT")
    if measured is None:  # an environment that asv found: its package is this tree's
        return False
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return measured != head.stdout.strip()


def theirs(module):
    """A module of another project; skips where it is not installed."""
    if find_spec(module) is None:
        raise NotImplementedError(f"{module} is not installed")
    return importlib.import_module(module)


def outcome(measure):
    """What `measure` returns, for ``setup_cache``, where asv knows no skipping: the reason comes back as a string."""
    try:
        return measure()
    except NotImplementedError as reason:
        return str(reason)


def skip_without(outcome):
    """Skip if the outcome of ``setup_cache`` is why there is none."""
    if isinstance(outcome, str):
        raise NotImplementedError(outcome)


def dtype_named(name):
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def arrays(rows, n, dtype):
    """x, dy and weight: every page of them written, so that no benchmark pays for the first touch."""
    rng = np.random.default_rng(0)
    dtype = dtype_named(dtype)
    x, dy = (rng.standard_normal((rows, n), dtype=np.float32).astype(dtype, copy=False) for _ in range(2))
    return x, dy, rng.uniform(0.5, 1.5, n).astype(dtype)
