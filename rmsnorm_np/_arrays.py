"""Check one array of a call: what it is, its dtype, and whether a result can be written to it.

The functions that take a dtype, and not an array, serve arrays on any device.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy import ndarray

from rmsnorm_np._exchange import as_ndarray
from rmsnorm_np._overlap import folds

if TYPE_CHECKING:
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]
    Shape: TypeAlias = tuple[int, ...]

# bfloat16 joins when the first such array arrives: this package does not import ml_dtypes by itself.
native_dtypes = {np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)}


def native_dtype(name: str, dtype: np.dtype[Any], complex_too: bool = False) -> np.dtype[Any]:
    """The dtype to compute with: integers become float64 as in NumPy, the four float types are kept."""
    if dtype in native_dtypes:
        return dtype
    if dtype.kind in "biu":
        return np.dtype(np.float64)
    if dtype.kind in "fc":
        native: np.dtype[Any] = dtype.newbyteorder("=")
        if native in native_dtypes or (complex_too and native in (np.complex64, np.complex128)):
            return native
    if dtype.name == "bfloat16":
        native_dtypes.add(dtype)
        return dtype
    raise TypeError(f"{name} has dtype {dtype}, expected float16, bfloat16, float32 or float64")


def result_dtype(dtype: Any) -> np.dtype[Any] | None:
    """The dtype that a caller asks the result to have: one of the four, by its name, its type or as a numpy.dtype."""
    if dtype is None:
        return None
    wanted = dtype
    if isinstance(dtype, str) and dtype == "bfloat16":
        import ml_dtypes

        wanted = ml_dtypes.bfloat16
    if isinstance(wanted, (str, type, np.dtype)):
        with contextlib.suppress(TypeError):
            wanted = np.dtype(wanted)
            if wanted.isnative and wanted.kind not in "biu":
                return native_dtype("dtype", wanted)
    raise TypeError(f"dtype is {dtype!r}, expected float16, bfloat16, float32 or float64")


def check_given(name: str, value: Any) -> None:
    """Raise a TypeError for None."""
    if value is None:
        raise TypeError(f"{name} is None, expected an array")


def as_array(name: str, value: Any) -> Array:
    """The value as a plain ndarray of any layout and dtype, on the host."""
    if type(value) is ndarray:
        return value
    if isinstance(value, ndarray):
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name} is a masked array, expected one without a mask, such as {name}.filled(0.0)")
        if isinstance(value, np.matrix):
            raise TypeError(f"{name} is a numpy.matrix, expected an ndarray, such as {name}.A")
        return value.view(ndarray)
    check_given(name, value)
    return as_ndarray(name, value)


def contiguous(a: Array, dtype: np.dtype[Any]) -> Array:
    """The array itself where it is C-contiguous, aligned and of this dtype, a copy where it is not."""
    flags = a.flags
    return a if flags.c_contiguous and flags.aligned and a.dtype == dtype else np.array(a, dtype, order="C")


def check_out(name: str, out: Any, shape: Shape, dtype: np.dtype[Any], like: str = "x") -> Array:
    """Give out as a plain ndarray that takes a result of this shape and dtype. Its byte order and layout are free.

    like: the name of the argument that has this shape.
    """
    if not isinstance(out, ndarray):
        raise TypeError(f"{name} is of type {type(out).__name__}, expected a numpy.ndarray")
    plain = as_array(name, out)
    if plain.shape != shape:
        raise ValueError(f"{name} has shape {plain.shape}, expected {like}.shape {shape}")
    if plain.dtype != dtype and plain.dtype.newbyteorder("=") != dtype:
        raise TypeError(f"{name} has dtype {plain.dtype}, expected {dtype}, the dtype of the result")
    if not plain.flags.writeable:
        raise ValueError(f"{name} is read-only, expected a writable array")
    if folds(plain):
        raise ValueError(f"{name} has strides {plain.strides}, expected elements that share no memory")
    return plain


def outs_of(out: Any, results: tuple[str, ...]) -> tuple[Any, ...]:
    """An array or None for each of several results, out of a tuple of that length; None stands for a tuple of None."""
    if out is None:
        return (None,) * len(results)
    if not isinstance(out, tuple) or len(out) != len(results):
        given = f"a tuple of {len(out)}" if isinstance(out, tuple) else f"of type {type(out).__name__}"
        raise TypeError(f"out is {given}, expected None or a tuple of {len(results)}: {', '.join(results)}")
    return out
