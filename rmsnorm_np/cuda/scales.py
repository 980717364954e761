"""The scales of a call whose rows have them: what is given, as the kernels read it, and where they write it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _formats
from rmsnorm_np.cuda import arguments, arrays
from rmsnorm_np.cuda.copies import copy
from rmsnorm_np.cuda.elements import RowScales

if TYPE_CHECKING:
    from rmsnorm_np.cuda.arrays import Seen


def scales_of(
    call: tuple[Any, ...], used: tuple[Seen | None, ...], targets: Any, scale: Any, bound: float
) -> tuple[RowScales, Callable[[], Any]]:
    """(the scales of the rows, finish): finish(), once all is launched, gives them as the caller gets them, one for
    each row.

    used, targets: arrays of the call, as prepared; x is the first. Other arguments as of `cuda.quantized`.
    """
    x = arrays.seen("x", call[1][0])
    per_row, dtype = _formats.scale_shape(x.shape, call[-1]), _formats.scale_dtype(x.dtype)
    given: Seen | None = None
    number: Any = bound
    if scale is not None:
        given = _given(scale, per_row)
        if given is None:
            number = _formats.check_scale(scale, per_row, dtype)
            number = number.item()
    stream = arrays.stream_for((*used, *targets, given))
    order = arguments.order_of_rows(call)
    if given is not None:
        rows = arguments.in_order(arguments.spread(given, per_row), order)
        if any(target is not None and arrays.overlaps(given, target) for target in targets):
            made = arrays.seen("", arrays.empty(rows.shape, rows.dtype, stream))
            copy(rows, made, arrays.capability_here(), stream)
            rows = made
        given = arguments.rows_in(rows, (math.prod(per_row), 1), stream)
    answer = arrays.empty(per_row, dtype, stream)
    ordered = arguments.in_order(arrays.seen("", answer), order)
    found = ordered
    if order != tuple(sorted(order)):
        found = arrays.seen("", arrays.empty(ordered.shape, dtype, stream))

    def finish() -> Any:
        if found is not ordered:
            copy(found, ordered, arrays.capability_here(), stream)
        return answer

    return RowScales(number, given, found), finish


def _given(scale: Any, per_row: tuple[int, ...]) -> Seen | None:
    """A device array of scales; None for a number."""
    if not hasattr(scale, "__cuda_array_interface__") and np.ndim(scale) == 0:
        return None
    given = arrays.seen("scale", scale)
    _formats.check_scale_shape(given.shape, per_row)
    return given
