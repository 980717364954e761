"""A call in 8 bits: the scales of its rows, and where q is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _arguments, _formats, _shapes
from rmsnorm_np._broadcast import in_parts
from rmsnorm_np._overlap import check_apart
from rmsnorm_np.cpu import family

if TYPE_CHECKING:
    from collections.abc import Sequence


def quantized(
    call: tuple[Any, ...], dtype: Any, scale: Any, bound: float, engine: Any = family
) -> tuple[Any, Any, Any]:
    """(q of this dtype, the scales of the rows, h) of a call as in `_arguments.Call`, whose first output is for q.

    engine: what has `new_result` and `quantize`.
    """
    names, arrays, given_columns, (out, h_out), *numbers = call
    axis, shape = call[-1], np.shape(arrays[0])
    of_norm = names, arrays, given_columns, (None, h_out), *numbers
    reads, columns, (_, h), k, eps, restore = _arguments.engine_arguments(of_norm, None, 0)
    x, per_row, scale_dtype = reads[0], _formats.scale_shape(shape, axis), _formats.scale_dtype(reads[0].dtype)
    given = _formats.check_scale(scale, per_row, scale_dtype)
    wanted = None if out is None else _arguments.check_out("out", out, shape, dtype)
    check_apart("out", wanted, "residual_out", h_out)
    direct = wanted is not None and _is_direct(wanted, axis, (*arrays, *given_columns[:2], scale, h_out))
    q = wanted.reshape(x.shape) if wanted is not None and direct else engine.new_result(x, dtype)
    scales = np.empty(len(x)) if given is None else np.ravel(np.broadcast_to(given, per_row)).astype(np.float64)
    operation = _formats.operation(dtype, given is not None, x.dtype)
    if type(columns) is not tuple:
        engine, columns = in_parts(engine, columns)
    results = engine.quantize(operation, reads, columns, (q, h), k, (eps, scales, bound))
    q, h = results if restore is None else restore(results)
    if wanted is not None and not direct:
        np.copyto(wanted, q)
    return q if out is None else out, scales.astype(scale_dtype).reshape(per_row), h


def _is_direct(out: Any, axis: Any, others: Sequence[Any]) -> bool:
    """Whether rows may be written straight to out: they lie there in order, and nothing else does."""
    axes = _shapes.axes_of(axis, out.shape)
    trailing = axes == tuple(range(out.ndim - len(axes), out.ndim))
    return trailing and out.flags.c_contiguous and not any(np.may_share_memory(out, a) for a in others if a is not None)
