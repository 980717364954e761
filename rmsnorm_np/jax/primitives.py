"""The norms as primitives of JAX: what each one computes, its derivatives, and what becomes of a batch.

===================  ==========================================  ==================================================
primitive            results                                     derivatives
===================  ==========================================  ==================================================
`forward`            y; h                                        by TANGENT
`tangent`            y_dot, linear in x_dot, weight_dot …        transposed: GRADIENT
`gradient`           dx, dweight, dbias, linear in dy and dh     by GRADIENT_TANGENT; transposed: TANGENT
`gradient_tangent`   how these change, linear in dy_dot …        transposed: SECOND
`second`             ddy, dx, dweight, linear in ddx …           transposed: GRADIENT_TANGENT
===================  ==========================================  ==================================================

So reverse mode, forward mode and both over each other run kernels to the second order. The gradient of a scalar changes
by the product with its Hessian, which is symmetric: the second derivative of reverse mode serves forward mode as well.
What lies beyond is differentiated by JAX itself (`plain`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from rmsnorm_np.jax import plain
from rmsnorm_np.jax.calls import FORWARD, GRADIENT, GRADIENT_TANGENT, LIKE, SECOND, TANGENT, Arrays, Call, is_column
from rmsnorm_np.jax.handler import TARGET

PRIMITIVES = {kind: Primitive(f"rmsnorm_np_{kind}") for kind in (FORWARD, TANGENT, GRADIENT, GRADIENT_TANGENT, SECOND)}


def bind(call: Call, kind: str, arrays: Arrays) -> Arrays:
    """The results of a primitive by their names; arrays that are None are absent."""
    given = {name: a for name, a in arrays.items() if a is not None}
    call = call._replace(kind=kind, given=tuple(given))
    return dict(zip(call.results(), PRIMITIVES[kind].bind(*given.values(), call=call), strict=True))


def _picked(arrays: Arrays, *names: str) -> Arrays:
    return {name: arrays.get(name) for name in names}


# What they compute


def _results(call: Call, a: Arrays) -> list[tuple[Any, Any]]:
    """The shape and dtype of each result."""
    results: list[tuple[Any, Any]] = []
    for name in call.results():
        if call.bias is not None and name.startswith("dbias"):
            results.append(call.bias)
        else:
            like = a[LIKE[name]]
            results.append((like.shape, like.dtype))
    return results


def _abstract(*avals: Any, call: Call) -> list[Any]:
    shapes = _results(call, dict(zip(call.given, avals, strict=True)))
    return [jax.core.ShapedArray(shape, jnp.dtype(dtype)) for shape, dtype in shapes]


def _compute(*args: Any, call: Call) -> list[Any]:
    a = dict(zip(call.given, args, strict=True))
    if call.kind == GRADIENT_TANGENT:
        return _compute_gradient_tangent(call, a)
    with_kernel = call._replace(keep=False)
    shapes = [jax.ShapeDtypeStruct(*one) for one in _results(with_kernel, a)]
    found: list[Any] = list(jax.ffi.ffi_call(TARGET, shapes)(*args, call=with_kernel.text()))
    return [*found, a["x_dot"]] if call.keep else found


def _compute_gradient_tangent(call: Call, a: Arrays) -> list[Any]:
    names = "dx", "dweight", "dbias"
    parts = []
    if "dy_dot" in a:
        parts.append(bind(call, GRADIENT, {"dy": a["dy_dot"], **_picked(a, "x", "weight")}))
    if "x_dot" in a or "weight_dot" in a:
        dd = {"ddx": a.get("x_dot"), "ddweight": a.get("weight_dot")}
        parts.append(bind(call, SECOND, {**dd, **_picked(a, "dy", "x", "weight")}))
    zeros = (jnp.zeros(shape, dtype) for shape, dtype in _results(call, a))
    wanted = [name for name in names if name + "_dot" in call.results()]
    return [
        sum((part[name] for part in parts[1:] if name in part), parts[0].get(name, zero))
        for name, zero in zip(wanted, zeros, strict=True)
    ]


@functools.cache
def _compiled(kind: str, call: Call) -> Callable[..., Any]:
    compiled: Callable[..., Any] = jax.jit(functools.partial(PRIMITIVES[kind].bind, call=call))
    return compiled


# Derivatives. In each rule t and u hold what is not zero.


def _sum(*terms: Any) -> Any:
    given = [term for term in terms if term is not None]
    return functools.reduce(ad.add_jaxvals, given) if given else None


def _or_zero(tangent: Any, primal: Any) -> Any:
    return ad.Zero(jax.typeof(primal).to_tangent_aval()) if tangent is None else tangent


def _differentiates(kind: str) -> Callable[..., Any]:
    """A rule f(call, a, t, results) that gives the tangent of each result, or None for zero."""

    def register(rule: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def jvp(primals: Any, tangents: Any, *, call: Call) -> tuple[Any, Any]:
            results = PRIMITIVES[kind].bind(*primals, call=call)
            a = dict(zip(call.given, primals, strict=True))
            t = {name: one for name, one in zip(call.given, tangents, strict=True) if type(one) is not ad.Zero}
            found = rule(call, a, t, results)
            return results, [_or_zero(*pair) for pair in zip(found, results, strict=True)]

        ad.primitive_jvps[PRIMITIVES[kind]] = jvp
        return rule

    return register


@_differentiates(FORWARD)
def _forward_jvp(call: Call, a: Arrays, t: Arrays, results: Any) -> list[Any]:
    fused = "residual" in a
    h = results[1] if fused else a["x"]
    x_dot = _sum(*(one if one is None else one.astype(h.dtype) for one in (t.get("x"), t.get("residual"))))
    dots = {"x_dot": x_dot, "weight_dot": t.get("weight"), "bias_dot": t.get("bias")}
    call = call._replace(keep=fused and x_dot is not None)
    found = bind(call, TANGENT, {"x": h, "weight": a.get("weight"), **dots})
    y_dot = found["y_dot"].astype(results[0].dtype)
    return [y_dot, found.get("h_dot")] if fused else [y_dot]


@_differentiates(GRADIENT)
def _gradient_jvp(call: Call, a: Arrays, t: Arrays, results: Any) -> list[Any]:
    dots = {f"{name}_dot": t.get(name) for name in ("dy", "x", "weight")}
    found = [None] * len(results)
    if any(dot is not None for dot in dots.values()):
        found = list(bind(call, GRADIENT_TANGENT, {**_picked(a, "dy", "x", "weight"), **dots}).values())
    return [_sum(found[0], t.get("dh")), *found[1:]]


def _linear_jvp(linear: tuple[str, ...], call: Call, a: Arrays, t: Arrays, results: Any) -> list[Any]:
    """Of a primitive that is linear in some arrays: itself of their tangents, and what the other arrays change."""
    fixed = {name: one for name, one in a.items() if name not in linear}
    found: list[Any] = [None] * len(results)
    moves = {name: one for name, one in t.items() if name in linear}
    if moves:
        keep = call.keep and "x_dot" in moves
        found = list(bind(call._replace(keep=keep), call.kind, {**fixed, **moves}).values())
        found += [None] * (len(results) - len(found))
    turns = {name: one for name, one in t.items() if name not in linear}
    if turns:
        primals = {name: a[name] for name in turns}
        _, more = jax.jvp(lambda args: plain.compute(call, {**a, **args}), (primals,), (turns,))
        found = [_sum(*pair) for pair in zip(found, more, strict=True)]
    return found


LINEAR = {
    TANGENT: ("x_dot", "weight_dot", "bias_dot"),
    GRADIENT: ("dy", "dh"),
    GRADIENT_TANGENT: ("dy_dot", "x_dot", "weight_dot"),
    SECOND: ("ddx", "ddweight", "ddbias"),
}
for _kind in (TANGENT, GRADIENT_TANGENT, SECOND):
    _differentiates(_kind)(functools.partial(_linear_jvp, LINEAR[_kind]))


def _transposes(kind: str) -> Callable[..., Any]:
    """A rule f(call, a, u, wanted) that gives cotangents by the names of the arrays; u: those of the results."""

    def register(rule: Callable[..., Arrays]) -> Callable[..., Arrays]:
        def transpose(cotangents: Any, *args: Any, call: Call) -> list[Any]:
            a = dict(zip(call.given, args, strict=True))
            wanted = {name: one.aval for name, one in a.items() if ad.is_undefined_primal(one)}
            u = {name: u for name, u in zip(call.results(), cotangents, strict=True) if type(u) is not ad.Zero}
            found = rule(call, a, u, wanted) if u else {}
            return [found.get(name) if name in wanted else None for name in call.given]

        ad.primitive_transposes[PRIMITIVES[kind]] = transpose
        return rule

    return register


@_transposes(TANGENT)
def _tangent_transpose(call: Call, a: Arrays, u: Arrays, wanted: Arrays) -> Arrays:
    if "y_dot" not in u:
        return {"x_dot": u["h_dot"]}
    bias = wanted.get("bias_dot")
    call = call._replace(
        dweight="weight_dot" in wanted, bias=None if bias is None else (bias.shape, bias.dtype.name), keep=False
    )
    found = bind(call, GRADIENT, {"dy": u["y_dot"], **_picked(a, "x", "weight"), "dh": u.get("h_dot")})
    return {"x_dot": found["dx"], "weight_dot": found.get("dweight"), "bias_dot": found.get("dbias")}


@_transposes(GRADIENT)
def _gradient_transpose(call: Call, a: Arrays, u: Arrays, wanted: Arrays) -> Arrays:
    dots = {"x_dot": u.get("dx"), "weight_dot": u.get("dweight"), "bias_dot": u.get("dbias")}
    call = call._replace(dweight=False, bias=None)
    return {"dy": bind(call, TANGENT, {**_picked(a, "x", "weight"), **dots})["y_dot"], "dh": u.get("dx")}


@_transposes(GRADIENT_TANGENT)
def _gradient_tangent_transpose(call: Call, a: Arrays, u: Arrays, wanted: Arrays) -> Arrays:
    dd = {"ddx": u.get("dx_dot"), "ddweight": u.get("dweight_dot"), "ddbias": u.get("dbias_dot")}
    call = call._replace(dweight=False, bias=None)
    found = bind(call, SECOND, {**dd, **_picked(a, "dy", "x", "weight")})
    return {"dy_dot": found["ddy"], "x_dot": found["dx"], "weight_dot": found.get("dweight")}


@_transposes(SECOND)
def _second_transpose(call: Call, a: Arrays, u: Arrays, wanted: Arrays) -> Arrays:
    dots = {"dy_dot": u.get("ddy"), "x_dot": u.get("dx"), "weight_dot": u.get("dweight")}
    bias = wanted.get("ddbias")
    call = call._replace(dweight="ddweight" in wanted, bias=None if bias is None else (bias.shape, bias.dtype.name))
    found = bind(call, GRADIENT_TANGENT, {**_picked(a, "dy", "x", "weight"), **dots})
    return {"ddx": found["dx_dot"], "ddweight": found.get("dweight_dot"), "ddbias": found.get("dbias_dot")}


# Batches: one more axis in front, which parameters have in full where each item of the batch has its own


def _batch(args: Any, axes: Any, *, call: Call) -> tuple[Any, Any]:
    pairs = list(zip(call.given, args, axes, strict=True))
    size = next(a.shape[axis] for _, a, axis in pairs if axis is not None)
    sums = call.dweight or call.bias is not None or "dweight" in call.results()
    own = sums or any(is_column(name) and axis is not None for name, _, axis in pairs)

    def batched(name: str, a: Any, axis: Any) -> Any:
        if axis is not None:
            return jnp.moveaxis(a, axis, 0)
        return jnp.broadcast_to(a, (1 if is_column(name) and not own else size, *a.shape))

    if call.bias is not None:
        shape, dtype = call.bias
        call = call._replace(bias=((size, *shape), dtype))
    results = PRIMITIVES[call.kind].bind(*(batched(*pair) for pair in pairs), call=call)
    return results, [0] * len(results)


def _register() -> None:
    for kind, primitive in PRIMITIVES.items():
        primitive.multiple_results = True
        primitive.def_abstract_eval(_abstract)
        primitive.def_impl(lambda *args, call, kind=kind: _compiled(kind, call)(*args))
        mlir.register_lowering(primitive, mlir.lower_fun(_compute, multiple_results=True), platform="cpu")
        batching.primitive_batchers[primitive] = _batch


_register()
