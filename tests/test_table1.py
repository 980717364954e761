"""Table 1 of the paper: which change of weights or data leaves the output of a normalised layer unchanged.

Five norms times six changes. A ✓ holds to rounding; a ✗ must differ clearly, or the table would also pass for a norm
that ignores its input.
"""

from __future__ import annotations

import numpy as np
import pytest
from paper import (
    CHANGES,
    DIFFERENT,
    SAME,
    TABLE_1,
    M,
    batch_norm,
    differences,
    table_1_inputs,
    weight_norm,
)

import rmsnorm_np as rn


@pytest.mark.parametrize(
    ("norm", "change", "cell"),
    [(norm, change, cell) for norm, row in TABLE_1.items() for change, cell in zip(CHANGES, row, strict=True)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_table_1(norm, change, cell, backend):
    for difference in differences(norm, change, backend):
        assert difference < SAME if cell == "✓" else difference > DIFFERENT


def test_the_helpers_are_these_norms_on_another_axis(backend):
    """BatchNorm is LayerNorm down the columns; a row of length one is RMSNorm over √m (section 3.1 of the paper)."""
    x, W, _ = table_1_inputs()
    columns = rn.layer_norm(x @ W.T, axis=0, eps=0.0, backend=backend)
    np.testing.assert_allclose(columns, batch_norm(x, W, None), rtol=0, atol=SAME)
    rows = x @ rn.rms_norm(W, eps=0.0, backend=backend).T / np.sqrt(M)
    np.testing.assert_allclose(rows, weight_norm(x, W, None), rtol=0, atol=SAME)
