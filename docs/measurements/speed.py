"""Times the steps of the page "From formula to fast kernel", interleaved, against the machine's own limit.

``python docs/measurements/speed.py`` writes speed.json beside it. Let the machine be quiet.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
from numba import prange

from rmsnorm_np.cli import limit
from rmsnorm_np.cli.timing import interleave, ratio
from rmsnorm_np.cpu import describe, memory
from rmsnorm_np.cpu.arrays import pointers
from rmsnorm_np.cpu.tracing import step
from rmsnorm_np.cpu.vector import LANES
from rmsnorm_np.ops.primitives import multiply_add

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import steps  # noqa: E402

SHAPES = {"in memory": (8192, 4096), "in cache": (512, 768)}
ROUNDS = 9


load = step(steps.load, steps.FLOAT64.leaf)
add_square = step(lambda w, total, f: multiply_add(f, f, total), steps.FLOAT64.leaf)


@numba.njit(parallel=True)
def _multiply_add(numbers, count):
    """Nothing but multiply-adds of float64 in registers: the most operations that the cores can do."""
    totals = np.zeros(numba.get_num_threads())
    for t in prange(len(totals)):
        source = pointers(numbers)
        f = load((source, 0))
        a, b, c, d = (
            load((source, LANES)),
            load((source, 2 * LANES)),
            load((source, 3 * LANES)),
            load((source, 4 * LANES)),
        )
        for _ in range(count):
            a = add_square((a, f))
            b = add_square((b, f))
            c = add_square((c, f))
            d = add_square((d, f))
        totals[t] = steps.across((a, b, c, d))
    return totals


def measure() -> dict:
    """Seconds per call of each step, into an array that is used again and into a fresh one; and the limits."""
    return {
        "machine": machine(describe()),
        "peak_flops": peak_flops(),
        "shapes": {place: measure_shape(shape) for place, shape in SHAPES.items()},
    }


def measure_shape(shape: tuple[int, int]) -> dict:
    """All steps on one shape; ratios are those of the rounds, of which the median and the extremes are kept."""
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    w = np.random.default_rng(1).uniform(0.5, 1.5, shape[1]).astype(np.float32)
    y = aligned(memory.empty, shape, x)
    calls = {step.__name__: lambda step=step: step(x, w, 1e-6, y) for step in (*steps.STEPS, steps.vectors_float32)}
    calls["fresh"] = lambda: steps.streaming(x, w, 1e-6, aligned(np.empty, shape))
    calls["recycled"] = lambda: steps.streaming(x, w, 1e-6, aligned(memory.empty, shape, x))
    calls["limit"] = limit.calls(x.nbytes)["forward"]
    timings = interleave(calls, rounds=ROUNDS, turn_seconds=0.03, budget_seconds=240)
    names = [step.__name__ for step in steps.STEPS]
    gains = [*itertools.pairwise(names), ("fresh", "recycled")]
    return {
        "shape": shape,
        "seconds": {name: timing.median for name, timing in timings.items()},
        "of_limit": {name: vars(ratio(timings["limit"], timing)) for name, timing in timings.items()},
        "float64_over_float32": vars(ratio(timings["vectors"], timings["vectors_float32"])),
        "gain": {after: vars(ratio(timings[before], timings[after])) for before, after in gains},
    }


def aligned(empty: Callable[..., np.ndarray], shape: tuple[int, int], *beside: np.ndarray) -> np.ndarray:
    """A new float32 array that begins at a cache line, as streaming stores need: small ones may not by themselves."""
    count = shape[0] * shape[1]
    room = empty((count + 16,), np.dtype(np.float32), *beside)
    start = -room.ctypes.data % 64 // 4
    return room[start : start + count].reshape(shape)


def peak_flops() -> float:
    """Operations a second of float64 multiply-adds on all threads, in the best of some rounds."""
    count, numbers = 2_000_000, np.random.default_rng(0).standard_normal(5 * LANES, dtype=np.float32)
    timing = interleave({"": lambda: _multiply_add(numbers, count)}, rounds=9)[""]
    return 2 * 4 * LANES * count * numba.get_num_threads() / min(timing.seconds)


def machine(described: dict) -> str:
    """In words, with what else it was doing."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    name = next(line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name"))
    versions = f"numba {described['numba']}, numpy {np.__version__}, load average before: {os.getloadavg()[0]:.1f}"
    return f"{described['threads']} threads of {name} ({described['cpu']}), {versions}"


def rounded(value):
    """Four digits are enough to keep."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    text = json.dumps(rounded(measure()), indent=1) + "\n"
    (HERE / "speed.json").write_text(text)
    sys.stdout.write(text)
