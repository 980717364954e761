"""RMSNorm and its gradient: arXiv:1910.07467, equations 4, 8 and 9, with eps inside the root.

Of a row h with n elements, k of them in the RMS, and g = dy · (weight_offset + weight)::

    rstd = 1 / sqrt(sum_{i<k} h_i² / k + eps)        y  = h · rstd · (weight_offset + weight) + bias
    c    = rstd² · sum_i (g · h · rstd) / k          dx = g · rstd - [i < k] h · c + dh
    dweight = sum over rows of dy · rstd · h         dbias = sum over rows of dy
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rmsnorm_np.ops.operation import (
    Columns,
    Extent,
    GradientReads,
    GradientWrites,
    Operation,
    Reads,
    Stage,
    Totals,
    Writes,
    guards,
    scale,
)
from rmsnorm_np.ops.primitives import (
    either,
    larger,
    minus_product,
    over,
    plus,
    plus_product,
    plus_square,
    reciprocal_root,
    rounded,
    scaled_and_shifted,
    times,
)


class Squares(NamedTuple):
    squares: Any


class Rstd(NamedTuple):
    rstd: Any


def enter(r: Reads) -> Any:
    return plus(r.x, r.residual)


def add_square(s: Squares, h: Any, c: Columns, m: None, inside: Any) -> Squares:
    return Squares(plus_square(s.squares, h))


def rstd(s: Any, n: Any, k: Any, eps: Any, m: None) -> Rstd:
    return Rstd(reciprocal_root(plus(over(s.squares, k), eps)))


def xhat(h: Any, m: Rstd) -> Any:
    return times(h, m.rstd)


def finished(h: Any, xhat: Any, c: Columns) -> Any:
    return scaled_and_shifted(xhat, scale(c), c.bias)


def y(h: Any, m: Rstd, c: Columns, inside: Any) -> Writes:
    return Writes(finished(h, xhat(h, m), c))


def extent(s: Any, n: Any, k: Any, eps: Any, m: None) -> Extent:
    return Extent((plus(over(rounded(s.squares), k), eps),))


RMS_NORM = Operation(
    "rms_norm", Reads, Writes, enter, (Stage(Squares, add_square, rstd, True),), y, extent, keep="h", singles=True
)


class GradientSums(NamedTuple):
    squares: Any
    products: Any  # g · x
    dy: Any = None  # the largest |dy|


class GradientNumbers(NamedTuple):
    rstd: Any
    c: Any


def enter_backward(r: GradientReads) -> GradientReads:
    return r


def add_products(s: GradientSums, e: GradientReads, c: Columns, m: None, inside: Any) -> GradientSums:
    squares = either(inside, plus_square(s.squares, e.x), s.squares)
    products = plus_product(s.products, times(e.dy, scale(c)), e.x)
    return GradientSums(squares, products, larger(s.dy, e.dy))


def gradient_numbers(s: GradientSums, n: Any, k: Any, eps: Any, m: None) -> GradientNumbers:
    rstd = reciprocal_root(plus(over(s.squares, k), eps))
    return GradientNumbers(rstd, times(times(over(times(s.products, rstd), k), rstd), rstd))


def dx(e: GradientReads, m: GradientNumbers, c: Columns, inside: Any) -> GradientWrites:
    g = times(times(e.dy, m.rstd), scale(c))
    return GradientWrites(plus(either(inside, minus_product(g, e.x, m.c), g), e.dh))


def share(t: Totals, e: GradientReads, m: GradientNumbers) -> Totals:
    return Totals(plus_product(t.dweight, times(e.dy, m.rstd), e.x), plus(t.dbias, e.dy))


def extent_backward(s: GradientSums, n: Any, k: Any, eps: Any, m: None) -> Extent:
    return extent(s, n, k, eps, m)._replace(nontrivial=(rounded(s.products),), below=guards(s.dy))


RMS_NORM_BACKWARD = Operation(
    "rms_norm_backward",
    GradientReads,
    GradientWrites,
    enter_backward,
    (Stage(GradientSums, add_products, gradient_numbers),),
    dx,
    extent_backward,
    (("x", 0.0), ("dy", 0.0)),
    share,
    singles=True,
    always=("dbias",),
    unused=("bias",),
)
