"""Forward mode of both norms, and the gradient of their gradients, in NumPy: see :mod:`rmsnorm_np.reference`.

LayerNorm is RMSNorm of a centred row, and to centre is linear and symmetric. So each derivative of LayerNorm is that of
RMSNorm, with what goes in along x centred, and the gradient that comes out along x centred.
"""

# mypy: allow-redefinition
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _arguments
from rmsnorm_np.reference._common import DoubleGrads, check_backend, like, rounded, summed, widen

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


def jvp(x: Any, x_dot: Any, w: Any, w_dot: Any, b_dot: Any, k: int, eps: float, weight_offset: float) -> Any:
    """y_dot of x and x_dot (..., n); the others as in `rms.forward`. A tangent that is None adds nothing."""
    mean_square = np.mean(x[..., :k] * x[..., :k], axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / np.sqrt(mean_square + eps)  # (..., 1)
    xhat = x * rstd  # (..., n)
    y_dot = np.zeros_like(x)  # (..., n)
    if x_dot is not None:
        v = np.sum(x_dot[..., :k] * xhat[..., :k], axis=-1, keepdims=True) / k  # (..., 1)
        xhat_dot = rstd * (x_dot - xhat * v)  # (..., n)
        y_dot = xhat_dot if w is None else xhat_dot * (weight_offset + w)  # (..., n) * (n,)
    if w_dot is not None:
        y_dot = y_dot + xhat * w_dot  # (..., n) * (n,)
    return y_dot if b_dot is None else y_dot + b_dot  # (..., n) + (n,)


def double_backward(
    x: Any, dy: Any, ddx: Any, w: Any, ddw: Any, ddb: Any, k: int, eps: float, weight_offset: float
) -> tuple[Any, Any, Any]:
    """ddy, dx (..., n) and dweight (n,), the other shapes as in `jvp`. What is None adds nothing."""
    mean_square = np.mean(x[..., :k] * x[..., :k], axis=-1, keepdims=True)  # (..., 1)
    rstd = 1.0 / np.sqrt(mean_square + eps)  # (..., 1)
    xhat = x * rstd  # (..., n)
    g = dy if w is None else dy * (weight_offset + w)  # (..., n) * (n,)
    ddy, dx = np.zeros_like(x), np.zeros_like(x)  # (..., n)
    dweight = None if w is None else np.zeros_like(w)  # (n,)

    if ddx is not None:  # of <ddx, rstd · (g - [i < k] · xhat · c)>
        c = np.sum(g * xhat, axis=-1, keepdims=True) / k  # (..., 1): over all n, as in `rms.backward`
        v = np.sum(ddx[..., :k] * xhat[..., :k], axis=-1, keepdims=True) / k  # (..., 1)
        s = np.sum(ddx * g, axis=-1, keepdims=True) / k  # (..., 1)
        xhat_dot = rstd * (ddx - xhat * v)  # (..., n)
        ddy = xhat_dot if w is None else xhat_dot * (weight_offset + w)  # (..., n) * (n,)
        if w is not None:
            dweight = summed(dy * xhat_dot, w.shape)  # (n,), over the rows
        inside = ddx * c + xhat * (s - 3.0 * c * v)  # (..., n)
        inside[..., k:] = 0.0  # elements outside the RMS
        dx = -rstd * rstd * (g * v + inside)  # (..., n)

    if ddw is not None:  # of <ddw · dy, xhat>: the gradient of xhat, with ddw · dy for g
        a = ddw * dy  # (n,) * (..., n)
        correction = xhat * (np.sum(a * xhat, axis=-1, keepdims=True) / k)  # (..., n)
        correction[..., k:] = 0.0
        ddy, dx = ddy + ddw * xhat, dx + rstd * (a - correction)  # (..., n)
    return ddy if ddb is None else ddy + ddb, dx, dweight


def centre(x: Any) -> Any:
    """The row without its mean. None stays None."""
    if x is None:
        return None
    x = x - np.mean(x, axis=-1, keepdims=True)  # (..., n)
    return x - np.mean(x, axis=-1, keepdims=True)  # (..., n): again, for the mean was rounded too


def _jvp(x: Any, x_dot: Any, given: Any, options: Any, centred: bool) -> Array:
    """Of both norms. given: weight, bias and their tangents. options: eps, p, axis, weight_offset, out."""
    weight, bias, weight_dot, bias_dot = given
    eps, p, axis, weight_offset, out = options
    names = "x", "x_dot", "out"
    call = _arguments.Call(names, (x, x_dot), (weight, bias, weight_offset), (out,), eps, p, axis)
    (x, x_dot), (w, b, weight_offset), _, k, eps, restore = _arguments.prepare(call, complex_too=True)
    w_dot = _arguments.column("weight_dot", weight_dot, "weight", weight, w, complex_too=True)
    b_dot = _arguments.column("bias_dot", bias_dot, "bias", bias, b, complex_too=True)
    wide_x, x_dot, w, w_dot, b_dot = widen(x, x_dot, w, w_dot, b_dot)
    if centred:
        wide_x, x_dot = centre(wide_x), centre(x_dot)
    y_dot = jvp(wide_x, x_dot, w, w_dot, b_dot, k, eps, weight_offset)
    result: Array = restore([rounded(y_dot, x.dtype)])[0]
    return result


def _double_backward(reads: Any, given: Any, options: Any, centred: bool) -> DoubleGrads:
    """Of both norms. reads: x, dy, ddx. given: weight, bias, ddweight, ddbias. options as in `_jvp`."""
    weight, bias, ddweight, ddbias = given
    eps, p, axis, weight_offset, out = options
    _arguments.check_given("dy", reads[1])
    names = "x", "dy", "ddx", "out[1]", "out[0]"
    outs = _arguments.outs_of(out, ("ddy", "dx"))[::-1]
    call = _arguments.Call(names, reads, (weight, bias, weight_offset), outs, eps, p, axis)
    (x, dy, ddx), (w, b, weight_offset), _, k, eps, restore = _arguments.prepare(call, complex_too=True)
    ddw = _arguments.column("ddweight", ddweight, "weight", weight, w, complex_too=True)
    ddb = _arguments.column("ddbias", ddbias, "bias", bias, b, complex_too=True)
    wide_x, wide_dy, ddx, w, ddw, ddb = widen(x, dy, ddx, w, ddw, ddb)
    if centred:
        wide_x, ddx = centre(wide_x), centre(ddx)
    ddy, dx, dweight = double_backward(wide_x, wide_dy, ddx, w, ddw, ddb, k, eps, weight_offset)
    dx, ddy = restore([rounded(centre(dx) if centred else dx, x.dtype), rounded(ddy, dy.dtype)])
    return DoubleGrads(ddy, dx, like(weight, dweight))


@np.errstate(all="ignore")
def rms_norm_jvp(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None,
    x_dot: npt.ArrayLike | None,
    weight_dot: npt.ArrayLike | None,
    bias_dot: npt.ArrayLike | None,
    *,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Forward mode of RMSNorm: `rmsnorm_np.rms_norm_jvp`, in NumPy, for real and complex arrays.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.rms_norm_jvp`.

    Examples
    --------
    >>> rms_norm_jvp([[3.0, 4.0]], None, None, [[1.0, 0.0]], None, None, eps=0.0)
    array([[ 0.18101934, -0.1357645 ]])
    """
    check_backend(backend)
    return _jvp(x, x_dot, (weight, bias, weight_dot, bias_dot), (eps, p, axis, weight_offset, out), centred=False)


@np.errstate(all="ignore")
def layer_norm_jvp(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None,
    x_dot: npt.ArrayLike | None,
    weight_dot: npt.ArrayLike | None,
    bias_dot: npt.ArrayLike | None,
    *,
    eps: float = 1e-6,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """Forward mode of LayerNorm: `rmsnorm_np.layer_norm_jvp`, in NumPy, for real and complex arrays.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.layer_norm_jvp`.

    Examples
    --------
    >>> layer_norm_jvp([[1.0, 2.0, 3.0]], None, None, [[1.0, 0.0, 0.0]], None, None, eps=0.0)
    array([[ 0.20412415, -0.40824829,  0.20412415]])
    """
    check_backend(backend)
    return _jvp(x, x_dot, (weight, bias, weight_dot, bias_dot), (eps, 1.0, axis, weight_offset, out), centred=True)


@np.errstate(all="ignore")
def rms_norm_double_backward(
    ddx: npt.ArrayLike | None,
    ddweight: npt.ArrayLike | None,
    ddbias: npt.ArrayLike | None,
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: tuple[Array | None, Array | None] | None = None,
    backend: str | None = None,
) -> DoubleGrads:
    """Gradient of RMSNorm's gradients: `rmsnorm_np.rms_norm_double_backward`, in NumPy, for real and complex.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.rms_norm_double_backward`.

    Examples
    --------
    >>> rms_norm_double_backward([[1.0, 0.0]], None, None, [[1.0, 0.0]], [[3.0, 4.0]], eps=0.0).ddy
    array([[ 0.18101934, -0.1357645 ]])
    """
    check_backend(backend)
    given, options = (weight, bias, ddweight, ddbias), (eps, p, axis, weight_offset, out)
    return _double_backward((x, dy, ddx), given, options, centred=False)


@np.errstate(all="ignore")
def layer_norm_double_backward(
    ddx: npt.ArrayLike | None,
    ddweight: npt.ArrayLike | None,
    ddbias: npt.ArrayLike | None,
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: tuple[Array | None, Array | None] | None = None,
    backend: str | None = None,
) -> DoubleGrads:
    """Gradient of LayerNorm's gradients: `rmsnorm_np.layer_norm_double_backward`, in NumPy, for real and complex.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.layer_norm_double_backward`.

    Examples
    --------
    >>> layer_norm_double_backward([[1.0, 0.0, 0.0]], None, None, [[1.0, 0.0, 0.0]], [[1.0, 2.0, 3.0]], eps=0.0).ddy
    array([[ 0.20412415, -0.40824829,  0.20412415]])
    """
    check_backend(backend)
    given, options = (weight, bias, ddweight, ddbias), (eps, 1.0, axis, weight_offset, out)
    return _double_backward((x, dy, ddx), given, options, centred=True)
