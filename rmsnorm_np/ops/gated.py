"""RMSNorm with a gate, silu(gate) = gate · sigmoid(gate), as in Mamba 2: after the norm, or before it.

Of a row with n elements, k of them in the RMS, s = silu(gate), s' its derivative, W = weight_offset + weight::

    norm first     y = (x · rstd · W + bias) · s      u = x       du = dy · s
    gate first     y = u · rstd · W + bias            u = x · s   du = dy

    rstd = 1 / sqrt(sum_{i<k} u_i² / k + eps)         dweight = sum over rows of du · rstd · u
    g    = du · W                                     dbias   = sum over rows of du
    c    = rstd² · sum_i (g · u · rstd) / k           z  = g · rstd - [i < k] u · c

    norm first     dx = z                             dgate = dy · (x · rstd · W + bias) · s'
    gate first     dx = z · s                         dgate = z · x · s'
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rmsnorm_np.ops import rms
from rmsnorm_np.ops.activations import silu, silu_and_slope
from rmsnorm_np.ops.operation import Columns, Extent, Operation, Stage, Totals, scale
from rmsnorm_np.ops.primitives import (
    either,
    minus_product,
    plus,
    plus_product,
    plus_square,
    rounded,
    times,
)


class Reads(NamedTuple):
    x: Any
    gate: Any


class Writes(NamedTuple):
    y: Any


class GradientReads(NamedTuple):
    x: Any
    gate: Any
    dy: Any


class GradientWrites(NamedTuple):
    dx: Any
    dgate: Any


# ------------------------------------------------------------------------------------------------------- norm first


def enter(r: Any) -> Any:
    return r


def add_square(s: rms.Squares, e: Reads, c: Columns, m: None, inside: Any) -> rms.Squares:
    return rms.Squares(plus_square(s.squares, e.x))


def xhat(e: Any, m: Any) -> Any:
    return times(e.x, m.rstd)


def finished(e: Any, xhat: Any, c: Columns) -> Any:
    return times(rms.finished(e.x, xhat, c), silu(e.gate))


def y(e: Reads, m: rms.Rstd, c: Columns, inside: Any) -> Writes:
    return Writes(finished(e, xhat(e, m), c))


NORM_FIRST = Operation(
    "gated_rms_norm",
    Reads,
    Writes,
    enter,
    (Stage(rms.Squares, add_square, rms.rstd, True),),
    y,
    rms.extent,
)


class Sums(NamedTuple):
    squares: Any  # u²
    products: Any  # g · u


def add_products(s: Sums, e: GradientReads, c: Columns, m: None, inside: Any) -> Sums:
    squares = either(inside, plus_square(s.squares, e.x), s.squares)
    return Sums(squares, plus_product(s.products, times(times(e.dy, silu(e.gate)), scale(c)), e.x))


def gradients(e: GradientReads, m: rms.GradientNumbers, c: Columns, inside: Any) -> GradientWrites:
    value, slope = silu_and_slope(e.gate)
    normed = rms.finished(e.x, xhat(e, m), c)
    g = times(times(times(e.dy, value), m.rstd), scale(c))
    dx = either(inside, minus_product(g, e.x, m.c), g)
    return GradientWrites(dx, times(times(e.dy, slope), normed))


def share(t: Totals, e: GradientReads, m: rms.GradientNumbers) -> Totals:
    du = times(e.dy, silu(e.gate))
    return Totals(plus_product(t.dweight, times(du, m.rstd), e.x), plus(t.dbias, du))


def extent_backward(s: Sums, n: Any, k: Any, eps: Any, m: None) -> Extent:
    return rms.extent(s, n, k, eps, m)._replace(nontrivial=(rounded(s.products),))


NORM_FIRST_BACKWARD = Operation(
    "gated_rms_norm_backward",
    GradientReads,
    GradientWrites,
    enter,
    (Stage(Sums, add_products, rms.gradient_numbers),),
    gradients,
    extent_backward,
    (("x", 0.0), ("dy", 0.0)),
    share,
    linear=("dx", "dgate"),
)


# ------------------------------------------------------------------------------------------------------- gate first


def enter_gated(r: Reads) -> Any:
    return times(r.x, silu(r.gate))


GATE_FIRST = rms.RMS_NORM._replace(
    name="rms_norm_of_gated", Reads=Reads, Writes=Writes, enter=enter_gated, keep=None, singles=False
)


class Gated(NamedTuple):
    u: Any
    x: Any
    gate: Any
    dy: Any


def enter_gated_backward(r: GradientReads) -> Gated:
    return Gated(times(r.x, silu(r.gate)), r.x, r.gate, r.dy)


def add_gated_products(s: Sums, e: Gated, c: Columns, m: None, inside: Any) -> Sums:
    squares = either(inside, plus_square(s.squares, e.u), s.squares)
    return Sums(squares, plus_product(s.products, times(e.dy, scale(c)), e.u))


def gated_gradients(e: Gated, m: rms.GradientNumbers, c: Columns, inside: Any) -> GradientWrites:
    value, slope = silu_and_slope(e.gate)
    g = times(times(e.dy, m.rstd), scale(c))
    z = either(inside, minus_product(g, e.u, m.c), g)
    return GradientWrites(times(z, value), times(times(z, e.x), slope))


def gated_share(t: Totals, e: Gated, m: rms.GradientNumbers) -> Totals:
    return Totals(plus_product(t.dweight, times(e.dy, m.rstd), e.u), plus(t.dbias, e.dy))


GATE_FIRST_BACKWARD = NORM_FIRST_BACKWARD._replace(
    name="rms_norm_of_gated_backward",
    enter=enter_gated_backward,
    stages=(Stage(Sums, add_gated_products, rms.gradient_numbers),),
    leave=gated_gradients,
    share=gated_share,
)
