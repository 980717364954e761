"""The public functions: the arguments of `torch.nn.functional`, checked, and handed to the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# the operators are complete only with their derivatives and batching rules
from rmsnorm_np.torch import batching, derivatives  # noqa: F401
from rmsnorm_np.torch.operators import LAYER_NORM, RMS_NORM

_DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    round_xhat: bool = False,
) -> Tensor:
    """`torch.nn.functional.rms_norm` on the CPU, by the kernels of this library.

    Parameters
    ----------
    input : Tensor
        float16, bfloat16, float32 or float64, on the CPU, in any layout. What is not contiguous is copied.
    normalized_shape : sequence of int
        The last axes of input, which make up a row.
    weight : Tensor, optional
        Factor of each element: of shape `normalized_shape`, or one that broadcasts against input and ends with it.
    eps : float, optional
        Added to the mean square. None is the machine epsilon of the dtype of input, of float32 for 16 bits, as in
        PyTorch.
    weight_offset : float, default 0.0
        Added to `weight`: 1.0 for Gemma's.
    round_xhat : bool, default False
        True for Llama's order: the normalised row is rounded to the dtype of input before it is multiplied by weight,
        and the result has the dtype of such a product. The derivatives are those of False.

    Returns
    -------
    Tensor
        Contiguous; shape and dtype of input, see `round_xhat`.

    Raises
    ------
    TypeError
        If input is of another dtype.
    ValueError
        If input does not end with `normalized_shape`, if it is empty or has a zero; if weight does not fit; if eps is
        negative.
    NotImplementedError
        If a tensor is not on the CPU.

    See Also
    --------
    rmsnorm_np.rms_norm : the same for arrays, with the formula, its source and its accuracy.
    add_rms_norm : with a residual.

    Notes
    -----
    Differentiable twice in reverse, and in forward mode over reverse and the other way round; works under
    ``torch.compile(fullgraph=True)`` and the transforms of ``torch.func``.

    Examples
    --------
    >>> import torch
    >>> from rmsnorm_np.torch import rms_norm
    >>> rms_norm(torch.tensor([[3.0, 4.0]]), (2,), eps=0.0)
    tensor([[0.8485, 1.1314]])
    """
    ndim, eps = _checked(input, normalized_shape), _eps(input, eps)
    return RMS_NORM.forward(input, weight, None, ndim, eps, weight_offset, round_xhat)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.layer_norm` on the CPU, by the kernels of this library.

    Parameters
    ----------
    input, normalized_shape, weight, weight_offset
        As in `rms_norm`.
    bias : Tensor, optional
        Added at the end. Shape as for `weight`.
    eps : float, default 1e-5
        Added to the variance.

    Returns
    -------
    Tensor
        Contiguous; shape and dtype of input.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `rms_norm`.

    See Also
    --------
    rmsnorm_np.layer_norm : the same for arrays, with the formula, its source and its accuracy.

    Examples
    --------
    >>> import torch
    >>> from rmsnorm_np.torch import layer_norm
    >>> layer_norm(torch.tensor([[3.0, 5.0]]), (2,), bias=torch.ones(2), eps=0.0)
    tensor([[0., 2.]])
    """
    ndim = _checked(input, normalized_shape)
    return LAYER_NORM.forward(input, weight, bias, ndim, eps, weight_offset, False)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    round_xhat: bool = False,
) -> tuple[Tensor, Tensor]:
    """h = input + residual and its RMSNorm, in one pass over memory.

    Parameters
    ----------
    input, normalized_shape, weight, eps, weight_offset, round_xhat
        As in `rms_norm`.
    residual : Tensor
        Shape of input; any of the four dtypes.

    Returns
    -------
    y, h : tuple of Tensor
        y as from `rms_norm` of h; h with the shape and dtype of residual.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `rms_norm`, also for residual.

    See Also
    --------
    rmsnorm_np.add_rms_norm : the same for arrays.

    Examples
    --------
    >>> import torch
    >>> from rmsnorm_np.torch import add_rms_norm
    >>> add_rms_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), (2,), eps=0.0)
    (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    ndim, eps = _checked(input, normalized_shape), _eps(input, eps)
    _check_residual(input, residual)
    y, h = RMS_NORM.add(input, residual, weight, None, ndim, eps, weight_offset, round_xhat)
    return y, h


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """h = input + residual and its LayerNorm, in one pass over memory.

    Parameters
    ----------
    input, normalized_shape, weight, bias, eps, weight_offset
        As in `layer_norm`.
    residual : Tensor
        Shape of input; any of the four dtypes.

    Returns
    -------
    y, h : tuple of Tensor
        y as from `layer_norm` of h; h with the shape and dtype of residual.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `rms_norm`, also for residual.

    See Also
    --------
    rmsnorm_np.add_layer_norm : the same for arrays.

    Examples
    --------
    >>> import torch
    >>> from rmsnorm_np.torch import add_layer_norm
    >>> add_layer_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 3.0]]), (2,), eps=0.0)
    (tensor([[-1.,  1.]]), tensor([[3., 5.]]))
    """
    ndim = _checked(input, normalized_shape)
    _check_residual(input, residual)
    y, h = LAYER_NORM.add(input, residual, weight, bias, ndim, eps, weight_offset, False)
    return y, h


def _checked(input: Tensor, normalized_shape: Sequence[int]) -> int:
    """The number of axes that make up a row."""
    _check_dtype("input", input)
    shape = tuple(normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(f"normalized_shape is {shape}, expected the last axes of input.shape {tuple(input.shape)}")
    return len(shape)


def _check_residual(input: Tensor, residual: Tensor) -> None:
    _check_dtype("residual", residual)
    if residual.shape != input.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, expected input.shape {tuple(input.shape)}")


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected float16, bfloat16, float32 or float64")


def _eps(input: Tensor, eps: float | None) -> float:
    if eps is not None:
        return eps
    of: float = torch.finfo(torch.float64 if input.dtype is torch.float64 else torch.float32).eps
    return of
