"""The public functions of forward mode: how y changes along a direction, the Jacobian-vector product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmsnorm_np import _backends, reference
from rmsnorm_np.ops.jvp import LAYER_NORM_JVP, RMS_NORM_JVP

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


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
    """Derivative of `rms_norm` along a direction: y_dot, from the tangents of x, weight and bias.

    y changes by ``t * y_dot`` where x changes by ``t * x_dot``, weight by ``t * weight_dot`` and bias by
    ``t * bias_dot``, for a small t. It takes about as long as y does, whatever the number of elements of the direction.

    Parameters
    ----------
    x, weight, bias, eps, p, axis, weight_offset, backend
        As given to `rms_norm`. Of `bias`, only the shape matters here.
    x_dot : array_like or None
        Shape of x; any of the dtypes of x, whatever that of x. None for zero.
    weight_dot, bias_dot : array_like or None
        Exactly the shape of weight or bias; any dtype. None for zero, and where there is no such parameter.
    out : ndarray, optional
        Where y_dot is written: exactly the shape and dtype of y_dot, writable, any layout. It may be x or x_dot.

    Returns
    -------
    y_dot : ndarray
        Shape and dtype of x; `out` if that was given.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm`; a ValueError too if a tangent has another shape than what it belongs to, or belongs to a
        parameter that is None.

    See Also
    --------
    rms_norm : the function.
    rms_norm_backward : reverse mode, the gradient of a loss.
    rms_norm_double_backward : the derivative of the gradient.
    rmsnorm_np.reference.rms_norm_jvp : the same in readable NumPy.

    Notes
    -----
    With ``xhat = x · rstd``, in each row::

        v     = sum(x_dot[:k] · xhat[:k]) / k
        y_dot = rstd · (x_dot - xhat · v) · (weight_offset + weight) + xhat · weight_dot + bias_dot

    A tangent that is None is left out. Accuracy as in `rms_norm_backward`, in ULP of the largest of these terms.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import rms_norm_jvp
    >>> x, x_dot = np.array([[3.0, 4.0]]), np.array([[1.0, 0.0]])
    >>> rms_norm_jvp(x, None, None, x_dot, None, None, eps=0.0)
    array([[ 0.18101934, -0.1357645 ]])
    """
    engine = _backends.select(x, backend)
    if engine is reference:
        return reference.rms_norm_jvp(
            x, weight, bias, x_dot, weight_dot, bias_dot, eps=eps, p=p, axis=axis, weight_offset=weight_offset, out=out
        )
    directions = ("weight_dot", weight_dot), ("bias_dot", bias_dot)
    call = ("x", "x_dot", "out"), (x, x_dot), (weight, bias, weight_offset), (out,), eps, p, axis
    (y_dot,), _ = _backends.run(engine, RMS_NORM_JVP, call, directions)
    return y_dot  # type: ignore[no-any-return]


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
    """Derivative of `layer_norm` along a direction: y_dot, from the tangents of x, weight and bias.

    Parameters
    ----------
    x, weight, bias, eps, axis, weight_offset, backend
        As given to `layer_norm`. Of `bias`, only the shape matters here.
    x_dot, weight_dot, bias_dot, out
        As in `rms_norm_jvp`.

    Returns
    -------
    y_dot : ndarray
        Shape and dtype of x; `out` if that was given.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm_jvp`.

    See Also
    --------
    layer_norm : the function.
    layer_norm_backward : reverse mode, the gradient of a loss.
    layer_norm_double_backward : the derivative of the gradient.
    rmsnorm_np.reference.layer_norm_jvp : the same in readable NumPy.

    Notes
    -----
    With ``xhat = (x - mean(x)) · rstd`` and ``u = x_dot - mean(x_dot)``, in each row::

        v     = mean(u · xhat)
        y_dot = rstd · (u - xhat · v) · (weight_offset + weight) + xhat · weight_dot + bias_dot

    A tangent that is None is left out. Accuracy as in `layer_norm_backward`, in ULP of the largest of these terms.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import layer_norm_jvp
    >>> x, x_dot = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 0.0, 0.0]])
    >>> layer_norm_jvp(x, None, None, x_dot, None, None, eps=0.0)
    array([[ 0.20412415, -0.40824829,  0.20412415]])
    """
    engine = _backends.select(x, backend)
    if engine is reference:
        return reference.layer_norm_jvp(
            x, weight, bias, x_dot, weight_dot, bias_dot, eps=eps, axis=axis, weight_offset=weight_offset, out=out
        )
    directions = ("weight_dot", weight_dot), ("bias_dot", bias_dot)
    call = ("x", "x_dot", "out"), (x, x_dot), (weight, bias, weight_offset), (out,), eps, 1.0, axis
    (y_dot,), _ = _backends.run(engine, LAYER_NORM_JVP, call, directions)
    return y_dot  # type: ignore[no-any-return]
