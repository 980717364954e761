"""The norms and their derivatives in operations of JAX's own, for derivatives of an order that has no kernel."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from rmsnorm_np.jax.calls import GRADIENT_TANGENT, TANGENT, Arrays, Call


def compute(call: Call, a: Arrays) -> list[Any]:
    """The results of a call of one of the linear kinds but GRADIENT."""
    primals: Arrays = {name: a[name] for name in ("x", "weight") if name in a}
    if call.kind == TANGENT:
        primals |= _zeros_like(a, bias="bias_dot")
        y_dot = jax.jvp(lambda args: _norm(call, **args), (primals,), (_directions(primals, a, "_dot"),))[1]
        return [y_dot, a["x_dot"]] if call.keep else [y_dot]
    primals["dy"] = a["dy"]
    if call.kind == GRADIENT_TANGENT:
        return list(jax.jvp(lambda args: _gradient(call, **args), (primals,), (_directions(primals, a, "_dot"),))[1])
    # the gradient of sum(ddx · dx) + sum(ddweight · dweight) + sum(ddbias · dbias)
    bias = a.get("ddbias")
    with_bias = call._replace(dweight="weight" in a, bias=None if bias is None else (bias.shape, bias.dtype.name))
    results, pull_back = jax.vjp(lambda args: _gradient(with_bias, **args), primals)
    names = ("ddx", *["ddweight"] * ("weight" in a), *["ddbias"] * (bias is not None))
    dd = [a.get(name, jnp.zeros_like(result)) for name, result in zip(names, results, strict=True)]
    (found,) = pull_back(tuple(dd))
    return [found[name] for name in ("dy", "x", "weight") if name in found]


def _directions(primals: Arrays, a: Arrays, suffix: str) -> Arrays:
    return {name: a.get(name + suffix, jnp.zeros_like(value)) for name, value in primals.items()}


def _zeros_like(a: Arrays, **names: str) -> Arrays:
    return {name: jnp.zeros_like(a[like]) for name, like in names.items() if like in a}


def _norm(call: Call, x: Any, weight: Any = None, bias: Any = None) -> Any:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    h = x.astype(wide)
    if call.norm == "layer_norm":
        h = h - jnp.mean(h, -1, keepdims=True)
    k = math.ceil(x.shape[-1] * call.p * (1.0 - 2.0**-50))
    y = h * jax.lax.rsqrt(jnp.mean(jnp.square(h[..., :k]), -1, keepdims=True) + call.eps)
    if weight is not None:
        y = y * (weight.astype(wide) + call.weight_offset)
    if bias is not None:
        y = y + bias.astype(wide)
    return y.astype(x.dtype)


def _gradient(call: Call, dy: Any, x: Any, weight: Any = None) -> tuple[Any, ...]:
    """dx, and dweight and dbias where they are wanted."""
    wanted = {"x": x}
    if call.dweight:
        wanted["weight"] = weight
    if call.bias is not None:
        wanted["bias"] = jnp.zeros(*call.bias)
    rest = {} if call.dweight or weight is None else {"weight": weight}
    _, pull_back = jax.vjp(lambda args: _norm(call, **args, **rest), wanted)
    (found,) = pull_back(dy)
    return tuple(found[name] for name in wanted)
