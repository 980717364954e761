"""What the paper reports, to stand beside our results: Zhang and Sennrich, 2019, arXiv:1910.07467.

Table 5's means and the figures of the order embeddings are quoted from a translation of the paper found on the web.
"""

from __future__ import annotations

# {model: what its metric is called there, {norm: value or values}}
QUALITY = {
    "rnnsearch": ("BLEU, newstest 2014 / 2017", {
        "none": "21.7 / 23.4", "layer": "22.6 / 23.6", "rms": "22.4 / 23.7", "prms": "22.6 / 23.1", "l2": "20.7 / 22.0",
    }),
    "transformer": ("BLEU, newstest 2014 / 2017", {
        "none": "0 (diverges)", "layer": "26.6 / 27.7", "rms": "26.8 / 27.7", "prms": "26.5 / 27.8",
    }),
    "reader": ("shown as a curve only", {}),
    "order_embeddings": ("caption R@1, R@5, R@10, mean rank; image the same", {
        "none": "45.8 79.7 88.8 5.4; 37.6 73.6 85.8 7.7",
        "layer": "47.9 79.5 89.2 5.3; 38.4 74.6 86.7 7.5",
        "rms": "48.7 79.7 89.5 5.3; 39.0 74.8 86.3 7.5",
        "prms": "46.8 79.8 90.3 5.2; 39.0 74.5 86.3 7.4",
    }),
    "convpool": ("test error, %", {
        "none": "8.96", "layer": "10.49", "rms": "8.83", "prms": "10.37", "batch": "8.25", "weight": "8.28",
    }),
}  # fmt: skip

# {model: unit, {norm: seconds}}; RNNSearch in TensorFlow: in Theano RMSNorm saves 34.0 % there, in PyTorch 11.0 %
SECONDS = {
    "rnnsearch": ("1,000 steps", {"none": 399, "layer": 665, "rms": 501, "prms": 493, "l2": 482}),
    "transformer": ("1,000 steps", {"none": 210, "layer": 248, "rms": 231, "prms": 225}),
    "reader": ("100 steps", {"none": 315, "layer": 392, "rms": 333, "prms": 330, "batch": 346.5}),
    "order_embeddings": ("100 steps", {"none": 2.11, "layer": 12.02, "rms": 7.12, "prms": 4.34}),
    "convpool": ("epoch", {"none": 21, "layer": 39, "rms": 31, "prms": 30, "batch": 38, "weight": 23}),
}

# Table 5: of U h in the decoder at the positions 1, 2, 3, 4 and over all
TABLE5_MEAN = {
    "none": (-2.60, -1.19, -1.43, -1.53, -1.60),
    "layer": (-0.43, -0.48, -0.50, -0.50, -0.51),
    "rms": (-0.40, -0.60, -0.69, -0.74, -0.73),
}
TABLE5_SD = {
    "none": (7.35, 2.33, 2.61, 2.73, 3.04),
    "layer": (1.19, 1.51, 1.51, 1.51, 1.51),
    "rms": (1.27, 1.51, 1.50, 1.49, 1.50),
}
