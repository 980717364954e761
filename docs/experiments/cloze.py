"""The reader's data: questions with a blank where a name stood, about the verses before.

A passage is the 8 verses before a verse; the question is that verse with one name replaced by a blank, wherever it
stands, and the answer is that name, which is in the passage too. Names are markers, @entity0, @entity1, …, with numbers
drawn anew each time an example is shown: who a name usually is cannot be learnt, only what the text says (as in Hermann
et al., 2015).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

import data

BLANK = len(data.SPECIAL)  # the number of the blank
ENTITIES = BLANK + 1  # the number of @entity0; the words follow after the last marker
BLOCK = 200  # verses; a block is in one part of the data as a whole, with its passages


class Cloze(NamedTuple):
    """A question as lists of tokens."""

    passage: list
    question: list  # the verse as it is, without a blank
    answer: str
    names: list  # those of passage and question, in the order of their first mention


class Example(NamedTuple):
    """The same as numbers; the names are the markers 0, 1, … in the order of the list above."""

    passage: np.ndarray  # (S,)
    question: np.ndarray  # (Q,)
    answer: int  # the number of a marker


class Data(NamedTuple):
    """{"train", "validation", "test"} of lists of examples, and what they stand for."""

    parts: dict
    texts: dict  # the same as lists of Cloze
    vocabulary: data.Vocabulary


class Batch(NamedTuple):
    """Passages of similar length and their questions, time first, padded at the end."""

    passage: np.ndarray  # (S, B)
    passage_mask: np.ndarray  # (S, B): 1 where a word is
    question: np.ndarray  # (Q, B)
    question_mask: np.ndarray  # (Q, B)
    answer: np.ndarray  # (B,)
    entities: np.ndarray  # (S, B), bool: where the passage has a marker


# From verses to examples


def words_of(verse):
    """Tokens, with the ’s of a genitive apart: "David’s" -> "David", "’s"."""
    return [part for token in data.tokenize(verse) for part in re.split(r"(?=’s$)", token) if part]


def text_of(words):
    """The opposite of `words_of`."""
    return data.detokenize(words).replace(" ’s", "’s")


def names_in(verses):
    """Words with a capital within a sentence at least 3 times, and seldom in lower case. Verses are lists of tokens."""
    capital, lower = Counter(), Counter()
    for tokens in verses:
        lower.update(token for token in tokens if token[0].islower())
        for before, token in pairwise(tokens):
            if token[0].isupper() and len(token) > 1 and before not in ".?!:“‘(—":
                capital[token] += 1
    return {name for name, count in capital.items() if count >= 3 and lower[name.lower()] < 0.2 * count}


def questions(verses, names, config, rng):
    """A Cloze for each verse that allows one; which of its names is blanked is random."""
    for i in range(config.verses, len(verses)):
        passage = [token for verse in verses[i - config.verses : i] for token in verse]
        known = names.intersection(passage)
        possible = [token for token in dict.fromkeys(verses[i]) if token in known]
        if len(known) >= config.names and possible:
            answer = possible[rng.integers(len(possible))]
            yield Cloze(passage, verses[i], answer, [t for t in dict.fromkeys(passage + verses[i]) if t in names])


def load(config):
    """(Data, the config with the sizes of the vocabulary). One in ten blocks is for validation, one in ten for test."""
    rng = np.random.default_rng(0)  # the same data in every run
    verses = [words_of(verse) for verse in data.load_verses()]
    names = names_in(verses)
    blocks = [verses[i : i + BLOCK] for i in range(0, len(verses), BLOCK)]
    blocks = [blocks[i] for i in rng.permutation(len(blocks))]
    tenth = len(blocks) // 10
    cut = {"train": blocks[2 * tenth :], "validation": blocks[tenth : 2 * tenth], "test": blocks[:tenth]}
    texts = {
        name: [text for block in part for text in questions(block, names, config, rng)] for name, part in cut.items()
    }

    markers = max(len(text.names) for part in texts.values() for text in part)
    others = [[token for token in verse if token not in names] for block in cut["train"] for verse in block]
    frequent = data.Vocabulary.of(others, config.minimum).words[len(data.SPECIAL) :]
    vocabulary = data.Vocabulary(["<blank>", *(f"@entity{i}" for i in range(markers)), *frequent])
    parts = {name: [encode(text, vocabulary) for text in part] for name, part in texts.items()}
    return Data(parts, texts, vocabulary), replace(config, markers=markers, words=len(vocabulary))


def encode(text, vocabulary):
    """The Example of a Cloze."""
    marker = {name: ENTITIES + i for i, name in enumerate(text.names)}
    passage = [marker.get(token) or vocabulary.numbers.get(token, data.UNKNOWN) for token in text.passage]
    blanked = {**marker, text.answer: BLANK}
    question = [blanked.get(token) or vocabulary.numbers.get(token, data.UNKNOWN) for token in text.question]
    return Example(np.array(passage), np.array(question), marker[text.answer])


# From examples to batches


def batches(loaded, config, rng):
    """One epoch of training batches in random order, every name under a marker drawn for this time."""
    examples = loaded.parts["train"]
    for chosen in of_similar_length(examples, config.batch, rng):
        yield make_batch([examples[i] for i in chosen], config, rng)


def fixed_batches(examples, config):
    """[(indices, Batch)] of all examples, always the same ones."""
    rng = np.random.default_rng(0)
    chosen = of_similar_length(examples, config.batch, rng)
    return [(indices, make_batch([examples[i] for i in indices], config, rng)) for indices in chosen]


def of_similar_length(examples, size, rng):
    """Index arrays of at most `size` examples, all once, in random order: lengths differ little within a batch."""
    lengths = np.array([len(example.passage) for example in examples])
    order = np.argsort(lengths + rng.uniform(0, 8, len(lengths)))  # other neighbours in each epoch
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    return [groups[i] for i in rng.permutation(len(groups))]


def make_batch(examples, config, rng):
    """A Batch, the names of each example under markers drawn for this time."""
    shown = np.tile(np.arange(config.words), (len(examples), 1))  # (B, words): the number under which a word is shown
    markers = shown[:, ENTITIES : ENTITIES + config.markers]  # (B, markers)
    markers[:] = rng.permuted(markers, axis=1)
    rows = np.arange(len(examples))  # (B,)
    passage, passage_mask = data.padded([example.passage for example in examples])  # (S, B), (S, B)
    question, question_mask = data.padded([example.question for example in examples])  # (Q, B), (Q, B)
    passage, question = shown[rows, passage], shown[rows, question]  # (S, B), (Q, B)
    answer = shown[rows, [example.answer for example in examples]]  # (B,)
    return Batch(passage, passage_mask, question, question_mask, answer, is_marker(passage, config))


def is_marker(numbers, config):
    """Where an array of numbers has a name: bool, of its shape."""
    return (numbers >= ENTITIES) & (numbers < ENTITIES + config.markers)


def example_batch(config, rng):
    """A batch of random words, to measure time; one passage word in ten is one of ten names."""
    names = min(10, config.markers)

    def text(length, share):
        words = rng.integers(ENTITIES + config.markers, config.words, length)
        return np.where(rng.random(length) < share, ENTITIES + rng.integers(names, size=length), words)

    examples = []
    for _ in range(config.batch):
        passage, question = text(config.example_length, 0.1), text(config.example_question, 0.05)
        passage[:2] = ENTITIES, ENTITIES + 1  # at least two names
        question[-1] = BLANK
        examples.append(Example(passage, question, ENTITIES))
    return make_batch(examples, config, rng)


# Baselines


def baselines(examples, config):
    """Accuracy without reading: a name of the passage at random, its most frequent one, the one mentioned last."""
    chance, frequent, last = [], [], []
    for example in examples:
        mentions = example.passage[is_marker(example.passage, config)]
        counts = Counter(mentions.tolist())  # most_common: the first mentioned of equally frequent ones
        chance.append(1 / len(counts))
        frequent.append(counts.most_common(1)[0][0] == example.answer)
        last.append(mentions[-1] == example.answer)
    return {
        "chance": float(np.mean(chance)),
        "most_frequent": float(np.mean(frequent)),
        "last_mentioned": float(np.mean(last)),
    }
