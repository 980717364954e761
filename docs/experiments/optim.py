"""Adam (Kingma and Ba), its learning rate's fall, and clipping of the gradient's norm."""

from __future__ import annotations

import math

import numpy as np


def adam_state(parameters):
    """The state of `adam`: its step count and the two moments of every parameter, zero."""
    zeros = {name: np.zeros_like(value) for name, value in parameters.items()}
    return {"step": 0, "m": zeros, "v": {name: value.copy() for name, value in zeros.items()}}


def adam(parameters, grads, state, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8):
    """One step, in place. Parameters without a gradient (running statistics) stay as they are.

    m = β₁ m + (1 − β₁) g, v = β₂ v + (1 − β₂) g², θ −= lr · m/(1 − β₁ᵗ) / (sqrt(v/(1 − β₂ᵗ)) + eps)
    """
    state["step"] += 1
    correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
    for name, g in grads.items():
        m, v = state["m"][name], state["v"][name]
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        root = np.sqrt(v)
        root *= 1 / math.sqrt(correction2)
        root += eps
        parameters[name] -= (learning_rate / correction1) * m / root


def falling(step, steps, start):
    """Factor of the learning rate in step 1, 2, …: 1 for the share `start` of the steps, then linearly to zero."""
    left = 1 - (step - 1) / steps  # 1, …, 1/steps
    return min(1.0, left / max(1 - start, 1 / steps))


def clip(grads, limit):
    """Scale all gradients so that their common norm is at most `limit` (None: leave them). Returns (grads, norm)."""
    norm = math.sqrt(sum(float(np.vdot(g, g)) for g in grads.values()))
    if limit is None or norm <= limit:
        return grads, norm
    return {name: g * (limit / norm) for name, g in grads.items()}, norm
