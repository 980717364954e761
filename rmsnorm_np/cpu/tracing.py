"""Formulas become machine code by being run once, on numbers that write LLVM for what is done to them.

A `step` of a kernel is a Numba intrinsic whose code generator calls an ordinary Python function. Loops, ``if``, None,
records and pairs in it are gone when it is done; what is left is one straight line of vector instructions. Numba sees
the loops over rows and elements, and hands opaque values (`Traced`) from step to step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic, models, register_model

from rmsnorm_np.cpu.shapes import Leaf, shape_of
from rmsnorm_np.cpu.vector import Number, Writer
from rmsnorm_np.ops.records import leaves, rebuilt


class Traced(types.Type):  # type: ignore[misc]
    """Numba's type of a value that only steps look into. shape: the value with a `Leaf` in place of each number."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape
        super().__init__(name=f"Traced({shape})")


@register_model(Traced)
class _TracedModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Traced) -> None:
        super().__init__(manager, kind, ir.LiteralStructType([leaf.llvm for leaf in leaves(kind.shape)]))


def tried(formula: Callable[..., Any], *shapes: Any) -> Any:
    """The shape of what a formula returns for arguments of these shapes: it is run once, and its code thrown away."""
    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), []), "trial")
    builder = ir.IRBuilder(function.append_basic_block())
    make = lambda leaf: Number(builder, ir.Constant(leaf.llvm, ir.Undefined))  # noqa: E731
    return shape_of(formula(*(rebuilt(shape, list(map(make, leaves(shape)))) for shape in shapes)))


def step(body: Callable[..., Any], result: Any = None) -> Any:
    """A piece of a kernel, called with one tuple: its code is what ``body(writer, *items)`` does.

    Items that are records come as such, None as None, floats as `Number`, `Traced` values as what they were, anything
    else as the LLVM value. result: the shape of what the body returns, or Numba's type of it; None for nothing.
    """
    if isinstance(result, (Leaf, tuple)):
        result = Traced(result)

    @intrinsic
    def written(typing_context: Any, items: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            writer = Writer(context, builder)
            found = body(writer, *_seen(builder, items, args[0]))
            return context.get_dummy_value() if result is None else _packed(context, builder, result, found)

        return (types.none if result is None else result)(items), codegen

    return written


def _seen(builder: Any, kind: Any, value: Any) -> Any:
    """A value of Numba's as steps see it."""
    if isinstance(kind, (types.NoneType, types.Omitted)):
        return None
    if isinstance(kind, Traced):
        count = len(leaves(kind.shape))
        return rebuilt(kind.shape, [Number(builder, builder.extract_value(value, j)) for j in range(count)])
    if isinstance(kind, types.BaseTuple):
        items = [_seen(builder, k, builder.extract_value(value, j)) for j, k in enumerate(kind)]
        return kind.instance_class(*items) if isinstance(kind, types.BaseNamedTuple) else tuple(items)
    return Number(builder, value) if isinstance(kind, types.Float) else value


def _packed(context: Any, builder: Any, kind: Any, found: Any) -> Any:
    """What a step returns, as Numba's value of this type."""
    if isinstance(kind, Traced):
        value = ir.Constant(context.get_value_type(kind), ir.Undefined)
        for j, leaf in enumerate(leaves(found)):
            value = builder.insert_value(value, leaf.value, j)
        return value
    if isinstance(kind, types.NoneType):
        return context.get_dummy_value()
    if isinstance(kind, types.BaseTuple):
        items = [_packed(context, builder, k, item) for k, item in zip(kind, found, strict=True)]
        return context.make_tuple(builder, kind, items)
    return found.value if isinstance(found, Number) else found
