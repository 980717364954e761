"""docs/experiments/reader.py and its data: gradients against numerical ones, what questions and answers are."""

from __future__ import annotations

import dataclasses
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import attention
import cloze
import data
import norms
import optim
import reader
import recurrent
import training
from rmsnorm_np.gradcheck import check_gradient

TINY = reader.Config(
    embedding=3, hidden=3, words=14, markers=4, batch=3, example_length=6, example_question=4, dropout=0.3
)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def tiny(kind, **settings):
    return dataclasses.replace(TINY, norm=norms.Norm(kind, fused=False, p=0.5), **settings)


def perturbed(P, rng):
    """float64, and nothing zero; running statistics as they are."""
    return {
        key: value.astype(float) + (0 if key.endswith("running") else 0.1 * rng.normal(size=value.shape))
        for key, value in P.items()
    }


def batch_of(config, rng):
    """Passages of 6, 5 and 3 words, questions of 4, 2 and 3, the answer more than once in one of them."""
    passages = [[5, 9, 6, 5, 10, 7], [11, 6, 5, 6, 12], [5, 13, 7]]
    examples = [
        cloze.Example(np.array(passage), np.array(question), answer)
        for passage, question, answer in zip(passages, [[4, 9, 8, 3], [10, 4], [6, 4, 11]], [5, 6, 7], strict=True)
    ]
    return cloze.make_batch(examples, config, rng)


def check(layer, backward, *inputs):
    report = check_gradient(
        lambda *inputs: np.asarray(layer(*inputs)[0]),
        lambda dy, *inputs: backward(dy, layer(*inputs)[1]),
        *inputs,
        method="complex-step",
        directions=3,
    )
    assert report.ok, report


def test_gradient_of_additive_scores(rng):
    P = attention.additive_attention_parameters(rng, state=3, memory=4, d=5)

    def layer(s, keys, W, v):
        return attention.additive_scores(s, keys, {"W": W, "v": v})

    def backward(dy, cache):
        ds, dkeys, grads = attention.additive_scores_backward(dy, cache)
        return ds, dkeys, grads["W"], grads["v"]

    check(
        layer, backward, rng.normal(size=(2, 3)), rng.normal(size=(6, 2, 5)), P["W"].astype(float), rng.normal(size=5)
    )


def test_gradient_of_the_attention_sum(rng):
    batch = batch_of(TINY, rng)

    def layer(s):
        return reader.attention_sum_loss(s, batch.entities, batch.passage == batch.answer)

    check(layer, lambda dy, cache: [reader.attention_sum_loss_backward(dy, cache)], 3 * rng.normal(size=(6, 3)))


def check_with_parameters(function, P):
    """The same for `function(P) -> (y, dy -> gradients by name)`, each layer's parameters as one vector."""
    trained = {key: value for key, value in P.items() if not key.endswith("running")}
    layers = {}
    for key in trained:
        layers.setdefault(key.split(".")[0], []).append(key)

    def from_vectors(vectors):
        named = dict(P)
        for keys, vector in zip(layers.values(), vectors, strict=True):
            ends = np.cumsum([P[key].size for key in keys])
            named |= {key: x.reshape(P[key].shape) for key, x in zip(keys, np.split(vector, ends), strict=False)}
        return named

    def to_vectors(values):
        assert values.keys() == trained.keys()
        return [np.concatenate([values[key].ravel() for key in keys]) for keys in layers.values()]

    report = check_gradient(
        lambda *vectors: np.asarray(function(from_vectors(vectors))[0]),
        lambda dy, *vectors: to_vectors(function(from_vectors(vectors))[1](dy)),
        *to_vectors(trained),
        method="complex-step",
        directions=2,
    )
    assert report.ok, [(key, part) for key, part in zip(layers, report.inputs, strict=True) if part.verdict != "right"]


def test_gradient_of_reading(rng):
    config, batch = tiny("rms"), batch_of(TINY, rng)
    P = perturbed({k: v for k, v in reader.init(config, rng).items() if k.startswith(("table", "passage"))}, rng)

    def function(P):
        y, cache = reader.read(
            P, batch.passage, batch.passage_mask, "passage", config, config.norm, np.random.default_rng(0)
        )
        return y, lambda dy: reader.read_backward(dy, cache)

    check_with_parameters(function, P)


@pytest.mark.parametrize("kind", reader.NORMS)
def test_gradient_of_the_whole_model(kind, rng):
    config, batch = tiny(kind), batch_of(TINY, rng)
    P = perturbed(reader.init(config, rng), rng)

    def function(P):
        loss, grads, _ = reader.loss_and_gradients(P, batch, config, np.random.default_rng(0))
        return loss, lambda dy: {key: dy * value for key, value in grads.items()}

    check_with_parameters(function, P)
    assert any(key.endswith("running") for key in P) == (kind == "batch")


# BatchNorm in an LSTM


def test_batch_norm_has_statistics_of_each_step(rng, monkeypatch):
    monkeypatch.setattr(recurrent, "STEPS_WITH_STATISTICS", 4)
    how, x = norms.Norm("batch"), rng.normal(size=(6, 40, 3))
    P = {key: value.astype(float) for key, value in recurrent.lstm_parameters(rng, 3, 4, how, gain=0.1).items()}
    P["U"] *= 3
    assert P["h.running"].shape == (4, 2, 16)
    for _ in range(300):
        trained, _ = recurrent.lstm(x, P, how, reverse=True)
    evaluated, _ = recurrent.lstm(x, P, how._replace(training=False), reverse=True)
    trained, evaluated = trained[::-1], evaluated[::-1]  # in the order of the steps
    np.testing.assert_allclose(evaluated[:3], trained[:3], atol=1e-5)  # the last three steps share the fourth's
    assert np.abs(evaluated[3:] - trained[3:]).max() > 1e-4
    np.testing.assert_allclose(
        P["h.running"][1], [(trained[0] @ P["U"]).mean(0), (trained[0] @ P["U"]).var(0)], atol=1e-6
    )


# The model


def test_p_is_the_share_of_a_names_places(rng):
    config = tiny("none")
    P, batch = perturbed(reader.init(config, rng), rng), batch_of(TINY, rng)
    p, loss = reader.predict(P, batch, config)
    s, _ = reader.scores(P, batch, config, config.norm)
    expected = np.zeros((3, 4))
    for row in range(3):
        places = [t for t in range(6) if 5 <= batch.passage[t, row] < 9]
        total = sum(np.exp(s[t, row]) for t in places)
        for t in places:
            expected[row, batch.passage[t, row] - 5] += np.exp(s[t, row]) / total
    np.testing.assert_allclose(p, expected)
    assert loss == pytest.approx(-np.mean(np.log(expected[range(3), batch.answer - 5])))
    assert [np.count_nonzero(row) for row in p] == [3, 2, 2]


@pytest.mark.parametrize("kind", ["none", "layer", "batch"])
def test_padding_and_the_other_examples_change_no_answer(kind, rng):
    config, batch = tiny(kind), batch_of(TINY, rng)
    P = perturbed(reader.init(config, rng), rng)
    together, _ = reader.predict(P, batch, config)
    for row in range(3):
        S, Q = int(batch.passage_mask[:, row].sum()), int(batch.question_mask[:, row].sum())
        alone = cloze.Batch(
            *(array[:length, row : row + 1] for array, length in zip(batch[:4], (S, S, Q, Q), strict=True)),
            batch.answer[row : row + 1],
            batch.entities[:S, row : row + 1],
        )
        np.testing.assert_allclose(reader.predict(P, alone, config)[0][0], together[row], atol=1e-12)


def test_the_reader_learns_what_is_said_of_whom(rng):
    """X is w and Y is v and … : the blank of "w ?" is X, whatever X and its marker are."""
    config = dataclasses.replace(TINY, norm=norms.Norm("rms", fused=False), embedding=12, hidden=12, words=18, batch=16)
    config = dataclasses.replace(config, dropout=0.0, learning_rate=0.01, steps=120, evaluate_every=60)
    examples, texts = [], []
    for _ in range(48):
        facts = rng.permutation(np.arange(9, 17))[:4]
        asked = int(rng.integers(4))
        passage = [number for i, fact in enumerate(facts) for number in (5 + i, fact)]
        examples.append(cloze.Example(np.array(passage), np.array([facts[asked], cloze.BLANK]), 5 + asked))
        names = rng.permutation(["Ann", "Bob", "Cid", "Dan", "Eve", "Fay"])[:4].tolist()
        passage = [word for name, fact in zip(names, facts, strict=True) for word in (name, f"f{fact}")]
        texts.append(cloze.Cloze(passage, [f"f{facts[asked]}", names[asked]], names[asked], names))
    parts = {"train": examples, "validation": examples, "test": examples}
    loaded = cloze.Data(parts, {"test": texts}, None)
    run = training.train(reader, loaded, config, 1, Path("no checkpoint"))
    assert run["curve"][0][2] > 1.2
    assert run["test"]["accuracy"] > 0.95
    assert run["test"]["loss"] < 0.3
    assert run["baselines"]["chance"] == 0.25
    assert sum(entry["answer"] == entry["prediction"] for entry in run["answers"]) >= 9
    assert [entry["question"] for entry in run["answers"]] == [
        f"{texts[i].question[0]} _____" for i in (0, 5, 10, 15, 20, 26, 31, 36, 41, 47)
    ]


def test_every_kind_takes_a_step_in_float32(rng):
    for kind in reader.NORMS:
        config = tiny(kind)
        P = reader.init(config, rng)
        before = {key: value.copy() for key, value in P.items()}
        loss, size = training.train_step(
            reader, P, optim.adam_state(P), reader.example_batch(config, rng), config, np.random.default_rng(0)
        )
        assert np.isfinite([loss, size]).all()
        assert all(value.dtype == np.float32 for value in P.values())
        assert not any(np.array_equal(P[key], before[key]) for key in P if key.endswith(("W", "U", "v", ".g")))


# The data


def test_words_and_names():
    assert cloze.words_of("David’s son didn’t go to Beth-el.") == [
        *("David", "’s", "son", "didn’t", "go", "to", "Beth", "@-@", "el", ".")
    ]
    assert cloze.text_of(["David", "’s", "son", "."]) == "David’s son."
    verses = [text.split() for text in ["so Saul and Give", "to Saul and Give . Then", "with Saul , Give . Then"]]
    verses += [["give"], ["so", "I", "I", "I"], ["so", "Ann", "Ann"], ["said", ":", "Then"]]
    assert cloze.names_in(verses) == {"Saul"}


@pytest.fixture(scope="module")
def few():
    """(Data of the first 4,000 verses, config, the verses as tokens)."""
    verses = data.load_verses()[:4000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_verses", lambda: verses)
        loaded, config = reader.load(reader.SIZES["small"])
        assert reader.load(reader.SIZES["small"])[0].texts == loaded.texts
    return loaded, config, [cloze.words_of(verse) for verse in verses]


def test_questions(few):
    loaded, config, verses = few
    assert [len(loaded.parts[name]) > 40 for name in ("train", "validation", "test")] == [True] * 3
    of_verse = {}
    for i, verse in enumerate(verses):
        of_verse.setdefault(" ".join(verse), []).append(i)
    seen = {}
    for name, examples in loaded.parts.items():
        seen[name] = set()
        for example, text in zip(examples, loaded.texts[name], strict=True):
            assert example.answer in example.passage
            assert example.answer not in example.question
            assert cloze.BLANK in example.question
            assert len(set(example.passage[cloze.is_marker(example.passage, config)])) >= 4
            places = example.passage == example.answer
            assert {token for token, place in zip(text.passage, places, strict=True) if place} == {text.answer}
            at = [i for i in of_verse[" ".join(text.question)] if list(chain(*verses[i - 8 : i])) == text.passage]
            assert at
            assert at[0] // 200 == (at[0] - 8) // 200
            seen[name].add(at[0] // 200)
    assert sum(len(blocks) for blocks in seen.values()) == len(set.union(*seen.values()))


def test_rare_words_and_those_of_the_test_part_are_unknown(few):
    loaded, config, _ = few
    assert len(loaded.vocabulary) == config.words
    assert loaded.vocabulary.words[cloze.BLANK] == "<blank>"
    assert loaded.vocabulary.words[cloze.ENTITIES] == "@entity0"
    assert loaded.vocabulary.words[cloze.ENTITIES + config.markers - 1] == f"@entity{config.markers - 1}"
    assert not loaded.vocabulary.words[cloze.ENTITIES + config.markers].startswith("@entity")
    shares = {
        name: np.mean(np.concatenate([example.passage for example in part]) == data.UNKNOWN)
        for name, part in loaded.parts.items()
    }
    assert 0 < shares["train"] < shares["test"] < 0.1


def test_markers_are_drawn_anew_and_nothing_else_changes(few, rng):
    loaded, config, _ = few
    examples = loaded.parts["test"][:20]
    one, two = (cloze.make_batch(examples, config, rng) for _ in range(2))
    np.testing.assert_array_equal(one.entities, two.entities)
    np.testing.assert_array_equal(one.passage[~one.entities], two.passage[~one.entities])
    assert np.mean(one.passage[one.entities] == two.passage[one.entities]) < 0.2
    for batch in (one, two):
        first = [batch.passage[np.argmax(example.passage == 5), row] for row, example in enumerate(examples)]
        assert len(set(first)) > 5  # not the same in all examples
        for row, example in enumerate(examples):
            passage, question = batch.passage[: len(example.passage), row], batch.question[: len(example.question), row]
            shown = dict(zip(example.passage.tolist(), passage.tolist(), strict=True))
            shown |= dict(zip(example.question.tolist(), question.tolist(), strict=True))
            assert passage.tolist() == [shown[number] for number in example.passage.tolist()]
            assert question.tolist() == [shown[number] for number in example.question.tolist()]
            assert len(set(shown.values())) == len(shown)
            assert batch.answer[row] == shown[example.answer]


def test_batches_have_similar_lengths_and_every_example_once(few, rng):
    loaded, config, _ = few
    examples = loaded.parts["train"]
    chosen = cloze.of_similar_length(examples, 16, rng)
    assert sorted(np.concatenate(chosen)) == list(range(len(examples)))
    assert chosen[0].tolist() != cloze.of_similar_length(examples, 16, rng)[0].tolist()
    masks = [batch.passage_mask for batch in cloze.batches(loaded, dataclasses.replace(config, batch=16), rng)]
    assert sum(mask.size for mask in masks) < 1.1 * sum(mask.sum() for mask in masks)
    fixed, again = (cloze.fixed_batches(examples, config) for _ in range(2))
    for (_, one), (_, two) in zip(fixed, again, strict=True):
        np.testing.assert_array_equal(one.passage, two.passage)


def test_baselines():
    passages = [[5, 9, 6, 6], [5, 6, 10, 6, 5, 7, 9], [5, 5, 7, 8, 11], [6, 9, 5], [5, 6, 6, 7]]
    answers = [6, 5, 8, 6, 7]
    examples = [
        cloze.Example(np.array(passage), np.array([4]), answer)
        for passage, answer in zip(passages, answers, strict=True)
    ]
    assert cloze.baselines(examples, TINY) == {
        "chance": pytest.approx((1 / 2 + 1 / 3 + 1 / 3 + 1 / 2 + 1 / 3) / 5),
        "most_frequent": 3 / 5,  # of all but the third and the last
        "last_mentioned": 3 / 5,  # of the first, third and last
    }
