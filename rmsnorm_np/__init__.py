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
from rmsnorm_np.double_backward import layer_norm_double_backward, rms_norm_double_backward
from rmsnorm_np.gated import gated_rms_norm, gated_rms_norm_backward
from rmsnorm_np.jvp import layer_norm_jvp, rms_norm_jvp
from rmsnorm_np.l2 import l2_norm, l2_norm_backward
from rmsnorm_np.layer_norms import layer_norm, layer_norm_backward
from rmsnorm_np.layers import LayerNorm, RMSNorm
from rmsnorm_np.norms import rms_norm, rms_norm_backward
from rmsnorm_np.quantized import quantized_rms_norm
from rmsnorm_np.reference import AddNorm, DoubleGrads, GatedNormGrads, LayerNormGrads, Quantized, RMSNormGrads
from rmsnorm_np.residual import add_layer_norm, add_layer_norm_backward, add_rms_norm, add_rms_norm_backward

__version__ = "0.2.0"

__all__ = [
    "AddNorm",
    "DoubleGrads",
    "GatedNormGrads",
    "LayerNorm",
    "LayerNormGrads",
    "Quantized",
    "RMSNorm",
    "RMSNormGrads",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "gated_rms_norm",
    "gated_rms_norm_backward",
    "get_num_threads",
    "l2_norm",
    "l2_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_double_backward",
    "layer_norm_jvp",
    "quantized_rms_norm",
    "reference",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_double_backward",
    "rms_norm_jvp",
    "set_num_threads",
]
