"""The arguments of a call with a Dask array, checked without computing anything, and chunked as x is."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

from rmsnorm_np import _arguments, _formats, _numbers, _shapes


class Rows(NamedTuple):
    """Rows in an array of some shape, in the place of an engine's k. names: of the arguments; axes: the normalised
    ones; n: elements of a row, k of them in the RMS; apart: up to which n the CPU engine may take elements that lie
    apart.
    """

    names: tuple[str, ...]
    axes: tuple[int, ...]
    n: int
    k: int
    apart: int

    def parameter_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a parameter with as many axes as x, as `rms_norm` takes it."""
        return shape if _shapes.are_trailing(self.axes, len(shape)) else tuple(shape[i] for i in self.axes)


def engine_arguments(
    call: tuple[Any, ...], dtype: Any = None, apart: int = _arguments.LONGEST_APART
) -> tuple[Any, ...]:
    """As `_arguments.engine_arguments`: reads of x's shape and chunks, parameters with as many axes, `Rows` for k."""
    names, given, (weight, bias, weight_offset), out, eps, p, axis = call
    x = _checked(names[0], given[0])
    axes = _shapes.axes_of(axis, x.shape)
    n = math.prod(x.shape[i] for i in axes)
    rows = Rows(names, axes, n, _numbers.elements_in_rms(n, p), apart)
    eps, weight_offset = _numbers.check_eps(eps), _numbers.check_weight_offset(weight_offset, weight is not None)
    for name, a in zip(names[len(given) :], out, strict=True):
        _check_no_out(name, a, names[0])

    def read(name: str, value: Any) -> Any:
        if value is None:
            return None
        a = _checked(name, value)
        _shapes.check_same_shape(name, a.shape, names[0], x.shape, names)
        return _chunked(name, a, x)

    def parameter_of(name: str, value: Any) -> Any:
        if value is None:
            return None
        a = _checked(name, value)
        _shapes.parameter_lead(name, a.shape, x.shape, axes)
        if _shapes.are_trailing(axes, x.ndim):
            shape = (1,) * (x.ndim - a.ndim) + a.shape
        else:
            shape = tuple(length if i in axes else 1 for i, length in enumerate(x.shape))
        return _chunked(name, a.reshape(shape), x)

    reads = (_chunked(names[0], x, x), *map(read, names[1:], given[1:]))
    parameters = parameter_of("weight", weight), parameter_of("bias", bias), weight_offset
    return reads, parameters, (None,) * len(out), rows, eps, None


def gradient_out(out: Any, weight: Any, bias: Any) -> Any:
    """Of a tuple to write gradients to: there is none."""
    _check_no_out("out", out, "x")


def column(name: str, value: Any, parameter_name: str, parameter: Any, prepared: Any, out: Any) -> Any:
    """As `_arguments.column`: what goes along with a parameter, of its shape; with axes and chunks as `prepared`."""
    if value is None:
        return None
    if prepared is None:
        raise ValueError(f"{name} is given, expected None without a {parameter_name}")
    a = _checked(name, value)
    _shapes.check_same_shape(name, a.shape, parameter_name, np.shape(parameter))
    return _chunked(name, a.reshape(prepared.shape), prepared)


def scale_of(scale: Any, x: Any, rows: Rows, dtype: Any) -> Any:
    """A scale for each row, of this dtype, with the axes and chunks of x; None stays None.

    The values of a Dask array are checked once they are there.
    """
    if scale is None:
        return None
    shape = _formats.scale_shape(x.shape, rows.axes)
    a = _checked("scale", scale)
    if isinstance(a, da.Array):
        _formats.check_scale_shape(a.shape, shape)
        _arguments.native_dtype("scale", a.dtype)
        check = partial(_formats.check_scale_values, dtype=dtype)
        a = a.map_blocks(check, dtype=dtype, meta=np.empty((0,) * a.ndim, dtype))
    else:
        a = _formats.check_scale(a, shape, dtype)
    return _chunked("scale", da.broadcast_to(a, shape), x)


def restore_parameter(gradient: Any, parameter: Any) -> Any:
    """The gradient of a weight or bias in the shape of that parameter."""
    return None if gradient is None else gradient.reshape(np.shape(parameter))


def _checked(name: str, value: Any) -> Any:
    """A Dask array of NumPy arrays and of a known shape; or an array."""
    if not hasattr(value, "__dask_graph__"):
        return _arguments.as_array(name, value)
    if not isinstance(value, da.Array):
        raise TypeError(f"{name} is of type {type(value).__name__}, expected a dask array")
    if type(value._meta) is not np.ndarray:
        raise TypeError(f"{name} is a dask array of {type(value._meta).__name__}, expected one of numpy.ndarray")
    if any(math.isnan(length) for length in value.shape):
        raise ValueError(f"{name} has chunks of unknown size, expected known ones: {name}.compute_chunk_sizes()")
    return value


def _chunked(name: str, a: Any, x: Any) -> Any:
    """The array with the chunks of x, in one of the dtypes that engines compute with."""
    dtype = _arguments.native_dtype(name, a.dtype)
    chunks = tuple((1,) if length == 1 else x.chunks[i] for i, length in enumerate(a.shape))
    a = a.rechunk(chunks) if isinstance(a, da.Array) else da.from_array(a, chunks)
    return a.astype(dtype)


def _check_no_out(name: str, out: Any, x_name: str) -> None:
    if out is not None:
        raise TypeError(f"{name} is given, expected None where {x_name} is a dask array: its results are new arrays")
