"""How far a result of the CUDA engine may be from the exact one: the units and terms of `tolerances`, other bounds.

float16, bfloat16: as on the CPU. float32 is computed in float32 on a GPU, float64 in float64; what roundings lose is
kept in a second number, but in the sums of float32 rows of more than 32 vectors: half an ULP for the last rounding,
and in longer rows those of the sums.
"""

from __future__ import annotations

import numpy as np
from tolerances import dx_terms, spacing

ULP = {"float16": 0.51, "bfloat16": 0.51, "float32": 2.0, "float64": 1.0}

DX_ULP = ULP | {"float64": 1.02}

# With a gate, float32 and float64: silu is a plain number, off by 3.2 ULP at most, and its derivative by 4.5 of the
# larger of its two terms (found by trying every third float32); what else is rounded, products of two plain numbers,
# adds one half or two. Of both norms' sums, terms off by so much are left as they are: not all err in one direction.
GATED_ULP = ULP | {"float32": 6.0, "float64": 6.0}
DGATE_ULP = ULP | {"float32": 8.0, "float64": 8.0}


def exact_forward(op, x, weight, bias, k, eps, offset):
    """y in longdouble, and the magnitude of the largest of its terms; x (rows, n), weight and bias (m, n)."""
    xhat, _ = _standardised(op, x, k, eps)
    scaled = xhat if weight is None else xhat * (offset + _over_rows(weight, x))
    if bias is None:
        return scaled, np.abs(scaled)
    shift = _over_rows(bias, x)
    y = scaled + shift
    return y, np.maximum(np.maximum(np.abs(scaled), np.abs(shift)), np.abs(y))


def exact_backward(op, dy, x, weight, bias, k, eps, offset):
    """dx, the magnitude of its terms, and (sum, sum of magnitudes) for dweight and dbias, all in longdouble."""
    xhat, rstd = _standardised(op, x, k, eps)
    dy = dy.astype(np.longdouble)
    g = dy if weight is None else dy * (offset + _over_rows(weight, x))
    correction = xhat * (np.sum(g * xhat, axis=-1, keepdims=True) / k)
    correction[:, k:] = 0
    if op == "layer":
        correction = correction + np.mean(g, axis=-1, keepdims=True)
    dx = (g - correction) * rstd
    sums = []
    for parameter, terms in ((weight, dy * xhat), (bias, dy)):
        shape = None if parameter is None else (-1, *parameter.shape)
        sums.append(None if shape is None else tuple(t.reshape(shape).sum(axis=0) for t in (terms, np.abs(terms))))
    return dx, dx_terms(g, xhat, rstd, k, centred=op == "layer"), *sums


def _standardised(op, x, k, eps):
    centred = x.astype(np.longdouble)
    if op == "layer":
        # The mean rounded to longdouble is not enough where x - mean cancels in float64. First the mean as x's dtype
        # has it, which is subtracted exactly from x close to it; then the mean of what is left.
        for dtype in (x.dtype, np.longdouble):
            centred = centred - np.mean(centred, axis=-1, keepdims=True).astype(dtype)
    rstd = 1 / np.sqrt(np.sum(centred[:, :k] ** 2, axis=-1, keepdims=True) / k + np.longdouble(eps))
    return centred * rstd, rstd


def _over_rows(parameter, x):
    return np.tile(parameter.astype(np.longdouble), (len(x) // len(parameter), 1))


def parameter_tolerance(exact, magnitudes, rows, work, dtype, roundings=4):
    """Half an ULP for the last rounding; each term and each addition of a block's rows round to the type inside."""
    inside = 2.0**-53 if work == np.float64 else 2.0**-24
    return 0.5 * spacing(exact, dtype) + (roundings + rows) * inside * magnitudes
