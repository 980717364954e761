"""The shape of what goes from step to step: nested records, and at their ends numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from rmsnorm_np.cpu.llvm import DOUBLE, FLOAT
from rmsnorm_np.ops.records import mapped


@dataclass(frozen=True)
class Leaf:
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
    return mapped(lambda number: Leaf.of(number.value), value)
