"""The formulas of both norms, once: compiled for vectors by the CPU engine and for threads by the CUDA engine.

Undecorated Python on numbers: a Python float, a NumPy scalar, a vector of the CPU engine or a CUDA register. For the
reciprocal root the CUDA engine has an instruction, and does not use the one here.

Notation and derivation: arXiv:1910.07467, equations 4, 8 and 9; ``k`` elements enter the RMS, LayerNorm has ``k = n``.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def reciprocal_root(total: Any, k: Any, eps: Any) -> Any:
    """rstd = 1 / sqrt(mean + eps), from the sum of k squares; eps is inside the root."""
    return 1.0 / np.sqrt(total / k + eps)


def rms_gradient(g: Any, x: Any, c: Any) -> Any:
    """dx of RMSNorm, from g = dy * (weight_offset + weight) and c = sum(g * xhat) / k.

    It is rstd times (g - xhat * c), and any two of the three may be given with the factor rstd: g with it, x for xhat
    and rstd**2 * c give dx; without it, for xhat and c, dx / rstd.
    """
    return g - x * c


def layer_gradient(g: Any, x: Any, b: Any, c: Any) -> Any:
    """dx of LayerNorm, with b = mean(g), c = mean(g * xhat) and x - mean for x; factors as in `rms_gradient`."""
    return g - b - x * c
