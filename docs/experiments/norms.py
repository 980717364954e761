"""The paper's normalisations behind one name: `norm` forward, `norm_backward` backward.

For the summed inputs a of a layer, row by row, with the paper's gain g and bias b::

    none    y = a + b
    layer   y = (a − μ)/σ · g + b          μ, σ: mean and standard deviation of the row
    rms     y = a/RMS(a) · g + b           RMS(a) = sqrt((1/n) Σ a²)                       (equation 4)
    prms    the same with RMS of the first k = ⌈n·p⌉ elements; all n are divided by it
    l2      y = a/‖a‖ · g + b
    batch   y = (a − μ)/σ · g + b          μ, σ: of each column, over the batch
    weight  y = a + b                      the weights were normalised instead: `weight_norm`

eps is added inside every root. `fused=True` calls rmsnorm_np's kernels; `fused=False` does what the frameworks of the
paper's experiments did: one array operation after the other, in the array's own dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

import rmsnorm_np as rn

KINDS = ("none", "layer", "rms", "prms", "l2", "batch", "weight")
GAINED = ("layer", "rms", "prms", "l2", "batch")  # those with a gain for each element
MOMENTUM = 0.05  # weight of a batch in the running statistics of BatchNorm


class Norm(NamedTuple):
    """Which normalisation, and how it is computed."""

    kind: str = "none"
    fused: bool = True
    p: float = 0.0625  # the paper's for text; 0.125 for images
    eps: float = 1e-6
    training: bool = True  # BatchNorm: statistics of this batch; False: the running ones


class NormGrads(NamedTuple):
    """Gradients of one norm; None where the parameter was not given."""

    da: np.ndarray
    dg: np.ndarray | None
    db: np.ndarray | None


def norm(how, a, g=None, b=None, running=None):
    """Normalise the rows of a (..., n); g and b are (n,) or None. Returns (y, cache).

    `running` (2, n) holds BatchNorm's running mean and variance: updated in place in training, used in evaluation.
    """
    if how.kind in ("none", "weight"):
        return (a if b is None else a + b), (how, None, None, b)
    if how.kind == "batch":
        return _batch(how, a, g, b, running)
    if how.kind not in KINDS:
        raise ValueError(f"kind is {how.kind!r}, expected one of {', '.join(KINDS)}")
    return _fused(how, a, g, b) if how.fused else _separate(how, a, g, b)


def norm_backward(dy, cache):
    """Gradients of `norm` from dy (..., n)."""
    how, _, _, b = cache
    if how.kind in ("none", "weight"):
        return NormGrads(dy, None, _sum_rows(dy, b))
    if how.kind == "batch":
        return _batch_backward(dy, cache)
    return _fused_backward(dy, cache) if how.fused else _separate_backward(dy, cache)


# Fused: the library's kernels, one pass over memory


def _fused(how, a, g, b):
    n = a.shape[-1]
    if how.kind == "layer":
        y = rn.layer_norm(a, g, b, eps=how.eps)  # (..., n)
    elif how.kind == "l2":  # a/sqrt(Σ a² + eps) = a/sqrt(mean(a²) + eps/n) / √n
        y = rn.rms_norm(a, _over_root(g, a), b, eps=how.eps / n)  # (..., n)
    else:
        y = rn.rms_norm(a, g, b, eps=how.eps, p=how.p if how.kind == "prms" else 1.0)  # (..., n)
    return y, (how, a, g, b)


def _fused_backward(dy, cache):
    how, a, g, b = cache
    n = a.shape[-1]
    if how.kind == "layer":
        return NormGrads(*rn.layer_norm_backward(dy, a, g, b, eps=how.eps))
    if how.kind == "l2":
        da, dg, db = rn.rms_norm_backward(dy, a, _over_root(g, a), b, eps=how.eps / n)
        return NormGrads(da, None if g is None else dg / math.sqrt(n), db)
    return NormGrads(*rn.rms_norm_backward(dy, a, g, b, eps=how.eps, p=how.p if how.kind == "prms" else 1.0))


def _over_root(g, a):
    """g/√n (n,), with g = 1 where there is none."""
    n = a.shape[-1]
    return (np.ones(n, a.dtype) if g is None else g) / math.sqrt(n)


# Separate: one array operation a line, as in the paper's frameworks


def _separate(how, a, g, b):
    n = a.shape[-1]
    if how.kind == "layer":
        mean = np.mean(a, axis=-1, keepdims=True)  # (..., 1)
        a = a - mean  # (..., n)
    size = _size(how, n)
    square = a[..., : size.k] * a[..., : size.k]  # (..., k)
    total = np.sum(square, axis=-1, keepdims=True)  # (..., 1)
    average = total / size.divisor  # (..., 1)
    scale = 1 / np.sqrt(average + how.eps)  # (..., 1)  1/σ, 1/RMS(a) or 1/‖a‖
    ahat = a * scale  # (..., n)
    y = ahat if g is None else ahat * g  # (..., n) * (n,)
    y = y if b is None else y + b  # (..., n) + (n,)
    return y, (how, (ahat, scale), g, b)


def _separate_backward(dy, cache):
    how, (ahat, scale), g, b = cache
    size = _size(how, ahat.shape[-1])
    dg = None if g is None else _sum_rows(dy * ahat, g)  # (n,)
    dahat = dy if g is None else dy * g  # (..., n)
    c = np.sum(dahat * ahat, axis=-1, keepdims=True) / size.divisor  # (..., 1)
    da = dahat - ahat * c if size.k == ahat.shape[-1] else _first(size.k, dahat, ahat, c)  # (..., n)
    if how.kind == "layer":
        da = da - np.mean(dahat, axis=-1, keepdims=True)  # (..., n): as μ depends on every element
    return NormGrads(da * scale, dg, _sum_rows(dy, b))


class _Size(NamedTuple):
    k: int  # elements in the sum of squares
    divisor: int  # of that sum


def _size(how, n):
    if how.kind == "prms":
        k = math.ceil(n * how.p * (1 - 2.0**-50))  # a rounding error in n·p adds no element
        return _Size(k, k)
    return _Size(n, 1 if how.kind == "l2" else n)


def _first(k, dahat, ahat, c):
    """pRMSNorm: the correction reaches the first k elements only, because only those enter the RMS."""
    da = dahat.copy()  # (..., n)
    da[..., :k] -= ahat[..., :k] * c  # (..., k) * (..., 1)
    return da


def _sum_rows(dy, parameter):
    """Sum dy (..., n) over its rows, (n,), for a parameter that was given."""
    return None if parameter is None else dy.reshape(-1, dy.shape[-1]).sum(axis=0)


# BatchNorm: every column over the batch


def _batch(how, a, g, b, running):
    rows = a.reshape(-1, a.shape[-1])  # (rows, n)
    if how.training or running is None:
        mean = np.mean(rows, axis=0)  # (n,)
        variance = np.mean((rows - mean) ** 2, axis=0)  # (n,)
        if running is not None:
            running += MOMENTUM * (np.stack([mean.real, variance.real]) - running)  # (2, n)
    else:
        mean, variance = running  # (n,), (n,)
    scale = 1 / np.sqrt(variance + how.eps)  # (n,)
    ahat = (a - mean) * scale  # (..., n)
    y = ahat if g is None else ahat * g  # (..., n)
    return (y if b is None else y + b), (how, (ahat, scale), g, b)


def _batch_backward(dy, cache):
    """In training only: in evaluation the mean and variance are constants and nothing is trained."""
    _, (ahat, scale), g, b = cache
    rows = ahat.size // ahat.shape[-1]
    dg = _sum_rows(dy * ahat, ahat)  # (n,)
    db = _sum_rows(dy, ahat)  # (n,)
    da = (dy - db / rows - ahat * dg / rows) * (scale if g is None else g * scale)  # (..., n)
    return NormGrads(da, None if g is None else dg, None if b is None else db)


# WeightNorm: normalises V, whatever it is multiplied with


def weight_norm(V, g):
    """w = V/‖V‖ · g for each output, the first axis: V (out, ...), g (out,). Returns (W, cache)."""
    rows = V.reshape(len(V), -1)  # (out, in)
    scale = 1 / np.sqrt(np.sum(rows * rows, axis=1, keepdims=True))  # (out, 1)
    vhat = rows * scale  # (out, in)
    return (vhat * g[:, None]).reshape(V.shape), (vhat, scale, g)


def weight_norm_backward(dW, cache):
    """Gradients (dV, dg) of `weight_norm` from dW (out, ...)."""
    vhat, scale, g = cache
    dw = dW.reshape(vhat.shape)  # (out, in)
    dg = np.sum(dw * vhat, axis=1)  # (out,)
    dV = (dw - vhat * dg[:, None]) * scale * g[:, None]  # (out, in)
    return dV.reshape(dW.shape), dg


# Images: statistics over height and width, per sample and channel; gain and bias per channel


def channel_norm(how, a, g=None, b=None, running=None):
    """`norm` for a (C, N, H, W) with g and b (C,): over H, W; BatchNorm over N, H, W. Returns (y, cache)."""
    C, N, H, W = a.shape
    if how.kind == "batch":
        y, cache = norm(how, a.reshape(C, N * H * W).T, g, b, running)  # (NHW, C), a view
        return y.T.reshape(a.shape), (cache, None, None)
    ahat, cache = norm(how, a.reshape(C, N, H * W))  # (C, N, HW)
    ahat = ahat.reshape(a.shape)  # (C, N, H, W)
    y = ahat if g is None or how.kind not in GAINED else ahat * _by_channel(g)  # (C, N, H, W) * (C, 1, 1, 1)
    return (y if b is None else y + _by_channel(b)), (cache, (ahat, how.kind in GAINED and g is not None, g), b)


def channel_norm_backward(dy, cache):
    """Gradients of `channel_norm` from dy (C, N, H, W)."""
    inner, saved, b = cache
    C, N, H, W = dy.shape
    if saved is None:
        da, dg, db = norm_backward(dy.reshape(C, N * H * W).T, inner)  # (NHW, C)
        return NormGrads(da.T.reshape(dy.shape), dg, db)
    ahat, gained, g = saved
    db = None if b is None else dy.sum(axis=(1, 2, 3))  # (C,)
    dg = np.sum(dy * ahat, axis=(1, 2, 3)) if gained else None  # (C,)
    dahat = dy * _by_channel(g) if gained else dy  # (C, N, H, W)
    return NormGrads(norm_backward(dahat.reshape(C, N, H * W), inner).da.reshape(dy.shape), dg, db)


def _by_channel(parameter):
    """(C,) -> (C, 1, 1, 1)."""
    return parameter[:, None, None, None]


# Parameters of a norm, under its name in a layer's dict


def norm_parameters(how, name, n, bias=True, gain=1.0):
    """Gain g = `gain` where the kind has one, bias b = 0, and BatchNorm's running statistics: {name.g, name.b, …}."""
    parameters = {f"{name}.g": np.full(n, gain, np.float32)} if how.kind in GAINED else {}
    if bias:
        parameters[f"{name}.b"] = np.zeros(n, np.float32)
    if how.kind == "batch":
        parameters[f"{name}.running"] = np.stack([np.zeros(n), np.ones(n)]).astype(np.float32)  # has no gradient
    return parameters


def named_norm(how, a, P, name):
    """`norm` with the parameters that a layer's dict P has under this name."""
    return norm(how, a, P.get(f"{name}.g"), P.get(f"{name}.b"), P.get(f"{name}.running"))


def named_norm_backward(dy, cache, name):
    """(da, {name.g: dg, name.b: db}) of `named_norm`."""
    grads = norm_backward(dy, cache)
    named = {f"{name}.g": grads.dg, f"{name}.b": grads.db}
    return grads.da, {key: value for key, value in named.items() if value is not None}
