"""Shapes and axes, of arrays on any device: which axes are normalised, and what fits x."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any, TypeAlias

from rmsnorm_np import _hints

Shape: TypeAlias = tuple[int, ...]


def axes_of(axis: Any, shape: Shape) -> Shape:
    """The normalised axes of x: not negative, in the order of x, at least one, with at least one element."""
    if not shape:
        raise ValueError("x has shape (), expected at least one axis to normalise over")
    axes = []
    for one in axis if isinstance(axis, tuple) else (axis,):
        index = _index(axis, one)
        if not -len(shape) <= index < len(shape):
            raise ValueError(f"axis is {axis!r}, expected {-len(shape)} to {len(shape) - 1} for x.shape {shape}")
        axes.append(index % len(shape))
    if not axes:
        raise ValueError("axis is (), expected at least one axis")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis is {axis!r}, expected each axis of x.shape {shape} at most once")
    if any(shape[i] == 0 for i in axes):
        raise ValueError(f"x has shape {shape}, expected at least one element along axis {axis!r}")
    return tuple(sorted(axes))


def _index(axis: Any, one: Any) -> int:
    if not isinstance(one, bool):
        with contextlib.suppress(TypeError):  # every array has an __index__, and most raise there
            return operator.index(one)
    raise TypeError(f"axis is {axis!r}, expected an int or a tuple of ints")


def are_trailing(axes: Shape, ndim: int) -> bool:
    """Whether the normalised axes are the last ones, so that each row is one stretch of memory."""
    return axes[0] == ndim - len(axes)


def parameter_lead(name: str, shape: Shape, x_shape: Shape, axes: Shape) -> Shape:
    """The part of a weight's or bias's shape before the normalised axes: () for one per element of a row, (heads,) for
    one per head, (batch, 1) for one per element of a batch. It broadcasts against x as NumPy's shapes do.
    """
    normalised = tuple(x_shape[i] for i in axes)
    lead = shape[: max(0, len(shape) - len(axes))]
    if are_trailing(axes, len(x_shape)):
        over = x_shape[: len(x_shape) - len(axes)]
        fits = len(lead) <= len(over) and all(
            length in (1, x_length) for length, x_length in zip(reversed(lead), reversed(over), strict=False)
        )
    else:
        fits = not lead
    if not fits or shape[len(lead) :] != normalised:
        raise ValueError(_hints.parameter_shape(name, shape, x_shape, axes))
    return lead


def check_same_shape(name: str, shape: Shape, x_name: str, x_shape: Shape, names: tuple[str, ...] = ()) -> None:
    """Demand exactly the shape of x. names: of x and of all arguments that must have its shape, for the message."""
    if shape != x_shape:
        raise ValueError(_hints.same_shape(name, shape, x_name, x_shape, names))


def engine_form(shape: Shape, axes: Shape) -> Shape | None:
    """The shape that a C-contiguous array has as one of rows whose elements lie apart, (outer, n, inner), or (rows, n)
    if they do not. None if the normalised axes do not stand together, or there is no element.
    """
    first, last = axes[0], axes[-1] + 1
    if last - first > len(axes) or 0 in shape:
        return None
    outer, n, inner = (math.prod(shape[i:j]) for i, j in ((0, first), (first, last), (last, len(shape))))
    return (outer, n, inner) if inner > 1 else (outer, n)
