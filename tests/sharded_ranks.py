"""A program that MPI starts in several processes: each has some columns, and holds its results against whole rows."""

from __future__ import annotations

import sys

import numpy as np
from mpi4py import MPI

import rmsnorm_np as rn

world = MPI.COMM_WORLD
rng = np.random.default_rng(0)  # the same numbers in each process
x, dy = rng.standard_normal((2, 40, 24)).astype(np.float32)
weight, bias = rng.uniform(0.5, 1.5, (2, 24)).astype(np.float32)
cuts = np.linspace(0, 24, world.size + 1).astype(int) + np.arange(world.size + 1) % 2  # parts of different length
cuts[0], cuts[-1] = 0, 24
mine = slice(cuts[world.rank], cuts[world.rank + 1])


def reduce(a):
    """The sum over all processes."""
    total = np.empty_like(a)
    world.Allreduce(a, total)
    return total


for norm in ("rms_norm", "layer_norm"):
    forward, backward = getattr(rn, norm), getattr(rn, f"{norm}_backward")
    y = forward(x[:, mine], weight[mine], bias[mine], reduce=reduce)
    want = forward(x, weight, bias, backend="reference")[:, mine]
    assert np.max(np.abs(y - want) / np.spacing(np.abs(want))) <= 1
    grads = backward(dy[:, mine], x[:, mine], weight[mine], bias[mine], reduce=reduce)
    for got, whole in zip(grads, backward(dy, x, weight, bias, backend="reference"), strict=True):
        np.testing.assert_allclose(got, whole[..., mine], rtol=1e-6, atol=1e-7)
    assert forward(x[:0, mine], reduce=reduce).shape == (0, len(y[0]))
sys.stdout.write(f"process {world.rank} of {world.size}: right\n")
