"""What a kernel is compiled for, and the pointers it is given."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba.core import types

from rmsnorm_np.cpu.vector import BYTES, ITEMSIZE, LANES, Work
from rmsnorm_np.ops.operation import Operation, Totals

STORAGE = {"float16": types.uint16, "bfloat16": types.uint16, "float32": types.float32, "float64": types.float64}
STORAGE |= dict.fromkeys(BYTES, types.uint8)


class Kinds(NamedTuple):
    """What a kernel is compiled for: an operation, and the dtypes of its arrays, None for one that is absent.

    totals: the dtypes of the sums over rows. first_k: whether fewer than n elements are in the RMS. row_eps: whether
    each row has its own eps. marks: whether rows that leave the range are marked, and left out. wide: whether the range
    of float32 is not enough for 16-bit floats. narrow: whether rows are shorter than the widest vectors. apart: whether
    rows lie apart (see `tiles`).
    """

    operation: Operation
    reads: Any
    columns: Any
    writes: Any
    totals: Totals
    first_k: bool = False
    row_eps: bool = False
    marks: bool = False
    wide: bool = False
    narrow: bool = False
    apart: bool = False

    @property
    def work(self) -> Work:
        """How to compute: the row is about what is kept, or else about the first array that is read."""
        keep = self.operation.keep
        about = (keep and getattr(self.writes, keep)) or self.reads[0]
        if about == "float64" or "float64" in self.writes:
            return Work("exact", LANES)
        # of bfloat16, an element that is not in the RMS may leave float32 until it is multiplied by its weight
        leaves = self.first_k and "bfloat16" in self.reads
        arrays = (*self.reads, *self.writes)
        halves = all(ITEMSIZE[name] == 2 for name in arrays if name) and "float64" not in self.columns[:-1]
        if self.operation.singles and halves and not self.wide and not leaves:
            forward = self.operation.share is None
            return Work("single", (4 if forward and not self.narrow else 2) * LANES, forward and about == "bfloat16")
        return Work("double", LANES)


class Arrays(NamedTuple):
    """Pointers to all arrays of a call, or to where they have the elements of one row."""

    reads: Any
    columns: Any
    writes: Any
    totals: Any
