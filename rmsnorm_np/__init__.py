"""RMSNorm and LayerNorm, forward and backward, on plain NumPy arrays.

>>> import numpy as np
>>> import rmsnorm_np as rn
>>> rn.rms_norm(np.array([[3.0, 4.0]]), eps=0.0)
array([[0.84852814, 1.13137085]])

`rmsnorm_np.reference` has the same functions in plain NumPy: readable source and test oracle.
"""

from __future__ import annotations

from rmsnorm_np import reference
from rmsnorm_np._threads import get_num_threads, set_num_threads
from rmsnorm_np.layer_norms import layer_norm, layer_norm_backward
from rmsnorm_np.layers import LayerNorm, RMSNorm
from rmsnorm_np.norms import rms_norm, rms_norm_backward
from rmsnorm_np.reference import AddNorm, LayerNormGrads, RMSNormGrads
from rmsnorm_np.residual import add_layer_norm, add_layer_norm_backward, add_rms_norm, add_rms_norm_backward

__version__ = "0.1.0"

__all__ = [
    "AddNorm",
    "LayerNorm",
    "LayerNormGrads",
    "RMSNorm",
    "RMSNormGrads",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "get_num_threads",
    "layer_norm",
    "layer_norm_backward",
    "reference",
    "rms_norm",
    "rms_norm_backward",
    "set_num_threads",
]
