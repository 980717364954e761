"""The public functions for a residual stream: the norm of a sum that is kept, in one pass over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmsnorm_np import _arguments, _backends, reference
from rmsnorm_np.ops.layer import LAYER_NORM, LAYER_NORM_BACKWARD
from rmsnorm_np.ops.rms import RMS_NORM, RMS_NORM_BACKWARD
from rmsnorm_np.reference import AddNorm, LayerNormGrads, RMSNormGrads

if TYPE_CHECKING:
    import numpy.typing as npt

    from rmsnorm_np.reference._common import GradientsOut
    from rmsnorm_np.reference.sharded import Reduce

    Array = npt.NDArray[Any]

# the names of the arrays in error messages: what is read, what is written
_FORWARD, _BACKWARD = ("x", "residual", "out", "residual_out"), ("h", "dy", "dh", "out")


def add_rms_norm(
    x: npt.ArrayLike,
    residual: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    dtype: npt.DTypeLike | None = None,
    round_xhat: bool = False,
    reduce: Reduce | None = None,
    out: Array | None = None,
    residual_out: Array | None = None,
    backend: str | None = None,
) -> AddNorm:
    """Add x to the residual stream, and normalise the sum: h = x + residual, y = rms_norm(h).

    One pass over memory for both steps of a transformer's block.

    Parameters
    ----------
    x : array_like
        What a layer adds to the residual stream; as x of `rms_norm`.
    residual : array_like
        The residual stream. Shape of x; any of the dtypes of x, whatever that of x.
    weight, bias, eps, p, axis, weight_offset, dtype, round_xhat, reduce, backend
        As given to `rms_norm`: `dtype` is that of y, and `round_xhat` rounds to the dtype of x.
    out : ndarray, optional
        Where y is written: exactly the shape and dtype of y, writable, any layout. It may be x or residual.
    residual_out : ndarray, optional
        Where h is written: exactly the shape and dtype of h, writable, any layout. It may be residual or x, but must
        not share memory with `out`.

    Returns
    -------
    AddNorm
        A named tuple: ``y`` with the shape of x, and its dtype unless `dtype` is another; ``h`` with the shape and
        dtype of residual.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm`; a TypeError too if residual is None, a ValueError if it has another shape than x, or if `out`
        and `residual_out` share memory.

    See Also
    --------
    add_rms_norm_backward : its gradients.
    rmsnorm_np.reference.add_rms_norm : the same in readable NumPy.

    Notes
    -----
    h is the sum rounded to the residual's dtype: once, but where that has 16 bits and x has more it is rounded to
    float32 first (0.501 ULP). The statistics and y are those of the rounded h, with the accuracy of `rms_norm`: so
    h is all that the backward pass needs.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import add_rms_norm
    >>> x, residual = np.array([[1.0, 2.0]]), np.array([[2.0, 2.0]])
    >>> y, h = add_rms_norm(x, residual, eps=0.0)
    >>> h
    array([[3., 4.]])
    >>> y
    array([[0.84852814, 1.13137085]])
    """
    engine = _backends.select(x, backend)
    if reduce is not None:
        engine = _backends.for_reduce(engine, reduce, p)
    if engine is reference:
        return reference.add_rms_norm(
            x, residual, weight, bias, eps=eps, p=p, axis=axis, weight_offset=weight_offset, dtype=dtype,
            round_xhat=round_xhat, reduce=reduce, out=out, residual_out=residual_out,
        )  # fmt: skip
    _arguments.check_given("residual", residual)
    call = _FORWARD, (x, residual), (weight, bias, weight_offset), (out, residual_out), eps, p, axis
    return AddNorm(*_backends.forward(engine, RMS_NORM, call, dtype, round_xhat))


def add_rms_norm_backward(
    dy: npt.ArrayLike,
    dh: npt.ArrayLike | None,
    h: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    reduce: Reduce | None = None,
    out: GradientsOut | None = None,
    backend: str | None = None,
) -> RMSNormGrads:
    """Gradients of `add_rms_norm`, from the gradients of both its results.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss by y. Shape of h; any of the dtypes of h, whatever that of h.
    dh : array_like or None
        Gradient of the loss by h on all other ways than through y: what comes back along the residual stream. Shape of
        h, any dtype; None for zero.
    h : array_like
        The sum, as `add_rms_norm` returned it.
    weight, bias, eps, p, axis, weight_offset, reduce, backend
        As given to `add_rms_norm`. Of `bias`, only the shape and the dtype matter here.
    out : ndarray or tuple of ndarray or None, optional
        Where dx is written: exactly the shape and dtype of dx, writable, any layout. It may be dy, dh or h. Or a tuple
        for ``(dx, dweight, dbias)``, as in `rms_norm_backward`.

    Returns
    -------
    RMSNormGrads
        A named tuple: ``dx`` with the shape and dtype of h, the gradient of both x and residual; ``dweight`` and
        ``dbias`` as from `rms_norm_backward`.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm_backward`, with h for x; a ValueError too if dh has another shape than h.

    See Also
    --------
    add_rms_norm : the forward function.
    rms_norm_backward : the formulas.
    rmsnorm_np.reference.add_rms_norm_backward : the same in readable NumPy.

    Notes
    -----
    dx is ``dh`` plus the gradient through the norm, rounded once; its accuracy is that of `rms_norm_backward`, in
    units of the largest of its terms, dh among them.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import add_rms_norm_backward
    >>> dy, h = np.array([[1.0, 0.0]]), np.array([[3.0, 4.0]])
    >>> add_rms_norm_backward(dy, np.ones((1, 2)), h, eps=0.0).dx
    array([[1.18101934, 0.8642355 ]])
    """
    engine = _backends.select(h, backend)
    if reduce is not None:
        engine = _backends.for_reduce(engine, reduce, p)
    if engine is reference:
        return reference.add_rms_norm_backward(
            dy, dh, h, weight, bias, eps=eps, p=p, axis=axis, weight_offset=weight_offset, reduce=reduce, out=out
        )
    _arguments.check_given("dy", dy)
    call = _BACKWARD, (h, dy, dh), (weight, bias, weight_offset), (out,), eps, p, axis
    return RMSNormGrads(*_backends.backward(engine, RMS_NORM_BACKWARD, call))


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
    """Add x to the residual stream, and normalise the sum: h = x + residual, y = layer_norm(h).

    One pass over memory for both steps of a transformer's block.

    Parameters
    ----------
    x : array_like
        What a layer adds to the residual stream; as x of `layer_norm`.
    residual : array_like
        The residual stream. Shape of x; any of the dtypes of x, whatever that of x.
    weight, bias, eps, axis, weight_offset, dtype, round_xhat, reduce, backend
        As given to `layer_norm`: `dtype` is that of y, and `round_xhat` rounds to the dtype of x.
    out : ndarray, optional
        Where y is written: exactly the shape and dtype of y, writable, any layout. It may be x or residual.
    residual_out : ndarray, optional
        Where h is written: exactly the shape and dtype of h, writable, any layout. It may be residual or x, but must
        not share memory with `out`.

    Returns
    -------
    AddNorm
        A named tuple: ``y`` with the shape of x, and its dtype unless `dtype` is another; ``h`` with the shape and
        dtype of residual.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `layer_norm`; a TypeError too if residual is None, a ValueError if it has another shape than x, or if `out`
        and `residual_out` share memory.

    See Also
    --------
    add_layer_norm_backward : its gradients.
    rmsnorm_np.reference.add_layer_norm : the same in readable NumPy.

    Notes
    -----
    h is the sum rounded to the residual's dtype: once, but where that has 16 bits and x has more it is rounded to
    float32 first (0.501 ULP). The statistics and y are those of the rounded h, with the accuracy of `layer_norm`: so
    h is all that the backward pass needs.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import add_layer_norm
    >>> x, residual = np.array([[1.0, 2.0]]), np.array([[2.0, 2.0]])
    >>> y, h = add_layer_norm(x, residual, eps=0.0)
    >>> h
    array([[3., 4.]])
    >>> y
    array([[-1.,  1.]])
    """
    engine = _backends.select(x, backend)
    if reduce is not None:
        engine = _backends.for_reduce(engine, reduce)
    if engine is reference:
        return reference.add_layer_norm(
            x, residual, weight, bias, eps=eps, axis=axis, weight_offset=weight_offset, dtype=dtype,
            round_xhat=round_xhat, reduce=reduce, out=out, residual_out=residual_out,
        )  # fmt: skip
    _arguments.check_given("residual", residual)
    call = _FORWARD, (x, residual), (weight, bias, weight_offset), (out, residual_out), eps, 1.0, axis
    return AddNorm(*_backends.forward(engine, LAYER_NORM, call, dtype, round_xhat))


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
    """Gradients of `add_layer_norm`, from the gradients of both its results.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss by y. Shape of h; any of the dtypes of h, whatever that of h.
    dh : array_like or None
        Gradient of the loss by h on all other ways than through y: what comes back along the residual stream. Shape of
        h, any dtype; None for zero.
    h : array_like
        The sum, as `add_layer_norm` returned it.
    weight, bias, eps, axis, weight_offset, reduce, backend
        As given to `add_layer_norm`. Of `bias`, only the shape and the dtype matter here.
    out : ndarray or tuple of ndarray or None, optional
        Where dx is written: exactly the shape and dtype of dx, writable, any layout. It may be dy, dh or h. Or a tuple
        for ``(dx, dweight, dbias)``, as in `rms_norm_backward`.

    Returns
    -------
    LayerNormGrads
        A named tuple: ``dx`` with the shape and dtype of h, the gradient of both x and residual; ``dweight`` and
        ``dbias`` as from `layer_norm_backward`.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `layer_norm_backward`, with h for x; a ValueError too if dh has another shape than h.

    See Also
    --------
    add_layer_norm : the forward function.
    layer_norm_backward : the formulas.
    rmsnorm_np.reference.add_layer_norm_backward : the same in readable NumPy.

    Notes
    -----
    dx is ``dh`` plus the gradient through the norm, rounded once; its accuracy is that of `layer_norm_backward`, in
    units of the largest of its terms, dh among them.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import add_layer_norm_backward
    >>> dy, h = np.array([[1.0, 0.0]]), np.array([[3.0, 4.0]])
    >>> add_layer_norm_backward(dy, np.ones((1, 2)), h, eps=0.0).dx
    array([[1., 1.]])
    """
    engine = _backends.select(h, backend)
    if reduce is not None:
        engine = _backends.for_reduce(engine, reduce)
    if engine is reference:
        return reference.add_layer_norm_backward(
            dy, dh, h, weight, bias, eps=eps, axis=axis, weight_offset=weight_offset, reduce=reduce, out=out
        )
    _arguments.check_given("dy", dy)
    call = _BACKWARD, (h, dy, dh), (weight, bias, weight_offset), (out,), eps, 1.0, axis
    return LayerNormGrads(*_backends.backward(engine, LAYER_NORM_BACKWARD, call))
