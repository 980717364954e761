"""The functions on Dask arrays: a graph of tasks, and nothing computed before Dask is asked to.

Where the chunks hold whole rows, each is a call to the CPU engine, and all are independent. Where rows are cut, each
piece gives its sums, these are added up over the pieces, and a second task for each piece takes them (`_pieces`, in
NumPy). Gradients by parameters are float64 sums of each chunk, added up in a tree and rounded once.

`arguments` checks a call, `graph` makes arrays of tasks, `tasks` is what these run.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from rmsnorm_np import _formats, _pieces
from rmsnorm_np.dask import arguments, graph, tasks
from rmsnorm_np.ops.operation import shared
from rmsnorm_np.ops.quantized import UNROUNDED

if TYPE_CHECKING:
    from rmsnorm_np.dask.arguments import Rows
    from rmsnorm_np.ops.operation import Operation

__all__ = ["arguments", "backward", "forward", "new_result", "quantized"]


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
    # without the array that it would be like, an output is not there: h without a residual
    dtypes = [None if a is None else dtype or a.dtype for a, dtype in zip(reads, out, strict=False)]
    cut, blocks = _prepared(operation, reads, columns, dtypes, rows, eps)
    if _hold_whole_rows(blocks.x, rows):
        made = blocks.mapped(partial(tasks.whole, cut, rows))
    else:
        _add_sums(blocks, cut, rows)
        made = blocks.mapped(partial(tasks.results, cut))
    results = [None if dtype is None else graph.item(made, j, dtype) for j, dtype in enumerate(dtypes)]
    if operation.share is None:
        return results, (None, None)
    likes = enumerate(shared(operation, columns), len(dtypes))
    return results, [None if a is None else graph.total(made, j, a, rows.axes) for j, a in likes]


def quantized(call: tuple[Any, ...], dtype: Any, scale: Any, bound: float) -> tuple[Any, Any, Any]:
    """(q of this dtype, the scales of the rows, h) of a call as in `_arguments.Call`.

    Where rows are cut, the largest magnitude of each is found over its pieces, as sums are.
    """
    reads, columns, _, rows, eps, _ = arguments.engine_arguments(call, None, 0)
    x, residual = reads
    per_row, h_dtype = _formats.scale_dtype(x.dtype), None if residual is None else residual.dtype
    # the first dtype is that of y, which stays unrounded: no task uses it
    cut, blocks = _prepared(UNROUNDED, reads, columns, [per_row, h_dtype], rows, eps)
    given = arguments.scale_of(scale, x, rows, per_row)
    if _hold_whole_rows(x, rows):
        blocks.arrays.append(given)
        made = blocks.mapped(partial(tasks.whole_quantized, cut, rows, dtype, bound))
        scales = graph.item(made, 2, per_row, dict.fromkeys(rows.axes, 1))
    else:
        _add_sums(blocks, cut, rows)
        scales = given
        if given is None:
            found = graph.largest(blocks.mapped(partial(tasks.largest, cut), rows.axes, 1), rows.axes)
            scales = found.map_blocks(tasks.own_scale, bound, dtype, per_row, dtype=per_row)
        blocks.arrays.append(scales)
        made = blocks.mapped(partial(tasks.quantized, cut, dtype))
    return graph.item(made, 0, dtype), scales, None if h_dtype is None else graph.item(made, 1, h_dtype)


def _prepared(operation: Operation, reads: Any, columns: Any, dtypes: Any, rows: Rows, eps: float) -> Any:
    """(what all pieces have in common, the blocks of all arrays). dtypes: of the outputs."""
    *arrays, weight_offset = columns
    wide = _pieces.wide_dtype([*dtypes, *(a.dtype for a in reads if a is not None)])
    cut = _pieces.Cut(operation, rows.axes, rows.n, rows.k, eps, weight_offset, tuple(dtypes), wide)
    return cut, graph.Blocks(reads[0], [*reads, *arrays])


def _hold_whole_rows(x: Any, rows: Rows) -> bool:
    return all(x.numblocks[i] == 1 for i in rows.axes)


def _add_sums(blocks: graph.Blocks, cut: _pieces.Cut, rows: Rows) -> None:
    """Add the sums of all stages, and where elements are among the first k, to what tasks take."""
    blocks.arrays.append(None if rows.k == rows.n else graph.inside(blocks.x, rows))
    for stage in range(len(cut.operation.stages)):
        found = blocks.mapped(partial(tasks.sums, cut), rows.axes, _pieces.width(cut.operation, stage))
        blocks.sums.append(graph.added(found, rows.axes))
