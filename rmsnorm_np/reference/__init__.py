"""RMSNorm and LayerNorm in plain NumPy: readable source, and the oracle that the engines are tested against.

The names are those of the derivation. Of a row x with n elements, k of them in the RMS::

    RMSNorm     rstd = 1 / sqrt(mean(x[:k]²) + eps)       xhat = x · rstd
    LayerNorm   rstd = 1 / sqrt(mean((x - mean)²) + eps)  xhat = (x - mean) · rstd
    both        y = xhat · (weight_offset + weight) + bias

and backward, with g = dy · (weight_offset + weight), the gradient of the loss by xhat::

    RMSNorm     c = sum(g · xhat) / k                     dx_i = rstd · (g_i - [i < k] · xhat_i · c)
    LayerNorm   c = mean(g · xhat)                        dx = rstd · (g - mean(g) - xhat · c)
    both        dweight = sum(dy · xhat), dbias = sum(dy), over all rows that share the parameter

The sum in RMSNorm's c runs over all n elements, as each of them was divided by the same RMS; the correction
reaches the first k only, because only those elements enter the RMS. These are eq. 4 and eq. 9 of Zhang and Sennrich,
"Root Mean Square Layer Normalization", NeurIPS 2019, with eps inside the root.

The others build on these two: `l2` has the sum where RMSNorm has the mean, `gated` multiplies by silu of a gate, before
or after, `quantized` rounds y to 8 bits, and `derivatives` has forward mode and the gradient of the gradient.

Every function computes in a wider type than it is given and rounds once, at the end: float16, bfloat16 and float32
in float64; float64 in `numpy.longdouble`, which has 64 bits of precision and a far wider range on x86. On Windows
and macOS on ARM longdouble is float64 under another name: there float64 is computed as it is, with its rounding
errors, and a row whose squares leave the range of float64 gives zeros or infinities.

Complex arrays are accepted here, as in no engine: no formula takes a modulus or a conjugate, so that each is the
analytic continuation of the real one, and a complex step gives its derivative to full precision.
"""

from rmsnorm_np.reference._common import AddNorm, DoubleGrads, GatedNormGrads, LayerNormGrads, Quantized, RMSNormGrads
from rmsnorm_np.reference.derivatives import (
    layer_norm_double_backward,
    layer_norm_jvp,
    rms_norm_double_backward,
    rms_norm_jvp,
)
from rmsnorm_np.reference.gated import gated_rms_norm, gated_rms_norm_backward
from rmsnorm_np.reference.l2 import l2_norm, l2_norm_backward
from rmsnorm_np.reference.layer import add_layer_norm, add_layer_norm_backward, layer_norm, layer_norm_backward
from rmsnorm_np.reference.quantized import quantized_rms_norm
from rmsnorm_np.reference.rms import add_rms_norm, add_rms_norm_backward, rms_norm, rms_norm_backward

__all__ = [
    "AddNorm",
    "DoubleGrads",
    "GatedNormGrads",
    "LayerNormGrads",
    "Quantized",
    "RMSNormGrads",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "gated_rms_norm",
    "gated_rms_norm_backward",
    "l2_norm",
    "l2_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_double_backward",
    "layer_norm_jvp",
    "quantized_rms_norm",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_double_backward",
    "rms_norm_jvp",
]
