"""Derivatives of the norms along a direction: Jacobian-vector products.

Of a row with n elements, k of them in the RMS; z is x, v its direction x_dot (LayerNorm: both less their means), and
W = weight_offset + weight::

    V = sum_{i<k} v · z                               b = rstd³ · V / k
    y_dot = W · (v · rstd - z · b) + weight_dot · z · rstd + bias_dot

docs/gradient.md derives this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rmsnorm_np.ops import layer, rms
from rmsnorm_np.ops.operation import Extent, Operation, Stage, scale
from rmsnorm_np.ops.primitives import (
    constant,
    minus,
    minus_product,
    over,
    plus,
    plus_product,
    plus_square,
    rounded,
    times,
)


class Reads(NamedTuple):
    x: Any
    x_dot: Any = None


class Writes(NamedTuple):
    y_dot: Any


class Columns(NamedTuple):
    weight: Any = None
    weight_dot: Any = None
    bias_dot: Any = None
    weight_offset: Any = None


class Sums(NamedTuple):
    squares: Any  # z²
    V: Any


class Numbers(NamedTuple):
    rstd: Any
    b: Any


def added(*terms: Any) -> Any:
    """The sum of those terms that are there; pairs if one is."""
    total = None
    for term in terms:
        total = term if total is None else plus(total, term)
    return total


def direction(z: Any, v: Any, m: Any, c: Any) -> Any:
    """y_dot; v, weight_dot and bias_dot may be None."""
    along = None if v is None else times(minus_product(times(v, m.rstd), z, m.b), scale(c))
    weighted = None if c.weight_dot is None else times(times(z, m.rstd), c.weight_dot)
    found = added(along, weighted, c.bias_dot)
    return constant(0.0, rounded(z)) if found is None else found


def cubed(rstd: Any, s: Any, k: Any) -> Any:
    """rstd³ · s / k; the sum is multiplied first by what keeps it in range."""
    return times(times(over(times(s, rstd), k), rstd), rstd)


def enter(r: Any) -> Any:
    return r


def add_square(s: Sums, e: Reads, c: Columns, m: None, inside: Any) -> Sums:
    return Sums(plus_square(s.squares, e.x), plus_product(s.V, e.x_dot, e.x) if e.x_dot is not None else s.V)


def numbers(s: Sums, n: Any, k: Any, eps: Any, m: None) -> Numbers:
    (rstd,) = rms.rstd(s, n, k, eps, m)
    return Numbers(rstd, cubed(rstd, s.V, k))


def y_dot(e: Reads, m: Numbers, c: Columns, inside: Any) -> Writes:
    return Writes(direction(e.x, e.x_dot, m, c))


def extent(s: Sums, n: Any, k: Any, eps: Any, m: None) -> Extent:
    return rms.extent(s, n, k, eps, m)._replace(nontrivial=(rounded(s.V),))


RMS_NORM_JVP = Operation(
    "rms_norm_jvp",
    Reads,
    Writes,
    enter,
    (Stage(Sums, add_square, numbers, True),),
    y_dot,
    extent,
    (("x", 0.0), ("x_dot", 0.0)),
    Columns=Columns,
    scaled=("x_dot",),
)


class MeanSums(NamedTuple):
    x: Any
    x_dot: Any


class Means(NamedTuple):
    near: Any
    rest: Any
    x_dot: Any


class LayerNumbers(NamedTuple):
    near: Any
    rest: Any
    x_dot: Any
    rstd: Any
    b: Any


def add_means(s: MeanSums, e: Reads, c: Columns, m: None, inside: Any) -> MeanSums:
    return MeanSums(plus(s.x, e.x), s.x_dot if e.x_dot is None else plus(s.x_dot, e.x_dot))


def means(s: MeanSums, n: Any, k: Any, eps: Any, m: None) -> Means:
    return Means(*layer.mean(layer.Sum(s.x), n, k, eps, m), over(s.x_dot, n))


def add_centred(s: Sums, e: Reads, c: Columns, m: Means, inside: Any) -> Sums:
    v = None if e.x_dot is None else minus(e.x_dot, m.x_dot)
    V = s.V if v is None else plus_product(s.V, v, layer.centred(e.x, m))
    return Sums(plus_square(s.squares, minus(e.x, m.near)), V)


def layer_numbers(s: Sums, n: Any, k: Any, eps: Any, m: Means) -> LayerNumbers:
    rstd = layer.rstd(s, n, eps, m)
    return LayerNumbers(*m, rstd, cubed(rstd, s.V, n))


def layer_y_dot(e: Reads, m: LayerNumbers, c: Columns, inside: Any) -> Writes:
    v = None if e.x_dot is None else minus(e.x_dot, m.x_dot)
    return Writes(direction(layer.centred(e.x, m), v, m, c))


def layer_extent(s: Sums, n: Any, k: Any, eps: Any, m: Means) -> Extent:
    within, nontrivial, _ = layer.extent(s, n, k, eps, m)
    return Extent(within, (*nontrivial, rounded(s.V)))


LAYER_NORM_JVP = Operation(
    "layer_norm_jvp",
    Reads,
    Writes,
    enter,
    (Stage(MeanSums, add_means, means), Stage(Sums, add_centred, layer_numbers)),
    layer_y_dot,
    layer_extent,
    (("x", None), ("x_dot", None)),
    recentring=True,
    Columns=Columns,
    scaled=("x_dot",),
)
