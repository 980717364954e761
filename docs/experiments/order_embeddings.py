"""Order embeddings (Vendrov, Kiros, Fidler and Urtasun, 2016): captions and images as points of one partial order.

    caption   c = |u|/‖u‖, u the last state of a GRU over the words' embeddings
    image     i = |v|/‖v‖, v = W x, x the image's features: one linear map
    E(c, i)   = ‖max(0, c − i)‖², the order violation: zero where i ≥ c in every coordinate (the image says more)
    loss      = Σ over the pairs of a batch of
                Σ_{i' ≠ i} max(0, α + E(c, i) − E(c, i')) + Σ_{c' ≠ c} max(0, α + E(c, i) − E(c', i))

The GRU has four norms a step (recurrent.py). The data are emoji: a caption is the name and the tags, the features of an
image are its pixels. Some emoji are held out altogether, of others the picture by the second artist.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

import data
from layers import embedding, embedding_backward, glorot, linear, linear_backward, part, whole
from norms import Norm, norm, norm_backward
from recurrent import gru, gru_backward, gru_parameters

METRIC = "recall"
NORMS = ("none", "layer", "rms", "prms")
EXPERIMENTS = tuple({"norm": kind} for kind in NORMS)
RMS = Norm("rms")
UNIT = Norm("l2", fused=False)  # v/‖v‖, the same whatever norm the GRU has

ARTISTS = ("noto", "twemoji")
SHOWN = {"unseen": 0, "style": 1}  # of the held-out emoji of each group: how many artists' pictures are in training
HELD_OUT = {"test": 300, "validation": 100}  # emoji of each group
RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Config:
    """Sizes and settings; the defaults are the paper's, but for the three that vary the training data."""

    norm: Norm = RMS
    embedding: int = 300
    hidden: int = 1024
    image: int = 4096  # features
    words: int = 10_000
    margin: float = 0.05
    shift: int = 2  # pixels: training images are moved by at most as much
    colour: float = 0.3  # each colour channel of each is made stronger or weaker by at most this share
    word_dropout: float = 0.2  # share of the words of training captions that become UNKNOWN
    batch: int = 128
    example_length: int = 11  # words of a caption where time is measured
    learning_rate: float = 1e-3
    clip: float | None = 2.0
    steps: int = 100_000
    evaluate_every: int = 300


SIZES = {
    "paper": Config(),
    "small": Config(embedding=100, hidden=256, steps=400, evaluate_every=40),  # 40 epochs, each picture in about 20
}


# Parameters


def init(config, rng):
    """All parameters, float32, in one dict."""
    m, d = config.embedding, config.hidden
    return {
        "words.table": rng.normal(0, m**-0.5, (config.words, m)).astype(np.float32),
        **whole("caption", gru_parameters(rng, m, d, config.norm)),
        "image.W": glorot(rng, config.image, d),
    }


def learning_rate(config, step):
    """The same for every step."""
    return config.learning_rate


# Data


class Data(NamedTuple):
    """Emoji: their words, their pictures, and which of them are for training."""

    captions: list  # numbers of the words, a list for each emoji
    labels: list  # their names, str
    images: np.ndarray  # (2, emoji, 32, 32, 3) uint8: by each artist
    shown: np.ndarray  # (emoji,): how many artists' pictures are in training: 0, 1 (the first one's) or 2
    parts: dict  # {"validation", "test"} of {"unseen", "style"}: emoji whose other pictures are to be retrieved


class Batch(NamedTuple):
    """Captions, time first and padded at the end, and an image for each."""

    words: np.ndarray  # (T, B)
    mask: np.ndarray  # (T, B): 0 where padded
    images: np.ndarray  # (B, features)


def load(config):
    """(Data, the config with the sizes of the vocabulary and of the images). The split is the same for all seeds."""
    emoji = data.load_emoji()
    texts = [
        data.tokenize(f"{label} {tags}".lower()) for label, tags in zip(emoji["label"], emoji["tags"], strict=True)
    ]
    texts = [[word for word in words if word != ","] for words in texts]
    images = np.stack([emoji[artist] for artist in ARTISTS])
    order, start = np.random.default_rng(0).permutation(len(texts)), 0
    shown, parts = np.full(len(texts), len(ARTISTS)), {name: {} for name in HELD_OUT}
    for name, size in HELD_OUT.items():
        for group, count in SHOWN.items():
            parts[name][group] = chosen = order[start : start + size]
            shown[chosen], start = count, start + size
    vocabulary = data.Vocabulary.of([texts[i] for i in np.flatnonzero(shown)], minimum=1)
    captions = [vocabulary.encode(words) for words in texts]
    sized = replace(config, words=len(vocabulary), image=int(np.prod(images.shape[2:])))
    return Data(captions, emoji["label"].tolist(), images, shown, parts), sized


def batches(loaded, config, rng):
    """One epoch: every emoji of the training data in random order, with one of its artists' pictures.

    So no emoji is twice in a batch, where its other picture would count as a wrong answer.
    """
    order = rng.permutation(np.flatnonzero(loaded.shown))
    for start in range(0, len(order), config.batch):
        chosen = order[start : start + config.batch]
        images = loaded.images[rng.integers(loaded.shown[chosen]), chosen]  # (B, 32, 32, 3)
        batch = make_batch(loaded, chosen, varied(pixels(images), config, rng))
        dropped = (batch.mask > 0) & (rng.random(batch.mask.shape) < config.word_dropout)  # (T, B)
        yield batch._replace(words=np.where(dropped, data.UNKNOWN, batch.words))


def make_batch(loaded, chosen, images):
    """The Batch of the chosen emoji's captions and these images (B, 32, 32, 3)."""
    return Batch(*data.padded([loaded.captions[i] for i in chosen]), images.reshape(len(images), -1))


def pixels(images):
    """Of uint8 images, float32: 0 for white, the background, to 1."""
    return 1 - images / np.float32(255)


def varied(images, config, rng):
    """Images (B, H, W, 3), each moved by some pixels and with its colours made stronger or weaker."""
    B, H, W, _ = images.shape
    edge = config.shift
    frame = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)))  # (B, H + 2 edge, W + 2 edge, 3)
    down, right = rng.integers(0, 2 * edge + 1, (2, B, 1))  # (B, 1), (B, 1)
    rows, columns = down + np.arange(H), right + np.arange(W)  # (B, H), (B, W)
    moved = frame[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return moved * rng.uniform(1 - config.colour, 1 + config.colour, (B, 1, 1, 3)).astype(images.dtype)


def example_batch(config, rng):
    """A batch of random words and features, to measure time."""
    shape = (config.example_length, config.batch)
    words = rng.integers(len(data.SPECIAL), config.words, shape)
    features = rng.normal(size=(config.batch, config.image)).astype(np.float32)
    return Batch(words, np.ones(shape, np.float32), features)


# Embeddings: on the part of the unit sphere where no coordinate is negative


def unit_absolute(x):
    """|x|/‖x‖ for x (B, d)."""
    sign = np.sign(x.real)  # (B, d)
    y, cache = norm(UNIT, x)  # (B, d)
    return y * sign, (sign, cache)


def unit_absolute_backward(dy, cache):
    """dx (B, d)."""
    sign, cache = cache
    return norm_backward(dy * sign, cache).da


def embed_captions(P, words, mask, config):
    """c (B, d) from words (T, B): of the GRU's state after the last word."""
    x, cache_table = embedding(words, P["words.table"])  # (T, B, m)
    start = np.zeros((words.shape[1], config.hidden), x.dtype)  # (B, d)
    states, cache_gru = gru(x, start, part(P, "caption"), config.norm, mask)  # (T, B, d)
    c, cache_unit = unit_absolute(states[-1])  # (B, d): the mask carries a state on to the end
    return c, (cache_table, cache_gru, cache_unit, states.shape)


def embed_captions_backward(dc, cache):
    """Gradients of the parameters from dc (B, d)."""
    cache_table, cache_gru, cache_unit, shape = cache
    dstates = np.zeros(shape, dc.dtype)  # (T, B, d)
    dstates[-1] = unit_absolute_backward(dc, cache_unit)
    dx, _, grads = gru_backward(dstates, cache_gru)  # (T, B, m)
    return {"words.table": embedding_backward(dx, cache_table), **whole("caption", grads)}


def embed_images(P, x):
    """i (B, d) from features x (B, features)."""
    v, cache_linear = linear(x, P["image.W"])  # (B, d)
    i, cache_unit = unit_absolute(v)  # (B, d)
    return i, (cache_linear, cache_unit)


def embed_images_backward(di, cache):
    """Gradient of the parameter from di (B, d)."""
    cache_linear, cache_unit = cache
    _, dW, _ = linear_backward(unit_absolute_backward(di, cache_unit), cache_linear)  # (features, d)
    return {"image.W": dW}


# Order violations, and the loss


def order_violations(c, i):
    """E (C, I) of captions c (C, d) and images i (I, d): E_ci = ‖max(0, c − i)‖².

    A caption at a time: the differences (I, d) stay in the processor's cache, those of all pairs would not.
    """
    E = np.empty((len(c), len(i)), np.result_type(c, i))  # (C, I)
    for row, caption in zip(E, c, strict=True):
        excess = np.maximum(caption - i, 0)  # (I, d)
        np.einsum("id,id->i", excess, excess, out=row)  # (I,)
    return E, (c, i)


def order_violations_backward(dE, cache):
    """(dc (C, d), di (I, d)) from dE (C, I). Pairs where it is zero, the more the better the model, cost no time."""
    c, i = cache
    dtype = np.result_type(dE, c, i)
    dc, di = np.zeros(c.shape, dtype), np.zeros(i.shape, dtype)  # (C, d), (I, d)
    for k, caption in enumerate(c):
        pairs = np.flatnonzero(dE[k])
        excess = np.maximum(caption - i[pairs], 0)  # (pairs, d)
        ddifference = 2 * dE[k, pairs, None] * excess  # (pairs, d)
        dc[k] = ddifference.sum(axis=0)
        di[pairs] -= ddifference
    return dc, di


def contrastive_hinge(E, margin):
    """Σ over all wrong pairs of E (B, B) of what they lack to be `margin` worse than the right one, on the diagonal."""
    right = np.diagonal(E)  # (B,)
    wrong = ~np.eye(len(E), dtype=bool)  # (B, B)
    lack_image = np.maximum(margin + right[:, None] - E, 0) * wrong  # (B, B): against the caption's own image
    lack_caption = np.maximum(margin + right - E, 0) * wrong  # (B, B): against the image's own caption
    return np.sum(lack_image + lack_caption), (lack_image, lack_caption)


def contrastive_hinge_backward(dloss, cache):
    """dE (B, B) from the number dloss."""
    by_image, by_caption = (dloss * (lack.real > 0) for lack in cache)  # (B, B), (B, B)
    return np.diag(by_image.sum(axis=1) + by_caption.sum(axis=0)) - by_image - by_caption


def loss_and_gradients(P, batch, config, rng=None):
    """(sum of the hinge over the batch, gradients, {"pairs": B})."""
    c, cache_captions = embed_captions(P, batch.words, batch.mask, config)  # (B, d)
    i, cache_images = embed_images(P, batch.images)  # (B, d)
    E, cache_violations = order_violations(c, i)  # (B, B)
    loss, cache_loss = contrastive_hinge(E, config.margin)

    dE = contrastive_hinge_backward(E.dtype.type(1), cache_loss)  # (B, B)
    dc, di = order_violations_backward(dE, cache_violations)  # (B, d), (B, d)
    grads = {**embed_captions_backward(dc, cache_captions), **embed_images_backward(di, cache_images)}
    return loss, grads, {"pairs": len(c)}


# Retrieval


def violations(P, loaded, config, chosen):
    """E (n, n) of the captions and pictures of the chosen emoji, for each artist whose pictures are held out."""
    for artist in range(loaded.shown[chosen[0]], len(ARTISTS)):
        batch = make_batch(loaded, chosen, pixels(loaded.images[artist, chosen]))
        c, _ = embed_captions(P, batch.words, batch.mask, config)  # (n, d)
        i, _ = embed_images(P, batch.images)  # (n, d)
        yield order_violations(c, i)[0]


def ranks(E):
    """The rank, from 1, of the right answer of each row of E (n, n), the diagonal; among equals it is the last."""
    return np.sum(np.diagonal(E)[:, None] >= E, axis=1)  # (n,)


def evaluate(P, loaded, config, name):
    """Retrieval in one part of the data: "validation" or "test".

    For "unseen" emoji and for known ones in another "style", and for captions found by images ("caption") and images
    found by captions ("image"): R@K, the percentage of right answers among the first K, and the mean rank. "recall" is
    the mean of all R@K.
    """
    found = {}
    for group, chosen in loaded.parts[name].items():
        each = list(violations(P, loaded, config, chosen))  # of (n, n)
        for wanted, ranked in (("caption", [ranks(E.T) for E in each]), ("image", [ranks(E) for E in each])):
            found |= {f"{group} {wanted} R@{K}": float(100 * np.mean(np.array(ranked) <= K)) for K in RANKS}
            found[f"{group} {wanted} mean rank"] = float(np.mean(ranked))
    return {"recall": float(np.mean([value for key, value in found.items() if "R@" in key])), **found}


def report(P, loaded, config, count=10):
    """What the stored result has beside the metrics: for ten test images of each group the three nearest captions."""
    found = {}
    for group, chosen in loaded.parts["test"].items():
        *_, E = violations(P, loaded, config, chosen)  # (n, n)
        names = [loaded.labels[emoji] for emoji in chosen]
        nearest = np.argsort(E[:, :count], axis=0, kind="stable")[:3].T  # (count, 3)
        found[group] = [
            {"image": names[k], "rank": int(rank), "captions": [names[j] for j in row]}
            for k, (rank, row) in enumerate(zip(ranks(E.T), nearest, strict=False))
        ]
    return {"retrieved": found}
