"""Weights and biases that broadcast against x in a way that engines do not know.

To an engine a parameter is (m, n), and row r uses row r % m: what is shared along the first axes of the rows, and has
one row for each index of the others. Where x is (batch, seq, n) and the weight (batch, 1, n), each index of batch is a
call of its own. No bit of a row depends on the rows beside it, so that no result does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    Shape: TypeAlias = tuple[int, ...]


class Spread(NamedTuple):
    """Weight and bias of shape (*axes, n), with all axes of the rows that are longer than one, where they are 1 or as
    long. cut: how long the first of these axes are; there is one call to the engine for each of their indices.
    """

    weight: Any
    bias: Any
    weight_offset: float
    cut: Shape


def for_engines(parameters: tuple[Any, Any, float], leads: tuple[Any, Any], x_lead: Shape) -> Any:
    """Weight, bias and weight_offset as an engine takes them, or a `Spread`. leads: the axes of weight and bias before
    the normalised ones; x_lead: those of x.
    """
    weight, bias, weight_offset = parameters
    long = [i - len(x_lead) for i, length in enumerate(x_lead) if length != 1]
    narrow = [None if a is None else tuple(a[i] if -i <= len(a) else 1 for i in long) for a in leads]
    cut = axes_cut(narrow)
    if cut == 0:
        return _flat(weight, ()), _flat(bias, ()), weight_offset
    return Spread(_flat(weight, narrow[0]), _flat(bias, narrow[1]), weight_offset, tuple(x_lead[i] for i in long[:cut]))


def _flat(a: Any, lead: Shape | None) -> Any:
    """(m, n), or (*lead, n)."""
    return None if a is None else a.reshape(*(lead or (-1,)), a.shape[-1])


def axes_cut(leads: list[Shape | None]) -> int:
    """How many of the first axes have to be taken apart so that engines know what is left. leads: the axes of weight
    and bias before the normalised ones, 1 or as long as that of x, which is longer than one.
    """
    cut = 0
    for lead in leads:
        own = [length != 1 for length in lead or ()]
        while any(own[i] and not own[i + 1] for i in range(cut, len(own) - 1)):
            cut += 1
    return cut


def rows_order(leads: tuple[Shape | None, ...], x_lead: Shape) -> Shape | None:
    """The order of the axes of the rows in which an engine knows all parameters as they are: what they share comes
    first. It is that of x where this will do, and None if there is none. leads: as in `for_engines`.
    """
    given = [(1,) * (len(x_lead) - len(lead)) + lead for lead in leads if lead is not None]
    long = [i for i, length in enumerate(x_lead) if length != 1]
    order = sorted(long, key=lambda i: sum(lead[i] != 1 for lead in given))
    for lead in given:
        own = [i for i in long if lead[i] != 1]
        if order[len(order) - len(own) :] != own:
            return None
    return tuple(range(len(x_lead)) if order == long else [*(i for i in range(len(x_lead)) if i not in long), *order])


class InParts:
    """An engine for parameters as in `Spread`: it calls another one for each part of the rows."""

    def __init__(self, engine: ModuleType, cut: Shape) -> None:
        self.engine, self.cut = engine, cut

    def new_result(self, like: Any, dtype: Any) -> Any:
        """Where a result is written."""
        return self.engine.new_result(like, dtype)

    def forward(self, operation: Any, reads: Any, columns: Any, out: Any, k: int, eps: float) -> tuple[Any, ...]:
        """The outputs of the engine."""
        results = self._results(reads, out)
        for rows, index in self._parts(len(reads[0])):
            part = [_at(a, index) for a in columns[:-1]]
            self.engine.forward(operation, _rows(reads, rows), (*part, columns[-1]), _rows(results, rows), k, eps)
        return results

    def backward(
        self, operation: Any, reads: Any, columns: Any, out: Any, k: int, eps: float, totals: Any = None
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """The outputs and totals of the engine. What several calls share is added up in float64, and rounded once.

        totals: arrays of zeros to add it up in.
        """
        results = self._results(reads, out)
        likes: Any = columns[0], columns[1] if "bias" in operation.Columns._fields else None
        if totals is None:
            totals = [None if a is None else np.zeros(a.shape, self._sum_dtype(a)) for a in likes]
        else:
            likes = totals
        for rows, index in self._parts(len(reads[0])):
            part = [_at(a, index) for a in columns[:-1]]
            places = [_at(total, index) for total in totals]
            sums = tuple(
                np.empty(place.shape) if like is not None and self._is_shared(like) else place
                for place, like in zip(places, likes, strict=True)
            )
            given = (*part, columns[-1])
            self.engine.backward(operation, _rows(reads, rows), given, _rows(results, rows), k, eps, totals=sums)
            for place, some in zip(places, sums, strict=True):
                if place is not some:
                    place += some
        return results, [
            None if like is None else total.astype(like.dtype, copy=False)
            for total, like in zip(totals, likes, strict=True)
        ]

    def quantize(self, operation: Any, reads: Any, columns: Any, out: Any, k: int, numbers: Any) -> tuple[Any, ...]:
        """The outputs of the engine; numbers: eps, the scale of each row and its bound."""
        results, (eps, scales, bound) = self._results(reads, out), numbers
        for rows, index in self._parts(len(reads[0])):
            part = *(_at(a, index) for a in columns[:-1]), columns[-1]
            given = eps, scales[rows], bound
            self.engine.quantize(operation, _rows(reads, rows), part, _rows(results, rows), k, given)
        return results

    def _results(self, reads: Any, out: Any) -> tuple[Any, ...]:
        """Arrays for all results: one that is not given is like the array that is read in its place."""
        return tuple(
            self.engine.new_result(like, like.dtype) if a is None and like is not None else a
            for a, like in zip(out, reads, strict=False)
        )

    def _parts(self, rows: int) -> Iterator[tuple[slice, Shape]]:
        """The rows of each call, and the index of its parameters."""
        step = rows // (math.prod(self.cut) or 1)
        for part, index in enumerate(np.ndindex(self.cut)):
            yield slice(part * step, (part + 1) * step), index

    def _is_shared(self, parameter: Any) -> bool:
        """Whether several calls use the same part of it."""
        return bool(parameter.shape[: len(self.cut)] != self.cut)

    def _sum_dtype(self, parameter: Any) -> Any:
        return np.float64 if self._is_shared(parameter) else parameter.dtype


def in_parts(engine: Any, spread: Spread) -> tuple[Any, tuple[Any, Any, float]]:
    """An engine for parameters that broadcast in another way than engines know, and these parameters."""
    return InParts(engine, spread.cut), spread[:3]


def _rows(arrays: Any, rows: slice) -> tuple[Any, ...]:
    return tuple(None if a is None else a[rows] for a in arrays)


def _at(a: Any, index: Shape) -> Any:
    """The rows (m, n) of a parameter for one call: a view."""
    if a is None:
        return None
    place = tuple(i if length != 1 else 0 for i, length in zip(index, a.shape, strict=False))
    return a[place].reshape(-1, a.shape[-1])
