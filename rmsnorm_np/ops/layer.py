"""LayerNorm and its gradient (Ba, Kiros and Hinton, arXiv:1607.06450), with eps inside the root.

Of a row h with n elements, and g = dy · (weight_offset + weight)::

    rstd = 1 / sqrt(mean((h - mean)²) + eps)         y  = (h - mean) · rstd · (weight_offset + weight) + bias
    b = rstd · mean(g)                               c  = rstd³ · mean(g · (h - mean))
    dx = g · rstd - b - (h - mean) · c + dh
    dweight = sum over rows of dy · rstd · (h - mean),   dbias = sum over rows of dy

The mean is kept in two parts, ``near``, which the dtype of h can hold, and the ``rest``. One float64 for both would
make elements next to the mean wrong: by 2.4 ULP in float32 where h is 1e6 ± 1, by thousands in float64. But h - near is
exact there, and h - near - rest is right. Squares are taken of h - near, and their sum is corrected once a row.
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
    exceeds,
    larger,
    minus,
    minus_product,
    nearest,
    normalised,
    over,
    plus,
    plus_product,
    plus_square,
    reciprocal_root,
    rounded,
    times,
)
from rmsnorm_np.ops.rms import enter, enter_backward, finished


class Sum(NamedTuple):
    total: Any


class Mean(NamedTuple):
    near: Any
    rest: Any


def add_element(s: Sum, h: Any, c: Columns, m: None, inside: Any) -> Sum:
    return Sum(plus(s.total, h))


def mean(s: Sum, n: Any, k: Any, eps: Any, m: None) -> Mean:
    near = nearest(over(s.total, n))
    return Mean(near, over(normalised(minus_product(s.total, near, n)), n))


class Squares(NamedTuple):
    squares: Any  # (h - near)²


class Numbers(NamedTuple):
    near: Any
    rest: Any
    rstd: Any


def add_square(s: Squares, h: Any, c: Columns, m: Mean, inside: Any) -> Squares:
    return Squares(plus_square(s.squares, minus(h, m.near)))


def variance(s: Any, n: Any, m: Any) -> Any:
    return over(minus(s.squares, times(times(m.rest, m.rest), n)), n)


def rstd(s: Any, n: Any, eps: Any, m: Any) -> Any:
    return reciprocal_root(plus(variance(s, n, m), eps))


def numbers(s: Squares, n: Any, k: Any, eps: Any, m: Mean) -> Numbers:
    return Numbers(m.near, m.rest, rstd(s, n, eps, m))


def centred(h: Any, m: Any) -> Any:
    return minus(minus(h, m.near), m.rest)


def xhat(h: Any, m: Numbers) -> Any:
    return times(centred(h, m), m.rstd)


def y(h: Any, m: Numbers, c: Columns, inside: Any) -> Writes:
    return Writes(finished(h, xhat(h, m), c))


def extent(s: Any, n: Any, k: Any, eps: Any, m: Any) -> Extent:
    v = over(rounded(s.squares), n)  # up to twice the variance; in subnormal numbers h - mean is not exact
    return Extent((v + eps,), (v,))


LAYER_NORM = Operation(
    "layer_norm",
    Reads,
    Writes,
    enter,
    (Stage(Sum, add_element, mean), Stage(Squares, add_square, numbers)),
    y,
    extent,
    (("x", None),),
    keep="h",
    singles=True,
    recentring=True,
)


class GradientSums(NamedTuple):
    squares: Any  # (h - near)²
    g: Any
    products: Any  # g · (h - mean)
    dy: Any = None  # the largest |dy|


class GradientNumbers(NamedTuple):
    near: Any
    rest: Any
    rstd: Any
    b: Any
    c: Any


def add_element_backward(s: Sum, e: GradientReads, c: Columns, m: None, inside: Any) -> Sum:
    return Sum(plus(s.total, e.x))


def add_products(s: GradientSums, e: GradientReads, c: Columns, m: Mean, inside: Any) -> GradientSums:
    g = times(e.dy, scale(c))
    return GradientSums(
        plus_square(s.squares, minus(e.x, m.near)),
        plus(s.g, g),
        plus_product(s.products, g, centred(e.x, m)),
        larger(s.dy, e.dy),
    )


def gradient_numbers(s: GradientSums, n: Any, k: Any, eps: Any, m: Mean) -> GradientNumbers:
    r = rstd(s, n, eps, m)
    r = either(exceeds(n, 1.0), r, times(r, 0.0))  # one element alone: dx and dweight are 0, not some 1e-17
    b, c = times(over(s.g, n), r), times(times(over(times(s.products, r), n), r), r)
    return GradientNumbers(m.near, m.rest, r, b, c)


def dx(e: GradientReads, m: GradientNumbers, c: Columns, inside: Any) -> GradientWrites:
    g = times(times(e.dy, m.rstd), scale(c))
    return GradientWrites(plus(minus_product(minus(g, m.b), centred(e.x, m), m.c), e.dh))


def share(t: Totals, e: GradientReads, m: GradientNumbers) -> Totals:
    return Totals(plus_product(t.dweight, times(e.dy, m.rstd), centred(e.x, m)), plus(t.dbias, e.dy))


def extent_backward(s: GradientSums, n: Any, k: Any, eps: Any, m: Mean) -> Extent:
    within, nontrivial, _ = extent(s, n, k, eps, m)
    return Extent(within, (*nontrivial, rounded(s.products)), (rounded(s.g), *guards(s.dy)))


LAYER_NORM_BACKWARD = Operation(
    "layer_norm_backward",
    GradientReads,
    GradientWrites,
    enter_backward,
    (Stage(Sum, add_element_backward, mean), Stage(GradientSums, add_products, gradient_numbers)),
    dx,
    extent_backward,
    (("x", None), ("dy", 0.0)),
    share,
    singles=True,
    always=("dbias",),
    unused=("bias",),
    recentring=True,
)
