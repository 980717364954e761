"""Norms that round xhat to a dtype before the weight, as the code of many models does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from rmsnorm_np.ops import gated, l2, layer, rms
from rmsnorm_np.ops.operation import Columns, Operation
from rmsnorm_np.ops.primitives import in_dtype

# xhat of an element, and what becomes of it
_Y: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    rms.RMS_NORM.name: (rms.xhat, rms.finished),
    l2.L2_NORM.name: (rms.xhat, rms.finished),
    layer.LAYER_NORM.name: (layer.xhat, rms.finished),
    gated.GATE_FIRST.name: (rms.xhat, rms.finished),
    gated.NORM_FIRST.name: (gated.xhat, gated.finished),
}


@cache
def rounding_xhat(operation: Operation, dtype: str) -> Operation:
    """The same norm, its xhat rounded to this dtype. In float32 xhat would not be the exact one, rounded once."""
    xhat, finished = _Y[operation.name]

    def leave(e: Any, m: Any, c: Columns, inside: Any) -> Any:
        return operation.Writes(finished(e, in_dtype(xhat(e, m), dtype), c))

    return operation._replace(name=f"{operation.name} of {dtype}", leave=leave, singles=False)
