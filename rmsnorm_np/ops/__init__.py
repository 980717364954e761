"""Each operation once, as formulas: no compiler, no loop, no memory. Every engine runs them, and so does NumPy.

An operation works on rows of n elements:

=========  =============================================================================================
reads      arrays (rows, n): x, residual, dy …
columns    parameters, one number per element of a row: weight, bias; with weight_offset, one for all
writes     arrays (rows, n): y, h, dx …
enter      what is read of an element -> what everything is about (``keep`` names an output that holds it)
stages     one or two of: sums over the row, element by element, and the few numbers that follow from them
leave      outputs of an element
share      what an element adds to the sums over rows: dweight, dbias
=========  =============================================================================================

`rms` and `layer` are the norms; `l2`, `gated`, `jvp`, `double`, `quantized` and `rounding` are made from them.
`primitives` and `activations` are what the formulas call, `records` is for engines, which take such records apart.
Start with `operation`, then `rms`.
"""

from rmsnorm_np.ops.layer import LAYER_NORM, LAYER_NORM_BACKWARD
from rmsnorm_np.ops.operation import Operation
from rmsnorm_np.ops.rms import RMS_NORM, RMS_NORM_BACKWARD
from rmsnorm_np.ops.rounding import rounding_xhat

__all__ = ["BACKWARD", "FORWARD", "Operation", "rounding_xhat"]

FORWARD: tuple[Operation, ...] = RMS_NORM, LAYER_NORM
BACKWARD: tuple[Operation, ...] = RMS_NORM_BACKWARD, LAYER_NORM_BACKWARD
