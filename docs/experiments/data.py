"""The data in data/ (sources and licences: data/README.md), words and their numbers, batches of one length."""

from __future__ import annotations

import lzma
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).with_name("data")

# Loaders


class Split(NamedTuple):
    """Training, validation and test part of a list of examples."""

    train: list
    validation: list
    test: list


def load_pairs():
    """English and German sentences, (str, str) each; the last 1,000 are for test, the 1,000 before for validation."""
    pairs = [tuple(line.split("\t")) for line in _lines("help_en_de.tsv.xz")]
    return Split(pairs[:-2000], pairs[-2000:-1000], pairs[-1000:])


def load_verses():
    """The verses of the World English Bible in order, str."""
    return _lines("verses_en.txt.xz")


def load_emoji():
    """A dict: images `noto` and `twemoji` uint8 (1641, 32, 32, 3), and the words `label`, `tags`, `category`, …"""
    with np.load(FOLDER / "emoji.npz") as arrays:
        return dict(arrays)


def load_fashion():
    """A dict: images `x` uint8 (10000, 28, 28), classes `y` (10000,), and `x_test`, `y_test` of 2,000."""
    with np.load(FOLDER / "fashion.npz") as arrays:
        return dict(arrays)


def _lines(name):
    return lzma.decompress((FOLDER / name).read_bytes()).decode().splitlines()


# Words

_HYPHEN = re.compile(r"(?<=\w)-(?=\w)|(?<=\w)-(?!\S)|(?<!\S)-(?=\w)")
_TOKEN = re.compile(r"@?-@?|\d+(?:[.,]\d+)+|\w+(?:[.'’_/]\w+)*|[^\w\s]")
_NO_SPACE_BEFORE, _NO_SPACE_AFTER = {*".,;:!?)]…%“”»", "@-", "@-@"}, {*"([„«", "-@", "@-@"}


def tokenize(text):
    """Words and punctuation: "E-Mail (neu)." -> ["E", "@-@", "Mail", "(", "neu", ")", "."].

    A hyphen becomes a token of its own, so that the parts of compounds are known words. An @ shows where it touches a
    word, as in the Moses tokeniser: "Text- und Bild-Datei" -> ["Text", "@-", "und", "Bild", "@-@", "Datei"].
    """
    return _TOKEN.findall(_HYPHEN.sub(_marked, text))


def _marked(hyphen):
    before, after = hyphen.string[: hyphen.start()], hyphen.string[hyphen.end() :]
    return f" {'@' if before[-1:].strip() else ''}-{'@' if after[:1].strip() else ''} "


def detokenize(tokens):
    """The text of `tokenize`'s words, but for unusual spacing."""
    text, glued, quoted = "", True, False  # glued: no space before the next token
    for token in tokens:
        closing = token == '"' and quoted
        text += "" if glued or closing or token in _NO_SPACE_BEFORE else " "
        text += token.strip("@") or token
        glued = token in _NO_SPACE_AFTER or (token == '"' and not quoted)
        quoted ^= token == '"'
    return text


PAD, START, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


class Vocabulary:
    """Words and their numbers. Four numbers are special: PAD, START, END and UNKNOWN."""

    def __init__(self, words):
        self.words = (*SPECIAL, *words)
        self.numbers = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def of(cls, sentences, minimum=3):
        """The words that stand in the lists of tokens at least `minimum` times, the most frequent first."""
        counts = Counter(token for tokens in sentences for token in tokens)
        return cls(
            word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= minimum
        )

    def __len__(self):
        return len(self.words)

    def encode(self, tokens):
        """Numbers of the tokens, a list; UNKNOWN for those that are no words of this vocabulary."""
        return [self.numbers.get(token, UNKNOWN) for token in tokens]

    def decode(self, numbers):
        """Words up to the first END, without START and PAD."""
        numbers = list(numbers)
        numbers = numbers[: numbers.index(END)] if END in numbers else numbers
        return [self.words[number] for number in numbers if number not in (PAD, START)]


# Batches


def batches_of_one_length(lengths, size, rng, then_by=None):
    """Index arrays of at most `size` examples of the same length, all examples once, in random order: one epoch.

    `then_by` sorts within a length, so that batches are of similar size in a second way (the target's length), with
    ties in random order.
    """
    lengths = np.asarray(lengths)
    order = rng.permutation(len(lengths))
    if then_by is not None:
        order = order[np.argsort(np.asarray(then_by)[order], kind="stable")]
    order = order[np.argsort(lengths[order], kind="stable")]
    ends = np.flatnonzero(np.diff(lengths[order])) + 1  # where the next length begins
    groups = np.split(order, ends)
    batches = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def padded(sequences, fill=PAD):
    """Lists of numbers as one array (T, B), time first, filled at the end, and the mask (T, B), 1 where a word is."""
    lengths = np.array([len(sequence) for sequence in sequences])
    array = np.full((lengths.max(), len(sequences)), fill, np.int64)
    for column, sequence in enumerate(sequences):
        array[: len(sequence), column] = sequence
    return array, (np.arange(lengths.max())[:, None] < lengths).astype(np.float32)
