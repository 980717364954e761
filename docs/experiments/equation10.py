"""Equation 10 in training: a normalised layer adapts its learning rate to the size of its weights.

With W' = δ W the norm's output is the same and ∂L/∂W' = (1/δ) ∂L/∂W, so a step of gradient descent changes W'
relatively by 1/δ² as much. A learning rate of δ² η for W' undoes that exactly, and both runs have one loss curve.

RNNSearch is trained three times by plain gradient descent: with its initial weights W and the rate η, with δ W and
δ² η, and with δ W and η. "Weights" are the matrices before a norm, those of the three GRUs; all else has the rate η.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np

import rnnsearch
from training import stream

DELTA = 3
CASES = [  # norm, δ, the factor of η
    (kind, delta, factor)
    for kind in ("none", "layer", "rms", "prms")
    for delta, factor in ((1, 1), (DELTA, DELTA**2), (DELTA, 1))
]
RATE = 0.2  # η
STEPS = 150
EPS = 1e-12  # not 1e-6: eps breaks the invariance, the less the smaller it is


def measure(config, seed, steps=STEPS, progress=lambda: None):
    """[{"norm", "delta", "factor", "losses"}]: δ, the factor of η for the weights, and the loss of each step."""
    loaded, config = rnnsearch.load(replace(config, dropout=0.0))
    found = []
    for kind, delta, factor in CASES:
        own = replace(config, norm=config.norm._replace(kind=kind, eps=EPS))
        curve = losses(loaded, own, seed, delta, factor, steps, progress)
        found.append({"norm": kind, "delta": delta, "factor": factor, "losses": curve})
    return found


def losses(loaded, config, seed, delta, factor, steps, progress=lambda: None):
    """Train by gradient descent from δ W, without momentum or clipping, which would hide the law: the losses."""
    P = rnnsearch.init(config, np.random.default_rng([seed, 0]))
    for name in filter(rnnsearch.is_normalised, P):
        P[name] *= delta
    found = []
    for batch in islice(stream(rnnsearch, loaded, config, seed), steps):
        loss, grads, _ = rnnsearch.loss_and_gradients(P, batch, config)
        for name, grad in grads.items():
            P[name] -= RATE * (factor if rnnsearch.is_normalised(name) else 1) * grad
        found.append(float(loss))
        progress()
    return found
