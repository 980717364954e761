"""Reads a GGUF file, the format of llama.cpp: what is known about a model, and its tensors, most of them quantised.

    head        "GGUF", the version, how many tensors, how many facts
    facts       name, type, value: the sizes of the layers, the words of the tokenizer …
    directory   of each tensor: name, shape, format, where it begins
    data        the tensors, each at a multiple of the alignment

A quantised tensor is cut into blocks of 32 elements with a scale of their own. What a block looks like is a NumPy
dtype here, so that a tensor of the file is an array of blocks, and dequantisation one line.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np

# Blocks and what they stand for. A scale is one float16 for 32 elements.


def q8_0(blocks):
    """x = scale · q with q from −128 to 127: (blocks,) -> (blocks, 32)."""
    return blocks["scale"].astype(np.float32)[:, None] * blocks["q"]


def q4_1(blocks):
    """x = scale · q + minimum with q from 0 to 15, two in a byte: (blocks,) -> (blocks, 32)."""
    low, high = blocks["pairs"] & 15, blocks["pairs"] >> 4  # (blocks, 16): elements 0 to 15 and 16 to 31
    q = np.concatenate([low, high], axis=1)  # (blocks, 32)
    return blocks["scale"].astype(np.float32)[:, None] * q + blocks["minimum"].astype(np.float32)[:, None]


def plain(numbers):
    """Floating-point numbers: a block is one of them."""
    return numbers.astype(np.float32)


class Format(NamedTuple):
    """How a tensor is stored."""

    name: str
    elements: int  # of a block
    block: np.dtype
    dequantise: object  # blocks -> float32


FORMATS = {  # by their numbers in the file: those that SmolLM2's file has, and float16
    0: Format("F32", 1, np.dtype("<f4"), plain),
    1: Format("F16", 1, np.dtype("<f2"), plain),
    3: Format("Q4_1", 32, np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("pairs", "u1", 16)]), q4_1),
    8: Format("Q8_0", 32, np.dtype([("scale", "<f2"), ("q", "i1", 32)]), q8_0),
}


class Tensor(NamedTuple):
    """A tensor as it lies in the file: its blocks, row after row."""

    shape: tuple[int, ...]
    format: Format
    blocks: np.ndarray

    def array(self):
        """Its elements in float32."""
        return self.format.dequantise(self.blocks).reshape(self.shape)


def read(path):
    """The facts {name: value} and the tensors {name: Tensor} of a file, which is mapped into memory, not read."""
    data = np.memmap(path, np.uint8, mode="r")
    cursor = Cursor(data)
    if bytes(data[:4]) != b"GGUF":
        raise ValueError(f"{path} begins with {bytes(data[:4])!r}, expected b'GGUF'")
    _, version, tensors, facts = cursor.take("<4sIQQ")
    if version not in (2, 3):
        raise ValueError(f"{path} is of GGUF's version {version}, expected 2 or 3")
    known = dict(cursor.fact() for _ in range(facts))
    directory = [cursor.entry() for _ in range(tensors)]
    alignment = known.get("general.alignment", 32)
    start = math.ceil(cursor.place / alignment) * alignment
    return known, {name: tensor(data[start + offset :], name, shape, kind) for name, shape, kind, offset in directory}


def tensor(data, name, shape, kind):
    """The tensor that data begins with."""
    if kind not in FORMATS:
        expected = ", ".join(f"{number} ({form.name})" for number, form in FORMATS.items())
        raise ValueError(f"{name} has format {kind}, expected one of {expected}")
    form = FORMATS[kind]
    count = math.prod(shape) // form.elements
    return Tensor(shape, form, data[: count * form.block.itemsize].view(form.block))


class Cursor:
    """A place in the file that moves on with what is taken."""

    NUMBERS = dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"])) | {10: "<Q", 11: "<q", 12: "<d"}
    STRING, ARRAY = 8, 9

    def __init__(self, data):
        self.data, self.place = memoryview(data), 0

    def take(self, layout):
        """The values that `struct` finds there."""
        values = struct.unpack_from(layout, self.data, self.place)
        self.place += struct.calcsize(layout)
        return values

    def string(self):
        """Its length, then UTF-8."""
        (length,) = self.take("<Q")
        self.place += length
        return str(self.data[self.place - length : self.place], "utf-8")

    def value(self, kind):
        """A number, a string, or an array of those."""
        if kind == self.STRING:
            return self.string()
        if kind == self.ARRAY:
            of, length = self.take("<IQ")
            return [self.value(of) for _ in range(length)]
        return self.take(self.NUMBERS[kind])[0]

    def fact(self):
        """(name, value)."""
        name = self.string()
        (kind,) = self.take("<I")
        return name, self.value(kind)

    def entry(self):
        """(name, shape, format, offset) of a tensor; the file names the axis that is contiguous first."""
        name = self.string()
        (axes,) = self.take("<I")
        shape = self.take(f"<{axes}Q")[::-1]
        return name, shape, *self.take("<IQ")
