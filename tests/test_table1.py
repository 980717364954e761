"""Table 1 of the paper: which change of weights or data leaves the output of a normalised layer unchanged.

Five norms times six changes. A ✓ holds to rounding; a ✗ must differ clearly, or the table would also pass for a norm
that ignores its input.
"""

from __future__ import annotations

import numpy as np
import pytest

import rmsnorm_np as rn

CASES, M, N = 8, 6, 12
DELTAS = (0.1, 0.5, 2.0, 10.0)

# ✓: some ten roundings of 2.2e-16 each, on both sides. ✗: 5 % of the largest output, eleven orders above.
SAME, DIFFERENT = 1e-13, 0.05


def batch_norm(x, W, backend):
    """Each unit over the batch, with the batch's own statistics."""
    a = x @ W.T
    return (a - np.mean(a, axis=0)) / np.std(a, axis=0)


def weight_norm(x, W, backend):
    """Each unit's weights brought to length one."""
    return x @ (W / np.linalg.norm(W, axis=1, keepdims=True)).T


def layer_norm(x, W, backend):
    return rn.layer_norm(x @ W.T, eps=0.0, backend=backend)


def rms_norm(x, W, backend):
    return rn.rms_norm(x @ W.T, eps=0.0, backend=backend)


def p_rms_norm(x, W, backend):
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


@pytest.mark.parametrize(
    ("norm", "change", "cell"),
    [(norm, change, cell) for norm, row in TABLE_1.items() for change, cell in zip(CHANGES, row, strict=True)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_table_1(norm, change, cell, backend):
    rng = np.random.default_rng(0)
    x, W = rng.normal(0.3, 1.0, size=(CASES, M)), rng.normal(0.2, 1.0, size=(N, M))
    before = norm(x, W, backend)
    for changed in change(x, W, rng):
        difference = np.max(np.abs(norm(*changed, backend) - before)) / np.max(np.abs(before))
        assert difference < SAME if cell == "✓" else difference > DIFFERENT


def test_the_helpers_are_these_norms_on_another_axis(backend):
    """BatchNorm is LayerNorm down the columns; a row of length one is RMSNorm over √m (section 3.1 of the paper)."""
    rng = np.random.default_rng(0)
    x, W = rng.normal(0.3, 1.0, size=(CASES, M)), rng.normal(0.2, 1.0, size=(N, M))
    columns = rn.layer_norm(x @ W.T, axis=0, eps=0.0, backend=backend)
    np.testing.assert_allclose(columns, batch_norm(x, W, None), rtol=0, atol=SAME)
    rows = x @ rn.rms_norm(W, eps=0.0, backend=backend).T / np.sqrt(M)
    np.testing.assert_allclose(rows, weight_norm(x, W, None), rtol=0, atol=SAME)
