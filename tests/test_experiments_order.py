"""docs/experiments/order_embeddings.py: gradients, the loss against its formula, what is held out, ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import data
import norms
import optim
import order_embeddings as model
import training
from rmsnorm_np.gradcheck import check_gradient

TINY = model.Config(norms.Norm("rms", fused=False), 3, 5, image=6, words=9, batch=4, example_length=3)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture(scope="module")
def emoji():
    """(Data, Config) of the small size, not varied."""
    return model.load(dataclasses.replace(model.SIZES["small"], shift=0, colour=0.0, word_dropout=0.0))


def check(layer, backward, *inputs, method="complex-step", directions=3):
    report = check_gradient(
        lambda *inputs: np.asarray(layer(*inputs)[0]),
        lambda dy, *inputs: backward(dy, layer(*inputs)[1]),
        *inputs,
        method=method,
        directions=directions,
    )
    assert report.ok, report


# Parts


def test_unit_absolute(rng):
    x = rng.normal(size=(3, 5))
    check(model.unit_absolute, model.unit_absolute_backward, x)
    np.testing.assert_allclose(model.unit_absolute(x)[0], abs(x) / np.linalg.norm(x, axis=1)[:, None], rtol=1e-6)


def test_order_violations(rng):
    c, i = abs(rng.normal(size=(4, 6))), abs(rng.normal(size=(3, 6)))
    check(model.order_violations, model.order_violations_backward, c, i)
    expected = [[sum(max(0, a - b) ** 2 for a, b in zip(caption, image, strict=True)) for image in i] for caption in c]
    np.testing.assert_allclose(model.order_violations(c, i)[0], expected)
    more = c + 0.1  # an image with all that the caption has, and more
    assert np.diagonal(model.order_violations(c, more)[0]).tolist() == [0] * 4
    assert np.all(np.diagonal(model.order_violations(more, c)[0]) > 0)


def test_no_gradient_where_the_loss_has_none(rng):
    c, i, dE = rng.normal(size=(3, 5)), rng.normal(size=(4, 5)), rng.normal(size=(3, 4))
    dE[1], dE[:, 2], dE[0, 0] = 0, 0, 0
    dc, di = model.order_violations_backward(dE, (c, i))
    excess = np.maximum(c[:, None] - i, 0)  # (3, 4, 5)
    np.testing.assert_allclose(dc, np.einsum("ci,cid->cd", 2 * dE, excess))
    np.testing.assert_allclose(di, -np.einsum("ci,cid->id", 2 * dE, excess))


def test_contrastive_hinge(rng):
    E, margin, loss = rng.uniform(size=(4, 4)), 0.3, 0.0
    check(lambda E: model.contrastive_hinge(E, margin), model.contrastive_hinge_backward, E)
    for k in range(4):
        for other in {*range(4)} - {k}:
            loss += max(0, margin + E[k, k] - E[k, other]) + max(0, margin + E[k, k] - E[other, k])
    assert model.contrastive_hinge(E, margin)[0] == pytest.approx(loss)
    apart = 0.31 * (1 - np.eye(4))
    assert model.contrastive_hinge(apart, margin)[0] == 0
    assert model.contrastive_hinge(apart.T[[1, 0, 2, 3]], margin)[0] > 0


def test_padding_does_not_change_a_caption(rng):
    P = model.init(TINY, rng)
    words, mask = data.padded([[4, 5], [6, 7, 8, 4]])
    together, _ = model.embed_captions(P, words, mask, TINY)
    alone, _ = model.embed_captions(P, words[:2, :1], mask[:2, :1], TINY)
    np.testing.assert_allclose(together[:1], alone, atol=1e-6)


# The whole model


@pytest.mark.parametrize("kind", model.NORMS)
def test_gradient_of_the_whole_model(kind, rng):
    config = dataclasses.replace(TINY, norm=norms.Norm(kind, fused=False, p=0.5))
    P = {name: value + 0.1 * rng.normal(size=value.shape) for name, value in model.init(config, rng).items()}
    batch = model.example_batch(config, rng)
    batch.mask[-1, 0] = 0.0  # padding

    def run(*values):
        loss, grads, _ = model.loss_and_gradients(dict(zip(P, values, strict=True)), batch, config)
        assert grads.keys() == P.keys()
        return loss, [grads[name] for name in P]

    def scaled(dy, grads):
        return [dy * grad for grad in grads]

    # Near a kink of max(0, ·)² differences are not exact enough to confirm a complex step, only to judge a gradient.
    check(run, scaled, *P.values(), method="finite-difference", directions=1)


def test_it_learns_one_batch(rng):
    config = dataclasses.replace(TINY, hidden=16, learning_rate=0.02)
    P, batch = model.init(config, rng), model.example_batch(config, rng)
    state, losses = optim.adam_state(P), []
    for _ in range(60):
        losses.append(training.train_step(model, P, state, batch, config, None)[0])
    assert all(value.dtype == np.float32 for value in P.values())
    assert losses[-1] < 0.1 * losses[0]


def test_a_run_finds_known_emoji_by_pictures_it_has_not_seen(rng):
    images = rng.integers(0, 256, (1, 6, 2, 2, 3), np.uint8).repeat(2, axis=0)  # both artists draw the same
    parts = {name: {"style": np.arange(6)} for name in ("validation", "test")}
    captions, labels = [[4 + k, 4 + k // 2] for k in range(6)], [f"emoji {k}" for k in range(6)]
    loaded = model.Data(captions, labels, images, np.ones(6, int), parts)
    config = model.Config(TINY.norm, 8, 32, 12, 10, shift=0, learning_rate=0.01, steps=60, evaluate_every=30)
    run = training.train(model, loaded, config, 0, Path("no checkpoint"))
    assert [entry["step"] for entry in run["history"]] == [30, 60]
    assert run["test"]["recall"] == 100
    assert run["test"]["style image mean rank"] == run["test"]["style caption mean rank"] == 1
    assert [entry["captions"][0] for entry in run["retrieved"]["style"]] == labels
    json.dumps(run)


# Data


def test_parts_have_no_emoji_in_common(emoji):
    loaded, config = emoji
    groups = [chosen for part in loaded.parts.values() for chosen in part.values()]
    assert [len(chosen) for chosen in groups] == [300, 300, 100, 100]
    assert len(set(np.concatenate(groups))) == 800
    for part in loaded.parts.values():
        assert set(loaded.shown[part["unseen"]]) == {0}
        assert set(loaded.shown[part["style"]]) == {1}
    assert np.sum(loaded.shown == 2) == 1641 - 800
    assert config.image == 3072
    words = {word for k in np.flatnonzero(loaded.shown) for word in loaded.captions[k]}
    assert words == set(range(len(data.SPECIAL), config.words))  # none is only in a caption held out
    assert any(data.UNKNOWN in loaded.captions[k] for k in loaded.parts["test"]["unseen"])


def test_an_epoch_has_every_training_emoji_once_and_no_picture_held_out(emoji):
    loaded, config = emoji
    marks = np.zeros((2, 1641, 1, 1, 3), np.uint8)  # a pixel that says which emoji and which artist it is
    marks[..., 0, 0, 0], marks[..., 0, 0, 1] = np.divmod(np.arange(1641), 256)
    marks[1, ..., 2] = 1
    epochs = []
    for seed in range(12):
        found = []
        for batch in model.batches(loaded._replace(images=marks), config, np.random.default_rng(seed)):
            assert len(batch.images) <= 128
            high, low, artist = np.rint(255 * (1 - batch.images)).astype(int).T
            found += zip(256 * high + low, artist, strict=True)
            for emoji, words, mask in zip(256 * high + low, batch.words.T, batch.mask.T, strict=True):
                assert words[mask > 0].tolist() == loaded.captions[emoji]
        assert sorted(emoji for emoji, _ in found) == np.flatnonzero(loaded.shown).tolist()
        epochs.append(found)
    assert [emoji for emoji, _ in epochs[0]] != [emoji for emoji, _ in epochs[1]]
    shown = {pair for found in epochs for pair in found}
    for emoji, count in enumerate(loaded.shown):
        assert ((emoji, 1) in shown) <= (count == 2)
        assert ((emoji, 0) in shown) <= (count >= 1)
    assert len(shown) > 0.99 * loaded.shown.sum()


def test_words_are_dropped_from_training_captions_only(emoji, rng):
    loaded, config = emoji
    batch = next(model.batches(loaded, dataclasses.replace(config, word_dropout=0.25), rng))
    words = batch.mask > 0
    assert np.mean(batch.words[words] == data.UNKNOWN) == pytest.approx(0.25, abs=0.05)
    assert np.all(batch.words[~words] == data.PAD)


def test_training_images_are_moved_and_recoloured(rng):
    images = np.zeros((1000, 5, 7, 3), np.float32)
    images[:, 2, 3] = 1
    config = dataclasses.replace(TINY, shift=2, colour=0.3)
    image, row, column, channel = np.nonzero(varied := model.varied(images, config, rng))
    assert sorted(zip(image, channel, strict=True)) == [(k, j) for k in range(1000) for j in range(3)]
    assert {*zip(row, column, strict=True)} == {(y, x) for y in range(5) for x in range(1, 6)}
    values = varied[image, row, column].reshape(-1)
    assert (values.min(), values.max()) == pytest.approx((0.7, 1.3), abs=0.01)
    assert varied.dtype == np.float32
    ink = model.pixels(np.array([255, 0], np.uint8))
    assert (ink.tolist(), ink.dtype) == ([0, 1], np.float32)


# Retrieval


def test_the_rank_counts_equals_against_the_model():
    E = np.array([[0.1, 0.2, 0.0], [0.5, 0.5, 0.5], [0.3, 0.2, 0.1]])
    assert model.ranks(E).tolist() == [2, 3, 1]
    assert model.ranks(np.zeros((4, 4))).tolist() == [4] * 4


def test_captions_find_images_and_images_captions(monkeypatch):
    E = np.tile(np.arange(20.0)[::-1], (20, 1))  # each caption finds the last image first; each image finds all equal
    monkeypatch.setattr(model, "violations", lambda *_: iter([E, E - 2 * np.diag(np.diag(E)) - np.eye(20)]))
    loaded = model.Data([], [*range(20)], None, None, {"test": {"unseen": np.arange(20)}})
    found = model.evaluate(None, loaded, None, "test")
    expected_image = {"R@1": (5 + 100) / 2, "R@5": (25 + 100) / 2, "R@10": (50 + 100) / 2, "mean rank": (10.5 + 1) / 2}
    expected_caption = {"R@1": 50, "R@5": 50, "R@10": 50, "mean rank": (20 + 1) / 2}
    for name, value in expected_image.items():
        assert found[f"unseen image {name}"] == pytest.approx(value)
    for name, value in expected_caption.items():
        assert found[f"unseen caption {name}"] == pytest.approx(value)
    assert found["recall"] == pytest.approx(np.mean([52.5, 62.5, 75, 50, 50, 50]))
    retrieved = model.report(None, loaded, None)["retrieved"]["unseen"]
    assert len(retrieved) == 10
    assert retrieved[4] == {"image": 4, "rank": 1, "captions": [4, 0, 1]}


def test_pictures_that_were_in_training_are_not_retrieved(emoji, rng):
    loaded, config = emoji
    P = model.init(dataclasses.replace(config, hidden=4, norm=norms.Norm("none")), rng)
    tiny = dataclasses.replace(config, hidden=4, norm=norms.Norm("none"))
    first_artist, second_artist = loaded.images.copy(), loaded.images.copy()
    first_artist[0], second_artist[1] = 128, 128
    for group, artists in (("unseen", [0, 1]), ("style", [1])):
        chosen = loaded.parts["validation"][group]
        E = list(model.violations(P, loaded, tiny, chosen))
        assert [each.shape for each in E] == [(100, 100)] * len(artists)
        for artist, images in enumerate((first_artist, second_artist)):
            other = list(model.violations(P, loaded._replace(images=images), tiny, chosen))
            changed = [not np.array_equal(a, b) for a, b in zip(E, other, strict=True)]
            assert changed == [found == artist for found in artists]
