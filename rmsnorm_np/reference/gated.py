"""RMSNorm with a gate, and its gradients, in NumPy: see :mod:`rmsnorm_np.reference`."""

# mypy: allow-redefinition
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _arguments, _numbers
from rmsnorm_np.reference import rms
from rmsnorm_np.reference._common import GatedNormGrads, check_backend, like, rounded, widen

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


def silu(gate: Any) -> tuple[Any, Any]:
    """gate · sigmoid(gate) and its derivative. The exponential is that of -|gate|, which cannot overflow."""
    negative = gate.real < 0.0  # (..., n): no modulus, for the complex step
    e = np.exp(np.where(negative, gate, -gate))  # (..., n)
    sigmoid = np.where(negative, e, 1.0) / (1.0 + e)  # (..., n)
    return gate * sigmoid, sigmoid + gate * e / ((1.0 + e) * (1.0 + e))  # (..., n)


def forward(
    x: Any, gate: Any, w: Any, b: Any, k: int, eps: float, weight_offset: float, norm_before_gate: bool, to: Any = None
) -> Any:
    """y of x and gate (..., n); w, b and to, its through_dtype, as in `rms.forward`."""
    s, _ = silu(gate)  # (..., n)
    if norm_before_gate:
        return rms.forward(x, w, b, k, eps, weight_offset, to) * s  # (..., n)
    return rms.forward(x * s, w, b, k, eps, weight_offset, to)  # (..., n)


def backward(
    x: Any, gate: Any, dy: Any, w: Any, b: Any, k: int, eps: float, weight_offset: float, norm_before_gate: bool
) -> tuple[Any, Any, Any, Any]:
    """dx, dgate, dweight and dbias, the shapes as in `forward`."""
    s, ds = silu(gate)  # (..., n)
    if norm_before_gate:
        norm = rms.forward(x, w, b, k, eps, weight_offset)  # (..., n)
        dx, dweight, dbias = rms.backward(x, dy * s, w, b, k, eps, weight_offset)
        return dx, dy * norm * ds, dweight, dbias
    du, dweight, dbias = rms.backward(x * s, dy, w, b, k, eps, weight_offset)  # u = x * s is what is normalised
    return du * s, du * x * ds, dweight, dbias


@np.errstate(all="ignore")
def gated_rms_norm(
    x: npt.ArrayLike,
    gate: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    norm_before_gate: bool = True,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    dtype: npt.DTypeLike | None = None,
    round_xhat: bool = False,
    out: Array | None = None,
    backend: str | None = None,
) -> Array:
    """RMSNorm with a gate: `rmsnorm_np.gated_rms_norm`, in NumPy, for real and complex arrays.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.gated_rms_norm`.

    Examples
    --------
    >>> gated_rms_norm([[3.0, 4.0]], [[0.0, 100.0]], eps=0.0)
    array([[  0.        , 113.13708499]])
    """
    check_backend(backend)
    _arguments.check_given("gate", gate)
    _numbers.check_flag("norm_before_gate", norm_before_gate)
    names, dtype = ("x", "gate", "out"), _arguments.result_dtype(dtype)
    call = _arguments.Call(names, (x, gate), (weight, bias, weight_offset), (out,), eps, p, axis, dtype)
    (x, gate), (w, b, weight_offset), _, k, eps, restore = _arguments.prepare(call, complex_too=True)
    to = x.dtype if _numbers.check_flag("round_xhat", round_xhat) else None
    wide_x, wide_gate, w, b = widen(x, gate, w, b, dtype=dtype)
    y = forward(wide_x, wide_gate, w, b, k, eps, weight_offset, norm_before_gate, to)
    result: Array = restore([rounded(y, dtype or x.dtype)])[0]
    return result


@np.errstate(all="ignore")
def gated_rms_norm_backward(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    gate: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    *,
    norm_before_gate: bool = True,
    eps: float = 1e-6,
    p: float = 1.0,
    axis: int | tuple[int, ...] = -1,
    weight_offset: float = 0.0,
    out: tuple[Array | None, Array | None] | None = None,
    backend: str | None = None,
) -> GatedNormGrads:
    """Gradients of RMSNorm with a gate: `rmsnorm_np.gated_rms_norm_backward`, in NumPy, for real and complex arrays.

    `backend` must be None or "reference"; the other parameters are those of `rmsnorm_np.gated_rms_norm_backward`.

    Examples
    --------
    >>> gated_rms_norm_backward([[1.0, 0.0]], [[3.0, 4.0]], [[0.0, 100.0]], eps=0.0).dgate
    array([[0.42426407, 0.        ]])
    """
    check_backend(backend)
    _arguments.check_given("dy", dy)
    _arguments.check_given("gate", gate)
    _numbers.check_flag("norm_before_gate", norm_before_gate)
    names = "x", "gate", "dy", "out[0]", "out[1]"
    outs = _arguments.outs_of(out, ("dx", "dgate"))
    call = _arguments.Call(names, (x, gate, dy), (weight, bias, weight_offset), outs, eps, p, axis)
    (x, gate, dy), (w, b, weight_offset), _, k, eps, restore = _arguments.prepare(call, complex_too=True)
    wide_x, wide_gate, wide_dy, w, b = widen(x, gate, dy, w, b)
    dx, dgate, dweight, dbias = backward(wide_x, wide_gate, wide_dy, w, b, k, eps, weight_offset, norm_before_gate)
    dx, dgate = restore([rounded(dx, x.dtype), rounded(dgate, gate.dtype)])
    return GatedNormGrads(dx, dgate, like(weight, dweight), like(bias, dbias))
