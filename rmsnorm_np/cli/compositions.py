"""The functions beside the norms as users of PyTorch write them: its norms, and operations around them."""

from __future__ import annotations

from collections.abc import Callable
from shutil import which
from typing import Any

from rmsnorm_np.cli import peers
from rmsnorm_np.cli.timing import Call

# the arguments of a gradient, as they are named in `family`; and what goes along with each
_GATED = ("x", "gate", "weight")
_PLAIN = ("x", "weight")
_ALONG = {"x": "x_dot", "weight": "weight_dot"}


def torch_calls(op: str, direction: str, arrays: dict[str, Any], eps: float, threads: int) -> dict[str, Call]:
    """PyTorch's calls by name: what PyTorch runs at once, and what it compiles, where it can."""
    import torch

    torch.set_num_threads(threads)
    found = {"torch": _call(op, direction, arrays, eps)}
    if which("c++") and "double" not in direction:  # it compiles no second derivative
        torch._dynamo.reset()
        found["torch compiled"] = _call(op, direction, arrays, eps, lambda f: torch.compile(f, dynamic=False))
    return found


def _call(
    op: str, direction: str, arrays: dict[str, Any], eps: float, compiled: Callable[[Any], Any] = lambda f: f
) -> Call:
    """A call that returns y, or y_dot, or q and its scale; or the gradients."""
    import torch

    of = {name: peers.as_torch(a) for name, a in arrays.items() if a is not None}
    names = _GATED if op.startswith("gated") else _PLAIN
    inputs = [of[name] for name in names]
    function = _function(op, eps)
    if direction == "forward":
        forward = compiled(function)
        return lambda: forward(*inputs)
    if direction == "forward mode":
        tangents = tuple(of[_ALONG[name]] for name in names)
        along = compiled(lambda *inputs: torch.func.jvp(function, inputs, tangents)[1])
        return lambda: along(*inputs)
    inputs = [a.requires_grad_() for a in inputs]
    dy, forward = of["dy"], compiled(function)
    if "double" not in direction:
        return lambda: torch.autograd.grad(forward(*inputs), inputs, dy)
    dy = dy.clone().requires_grad_()
    dd = [of[_ALONG[name]] for name in names]

    def twice() -> Any:
        gradients = torch.autograd.grad(forward(*inputs), inputs, dy, create_graph=True)
        ddy, *others = torch.autograd.grad(gradients, (dy, *inputs), dd)
        return ddy, *others

    return twice


def _function(op: str, eps: float) -> Callable[..., Any]:
    import torch
    import torch.nn.functional as functional

    norm = functional.layer_norm if op.startswith("layer") else functional.rms_norm

    def of_norm(x: Any, weight: Any) -> Any:
        return norm(x, weight.shape, weight, eps=eps)

    def l2(x: Any, weight: Any) -> Any:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + eps) * weight).to(x.dtype)

    def gated(x: Any, gate: Any, weight: Any) -> Any:
        return of_norm(x, weight) * functional.silu(gate)

    def quantised(x: Any, weight: Any) -> Any:
        y = of_norm(x, weight).to(torch.promote_types(x.dtype, torch.float32))
        scale = (y.abs().amax(-1, keepdim=True) / 127).clamp_min(2.0**-126)
        return torch.round(y / scale).to(torch.int8), scale

    functions: dict[str, Callable[..., Any]] = {
        "l2_norm": l2, "gated_rms_norm": gated, "quantized_rms_norm": quantised
    }  # fmt: skip
    return functions.get(op, of_norm)
