"""The L2 norm, a row divided by its length, and its gradients, in NumPy: see :mod:`rmsnorm_np.reference`."""

# mypy: allow-redefinition
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _arguments
from rmsnorm_np._numbers import check_flag
from rmsnorm_np.reference._common import RMSNormGrads, check_backend, like, rounded, summed, through, widen

if TYPE_CHECKING:
    import numpy.typing as npt

    from rmsnorm_np.reference._common import GradientsOut

    Array = npt.NDArray[Any]


def forward(x: Any, w: Any, b: Any, eps: float, weight_offset: float, through_dtype: Any = None) -> Any:
    """y of x (..., n); w and b (n,), or what broadcasts, such as (heads, n), (batch, 1, n), or None.

    through_dtype: what xhat is rounded to before the weight, if it is.
    """
    square = np.sum(x * x, axis=-1, keepdims=True)  # (..., 1)
    rlength = 1.0 / np.sqrt(square + eps)  # (..., 1)
    xhat = through(x * rlength, through_dtype)  # (..., n)
    y = xhat if w is None else xhat * (weight_offset + w)  # (..., n) * (n,)
    return y if b is None else y + b  # (..., n) + (n,)


def backward(x: Any, dy: Any, w: Any, b: Any, eps: float, weight_offset: float) -> tuple[Any, Any, Any]:
    """dx, dweight and dbias, the shapes as in `forward`."""
    square = np.sum(x * x, axis=-1, keepdims=True)  # (..., 1)
    rlength = 1.0 / np.sqrt(square + eps)  # (..., 1)
    xhat = x * rlength  # (..., n)
    g = dy if w is None else dy * (weight_offset + w)  # (..., n) * (n,)
    c = np.sum(g * xhat, axis=-1, keepdims=True)  # (..., 1): a sum, where RMSNorm has a mean
    dx = rlength * (g - xhat * c)  # (..., n)

    dweight = None if w is None else summed(dy * xhat, w.shape)  # (n,), over the rows
    dbias = None if b is None else summed(dy, b.shape)  # (n,), over the rows
    return dx, dweight, dbias


@np.errstate(all="ignore")
def l2_norm(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    dtype: npt.DTypeLike | None = None,
    round_xhat: bool = False,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """L2 norm of each row of x: `rmsnorm_np.l2_norm`, in NumPy, for real and complex x.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.l2_norm`.

    Examples
    --------
    >>> l2_norm([[3.0, 4.0]], eps=0.0)
    array([[0.6, 0.8]])
    """
    check_backend(backend)
    dtype = _arguments.result_dtype(dtype)
    call = _arguments.Call(("x", "out"), (x,), (weight, bias, weight_offset), (out,), eps, 1.0, axis, dtype)
    (x,), (w, b, weight_offset), _, _, eps, restore = _arguments.prepare(call, complex_too=True)
    through_dtype = x.dtype if check_flag("round_xhat", round_xhat) else None
    wide_x, w, b = widen(x, w, b, dtype=dtype)
    y = forward(wide_x, w, b, eps, weight_offset, through_dtype)
    result: Array = restore([rounded(y, dtype or x.dtype)])[0]
    return result


@np.errstate(all="ignore")
def l2_norm_backward(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: GradientsOut | None = None,
    backend: str | None = None,
) -> RMSNormGrads:
    """Gradients of the L2 norm: `rmsnorm_np.l2_norm_backward`, in NumPy, for real and complex arrays.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.l2_norm_backward`.

    Examples
    --------
    >>> l2_norm_backward([[1.0, 0.0]], [[3.0, 4.0]], eps=0.0).dx
    array([[ 0.128, -0.096]])
    """
    check_backend(backend)
    _arguments.check_given("dy", dy)
    name, dx_out, into = _arguments.gradient_out(out, weight, bias)
    call = _arguments.Call(("x", "dy", name), (x, dy), (weight, bias, weight_offset), (dx_out,), eps, 1.0, axis)
    (x, dy), (w, b, weight_offset), _, _, eps, restore = _arguments.prepare(call, complex_too=True)
    wide_x, wide_dy, w, b = widen(x, dy, w, b)
    dx, dweight, dbias = backward(wide_x, wide_dy, w, b, eps, weight_offset)
    return RMSNormGrads(*into(restore([rounded(dx, x.dtype)])[0], like(weight, dweight), like(bias, dbias)))
