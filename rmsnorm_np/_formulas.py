"""The formulas of both norms, once: compiled for vectors by the CPU engine and for threads by the CUDA engine.

Undecorated Python on numbers: a Python float, a NumPy scalar, a vector of the CPU engine or a CUDA register.
Notation and derivation: arXiv:1910.07467, equations 4, 8 and 9; ``k`` elements enter the RMS, LayerNorm has ``k = n``.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def reciprocal_root(total: Any, k: Any, eps: Any) -> Any:
    """rstd = 1 / sqrt(mean + eps), from the sum of k squares; eps is inside the root."""
    return 1.0 / np.sqrt(total / k + eps)


def rms_gradient(g: Any, xhat: Any, c: Any, rstd: Any) -> Any:
    """dx of RMSNorm, with g = dy * (weight_offset + weight) and c = sum(g * xhat) / k."""
    return (g - xhat * c) * rstd


def outside_gradient(g: Any, rstd: Any) -> Any:
    """dx of partial RMSNorm for the elements behind the first k, which the RMS does not see."""
    return g * rstd


def layer_gradient(g: Any, xhat: Any, b: Any, c: Any, rstd: Any) -> Any:
    """dx of LayerNorm, with b = mean(g) and c = mean(g * xhat)."""
    return (g - b - xhat * c) * rstd
