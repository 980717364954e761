"""LayerNorm, its gradients, and both with a residual, in NumPy: see :mod:`rmsnorm_np.reference`."""

# mypy: allow-redefinition
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _arguments
from rmsnorm_np._numbers import check_flag
from rmsnorm_np.reference import sharded
from rmsnorm_np.reference._common import (
    AddNorm,
    LayerNormGrads,
    added,
    check_backend,
    like,
    rounded,
    summed,
    through,
    widen,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from rmsnorm_np.reference._common import GradientsOut
    from rmsnorm_np.reference.sharded import Reduce

    Array = npt.NDArray[Any]


def forward(x: Any, w: Any, b: Any, eps: float, weight_offset: float, through_dtype: Any = None) -> Any:
    """y of x (..., n); w and b (n,), or what broadcasts, such as (heads, n), (batch, 1, n), or None.

    through_dtype: what xhat is rounded to before the weight, if it is.
    """
    centred = x - np.mean(x, axis=-1, keepdims=True)  # (..., n)
    centred = centred - np.mean(centred, axis=-1, keepdims=True)  # (..., n): again, for the mean was rounded too
    variance = np.mean(centred * centred, axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / np.sqrt(variance + eps)  # (..., 1)
    xhat = through(centred * rstd, through_dtype)  # (..., n)
    y = xhat if w is None else xhat * (weight_offset + w)  # (..., n) * (n,)
    return y if b is None else y + b  # (..., n) + (n,)


def backward(x: Any, dy: Any, w: Any, b: Any, eps: float, weight_offset: float) -> tuple[Any, Any, Any]:
    """dx, dweight and dbias, the shapes as in `forward`."""
    centred = x - np.mean(x, axis=-1, keepdims=True)  # (..., n)
    centred = centred - np.mean(centred, axis=-1, keepdims=True)  # (..., n): again, for the mean was rounded too
    variance = np.mean(centred * centred, axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / np.sqrt(variance + eps)  # (..., 1)
    xhat = centred * rstd  # (..., n)
    g = dy if w is None else dy * (weight_offset + w)  # (..., n) * (n,)
    mean_g = np.mean(g, axis=-1, keepdims=True)  # (..., 1)
    c = np.mean(g * xhat, axis=-1, keepdims=True)  # (..., 1)
    dx = rstd * (g - mean_g - xhat * c)  # (..., n)

    dweight = None if w is None else summed(dy * xhat, w.shape)  # (n,), over the rows
    dbias = None if b is None else summed(dy, b.shape)  # (n,), over the rows
    return dx, dweight, dbias


@np.errstate(all="ignore")
def layer_norm(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    dtype: npt.DTypeLike | None = None,
    round_xhat: bool = False,
    reduce: Reduce | None = None,
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
    check_backend(backend)
    dtype = _arguments.result_dtype(dtype)
    call = _arguments.Call(("x", "out"), (x,), (weight, bias, weight_offset), (out,), eps, 1.0, axis, dtype)
    (x,), (w, b, weight_offset), _, _, eps, restore = _arguments.prepare(call, complex_too=reduce is None)
    through_dtype = x.dtype if check_flag("round_xhat", round_xhat) else None
    if reduce is None:
        wide_x, w, b = widen(x, w, b, dtype=dtype)
        y = rounded(forward(wide_x, w, b, eps, weight_offset, through_dtype), dtype or x.dtype)
    else:
        sharded.check_reduce(reduce, 1.0)
        settings = sharded.Settings(True, eps, weight_offset, dtype, through_dtype)
        y = sharded.forward(x, w, b, settings, reduce)
    result: Array = restore([y])[0]
    return result


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
    reduce: Reduce | None = None,
    out: GradientsOut | None = None,
    backend: str | None = None,
) -> LayerNormGrads:
    """Gradients of LayerNorm: `rmsnorm_np.layer_norm_backward`, in NumPy, for real and complex arrays.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.layer_norm_backward`.

    Examples
    --------
    >>> layer_norm_backward([[1.0, 0.0, 0.0]], [[1.0, 2.0, 3.0]], eps=0.0).dx
    array([[ 0.20412415, -0.40824829,  0.20412415]])
    """
    check_backend(backend)
    _arguments.check_given("dy", dy)
    name, dx_out, into = _arguments.gradient_out(out, weight, bias)
    call = _arguments.Call(("x", "dy", name), (x, dy), (weight, bias, weight_offset), (dx_out,), eps, 1.0, axis)
    (x, dy), (w, b, weight_offset), _, _, eps, restore = _arguments.prepare(call, complex_too=reduce is None)
    if reduce is None:
        wide_x, wide_dy, w, b = widen(x, dy, w, b)
        dx, dweight, dbias = backward(wide_x, wide_dy, w, b, eps, weight_offset)
        dx = rounded(dx, x.dtype)
    else:
        sharded.check_reduce(reduce, 1.0)
        settings = sharded.Settings(True, eps, weight_offset)
        dx, dweight, dbias = sharded.backward((x, dy, None), w, b, settings, reduce)
    return LayerNormGrads(*into(restore([dx])[0], like(weight, dweight), like(bias, dbias)))


@np.errstate(all="ignore")
def add_layer_norm(
    x: npt.ArrayLike,
    residual: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    dtype: npt.DTypeLike | None = None,
    round_xhat: bool = False,
    reduce: Reduce | None = None,
    out: Array | None = None,
    residual_out: Array | None = None,
    backend: str | None = None,
) -> AddNorm:
    """h = x + residual and its LayerNorm: `rmsnorm_np.add_layer_norm`, in NumPy, for real and complex arrays.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.add_layer_norm`.

    Examples
    --------
    >>> add_layer_norm([[1.0, 2.0]], [[2.0, 2.0]], eps=0.0).h
    array([[3., 4.]])
    """
    check_backend(backend)
    _arguments.check_given("residual", residual)
    names = "x", "residual", "out", "residual_out"
    parameters, outs = (weight, bias, weight_offset), (out, residual_out)
    dtype = _arguments.result_dtype(dtype)
    call = _arguments.Call(names, (x, residual), parameters, outs, eps, 1.0, axis, dtype)
    (x, residual), (w, b, weight_offset), _, _, eps, restore = _arguments.prepare(call, complex_too=reduce is None)
    through_dtype = x.dtype if check_flag("round_xhat", round_xhat) else None
    # h (..., n) is rounded to the residual's dtype: what follows is about the rounded h
    if reduce is None:
        h = added(x, residual)
        wide_h, w, b = widen(h, w, b, dtype=dtype)
        y = rounded(forward(wide_h, w, b, eps, weight_offset, through_dtype), dtype or x.dtype)  # (..., n)
    else:
        sharded.check_reduce(reduce, 1.0)
        settings = sharded.Settings(True, eps, weight_offset, dtype or x.dtype, through_dtype)
        h = sharded.summed(x, residual)
        y = sharded.forward(h, w, b, settings, reduce)
    return AddNorm(*restore([y, h]))


@np.errstate(all="ignore")
def add_layer_norm_backward(
    dy: npt.ArrayLike,
    dh: npt.ArrayLike | None,
    h: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    reduce: Reduce | None = None,
    out: GradientsOut | None = None,
    backend: str | None = None,
) -> LayerNormGrads:
    """Gradients of `add_layer_norm`: `rmsnorm_np.add_layer_norm_backward`, in NumPy, for real and complex arrays.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.add_layer_norm_backward`.

    Examples
    --------
    >>> add_layer_norm_backward([[1.0, 0.0]], [[1.0, 1.0]], [[3.0, 4.0]], eps=0.0).dx.shape
    (1, 2)
    """
    check_backend(backend)
    _arguments.check_given("dy", dy)
    name, dx_out, into = _arguments.gradient_out(out, weight, bias)
    names = "h", "dy", "dh", name
    call = _arguments.Call(names, (h, dy, dh), (weight, bias, weight_offset), (dx_out,), eps, 1.0, axis)
    (h, dy, dh), (w, b, weight_offset), _, _, eps, restore = _arguments.prepare(call, complex_too=reduce is None)
    if reduce is None:
        wide_h, wide_dy, wide_dh, w, b = widen(h, dy, dh, w, b)
        dx, dweight, dbias = backward(wide_h, wide_dy, w, b, eps, weight_offset)
        dx = dx if wide_dh is None else wide_dh + dx  # (..., n): the gradient of both summands of h
        dx = rounded(dx, h.dtype)
    else:
        sharded.check_reduce(reduce, 1.0)
        settings = sharded.Settings(True, eps, weight_offset)
        dx, dweight, dbias = sharded.backward((h, dy, dh), w, b, settings, reduce)
    return LayerNormGrads(*into(restore([dx])[0], like(weight, dweight), like(bias, dbias)))
