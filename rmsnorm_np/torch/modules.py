"""The norms as modules: those of `torch.nn`, with their arguments, parameters and state dicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmsnorm_np.torch.functions import layer_norm, rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on the CPU, by the kernels of this library.

    Parameters
    ----------
    normalized_shape, eps, elementwise_affine, device, dtype
        As in `torch.nn.RMSNorm`.
    weight_offset, round_xhat
        As in `rmsnorm_np.torch.rms_norm`. The weight begins with ``1 - weight_offset``.

    Examples
    --------
    >>> import torch
    >>> from rmsnorm_np.torch import RMSNorm
    >>> norm = RMSNorm(2, eps=0.0)
    >>> norm(torch.tensor([[3.0, 4.0]])).tolist() == norm(torch.tensor([[30.0, 40.0]])).tolist()
    True
    """

    weight_offset = 0.0
    round_xhat = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_offset: float = 0.0,
        round_xhat: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.weight_offset, self.round_xhat = weight_offset, round_xhat
        if weight_offset:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight so that all factors are 1."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x."""
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps, weight_offset=self.weight_offset,
            round_xhat=self.round_xhat,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What is shown of it."""
        return f"{super().extra_repr()}, weight_offset={self.weight_offset}, round_xhat={self.round_xhat}"


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on the CPU, by the kernels of this library.

    Parameters
    ----------
    normalized_shape, eps, elementwise_affine, bias, device, dtype
        As in `torch.nn.LayerNorm`.
    weight_offset
        As in `rmsnorm_np.torch.rms_norm`. The weight begins with ``1 - weight_offset``.

    Examples
    --------
    >>> import torch
    >>> from rmsnorm_np.torch import LayerNorm
    >>> LayerNorm(2, eps=0.0)(torch.tensor([[3.0, 5.0]])).tolist()
    [[-1.0, 1.0]]
    """

    weight_offset = 0.0

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.weight_offset = weight_offset
        if weight_offset:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight so that all factors are 1, and the bias to 0."""
        super().reset_parameters()
        if self.elementwise_affine and self.weight_offset:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, input: Tensor) -> Tensor:
        """The norm of input."""
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, weight_offset=self.weight_offset
        )

    def extra_repr(self) -> str:
        """What is shown of it."""
        return f"{super().extra_repr()}, weight_offset={self.weight_offset}"
