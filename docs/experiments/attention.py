"""Additive attention (Bahdanau) and multi-head attention (Vaswani), with gradients by hand.

A mask is boolean, True where a position may be attended to.
"""

from __future__ import annotations

import math

import numpy as np

from layers import glorot, linear, linear_backward, softmax, softmax_backward, tanh_backward

# Additive attention: score of position j for the state s: vᵀ tanh(W s + U h_j)


def additive_attention_parameters(rng, state, memory, d):
    """W (state, d), U (memory, d), b (d,), v (d,)."""
    v = glorot(rng, d, 1)[:, 0]
    return {"W": glorot(rng, state, d), "U": glorot(rng, memory, d), "b": np.zeros(d, np.float32), "v": v}


def attention_keys(h, P):
    """U h + b of every position, once a sentence: h (S, B, memory) -> (S, B, d)."""
    return linear(h, P["U"], P["b"])


def attention_keys_backward(dkeys, cache):
    """(dh, {U, b}) from dkeys (S, B, d)."""
    dh, dU, db = linear_backward(dkeys, cache)
    return dh, {"U": dU, "b": db}


def additive_scores(s, keys, P):
    """Scores (S, B) of the positions with these keys (S, B, d) for the states s (B, state). Returns (scores, cache)."""
    query = s @ P["W"]  # (B, d)
    t = np.tanh(keys + query)  # (S, B, d)
    return t @ P["v"], (s, t, P)


def additive_scores_backward(dscores, cache):
    """(ds, dkeys, {W, v}) from dscores (S, B)."""
    s, t, P = cache
    dv = np.einsum("sb,sbd->d", dscores, t)  # (d,)
    dkeys = tanh_backward(dscores[:, :, None] * P["v"], t)  # (S, B, d)
    dquery = dkeys.sum(axis=0)  # (B, d)
    return dquery @ P["W"].T, dkeys, {"W": s.T @ dquery, "v": dv}


def additive_attention(s, keys, h, P, mask=None):
    """What the states s (B, state) read from the memory h (S, B, memory), its keys (S, B, d), mask (S, B).

    Returns ((context (B, memory), weights α (S, B)), cache).
    """
    scores, cache_scores = additive_scores(s, keys, P)  # (S, B)
    alpha = softmax(scores, axis=0, mask=mask)  # (S, B)
    context = np.einsum("sb,sbm->bm", alpha, h)  # (B, memory)
    return (context, alpha), (h, alpha, cache_scores)


def additive_attention_backward(dcontext, cache, dalpha=None):
    """(ds, dkeys, dh, {W, v}) from dcontext (B, memory) and, where α itself is used, dalpha (S, B)."""
    h, alpha, cache_scores = cache
    dweights = np.einsum("bm,sbm->sb", dcontext, h)  # (S, B)
    if dalpha is not None:
        dweights = dweights + dalpha
    dh = alpha[:, :, None] * dcontext  # (S, B, memory)
    ds, dkeys, grads = additive_scores_backward(softmax_backward(dweights, alpha, axis=0), cache_scores)
    return ds, dkeys, dh, grads


# Multi-head attention: softmax(Q Kᵀ/√(d/heads)) V in each of the heads


def multi_head_attention_parameters(rng, d):
    """W_q, W_k, W_v, W_o, each (d, d)."""
    return {f"W_{name}": glorot(rng, d, d) for name in "qkvo"}


def multi_head_attention(x, memory, P, heads, mask=None):
    """Queries from x (B, T, d), keys and values from memory (B, S, d): (B, T, d).

    `mask` broadcasts to (B, heads, T, S): `padding_mask(lengths, S)`, `causal_mask(T)`, or both with &.
    """
    kv, cache_kv = keys_and_values(memory, P, heads)
    y, cache = attend(x, kv, P, mask)  # (B, T, d)
    return y, (cache, cache_kv)


def multi_head_attention_backward(dy, caches):
    """(dx, dmemory, {W_q, W_k, W_v, W_o}); for self-attention the gradient of x is dx + dmemory."""
    cache, cache_kv = caches
    dx, dkv, grads = attend_backward(dy, cache)  # (B, T, d)
    dmemory, grads_kv = keys_and_values_backward(dkv, cache_kv)  # (B, S, d)
    return dx, dmemory, {**grads, **grads_kv}


def keys_and_values(memory, P, heads):
    """(k, v), each (B, heads, S, d/heads), of memory (B, S, d): its part that needs no query."""
    k, cache_k = linear(memory, P["W_k"])  # (B, S, d)
    v, cache_v = linear(memory, P["W_v"])  # (B, S, d)
    return (_split(k, heads), _split(v, heads)), (cache_k, cache_v)


def keys_and_values_backward(dkv, caches):
    """(dmemory, {W_k, W_v}) from (dk, dv), each (B, heads, S, d/heads)."""
    (dk, dv), (cache_k, cache_v) = dkv, caches
    dmemory_k, dW_k, _ = linear_backward(_join(dk), cache_k)  # (B, S, d)
    dmemory_v, dW_v, _ = linear_backward(_join(dv), cache_v)  # (B, S, d)
    return dmemory_k + dmemory_v, {"W_k": dW_k, "W_v": dW_v}


def attend(x, kv, P, mask=None):
    """Queries from x (B, T, d), keys and values as they are: (B, T, d)."""
    k, v = kv  # (B, heads, S, d/heads)
    q, cache_q = linear(x, P["W_q"])  # (B, T, d)
    q = _split(q, k.shape[1])  # (B, heads, T, d/heads)
    scale = 1 / math.sqrt(q.shape[-1])
    alpha = softmax(q @ k.swapaxes(-1, -2) * scale, mask=mask)  # (B, heads, T, S)
    read = _join(alpha @ v)  # (B, T, d)
    y, cache_o = linear(read, P["W_o"])  # (B, T, d)
    return y, (q, k, v, alpha, scale, cache_q, cache_o)


def attend_backward(dy, cache):
    """(dx, (dk, dv), {W_q, W_o}) from dy (B, T, d)."""
    q, k, v, alpha, scale, cache_q, cache_o = cache
    dread, dW_o, _ = linear_backward(dy, cache_o)  # (B, T, d)
    dread = _split(dread, q.shape[1])  # (B, heads, T, d/heads)
    dalpha = dread @ v.swapaxes(-1, -2)  # (B, heads, T, S)
    dv = alpha.swapaxes(-1, -2) @ dread  # (B, heads, S, d/heads)
    dscores = softmax_backward(dalpha, alpha) * scale  # (B, heads, T, S)
    dq = dscores @ k  # (B, heads, T, d/heads)
    dk = dscores.swapaxes(-1, -2) @ q  # (B, heads, S, d/heads)
    dx, dW_q, _ = linear_backward(_join(dq), cache_q)  # (B, T, d)
    return dx, (dk, dv), {"W_q": dW_q, "W_o": dW_o}


def _split(x, heads):
    """(B, T, d) -> (B, heads, T, d/heads)."""
    B, T, d = x.shape
    return x.reshape(B, T, heads, d // heads).transpose(0, 2, 1, 3)


def _join(x):
    """(B, heads, T, d/heads) -> (B, T, d)."""
    B, heads, T, n = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, heads * n)


def padding_mask(lengths, S):
    """True at the first lengths[i] of S positions of sample i: (B, 1, 1, S)."""
    return (np.arange(S) < np.asarray(lengths)[:, None])[:, None, None, :]


def causal_mask(T):
    """True where a position sees another: itself and those before. (T, T)."""
    return np.tri(T, dtype=bool)
