"""Calls of operations beside the norms themselves: with one output, and with a scale for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np.cpu import kernel, long_rows, memory, pace, rare, threads
from rmsnorm_np.cpu.kernel import stored

if TYPE_CHECKING:
    from rmsnorm_np.ops.operation import Operation

_NO_TOTALS = (None, None)


def _marked(operation: Operation, reads: Any, columns: Any, writes: Any, k: int, eps: Any) -> Any:
    """Run the kernel; returns the marks of the rows that are out of range, or None. eps: or the rows' settings."""
    x, offset = reads[0], columns[-1]
    rows, n = x.shape
    way = kernel.ROWS if n <= long_rows.LONG_ROW else kernel.LONG_ROWS
    of_rows = type(eps[0] if operation.scales else eps)
    key = (
        operation.name, *(a is None or a.dtype for a in (*writes, *reads, *columns[:-1])), k == n, offset != 0.0, way,
        of_rows, False,
    )  # fmt: skip
    entry = kernel.entries.get(key) or kernel.entry(key, operation, reads, columns, writes, _NO_TOTALS)
    marks = np.zeros(rows, np.uint8) if entry.marks else None
    arrays = tuple(map(stored, reads)), (*map(stored, columns[:-1]), offset), tuple(map(stored, writes))
    args = *arrays, None if k == n else k, eps, memory.streams(writes[0]), marks
    on_threads = threads.choose(x.size)
    if on_threads == 1:
        found = entry.code(*args, 1)
    else:
        found, _ = pace.run(entry, args, x.size, on_threads)
    return marks if found else None


def new_result(x: Any, dtype: Any) -> Any:
    """Where a result like x, of another dtype, is to be written."""
    return memory.empty(x.shape, dtype, x)


def forward(operation: Operation, reads: Any, columns: Any, out: Any, k: int, eps: Any) -> Any:
    """The output of an operation that has one, and computes in float64. Arguments as of the engine's `forward`."""
    (y,) = out
    if y is None:
        y = memory.empty(reads[0].shape, reads[0].dtype, *(a for a in reads if a is not None))
    marks = _marked(operation, reads, columns, (y,), k, eps)
    if marks is not None:
        call = rare.Call(operation, operation.Reads(*reads), operation.Columns(*columns), k, eps, marks)
        with rare.standard_here():
            rare.forward(_forward_unmarked, call, y)
    return y


def _forward_unmarked(call: rare.Call, out: Any) -> Any:
    return forward(call.operation, call.reads, call.columns, (out,), call.k, call.eps)


def quantize(operation: Operation, reads: Any, columns: Any, out: Any, k: int, settings: Any) -> Any:
    """The outputs (q, h) of an operation whose rows have scales; q is an array to write to, h may be one.

    settings: (eps, the scales, float64 (rows,), a bound of them). The scales are read or written, as the operation
    does it.
    """
    q, h = out
    x, residual = reads
    if h is None and residual is not None:
        h = memory.empty(x.shape, residual.dtype, x, q)
    marks = _marked(operation, reads, columns, (q, h), k, settings)
    if marks is not None:
        eps, scales, bound = settings
        about = operation.Reads(x if h is None else h)
        call = rare.Call(operation, about, operation.Columns(*columns), k, eps, marks)
        with rare.standard_here():
            for place, rows, ready in rare.scaled(call):
                own = scales[rows]
                part = np.empty((len(rows), x.shape[1]), q.dtype)
                quantize(operation, ready.reads, ready.columns, (part, None), k, (ready.eps, own, bound))
                q[place], scales[rows] = part, own
    return q, h
