"""What the command line works on: the activations of a real language model, and the norms to put them through."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    op: str  # the name of its function
    p: float = 1.0

    @property
    def adds(self) -> bool:
        """Whether it adds a residual to x first: then it takes `residual` and `dh`, and forward returns h too."""
        return self.op.startswith("add_")

    def alone(self) -> Norm:
        """The norm without the addition."""
        return replace(self, op=self.op.removeprefix("add_"))

    @property
    def centres(self) -> bool:
        """Whether it subtracts the mean."""
        return self.op.endswith("layer_norm")

    def arrays_moved(self, direction: str) -> int:
        """How many arrays of x's size "forward", "backward" or "forward+backward" has to read and write."""
        forward, backward = (4, 4) if self.adds else (2, 3)  # x, residual, y, h; dy, dh, h, dx; or x, y; dy, x, dx
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]

    def forward(
        self, x: Array, weight: Array, eps: float, backend: str, out: Any = None, residual: Array | None = None
    ) -> Any:
        """Return y; y and h where it adds, and `out` is for both."""
        options: dict[str, Any] = {"eps": eps, "backend": backend} | ({} if self.p == 1.0 else {"p": self.p})
        if self.adds:
            y, h = (None, None) if out is None else out
            return getattr(rn, self.op)(x, residual, weight, out=y, residual_out=h, **options)
        return getattr(rn, self.op)(x, weight, out=out, **options)

    def backward(
        self, dy: Array, x: Array, weight: Array, eps: float, backend: str, out: Any = None, dh: Array | None = None
    ) -> tuple[Any, Any, Any]:
        """Return (dx, dweight, None); x is h where it adds."""
        options: dict[str, Any] = {"eps": eps, "backend": backend} | ({} if self.p == 1.0 else {"p": self.p})
        gradients: tuple[Any, ...] = (dy, dh) if self.adds else (dy,)
        found: tuple[Any, Any, Any] = getattr(rn, f"{self.op}_backward")(*gradients, x, weight, out=out, **options)
        return found


RMS_NORM = Norm("RMSNorm", "rms_norm")
PARTIAL_RMS_NORM = Norm("pRMSNorm", "rms_norm", p=0.0625)  # the paper's p
LAYER_NORM = Norm("LayerNorm", "layer_norm")
ADD_RMS_NORM = Norm("+ RMSNorm", "add_rms_norm")
ADD_LAYER_NORM = Norm("+ LayerNorm", "add_layer_norm")
NORMS = (RMS_NORM, PARTIAL_RMS_NORM, LAYER_NORM, ADD_RMS_NORM)


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
