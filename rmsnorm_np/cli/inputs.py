"""What the command line works on: the activations of a real language model, and the norms to put them through."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rmsnorm_np as rn

Array = NDArray[Any]

DTYPES = ("float32", "float64", "float16", "bfloat16")

LAYERS = {
    "first": "layer 0, before attention",
    "early": "layer 1, before the MLP",
    "last": "layer 29, before attention",
    "final": "before the output",
}


@dataclass(frozen=True)
class Norm:
    """One of the norms under comparison, with one signature for all of them."""

    label: str
    op: str  # "rms_norm" or "layer_norm"
    p: float = 1.0

    def forward(self, x: Array, weight: Array, eps: float, backend: str, out: Array | None = None) -> Array:
        """Return y."""
        if self.op == "layer_norm":
            return rn.layer_norm(x, weight, eps=eps, out=out, backend=backend)
        return rn.rms_norm(x, weight, eps=eps, p=self.p, out=out, backend=backend)

    def backward(
        self, dy: Array, x: Array, weight: Array, eps: float, backend: str, out: Array | None = None
    ) -> tuple[Any, Any, Any]:
        """Return (dx, dweight, None)."""
        if self.op == "layer_norm":
            return rn.layer_norm_backward(dy, x, weight, eps=eps, out=out, backend=backend)
        return rn.rms_norm_backward(dy, x, weight, eps=eps, p=self.p, out=out, backend=backend)


RMS_NORM = Norm("RMSNorm", "rms_norm")
PARTIAL_RMS_NORM = Norm("pRMSNorm", "rms_norm", p=0.0625)  # the paper's p
LAYER_NORM = Norm("LayerNorm", "layer_norm")
NORMS = (RMS_NORM, PARTIAL_RMS_NORM, LAYER_NORM)


@dataclass(frozen=True)
class Activation:
    """What enters one norm of the model while it reads 64 tokens."""

    layer: str
    x: Array  # (64, 576) float32
    weight: Array  # (576,) float32
    eps: float


def activations() -> list[Activation]:
    """Load the four layers that come with the package."""
    path = resources.files("rmsnorm_np") / "data" / "smollm2_activations.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        eps = float(arrays["eps"])
        return [Activation(layer, arrays[f"{layer}_x"], arrays[f"{layer}_weight"], eps) for layer in LAYERS]


def dtype_named(name: str) -> np.dtype[Any]:
    """The dtype of that name, bfloat16 included."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16
