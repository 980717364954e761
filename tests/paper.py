"""What the paper claims of a layer with a norm, as functions to run: Table 1, and the network behind equations 8 to 10.

The tests hold the library to it (`test_table1`, `test_paper_laws`), and the documentation shows it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import rmsnorm_np as rn

# ------------------------------------------------------------------------- Table 1: x (CASES, M), W (N, M), a = x Wᵀ

CASES, M, N = 8, 6, 12
DELTAS = (0.1, 0.5, 2.0, 10.0)


def batch_norm(x, W, backend=None):
    """Each unit over the batch, with the batch's own statistics."""
    a = x @ W.T
    return (a - np.mean(a, axis=0)) / np.std(a, axis=0)


def weight_norm(x, W, backend=None):
    """Each unit's weights brought to length one."""
    return x @ (W / np.linalg.norm(W, axis=1, keepdims=True)).T


def layer_norm(x, W, backend=None):
    return rn.layer_norm(x @ W.T, eps=0.0, backend=backend)


def rms_norm(x, W, backend=None):
    return rn.rms_norm(x @ W.T, eps=0.0, backend=backend)


def p_rms_norm(x, W, backend=None):
    return rn.rms_norm(x @ W.T, eps=0.0, p=0.25, backend=backend)


def rescale_weights(x, W, rng):
    return [(x, delta * W) for delta in DELTAS]


def recentre_weights(x, W, rng):
    return [(x, W + rng.normal(size=M)) for _ in DELTAS]  # W + 1γᵀ: the same row γ added to each


def rescale_one_row_of_weights(x, W, rng):
    return [(x, np.where(np.arange(N)[:, None] == row, delta * W, W)) for delta in DELTAS for row in (0, 1, N - 1)]


def rescale_x(x, W, rng):
    return [(delta * x, W) for delta in DELTAS]


def recentre_x(x, W, rng):
    return [(x + rng.normal(size=M), W) for _ in DELTAS]


def rescale_a_case(x, W, rng):
    return [(np.where(np.arange(CASES)[:, None] == 3, delta * x, x), W) for delta in DELTAS]


CHANGES = (rescale_weights, recentre_weights, rescale_one_row_of_weights, rescale_x, recentre_x, rescale_a_case)
TABLE_1 = {
    batch_norm: "✓✗✓✓✓✗",
    weight_norm: "✓✗✓✗✗✗",
    layer_norm: "✓✓✗✓✗✓",
    rms_norm: "✓✗✗✓✗✓",
    p_rms_norm: "✓✗✗✓✗✓",
}

# ✓: some ten roundings of 2.2e-16 each, on both sides. ✗: 5 % of the largest output, eleven orders above.
SAME, DIFFERENT = 1e-13, 0.05


def table_1_inputs():
    """x, W and the generator behind them; nothing is centred by accident."""
    rng = np.random.default_rng(0)
    return rng.normal(0.3, 1.0, size=(CASES, M)), rng.normal(0.2, 1.0, size=(N, M)), rng


def differences(norm, change, backend=None):
    """How far each change moves the output, over the largest output."""
    x, W, rng = table_1_inputs()
    before = norm(x, W, backend)
    return [np.max(np.abs(norm(*changed, backend) - before)) / np.max(np.abs(before)) for changed in change(x, W, rng)]


# ---------------------------------------------------------------- section 4: a linear layer, a norm, tanh, squared loss

BATCH = 5


class Gradients(NamedTuple):
    dx: np.ndarray  # (BATCH, M)
    dw: np.ndarray  # (N, M)
    dg: np.ndarray  # (N,)
    db: np.ndarray  # (N,)


class Layer:
    """v = norm(x Wᵀ) · g + b, loss = ½ Σ (tanh v - target)², with a backward by hand."""

    def __init__(self, norm, backend=None):
        self.options = {
            "RMSNorm": {"p": 1.0, "eps": 0.0, "backend": backend},
            "pRMSNorm": {"p": 0.25, "eps": 0.0, "backend": backend},
            "LayerNorm": {"eps": 0.0, "backend": backend},
            "none": None,
        }[norm]
        self.forward, self.backward = (
            (rn.layer_norm, rn.layer_norm_backward) if norm == "LayerNorm" else (rn.rms_norm, rn.rms_norm_backward)
        )

    def norm(self, a, g, b):
        return a * g + b if self.options is None else self.forward(a, g, b, **self.options)

    def norm_backward(self, dv, a, g, b):
        if self.options is None:
            return dv * g, np.sum(dv * a, axis=0), np.sum(dv, axis=0)
        return self.backward(dv, a, g, b, **self.options)

    def loss(self, x, W, g, b):
        return 0.5 * np.sum((np.tanh(self.norm(x @ W.T, g, b)) - target()) ** 2)

    def gradients(self, x, W, g, b):
        a = x @ W.T  # (BATCH, N)
        h = np.tanh(self.norm(a, g, b))
        dv = (h - target()) * (1 - h * h)
        da, dg, db = self.norm_backward(dv, a, g, b)
        return Gradients(dx=da @ W, dw=da.T @ x, dg=dg, db=db)

    def matrix(self, a):
        """The matrix of da = R δv of eq. 9, for one vector a (N,) and g = 1: a row of dv for each unit vector."""
        rows = np.tile(a, (N, 1))
        return self.norm_backward(np.eye(N), rows, np.ones(N), np.zeros(N))[0].T


def target():
    return np.random.default_rng(1).uniform(-1, 1, size=(BATCH, N))


def inputs():
    """x, W, g, b; nothing is centred or of unit size by accident."""
    rng = np.random.default_rng(0)
    return (
        rng.normal(0.3, 1.0, size=(BATCH, M)),
        rng.normal(0.1, 0.7, size=(N, M)),
        rng.uniform(0.5, 1.5, size=N),
        rng.normal(0.0, 0.3, size=N),
    )
