"""Convolution by im2col and pooling, with gradients by hand.

Images are (C, N, H, W): channels, samples, height, width. With the channels first, a convolution of the whole batch is
one matrix product whose result is an image again, without a transposition.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def conv2d(x, W, padding=0):
    """Correlate x (C, N, H, W) with W (D, C, h, w), zeros around the image: (D, N, H', W'), H' = H + 2 padding − h + 1.

    im2col: a column holds the C·h·w pixels that one output pixel sees, so the convolution is one product. A bias
    belongs to the norm that follows. Returns (y, cache).
    """
    D, _, h, w = W.shape
    _, N, height, width = x.shape
    columns = _im2col(x, h, w, padding)  # (C·h·w, N·H'·W')
    y = W.reshape(D, -1) @ columns  # (D, C·h·w) · (C·h·w, NH'W') -> (D, NH'W')
    return y.reshape(D, N, height + 2 * padding - h + 1, width + 2 * padding - w + 1), (columns, W, padding)


def conv2d_backward(dy, cache, need_dx=True):
    """(dx, dW) from dy (D, N, H', W'); dx is None if it is not needed, as for the first layer.

    dx is a convolution too: pixel p of x reaches output pixel q through W at p − q where the forward correlation has
    it at q − p, so W is turned by 180° and its two channel axes change places. It needs padding < h and < w.
    """
    columns, W, padding = cache
    D, h = len(W), W.shape[2]
    dW = (dy.reshape(D, -1) @ columns.T).reshape(W.shape)  # (D, NH'W') · (NH'W', C·h·w) -> (D, C, h, w)
    if not need_dx:
        return None, dW
    turned = W[:, :, ::-1, ::-1].swapaxes(0, 1)  # (C, D, h, w)
    dx, _ = conv2d(dy, turned, h - 1 - padding)  # (C, N, H, W)
    return dx, dW


def _im2col(x, h, w, padding):
    """(C, N, H, W) -> (C·h·w, N·H'·W')."""
    C = x.shape[0]
    if (h, w, padding) == (1, 1, 0):
        return x.reshape(C, -1)
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(x, (h, w), axis=(2, 3))  # (C, N, H', W', h, w), not copied
    return windows.transpose(0, 4, 5, 1, 2, 3).reshape(C * h * w, -1)


def max_pool(x):
    """The largest of each 2 × 2 block: (C, N, H, W) -> (C, N, H//2, W//2), without an odd row or column at the end."""
    y, *others = _corners(x)  # four of (C, N, H//2, W//2)
    chosen = np.zeros(y.shape, np.int8)  # (C, N, H//2, W//2): which corner, the first of equal ones
    for number, corner in enumerate(others, 1):
        larger = corner.real > y.real
        y = np.where(larger, corner, y)
        chosen[larger] = number
    return y, (chosen, x.shape)


def max_pool_backward(dy, cache):
    """dx (C, N, H, W): dy where the largest stood, zero elsewhere."""
    chosen, shape = cache
    dx = np.zeros(shape, dy.dtype)
    for number, corner in enumerate(_corners(dx)):  # (C, N, H//2, W//2)
        np.multiply(dy, chosen == number, out=corner)
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
