"""How far a result may be from the exact one, and why. Every tolerance of the tests is derived from this file.

The unit is the ULP, the distance between neighbouring numbers of the result's dtype around the exact value. A result
that is the exact one, rounded once, is off by 0.5 ULP at most.
"""

from __future__ import annotations

import numpy as np

# Bits behind the leading one, and the exponent of the smallest normal number.
_FORMATS = {"float16": (10, -14), "bfloat16": (7, -126), "float32": (23, -126), "float64": (52, -1022)}

# y, in ULP of the largest of its terms: xhat · weight, bias, and their sum y. Without a bias that is y itself.
#   float16, bfloat16  0.5 for the one rounding; float32 inside carries 13 bits more than float16: its few roundings,
#                      of xhat, of weight_offset + weight, of their product, of the sum, are below 2**-11 ULP together.
#   float32            0.5 for the rounding; float64 inside carries 29 bits more
#   float64            nothing wider to compute in on every machine: the products xhat · weight round more than once
Y_ULP = {"float16": 0.51, "bfloat16": 0.51, "float32": 0.51, "float64": 1.0}

# dx, in ULP of the largest of the terms that make it up (see `dx_terms`): the terms can cancel, and each brings the
# rounding errors of its own size. The 0.01 is room for the inner roundings, as above.
DX_ULP = {"float16": 0.51, "bfloat16": 0.51, "float32": 0.51, "float64": 0.51}

# The functions with a gate, in ULP of the largest term in float64. The others are computed in pairs, and those
# of narrower types in float64, where all this is below 0.01 ULP. But silu is a plain float64 on its way to a float64
# result. In units of 2**-53, exp(-|gate|) is off by 2 (one ULP), 1 + exp by 1, the quotient by 1, its product with gate
# by 1: 5 in all. A relative error of 2**-53 is at most one ULP of a result.
SILU = 5
# Its derivative, sigmoid + gate · sigmoid': 4 and 6 of the larger term (exp 2, 1 + exp twice, its square, the
# quotient), and 1 for their sum.
SLOPE = 11
# What a result is made from counts as often as it is in there. norm_before_gate: silu is a factor of y, and of both
# terms of dx. Otherwise it is in u = x · silu(gate), and rstd is as far off as u: xhat = u · rstd has two, a term of dx
# g · rstd · silu and one g' · u' · u · rstd³ · silu (2 and 6), to which dgate has slope in place of silu.
GATED_ULP = {
    "gated_rms_norm": {"y": SILU + 0.5},
    "gated_rms_norm after": {"y": 2 * SILU + 0.5},
    "gated_rms_norm_backward": {"dx": 2 * SILU + 0.5, "dgate": SLOPE + 0.5},
    "gated_rms_norm_backward after": {"dx": 8 * SILU + 0.5, "dgate": 6 * SILU + 2 * SLOPE + 0.5},
}

# The derivative along a direction, and those of the gradient: pairs, as dx is, and in ULP of the largest term.
DERIVATIVE_ULP = DX_ULP

# The scale of a quantised row: half an ULP for its rounding and, in float64, as much for the rounding of max |y|, whose
# ULP is up to 2**8 / 1.75 / 2**7 as large as that of the quotient by 448 = 1.75 · 2**8.
SCALE_ULP = {"float16": 0.51, "bfloat16": 0.51, "float32": 0.51, "float64": 1.08}

# How far the quotient y / scale, or xhat, that is rounded next may be off, relative, by the type it is computed in: a
# few roundings in float64; of pairs, one.
BEFORE_ROUNDING = {"float16": 2.0**-48, "bfloat16": 2.0**-48, "float32": 2.0**-48, "float64": 2.0**-52}
# With a gate so much more: on its way to float64 silu, and the rstd of x · silu; for all others the exponential and the
# reciprocal are as short as that allows, to 2**-45 and 2**-46 each.
GATE_BEFORE_ROUNDING = {"float16": 2.0**-43, "bfloat16": 2.0**-43, "float32": 2.0**-43, "float64": 10 * 2.0**-53}

# The complex step takes no difference: what is left is float64's rounding, of some ten operations and a sum of a few
# hundred terms, relative to the norm of the gradient.
COMPLEX_STEP = 1e-12

# On Windows and on macOS with ARM, longdouble is float64: no type is left to judge float64 by.
LONGDOUBLE_IS_WIDER = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant


def spacing(value, dtype):
    """The distance between neighbouring numbers of dtype, subnormal ones too, at the magnitude of value."""
    bits, smallest = _FORMATS[np.dtype(dtype).name]
    _, exponent = np.frexp(np.asarray(value, np.longdouble))  # 0.5 <= fraction < 1
    return np.ldexp(np.longdouble(1.0), np.maximum(exponent - 1, smallest) - bits)


def largest(dtype):
    """The largest finite number of dtype."""
    bits, smallest = _FORMATS[np.dtype(dtype).name]
    return np.ldexp(np.longdouble(2.0) - np.ldexp(np.longdouble(1.0), -bits), 1 - smallest)


def ulp_distance(result, exact, magnitude=0.0):
    """|result - exact| of each element in ULP of result's dtype at the larger of |exact| and magnitude.

    A NaN is at distance 0 from a NaN. Infinity is right where exact is beyond the largest number by half its ULP.
    """
    dtype = result.dtype
    result, exact = result.astype(np.longdouble), np.asarray(exact, np.longdouble)
    with np.errstate(invalid="ignore"):
        unit = spacing(np.where(np.isfinite(exact), np.maximum(np.abs(exact), magnitude), 1.0), dtype)
        distance = np.abs(result - exact) / unit
    overflow = np.abs(exact) >= largest(dtype) + spacing(largest(dtype), dtype) / 2
    distance = np.where(overflow & np.isinf(result) & (np.sign(result) == np.sign(exact)), 0.0, distance)
    distance = np.where(np.isnan(result) & np.isnan(exact), 0.0, distance)
    return np.where(np.isnan(distance), np.inf, distance)


def worst_ulp(result, exact, magnitude=0.0):
    """The largest `ulp_distance`, 0 for no elements."""
    return float(np.max(ulp_distance(result, exact, magnitude), initial=0.0))


def dx_terms(g, xhat, rstd, k, *, centred):
    """The magnitude of the largest term in dx = rstd · (g - mean(g) - xhat · c), from arrays in longdouble.

    mean(g) (LayerNorm only, `centred`) and c = sum(g · xhat) / k are sums that can cancel; their own rounding errors
    have the size of what they add up, so they count with the sum of the magnitudes.
    """
    terms = [np.abs(g), np.abs(xhat) * np.sum(np.abs(g * xhat), axis=-1, keepdims=True) / k]
    if centred:
        terms.append(np.broadcast_to(np.mean(np.abs(g), axis=-1, keepdims=True), g.shape))
    return np.abs(rstd) * np.max(terms, axis=0)


def parameter_tolerance(exact, magnitudes, rows, x_dtype, dtype, term=None):
    """The allowed |dweight - exact| or |dbias - exact|, absolute.

    Half an ULP for the final rounding to dtype (2**-13 of one more where that has 16 bits: by way of float32), and the
    error of the sum over the rows, in terms of the sum of the magnitudes of what is added: each addition in float64
    rounds by 2**-53, and each term is a product of dy with an xhat that is right to 2**-51 in float64, to 2**-21 where
    x is a 16-bit float and float32 is the type inside (rstd, two differences, two products). Such a product may be
    subnormal, as may x itself in a row that is scaled down: the smallest float64, twice for each row. In float32,
    dy · rstd is off by 2**-150 where it is subnormal, and is multiplied with an x below 2**28.

    term: another bound of the error of a term; float64 is the type inside then.
    """
    half = np.dtype(x_dtype).itemsize == 2 and term is None
    term = term or (2.0**-21 if half else 2.0**-51)
    smallest = 2 * rows * np.longdouble(2.0**-122 if half else 5e-324)
    final = 0.5 * (1 + 2.0**-12) if np.dtype(dtype).itemsize == 2 else 0.5
    return final * spacing(exact, dtype) + (term + rows * 2.0**-53) * np.asarray(magnitudes, np.longdouble) + smallest
