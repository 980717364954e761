"""Dask arrays made of others, block by block. All have as many axes as x, and its chunks, or length 1 along an axis."""

from __future__ import annotations

import operator
from functools import partial
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from rmsnorm_np.dask.arguments import Rows

    Axes = tuple[int, ...]


class Blocks:
    """What tasks take: the blocks of arrays (or None), and of sums, which have one more axis."""

    def __init__(self, x: Any, arrays: list[Any]) -> None:
        self.x, self.arrays, self.sums = x, arrays, list[Any]()

    def mapped(self, task: partial[Any], axes: Axes = (), sums: int = 0) -> Any:
        """task(arrays, sums) of all blocks at a place, for all places: an array whose blocks are what the task returns,
        tuples of arrays; or `sums` sums along these axes, which become one element for each block.

        task: a function of `tasks`, its first argument, `Cut`, given.
        """
        index, cut = tuple(range(self.x.ndim)), task.args[0]
        last = index[-1] + 1
        pairs = [(a, None if a is None else index) for a in self.arrays] + [(a, (*index, last)) for a in self.sums]
        dtype = cut.wide if sums else object
        shape = {"new_axes": {last: sums}, "adjust_chunks": dict.fromkeys(axes, 1)} if sums else {}
        return da.blockwise(
            partial(_called, task, len(self.arrays)),
            (*index, last) if sums else index,
            *(item for pair in pairs for item in pair),
            # what Dask's dashboard and its graphs call it
            token=f"{cut.operation.name}-{task.func.__name__}".replace(" ", "-"),
            concatenate=True,  # the one block along the axis of sums comes as an array, not as a list of one
            align_arrays=False,
            dtype=dtype,
            meta=np.empty((0,) * (len(index) + bool(sums)), dtype),
            **shape,
        )


def _called(task: Callable[..., Any], arrays: int, *blocks: Any) -> Any:
    return task(blocks[:arrays], blocks[arrays:])


def item(made: Any, j: int, dtype: Any, adjust_chunks: Any = None) -> Any:
    """The array whose blocks are items of the tuples that are the blocks of another."""
    index = tuple(range(made.ndim))
    return da.blockwise(
        operator.itemgetter(j), index, made, index, dtype=dtype, meta=np.empty((0,) * made.ndim, dtype),
        token=f"{made.name.rpartition('-')[0]}-{j}", align_arrays=False, adjust_chunks=adjust_chunks,
    )  # fmt: skip


def added(sums: Any, axes: Axes) -> Any:
    """The sums of all pieces of a row."""
    return _reduced(sums, axes, sums.dtype)


def largest(found: Any, axes: Axes) -> Any:
    """The largest number of all pieces of a row, NaN where there is one."""
    options = {"keepdims": True, "dtype": found.dtype, "concatenate": True}
    return da.reduction(found, _as_it_is, _largest, axes, **options)[..., 0]


def _largest(a: Any, axis: Any, keepdims: bool) -> Any:
    return np.max(a, axis=axis, keepdims=keepdims)


def total(made: Any, j: int, parameter: Any, axes: Axes) -> Any:
    """The gradient of a parameter: items as above, added up where its elements are shared, and rounded to its dtype."""
    shared = tuple(i for i, length in enumerate(parameter.shape) if length == 1 and i not in axes)
    sums = item(made, j, np.float64, dict.fromkeys(shared, 1))
    dtype = parameter.dtype
    return _reduced(sums, shared, dtype) if shared else sums.map_blocks(_rounded, dtype, dtype=dtype)


def _reduced(a: Any, axes: Axes, dtype: Any) -> Any:
    return da.reduction(
        a, _as_it_is, partial(_sum, dtype=dtype), axes, keepdims=True, combine=_sum, dtype=dtype, concatenate=True
    )


def _as_it_is(a: Any, axis: Any, keepdims: bool) -> Any:
    return a


@np.errstate(all="ignore")  # NaN and Inf follow the formulas in silence
def _sum(a: Any, axis: Any, keepdims: bool, dtype: Any = None) -> Any:
    found = np.sum(a, axis=axis, keepdims=keepdims)
    return found if dtype is None else _rounded(found, dtype)


@np.errstate(all="ignore")
def _rounded(a: Any, dtype: Any) -> Any:
    return a.astype(dtype, copy=False)


def inside(x: Any, rows: Rows) -> Any:
    """Where an element of a row is one of the first k."""
    place: Any = 0
    for axis in reversed(rows.axes):
        along = da.arange(x.shape[axis], chunks=(x.chunks[axis],))
        stride = 1 if isinstance(place, int) else place.size
        place = place + stride * along[tuple(slice(None) if i == axis else None for i in range(x.ndim))]
    return place < rows.k
