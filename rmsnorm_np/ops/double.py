"""The gradients of the gradients (double backward): of <ddx, dx> + <ddweight, dweight> + <ddbias, dbias>.

Of a row with n elements, k of them in the RMS; z is x, v is ddx (LayerNorm: both less their means, and [i < k] is 1),
W = weight_offset + weight::

    V = sum_{i<k} v · z      G = sum dy · W · z       D = sum (v · dy · W + ddweight · dy · z)
    b = rstd³ · V / k        c = rstd³ · G / k        d = rstd³ · (D - 3 rstd² · G · V / k) / k

    ddy     = W · (v · rstd - z · b) + ddweight · z · rstd + ddbias
    dx      = ddweight · dy · rstd - dy · W · b - [i < k] (v · c + z · d)
    dweight = sum over rows of dy · (v · rstd - z · b)

LayerNorm takes the mean off the first two terms of dx as well. docs/gradient.md derives all this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rmsnorm_np.ops import jvp, layer, rms
from rmsnorm_np.ops.jvp import cubed, direction
from rmsnorm_np.ops.operation import Extent, Operation, Stage, Totals, scale
from rmsnorm_np.ops.primitives import (
    either,
    minus,
    minus_product,
    negative,
    over,
    plus,
    plus_product,
    plus_square,
    rounded,
    times,
)


class Reads(NamedTuple):
    x: Any
    dy: Any
    ddx: Any = None


class Writes(NamedTuple):
    dx: Any
    ddy: Any


class Columns(NamedTuple):
    weight: Any = None
    ddweight: Any = None
    ddbias: Any = None
    weight_offset: Any = None


class Sums(NamedTuple):
    squares: Any
    V: Any
    G: Any
    D: Any


class Numbers(NamedTuple):
    rstd: Any
    b: Any
    c: Any
    d: Any


def as_directions(c: Columns) -> jvp.Columns:
    return jvp.Columns(c.weight, c.ddweight, c.ddbias, c.weight_offset)


def add_products(s: Any, z: Any, v: Any, dy: Any, c: Columns) -> Any:
    """The sums with one more element, but for the squares and V."""
    g = times(dy, scale(c))
    D = plus_product(plus_product(s.D, g, v), None if c.ddweight is None else times(dy, c.ddweight), z)
    return s._replace(G=plus_product(s.G, g, z), D=D)


def less(a: Any, b: Any, c: Any) -> Any:
    """a - b · c; a where a or b is None."""
    return a if a is None or b is None else minus_product(a, b, c)


def factors(rstd: Any, s: Any, k: Any) -> tuple[Any, Any, Any]:
    """b, c and d."""
    b, c = cubed(rstd, s.V, k), cubed(rstd, s.G, k)
    d = minus(cubed(rstd, s.D, k), times(times(times(b, over(times(s.G, rstd), k)), rstd), 3.0))
    return b, c, d


def add_element(s: Sums, e: Reads, c: Columns, m: None, inside: Any) -> Sums:
    squares = either(inside, plus_square(s.squares, e.x), s.squares)
    V = either(inside, plus_product(s.V, e.ddx, e.x), s.V)
    found: Sums = add_products(Sums(squares, V, s.G, s.D), e.x, e.ddx, e.dy, c)
    return found


def numbers(s: Sums, n: Any, k: Any, eps: Any, m: None) -> Numbers:
    (rstd,) = rms.rstd(s, n, k, eps, m)
    return Numbers(rstd, *factors(rstd, s, k))


def gradients(e: Reads, m: Numbers, c: Columns, inside: Any) -> Writes:
    g = times(e.dy, scale(c))
    first = None if c.ddweight is None else times(times(e.dy, m.rstd), c.ddweight)
    first = negative(times(g, m.b)) if first is None else minus_product(first, g, m.b)
    dx = either(inside, minus_product(less(first, e.ddx, m.c), e.x, m.d), first)
    return Writes(dx, direction(e.x, e.ddx, m, as_directions(c)))


def share(t: Totals, e: Reads, m: Numbers) -> Totals:
    return Totals(plus_product(t.dweight, e.dy, less(times(e.ddx, m.rstd), e.x, m.b)))


def extent(s: Sums, n: Any, k: Any, eps: Any, m: None) -> Extent:
    found = rms.extent(s, n, k, eps, m)
    return found._replace(nontrivial=(rounded(s.V), rounded(s.G)), below=(rounded(s.D),))


RMS_NORM_DOUBLE_BACKWARD = Operation(
    "rms_norm_double_backward",
    Reads,
    Writes,
    jvp.enter,
    (Stage(Sums, add_element, numbers),),
    gradients,
    extent,
    (("x", 0.0), ("dy", 0.0), ("ddx", 0.0)),
    share,
    Columns=Columns,
    scaled=("ddx",),
)


class MeanSums(NamedTuple):
    x: Any
    ddx: Any
    g: Any
    weighted: Any  # ddweight · dy


class Means(NamedTuple):
    near: Any
    rest: Any
    ddx: Any
    g: Any
    weighted: Any


class LayerNumbers(NamedTuple):
    near: Any
    rest: Any
    ddx: Any
    g: Any
    weighted: Any
    rstd: Any
    b: Any
    c: Any
    d: Any


def add_means(s: MeanSums, e: Reads, c: Columns, m: None, inside: Any) -> MeanSums:
    weighted = s.weighted if c.ddweight is None else plus_product(s.weighted, e.dy, c.ddweight)
    g = plus(s.g, e.dy) if c.weight is None else plus_product(s.g, e.dy, scale(c))
    return MeanSums(plus(s.x, e.x), plus(s.ddx, e.ddx), g, weighted)


def means(s: MeanSums, n: Any, k: Any, eps: Any, m: None) -> Means:
    return Means(*layer.mean(layer.Sum(s.x), n, k, eps, m), over(s.ddx, n), over(s.g, n), over(s.weighted, n))


def add_centred(s: Sums, e: Reads, c: Columns, m: Means, inside: Any) -> Sums:
    z, v = layer.centred(e.x, m), minus(e.ddx, m.ddx)
    squares = plus_square(s.squares, minus(e.x, m.near))
    V = plus_product(s.V, v, z)
    found: Sums = add_products(Sums(squares, V, s.G, s.D), z, v, e.dy, c)
    return found


def layer_numbers(s: Sums, n: Any, k: Any, eps: Any, m: Means) -> LayerNumbers:
    rstd = layer.rstd(s, n, eps, m)
    return LayerNumbers(*m, rstd, *factors(rstd, s, n))


def layer_gradients(e: Reads, m: LayerNumbers, c: Columns, inside: Any) -> Writes:
    z, v = layer.centred(e.x, m), minus(e.ddx, m.ddx)
    g = minus(times(e.dy, scale(c)), m.g)
    first = None if c.ddweight is None else times(minus(times(e.dy, c.ddweight), m.weighted), m.rstd)
    first = negative(times(g, m.b)) if first is None else minus_product(first, g, m.b)
    dx = minus_product(less(first, v, m.c), z, m.d)
    return Writes(dx, direction(z, v, m, as_directions(c)))


def layer_share(t: Totals, e: Reads, m: LayerNumbers) -> Totals:
    z, v = layer.centred(e.x, m), minus(e.ddx, m.ddx)
    return Totals(plus_product(t.dweight, e.dy, less(times(v, m.rstd), z, m.b)))


def layer_extent(s: Sums, n: Any, k: Any, eps: Any, m: Means) -> Extent:
    within, nontrivial, _ = layer.extent(s, n, k, eps, m)
    return Extent(within, (*nontrivial, rounded(s.V), rounded(s.G)), (rounded(s.D),))


LAYER_NORM_DOUBLE_BACKWARD = Operation(
    "layer_norm_double_backward",
    Reads,
    Writes,
    jvp.enter,
    (
        Stage(MeanSums, add_means, means),
        Stage(Sums, add_centred, layer_numbers),
    ),
    layer_gradients,
    layer_extent,
    (("x", None), ("dy", 0.0), ("ddx", None)),
    layer_share,
    recentring=True,
    Columns=Columns,
    scaled=("ddx",),
)
