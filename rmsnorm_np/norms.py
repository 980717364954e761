"""The public functions of RMSNorm: what they promise, and which engine keeps the promise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmsnorm_np import _arguments, _backends, reference
from rmsnorm_np.ops.rms import RMS_NORM, RMS_NORM_BACKWARD
from rmsnorm_np.reference import RMSNormGrads

if TYPE_CHECKING:
    import numpy.typing as npt

    from rmsnorm_np.reference._common import GradientsOut
    from rmsnorm_np.reference.sharded import Reduce

    Array = npt.NDArray[Any]

# names of the arrays in error messages: what is read, what is written
_FORWARD, _BACKWARD = ("x", "residual", "out", "residual_out"), ("x", "dy", "dh", "out")


def rms_norm(
    x: npt.ArrayLike,
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
    backend: str | None = None,
) -> Array:
    """Divide each row of x by its root mean square: RMSNorm, and pRMSNorm for ``p < 1``.

    A row consists of the elements along `axis`; all rows are normalised independently.

    Parameters
    ----------
    x : array_like, of any shape with at least one axis
        float16, bfloat16 (``ml_dtypes``), float32 or float64 in any layout; never written. Integers, bools and
        Python lists of numbers are taken as float64. Arrays of PyTorch, JAX and others that have ``__dlpack__`` and
        lie on the CPU are taken without a copy.
    weight : array_like, optional
        Factor of each element; any of the dtypes above, whatever that of x. It has the normalised axes in full, and
        what is before them broadcasts against x as NumPy's arrays do: ``(n,)``, one factor per element of a row;
        ``(heads, n)``, one per head, where heads is the axis of x before the last; ``(heads, 1, n)`` for x of shape
        ``(batch, heads, seq, n)``; ``(batch, 1, n)``, one for each of a batch. If `axis` is not trailing, the shape is
        that of the normalised axes.
    bias : array_like, optional
        Added at the end. Shape and dtype as for `weight`.
    eps : float, default 1e-6
        Added to the mean square, inside the root. Finite, not negative. Any real number, also as a 0-d array.
    p : float, default 1.0
        Fraction of each row that the root mean square is taken over: its first ``k = ceil(n * p)`` elements, where
        a rounding error in p or in the product never adds one. ``0 < p <= 1``; a number as `eps`.
    axis : int or tuple of int, default -1
        The axes that make up a row, in the order of x. A C-contiguous x is not copied if they are trailing or, on the
        CPU, adjacent and no row is longer than 65,536.
    weight_offset : float, default 0.0
        Added to `weight`: 1.0 for weights stored as the difference to one, as Gemma's are. A number as `eps`.
    dtype : {None, "float16", "bfloat16", "float32", "float64"} or dtype, optional
        Dtype of y, to which the exact result is rounded. None for that of x.
    round_xhat : bool, default False
        True rounds the normalised row to the dtype of x before `weight` and `bias`, and y once more: what the model
        code of Llama computes in 16 bits. `rms_norm_backward` gives the gradient of the function without this step.
    reduce : callable, optional
        For rows that are cut over workers, as in tensor parallelism: x has this worker's elements of each row, in any
        number, and so have the parameters. It is called once, with a new float64 array (rows, q): what these elements
        add up to, their number in one of the columns. It returns the sum of that over all workers, as an allreduce
        does: float64, of the same shape. All workers call with the same dtypes and number of rows, also none. Requires
        ``p=1``. On the CPU, NumPy computes, a few rows at a time. Where x is a device array, so are what it is called
        with and what it returns.
    out : ndarray, optional
        Where y is written: exactly the shape and dtype of y, writable, any layout. It may be x itself, and may
        overlap any argument in any other way as well.
    backend : {None, "reference", "cpu", "cuda"}, optional
        The engine. None takes "cuda" for a device array (``__cuda_array_interface__``) and "cpu" for all else. Nothing
        falls back to another engine, and no array is moved to or from a device.

    Returns
    -------
    y : ndarray
        Shape of x, and its dtype unless `dtype` is another; `out` if that was given. A Numba device array on CUDA. For
        a PyTorch tensor on the CPU it is an ndarray, too: ``torch.from_numpy(y)`` makes it a tensor without a copy.

    Raises
    ------
    TypeError
        If an array is complex, extended precision, of objects, strings or records, masked, a ``numpy.matrix`` or
        None, a tensor that requires grad, or on a device other than the CPU (see `backend` for "cuda");
        if `out` is no ndarray or has another dtype than y; if `axis` is no int; if `eps`, `p` or `weight_offset` is no
        number; if `dtype` is none of the four, or `round_xhat` no bool; if x does not lie where `backend` computes; if
        `reduce` is not callable or returns no array of float64, on the device for device arrays.
    ValueError
        If x has no axis, or no element along `axis`; if `axis` is out of range, empty or names an axis twice; if the
        shape of `weight`, `bias` or `out` does not fit; if `eps`, `p` or `weight_offset` is out of range, or
        `weight_offset` has no weight to be added to; if `out` is read-only; if no backend has that name; with `reduce`,
        if p is not 1 or `reduce` returns another shape than it was given.
    ImportError
        If what the backend needs is not installed.

    See Also
    --------
    rms_norm_backward : its gradients.
    rmsnorm_np.reference.rms_norm : the same in readable NumPy.

    Notes
    -----
    ::

        y = x / sqrt(mean(x[:k]²) + eps) · (weight_offset + weight) + bias

    Eq. 4 of Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019 (arXiv:1910.07467), with eps
    inside the root. The result is the exact one, rounded once. Largest error, in ULP of the largest term: on the CPU
    0.51 for float16, bfloat16 and float32, 1 for float64; on CUDA 0.51 for float16 and bfloat16, 2 for float32 and
    float64. No row of finite numbers overflows on the way. NaN and Inf follow the formula in their own row and reach
    no other. A row gives the same bits in any batch, layout and number of threads. With `reduce`, errors are these,
    too, where no worker's sum is more than 2³⁶ times another's; else, in float64, each worker adds up to 0.25 ULP.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import rms_norm
    >>> x = np.array([[3.0, 4.0], [30.0, 40.0]])
    >>> rms_norm(x, eps=0.0)
    array([[0.84852814, 1.13137085],
           [0.84852814, 1.13137085]])

    With a weight, and with the RMS of the first half of each row:

    >>> rms_norm(x, np.array([1.0, 10.0]), eps=0.0, p=0.5)
    array([[ 1.        , 13.33333333],
           [ 1.        , 13.33333333]])

    In float32, whatever the dtype of x:

    >>> rms_norm(x, eps=0.0, dtype="float32")
    array([[0.84852815, 1.1313709 ],
           [0.84852815, 1.1313709 ]], dtype=float32)

    In place:

    >>> rms_norm(x, out=x) is x
    True

    One weight per head and element, for x of shape (batch, heads, seq, n):

    >>> x, weight = np.ones((2, 3, 5, 4)), np.array([[1.0] * 4, [2.0] * 4, [3.0] * 4])
    >>> rms_norm(x, weight[:, None], eps=0.0)[0, :, 0, 0]
    array([1., 2., 3.])
    """
    engine = _backends.select(x, backend)
    if reduce is not None:
        engine = _backends.for_reduce(engine, reduce, p)
    if engine is reference:
        return reference.rms_norm(
            x, weight, bias, eps=eps, p=p, axis=axis, weight_offset=weight_offset, dtype=dtype, round_xhat=round_xhat,
            reduce=reduce, out=out,
        )  # fmt: skip
    call = _FORWARD, (x, None), (weight, bias, weight_offset), (out, None), eps, p, axis
    y: Array = _backends.forward(engine, RMS_NORM, call, dtype, round_xhat)[0]
    return y


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
    reduce: Reduce | None = None,
    out: GradientsOut | None = None,
    backend: str | None = None,
) -> RMSNormGrads:
    """Gradients of a loss with respect to x, weight and bias of `rms_norm`, from the gradient with respect to y.

    Nothing but x is kept from the forward pass: the root mean square is computed again.

    Parameters
    ----------
    dy : array_like
        Gradient of the loss by y. Shape of x; any of the dtypes of x, whatever that of x. The first argument: no check
        can tell dy and x in the wrong order.
    x, weight, bias, eps, p, axis, weight_offset, reduce, backend
        As given to `rms_norm`. Of `bias`, only the shape and the dtype matter here. `reduce` is called once; dweight
        and dbias are those of this worker's elements, which need no sum over workers.
    out : ndarray or tuple of ndarray or None, optional
        Where dx is written: exactly the shape and dtype of dx, writable, any layout. It may be dy or x itself, and
        may overlap any argument in any other way as well. A tuple is for ``(dx, dweight, dbias)``; None in it for a
        new array. Its arrays must not share memory with each other.

    Returns
    -------
    RMSNormGrads
        A named tuple: ``dx`` with the shape and dtype of x, ``dweight`` with those of weight, ``dbias`` with those of
        bias (float64 for a parameter of integers). ``dweight`` and ``dbias`` are None where the parameter is None.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm`; a TypeError too if `out` is a tuple of another length than three; a ValueError too if dy has
        another shape than x, if arrays of `out` share memory, or if there is one for a parameter that is None.

    See Also
    --------
    rms_norm : the forward function, with all parameters explained.
    rmsnorm_np.reference.rms_norm_backward : the same in readable NumPy.

    Notes
    -----
    With ``xhat = x · rstd`` and ``g = dy · (weight_offset + weight)``, in each row::

        c      = sum(g · xhat) / k                        over all n elements
        dx_i   = rstd · (g_i - [i < k] · xhat_i · c)
        dweight = sum(dy · xhat),  dbias = sum(dy)        over all rows that share the parameter

    Eq. 8 and 9 of Zhang and Sennrich, NeurIPS 2019, with eps, and with p in the first k elements. Largest error of
    dx, in ULP of its largest term: 0.51 on the CPU; on CUDA 0.51 for float16 and bfloat16, 2 for float32, 1.5 for
    float64. dweight and dbias are summed in float64 or more precisely on the CPU (terms of dweight are float32 where x
    has 16 bits); on CUDA in float32 over the rows of a block (float64 if any array is) and then in float64. The same
    bits for any number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import rms_norm_backward
    >>> grads = rms_norm_backward(np.array([[1.0, 0.0]]), np.array([[3.0, 4.0]]), np.ones(2), eps=0.0)
    >>> grads.dx
    array([[ 0.18101934, -0.1357645 ]])
    >>> grads.dweight
    array([0.84852814, 0.        ])
    >>> grads.dbias is None
    True

    In a loop, arrays may be used again:

    >>> grads = rms_norm_backward(np.array([[0.0, 1.0]]), np.array([[3.0, 4.0]]), np.ones(2), out=tuple(grads), eps=0.0)
    >>> grads.dweight
    array([0.        , 1.13137085])
    """
    _arguments.check_given("dy", dy)
    engine = _backends.select(x, backend)
    if reduce is not None:
        engine = _backends.for_reduce(engine, reduce, p)
    if engine is reference:
        return reference.rms_norm_backward(
            dy, x, weight, bias, eps=eps, p=p, axis=axis, weight_offset=weight_offset, reduce=reduce, out=out
        )
    call = _BACKWARD, (x, dy, None), (weight, bias, weight_offset), (out,), eps, p, axis
    return RMSNormGrads(*_backends.backward(engine, RMS_NORM_BACKWARD, call))
