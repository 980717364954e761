"""An operation on rows that are cut into pieces, in NumPy: the formulas of `ops`, some elements at a time.

Of each piece `sums` gives what it adds to the sums of its rows. Somebody adds these up over the pieces of a row, and
hands them to the next stage of each piece, and at last to `results`. So a piece is read once for each stage, and once
more for the results. All is computed in float64, or where there are arrays of float64 in longdouble, as in the
reference: the results are the exact ones, rounded once, where that type is wider.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rmsnorm_np.ops.operation import Operation, Totals, shared
from rmsnorm_np.reference._common import rounded

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    Array = npt.NDArray[Any]

AT_ONCE = 1 << 15  # elements: in longdouble half a megabyte, so that what the formulas make stays in the cache


class Cut(NamedTuple):
    """What all pieces of an array have in common. axes: the normalised ones, in order; n: elements of a whole row, k of
    them in the RMS; dtypes: of the outputs, None for one that is not there; wide: the type to compute in.
    """

    operation: Operation
    axes: tuple[int, ...]
    n: int
    k: int
    eps: float
    weight_offset: float
    dtypes: tuple[Any, ...]
    wide: Any


class Piece(NamedTuple):
    """The arrays of a piece, all of as many axes as x. reads: of one shape; columns: as the operation has them, without
    weight_offset, broadcast against reads; inside: where elements are among the first k of a row, None for everywhere.
    """

    reads: tuple[Any, ...]
    columns: tuple[Any, ...]
    inside: Any


def wide_dtype(dtypes: Any) -> Any:
    """The type to compute in where arrays of these dtypes are read or written."""
    return np.longdouble if any(dtype == np.float64 for dtype in dtypes if dtype is not None) else np.float64


def width(operation: Operation, stage: int) -> int:
    """How many sums a stage has."""
    return len(_fields(operation.stages[stage].Sums))


@np.errstate(all="ignore")  # NaN and Inf follow the formulas in silence
def sums(cut: Cut, piece: Piece, found: list[Any]) -> Array:
    """What a piece adds to the sums of its next stage: of the shape of its reads, with 1 along the normalised axes, and
    one more axis for the sums. found: the sums of the stages before, each of all pieces.
    """
    tiles, stage = _Tiles(cut, piece, found), cut.operation.stages[len(found)]
    zero, fields = _zero(cut), _fields(stage.Sums)
    total = np.zeros((tiles.rows, len(fields)), cut.wide)
    for rows, _, e, columns, inside, m in tiles:
        terms = stage.add(stage.Sums(**dict.fromkeys(fields, zero)), e[0], columns, m, inside)
        for j, field in enumerate(fields):
            term = getattr(terms, field)
            if stage.first_k and inside is not None:
                term = np.where(inside, term, zero)
            total[rows, j] += np.sum(term, axis=1)
    shape = [1 if i in cut.axes else length for i, length in enumerate(piece.reads[0].shape)]
    return total.reshape(*shape, len(fields))


@np.errstate(all="ignore")
def results(cut: Cut, piece: Piece, found: list[Any]) -> tuple[Any, ...]:
    """The outputs of a piece, and what it adds to the totals: float64, in the shapes of weight and bias."""
    tiles, operation = _Tiles(cut, piece, found), cut.operation
    outs = [None if dtype is None else np.empty((tiles.rows, tiles.n), dtype) for dtype in cut.dtypes]
    likes: Any = () if operation.share is None else shared(operation, tiles.columns)
    totals = [None if like is None else np.zeros(like[0].shape, cut.wide) for like in likes]
    zeros = Totals(*(None if like is None else _zero(cut) for like in likes))
    for rows, part, (e, kept), columns, inside, m in tiles:
        written = operation.leave(e, m, columns, inside)
        for field, out in zip(operation.Writes._fields, outs, strict=True):
            if out is not None:
                value = getattr(written, field)
                out[rows, part] = kept if field == operation.keep else rounded(value, out.dtype)
        if operation.share is not None:
            for total, like, terms in zip(totals, likes, operation.share(zeros, e, m), strict=True):
                if total is not None:
                    _add(total[:, part], like[1], rows, terms)
    shaped = [None if out is None else tiles.restored(out, piece.reads[0].shape) for out in outs]
    for total, a in zip(totals, shared(operation, piece.columns), strict=False):
        shaped.append(None if total is None else tiles.restored(total.astype(np.float64), a.shape))
    return tuple(shaped)


def _zero(cut: Cut) -> Array:
    """Where a sum begins. A term that is not there leaves it as it is: an array, so that this can be added up too."""
    return np.zeros((1, 1), cut.wide)


def _add(total: Any, places: Any, rows: slice, terms: Any) -> None:
    """Add terms (rows, n) to the rows (m, n) of a total that they share."""
    if places is None:
        total[0] += np.sum(terms, axis=0)
    else:
        np.add.at(total, places[rows], terms)


class _Tiles:
    """A piece as tiles of rows (rows, n): of each its rows, its elements, (what the operation is about, what is kept),
    its columns, inside, and the numbers of the last stage whose sums are known.
    """

    def __init__(self, cut: Cut, piece: Piece, found: list[Any]) -> None:
        self.cut, self.ndim = cut, piece.reads[0].ndim
        self.reads = tuple(map(self._flat, piece.reads))
        self.rows, self.n = self.reads[0].shape
        self.columns = [self._column(a, piece.reads[0].shape) for a in piece.columns]
        self.inside = self._flat(piece.inside)
        self.found = [a.reshape(self.rows, a.shape[-1]) for a in found]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        cut = self.cut
        length = min(self.n, AT_ONCE)
        height = max(1, AT_ONCE // max(1, length))
        for first in range(0, self.rows, height):
            rows = slice(first, first + height)
            m = self._numbers(rows)
            for begin in range(0, self.n, max(1, length)):
                part = slice(begin, begin + length)
                columns = cut.operation.Columns(
                    *(None if c is None else self._widened(c[0][_rows_of(c, rows), part]) for c in self.columns),
                    cut.weight_offset or None,  # adding 0.0 would turn -0.0 into +0.0
                )
                inside = None if self.inside is None else self.inside[:, part]
                yield rows, part, self._entered(rows, part), columns, inside, m

    def _entered(self, rows: slice, part: slice) -> tuple[Any, Any]:
        """What the operation is about; and that as it is kept, rounded, if it is: then the operation is about this."""
        operation, reads = self.cut.operation, [None if a is None else a[rows, part] for a in self.reads]
        if operation.keep is None or reads[1] is None:
            return operation.enter(operation.Reads(*map(self._widened, reads))), None
        x: Any = reads[0]
        other: Any = reads[1]
        # a sum of two float64 is rounded once by float64 itself, and would be rounded twice from longdouble
        wide = np.longdouble if x.dtype == np.float64 and other.dtype != np.float64 else np.float64
        kept = rounded(operation.enter(operation.Reads(x.astype(wide), other.astype(wide))), other.dtype)
        return self._widened(kept), kept

    def _numbers(self, rows: slice) -> Any:
        cut, m = self.cut, None
        n, k, eps = cut.wide(cut.n), cut.wide(cut.k), cut.wide(cut.eps)
        for stage, known in zip(cut.operation.stages, self.found, strict=False):
            of_rows = stage.Sums(**{f: known[rows, j : j + 1] for j, f in enumerate(_fields(stage.Sums))})
            m = stage.numbers(of_rows, n, k, eps, m)
        return m

    def _widened(self, a: Any) -> Any:
        return None if a is None else a.astype(self.cut.wide)

    def _flat(self, a: Any) -> Any:
        """(rows, n), the normalised axes last."""
        if a is None:
            return None
        moved = a.transpose(self._order())
        lead = self.ndim - len(self.cut.axes)
        return moved.reshape(math.prod(moved.shape[:lead]), math.prod(moved.shape[lead:]))

    def restored(self, a: Any, shape: tuple[int, ...]) -> Any:
        """An array (rows, n) in this shape."""
        order = self._order()
        return np.ascontiguousarray(a.reshape([shape[i] for i in order]).transpose(np.argsort(order)))

    def _order(self) -> list[int]:
        return [*(i for i in range(self.ndim) if i not in self.cut.axes), *self.cut.axes]

    def _column(self, a: Any, shape: tuple[int, ...]) -> Any:
        """A column as (m, n), and the row of it that each row uses, None if there is one for all."""
        if a is None:
            return None
        flat = self._flat(a)
        if len(flat) == 1:
            return flat, None
        lead, x_lead = ([s[i] for i in range(self.ndim) if i not in self.cut.axes] for s in (a.shape, shape))
        return flat, np.broadcast_to(np.arange(len(flat)).reshape(lead), x_lead).reshape(-1)


def _rows_of(column: tuple[Any, Any], rows: slice) -> Any:
    return slice(None) if column[1] is None else column[1][rows]


def _fields(record: Any) -> list[str]:
    """The sums, without those that only tell whether a row is in range."""
    return [field for field in record._fields if field not in record._field_defaults]
