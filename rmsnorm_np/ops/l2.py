"""The L2 norm and its gradient: RMSNorm whose mean is a sum.

Of a row h with n elements, and g = dy · (weight_offset + weight)::

    rstd = 1 / sqrt(sum(h²) + eps)                   y  = h · rstd · (weight_offset + weight) + bias
    c    = rstd² · sum(g · h · rstd)                 dx = g · rstd - h · c
    dweight = sum over rows of dy · rstd · h         dbias = sum over rows of dy
"""

from __future__ import annotations

from typing import Any

from rmsnorm_np.ops import rms
from rmsnorm_np.ops.operation import Extent, Operation, Stage, guards
from rmsnorm_np.ops.primitives import constant, rounded


def numbers(s: rms.Squares, n: Any, k: Any, eps: Any, m: None) -> rms.Rstd:
    return rms.rstd(s, n, constant(1.0, n), eps, m)


def extent(s: Any, n: Any, k: Any, eps: Any, m: None) -> Extent:
    return rms.extent(s, n, constant(1.0, n), eps, m)


def gradient_numbers(s: rms.GradientSums, n: Any, k: Any, eps: Any, m: None) -> rms.GradientNumbers:
    return rms.gradient_numbers(s, n, constant(1.0, n), eps, m)


def extent_backward(s: rms.GradientSums, n: Any, k: Any, eps: Any, m: None) -> Extent:
    return extent(s, n, k, eps, m)._replace(nontrivial=(rounded(s.products),), below=guards(s.dy))


_sums, _gradient_sums = rms.RMS_NORM.stages[0], rms.RMS_NORM_BACKWARD.stages[0]

L2_NORM: Operation = rms.RMS_NORM._replace(
    name="l2_norm", stages=(Stage(_sums.Sums, _sums.add, numbers, True),), extent=extent
)
L2_NORM_BACKWARD: Operation = rms.RMS_NORM_BACKWARD._replace(
    name="l2_norm_backward",
    stages=(Stage(_gradient_sums.Sums, _gradient_sums.add, gradient_numbers),),
    extent=extent_backward,
)
