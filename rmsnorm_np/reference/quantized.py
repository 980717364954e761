"""RMSNorm in 8 bits, in NumPy: see :mod:`rmsnorm_np.reference`."""

# mypy: allow-redefinition
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _arguments, _formats, _numbers, _overlap
from rmsnorm_np.ops.quantized import FORMATS, SMALLEST_SCALE, Format
from rmsnorm_np.reference import rms
from rmsnorm_np.reference._common import Quantized, added, check_backend, widen

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


def row_scale(magnitude: Any, scale_ub: float, largest: float, dtype: np.dtype[Any]) -> Any:
    """The scale of each row, by which its largest magnitude (..., 1) becomes the format's largest number."""
    scale = np.minimum(magnitude, scale_ub) / largest  # (..., 1)
    return np.maximum(scale, SMALLEST_SCALE).astype(dtype)  # (..., 1): not 0, where the row is


def quantize(y: Any, scale: Any, to: Format) -> Any:
    """y / scale, rounded to the nearest number of the format, of two the even one, and saturated."""
    v = y / scale.astype(y.dtype)  # (..., n) / (..., 1)
    _, exponent = np.frexp(v)  # (..., n): 2**(exponent - 1) <= |v| < 2**exponent
    unit = np.ldexp(y.dtype.type(1.0), np.maximum(exponent - 1, to.exponent) - to.bits)  # (..., n)
    q = np.clip(np.rint(v / unit) * unit, to.lowest, to.highest)  # (..., n)
    return np.where(np.isnan(q), np.nan if to.has_nan else 0.0, q)  # (..., n): a NaN without a sign


@np.errstate(all="ignore")
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
    """RMSNorm in 8 bits: `rmsnorm_np.quantized_rms_norm`, in NumPy.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.quantized_rms_norm`.

    Examples
    --------
    >>> quantized_rms_norm([[3.0, 4.0]]).q
    array([[ 95, 127]], dtype=int8)
    """
    check_backend(backend)
    q_dtype = _formats.quantized_dtype(dtype)
    to = FORMATS[q_dtype.name]
    scale_ub = _numbers.check_scale_ub(scale_ub, scale)
    if residual is None and residual_out is not None:
        raise ValueError("residual_out is given, expected None without a residual")
    names = "x", "residual", "out", "residual_out"
    parameters, outs = (weight, bias, weight_offset), (None, residual_out)
    call = _arguments.Call(names, (x, residual), parameters, outs, eps, p, axis)
    (rows, residual), (w, b, weight_offset), _, k, eps, restore = _arguments.prepare(call)
    shape = _arguments.as_array("x", x).shape
    per_row, scale_dtype = _formats.scale_shape(shape, axis), _formats.scale_dtype(rows.dtype)
    scale = _formats.check_scale(scale, per_row, scale_dtype)
    wanted = None if out is None else _arguments.check_out("out", out, shape, q_dtype)
    _overlap.check_apart("out", wanted, "residual_out", residual_out)

    h = None if residual is None else added(rows, residual)  # (..., n), rounded to the residual's dtype
    wide, w, b = widen(rows if h is None else h, w, b)
    y = rms.forward(wide, w, b, k, eps, weight_offset)  # (..., n)
    if scale is None:
        magnitude = np.max(np.abs(y), axis=-1, keepdims=True)  # (..., 1): NaN where the row has one
        scale = row_scale(magnitude, scale_ub, to.largest, scale_dtype).reshape(per_row)
    scale = np.array(np.broadcast_to(scale, per_row))  # one number per row
    q, h = restore([quantize(y, scale.reshape(*y.shape[:-1], 1), to).astype(q_dtype), h])
    if wanted is not None:
        np.copyto(wanted, q)
    return Quantized(q if out is None else out, scale, h)
