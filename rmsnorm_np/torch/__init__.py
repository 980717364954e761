"""The norms for PyTorch tensors on the CPU: functions with derivatives, modules, and a swap of a model's modules.

>>> import torch
>>> import rmsnorm_np.torch as rt
>>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
>>> y = rt.rms_norm(x, (2,), torch.ones(2), eps=0.0)
>>> y.detach()
tensor([[0.8485, 1.1314]])
>>> torch.autograd.grad(y[0, 0], x)[0]
tensor([[ 0.1810, -0.1358]])

The functions are PyTorch operators, ``torch.ops.rmsnorm_np.rms_norm`` and so on: `operators` defines them on the public
functions of this library, `derivatives` and `batching` say how autograd and vmap treat them.
"""

from __future__ import annotations

from rmsnorm_np.torch.functions import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from rmsnorm_np.torch.modules import LayerNorm, RMSNorm
from rmsnorm_np.torch.replace import Replaced, replace_norms

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "Replaced",
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "replace_norms",
    "rms_norm",
]
