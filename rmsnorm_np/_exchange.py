"""Arrays of other libraries, such as PyTorch, JAX and MLX, as ndarrays of the same memory."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rmsnorm_np import _hints

if TYPE_CHECKING:
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

_HOST = (1, 3, 11)  # kinds of devices in DLPack: the CPU; memory of the host that CUDA, or ROCm, has pinned


def as_ndarray(name: str, value: Any) -> Array:
    """What is not an ndarray as one. An array of another library is not copied, one beyond the host is refused."""
    kind, number = None, 0
    try:
        if hasattr(value, "__dlpack_device__"):
            kind, number = value.__dlpack_device__()
            if kind in _HOST:
                return _same_memory(value)
        elif not hasattr(value, "__cuda_array_interface__"):
            return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:  # PyTorch's tensors raise all four
        raise _hints.not_an_array(name, value, error) from error
    raise TypeError(_hints.not_on_the_host(name, value, kind, number))


def _same_memory(value: Any) -> Array:
    if getattr(value, "requires_grad", False):
        raise TypeError("requires grad")  # as PyTorch says of all but the bits of one
    module, _, dtype = str(getattr(value, "dtype", "")).rpartition(".")
    if dtype == "bfloat16" and module in sys.modules:  # torch.bfloat16, mlx.core.bfloat16: NumPy takes only their bits
        import ml_dtypes

        return np.asarray(value.view(sys.modules[module].int16)).view(ml_dtypes.bfloat16)
    # `__array__` copies no more than DLPack does in PyTorch and JAX, is quicker, and knows JAX's bfloat16 and PyTorch's
    # pending negation, where NumPy's DLPack fails or gives the wrong sign.
    return np.asarray(value) if hasattr(value, "__array__") else np.from_dlpack(value)
