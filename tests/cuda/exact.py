"""The operations made from the norms, in longdouble: each result with the magnitude of its largest term.

Terms are taken before they cancel; a sum over the row counts with the sum of its magnitudes. Sums over rows come with
the sums of their magnitudes. Arrays are (rows, n), columns (m, n) or None.
"""

from __future__ import annotations

import numpy as np
from bounds import _over_rows as over_rows
from bounds import _standardised as standardised

L = np.longdouble
SLOPE = 1.1  # the largest |silu'|, and of its terms
total = lambda a: np.sum(a, axis=-1, keepdims=True)  # noqa: E731


def silu(a):
    """silu and its derivative."""
    e = np.exp(-np.abs(a))
    sigmoid = np.where(a >= 0, 1, e) / (1 + e)
    return a * sigmoid, sigmoid + a * (e / (1 + e) ** 2)


def weights(weight, x, offset):
    return L(1) if weight is None else L(offset) + over_rows(weight, x)


def largest(*terms):
    return np.max(np.broadcast_arrays(*(np.abs(t) for t in terms)), axis=0)


def sums(parameter, terms):
    if parameter is None:
        return None
    return tuple(t.reshape(-1, *parameter.shape).sum(axis=0) for t in (terms, np.abs(terms)))


def gated(norm_first, x, gate, weight, bias, k, eps, offset=0.0):
    """[(y, magnitude)]"""
    x, s = x.astype(L), silu(gate.astype(L))[0]
    W, shift = weights(weight, x, offset), L(0) if bias is None else over_rows(bias, x)
    scaled = standardised("rms", x if norm_first else x * s, k, eps)[0] * W
    after = s if norm_first else L(1)
    return [((scaled + shift) * after, largest(scaled * after, shift * after))]


def gated_backward(norm_first, x, gate, dy, weight, bias, k, eps, offset=0.0):
    """[(dx, magnitude), (dgate, magnitude)], [dweight, dbias]"""
    x, gate, dy = (a.astype(L) for a in (x, gate, dy))
    s, slope = silu(gate)
    slopes = largest(slope, np.minimum(np.abs(gate), 1) * np.exp(-np.abs(gate)) + 1 / (1 + np.exp(-gate)))
    u, du = (x, dy * s) if norm_first else (x * s, dy)
    W, shift = weights(weight, x, offset), L(0) if bias is None else over_rows(bias, x)
    xhat, rstd = standardised("rms", u, k, eps)
    g, inside = du * W, np.arange(x.shape[1]) < k
    z = (g - inside * xhat * total(g * xhat) / k) * rstd
    terms = rstd * largest(g, inside * xhat * total(np.abs(g * xhat)) / k)
    totals = [sums(weight, du * xhat), sums(bias, du)]
    if norm_first:
        normed, parts = xhat * W + shift, largest(xhat * W, shift)
        return [(z, terms), (dy * normed * slope, np.abs(dy) * parts * slopes)], totals
    return [(z * s, terms * np.abs(s)), (z * x * slope, terms * np.abs(x) * slopes)], totals


class Along:
    """What both Jacobian-vector products and double backward are made of: z, v, their sums, and terms."""

    def __init__(self, op, x, v, k, eps):
        self.k, self.inside = k, np.arange(x.shape[1]) < k
        xhat, self.rstd = standardised(op, x, k, eps)
        self.z = xhat / self.rstd
        self.v = v.astype(L)
        self.v_size = np.abs(self.v)
        if op == "layer":
            self.v = self.v - np.mean(self.v, axis=-1, keepdims=True)
            self.v_size = np.maximum(self.v_size, np.mean(self.v_size, axis=-1, keepdims=True))
        products = self.inside * self.v * self.z
        self.b = self.rstd**3 * total(products) / k
        self.b_size = self.rstd**3 * total(np.abs(products)) / k

    def y_dot(self, W, along, shift):
        """Of weights along a direction, and of biases."""
        v, z, r = self.v, self.z, self.rstd
        return (
            W * (v * r - z * self.b) + along * z * r + shift,
            largest(W * self.v_size * r, W * z * self.b_size, along * z * r, shift),
        )


def jvp(op, x, x_dot, weight, weight_dot, bias_dot, k, eps, offset=0.0):
    """[(y_dot, magnitude)]"""
    a = Along(op, x, np.zeros_like(x) if x_dot is None else x_dot, k, eps)
    along, shift = (L(0) if c is None else over_rows(c, x) for c in (weight_dot, bias_dot))
    return [a.y_dot(weights(weight, x, offset), along, shift)]


def double_backward(op, x, dy, ddx, weight, ddweight, ddbias, k, eps, offset=0.0):
    """[(dx, magnitude), (ddy, magnitude)], [dweight, None]"""
    a = Along(op, x, ddx, k, eps)
    r, z, v, inside = a.rstd, a.z, a.v, a.inside
    dy, W = dy.astype(L), weights(weight, x, offset)
    along, shift = (L(0) if c is None else over_rows(c, x) for c in (ddweight, ddbias))
    g, h = dy * W, along * dy
    c, d = r**3 * total(g * z) / k, total(v * g + h * z)
    c_size = r**3 * total(np.abs(g * z)) / k
    d = r**3 / k * (d - 3 * r * r * total(g * z) * total(inside * v * z) / k)
    d_size = r**3 / k * (total(np.abs(v * g) + np.abs(h * z)) + 3 * a.b_size / r * total(np.abs(g * z)))
    g_size, h_size = np.abs(g), np.abs(h)
    if op == "layer":
        g, h = (t - np.mean(t, axis=-1, keepdims=True) for t in (g, h))
        g_size, h_size = (np.maximum(t, np.mean(t, axis=-1, keepdims=True)) for t in (g_size, h_size))
    dx = r * h - g * a.b - inside * (v * c + z * d)
    terms = largest(r * h_size, g_size * a.b_size, inside * a.v_size * c_size, inside * z * d_size)
    share = dy * (v * r - z * a.b)
    size = np.abs(dy) * largest(a.v_size * r, z * a.b_size)
    dweight = None if weight is None else tuple(t.reshape(-1, *weight.shape).sum(axis=0) for t in (share, size))
    return [(dx, terms), a.y_dot(W, along, shift)], [dweight, None]
