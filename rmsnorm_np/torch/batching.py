"""How the operators run under `torch.vmap`: a batch is one more axis before those that are there.

Rows are independent, so that is all for x and its kind. A parameter that differs over the batch is one that broadcasts:
of shape (batch, 1, n) for x of shape (batch, rows, n). So is one whose gradient is asked for each item of the batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rmsnorm_np.torch import operators
from rmsnorm_np.torch.operators import LAYER_NORM, RMS_NORM

_PARAMETERS = {"weight", "bias", "ddweight", "ddbias", "weight_dot", "bias_dot"}


def batch(op: Any, rows_returned: int, gradients: bool) -> None:
    """Register the rule of an operator, whose first results are like x; gradients: whether it returns those of the
    parameters after them.
    """
    schema = op._schema
    names = [argument.name for argument in schema.arguments if "Tensor" in str(argument.type)]

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        given = {name: (a, dim) for name, a, dim in zip(names, args, in_dims, strict=False) if a is not None}
        ndim = max(a.ndim - (dim is not None) for name, (a, dim) in given.items() if name not in _PARAMETERS)
        apart = gradients or any(dim is not None for name, (_, dim) in given.items() if name in _PARAMETERS)
        tensors = []
        for name in names:
            a, dim = given.get(name, (None, None))
            if a is not None and (apart or name not in _PARAMETERS):
                a = a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0)
                a = a.reshape(info.batch_size, *(1,) * (ndim + 1 - a.ndim), *a.shape[1:])
            tensors.append(a)
        results = op(*tensors, *args[len(names) :])
        if isinstance(results, Tensor):
            return results, 0
        shapes = [_own_shape(*given[name]) for name in ("weight", "bias") if name in given]
        restored = [
            a if i < rows_returned else a.reshape(info.batch_size, *shapes[i - rows_returned])
            for i, a in enumerate(results)
        ]
        dims = [0] * len(restored)
        return (restored, dims) if isinstance(results, list) else (tuple(restored), tuple(dims))

    operators.register_vmap(schema.name.partition("::")[2], rule)


def _own_shape(a: Tensor, dim: int | None) -> tuple[int, ...]:
    """The shape of one item of the batch."""
    return tuple(length for i, length in enumerate(a.shape) if dim is None or i != dim % a.ndim)


for _ops in (RMS_NORM, LAYER_NORM):
    batch(_ops.forward, 1, False)
    batch(_ops.jvp, 1, False)
    batch(_ops.add, 2, False)
    batch(_ops.backward, 1, True)
    batch(_ops.add_backward, 1, True)
    batch(_ops.double_backward, 2, True)
