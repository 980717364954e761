"""Layers with gradients by hand: `name(x, parameters…) -> (y, cache)` and `name_backward(dy, cache) -> gradients`.

The letters in shapes: B samples of a batch, T and S positions, m features in, d features out, V words; `...` any axes.
Every formula is analytic, so that a complex step gives its derivative, except where a branch is the point of the layer
(ReLU, max pooling).

A model keeps its parameters in one flat dict, "encoder.W_gates" and so on; `part` and `whole` cut out the dict of one
layer and put it back.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import sparse

# Dicts of parameters


def part(parameters, prefix):
    """The parameters of one layer, without its prefix: {"encoder.W": …} -> {"W": …}."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in parameters.items() if name.startswith(start)}


def whole(prefix, grads):
    """The opposite of `part`: {"W": …} -> {"encoder.W": …}."""
    return {f"{prefix}.{name}": value for name, value in grads.items()}


def add(total, grads):
    """total += grads, name by name; a name that is new is taken over. Shared parameters and time steps need it."""
    for name, value in grads.items():
        total[name] = total[name] + value if name in total else value
    return total


def glorot(rng, *shape):
    """Uniform in ±sqrt(6/(in + out)), float32; the last two axes of the shape are (in, out)."""
    limit = math.sqrt(6 / (shape[-2] + shape[-1]))
    return rng.uniform(-limit, limit, shape).astype(np.float32)


def orthogonal(rng, n, m):
    """n × m with orthonormal rows or columns, float32: for recurrent weights. Square blocks if m is a multiple of n."""
    blocks = [np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(m // n)]
    return np.concatenate(blocks, axis=1).astype(np.float32)  # (n, m)


# Embedding and linear


def embedding(ids, table):
    """Rows of table (V, m) for ids (...): (..., m)."""
    return table[ids], (ids, table.shape[0])


def embedding_backward(dy, cache):
    """dtable (V, m): the sum of dy (..., m) over the places where a word stands."""
    ids, words = cache
    places = sparse.csr_array((np.ones(ids.size, dy.dtype), (ids.ravel(), np.arange(ids.size))), (words, ids.size))
    return places @ dy.reshape(ids.size, -1)  # (V, places) · (places, m)


def linear(x, W, b=None):
    """y = x W + b for x (..., m), W (m, d), b (d,): (..., d)."""
    y = product(x, W)  # (..., d)
    return (y if b is None else y + b), (x, W, b is not None)


def linear_backward(dy, cache):
    """(dx, dW, db) from dy (..., d); db is None without a bias."""
    x, W, biased = cache
    drows = rows(dy)  # (rows, d)
    return product(dy, W.T), rows(x).T @ drows, (drows.sum(axis=0) if biased else None)


def product(x, W):
    """x W for x (..., m), W (m, d): (..., d). Of an x with more than two axes NumPy would make many small products."""
    return (rows(x) @ W).reshape(*x.shape[:-1], W.shape[1])


def rows(x):
    """(..., m) -> (rows, m)."""
    return x.reshape(-1, x.shape[-1])


# Activations. The backward functions take what the forward one returned, which is all they need.


def sigmoid(x):
    """1/(1 + exp(−x)), by way of tanh, which does not overflow."""
    return 0.5 * np.tanh(0.5 * x) + 0.5


def sigmoid_backward(dy, y):
    """dx from dy and y = sigmoid(x)."""
    return dy * y * (1 - y)


def tanh_backward(dy, y):
    """dx from dy and y = tanh(x)."""
    return dy * (1 - y * y)


def leaky_relu(x, slope=0.0):
    """x where positive, slope · x elsewhere; ReLU for slope 0. Returns (y, cache)."""
    number = x.real.dtype.type
    factor = (x.real > 0) * number(1 - slope) + number(slope)  # (...): 1 or slope
    return x * factor, factor


def leaky_relu_backward(dy, cache):
    """dx from dy."""
    return dy * cache


# Dropout


def dropout(x, rate, rng):
    """In training (rng given) set a share `rate` of x to zero and divide the others by 1 − rate. Returns (y, cache)."""
    if rng is None or rate == 0:
        return x, None
    keep = rng.random(x.shape, np.float32) >= rate  # (...)
    factor = keep * x.real.dtype.type(1 / (1 - rate))  # (...)
    return x * factor, factor


def dropout_backward(dy, cache):
    """dx from dy."""
    return dy if cache is None else dy * cache


# Softmax and cross-entropy


def softmax(x, axis=-1, mask=None):
    """exp(x)/Σ exp(x) along an axis; zero where the mask is False (equal shares if it is True nowhere)."""
    if mask is not None:
        x = np.where(mask, x, x.dtype.type(-1e9))
    e = np.exp(x - x.real.max(axis=axis, keepdims=True))  # a constant shift: it cancels
    return e / e.sum(axis=axis, keepdims=True)


def softmax_backward(dy, y, axis=-1):
    """dx from dy and y = softmax(x)."""
    return y * (dy - np.sum(dy * y, axis=axis, keepdims=True))


def softmax_cross_entropy(logits, targets, weights=None, smoothing=0.0):
    """Mean over rows of −log softmax(logits)[target]: logits (..., V), targets (...) int, weights (...) or None.

    A row counts by its weight: 0 for padding. With `smoothing` s the target distribution is 1 − s on the target plus
    s/V on every word. Returns (loss, cache); the cache's first entry is the softmax (rows, V).
    """
    V = logits.shape[-1]
    rows, targets = logits.reshape(-1, V), targets.ravel()  # (rows, V), (rows,)
    weights = np.ones(len(rows), rows.real.dtype) if weights is None else weights.ravel().astype(rows.real.dtype)
    shifted = rows - rows.real.max(axis=1, keepdims=True)  # (rows, V)
    e = np.exp(shifted)  # (rows, V)
    total = e.sum(axis=1, keepdims=True)  # (rows, 1)
    log_total = np.log(total[:, 0])  # (rows,)
    loss = log_total - (1 - smoothing) * shifted[np.arange(len(rows)), targets]  # (rows,)
    if smoothing:
        loss = loss - smoothing * shifted.mean(axis=1)  # (rows,)
    share = weights / weights.sum()  # (rows,)
    return np.sum(loss * share), (e / total, targets, share, smoothing, logits.shape)


def softmax_cross_entropy_backward(dloss, cache):
    """dlogits (..., V) from the number dloss: (softmax − target distribution) · share of the row."""
    probabilities, targets, share, smoothing, shape = cache
    dlogits = probabilities - smoothing / shape[-1] if smoothing else probabilities.copy()  # (rows, V)
    dlogits[np.arange(len(targets)), targets] -= 1 - smoothing
    dlogits *= (dloss * share)[:, None]
    return dlogits.reshape(shape)
