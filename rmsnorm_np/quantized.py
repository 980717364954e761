"""The public function of RMSNorm in 8 bits: what a quantised matrix product takes next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmsnorm_np import _backends, _formats, _numbers, reference
from rmsnorm_np.reference import Quantized

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


def quantized_rms_norm(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    dtype: npt.DTypeLike = "int8",
    scale: npt.ArrayLike | None = None,
    scale_ub: float | None = None,
    residual: npt.ArrayLike | None = None,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: Array | None = None,
    residual_out: Array | None = None,
    backend: str | None = None,
) -> Quantized:
    """RMSNorm rounded to 8 bits, with one scale per row: q · scale is y. With a residual, of h = x + residual.

    Parameters
    ----------
    x, weight, bias, eps, p, axis, weight_offset, backend
        As in `rms_norm`.
    dtype : {"int8", "float8_e4m3fn", "float8_e5m2"}, default "int8"
        That of q, by name or as a dtype; the float8 dtypes are those of ``ml_dtypes``.
    scale : float or array_like, optional
        What y is divided by: a positive number, or an array of them of a shape that broadcasts to that of the scale
        below. By default each row's own, by which its largest magnitude becomes the largest number of `dtype`. With
        device arrays: a number, or a device array, whose values are taken as they are, without a check.
    scale_ub : float, optional
        The largest magnitude that a row's own scale is made for: larger elements saturate, so that a single outlier
        does not take the digits of all others. Positive; not with a given `scale`.
    residual : array_like, optional
        The residual stream, added to x as in `add_rms_norm`. Shape of x; any of the dtypes of x, whatever that of x.
    out : ndarray, optional
        Where q is written: exactly the shape of x and of `dtype`, writable, any layout. A device array for a float8 may
        also be one of uint8, for its bytes: ``__cuda_array_interface__`` has no name for float8.
    residual_out : ndarray, optional
        Where h is written: exactly the shape and dtype of h, writable, any layout. It may be residual or x. Only with
        a `residual`.

    Returns
    -------
    Quantized
        A named tuple: ``q`` with the shape of x, of `dtype`; ``scale``, one number per row, with the shape of x but
        length 1 along `axis`, so that ``q * scale`` broadcasts: float32, and float64 where x is float64; ``h`` with
        the shape and dtype of residual, None without one.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `rms_norm`; a TypeError too if `dtype` is none of the three, a ValueError if `scale` has a shape that does
        not broadcast or a value that is not finite and positive once rounded to its dtype, if `scale_ub` is not
        positive or given along with `scale`, if residual has another shape than x, if `residual_out` is given without
        it, or if `out` and `residual_out` share memory.

    See Also
    --------
    rms_norm : the same in x's dtype, with all parameters explained.
    add_rms_norm : the same with a residual.
    rmsnorm_np.reference.quantized_rms_norm : the same in readable NumPy.

    Notes
    -----
    ::

        y     = rms_norm(x or h, weight, bias)                not rounded
        scale = max(min(max(|y|), scale_ub) / qmax, 2**-126)  of each row, rounded to its dtype
        q     = y / scale                                     rounded, saturated

    qmax is 127 for int8, 448 for float8_e4m3fn, 57344 for float8_e5m2. y is divided by the scale that is returned, and
    the quotient is rounded once, to the nearest number of `dtype` and of two such to the even one. What is out of
    range becomes the nearest finite number of `dtype`: -128 or 127, ±448, ±57344, for infinities too. 2**-126, the
    smallest normal float32, is the scale of a row of zeros.

    h is the sum rounded to the residual's dtype, and y is the norm of the rounded h, as in `add_rms_norm`.

    A row whose y has a NaN has the scale NaN, and every q in it is NaN (0 for int8, which has none). A row whose y has
    an infinity has an infinite scale (not with `scale_ub`), so that its q are 0, and NaN (0 for int8) at the infinity.
    With a given scale, only the elements that are NaN themselves are so. No other row is affected.

    Examples
    --------
    >>> import numpy as np
    >>> from rmsnorm_np import quantized_rms_norm
    >>> x = np.array([[3.0, 4.0], [-1.0, 0.1]], np.float32)
    >>> q, scale, _ = quantized_rms_norm(x)
    >>> q
    array([[  95,  127],
           [-127,   13]], dtype=int8)
    >>> scale
    array([[0.00890843],
           [0.01108027]], dtype=float32)

    Large elements saturate:

    >>> quantized_rms_norm(x, scale_ub=1.0).q
    array([[ 108,  127],
           [-128,   18]], dtype=int8)
    """
    engine: Any = _backends.select(x, backend)
    if engine is reference:
        return reference.quantized_rms_norm(
            x, weight, bias, dtype=dtype, scale=scale, scale_ub=scale_ub, residual=residual, eps=eps, p=p, axis=axis,
            weight_offset=weight_offset, out=out, residual_out=residual_out,
        )  # fmt: skip
    q_dtype, bound = _formats.quantized_dtype(dtype), _numbers.check_scale_ub(scale_ub, scale)
    if residual is None and residual_out is not None:
        raise ValueError("residual_out is given, expected None without a residual")
    names = "x", "residual", "out", "residual_out"
    call = names, (x, residual), (weight, bias, weight_offset), (out, residual_out), eps, p, axis
    return Quantized(*engine.quantized(call, q_dtype, scale, bound))
