"""Seconds per training step with each norm, computed by separate NumPy operations and by this library's kernels.

All variants take turns, a step each, so that a change of the machine's speed meets all of them alike.
"""

from __future__ import annotations

import ctypes
import sys
import time
from dataclasses import replace

import numpy as np

from norms import Norm
from optim import adam_state
from training import train_step

UNAFFECTED = ("none", "batch", "weight")  # kinds without a kernel of the library's: the same operations either way


M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h


def keep_memory():
    """Let freed memory stay with the process, as the caches of deep-learning frameworks do; glibc only.

    Otherwise the time of an array operation depends on where malloc places its result, because of page faults: a step
    of the Transformer took 0.064 s with kernels and 0.052 s without, and the difference was in other operations.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


class Frozen:
    """A model that is never changed by its steps: every variant is measured on the same numbers throughout."""

    def __init__(self, model):
        self.loss_and_gradients = model.loss_and_gradients

    def learning_rate(self, config, step):
        """Zero: Adam does all its work and moves nothing."""
        return 0.0


def measure(model, config, rounds, seed, progress=lambda: None):
    """[{"norm", "fused", "median", "quartiles", "fastest", "seconds": all of them}] of whole training steps.

    "saving" is the share of the time of LayerNorm, computed in the same way, that this norm saves.
    """
    rng = np.random.default_rng([seed, 3])
    batch = model.example_batch(config, rng)
    shared, variants = {}, []
    for kind in model.NORMS:
        for fused in (False,) if kind in UNAFFECTED else (False, True):
            how = config.norm._replace(kind=kind, fused=fused)
            own = replace(config, norm=how)
            P = model.init(own, np.random.default_rng([seed, 0]))
            for name in P:  # arrays of the same name and shape are kept once: at the paper's size they are large
                if name in shared and shared[name].shape == P[name].shape:
                    P[name] = shared[name]
            shared = {**P, **shared}
            variants.append((how, own, P, adam_state({})))
    moments = adam_state(shared)
    for *_, state in variants:
        state["m"], state["v"] = moments["m"], moments["v"]

    seconds = [[] for _ in variants]
    for turn in range(rounds + 1):
        for taken, (_, own, P, state) in zip(seconds, variants, strict=True):
            start = time.perf_counter()
            train_step(Frozen(model), P, state, batch, own, np.random.default_rng([seed, 2, turn]))
            if turn > 0:  # the first round compiles and warms up
                taken.append(time.perf_counter() - start)
            progress()
    return summary([how for how, *_ in variants], seconds)


def summary(norms: list[Norm], seconds):
    """The rows of the table from the seconds of each variant."""
    medians = {(how.kind, how.fused): float(np.median(taken)) for how, taken in zip(norms, seconds, strict=True)}
    rows = []
    for how, taken in zip(norms, seconds, strict=True):
        layer = medians["layer", how.fused]
        rows.append(
            {
                "norm": how.kind,
                "fused": None if how.kind in UNAFFECTED else how.fused,
                "median": medians[how.kind, how.fused],
                "quartiles": [float(q) for q in np.percentile(taken, [25, 75])],
                "fastest": min(taken),
                "saving": 1 - medians[how.kind, how.fused] / layer,
                "seconds": taken,
            }
        )
    return rows
