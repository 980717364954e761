"""The public functions of the second derivative: the gradient of what a backward pass computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmsnorm_np import _arguments, _backends, reference
from rmsnorm_np.ops.double import LAYER_NORM_DOUBLE_BACKWARD, RMS_NORM_DOUBLE_BACKWARD
from rmsnorm_np.reference import DoubleGrads

if TYPE_CHECKING:
    from types import ModuleType

    import numpy.typing as npt

    from rmsnorm_np.ops.operation import Operation

    Array = npt.NDArray[Any]


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
    """Gradients with respect to dy, x and weight of a loss that depends on the results of `rms_norm_backward`.

    For gradient penalties and Hessian-vector products. ddx, ddweight and ddbias are the gradients of that loss by
    the three results dx, dweight and dbias.

    Parameters
    ----------
    ddx : array_like or None
        Gradient of the loss by dx. Shape of x; any of the dtypes of x, whatever that of x. None for zero.
    ddweight, ddbias : array_like or None
        Gradients of the loss by dweight and dbias: exactly the shape of weight or bias; any dtype. None for zero, and
        where there is no such parameter.
    dy, x, weight, bias, eps, p, axis, weight_offset, backend
        As given to `rms_norm_backward`. Of `bias`, only the shape matters here.
    out : tuple of ndarray or None, optional
        Where ddy and dx are written: ``(ddy, dx)``, each exactly of the shape and dtype of that result, writable, any
        layout; or None. They may be ddx, dy or x, but must not share memory with each other.

    Returns
    -------
    DoubleGrads
        A named tuple: ``ddy`` with the shape and dtype of dy, the gradient by dy; ``dx`` with those of x; ``dweight``
        with those of weight (float64 for a weight of integers), None where the weight is None. The loss does not
        depend on the value of bias.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm_backward`; a ValueError too if ddx, ddweight or ddbias has another shape than what it belongs to,
        or belongs to a parameter that is None; a TypeError if `out` is no tuple of two.

    See Also
    --------
    rms_norm_backward : the function that this is the gradient of.
    rms_norm_jvp : forward mode.
    rmsnorm_np.reference.rms_norm_double_backward : the same in readable NumPy.

    Notes
    -----
    The gradient of ``sum(ddx · dx) + sum(ddweight · dweight) + sum(ddbias · dbias)``. With ``xhat = x · rstd``,
    ``g = dy · (weight_offset + weight)`` and ``a = ddweight · dy``, in each row::

        c, s, d = sum(g · xhat) / k, sum(ddx · g) / k, sum(a · xhat) / k        over all n elements
        v       = sum(ddx[:k] · xhat[:k]) / k
        u       = rstd · (ddx - xhat · v)

        ddy     = u · (weight_offset + weight) + ddweight · xhat + ddbias
        dx_i    = rstd · (a_i - [i < k] · xhat_i · d)
                  - rstd² · (g_i · v + [i < k] · (ddx_i · c + xhat_i · (s - 3 · c · v)))
        dweight = sum(dy · u)        over all rows that share the parameter

    What is None is left out. ddy is `rms_norm_jvp` along (ddx, ddweight, ddbias). Accuracy as in `rms_norm_backward`,
    in ULP of the largest of these terms.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import rms_norm_double_backward
    >>> dy, x = np.array([[1.0, 0.0]]), np.array([[3.0, 4.0]])
    >>> rms_norm_double_backward(np.array([[1.0, 0.0]]), None, None, dy, x, eps=0.0).dx
    array([[-0.06516696,  0.00362039]])
    """
    _arguments.check_given("dy", dy)
    engine = _backends.select(x, backend)
    if engine is reference:
        return reference.rms_norm_double_backward(
            ddx, ddweight, ddbias, dy, x, weight, bias, eps=eps, p=p, axis=axis, weight_offset=weight_offset, out=out
        )
    given = (ddx, ddweight, ddbias), (dy, x, weight, bias), (eps, p, axis, weight_offset, out)
    return _double_backward(engine, RMS_NORM_DOUBLE_BACKWARD, *given)


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
    """Gradients with respect to dy, x and weight of a loss that depends on the results of `layer_norm_backward`.

    Parameters
    ----------
    ddx, ddweight, ddbias, out
        As in `rms_norm_double_backward`.
    dy, x, weight, bias, eps, axis, weight_offset, backend
        As given to `layer_norm_backward`. Of `bias`, only the shape matters here.

    Returns
    -------
    DoubleGrads
        As from `rms_norm_double_backward`.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm_double_backward`.

    See Also
    --------
    layer_norm_backward : the function that this is the gradient of.
    layer_norm_jvp : forward mode.
    rmsnorm_np.reference.layer_norm_double_backward : the same in readable NumPy.

    Notes
    -----
    With ``xhat = (x - mean(x)) · rstd``, ``g = dy · (weight_offset + weight)``, ``a = ddweight · dy`` and
    ``b = ddx - mean(ddx)``, in each row::

        c, s, d, v = mean(g · xhat), mean(b · g), mean(a · xhat), mean(b · xhat)
        u          = rstd · (b - xhat · v)

        ddy     = u · (weight_offset + weight) + ddweight · xhat + ddbias
        dx      = rstd · (a - mean(a) - xhat · d)
                  - rstd² · ((g - mean(g)) · v + b · c + xhat · (s - 3 · c · v))
        dweight = sum(dy · u)        over all rows that share the parameter

    What is None is left out. ddy is `layer_norm_jvp` along (ddx, ddweight, ddbias). Accuracy as in
    `layer_norm_backward`, in ULP of the largest of these terms.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import layer_norm_double_backward
    >>> ddx, dy, x = np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, 1.0, 0.0]]), np.array([[1.0, 2.0, 4.0]])
    >>> layer_norm_double_backward(ddx, None, None, dy, x, eps=0.0).dx
    array([[-0.17999226,  0.0981776 ,  0.08181467]])
    """
    _arguments.check_given("dy", dy)
    engine = _backends.select(x, backend)
    if engine is reference:
        return reference.layer_norm_double_backward(
            ddx, ddweight, ddbias, dy, x, weight, bias, eps=eps, axis=axis, weight_offset=weight_offset, out=out
        )
    given = (ddx, ddweight, ddbias), (dy, x, weight, bias), (eps, 1.0, axis, weight_offset, out)
    return _double_backward(engine, LAYER_NORM_DOUBLE_BACKWARD, *given)


def _double_backward(engine: ModuleType, operation: Operation, dd: Any, given: Any, options: Any) -> DoubleGrads:
    """The gradients of both norms. dd: ddx, ddweight, ddbias; given: dy, x, weight, bias; options: the others."""
    (ddx, ddweight, ddbias), (dy, x, weight, bias), (eps, p, axis, weight_offset, out) = dd, given, options
    ddy_out, dx_out = _arguments.outs_of(out, ("ddy", "dx"))
    names = "x", "dy", "ddx", "out[1]", "out[0]"
    call = names, (x, dy, ddx), (weight, bias, weight_offset), (dx_out, ddy_out), eps, p, axis
    directions = ("ddweight", ddweight), ("ddbias", ddbias)
    (dx, ddy), (dweight, _) = _backends.run(engine, operation, call, directions)
    return DoubleGrads(ddy, dx, dweight)
