"""The public functions of LayerNorm; `norms` explains the parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmsnorm_np import _arguments, _backends, reference
from rmsnorm_np.ops.layer import LAYER_NORM, LAYER_NORM_BACKWARD
from rmsnorm_np.reference import LayerNormGrads

if TYPE_CHECKING:
    import numpy.typing as npt

    from rmsnorm_np.reference._common import GradientsOut
    from rmsnorm_np.reference.sharded import Reduce

    Array = npt.NDArray[Any]

# names of the arrays in error messages: what is read, what is written
_FORWARD, _BACKWARD = ("x", "residual", "out", "residual_out"), ("x", "dy", "dh", "out")


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
    """Take the mean off each row of x and divide by its standard deviation: LayerNorm.

    Parameters
    ----------
    x, weight, bias, axis, weight_offset, dtype, round_xhat, reduce, out, backend
        As in `rms_norm`; `reduce` is called twice, for the mean and then for the squares about it.
    eps : float, default 1e-6
        Added to the variance, inside the root. Finite, not negative.

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
    layer_norm_backward : its gradients.
    rmsnorm_np.reference.layer_norm : the same in readable NumPy.

    Notes
    -----
    ::

        y = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) · (weight_offset + weight) + bias

    Ba, Kiros and Hinton, "Layer Normalization", 2016 (arXiv:1607.06450), with the biased variance and eps inside the
    root. The variance is that of the centred row, never mean(x²) - mean(x)². Accuracy as in `rms_norm`, also of
    elements next to the mean. A row of one number gives the bias.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import layer_norm
    >>> layer_norm(np.array([[1.0, 2.0, 3.0]]), eps=0.0)
    array([[-1.22474487,  0.        ,  1.22474487]])

    Adaptive norm, as in diffusion transformers: a scale and a shift for each of a batch, of shape (batch, 1, n).

    >>> x = np.array([[[3.0, 5.0], [1.0, 9.0]], [[2.0, 4.0], [0.0, 8.0]]])
    >>> scale, shift = np.array([[[0.0, 0.0]], [[1.0, 0.5]]]), np.array([[[0.0, 0.0]], [[10.0, 20.0]]])
    >>> layer_norm(x, scale, shift, weight_offset=1.0, eps=0.0)
    array([[[-1. ,  1. ],
            [-1. ,  1. ]],
    <BLANKLINE>
           [[ 8. , 21.5],
            [ 8. , 21.5]]])
    """
    engine = _backends.select(x, backend)
    if reduce is not None:
        engine = _backends.for_reduce(engine, reduce)
    if engine is reference:
        return reference.layer_norm(
            x,
            weight,
            bias,
            eps=eps,
            axis=axis,
            weight_offset=weight_offset,
            dtype=dtype,
            round_xhat=round_xhat,
            reduce=reduce,
            out=out,
        )
    call = _FORWARD, (x, None), (weight, bias, weight_offset), (out, None), eps, 1.0, axis
    y: Array = _backends.forward(engine, LAYER_NORM, call, dtype, round_xhat)[0]
    return y


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
    """Gradients of a loss with respect to x, weight and bias of `layer_norm`, from the gradient with respect to y.

    Parameters
    ----------
    dy, out
        As in `rms_norm_backward`.
    x, weight, bias, eps, axis, weight_offset, reduce, backend
        As given to `layer_norm`; `reduce` is called twice. Of `bias`, only the shape and the dtype matter here.

    Returns
    -------
    LayerNormGrads
        A named tuple: ``dx`` with the shape and dtype of x, ``dweight`` with those of weight, ``dbias`` with those of
        bias (float64 for a parameter of integers). ``dweight`` and ``dbias`` are None where the parameter is None.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm_backward`.

    See Also
    --------
    layer_norm : the forward function.
    rmsnorm_np.reference.layer_norm_backward : the same in readable NumPy.

    Notes
    -----
    With ``xhat = (x - mean(x)) · rstd`` and ``g = dy · (weight_offset + weight)``, in each row::

        c      = mean(g · xhat)
        dx     = rstd · (g - mean(g) - xhat · c)
        dweight = sum(dy · xhat),  dbias = sum(dy)        over all rows that share the parameter

    Mean and variance are computed again from x. Accuracy as in `rms_norm_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import layer_norm_backward
    >>> layer_norm_backward(np.array([[1.0, 0.0, 0.0]]), np.array([[1.0, 2.0, 3.0]]), eps=0.0).dx
    array([[ 0.20412415, -0.40824829,  0.20412415]])
    """
    _arguments.check_given("dy", dy)
    engine = _backends.select(x, backend)
    if reduce is not None:
        engine = _backends.for_reduce(engine, reduce)
    if engine is reference:
        return reference.layer_norm_backward(
            dy, x, weight, bias, eps=eps, axis=axis, weight_offset=weight_offset, reduce=reduce, out=out
        )
    call = _BACKWARD, (x, dy, None), (weight, bias, weight_offset), (out,), eps, 1.0, axis
    return LayerNormGrads(*_backends.backward(engine, LAYER_NORM_BACKWARD, call))
