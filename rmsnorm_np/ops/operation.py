"""What an operation is, and the names of what goes in and comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Columns(NamedTuple):
    """What belongs to the elements of every row: weight and bias, and the number that is added to weight."""

    weight: Any = None
    bias: Any = None
    weight_offset: Any = None


class Reads(NamedTuple):
    """Forward: x, and what is added to it first."""

    x: Any
    residual: Any = None


class Writes(NamedTuple):
    """Forward: y, and h = x + residual, rounded."""

    y: Any
    h: Any = None


class GradientReads(NamedTuple):
    """Backward: x (or h), the gradient by y, and a gradient that reached h on another way."""

    x: Any
    dy: Any
    dh: Any = None


class GradientWrites(NamedTuple):
    """Backward: the gradient by x."""

    dx: Any


class Totals(NamedTuple):
    """Sums over the rows: the gradients by the columns."""

    dweight: Any = None
    dbias: Any = None


class Extent(NamedTuple):
    """Numbers of a row, each a plain one (`primitives.rounded`), that tell whether it is in range. Name every sum whose
    square, root or product the formulas use.

    within: 1/B <= |a| <= B. nontrivial: the same, but if the row is trivial (see `Operation`) it may be smaller.
    below: |a| <= B. B is an engine's own (`BOUNDS` in `cpu/extremes.py` and `cuda/row.py`).
    """

    within: tuple[Any, ...]
    nontrivial: tuple[Any, ...] = ()
    below: tuple[Any, ...] = ()


class Stage(NamedTuple):
    """Sums over a row, and the numbers that follow from them.

    ``add(s, e, c, m, inside)`` gives the sums s with one more element e, whose columns are c; m are the numbers of the
    stage before (None in the first); inside tells where the element is one of the first k (None: everywhere).
    ``numbers(s, n, k, eps, m)`` gives the row's numbers, a record of numbers and pairs; k is n where there is no p.
    `Sums` is the record of the sums. Those with a default are guards: they tell whether a row is in range, and an
    engine leaves them out (None) where its type has range enough. `first_k`: all its sums are over the first k elements
    alone. largest: its sums are largest magnitudes, and are joined as such.
    """

    Sums: type[Any]
    add: Callable[..., Any]
    numbers: Callable[..., Any]
    first_k: bool = False
    largest: bool = False


class Operation(NamedTuple):
    """See :mod:`rmsnorm_np.ops`. The records have the fields of those above; an operation has one or two stages.

    A row out of range is computed from s·x and s²·eps, s a power of two: this must not change y, and divide dx by s.

    name: no other operation's, as kernels are found by it.
    enter: ``enter(reads)``, what everything is about.
    leave: ``leave(e, m, c, inside)``, the outputs of an element: from what `enter` gave, the numbers of the last stage,
    the columns, and where the element is one of the first k.
    share: ``share(totals, e, m)``, the totals with one more element; fields of m are None for those in `always`.
    keep: the output that holds what `enter` gave, where that is asked for.
    extent: ``extent(s, n, k, eps, m)``, from the sums of the last stage and the numbers of the one before, an `Extent`.
    trivial: arrays that make a row trivial, and the number that all elements have then (None: one and the same).
    singles: float32 is enough to compute in where what is read has 16 bits: nothing cancels. (CPU; a GPU always does.)
    recentring: the result does not change if a number is added to all elements of the first array.
    always: totals whose shares need no numbers of the row: those of a row out of range keep their place in the sum.
    Columns: the record of what belongs to the columns: arrays like weight, arrays like bias (those with bias in their
    names), and last weight_offset.
    scaled: arrays that are multiplied by s with the first, so that outputs and totals stay what they are.
    divided, linear: outputs that are divided by s then; that are linear in dy. (Totals are all linear in dy.)
    unused: columns that no formula uses, though they have totals.
    scales: each row has a scale, float64, which the operation takes ("in") or finds ("out": `scale` of the numbers of
    the last stage). Where formulas have eps, they are handed (eps, scale, a bound of the scale) then.
    """

    name: str
    Reads: type[Any]
    Writes: type[Any]
    enter: Callable[..., Any]
    stages: tuple[Stage, ...]
    leave: Callable[..., Any]
    extent: Callable[..., Extent]
    trivial: tuple[tuple[str, float | None], ...] = ()
    share: Callable[..., Any] | None = None
    keep: str | None = None
    singles: bool = False
    recentring: bool = False
    always: tuple[str, ...] = ()
    Columns: type[Any] = Columns
    scaled: tuple[str, ...] = ()
    divided: tuple[str, ...] = ("dx",)
    linear: tuple[str, ...] = ("dx",)
    unused: tuple[str, ...] = ()
    scales: str | None = None


def shared(operation: Operation, columns: Any) -> tuple[Any, Any]:
    """The columns that the totals are like: weight, and bias where it is one, and no direction in its place."""
    return columns[0], columns[1] if operation.Columns is Columns else None


def guards(*sizes: Any) -> tuple[Any, ...]:
    """The squares of those guards that were taken."""
    return tuple(size * size for size in sizes if size is not None)


def scale(c: Any) -> Any:
    """weight_offset + weight; None without a weight."""
    from rmsnorm_np.ops.primitives import plus

    return plus(c.weight, c.weight_offset)
