"""Checks of what brings a row into 8 bits: the format, and the scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rmsnorm_np._arguments import as_array, native_dtype
from rmsnorm_np._shapes import axes_of
from rmsnorm_np.ops.quantized import FORMATS, quantized_rms_norm

if TYPE_CHECKING:
    import numpy.typing as npt

    from rmsnorm_np.ops.operation import Operation

    Array: TypeAlias = npt.NDArray[Any]
    Shape: TypeAlias = tuple[int, ...]


def quantized_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of q: one of `FORMATS`, given by its name or as a dtype."""
    name = dtype
    if not isinstance(dtype, str) and dtype is not None:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = None
    if name not in FORMATS:
        raise TypeError(f"dtype is {dtype!r}, expected 'int8', 'float8_e4m3fn' or 'float8_e5m2'")
    if name != "int8":
        import ml_dtypes  # noqa: F401 (which tells NumPy the name)
    found: np.dtype[Any] = np.dtype(name)
    return found


def scale_dtype(x_dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float32, and float64 where x is float64."""
    return np.dtype(np.float64 if x_dtype == np.float64 else np.float32)


def operation(dtype: np.dtype[Any], given: bool, x_dtype: np.dtype[Any]) -> Operation:
    """What makes q of this dtype from x; given: whether the scale is."""
    return quantized_rms_norm(dtype.name, given, scale_dtype(x_dtype) == np.float32)


def scale_shape(shape: Shape, axis: Any) -> Shape:
    """The shape of x with the normalised axes of length 1: one scale per row."""
    axes = axes_of(axis, shape)
    return tuple(1 if i in axes else length for i, length in enumerate(shape))


def check_scale(scale: Any, shape: Shape, dtype: np.dtype[Any]) -> Array | None:
    """A given scale, rounded to its dtype, in its own shape, which broadcasts to `shape`. None stays None."""
    if scale is None:
        return None
    a = as_array("scale", scale)
    native_dtype("scale", a.dtype)
    check_scale_shape(a.shape, shape)
    return check_scale_values(a, dtype)


def check_scale_values(a: Array, dtype: np.dtype[Any]) -> Array:
    """Scales, rounded to their dtype."""
    with np.errstate(all="ignore"):
        a = a.astype(dtype)
    wrong = a[~((a > 0.0) & (a < math.inf))]
    if wrong.size:
        raise ValueError(f"scale has the value {wrong[0]} in {dtype}, expected finite numbers > 0")
    return a


def check_scale_shape(shape: Shape, to: Shape) -> None:
    """Demand one that broadcasts to that of one number per row."""
    if not _broadcasts(shape, to):
        raise ValueError(f"scale has shape {shape}, expected one that broadcasts to {to}, one number per row")


def _broadcasts(shape: Shape, to: Shape) -> bool:
    fits = (own in (1, length) for own, length in zip(reversed(shape), reversed(to), strict=False))
    return len(shape) <= len(to) and all(fits)
