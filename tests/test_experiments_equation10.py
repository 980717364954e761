"""docs/experiments/equation10.py: a norm undoes a learning rate that fits the size of its weights."""

from __future__ import annotations

import numpy as np
import pytest

import equation10
import norms
import rnnsearch
import translation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("kind", "adapts"), [("none", False), ("layer", True), ("rms", True), ("prms", True)])
def test_a_learning_rate_for_larger_weights_is_undone_by_a_norm(kind, adapts, rng):
    numbers = [(list(rng.integers(4, 9, length)), list(rng.integers(4, 8, length))) for length in (3, 3, 4, 4, 5)]
    loaded = translation.Data({"train": numbers}, {}, None, None)
    how = norms.Norm(kind, fused=False, p=0.5, eps=equation10.EPS)
    config = rnnsearch.Config(how, 6, 6, 6, 6, source_words=9, target_words=8, batch=2)
    (first, undone, slower) = (
        equation10.losses(loaded, config, 1, delta, factor, 12) for delta, factor in ((1, 1), (3, 9), (3, 1))
    )
    assert first[-1] < first[0]
    if adapts:  # the size of the weights changes no output
        np.testing.assert_allclose(slower[0], first[0], rtol=1e-6)
    difference = np.max(np.abs(np.subtract(undone, first)))
    assert difference < 1e-5 if adapts else difference > 1e-2
    assert np.max(np.abs(np.subtract(slower, first))) > 1e-2
