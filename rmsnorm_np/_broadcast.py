"""Weights and biases that broadcast against x in a way that engines do not know.

To an engine a parameter is (m, n), and row r uses row r % m: what is shared along the first axes of the rows, and has
one row for each index of the others. Where x is (batch, seq, n) and the weight (batch, 1, n), each index of batch is a
call of its own. No bit of a row depends on the rows beside it, so that no result does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    Shape: TypeAlias = tuple[int, ...]


class Spread(NamedTuple):
    """Weight and bias with all axes of the rows that are longer than one, and n. cut: one call for each of its indices,
    which are those of the first of these axes.
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


def forward(
    engine: ModuleType, operation: Any, reads: Any, spread: Spread, out: Any, k: int, eps: float
) -> tuple[Any, ...]:
    """The outputs of `engine.forward`."""
    results = _results(engine, reads, out)
    for rows, weight_at, bias_at in _parts(spread, len(reads[0])):
        columns = _rows_at(spread.weight, weight_at), _rows_at(spread.bias, bias_at), spread.weight_offset
        engine.forward(operation, _part(reads, rows), columns, _part(results, rows), k, eps)
    return results


def backward(
    engine: ModuleType, operation: Any, reads: Any, spread: Spread, out: Any, k: int, eps: float
) -> tuple[Any, list[Any]]:
    """The outputs and totals of `engine.backward`; what several calls share is added up in float64."""
    results = _results(engine, reads, out)
    parameters = spread.weight, spread.bias
    totals = [a if a is None else _total(a, spread.cut) for a in parameters]
    for rows, *places in _parts(spread, len(reads[0])):
        columns = [_rows_at(a, place) for a, place in zip(parameters, places, strict=True)]
        wanted = [_rows_at(total, place) for total, place in zip(totals, places, strict=True)]
        sums = tuple(
            np.empty(a.shape) if _is_shared(total, spread.cut) else a for a, total in zip(wanted, totals, strict=True)
        )
        given = (*columns, spread.weight_offset)
        engine.backward(operation, _part(reads, rows), given, _part(results, rows), k, eps, totals=sums)
        for total, some in zip(wanted, sums, strict=True):
            if total is not some:
                total += some
    return results, [a if a is None else a.astype(like.dtype) for a, like in zip(totals, parameters, strict=True)]


def _results(engine: ModuleType, reads: Any, out: Any) -> tuple[Any, ...]:
    """Arrays for all results; each is like the array that is read in its place."""
    return tuple(
        engine.new_result(like, like.dtype) if a is None and like is not None else a
        for a, like in zip(out, reads, strict=False)
    )


def _parts(spread: Spread, rows: int) -> Iterator[Any]:
    """The rows of each call, and the index of its weight and bias."""
    step = rows // max(1, np.prod(spread.cut, dtype=int))
    for part, index in enumerate(np.ndindex(spread.cut)):
        places = (
            () if a is None else tuple(i if length != 1 else 0 for i, length in zip(index, a.shape, strict=False))
            for a in (spread.weight, spread.bias)
        )
        yield slice(part * step, (part + 1) * step), *places


def _part(arrays: Any, rows: slice) -> tuple[Any, ...]:
    return tuple(None if a is None else a[rows] for a in arrays)


def _rows_at(a: Any, place: Shape) -> Any:
    """The rows (m, n) of a parameter for one call: a view."""
    return None if a is None else a[place].reshape(-1, a.shape[-1])


def _is_shared(a: Any, cut: Shape) -> bool:
    """Whether several calls use the same part of a parameter."""
    return a is not None and a.shape[: len(cut)] != cut


def _total(parameter: Any, cut: Shape) -> Any:
    """Where the gradient of a parameter is added up."""
    return np.zeros(parameter.shape, np.float64 if _is_shared(parameter, cut) else parameter.dtype)
