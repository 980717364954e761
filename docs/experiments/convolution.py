"""Convolution by im2col and pooling, with gradients by hand.

Images are (N, C, H, W): samples, channels, height, width.
"""

from __future__ import annotations

import numpy as np


def conv2d(x, W, padding=0):
    """Correlate x (N, C, H, W) with W (D, C, h, w), zeros around the image: (N, D, H', W'), H' = H + 2 padding − h + 1.

    im2col: column j of sample i holds the C·h·w pixels that output pixel j sees, so the convolution is one product a
    sample, and its result has the right layout at once. A bias belongs to the norm that follows. Returns (y, cache).
    """
    D, _, h, w = W.shape
    columns = _im2col(x, h, w, padding)  # (N, C·h·w, H'·W')
    y = W.reshape(D, -1) @ columns  # (D, C·h·w) · (N, C·h·w, H'W') -> (N, D, H'W')
    out_h, out_w = x.shape[2] + 2 * padding - h + 1, x.shape[3] + 2 * padding - w + 1
    return y.reshape(len(x), D, out_h, out_w), (columns, x.shape, W, padding)


def conv2d_backward(dy, cache, need_dx=True):
    """(dx, dW) from dy (N, D, H', W'); dx is None if it is not needed, as for the first layer."""
    columns, shape, W, padding = cache
    D, _, h, w = W.shape
    dy = dy.reshape(len(dy), D, -1)  # (N, D, H'W')
    dW = np.sum(dy @ columns.swapaxes(1, 2), axis=0).reshape(W.shape)  # Σ over N of (D, C·h·w)
    if not need_dx:
        return None, dW
    dcolumns = W.reshape(D, -1).T @ dy  # (N, C·h·w, H'W')
    return _col2im(dcolumns, shape, h, w, padding), dW


def _im2col(x, h, w, padding):
    """(N, C, H, W) -> (N, C·h·w, H'·W')."""
    if (h, w, padding) == (1, 1, 0):
        return x.reshape(*x.shape[:2], -1)
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    N, C, H, W = x.shape
    columns = np.empty((N, C, h, w, H - h + 1, W - w + 1), x.dtype)
    for i in range(h):
        for j in range(w):
            columns[:, :, i, j] = x[:, :, i : i + H - h + 1, j : j + W - w + 1]  # (N, C, H', W')
    return columns.reshape(N, C * h * w, -1)


def _col2im(columns, shape, h, w, padding):
    """The transpose of `_im2col`: each pixel gets the sum of what was taken from it. -> (N, C, H, W)."""
    if (h, w, padding) == (1, 1, 0):
        return columns.reshape(shape)
    N, C, H, W = shape
    out_h, out_w = H + 2 * padding - h + 1, W + 2 * padding - w + 1
    columns = columns.reshape(N, C, h, w, out_h, out_w)
    x = np.zeros((N, C, H + 2 * padding, W + 2 * padding), columns.dtype)
    for i in range(h):
        for j in range(w):
            x[:, :, i : i + out_h, j : j + out_w] += columns[:, :, i, j]  # (N, C, H', W')
    return x[:, :, padding : padding + H, padding : padding + W]


def max_pool(x):
    """The largest of each 2 × 2 block: (N, C, H, W) -> (N, C, H//2, W//2), without an odd row or column at the end."""
    N, C, H, W = x.shape
    blocks = x[:, :, : H // 2 * 2, : W // 2 * 2].reshape(N, C, H // 2, 2, W // 2, 2)
    blocks = blocks.transpose(0, 1, 2, 4, 3, 5).reshape(N, C, H // 2, W // 2, 4)
    chosen = blocks.real.argmax(axis=-1)[..., None]  # (N, C, H//2, W//2, 1): the first of equal ones
    return np.take_along_axis(blocks, chosen, axis=-1)[..., 0], (chosen, x.shape)


def max_pool_backward(dy, cache):
    """dx (N, C, H, W): dy where the largest stood, zero elsewhere."""
    chosen, (N, C, H, W) = cache
    blocks = np.zeros((*dy.shape, 4), dy.dtype)  # (N, C, H//2, W//2, 4)
    np.put_along_axis(blocks, chosen, dy[..., None], axis=-1)
    blocks = blocks.reshape(*dy.shape, 2, 2).transpose(0, 1, 2, 4, 3, 5)  # (N, C, H//2, 2, W//2, 2)
    dx = np.zeros((N, C, H, W), dy.dtype)
    dx[:, :, : H // 2 * 2, : W // 2 * 2] = blocks.reshape(N, C, H // 2 * 2, W // 2 * 2)
    return dx


def average_pool(x):
    """The mean over height and width: (N, C, H, W) -> (N, C)."""
    return x.mean(axis=(2, 3)), x.shape


def average_pool_backward(dy, shape):
    """dx (N, C, H, W) from dy (N, C)."""
    return np.broadcast_to(dy[:, :, None, None] / (shape[2] * shape[3]), shape)
