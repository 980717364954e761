"""The arguments of a call, as the kernels take them: contiguous rows. Nothing here copies between host and device."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from rmsnorm_np import _broadcast, _numbers, _shapes
from rmsnorm_np._gradient_out import gradient_out_by
from rmsnorm_np.cuda import arrays
from rmsnorm_np.cuda.arrays import Seen
from rmsnorm_np.cuda.copies import copy

NO_ORDER = "weight and bias broadcast along different axes, expected that on CUDA one has all axes of the other"


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
    axes = _shapes.axes_of(axis, shape)
    order = (*(i for i in range(len(shape)) if i not in axes), *axes)
    n = math.prod(shape[i] for i in axes)
    trailing, k = _shapes.are_trailing(axes, len(shape)), _numbers.elements_in_rms(n, p)
    return Geometry(axes, trailing, order, tuple(shape[i] for i in order), math.prod(shape) // n, n, k)


_remembered_geometry = lru_cache(maxsize=1024)(_geometry)


def engine_arguments(call: tuple[Any, ...], dtype: Any = None, _: int = 0) -> tuple[Any, ...]:
    """As `_arguments.engine_arguments`, for device arrays; all errors but that of the dtype are those of the host.

    The arrays of the result are `Seen`. For each result that there is, there is an array to write to. All is None if
    no order of the rows suits both weight and bias, whose gradients then need a call each.
    """
    names, given, (weight, bias, weight_offset), out, eps, p, axis = call
    reads = tuple(None if a is None else arrays.seen(name, a) for name, a in zip(names, given, strict=False))
    weights, biases = (None if a is None else arrays.seen(name, a) for name, a in (("weight", weight), ("bias", bias)))
    out_names = names[len(given) :]
    eight_bits = dtype if dtype is not None and dtype.itemsize == 1 else None  # of the first output
    targets = [
        None if a is None else arrays.seen(name, a, None if j else eight_bits)
        for j, (name, a) in enumerate(zip(out_names, out, strict=True))
    ]
    source: Any = reads[0]
    stream = arrays.stream_for((*reads, weights, biases, *targets))
    shape = source.shape
    plain = type(axis) is int and type(p) is float  # True is 1 to a cache
    axes, trailing, order, moved, rows, n, k = (_remembered_geometry if plain else _geometry)(shape, axis, p)
    eps = _numbers.check_eps(eps)
    weight_offset = _numbers.check_weight_offset(weight_offset, weight is not None)

    leads: Any = _leads(weights, biases, shape, axes)
    if any(leads):
        lead_order, lead = _order_for(leads, shape[: len(shape) - len(axes)])
        if lead is not None:
            if "dy" in names:
                return (None,) * 6
            weights, biases = (spread(a, (*lead, *shape[len(shape) - len(axes) :])) for a in (weights, biases))
            leads = lead, lead
        order = (*lead_order, *axes)
        moved, trailing = tuple(shape[i] for i in order), order == tuple(range(len(shape)))

    def rows_of(array: Seen, lead: int) -> Seen:
        return rows_in(array, (lead, n), stream)

    def permuted(array: Seen) -> Seen:
        return in_order(array, order)

    def read(name: str, array: Seen | None) -> Seen | None:
        if array is None:
            return None
        _shapes.check_same_shape(name, array.shape, names[0], shape, names)
        return rows_of(array if trailing else permuted(array), rows)

    read_rows = tuple(map(read, names, reads))
    weights, biases = (
        a if a is None else rows_of(a, math.prod(lead)) for a, lead in zip((weights, biases), leads, strict=True)
    )
    ready: list[Seen | None] = []
    answers: list[Any] = []  # what the caller gets
    copies: list[tuple[Seen, Seen]] = []  # what is copied there first
    for name, target, wanted, like in zip(out_names, targets, out, read_rows, strict=False):
        result, answer = None, wanted
        eight = eight_bits if not ready else None
        result_dtype = like and like.dtype
        if dtype is not None and not ready:
            result_dtype = dtype
        if target is not None and like is not None:
            _check_target(name, target, shape, result_dtype)
            if _is_direct(target, trailing, read_rows, (weights, biases)):
                result = rows_of(target, rows)
        if result is None and like is not None:
            made = arrays.empty(moved, result_dtype, stream)
            result = rows_of(arrays.seen("", made, eight), rows)
            if trailing and wanted is None:
                answer = made
            else:
                answer = arrays.empty(shape, result_dtype, stream) if wanted is None else wanted
                copies.append((arrays.seen("", made, eight), permuted(arrays.seen(name, answer, eight))))
        ready.append(result)
        answers.append(answer)
    given_targets = [target for target in targets if target is not None]
    if len(given_targets) > 1 and arrays.overlaps(*given_targets):
        raise ValueError(f"{out_names[0]} and {out_names[1]} share memory, expected two arrays apart")

    def restore(_: Any) -> Any:
        for source, target in copies:
            copy(source, target, arrays.capability_here(), stream)
        return answers

    return read_rows, (weights, biases, weight_offset), tuple(ready), k, eps, restore


def _leads(weights: Seen | None, biases: Seen | None, shape: tuple[int, ...], axes: tuple[int, ...]) -> Any:
    """The axes of weight and of bias before those of a row."""
    return tuple(
        None if a is None else _shapes.parameter_lead(name, a.shape, shape, axes)
        for name, a in (("weight", weights), ("bias", biases))
    )


def _order_for(leads: Any, over: tuple[int, ...]) -> Any:
    """(The order of the axes of the rows that suits weight and bias, what both have to be spread to first or None)."""
    order = _broadcast.rows_order(leads, over)
    if order is not None:
        return order, None
    lead = np.broadcast_shapes(*leads)
    return _broadcast.rows_order((lead, lead), over), lead


def order_of_rows(call: tuple[Any, ...]) -> tuple[int, ...]:
    """The axes of x beside those of a row, in the order in which `engine_arguments` has the rows of this call."""
    _, (x, _), (weight, bias, _), _, _, p, axis = call
    shape = arrays.seen("x", x).shape
    weights, biases = (None if a is None else arrays.seen(name, a) for name, a in (("weight", weight), ("bias", bias)))
    geometry = _geometry(shape, axis, p)
    leads, count = _leads(weights, biases, shape, geometry.axes), len(shape) - len(geometry.axes)
    order: tuple[int, ...] = _order_for(leads, shape[:count])[0] if any(leads) else geometry.order[:count]
    return order


def in_order(array: Seen, axes: tuple[int, ...]) -> Seen:
    """The array with these axes, in this order; others are of length 1."""
    shape, strides = (tuple(of_axes[i] for i in axes) for of_axes in (array.shape, array.strides))
    return array._replace(shape=shape, strides=strides)


def rows_in(array: Seen, shape: tuple[int, int], stream: int, anew: bool = False) -> Seen:
    """The array as contiguous rows of this shape, or a copy."""
    if anew or not arrays.is_contiguous(array):
        made = arrays.seen("", arrays.empty(array.shape, array.dtype, stream))
        copy(array, made, arrays.capability_here(), stream)
        array = made
    n, itemsize = shape[1], array.dtype.itemsize
    # not `_replace`, which takes four times as long
    return Seen(array.address, shape, (n * itemsize, itemsize), array.dtype, array.stream, False, array.owner)


def column(
    name: str, value: Any, parameter_name: str, parameter: Any, prepared: Seen | None, out: Any = ()
) -> Seen | None:
    """As `_arguments.column`, for device arrays."""
    if value is None:
        return None
    if prepared is None:
        raise ValueError(f"{name} is given, expected None without a {parameter_name}")
    array, like = arrays.seen(name, value), arrays.seen(parameter_name, parameter)
    _shapes.check_same_shape(name, array.shape, parameter_name, like.shape)
    if math.prod(array.shape) != math.prod(prepared.shape):  # the parameter has been spread
        raise ValueError(NO_ORDER)
    shared = any(target is not None and arrays.overlaps(array, target) for target in out)
    return rows_in(array, prepared.shape, arrays.stream_for((array,)), shared)  # type: ignore[arg-type]


def gradient_out(out: Any, weight: Any, bias: Any) -> Any:
    """As `_arguments.gradient_out`, for device arrays."""

    def check(name: str, a: Any, like_name: str, like: Any) -> Seen:
        target, parameter = arrays.seen(name, a), arrays.seen(like_name, like)
        _check_target(name, target, parameter.shape, parameter.dtype, like_name)
        return target

    def apart(name: str, a: Any, other_name: str, other: Any) -> None:
        if arrays.overlaps(arrays.seen(name, a), arrays.seen(other_name, other)):
            raise ValueError(f"{name} and {other_name} share memory, expected two arrays apart")

    def write(target: Seen, gradient: Any) -> None:
        source = arrays.seen("", gradient)
        copy(source, target, arrays.capability_here(), arrays.stream_for((source, target)))

    return gradient_out_by(out, weight, bias, check, apart, write)


def _check_target(name: str, target: Seen, shape: tuple[int, ...], dtype: Any, like: str = "x") -> None:
    if target.shape != shape:
        raise ValueError(f"{name} has shape {target.shape}, expected {like}.shape {shape}")
    if target.dtype != dtype:
        raise TypeError(f"{name} has dtype {target.dtype}, expected {dtype}, the dtype of the result")
    if target.read_only:
        raise ValueError(f"{name} is read-only, expected a writable array")


def _is_direct(target: Seen, trailing: bool, reads: tuple[Any, ...], parameters: tuple[Any, ...]) -> bool:
    """Whether kernels may write straight to it: it shares no memory, or is exactly one of the arrays that are read."""
    others = [a for a in reads if a is not None and (a.address, a.dtype) != (target.address, target.dtype)]
    others += [a for a in parameters if a is not None]
    return trailing and arrays.is_contiguous(target) and not any(arrays.overlaps(target, a) for a in others)


def spread(array: Any, shape: tuple[int, ...]) -> Seen:
    """The array as one of this shape, which it broadcasts to."""
    missing = len(shape) - len(array.shape)
    own = zip(array.shape, array.strides, shape[missing:], strict=True)
    strides = (0,) * missing + tuple(stride if length == wanted else 0 for length, stride, wanted in own)
    return array._replace(shape=shape, strides=strides)  # type: ignore[no-any-return]


def restore_parameter(gradient: Any, parameter: Any) -> Any:
    """The gradient of a weight or bias: the engine has made it in the shape of that parameter."""
    return gradient
