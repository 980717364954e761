"""Byte-pair encoding: text to numbers and back, as GPT-2 and SmolLM2 do it, from the tables of a GGUF file.

    text     is cut into words:       "It's 42" -> "It", "'s", " ", "4", "2"
    a word   is a string of bytes, each of which is written as one visible character: a blank as "Ġ"
    merges   are pairs of strings, the most frequent of the training text first: the best pair in a word becomes one
             string, until no pair of it is in the list

Every byte is a token, so every text can be written.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import pairwise

# The words


@lru_cache(maxsize=1)
def word_pattern():
    r"""What text is cut into: each digit alone, a blank with the letters after it, and so on.

    Unicode's letters and numbers are \p{L} and \p{N} elsewhere; Python's `re` has neither. Its \d lacks ² and Ⅷ.
    """
    others = "".join(c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Nl", "No"))
    number = rf"[\d{others}]"
    letter = rf"[^\W\d_{others}]"
    mark = rf"(?:_|[^\w\s{others}])"
    return re.compile(rf"{number}|'(?:[stmd]|re|ve|ll)| ?{letter}+| ?{mark}+|\s+(?!{letter}|{mark})|\s+")


def visible_bytes():
    """One character for each of the 256 bytes: itself if it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {**{byte: chr(byte) for byte in seen}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


class Tokenizer:
    """Text to numbers and back.

    tokens: the string of each number; merges: "left right", best first; special: tokens that stand for themselves in
    a text, such as "<|im_start|>".
    """

    def __init__(self, tokens, merges, special=()):
        self.tokens = tokens
        self.numbers = {token: number for number, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.special = frozenset(special)
        longest_first = sorted(self.special, key=len, reverse=True)
        self.marks = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # the last matches nothing
        self.character = visible_bytes()
        self.byte = {character: byte for byte, character in self.character.items()}

    @classmethod
    def of(cls, facts):
        """From the facts of a GGUF file."""
        tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
        return cls(tokens, facts["tokenizer.ggml.merges"], control)

    def encode(self, text):
        """Numbers of a text, a list."""
        numbers, start = [], 0
        for mark in self.marks.finditer(text):
            numbers += [*self.encode_plain(text[start : mark.start()]), self.numbers[mark[0]]]
            start = mark.end()
        return numbers + self.encode_plain(text[start:])

    def encode_plain(self, text):
        """Of a text without special tokens."""
        words = ("".join(self.character[byte] for byte in word.encode()) for word in word_pattern().findall(text))
        return [self.numbers[part] for word in words for part in self.merged(word)]

    def merged(self, word):
        """The strings that a word consists of when all merges are made."""
        parts = list(word)
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(parts)]
            best = min(ranks)
            if best == len(self.ranks):
                break
            i = ranks.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def decode(self, numbers):
        """The text of these numbers; "�" where the bytes are no UTF-8, as when a character is only begun."""
        parts = (self.tokens[number] for number in numbers)
        return b"".join(self.bytes_of(part) for part in parts).decode(errors="replace")

    def bytes_of(self, token):
        """The bytes that a token stands for."""
        return token.encode() if token in self.special else bytes(self.byte[character] for character in token)
