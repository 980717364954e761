"""What the tasks of a graph run, on NumPy arrays. They are on a machine of their own as likely as not."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _backends, _pieces
from rmsnorm_np._threads import at_most, get_num_threads
from rmsnorm_np.ops.operation import Columns, shared
from rmsnorm_np.ops.quantized import FORMATS
from rmsnorm_np.reference.quantized import quantize, row_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rmsnorm_np._pieces import Cut
    from rmsnorm_np.dask.arguments import Rows

    Blocks = tuple[Any, ...]


def whole(cut: Cut, rows: Rows, arrays: Blocks, _: Blocks) -> tuple[Any, ...]:
    """The outputs of whole rows by the CPU engine, and what they add to the totals, as `_pieces.results` gives them."""
    operation = cut.operation
    columns, directions, call = _call(cut, rows, arrays)
    engine: Any = _backends.select(np.empty(0), None)
    with at_most(_own_threads()):
        if operation.keep is not None:
            return tuple(_backends.forward(engine, operation, call, cut.dtypes[0]))
        if operation.share is None:
            return tuple(_backends.run(engine, operation, call, directions, cut.dtypes[0])[0])
        engine, read, prepared, out, k, eps, restore = _backends.prepared(engine, call, directions, None, rows.apart)
        totals = tuple(None if a is None else np.zeros(a.shape) for a in shared(operation, prepared))
        found, _ = engine.backward(operation, read, prepared, out, k, eps, totals=totals)
        found = found if restore is None else restore(found)
    pairs = zip(totals, shared(operation, columns), strict=True)
    return *found, *(None if total is None else total.reshape(a.shape) for total, a in pairs)


def whole_quantized(cut: Cut, rows: Rows, dtype: Any, bound: float, arrays: Blocks, _: Blocks) -> tuple[Any, ...]:
    """q, h and the scales of whole rows by the CPU engine."""
    *arrays_of_norm, scale = arrays
    _, _, call = _call(cut, rows, arrays_of_norm)
    engine: Any = _backends.select(np.empty(0), None)
    with at_most(_own_threads()):
        q, scales, h = engine.quantized(call, dtype, scale, bound)
    return q, h, scales


def _call(cut: Cut, rows: Rows, arrays: Sequence[Any]) -> tuple[Any, Any, tuple[Any, ...]]:
    """(the columns, directions or None, the call as in `_arguments.Call`) of blocks: the reads, then the columns."""
    count = len(cut.operation.Reads._fields)
    reads, columns = arrays[:count], arrays[count:]
    shaped = [None if a is None else a.reshape(rows.parameter_shape(a.shape)) for a in columns]
    directions = None
    if cut.operation.Columns is not Columns:
        directions = tuple(zip(cut.operation.Columns._fields[1:-1], shaped[1:], strict=True))
    # beside directions, of a bias the shape alone counts, and its direction has that
    parameters = shaped[0], shaped[-1], cut.weight_offset
    out = (None,) * len(cut.dtypes)
    return columns, directions, (rows.names, tuple(reads), parameters, out, cut.eps, cut.k / cut.n, cut.axes)


def sums(cut: Cut, arrays: Blocks, found: Blocks) -> Any:
    """What a piece of the rows adds to their sums."""
    return _pieces.sums(cut, _piece(cut, arrays), list(found))


def results(cut: Cut, arrays: Blocks, found: Blocks) -> tuple[Any, ...]:
    """The outputs of a piece, and what it adds to the totals."""
    return _pieces.results(cut, _piece(cut, arrays), list(found))


def largest(cut: Cut, arrays: Blocks, found: Blocks) -> Any:
    """The largest magnitude of y in each row of a piece."""
    y, _ = _unrounded(cut, arrays, found)
    return np.max(np.abs(y), axis=cut.axes, keepdims=True, initial=0.0)[..., None]


@np.errstate(all="ignore")
def own_scale(magnitude: Any, bound: float, q_dtype: Any, dtype: Any) -> Any:
    """The scales, of this dtype, of rows whose y are at most so large."""
    return row_scale(magnitude, bound, FORMATS[q_dtype.name].largest, dtype)


@np.errstate(all="ignore")
def quantized(cut: Cut, dtype: Any, arrays: Blocks, found: Blocks) -> tuple[Any, ...]:
    """q and h of a piece. The last array is the scale."""
    *arrays_of_norm, scale = arrays
    y, h = _unrounded(cut, tuple(arrays_of_norm), found)
    return quantize(y, scale, FORMATS[dtype.name]).astype(dtype), h


def _unrounded(cut: Cut, arrays: Blocks, found: Blocks) -> tuple[Any, ...]:
    """y in the type that it is computed in, and h."""
    return results(cut._replace(dtypes=(np.dtype(cut.wide), *cut.dtypes[1:])), arrays, found)


def _piece(cut: Cut, arrays: Blocks) -> Any:
    count = len(cut.operation.Reads._fields)
    return _pieces.Piece(arrays[:count], arrays[count:-1], arrays[-1])


def _own_threads() -> int:
    """The threads of this task: those of the process, over the tasks that it runs at a time."""
    distributed = sys.modules.get("distributed")
    if distributed is not None:
        try:
            at_once: int = distributed.get_worker().state.nthreads
        except ValueError:  # not a task of a worker's
            distributed = None
    if distributed is None:
        import dask

        alone = threading.current_thread() is threading.main_thread() and multiprocessing.parent_process() is None
        at_once = 1 if alone else dask.config.get("num_workers", None) or dask.system.CPU_COUNT
    return max(1, get_num_threads() // at_once)
