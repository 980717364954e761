"""The short way of small arrays: what a call asks of its parameters is asked once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import empty

from rmsnorm_np import _arguments, _numbers
from rmsnorm_np.cpu import kernel, long_rows, threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from rmsnorm_np.ops.operation import Operation

_FLOAT32 = np.dtype(np.float32)  # its rows need no marks, and its kernels see it as it is


def small(operation: Operation, given: dict[str, Any], whole: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """run(x): y of a small C-contiguous float32 array, by one kernel on one thread; None for every other.

    given: weight, bias, eps, weight_offset and, where the operation has it, p. whole(x) is the call by the long way,
    which compiles the kernel.
    """
    arrays = [a for a in (given["weight"], given["bias"]) if a is not None]
    n = len(arrays[0]) if arrays else 0
    if not 0 < n <= long_rows.LONG_ROW or not all(_arguments.is_ordinary_row(a, n) for a in arrays):
        return lambda x: None
    weight, bias = (None if a is None else a[None] for a in (given["weight"], given["bias"]))
    k = _numbers.elements_in_rms(n, given.get("p", 1.0))
    offset, eps, least = given["weight_offset"], given["eps"], threads.PARALLEL_ELEMENTS
    key = (
        operation.name, _FLOAT32, _FLOAT32, True, weight is None or weight.dtype, bias is None or bias.dtype, k == n,
        offset != 0.0, kernel.ROWS, float, False,
    )  # fmt: skip
    weight, bias = (a if a is None or a.itemsize > 2 else a.view(np.uint16) for a in (weight, bias))
    columns, k_or_none = (weight, bias, offset), None if k == n else k
    code: Any = None

    def run(x: Any) -> Any:
        nonlocal code
        if x.dtype is not _FLOAT32 or not (x.flags.carray or _arguments.is_ordinary(x)):
            return None
        shape = x.shape
        if not shape or shape[-1] != n or not (0 < x.size < least or x.size == n):
            return None
        if code is None:
            y = whole(x)
            code = kernel.entries[key].code
            return y
        y = empty(shape, _FLOAT32)
        reads, writes = (x, y) if len(shape) == 2 else (x.reshape(-1, n), y.reshape(-1, n))
        code((reads, None), columns, (writes, None), k_or_none, eps, 0, None, 1)
        return y

    return run
