"""Norms that round xhat to a dtype before the weight, as the code of many models does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from rmsnorm_np.ops import layer, rms
from rmsnorm_np.ops.operation import Columns, Operation, Writes, scale
from rmsnorm_np.ops.primitives import in_dtype, scaled_and_shifted

_XHAT: dict[str, Callable[[Any, Any], Any]] = {rms.RMS_NORM.name: rms.xhat, layer.LAYER_NORM.name: layer.xhat}


@cache
def rounding_xhat(operation: Operation, dtype: str) -> Operation:
    """The same norm, its xhat rounded to this dtype. In float32 xhat would not be the exact one, rounded once."""
    xhat = _XHAT[operation.name]

    def y(h: Any, m: Any, c: Columns, inside: Any) -> Writes:
        return Writes(scaled_and_shifted(in_dtype(xhat(h, m), dtype), scale(c), c.bias))

    return operation._replace(name=f"{operation.name}_of_{dtype}", leave=y, singles=False)
