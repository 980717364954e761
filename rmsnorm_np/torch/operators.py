"""PyTorch operators: for each norm its forward function, gradient, second derivative and forward-mode derivative.

Here they get a schema, what runs on the CPU, and the shapes of what they return, for the compiler. A tensor and the
array that the library sees are one piece of memory: nothing is copied.

An operator that returns gradients returns a list: dx, and then those of the parameters that are not None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from rmsnorm_np import double_backward, jvp, layer_norms, norms, residual

NAMESPACE = "rmsnorm_np"
BACKEND: str | None = None  # the engine of every call, as `backend=` of the library's functions

_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # definitions live as long as this object
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Norm(NamedTuple):
    """The library's functions for one norm."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    double_backward: Callable[..., Any]
    jvp: Callable[..., Any]
    add: Callable[..., Any]
    add_backward: Callable[..., Any]


def to_array(tensor: Tensor | None) -> Any:
    """The array in the memory of a tensor."""
    if tensor is None:
        return None
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def to_tensor(array: Any) -> Tensor:
    """The tensor in the memory of an array."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def y_dtype(x: Tensor, weight: Tensor | None, round_xhat: bool) -> torch.dtype:
    """That of x; but the product of a rounded row and the weight has the dtype that PyTorch gives it."""
    return torch.promote_types(x.dtype, weight.dtype) if round_xhat and weight is not None else x.dtype


NUMPY_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}


def _options(ndim: int, eps: float, weight_offset: float) -> dict[str, Any]:
    axis = -1 if ndim == 1 else tuple(range(-ndim, 0))  # a tuple takes longer to check
    return {"axis": axis, "eps": eps, "weight_offset": weight_offset, "backend": BACKEND}


def _forward_options(x: Tensor, weight: Tensor | None, *options: Any) -> dict[str, Any]:
    given = _options(*options[:-1])
    if options[-1]:
        given["round_xhat"] = True
        dtype = y_dtype(x, weight, True)
        if dtype is not x.dtype:
            given["dtype"] = NUMPY_NAMES[dtype]
    return given


def _gradients(results: Any) -> list[Tensor]:
    return [to_tensor(a) for a in results if a is not None]


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _all_like(*tensors: Tensor | None) -> list[Tensor]:
    return [_like(a) for a in tensors if a is not None]


class Operator(NamedTuple):
    """One operator: what PyTorch calls, and what runs on the CPU."""

    overload: Any
    run: Callable[..., Any]
    name: str

    def __call__(self, *args: Any) -> Any:
        """As any PyTorch operator is called, with autograd and all else."""
        return self.overload(*args)


class Operators(NamedTuple):
    """The operators of one norm."""

    forward: Operator
    backward: Operator
    double_backward: Operator
    jvp: Operator
    add: Operator
    add_backward: Operator


def _define(schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> Operator:
    """An operator; run computes it on the CPU, shapes gives tensors of the right kind without computing."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_library)
    return Operator(getattr(getattr(torch.ops, NAMESPACE), name).default, run, name)


def define(norm: Norm) -> Operators:
    """The operators of a norm. ndim is the number of axes that make up a row, the last ones."""
    name, options = norm.name, "int ndim, float eps, float weight_offset"

    def forward(x: Any, weight: Any, bias: Any, *options: Any) -> Any:
        given = _forward_options(x, weight, *options)
        return to_tensor(norm.forward(to_array(x), to_array(weight), to_array(bias), **given))

    def backward(dy: Any, x: Any, weight: Any, bias: Any, *options: Any) -> Any:
        return _gradients(norm.backward(*map(to_array, (dy, x, weight, bias)), **_options(*options)))

    def double_backward(ddx: Any, ddw: Any, ddb: Any, dy: Any, x: Any, weight: Any, bias: Any, *options: Any) -> Any:
        arrays = map(to_array, (ddx, ddw, ddb, dy, x, weight, bias))
        return _gradients(norm.double_backward(*arrays, **_options(*options)))

    def jvp(x: Any, weight: Any, bias: Any, x_dot: Any, weight_dot: Any, bias_dot: Any, *options: Any) -> Any:
        arrays = map(to_array, (x, weight, bias, x_dot, weight_dot, bias_dot))
        return to_tensor(norm.jvp(*arrays, **_options(*options)))

    def add(x: Any, residual: Any, weight: Any, bias: Any, *options: Any) -> Any:
        given = _forward_options(x, weight, *options)
        y, h = norm.add(*map(to_array, (x, residual, weight, bias)), **given)
        return to_tensor(y), to_tensor(h)

    def add_backward(dy: Any, dh: Any, h: Any, weight: Any, bias: Any, *options: Any) -> Any:
        return _gradients(norm.add_backward(*map(to_array, (dy, dh, h, weight, bias)), **_options(*options)))

    return Operators(
        _define(
            f"{name}(Tensor x, Tensor? weight, Tensor? bias, {options}, bool round_xhat) -> Tensor",
            forward,
            lambda x, weight, bias, *options: _like(x, y_dtype(x, weight, options[-1])),
        ),
        _define(
            f"{name}_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, {options}) -> Tensor[]",
            backward,
            lambda dy, x, weight, bias, *options: _all_like(x, weight, bias),
        ),
        _define(
            f"{name}_double_backward(Tensor? ddx, Tensor? ddweight, Tensor? ddbias, Tensor dy, Tensor x, "
            f"Tensor? weight, Tensor? bias, {options}) -> Tensor[]",
            double_backward,
            lambda ddx, ddweight, ddbias, dy, x, weight, bias, *options: _all_like(dy, x, weight),
        ),
        _define(
            f"{name}_jvp(Tensor x, Tensor? weight, Tensor? bias, Tensor? x_dot, Tensor? weight_dot, Tensor? bias_dot, "
            f"{options}) -> Tensor",
            jvp,
            lambda x, *others: _like(x),
        ),
        _define(
            f"add_{name}(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, {options}, bool round_xhat)"
            " -> (Tensor, Tensor)",
            add,
            lambda x, residual, weight, bias, *options: (_like(x, y_dtype(x, weight, options[-1])), _like(residual)),
        ),
        _define(
            f"add_{name}_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, {options})"
            " -> Tensor[]",
            add_backward,
            lambda dy, dh, h, weight, bias, *options: _all_like(h, weight, bias),
        ),
    )


RMS_NORM = define(
    Norm(
        "rms_norm",
        norms.rms_norm,
        norms.rms_norm_backward,
        double_backward.rms_norm_double_backward,
        jvp.rms_norm_jvp,
        residual.add_rms_norm,
        residual.add_rms_norm_backward,
    )
)
LAYER_NORM = define(
    Norm(
        "layer_norm",
        layer_norms.layer_norm,
        layer_norms.layer_norm_backward,
        double_backward.layer_norm_double_backward,
        jvp.layer_norm_jvp,
        residual.add_layer_norm,
        residual.add_layer_norm_backward,
    )
)


def register_autograd(operator: Operator, kernel: Callable[..., Any]) -> None:
    """What PyTorch calls before anything that computes: kernel(keyset, *arguments)."""
    _library.impl(operator.name, kernel, "Autograd", with_keyset=True)


def register_vmap(operator: Operator, rule: Callable[..., Any]) -> None:
    """How an operator runs on batches: rule(info, in_dims, *arguments), see torch.library.register_vmap."""
    torch.library.register_vmap(f"{NAMESPACE}::{operator.name}", rule, lib=_library)
