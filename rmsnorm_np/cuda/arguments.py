"""The arguments of a call, as the kernels take them: contiguous rows. Nothing here copies between host and device."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from rmsnorm_np import _arguments
from rmsnorm_np.cuda import arrays
from rmsnorm_np.cuda.arrays import Seen
from rmsnorm_np.cuda.copies import copy


class Geometry(NamedTuple):
    """Rows in an array of some shape."""

    axes: tuple[int, ...]
    trailing: bool
    order: tuple[int, ...]  # the axes that are not normalised over, then those that are
    moved: tuple[int, ...]  # the shape in that order
    rows: int
    n: int
    k: int


def _geometry(shape: tuple[int, ...], axis: Any, p: Any) -> Geometry:
    axes = _arguments.axes_of(axis, shape)
    order = (*(i for i in range(len(shape)) if i not in axes), *axes)
    n = math.prod(shape[i] for i in axes)
    trailing, k = _arguments.are_trailing(axes, len(shape)), _arguments.elements_in_rms(n, p)
    return Geometry(axes, trailing, order, tuple(shape[i] for i in order), math.prod(shape) // n, n, k)


_remembered_geometry = lru_cache(maxsize=1024)(_geometry)


def engine_arguments(
    x: Any, dy: Any, weight: Any, bias: Any, eps: Any, p: Any, axis: Any, weight_offset: Any, out: Any
) -> tuple[Any, ...]:
    """As `_arguments.engine_arguments`, for device arrays; all errors but that of the dtype are those of the host.

    The arrays of the result are `Seen`, and there is always one to write to.
    """
    source = arrays.seen("x", x)
    gradient, weights, biases, target = (
        None if array is None else arrays.seen(name, array)
        for name, array in (("dy", dy), ("weight", weight), ("bias", bias), ("out", out))
    )
    stream = arrays.stream_for((source, gradient, weights, biases, target))
    shape, dtype = source.shape, source.dtype
    plain = type(axis) is int and type(p) is float  # True is 1 to a cache
    axes, trailing, order, moved, rows, n, k = (_remembered_geometry if plain else _geometry)(shape, axis, p)
    eps = _arguments.check_eps(eps)
    weight_offset = _arguments.check_weight_offset(weight_offset, weight is not None)

    def rows_of(array: Seen, lead: int) -> Seen:
        if not arrays.is_contiguous(array):
            made = arrays.seen("", arrays.empty(array.shape, array.dtype, stream))
            copy(array, made, arrays.capability_here(), stream)
            array = made
        itemsize = array.dtype.itemsize
        # not `_replace`, which takes four times as long
        return Seen(array.address, (lead, n), (n * itemsize, itemsize), array.dtype, array.stream, False, array.owner)

    def permuted(array: Seen) -> Seen:
        return array._replace(shape=moved, strides=tuple(array.strides[i] for i in order))

    def parameter_of(name: str, array: Seen | None) -> Seen | None:
        if array is None:
            return None
        return rows_of(array, math.prod(_arguments.parameter_lead(name, array.shape, shape, axes)))

    x_rows = rows_of(source if trailing else permuted(source), rows)
    if gradient is not None:
        _arguments.check_dy_shape(gradient.shape, shape)
        gradient = rows_of(gradient if trailing else permuted(gradient), rows)
    weights, biases = parameter_of("weight", weights), parameter_of("bias", biases)

    if target is not None:
        if target.shape != shape:
            raise ValueError(f"out has shape {target.shape}, expected x.shape {shape}")
        if target.dtype != dtype:
            raise TypeError(f"out has dtype {target.dtype}, expected {dtype}, the dtype of the result")
        if target.read_only:
            raise ValueError("out is read-only, expected a writable array")
        others = [
            a for a in (x_rows, gradient) if a is not None and not (a.address == target.address and a.dtype == dtype)
        ]
        others += [a for a in (weights, biases) if a is not None]
        if trailing and arrays.is_contiguous(target) and not any(arrays.overlaps(target, a) for a in others):
            return x_rows, gradient, weights, biases, k, eps, weight_offset, rows_of(target, rows), lambda _: out

    made = arrays.empty(moved, dtype, stream)
    result = arrays.seen("", made)

    def restore(_: Any) -> Any:
        if out is None and trailing:
            return made
        answer = out if out is not None else arrays.empty(shape, dtype, stream)
        copy(result, permuted(arrays.seen("out", answer)), arrays.capability_here(), stream)
        return answer

    return x_rows, gradient, weights, biases, k, eps, weight_offset, rows_of(result, rows), restore


def restore_parameter(gradient: Any, parameter: Any) -> Any:
    """The gradient of a weight or bias: the engine has made it in the shape of that parameter."""
    return gradient
