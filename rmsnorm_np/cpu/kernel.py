"""The compiled kernels of this process, one for each operation and each combination of dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba.core import types

from rmsnorm_np.cpu.jit import compiled
from rmsnorm_np.cpu.kinds import STORAGE, Kinds
from rmsnorm_np.cpu.long_rows import long_kernel
from rmsnorm_np.cpu.schedule import adding_kernel, rows_kernel
from rmsnorm_np.cpu.vector import LANES
from rmsnorm_np.ops.operation import Totals
from rmsnorm_np.ops.records import given

if TYPE_CHECKING:
    from collections.abc import Callable

    from rmsnorm_np.ops.operation import Operation

NARROW = "narrow"  # begins the key of a kernel for rows shorter than its widest vectors
ROWS, LONG_ROWS, APART = range(3)  # how rows lie: one after another, long ones, or with their elements apart
_BITS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16)}
entries: dict[Any, Entry] = {}
_adders: dict[str, Callable[..., Any]] = {}


class Entry:
    """A kernel, and what a call needs to know of it. Two calls with one key have arguments of the same types.

    code: see `schedule.rows_kernel`; it takes the records as plain tuples. marks: whether it wants marks. halves:
    whether arrays of 16-bit floats are among them, whose bits it takes. has_narrow: whether short rows have another.
    """

    __slots__ = ("code", "halves", "has_narrow", "kinds", "long", "marks")

    def __init__(self, kinds: Kinds, long: bool) -> None:
        self.kinds, self.long, self.marks = kinds, long, kinds.marks
        self.halves = any(STORAGE.get(name) in (types.uint8, types.uint16) for record in kinds[1:5] for name in record)
        self.has_narrow = kinds.work.width > 2 * LANES
        self.code: Callable[..., Any] = self._first_call

    def _first_call(self, reads: Any, columns: Any, writes: Any, *rest: Any) -> Any:
        """Compile for the types of these arguments, then call."""
        kinds, operation = self.kinds, self.kinds.operation
        records = operation.Reads(*reads), operation.Columns(*columns), operation.Writes(*writes)
        sums = () if operation.share is None else map(Totals._make, rest[:2])
        label = " ".join(map(str, (operation.name, *kinds[1:], self.long)))
        make = long_kernel if self.long else rows_kernel
        self.code = compiled(label, lambda: make(kinds), (*records, *sums, *rest[2 * (operation.share is not None) :]))
        return self.code(reads, columns, writes, *rest)


def entry(key: Any, operation: Operation, reads: Any, columns: Any, writes: Any, totals: Any) -> Entry:
    """A new entry, for arrays of these dtypes; key ends with how rows lie, eps' type, and `Kinds.wide`."""

    def names(record: Any) -> Any:
        return given(record, lambda array: array.dtype.name)

    first_k, offset, way, row_eps, wide = not key[-5], key[-4], key[-3], key[-2] is not float, key[-1] is not False
    kinds = Kinds(
        operation, names(operation.Reads(*reads)),
        names(operation.Columns(*columns[:-1]))._replace(weight_offset=offset or None),
        names(operation.Writes(*writes)),
        names(Totals(*totals)), first_k, row_eps, wide=wide,
    )  # fmt: skip
    kinds = kinds._replace(narrow=key[0] == NARROW)
    kinds = kinds._replace(marks=kinds.work.name != "double" and not row_eps, apart=way == APART)
    entries[key] = found = Entry(kinds, way == LONG_ROWS)
    return found


def stored(a: Any) -> Any:
    """An array as kernels see it: Numba has no floats of 16 or 8 bits on CPUs, so they see their bits."""
    return a if a is None or a.itemsize > 2 else a.view(_BITS[a.itemsize])


def add_rows(partial: Any, total: Any, name: str, threads: int) -> None:
    """Rows h, h + m, … of the partial sums, added in this order, are row h of the total, whose dtype has this name."""
    code = _adders.get(name)
    args = partial, total, threads
    if code is None:
        code = _adders[name] = compiled(f"add_rows {name}", lambda: adding_kernel(name), args)
    code(*args)
