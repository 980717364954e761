"""The public functions of the L2 norm: each row divided by its length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmsnorm_np import _arguments, _backends, reference
from rmsnorm_np.ops.l2 import L2_NORM, L2_NORM_BACKWARD
from rmsnorm_np.reference import RMSNormGrads

if TYPE_CHECKING:
    import numpy.typing as npt

    from rmsnorm_np.reference._common import GradientsOut

    Array = npt.NDArray[Any]


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
    """Divide each row of x by its Euclidean length: the norm of queries and keys in attention (QK-norm).

    Parameters
    ----------
    x, weight, bias, axis, weight_offset, dtype, round_xhat, out, backend
        As in `rms_norm`.
    eps : float, default 1e-6
        Added to the sum of squares, inside the root. Finite, not negative.

    Returns
    -------
    y : ndarray
        Shape of x, and its dtype unless `dtype` is another; `out` if that was given.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm`.

    See Also
    --------
    l2_norm_backward : its gradients.
    rms_norm : the same with the mean of the squares in place of their sum.
    rmsnorm_np.reference.l2_norm : the same in readable NumPy.

    Notes
    -----
    ::

        y = x / sqrt(sum(x²) + eps) · (weight_offset + weight) + bias

    It is RMSNorm divided by sqrt(n), with n · eps for eps: ``l2_norm(x, eps=n * eps)`` is ``rms_norm(x, eps=eps) /
    sqrt(n)``. Zhang and Sennrich compare it with RMSNorm (NeurIPS 2019, arXiv:1910.07467): without the factor sqrt(n)
    the elements of a long row become small, and training suffers. Accuracy as in `rms_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import l2_norm
    >>> l2_norm(np.array([[3.0, 4.0], [30.0, 40.0]]), eps=0.0)
    array([[0.6, 0.8],
           [0.6, 0.8]])
    """
    engine = _backends.select(x, backend)
    if engine is reference:
        return reference.l2_norm(
            x,
            weight,
            bias,
            eps=eps,
            axis=axis,
            weight_offset=weight_offset,
            dtype=dtype,
            round_xhat=round_xhat,
            out=out,
        )
    names, parameters = ("x", "residual", "out", "residual_out"), (weight, bias, weight_offset)
    call = names, (x, None), parameters, (out, None), eps, 1.0, axis
    y: Array = _backends.forward(engine, L2_NORM, call, dtype, round_xhat)[0]
    return y


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
    """Gradients of a loss with respect to x, weight and bias of `l2_norm`, from the gradient with respect to y.

    Parameters
    ----------
    dy, out
        As in `rms_norm_backward`.
    x, weight, bias, eps, axis, weight_offset, backend
        As given to `l2_norm`. Of `bias`, only the shape and the dtype matter here.

    Returns
    -------
    RMSNormGrads
        As from `rms_norm_backward`.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm_backward`.

    See Also
    --------
    l2_norm : the forward function.
    rmsnorm_np.reference.l2_norm_backward : the same in readable NumPy.

    Notes
    -----
    With ``rlength = 1 / sqrt(sum(x²) + eps)``, ``xhat = x · rlength`` and ``g = dy · (weight_offset + weight)``, in
    each row::

        c       = sum(g · xhat)
        dx      = rlength · (g - xhat · c)
        dweight = sum(dy · xhat),  dbias = sum(dy)        over all rows that share the parameter

    The length is computed again from x. Accuracy as in `rms_norm_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import l2_norm_backward
    >>> l2_norm_backward(np.array([[1.0, 0.0]]), np.array([[3.0, 4.0]]), eps=0.0).dx
    array([[ 0.128, -0.096]])
    """
    _arguments.check_given("dy", dy)
    engine = _backends.select(x, backend)
    if engine is reference:
        return reference.l2_norm_backward(dy, x, weight, bias, eps=eps, axis=axis, weight_offset=weight_offset, out=out)
    call = ("x", "dy", "dh", "out"), (x, dy, None), (weight, bias, weight_offset), (out,), eps, 1.0, axis
    return RMSNormGrads(*_backends.backward(engine, L2_NORM_BACKWARD, call))
