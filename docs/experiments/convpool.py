"""ConvPool-CNN-C (Springenberg and others, 2015), a convolutional network for images, as in WeightNorm's paper.

    input noise; 3 × conv 3×3 of 96; max pool, dropout; 3 × conv 3×3 of 192; max pool, dropout;
    conv 3×3 of 192 without padding; 2 × conv 1×1 of 192; average over height and width; dense 10; softmax

Each convolution is followed by a norm, with statistics over height and width for each sample and channel, and a leaky
ReLU; the dense layer by a norm over its outputs. BatchNorm's statistics are over the samples too; WeightNorm normalises
the weights instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

import data
from convolution import (
    average_pool,
    average_pool_backward,
    conv2d,
    conv2d_backward,
    max_pool,
    max_pool_backward,
)
from layers import (
    dropout,
    dropout_backward,
    leaky_relu,
    leaky_relu_backward,
    linear,
    linear_backward,
    part,
    softmax_cross_entropy,
    softmax_cross_entropy_backward,
    whole,
)
from norms import (
    Norm,
    channel_norm,
    channel_norm_backward,
    named_norm,
    named_norm_backward,
    norm_parameters,
    weight_norm,
    weight_norm_backward,
)
from optim import falling

METRIC = "error"
NORMS = ("none", "layer", "rms", "prms", "batch", "weight")
EXPERIMENTS = tuple({"norm": kind} for kind in NORMS)
RMS = Norm("rms", p=0.125)
SLOPE = 0.1  # of the leaky ReLU


@dataclass(frozen=True)
class Config:
    """Sizes and settings; the defaults are the paper's."""

    norm: Norm = RMS
    channels: int = 3
    image: int = 32  # height and width
    width: int = 96  # channels of the first three convolutions; the others have twice as many
    classes: int = 10
    noise: float = 0.15  # standard deviation of what is added to the input in training
    dropout: float = 0.5
    batch: int = 100
    learning_rate: float = 3e-3
    decay_from: float = 0.5  # share of the steps after which the learning rate falls linearly, to zero
    clip: float | None = None
    steps: int = 100_000  # 200 epochs
    evaluate_every: int = 500


SIZES = {
    "paper": Config(),
    "small": Config(channels=1, image=28, width=24, dropout=0.2, steps=720, evaluate_every=90),  # 8 epochs
}


class Images(NamedTuple):
    """Pictures and their classes: a batch, or a whole part of the data."""

    x: np.ndarray  # (channels, N, H, W)
    y: np.ndarray  # (N,)


class Convolution(NamedTuple):
    """One convolution: its parameters' name and shape, and whether a pooling follows."""

    name: str
    inputs: int
    outputs: int
    size: int = 3
    padding: int = 1
    pooled: bool = False


def convolutions(config):
    """The nine convolutions in their order."""
    w = config.width
    return (
        Convolution("conv1", config.channels, w),
        Convolution("conv2", w, w),
        Convolution("conv3", w, w, pooled=True),
        Convolution("conv4", w, 2 * w),
        Convolution("conv5", 2 * w, 2 * w),
        Convolution("conv6", 2 * w, 2 * w, pooled=True),
        Convolution("conv7", 2 * w, 2 * w, padding=0),
        Convolution("conv8", 2 * w, 2 * w, size=1, padding=0),
        Convolution("conv9", 2 * w, 2 * w, size=1, padding=0),
    )


# Parameters


def init(config, rng):
    """All parameters, float32, in one dict. W (out, in, …) is drawn after He and others; for WeightNorm g is ‖W‖."""
    shapes = {conv.name: (conv.outputs, conv.inputs, conv.size, conv.size) for conv in convolutions(config)}
    shapes["dense"] = (config.classes, 2 * config.width)
    P = {}
    for name, shape in shapes.items():
        W = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        P |= {f"{name}.W": W, **norm_parameters(config.norm, name, shape[0])}
        if config.norm.kind == "weight":
            P[f"{name}.g"] = np.sqrt(np.sum(W * W, axis=tuple(range(1, W.ndim))))  # (out,)
    return P


def learning_rate(config, step):
    """Constant, then falling linearly to zero at the end."""
    return config.learning_rate * falling(step, config.steps, config.decay_from)


# Layers


def weights(layer, how):
    """(W, cache) of a layer: the parameter itself, or V/‖V‖ · g with V the parameter for WeightNorm."""
    return weight_norm(layer["W"], layer["g"]) if how.kind == "weight" else (layer["W"], None)


def weights_backward(dW, cache):
    """The layer's gradients from dW (out, in, …)."""
    if cache is None:
        return {"W": dW}
    dV, dg = weight_norm_backward(dW, cache)
    return {"W": dV, "g": dg}


def convolve(x, layer, padding, how):
    """leaky ReLU(norm(W ∗ x)): x (C, N, H, W) -> (D, N, H', W'), cache."""
    W, cache_weights = weights(layer, how)  # (D, C, h, w)
    a, cache_conv = conv2d(x, W, padding)  # (D, N, H', W')
    v, cache_norm = channel_norm(how, a, layer.get("g"), layer.get("b"), layer.get("running"))  # (D, N, H', W')
    y, cache_relu = leaky_relu(v, SLOPE)  # (D, N, H', W')
    return y, (cache_weights, cache_conv, cache_norm, cache_relu)


def convolve_backward(dy, cache, need_dx=True):
    """(dx (C, N, H, W) or None, the layer's gradients) from dy (D, N, H', W')."""
    cache_weights, cache_conv, cache_norm, cache_relu = cache
    dv = leaky_relu_backward(dy, cache_relu)  # (D, N, H', W')
    da, dg, db = channel_norm_backward(dv, cache_norm)  # (D, N, H', W'), (D,), (D,)
    dx, dW = conv2d_backward(da, cache_conv, need_dx)  # (C, N, H, W), (D, C, h, w)
    return dx, {**({} if dg is None else {"g": dg}), "b": db, **weights_backward(dW, cache_weights)}


def dense(x, P, how):
    """norm(x Wᵀ): x (N, m) -> (N, classes), cache. W is (classes, m), as in a convolution of size 1."""
    W, cache_weights = weights(part(P, "dense"), how)  # (classes, m)
    a, cache_linear = linear(x, W.T)  # (N, classes)
    y, cache_norm = named_norm(how, a, P, "dense")  # (N, classes)
    return y, (cache_weights, cache_linear, cache_norm)


def dense_backward(dy, cache):
    """(dx (N, m), the layer's gradients) from dy (N, classes)."""
    cache_weights, cache_linear, cache_norm = cache
    da, grads = named_norm_backward(dy, cache_norm, "dense")  # (N, classes)
    dx, dW, _ = linear_backward(da, cache_linear)  # (N, m), (m, classes)
    return dx, {**grads, **whole("dense", weights_backward(dW.T, cache_weights))}


# Network


def forward(P, x, config, rng=None):
    """Logits (N, classes) for x (channels, N, H, W), and cache. With `rng`, input noise and dropout."""
    if rng is not None:
        x = x + x.dtype.type(config.noise) * rng.standard_normal(x.shape, np.float32)  # (channels, N, H, W)
    caches = []
    for conv in convolutions(config):
        x, cache = convolve(x, part(P, conv.name), conv.padding, config.norm)  # (outputs, N, H', W')
        cache_pool = cache_dropout = None
        if conv.pooled:
            x, cache_pool = max_pool(x)  # (outputs, N, H'//2, W'//2)
            x, cache_dropout = dropout(x, config.dropout, rng)
        caches.append((conv, cache, cache_pool, cache_dropout))
    features, cache_average = average_pool(x)  # (N, 2w)
    logits, cache_dense = dense(features, P, config.norm)  # (N, classes)
    return logits, (caches, cache_average, cache_dense)


def backward(dlogits, cache):
    """Gradients of all parameters from dlogits (N, classes)."""
    caches, cache_average, cache_dense = cache
    dfeatures, grads = dense_backward(dlogits, cache_dense)  # (N, 2w)
    dx = average_pool_backward(dfeatures, cache_average)  # (2w, N, H, W)
    for conv, cache_conv, cache_pool, cache_dropout in reversed(caches):
        if conv.pooled:
            dx = max_pool_backward(dropout_backward(dx, cache_dropout), cache_pool)  # (outputs, N, H', W')
        dx, layer = convolve_backward(dx, cache_conv, need_dx=conv is not caches[0][0])  # (inputs, N, H, W)
        grads |= whole(conv.name, layer)
    return grads


def loss_and_gradients(P, batch, config, rng=None):
    """(mean cross-entropy, gradients, {"error": percent of the batch}). With `rng`, input noise and dropout."""
    logits, cache = forward(P, batch.x, config, rng)  # (N, classes)
    loss, cache_loss = softmax_cross_entropy(logits, batch.y)
    grads = backward(softmax_cross_entropy_backward(1, cache_loss), cache)
    return loss, grads, {"error": error(logits, batch.y)}


def error(logits, y):
    """Percent of the samples whose largest logit (N, classes) is not their class y (N,)."""
    return 100 * float(np.mean(logits.real.argmax(axis=1) != y))


# Data


def load(config):
    """({"train", "validation", "test": Images}, the config). Pixels have mean 0 and variance 1 in the training part.

    The last 1,000 training images are for validation.
    """
    arrays = data.load_fashion()
    x, y, held_out = arrays["x"].astype(np.float32), arrays["y"].astype(np.int64), 1000
    mean, sd = x[:-held_out].mean(), x[:-held_out].std()

    def images(x, y):
        return Images(((x - mean) / sd)[None], y)  # (1, N, 28, 28), (N,)

    parts = {
        "train": images(x[:-held_out], y[:-held_out]),
        "validation": images(x[-held_out:], y[-held_out:]),
        "test": images(arrays["x_test"].astype(np.float32), arrays["y_test"].astype(np.int64)),
    }
    return parts, config


def batches(loaded, config, rng):
    """One epoch of training batches, in random order."""
    x, y = loaded["train"]
    order = rng.permutation(len(y))
    for i in range(0, len(y), config.batch):
        chosen = order[i : i + config.batch]
        yield Images(x[:, chosen], y[chosen])


def example_batch(config, rng):
    """A batch of random pixels and classes, to measure time."""
    x = rng.standard_normal((config.channels, config.batch, config.image, config.image), np.float32)
    return Images(x, rng.integers(config.classes, size=config.batch))


def evaluate(P, loaded, config, name):
    """{"loss", "error"} of one part of the data, without noise and dropout, BatchNorm with its running statistics."""
    x, y = loaded[name]
    how = config.norm._replace(training=False)
    starts = range(0, len(y), config.batch)
    logits = [forward(P, x[:, i : i + config.batch], replace(config, norm=how))[0] for i in starts]  # (N, classes)
    logits = np.concatenate(logits)  # (all, classes)
    return {"loss": float(softmax_cross_entropy(logits, y)[0]), "error": error(logits, y)}


def report(P, loaded, config):
    """Nothing beside the metrics."""
    return {}
