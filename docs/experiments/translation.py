"""What RNNSearch and the Transformer share: sentence pairs as batches of numbers, and BLEU of what they translate."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import sacrebleu

import data


class Data(NamedTuple):
    """Sentences as numbers, {"train", "validation", "test"} of lists of (source, target), and what they stand for."""

    parts: dict
    texts: dict  # the same as English and German text
    source: data.Vocabulary
    target: data.Vocabulary


class Batch(NamedTuple):
    """Sentences of one source length S, time first; the targets are padded to T."""

    source: np.ndarray  # (S, B), END at the end
    previous: np.ndarray  # (T, B): START and the target
    target: np.ndarray  # (T, B): the target and END
    weights: np.ndarray  # (T, B): 0 where padded


def load(config):
    """(Data, the config with the sizes of its vocabularies). The source is in lower case, the target is not."""
    texts = data.load_pairs()._asdict()
    tokens = {
        name: [(data.tokenize(english.lower()), data.tokenize(german)) for english, german in pairs]
        for name, pairs in texts.items()
    }
    source, target = (data.Vocabulary.of((pair[side] for pair in tokens["train"]), config.minimum) for side in (0, 1))
    parts = {name: [(source.encode(s), target.encode(t)) for s, t in pairs] for name, pairs in tokens.items()}
    sized = replace(config, source_words=len(source), target_words=len(target))
    return Data(parts, texts, source, target), sized


def batches(loaded, config, rng):
    """One epoch of training batches, in random order."""
    pairs = loaded.parts["train"]
    source_lengths, target_lengths = zip(*((len(source), len(target)) for source, target in pairs), strict=True)
    for chosen in data.batches_of_one_length(source_lengths, config.batch, rng, target_lengths):
        yield make_batch([pairs[i] for i in chosen])


def fixed_batches(pairs, size):
    """All pairs in batches of one source length, always the same ones."""
    for chosen in data.batches_of_one_length([len(source) for source, _ in pairs], size, np.random.default_rng(0)):
        yield make_batch([pairs[i] for i in chosen])


def make_batch(pairs):
    """A Batch of (source, target) pairs of numbers, the sources of one length."""
    source = np.array([[*source, data.END] for source, _ in pairs]).T  # (S, B)
    previous, _ = data.padded([[data.START, *target] for _, target in pairs])  # (T, B)
    target, weights = data.padded([[*target, data.END] for _, target in pairs])  # (T, B), (T, B)
    return Batch(source, previous, target, weights)


def example_batch(config, rng):
    """A batch of random words, to measure time: `config.batch` sentences of `config.example_length` words."""
    words = min(config.source_words, config.target_words)
    shape = (config.batch, 2, config.example_length)
    return make_batch(rng.integers(len(data.SPECIAL), words, shape).tolist())


def greedy(step, state, B, longest):
    """The most probable word at every step, for B sentences at once: numbers (T, B), with T at most `longest`.

    `step(word, state)`, from the words before (B,) and whatever the model keeps, gives (logits (B, V), state).
    """
    word = np.full(B, data.START)  # (B,)
    words, ended = [], np.zeros(B, bool)  # (B,)
    while len(words) < longest and not ended.all():
        logits, state = step(word, state)  # (B, V)
        logits[:, [data.PAD, data.START, data.UNKNOWN]] = -np.inf  # no words of a translation
        word = logits.argmax(axis=1)  # (B,)
        words.append(word)
        ended |= word == data.END
    return np.stack(words)


def evaluate(P, loaded, config, name, loss, translate):
    """{"loss": mean cross-entropy of a target word, "bleu"} of the part `name`.

    `loss(P, batch, config)` is the mean of a batch, `translate(P, source, config, longest)` gives numbers (T, B). BLEU
    is sacrebleu's of the detokenised text, case-sensitive, as in the paper.
    """
    pairs, total, words = loaded.parts[name], 0.0, 0.0
    for batch in fixed_batches(pairs, config.batch):
        total += float(loss(P, batch, config)) * batch.weights.sum()
        words += batch.weights.sum()
    hypotheses = translations(P, loaded, config, pairs, translate)
    references = [german for _, german in loaded.texts[name]]
    return {"loss": float(total / words), "bleu": sacrebleu.corpus_bleu(hypotheses, [references]).score}


def translations(P, loaded, config, pairs, translate):
    """The translations of the pairs' sources, as text, in their order."""
    by_length = defaultdict(list)
    for i, (source, _) in enumerate(pairs):
        by_length[len(source)].append(i)
    texts = {}
    for length, chosen in by_length.items():
        source = np.array([[*pairs[i][0], data.END] for i in chosen]).T  # (S, B)
        numbers = translate(P, source, config, longest=2 * length + 10)  # (T, B)
        for i, column in zip(chosen, numbers.T, strict=True):
            texts[i] = data.detokenize(loaded.target.decode(column.tolist()))
    return [texts[i] for i in range(len(pairs))]


def examples(P, loaded, config, translate, count=10):
    """The first test sentences: [{"source", "reference", "translation"}, …]."""
    found = translations(P, loaded, config, loaded.parts["test"][:count], translate)
    texts = loaded.texts["test"][:count]
    return [
        {"source": english, "reference": german, "translation": translation}
        for (english, german), translation in zip(texts, found, strict=True)
    ]
