"""Convolution by im2col and pooling, with gradients by hand.

Images are (C, N, H, W): channels, samples, height, width. With the channels first, the convolution of many samples is
one matrix product whose result is an image again, without a transposition.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

BLOCK = 2**20  # numbers in the columns of one block of samples: 4 MB of float32 stay in a cache, 60 MB do not


def conv2d(x, W, padding=0):
    """Correlate x (C, N, H, W) with W (D, C, h, w), zeros around the image: (D, N, H', W'), H' = H + 2 padding − h + 1.

    im2col: a column holds the C·h·w pixels that one output pixel sees, so that a convolution is a product. A bias
    belongs to the norm that follows. Returns (y, cache).
    """
    D, _, h, w = W.shape
    _, N, height, width = x.shape
    shape = (D, N, height + 2 * padding - h + 1, width + 2 * padding - w + 1)
    y = np.empty(shape, np.result_type(x, W))
    for block in _blocks(y, W):
        columns = _im2col(x[:, block], h, w, padding)  # (C·h·w, nH'W') for the n samples of the block
        y[:, block] = (W.reshape(D, -1) @ columns).reshape(D, -1, *shape[2:])  # (D, n, H', W')
    return y, (x, W, padding)


def conv2d_backward(dy, cache, need_dx=True):
    """(dx, dW) from dy (D, N, H', W'); dx is None if it is not needed, as for the first layer.

    dx is a convolution too: x at p reaches y at q through W at p − q, and the correlation of dy brings it back with W
    turned by 180° and its two channel axes exchanged. The padding must be smaller than h and w.
    """
    x, W, padding = cache
    D, _, h, w = W.shape
    dW = 0
    for block in _blocks(dy, W):
        columns = _im2col(x[:, block], h, w, padding)  # (C·h·w, nH'W')
        dW = dW + dy[:, block].reshape(D, -1) @ columns.T  # (D, nH'W') · (nH'W', C·h·w)
    dW = dW.reshape(W.shape)  # (D, C, h, w)
    if not need_dx:
        return None, dW
    turned = W[:, :, ::-1, ::-1].swapaxes(0, 1)  # (C, D, h, w)
    dx, _ = conv2d(dy, turned, h - 1 - padding)  # (C, N, H, W)
    return dx, dW


def _blocks(y, W):
    """Slices of the N samples of y (D, N, H', W'): as many in each as give columns of `BLOCK` numbers, at least one."""
    N, pixels = y.shape[1], y.shape[2] * y.shape[3]
    n = max(1, BLOCK // (W[0].size * pixels))  # a sample has C·h·w · H'W' numbers in its columns
    return [slice(i, i + n) for i in range(0, N, n)]


def _im2col(x, h, w, padding):
    """(C, n, H, W) -> (C·h·w, n·H'·W')."""
    C = x.shape[0]
    if (h, w, padding) == (1, 1, 0):
        return x.reshape(C, -1)
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(x, (h, w), axis=(2, 3))  # (C, n, H', W', h, w), not copied
    columns = np.empty((C, h, w, *windows.shape[1:4]), x.dtype)  # (C, h, w, n, H', W')
    for i, j in np.ndindex(h, w):
        columns[:, i, j] = windows[..., i, j]
    return columns.reshape(C * h * w, -1)


def max_pool(x):
    """The largest of each 2 × 2 block: (C, N, H, W) -> (C, N, H//2, W//2), without an odd row or column at the end."""
    y, *others = _corners(x)  # four of (C, N, H//2, W//2)
    for corner in others:
        y = np.maximum(y, corner)
    return y, (x, y)


def max_pool_backward(dy, cache):
    """dx (C, N, H, W): dy where the largest stood (the first of equal ones), zero elsewhere."""
    x, y = cache
    dx, left = np.zeros(x.shape, dy.dtype), np.ones(y.shape, bool)
    for corner, dcorner in zip(_corners(x), _corners(dx), strict=True):  # (C, N, H//2, W//2)
        largest = (corner == y) & left
        np.multiply(dy, largest, out=dcorner)
        left &= ~largest
    return dx


def _corners(x):
    """Views of the upper left, upper right, lower left and lower right pixels of all 2 × 2 blocks of x (C, N, H, W)."""
    H, W = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return [x[:, :, i:H:2, j:W:2] for i in (0, 1) for j in (0, 1)]


def average_pool(x):
    """The mean over height and width, one row a sample: (C, N, H, W) -> (N, C)."""
    return x.mean(axis=(2, 3)).T, x.shape


def average_pool_backward(dy, shape):
    """dx (C, N, H, W) from dy (N, C)."""
    return np.broadcast_to(dy.T[:, :, None, None] / (shape[2] * shape[3]), shape)
