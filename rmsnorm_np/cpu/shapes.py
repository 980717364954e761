"""The shape of what goes from step to step: nested records, and at their ends numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from rmsnorm_np.cpu.llvm import DOUBLE, FLOAT


class Leaf(NamedTuple):
    """What a number is in LLVM: its type, and how many of them a vector holds (0: it is no vector)."""

    element: str
    lanes: int

    @classmethod
    def of(cls, value: Any) -> Leaf:
        """The leaf of an LLVM value."""
        element = value.type.element if isinstance(value.type, ir.VectorType) else value.type
        return cls("f32" if element == FLOAT else "f64", getattr(value.type, "count", 0))

    @property
    def llvm(self) -> Any:
        element = FLOAT if self.element == "f32" else DOUBLE
        return ir.VectorType(element, self.lanes) if self.lanes else element


SCALAR = Leaf("f64", 0)


def shape_of(value: Any) -> Any:
    """The value with a `Leaf` in place of each number."""
    if isinstance(value, tuple):
        return _like(value, [shape_of(item) for item in value])
    return None if value is None else Leaf.of(value.value)


def leaves(value: Any) -> list[Any]:
    """What is at the ends of nested records, None left out."""
    if isinstance(value, tuple) and not isinstance(value, Leaf):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if value is None else [value]


def rebuilt(shape: Any, found: list[Any]) -> Any:
    """The record of this shape whose leaves are found; takes them from the list."""
    if shape is None:
        return None
    return found.pop(0) if isinstance(shape, Leaf) else _like(shape, [rebuilt(item, found) for item in shape])


def _like(record: Any, items: list[Any]) -> Any:
    return type(record)(*items) if hasattr(record, "_fields") else tuple(items)
