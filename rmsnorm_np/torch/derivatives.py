"""How autograd and forward mode differentiate the operators: each derivative is another operator of the family.

With L = <dy, norm(x)>, backward gives the gradient B of L; double_backward gives, for a direction v of (x, weight,
bias), the gradient of <v, B>, which is J v by dy and the Hessian of L times v by x and weight. So ::

    derivative of                   in reverse                                     forward, along v and dy_dot
    norm                            B(dy)                                          jvp(v)
    B                               double_backward                                B(dy_dot) + double_backward(v)
    jvp(v), cotangent u             double_backward(v) with dy = u, and B(u) by v  –
    double_backward                 –                                              –
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from rmsnorm_np.torch import operators
from rmsnorm_np.torch.operators import LAYER_NORM, RMS_NORM, Operator, Operators

_BELOW = _C._after_autograd_keyset
_COMPUTES = _C._after_ADInplaceOrView_keyset  # without a kernel of PyTorch's that is for views and writing in place
_CPU = _C.DispatchKeySet(_C.DispatchKey.CPU).raw_repr()


def _differentiable(op: Operator, tensors: int, saved: Callable[..., Any], backward: Any, jvp: Any) -> None:
    """Give an operator its derivatives. Its first arguments are this many tensors or None, the others are options.

    saved(*arguments, results) are the tensors that backward(ctx, *gradients) and jvp(ctx, *tangents) find in
    ctx.saved_tensors; they find the options in ctx.options. Both work on tensors alone: a gradient for each of the
    first arguments. A gradient is None for zero, and so is a tangent that is given, not one that jvp returns. ctx.dtype
    is that of the first result.

    PyTorch's `torch.library.register_autograd` knows no forward mode and no torch.func: this is it, with both.
    """
    overload, run = op.overload, op.run
    returns_list = not isinstance(overload._schema.returns[0].type, _C.TensorType)

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        results = run(*args) if _is_plain(keyset) else _redispatch(overload, keyset, args)
        kept = saved(*args[:tensors], results)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.set_materialize_grads(False)
        ctx.options = args[tensors:]
        ctx.dtype = (results if isinstance(results, Tensor) else results[0]).dtype
        return tuple(results) if returns_list else results

    def with_options(ctx: Any, *gradients: Any) -> Any:
        nothing = all(gradient is None for gradient in gradients)
        by_tensors = (None,) * tensors if nothing else backward(ctx, *gradients)
        return None, *by_tensors, *(None for _ in ctx.options)

    def without_options(ctx: Any, _: Any, *tangents: Any) -> Any:
        return jvp(ctx, *tangents[:tensors])

    methods = {"forward": forward, "backward": with_options, "jvp": without_options}
    function: Any = type(
        op.name, (_SingleLevelFunction,), {key: staticmethod(method) for key, method in methods.items()}
    )

    def kernel(keyset: Any, *args: Any) -> Any:
        if _is_plain(keyset):
            if forward_ad._current_level < 0 and not (
                torch.is_grad_enabled() and _C._any_requires_grad(*args[:tensors])
            ):
                return run(*args)  # 30 µs sooner done than by way of `function`
            results = function.apply(keyset, *args)
        elif _C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                results = function.apply(keyset, *args)
        else:
            results = function.apply(keyset, *args)
        return list(results) if returns_list else results

    operators.register_autograd(op, kernel)


def _is_plain(keyset: Any) -> bool:
    """Whether nothing comes between autograd and what runs on the CPU: no compiler, transform or mode."""
    return (keyset & _COMPUTES).raw_repr() == _CPU  # type: ignore[no-any-return]


def _redispatch(overload: Any, keyset: Any, args: Any) -> Any:
    """What an operator gives below autograd."""
    with _C._AutoDispatchBelowAutograd():
        if _C._are_functorch_transforms_active():  # the transforms around this one differentiate what is below
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return overload.redispatch(keyset & _BELOW, *args)
        return overload.redispatch(keyset & _BELOW, *args)


def _per_parameter(gradients: list[Tensor], *parameters: Tensor | None) -> list[Tensor | None]:
    """One for each parameter, None for one that is None; from a list of those that are there."""
    remaining = iter(gradients)
    return [None if parameter is None else next(remaining) for parameter in parameters]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _refuse(what: str) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        raise NotImplementedError(what)

    return refuse


def differentiate(ops: Operators) -> None:
    """Register the derivatives of all operators of a norm."""

    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        bias = bias if ctx.needs_input_grad[3] else None
        dx, *rest = ops.backward(dy, x, weight, bias, *ctx.options[:3])
        return dx, *_per_parameter(rest, weight, bias)

    def jvp(ctx: Any, x_dot: Any, weight_dot: Any, bias_dot: Any) -> Tensor:
        x, weight, bias = ctx.saved_tensors
        y_dot = ops.jvp(x, weight, bias, x_dot, weight_dot, bias_dot, *ctx.options[:3])
        return y_dot.to(ctx.dtype)

    def second(ctx: Any, ddx: Any, dd: Any, dy: Tensor, x: Tensor, weight: Any, bias: Any) -> Any:
        """(ddy, dx, dweight), the second derivative along ddx and dd, which has those of weight and bias."""
        ddweight, ddbias = dd
        ddy, dx, *rest = ops.double_backward(ddx, ddweight, ddbias, dy, x, weight, bias, *ctx.options[:3])
        return ddy, dx, *_per_parameter(rest, weight)

    def add_backward(ctx: Any, dy: Any, dh: Any) -> Any:
        h, weight, bias = ctx.saved_tensors
        bias = bias if ctx.needs_input_grad[4] else None
        if dy is None:
            dy = torch.zeros_like(h)
        dx, *rest = ops.add_backward(dy, dh, h, weight, bias, *ctx.options[:3])
        return dx, dx, *_per_parameter(rest, weight, bias)

    def add_jvp(ctx: Any, x_dot: Any, residual_dot: Any, weight_dot: Any, bias_dot: Any) -> Any:
        h, weight, bias = ctx.saved_tensors
        h_dot = _sum(x_dot, residual_dot)
        h_dot = torch.zeros_like(h) if h_dot is None else h_dot.to(h.dtype)
        y_dot = ops.jvp(h, weight, bias, h_dot, weight_dot, bias_dot, *ctx.options[:3])
        return y_dot.to(ctx.dtype), h_dot

    # the gradient of a norm without a residual and with one; dh is None in the first

    def of_backward(ctx: Any, ddx: Any, *dd: Any) -> Any:
        dy, x, weight, bias = ctx.saved_tensors
        ddy, dx, dweight = second(ctx, ddx, _per_parameter(list(dd), weight, bias), dy, x, weight, bias)
        return ddy, dx, dweight, None

    def of_add_backward(ctx: Any, ddx: Any, *dd: Any) -> Any:
        ddy, dx, dweight, dbias = of_backward(ctx, ddx, *dd)
        return ddy, ddx if ctx.needs_input_grad[2] else None, dx, dweight, dbias

    def backward_along(ctx: Any, dy_dot: Any, x_dot: Any, weight_dot: Any, bias_dot: Any) -> Any:
        dy, x, weight, bias = ctx.saved_tensors
        if dy_dot is None:
            tangents = [torch.zeros_like(a) for a in (x, weight, bias) if a is not None]
        else:
            tangents = ops.backward(dy_dot, x, weight, bias, *ctx.options)
        if x_dot is not None or weight_dot is not None:
            _, *more = second(ctx, x_dot, (weight_dot, None), dy, x, weight, bias)
            tangents[: len(more)] = [_sum(*pair) for pair in zip(tangents, more, strict=False)]
        return tuple(tangents)

    def add_backward_along(ctx: Any, dy_dot: Any, dh_dot: Any, h_dot: Any, weight_dot: Any, bias_dot: Any) -> Any:
        dx_dot, *rest = backward_along(ctx, dy_dot, h_dot, weight_dot, bias_dot)
        return dx_dot if dh_dot is None else (dx_dot + dh_dot).to(dx_dot.dtype), *rest

    def of_jvp(ctx: Any, u: Tensor) -> Any:
        x, weight, bias, x_dot, weight_dot, bias_dot = ctx.saved_tensors
        _, dx, dweight = second(ctx, x_dot, (weight_dot, bias_dot), u, x, weight, bias)
        x_bar, *rest = ops.backward(u, x, weight, bias, *ctx.options)
        weight_bar, bias_bar = _per_parameter(rest, weight, bias)
        by_tangents = zip((x_bar, weight_bar, bias_bar), (x_dot, weight_dot, bias_dot), strict=True)
        return dx, dweight, None, *(None if tangent is None else bar for bar, tangent in by_tangents)

    no_third = _refuse("third derivatives of a norm are not implemented")
    no_forward = _refuse("forward mode twice, a derivative of a norm along two directions, is not implemented")
    _differentiable(ops.forward, 3, lambda x, weight, bias, y: (x, weight, bias), backward, jvp)
    _differentiable(ops.backward, 4, lambda *args: args[:-1], of_backward, backward_along)
    _differentiable(ops.jvp, 6, lambda *args: args[:-1], of_jvp, no_forward)
    _differentiable(ops.double_backward, 7, lambda *args: (), no_third, no_third)
    _differentiable(ops.add, 4, lambda x, residual, weight, bias, yh: (yh[1], weight, bias), add_backward, add_jvp)
    _differentiable(
        ops.add_backward, 5, lambda dy, dh, h, weight, bias, _: (dy, h, weight, bias), of_add_backward,
        add_backward_along,
    )  # fmt: skip


for _ops in (RMS_NORM, LAYER_NORM):
    differentiate(_ops)
