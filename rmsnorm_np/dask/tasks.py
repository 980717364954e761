"""What the tasks of a graph run, on NumPy arrays. They are on a machine of their own as likely as not."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _backends, _broadcast, _pieces
from rmsnorm_np._threads import at_most, get_num_threads

if TYPE_CHECKING:
    from rmsnorm_np._pieces import Cut
    from rmsnorm_np.dask.arguments import Rows

    Blocks = tuple[Any, ...]


def whole(cut: Cut, rows: Rows, arrays: Blocks, _: Blocks) -> tuple[Any, ...]:
    """The outputs of whole rows by the CPU engine, and what they add to the totals, as `_pieces.results` gives them."""
    *reads, weight, bias = arrays
    parameters = [None if a is None else a.reshape(rows.parameter_shape(a.shape)) for a in (weight, bias)]
    call = (
        rows.names, tuple(reads), (*parameters, cut.weight_offset), (None,) * len(cut.dtypes), cut.eps, cut.k / cut.n,
        cut.axes,
    )  # fmt: skip
    operation = cut.operation
    engine: Any = _backends.select(np.empty(0), None)
    with at_most(_own_threads()):
        if operation.keep is not None:
            return tuple(_backends.forward(engine, operation, call, cut.dtypes[0]))
        if operation.share is None:
            return tuple(_backends.run(engine, operation, call, dtype=cut.dtypes[0])[0])
        read, columns, out, k, eps, restore = engine.arguments.engine_arguments(call, None, rows.apart)
        if type(columns) is not tuple:
            engine, columns = _broadcast.InParts(engine, columns.cut), columns[:3]
        totals = tuple(None if a is None else np.zeros(a.shape) for a in columns[:2])
        found, _ = engine.backward(operation, read, columns, out, k, eps, totals=totals)
        found = found if restore is None else restore(found)
    pairs = zip(totals, (weight, bias), strict=True)
    return *found, *(None if total is None else total.reshape(a.shape) for total, a in pairs)


def sums(cut: Cut, arrays: Blocks, found: Blocks) -> Any:
    """What a piece of the rows adds to their sums."""
    return _pieces.sums(cut, _piece(arrays), list(found))


def results(cut: Cut, arrays: Blocks, found: Blocks) -> tuple[Any, ...]:
    """The outputs of a piece, and what it adds to the totals."""
    return _pieces.results(cut, _piece(arrays), list(found))


def _piece(arrays: Blocks) -> Any:
    *reads, weight, bias, inside = arrays
    return _pieces.Piece(tuple(reads), weight, bias, inside)


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
