"""RMSNorm and LayerNorm in plain NumPy: readable source, and the oracle that the engines are tested against.

The names are those of the derivation. Of a row x with n elements, k of them in the RMS::

    RMSNorm     rstd = 1 / sqrt(mean(x[:k]²) + eps)       xhat = x · rstd
    LayerNorm   rstd = 1 / sqrt(mean((x - mean)²) + eps)  xhat = (x - mean) · rstd
    both        y = xhat · (weight_offset + weight) + bias

and backward, with g = dy · (weight_offset + weight), the gradient of the loss by xhat::

    RMSNorm     c = sum(g · xhat) / k                     dx_i = rstd · (g_i - [i < k] · xhat_i · c)
    LayerNorm   c = mean(g · xhat)                        dx = rstd · (g - mean(g) - xhat · c)
    both        dweight = sum(dy · xhat), dbias = sum(dy), over all rows that share the parameter

The sum in RMSNorm's c runs over all n elements, as each of them was divided by the same RMS; the correction
reaches the first k only, because only those elements enter the RMS. These are eq. 4 and eq. 9 of Zhang and Sennrich,
"Root Mean Square Layer Normalization", NeurIPS 2019, with eps inside the root.

Every function computes in a wider type than it is given and rounds once, at the end: float16, bfloat16 and float32
in float64; float64 in `numpy.longdouble`, which has 64 bits of precision and a far wider range on x86. On Windows
and macOS on ARM longdouble is float64 under another name: there float64 is computed as it is, with its rounding
errors, and a row whose squares leave the range of float64 gives zeros or infinities.

Complex arrays are accepted here, as in no engine: no formula takes a modulus or a conjugate, so that each is the
analytic continuation of the real one, and a complex step gives its derivative to full precision.
"""

# mypy: allow-redefinition
from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rmsnorm_np import _arguments

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


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


@np.errstate(all="ignore")  # NaN and Inf follow the formulas in silence, here as in the engines
def rms_norm(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """RMSNorm of each row of x: `rmsnorm_np.rms_norm`, in NumPy, for real and complex x.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.rms_norm`.

    Examples
    --------
    >>> rms_norm([[3.0, 4.0]], eps=0.0)
    array([[0.84852814, 1.13137085]])
    """
    _check_backend(backend)
    call = _arguments.Call(("x", "out"), (x,), (weight, bias, weight_offset), (out,), eps, p, axis)
    (x,), (w, b, weight_offset), _, k, eps, restore = _arguments.prepare(call, complex_too=True)
    dtype = x.dtype
    x, w, b = _widen(x, w, b)  # (..., n); w and b (n,), or more of x's trailing axes, such as (heads, n)

    mean_square = np.mean(x[..., :k] * x[..., :k], axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / np.sqrt(mean_square + eps)  # (..., 1)
    xhat = x * rstd  # (..., n)
    y = xhat if w is None else xhat * (weight_offset + w)  # (..., n) * (n,)
    y = y if b is None else y + b  # (..., n) + (n,)
    return restore([_rounded(y, dtype)])[0]


@np.errstate(all="ignore")
def rms_norm_backward(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: Array | None = None,
    backend: str | None = None,
) -> RMSNormGrads:
    """Gradients of RMSNorm: `rmsnorm_np.rms_norm_backward`, in NumPy, for real and complex arrays.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.rms_norm_backward`.

    Examples
    --------
    >>> rms_norm_backward([[1.0, 0.0]], [[3.0, 4.0]], eps=0.0).dx
    array([[ 0.18101934, -0.1357645 ]])
    """
    _check_backend(backend)
    _arguments.check_given("dy", dy)
    call = _arguments.Call(("x", "dy", "out"), (x, dy), (weight, bias, weight_offset), (out,), eps, p, axis)
    (x, dy), (w, b, weight_offset), _, k, eps, restore = _arguments.prepare(call, complex_too=True)
    dtype = x.dtype
    x, dy, w, b = _widen(x, dy, w, b)  # (..., n); w and b (n,), or more of x's trailing axes, such as (heads, n)

    mean_square = np.mean(x[..., :k] * x[..., :k], axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / np.sqrt(mean_square + eps)  # (..., 1)
    xhat = x * rstd  # (..., n)
    g = dy if w is None else dy * (weight_offset + w)  # (..., n) * (n,)
    c = np.sum(g * xhat, axis=-1, keepdims=True) / k  # (..., 1): over all n, divided by k
    correction = xhat * c  # (..., n)
    correction[..., k:] = 0.0  # elements outside the RMS
    dx = rstd * (g - correction)  # (..., n)

    dweight = None if w is None else np.sum(dy * xhat, axis=tuple(range(x.ndim - w.ndim)))  # (n,), over the rows
    dbias = None if b is None else np.sum(dy, axis=tuple(range(x.ndim - b.ndim)))  # (n,), over the rows
    return RMSNormGrads(restore([_rounded(dx, dtype)])[0], _like(weight, dweight), _like(bias, dbias))


@np.errstate(all="ignore")
def layer_norm(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """LayerNorm of each row of x: `rmsnorm_np.layer_norm`, in NumPy, for real and complex x.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.layer_norm`.

    Examples
    --------
    >>> layer_norm([[1.0, 2.0, 3.0]], eps=0.0)
    array([[-1.22474487,  0.        ,  1.22474487]])
    """
    _check_backend(backend)
    call = _arguments.Call(("x", "out"), (x,), (weight, bias, weight_offset), (out,), eps, 1.0, axis)
    (x,), (w, b, weight_offset), _, _, eps, restore = _arguments.prepare(call, complex_too=True)
    dtype = x.dtype
    x, w, b = _widen(x, w, b)  # (..., n); w and b (n,), or more of x's trailing axes, such as (heads, n)

    centred = x - np.mean(x, axis=-1, keepdims=True)  # (..., n)
    centred = centred - np.mean(centred, axis=-1, keepdims=True)  # (..., n): again, for the mean was rounded too
    variance = np.mean(centred * centred, axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / np.sqrt(variance + eps)  # (..., 1)
    xhat = centred * rstd  # (..., n)
    y = xhat if w is None else xhat * (weight_offset + w)  # (..., n) * (n,)
    y = y if b is None else y + b  # (..., n) + (n,)
    return restore([_rounded(y, dtype)])[0]


@np.errstate(all="ignore")
def layer_norm_backward(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: Array | None = None,
    backend: str | None = None,
) -> LayerNormGrads:
    """Gradients of LayerNorm: `rmsnorm_np.layer_norm_backward`, in NumPy, for real and complex arrays.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.layer_norm_backward`.

    Examples
    --------
    >>> layer_norm_backward([[1.0, 0.0, 0.0]], [[1.0, 2.0, 3.0]], eps=0.0).dx
    array([[ 0.20412415, -0.40824829,  0.20412415]])
    """
    _check_backend(backend)
    _arguments.check_given("dy", dy)
    call = _arguments.Call(("x", "dy", "out"), (x, dy), (weight, bias, weight_offset), (out,), eps, 1.0, axis)
    (x, dy), (w, b, weight_offset), _, _, eps, restore = _arguments.prepare(call, complex_too=True)
    dtype = x.dtype
    x, dy, w, b = _widen(x, dy, w, b)  # (..., n); w and b (n,), or more of x's trailing axes, such as (heads, n)

    centred = x - np.mean(x, axis=-1, keepdims=True)  # (..., n)
    centred = centred - np.mean(centred, axis=-1, keepdims=True)  # (..., n): again, for the mean was rounded too
    variance = np.mean(centred * centred, axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / np.sqrt(variance + eps)  # (..., 1)
    xhat = centred * rstd  # (..., n)
    g = dy if w is None else dy * (weight_offset + w)  # (..., n) * (n,)
    mean_g = np.mean(g, axis=-1, keepdims=True)  # (..., 1)
    c = np.mean(g * xhat, axis=-1, keepdims=True)  # (..., 1)
    dx = rstd * (g - mean_g - xhat * c)  # (..., n)

    dweight = None if w is None else np.sum(dy * xhat, axis=tuple(range(x.ndim - w.ndim)))  # (n,), over the rows
    dbias = None if b is None else np.sum(dy, axis=tuple(range(x.ndim - b.ndim)))  # (n,), over the rows
    return LayerNormGrads(restore([_rounded(dx, dtype)])[0], _like(weight, dweight), _like(bias, dbias))


def _check_backend(backend: str | None) -> None:
    if backend not in (None, "reference"):
        raise ValueError(f"backend is {backend!r}, expected None or 'reference' from a function of the reference")


def _widen(*arrays: Any) -> list[Any]:
    """The arrays in one type that is wider than each of them. None stays None."""
    wide = np.result_type(*(_wider(a.dtype) for a in arrays if a is not None))
    return [None if a is None else a.astype(wide) for a in arrays]


def _wider(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype == np.float64:
        return np.dtype(np.longdouble)
    if dtype == np.complex128:
        return np.dtype(np.clongdouble)
    return np.result_type(dtype, np.float64)


def _rounded(a: Array, dtype: np.dtype[Any]) -> Array:
    """The array in this dtype, or in the complex dtype that goes with it.

    bfloat16 comes from float64 by way of float32, in ml_dtypes: 0.50001 ULP at worst, where one rounding gives 0.5.
    """
    return a.astype(np.result_type(dtype, np.complex64) if np.iscomplexobj(a) else dtype)


def _like(parameter: Any, gradient: Array | None) -> Array | None:
    """The gradient of a weight or bias, rounded to the dtype and brought to the shape of that parameter."""
    if gradient is None:
        return None
    given = _arguments.as_array("parameter", parameter)
    dtype = _arguments.native_dtype("parameter", given.dtype, complex_too=True)
    return _rounded(gradient, dtype).reshape(given.shape)
