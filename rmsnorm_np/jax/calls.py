"""A call as the primitives describe it, and the public function of this library that computes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import rmsnorm_np as rn

Arrays: TypeAlias = dict[str, Any]

FORWARD, TANGENT, GRADIENT, GRADIENT_TANGENT, SECOND = "forward", "tangent", "gradient", "gradient_tangent", "second"

# what each result is like, in shape and dtype
LIKE = {
    "y": "x", "h": "residual", "y_dot": "x", "h_dot": "x", "dx": "x", "ddy": "dy", "dweight": "weight",
    "dx_dot": "x", "dweight_dot": "weight",
}  # fmt: skip


class Call(NamedTuple):
    """All of a call but its arrays.

    norm, eps, p, weight_offset: the function. kind: what is computed of it, see `primitives`. given: names of the
    arrays. keep: whether a tangent is that of h, too. dweight: whether the gradient by weight is wanted. bias: shape
    and dtype of the bias, where the gradient by it is wanted.
    """

    norm: str
    eps: float
    p: float
    weight_offset: float
    kind: str = FORWARD
    given: tuple[str, ...] = ()
    keep: bool = False
    dweight: bool = False
    bias: tuple[tuple[int, ...], str] | None = None

    def results(self) -> tuple[str, ...]:
        """The names of the results, in order."""
        wanted = {
            FORWARD: {"y": True, "h": "residual" in self.given},
            TANGENT: {"y_dot": True, "h_dot": self.keep},
            GRADIENT: {"dx": True, "dweight": self.dweight, "dbias": self.bias is not None},
            GRADIENT_TANGENT: {"dx_dot": True, "dweight_dot": self.dweight, "dbias_dot": self.bias is not None},
            SECOND: {"ddy": True, "dx": True, "dweight": "weight" in self.given},
        }
        return tuple(name for name, is_wanted in wanted[self.kind].items() if is_wanted)

    def text(self) -> str:
        """All of it, for a compiled program: it may be kept on disk."""
        return json.dumps(self)


def call_of(text: bytes) -> Call:
    """The call that `Call.text` describes."""
    call = Call(*json.loads(text))
    return call._replace(given=tuple(call.given))


def is_column(name: str) -> bool:
    """Whether an array of this name is like a parameter; the others are like x."""
    return "weight" in name or "bias" in name


def function_of(call: Call) -> Callable[[Arrays, Arrays], object]:
    """compute(arrays, out): write the results of a call to the arrays out."""
    options = {"eps": call.eps, "weight_offset": call.weight_offset}
    if call.norm == "rms_norm":
        options["p"] = call.p
    more = "residual" in call.given or "dh" in call.given
    prefix, suffix = "add_" if more else "", {FORWARD: "", TANGENT: "_jvp", GRADIENT: "_backward"}
    function = getattr(rn, prefix + call.norm + suffix.get(call.kind, "_double_backward"))

    def forward(a: Arrays, out: Arrays) -> object:
        if more:
            return function(**a, **options, out=out["y"], residual_out=out["h"])
        return function(**a, **options, out=out["y"])

    def tangent(a: Arrays, out: Arrays) -> object:
        bias_dot = a.get("bias_dot")  # in place of the bias, of which only the shape matters
        x_dot, weight_dot = a.get("x_dot"), a.get("weight_dot")
        return function(a["x"], a.get("weight"), bias_dot, x_dot, weight_dot, bias_dot, **options, out=out["y_dot"])

    def gradient(a: Arrays, out: Arrays) -> object:
        dweight, dbias = out.get("dweight"), out.get("dbias")
        first = (a["dy"], a["dh"]) if more else (a["dy"],)
        return function(*first, a["x"], a.get("weight"), dbias, **options, out=(out["dx"], dweight, dbias))

    def second(a: Arrays, out: Arrays) -> object:
        ddbias, weight = a.get("ddbias"), a.get("weight")
        dd = a.get("ddx"), a.get("ddweight"), ddbias
        grads = function(*dd, a["dy"], a["x"], weight, ddbias, **options, out=(out["ddy"], out["dx"]))
        if weight is not None:
            out["dweight"][...] = grads.dweight
        return grads

    return {FORWARD: forward, TANGENT: tangent, GRADIENT: gradient, SECOND: second}[call.kind]
