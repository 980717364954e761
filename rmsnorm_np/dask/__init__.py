"""The functions on Dask arrays: a graph of tasks, and nothing computed before Dask is asked to.

Where the chunks hold whole rows, each is a call to the CPU engine, and all are independent. Where rows are cut, each
piece gives its sums, these are added up over the pieces, and a second task for each piece takes them (`_pieces`, in
NumPy). Gradients by parameters are float64 sums of each chunk, added up in a tree and rounded once.

`arguments` checks a call, `graph` makes arrays of tasks, `tasks` is what these run.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from rmsnorm_np import _pieces
from rmsnorm_np.dask import arguments, graph, tasks
from rmsnorm_np.ops.operation import Columns

if TYPE_CHECKING:
    from rmsnorm_np.dask.arguments import Rows
    from rmsnorm_np.ops.operation import Operation

__all__ = ["arguments", "backward", "forward", "new_result"]


def new_result(like: Any, dtype: Any) -> Any:
    """What stands for an array to write a result to: the dtype that it is to have."""
    return dtype


def forward(operation: Operation, reads: Any, columns: Any, out: Any, rows: Rows, eps: float) -> Any:
    """The outputs of an operation. reads, columns, rows: as `arguments` gives them; out: dtypes, or None."""
    return _run(operation, reads, columns, out, rows, eps)[0]


def backward(operation: Operation, reads: Any, columns: Any, out: Any, rows: Rows, eps: float) -> tuple[Any, Any]:
    """The outputs, and the gradients by weight and bias."""
    return _run(operation, reads, columns, out, rows, eps)


def _run(operation: Operation, reads: Any, columns: Any, out: Any, rows: Rows, eps: float) -> tuple[list[Any], Any]:
    if operation.Columns is not Columns:
        raise TypeError(f"{rows.names[0]} is a dask array, expected an ndarray: {operation.name} takes no dask arrays")
    x, (*parameters, weight_offset) = reads[0], columns
    # without the array that it would be like, an output is not there: h without a residual
    dtypes = [None if a is None else dtype or a.dtype for a, dtype in zip(reads, out, strict=False)]
    wide = _pieces.wide_dtype([*dtypes, *(a.dtype for a in reads if a is not None)])
    cut = _pieces.Cut(operation, rows.axes, rows.n, rows.k, eps, weight_offset, tuple(dtypes), wide)
    blocks = graph.Blocks(x, [*reads, *parameters])
    if all(x.numblocks[i] == 1 for i in rows.axes):
        made = blocks.mapped(partial(tasks.whole, cut, rows))
    else:
        blocks.arrays.append(None if rows.k == rows.n else graph.inside(x, rows))
        for stage in range(len(operation.stages)):
            found = blocks.mapped(partial(tasks.sums, cut), rows.axes, _pieces.width(operation, stage))
            blocks.sums.append(graph.added(found, rows.axes))
        made = blocks.mapped(partial(tasks.results, cut))
    results = [None if dtype is None else graph.item(made, j, dtype) for j, dtype in enumerate(dtypes)]
    if operation.share is None:
        return results, (None, None)
    totals = [None if a is None else graph.total(made, len(dtypes) + j, a, rows.axes) for j, a in enumerate(parameters)]
    return results, totals
