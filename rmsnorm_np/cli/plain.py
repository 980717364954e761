"""The norms as users write them in NumPy, every step in x's own dtype: what this package replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _numbers

if TYPE_CHECKING:
    from rmsnorm_np.cli.inputs import Array, Norm


def forward(norm: Norm, x: Array, weight: Array, eps: float, residual: Array | None = None) -> Any:
    """Return y, of x's shape; for RMSNorm ``x / sqrt(mean(x * x) + eps) * weight``. Where the norm adds, y and h."""
    h = x if residual is None else x + residual
    centred, root = _statistics(norm, h, eps)
    y = centred / root * weight
    return y if residual is None else (y, h)


def backward(norm: Norm, dy: Array, x: Array, weight: Array, eps: float, dh: Array | None = None) -> tuple[Any, Any]:
    """Return (dx, dweight); x is h where the norm adds."""
    centred, root = _statistics(norm, x, eps)
    xhat = centred / root  # (rows, n)
    g = dy * weight  # (rows, n)
    k = _elements(norm, x)
    inner = np.sum(g * xhat, axis=-1, keepdims=True) / k  # (rows, 1)
    if norm.centres:
        g -= np.mean(g, axis=-1, keepdims=True)
    g[:, :k] -= xhat[:, :k] * inner
    dx = g / root
    return dx if dh is None else dx + dh, np.sum(dy * xhat, axis=0)


def _statistics(norm: Norm, x: Array, eps: float) -> tuple[Array, Array]:
    """What is divided, and by what: (rows, n) and (rows, 1)."""
    if norm.centres:
        return x - np.mean(x, axis=-1, keepdims=True), np.sqrt(np.var(x, axis=-1, keepdims=True) + eps)
    head = x[:, : _elements(norm, x)]
    return x, np.sqrt(np.mean(head * head, axis=-1, keepdims=True) + eps)


def _elements(norm: Norm, x: Array) -> int:
    """How many elements of a row enter its RMS."""
    return _numbers.elements_in_rms(x.shape[1], norm.p)
