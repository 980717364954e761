"""What the functions of the reference share: the results' types, the wider type, the one rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rmsnorm_np import _arguments

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    GradientsOut = Array | tuple[Array | None, Array | None, Array | None]


class RMSNormGrads(NamedTuple):
    """Gradients of one RMSNorm call. A gradient is None where its parameter was not given."""

    dx: Array
    dweight: Array | None
    dbias: Array | None


class LayerNormGrads(NamedTuple):
    """Gradients of one LayerNorm call. A gradient is None where its parameter was not given."""

    dx: Array
    dweight: Array | None
    dbias: Array | None


class AddNorm(NamedTuple):
    """The norm y of h = x + residual, and h."""

    y: Array
    h: Array


class GatedNormGrads(NamedTuple):
    """Gradients of one gated norm. A gradient is None where its parameter was not given."""

    dx: Array
    dgate: Array
    dweight: Array | None
    dbias: Array | None


class Quantized(NamedTuple):
    """The norm in 8 bits: q · scale is y, rounded. h = x + residual, or None where no residual was given."""

    q: Array
    scale: Array
    h: Array | None


class DoubleGrads(NamedTuple):
    """Gradients of what a backward pass computes. dweight is None where no weight was given."""

    ddy: Array
    dx: Array
    dweight: Array | None


def added(x: Array, residual: Array) -> Array:
    """x + residual, rounded once to the residual's dtype: a sum of float32 is exact enough in float64 for that."""
    wide = np.result_type(np.result_type(x.dtype, np.float64), np.result_type(residual.dtype, np.float64))
    return rounded(x.astype(wide) + residual.astype(wide), residual.dtype)


def check_backend(backend: str | None) -> None:
    if backend not in (None, "reference"):
        raise ValueError(f"backend is {backend!r}, expected None or 'reference' from a function of the reference")


def widen(*arrays: Any, dtype: np.dtype[Any] | None = None) -> list[Any]:
    """The arrays in one type that is wider than each of them, and than dtype. None stays None."""
    dtypes = [a.dtype for a in arrays if a is not None]
    wide = np.result_type(*map(_wider, dtypes if dtype is None else [*dtypes, dtype]))
    return [None if a is None else a.astype(wide) for a in arrays]


def _wider(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype == np.float64:
        return np.dtype(np.longdouble)
    if dtype == np.complex128:
        return np.dtype(np.clongdouble)
    return np.result_type(dtype, np.float64)


def rounded(a: Array, dtype: np.dtype[Any]) -> Array:
    """The array in this dtype, or in the complex dtype that goes with it.

    bfloat16 comes from float64 by way of float32, in ml_dtypes: 0.50001 ULP at worst, where one rounding gives 0.5.
    """
    if np.iscomplexobj(a):
        return a.astype(np.result_type(dtype, np.complex64))
    if a.dtype == np.longdouble and dtype.itemsize == 2:
        a = a.astype(np.float64)  # NumPy rounds a longdouble to float32 on the way to float16
    return a.astype(dtype)


def through(a: Array, dtype: np.dtype[Any] | None) -> Array:
    """The array as it is after a stay in this dtype."""
    return a if dtype is None else rounded(a, dtype).astype(a.dtype)


def summed(terms: Array, shape: tuple[int, ...]) -> Array:
    """The sum over all rows that share an element of a parameter of this shape: (..., n) to (n,), (batch, 1, n) …"""
    total = np.sum(terms, axis=tuple(range(terms.ndim - len(shape))))
    shared = tuple(i for i, length in enumerate(shape) if length == 1)
    result: Array = np.sum(total, axis=shared, keepdims=True)
    return result


def like(parameter: Any, gradient: Array | None) -> Array | None:
    """The gradient of a weight or bias, rounded to the dtype and brought to the shape of that parameter."""
    if gradient is None:
        return None
    given = _arguments.as_array("parameter", parameter)
    dtype = _arguments.native_dtype("parameter", given.dtype, complex_too=True)
    return rounded(gradient, dtype).reshape(given.shape)
