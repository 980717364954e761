"""The error of a result in units in the last place (ULP): how to say "as exact as its dtype allows" in a test.

An ULP is the distance between neighbouring numbers of a dtype, so it depends on the magnitude: 2⁻²³ for float32 numbers
from 1 to 2, 2⁻²² from 2 to 4. The exact result, rounded once, is off by at most 0.5 ULP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


def ulp_error(
    got: npt.ArrayLike,
    exact: npt.ArrayLike,
    *,
    scale: npt.ArrayLike = 0.0,
    forgiven: npt.ArrayLike = 0.0,
) -> float:
    """The largest error of any element, in ULP of the dtype of `got`.

    Parameters
    ----------
    got : array_like of floats
        The result to judge: float16, bfloat16 (of ml_dtypes), float32 or float64, of any shape.
    exact : array_like of real numbers, shape of got
        What it should be, in a wider dtype than got's: float64, or `numpy.longdouble` where got is float64.
    scale : array_like, default 0
        Count in ULP of this magnitude where it is larger than ``abs(exact)``. For a sum whose terms cancel: the
        largest term. Of got's shape, or one that broadcasts to it.
    forgiven : array_like, default 0
        An absolute error of each element that does not count, such as the error of `exact` itself. Of got's shape, or
        one that broadcasts to it.

    Returns
    -------
    float
        The largest of ``(abs(got - exact) - forgiven) / ulp(max(abs(exact), scale))``, and not below 0; 0.0 for arrays
        without elements. NaN counts as 0 where both are NaN and as infinite where one is. An infinity in got is right
        where exact is infinite or rounds to it, and infinitely wrong elsewhere.

    Raises
    ------
    TypeError
        If got is not of floats, or exact not of real numbers.
    ValueError
        If exact has another shape than got, or scale or forgiven do not broadcast to that shape.

    Notes
    -----
    ``ulp(a)`` is the distance from the largest number of got's dtype that is a power of two and at most a, to the next
    number; for subnormal a, and zero, it is the smallest subnormal number.

    Examples
    --------
    >>> import numpy as np
    >>> import rmsnorm_np as rn
    >>> from rmsnorm_np import reference
    >>> from rmsnorm_np.ulp import ulp_error
    >>> ulp_error(np.float32([1.0, 2.0]), [1.0 + 2**-24, 2.0])
    0.5

    A float32 norm, compared with the reference on the same numbers as float64:

    >>> x = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    >>> naive = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6))
    >>> exact = reference.rms_norm(x.astype(np.float64))
    >>> ulp_error(naive, exact) > 0.51
    True
    >>> ulp_error(rn.rms_norm(x, backend="reference"), exact) <= 0.51
    True
    """
    got, exact = np.asarray(got), np.asarray(exact)
    # ml_dtypes' floats are of NumPy's kind "void": only their name tells.
    if not (got.dtype.kind == "f" or "float" in got.dtype.name):
        raise TypeError(f"got is {got.dtype}, expected floats")
    if not (exact.dtype.kind in "fiub" or "float" in exact.dtype.name):
        raise TypeError(f"exact is {exact.dtype}, expected real numbers")
    if exact.shape != got.shape:
        raise ValueError(f"exact has shape {exact.shape}, expected that of got, {got.shape}")
    wide = np.promote_types(np.float64, exact.dtype if exact.dtype.kind == "f" else np.float64)
    eps, smallest = (float(np.spacing(number)) for number in np.array([1, 0], got.dtype))
    largest = _largest(got.dtype)
    exact = exact.astype(wide)
    scale, forgiven = (_broadcast(name, a, got.shape, wide) for name, a in (("scale", scale), ("forgiven", forgiven)))

    with np.errstate(all="ignore"):
        _, exponent = np.frexp(np.clip(np.maximum(np.abs(exact), scale), smallest, largest))
        unit = np.maximum(np.ldexp(wide.type(eps), exponent - 1), smallest)
        wide_got = got.astype(wide)
        error = np.maximum(np.abs(wide_got - exact) - forgiven, 0.0) / unit
        overflows = np.isinf(wide_got) & (np.copysign(exact, wide_got) == exact) & (np.abs(exact) >= largest + unit / 2)
    same = overflows | (np.isnan(wide_got) & np.isnan(exact)) | (wide_got == exact)
    error = np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))
    return float(np.max(error, initial=0.0))


def _largest(dtype: np.dtype[Any]) -> float:
    """The largest finite number; `numpy.finfo` does not know bfloat16."""
    return float(np.nextafter(np.array(np.inf, dtype), np.array(0, dtype)))


def _broadcast(name: str, value: npt.ArrayLike, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    array = np.asarray(value).astype(dtype)
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {array.shape}, expected one that broadcasts to that of got, {shape}"
        ) from None
