"""The functions beside the norms themselves: how each is called, and what it should give, in longdouble.

Rows are (rows, n). A function's result is exact up to a bound in units of the largest of the terms that make it up;
each formula here gives both. Symbols as in docs/gradient.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import tolerances

import rmsnorm_np as rn

L = np.longdouble

# a function, and the names of its arguments in `Given`; " after": with norm_before_gate=False
ARGUMENTS = {
    "l2_norm": "x weight bias",
    "l2_norm_backward": "dy x weight bias",
    "gated_rms_norm": "x gate weight bias",
    "gated_rms_norm after": "x gate weight bias",
    "gated_rms_norm_backward": "dy x gate weight bias",
    "gated_rms_norm_backward after": "dy x gate weight bias",
    "rms_norm_jvp": "x weight bias v weight_dot bias_dot",
    "layer_norm_jvp": "x weight bias v weight_dot bias_dot",
    "rms_norm_double_backward": "v weight_dot bias_dot dy x weight bias",
    "layer_norm_double_backward": "v weight_dot bias_dot dy x weight bias",
}
HAVE_P = [op for op in ARGUMENTS if "rms" in op]


class Given(NamedTuple):
    """What the functions take. v is x_dot, or ddx; weight_dot and bias_dot are ddweight and ddbias as well."""

    x: Any
    gate: Any
    dy: Any
    v: Any
    weight: Any = None
    bias: Any = None
    weight_dot: Any = None
    bias_dot: Any = None


ROWS = ("x", "gate", "dy", "v")


def given(rng, shape, dtype, heads=()):
    """Standard normal numbers, x with a mean that LayerNorm has to take off; a gate on both sides of zero."""
    rows = rng.standard_normal((4, *shape)) * np.reshape([1, 4, 1, 1], (4, *(1,) * len(shape)))
    rows[0] += 0.5
    parameters = rng.standard_normal((4, *heads, shape[-1]))
    return Given(*(a.astype(dtype) for a in (*rows, *parameters)))


def with_heads(g):
    """The rows as (rows, heads, n), as the parameters have heads."""
    shapes = [a.shape for a in g[4:] if a is not None]
    heads = max(shapes, key=len, default=())[:-1]
    shape = -1, *heads, g.x.shape[-1]
    return g._replace(**{name: a.reshape(shape) for name, a in zip(ROWS, g, strict=False) if a is not None})


def call(op, g, module=rn, **options):
    """The results by their names."""
    name, _, after = op.partition(" ")
    if after:
        options["norm_before_gate"] = False
    result = getattr(module, name)(*(getattr(g, one) for one in ARGUMENTS[op].split()), **options)
    return result._asdict() if isinstance(result, tuple) else {"y": result}


def bound_of(op, name, dtype):
    """The largest error of a result, in ULP of its largest term."""
    if op in tolerances.GATED_ULP and dtype == np.float64:
        return tolerances.GATED_ULP[op][name]
    if "jvp" in op or "double" in op:
        return tolerances.DERIVATIVE_ULP[dtype.name]
    return (tolerances.Y_ULP if name == "y" else tolerances.DX_ULP)[dtype.name]


def k_of(op, n, p):
    return math.ceil(n * p * (1 - 2.0**-50)) if op in HAVE_P else n


def ties(name, largest, scale=None):
    """(y, scale, q): y, float64, has the largest element that is given; the others are half-way between two numbers of
    the format, times the scale, a float32: by default the one that the largest element makes.
    """
    if name == "int8":
        numbers = np.arange(-127.0, 128.0)
    else:
        codes = np.arange(256, dtype=np.uint8).view(np.dtype(name)).astype(np.float64)
        numbers = np.sort(codes[np.isfinite(codes)])
    middle = (numbers[1:] + numbers[:-1]) / 2
    if scale is None:
        scale = largest / np.float32(numbers[-1])
    scale = np.float64(np.float32(scale))
    quotients = np.append(middle, min(largest / scale, numbers[-1]))
    q = np.rint(quotients) if name == "int8" else quotients.astype(np.float32).astype(name).astype(np.float64)
    return np.append(middle * scale, np.float64(largest)), scale, q


class Exact(NamedTuple):
    """rows: results with the shape of x, each with the magnitude of its largest term; sums: of each row, what it adds
    to a gradient of a parameter, and the magnitude of what makes that up.
    """

    rows: dict[str, tuple[Any, Any]]
    sums: dict[str, tuple[Any, Any]]


def exact(op, g, eps=1e-6, p=1.0, weight_offset=0.0):
    """Of rows (rows, n) and parameters that have a row for each of them. op: of `ARGUMENTS`, or a norm itself."""
    zero = np.zeros_like(g.x, dtype=L)
    x, gate, dy, v, weight, bias, weight_dot, bias_dot = (zero if a is None else a.astype(L) for a in g)
    W = zero + 1 if g.weight is None else weight + L(weight_offset)
    n = x.shape[1]
    k = k_of(op, n, p)
    inside = np.arange(n) < k
    divisor = 1 if op.startswith("l2") else k

    def centred(a):
        return a - a.sum(axis=1, keepdims=True) / n

    if op.startswith("gated"):
        return _gated(op, (x, gate, dy, W, bias), k, eps)
    if op.startswith("layer"):
        x, v = centred(centred(x)), centred(centred(v))  # the first mean was rounded
    rstd = 1 / np.sqrt((x[:, :k] ** 2).sum(axis=1, keepdims=True) / divisor + L(eps))
    if op in ("l2_norm", "rms_norm", "layer_norm"):
        return Exact({"y": _norm(x, rstd, W, bias)}, {})
    if op in ("l2_norm_backward", "rms_norm_backward", "layer_norm_backward"):
        return _backward(x, rstd, dy, W, k, divisor, op.startswith("layer"))
    mean_of = centred if op.startswith("layer") else lambda a: a
    sums, sizes = (
        [f(a).sum(axis=1, keepdims=True) / k for a in ((v * x)[:, :k], dy * W * x, v * dy * W, weight_dot * dy * x)]
        for f in (lambda a: a, np.abs)  # sums that can cancel count with the sum of the magnitudes
    )
    (b, c, d), (b_size, c_size, d_size) = (
        (rstd**3 * V, rstd**3 * G, rstd**3 * (D + E + sign * 3 * rstd**2 * G * V))
        for (V, G, D, E), sign in ((sums, -1), (sizes, 1))
    )
    y_dot = W * (v * rstd - x * b) + weight_dot * x * rstd + bias_dot
    y_terms = _largest(W * v * rstd, W * x * b_size, weight_dot * x * rstd, bias_dot)
    if op.endswith("jvp"):
        return Exact({"y": (y_dot, y_terms)}, {})
    a, g = mean_of(weight_dot * dy), mean_of(dy * W)
    dx = a * rstd - g * b - np.where(inside, v * c + x * d, 0)
    share = dy * (v * rstd - x * b), np.abs(dy) * (np.abs(v) * rstd + np.abs(x) * b_size)
    dx_terms = _largest(a * rstd, g * b_size, v * c_size, x * d_size)
    return Exact({"ddy": (y_dot, y_terms), "dx": (dx, dx_terms)}, {"dweight": share})


def _largest(*terms):
    return np.max(np.abs(np.broadcast_arrays(*terms)), axis=0)


def _norm(u, rstd, W, bias):
    return u * rstd * W + bias, _largest(u * rstd * W, bias)


def _backward(u, rstd, du, W, k, divisor, centred=False):
    xhat, g = u * rstd, du * W
    c = (g * xhat).sum(axis=1, keepdims=True) / divisor
    mean = g.mean(axis=1, keepdims=True) if centred else 0
    dx = rstd * (g - mean - np.where(np.arange(u.shape[1]) < k, xhat * c, 0))
    terms = tolerances.dx_terms(g, xhat, rstd, divisor, centred=centred)
    return Exact({"dx": (dx, terms)}, {"dweight": (du * xhat, np.abs(du * xhat)), "dbias": (du, np.abs(du))})


def silu(gate):
    """silu(gate), its derivative, and the larger of that one's two terms."""
    e = np.exp(-np.abs(gate))
    sigmoid, slope = np.where(gate >= 0, 1, e) / (1 + e), e / (1 + e) ** 2
    return gate * sigmoid, sigmoid + gate * slope, _largest(sigmoid, gate * slope)


def _gated(op, arrays, k, eps):
    x, gate, dy, W, bias = arrays
    s, ds, ds_terms = silu(gate)
    after, backward = op.endswith("after"), "backward" in op
    u = x * s if after else x
    rstd = 1 / np.sqrt((u[:, :k] ** 2).sum(axis=1, keepdims=True) / k + L(eps))
    norm, norm_terms = _norm(u, rstd, W, bias)
    if not backward:
        return Exact({"y": (norm, norm_terms) if after else (norm * s, norm_terms * np.abs(s))}, {})
    rows, sums = _backward(u, rstd, dy if after else dy * s, W, k, k)
    dx, dx_size = rows["dx"]
    if after:
        rows = {"dx": (dx * s, dx_size * np.abs(s)), "dgate": (dx * x * ds, dx_size * np.abs(x) * ds_terms)}
    else:
        rows["dgate"] = dy * norm * ds, np.abs(dy) * norm_terms * ds_terms
    return Exact(rows, sums)
