"""Formulas become device code by being run once, on numbers that write LLVM for what is done to them.

A `step` of a kernel is an intrinsic whose code generator calls an ordinary Python function. Loops, ``if``, None,
records and pairs in it are gone when it is done; what is left is one straight line of instructions on registers. Numba
sees the loops over rows and the barriers, and hands opaque values (`Traced`) from step to step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic, models, register_model

from rmsnorm_np.cuda.number import KINDS, LLVM, Number
from rmsnorm_np.ops.records import leaves, mapped, rebuilt


class Traced(types.Type):  # type: ignore[misc]
    """Numba's type of a value that only steps look into. shape: the value with a kind in place of each leaf."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape
        super().__init__(name=f"Traced({shape})")


@register_model(Traced)
class _TracedModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Traced) -> None:
        super().__init__(manager, kind, ir.LiteralStructType([LLVM[leaf] for leaf in leaves(kind.shape)]))


def shape_of(value: Any) -> Any:
    """The value with a kind in place of each leaf."""
    return mapped(lambda leaf: leaf.kind if isinstance(leaf, Number) else KINDS[leaf.type], value)


def tried(body: Callable[..., Any], *shapes: Any) -> Any:
    """The shape of what body(builder, …) returns for values of these shapes: run once, its code thrown away."""
    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), []), "trial")
    builder = ir.IRBuilder(function.append_basic_block())
    undefined = lambda kind: seen_leaf(builder, ir.Constant(LLVM[kind], ir.Undefined))  # noqa: E731
    return shape_of(body(builder, *(mapped(undefined, shape) for shape in shapes)))


def step(body: Callable[..., Any], result: Any = None) -> Any:
    """A piece of a kernel, called with one tuple: its code is what ``body(builder, *items)`` does.

    Items that are records come as such, None as None, floats as `Number`, `Traced` values as what they were, anything
    else as the LLVM value. result: the shape of what the body returns, or Numba's type of it; None for nothing.
    """
    if isinstance(result, (str, tuple)):
        result = Traced(result)

    @intrinsic
    def written(typing_context: Any, items: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            found = body(builder, *_seen(builder, items, args[0]))
            if result is None:
                return context.get_dummy_value()
            if not isinstance(result, Traced):
                return found.value if isinstance(found, Number) else found
            value = ir.Constant(context.get_value_type(result), ir.Undefined)
            for j, leaf in enumerate(leaves(found)):
                value = builder.insert_value(value, leaf.value if isinstance(leaf, Number) else leaf, j)
            return value

        return (types.void if result is None else result)(items), codegen

    return written


def seen_leaf(builder: Any, value: Any) -> Any:
    """A float as `Number`, a word as it is."""
    return value if isinstance(value.type, ir.IntType) else Number(builder, value)


def _seen(builder: Any, kind: Any, value: Any) -> Any:
    """A value of Numba's as steps see it."""
    if isinstance(kind, (types.NoneType, types.Omitted)):
        return None
    if isinstance(kind, Traced):
        count = len(leaves(kind.shape))
        return rebuilt(kind.shape, [seen_leaf(builder, builder.extract_value(value, j)) for j in range(count)])
    if isinstance(kind, types.BaseTuple):
        items = [_seen(builder, k, builder.extract_value(value, j)) for j, k in enumerate(kind)]
        return kind.instance_class(*items) if isinstance(kind, types.BaseNamedTuple) else tuple(items)
    return Number(builder, value) if isinstance(kind, types.Float) else value


def zeros(shape: Any) -> Any:
    """A step: a value of this shape, all zero."""
    return step(lambda builder: zero(builder, shape), shape)


def zero(builder: Any, shape: Any) -> Any:
    """A value of this shape, all zero."""
    return mapped(lambda kind: seen_leaf(builder, LLVM[kind](0)), shape)
