"""Lines through a function's inputs: where :mod:`rmsnorm_np.gradcheck` measures, and the array helpers it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]
    Point: TypeAlias = tuple[Any, ...]  # the inputs: arrays, and None where none was given

# Elements whose scales differ by more than this factor are measured separately: the derivative of the larger ones
# would hide an error in the smaller ones.
_GROUP_SPREAD = 8.0
# An element this much smaller than the rest of its row is of a scale of its own.
_OUTLIER = 2.0**-20


@dataclass(frozen=True)
class Line:
    """phi(t) = <dy, function(x + t v)>, where x is the input at `position` and the other inputs stay."""

    function: Callable[..., Any]
    point: Point
    position: int
    v: Array
    dy: Array

    @property
    def x(self) -> Array:
        x: Array = self.point[self.position]
        return x

    def y(self, t: complex) -> Array:
        """The function's output at x + t v; x keeps its dtype for a real t, and is complex for a complex one."""
        # A step may leave the function's domain or the dtype's range. NaN and Inf are answers there, not warnings.
        with np.errstate(all="ignore"):
            moved = widened(self.x) + t * self.v
            moved = moved if isinstance(t, complex) else moved.astype(self.x.dtype)
            return call(self.function, (*self.point[: self.position], moved, *self.point[self.position + 1 :]))

    def terms(self, y: Array) -> Array:
        """The products whose sum is <dy, y>."""
        return widened(self.dy) * widened(y)

    def in_double(self) -> Line:
        return replace(self, point=tuple(widened(x) if is_float(x) else x for x in self.point))

    def at(self, x: Array) -> Line:
        return replace(self, point=(*self.point[: self.position], x, *self.point[self.position + 1 :]))


def directions_of(rng: np.random.Generator, x: Array, count: int) -> list[list[Array]]:
    """`count` random directions for each scale among the elements of x: a step of one changes x by about itself."""
    scales = _scales(widened(x))
    sizes = [np.where(group, scales, 0.0) for group in _groups(scales)]
    return [[random_signs(rng, x.shape) * size for _ in range(count)] for size in sizes]


def _scales(x: Array) -> Array:
    """What each element counts as a small or a large step: the mean magnitude of its row, column and so on.

    The smallest of these means, so that a row of large numbers does not set the scale of the rows beside it.
    """
    magnitude = np.abs(x)
    largest = magnitude.max()
    if largest == 0.0:
        return np.ones_like(magnitude)
    magnitude /= largest  # so that no sum overflows
    axes = [axis for axis in range(x.ndim) if x.shape[axis] > 1]
    means = [np.broadcast_to(magnitude.mean(axis=axis, keepdims=True), x.shape) for axis in axes]
    scales = np.min(means, axis=0) if means else magnitude
    scales = np.where((magnitude > 0.0) & (magnitude < _OUTLIER * scales), magnitude, scales)
    scales = np.where(scales > 0.0, scales, scales[scales > 0.0].min(initial=1.0))
    # A step in subnormal numbers would be no multiple of v.
    result: Array = np.maximum(scales * largest, np.finfo(x.dtype).tiny)
    return result


def _groups(scales: Array) -> list[Array]:
    """Masks of the elements whose scales are within a factor of `_GROUP_SPREAD`, from the largest scale down."""
    groups, rest = [], np.ones(scales.shape, bool)
    while rest.any():
        group = rest & (scales >= scales[rest].max() / _GROUP_SPREAD)
        groups.append(group)
        rest &= ~group
    return groups


def random_signs(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Random signs and sizes, none near zero: no element can hide, and no two cancel each other."""
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape)


def call(function: Callable[..., Any], point: Point) -> Array:
    """The output, with copies going in and a copy coming out: the function may reuse its buffers."""
    y = function(*copies(point))
    if isinstance(y, (tuple, list)):
        raise TypeError(
            f"function returned a {type(y).__name__} of {len(y)}, expected one array: check one output at a time, as "
            "in check_gradient(lambda *inputs: function(*inputs)[0], ...)"
        )
    return np.array(y)


def copies(point: Point) -> list[Array | None]:
    return [None if x is None else x.copy() for x in point]


def is_float(x: Array | None) -> bool:
    # ml_dtypes' bfloat16 is of NumPy's kind "void": only its name tells.
    return x is not None and (x.dtype.kind == "f" or "float" in x.dtype.name)


def widened(x: Array) -> Array:
    return x.astype(np.promote_types(x.dtype, np.float64))


def eps(x: Array) -> float:
    """Distance of 1 from the next number of x's dtype; `numpy.finfo` does not know bfloat16."""
    return float(np.spacing(np.ones((), x.dtype)))


def norm(terms: Array) -> float:
    """The 2-norm, of numbers whose squares may leave the range too."""
    largest = float(np.max(np.abs(terms), initial=0.0))
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm((terms / largest).ravel()))
