"""How arithmetic on lanes compiles: plain vector instructions, and error-free ones for ``exact`` and ``pair``."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.extending import lower_builtin, type_callable

from rmsnorm_np.cpu import simd
from rmsnorm_np.cpu.llvm import DOUBLE, FLOAT, I32, intrinsic, mask, splat
from rmsnorm_np.cpu.lowering import LanesType
from rmsnorm_np.cpu.pairs import (
    add_parts,
    add_square_parts,
    collapse,
    divide_parts,
    fma,
    multiply_parts,
    negate_parts,
    pair,
    parts,
    rounded_product,
)

KINDS = ("single", "double", "exact", "pair")  # in the order of promotion


def _kind_of(numba_type: Any) -> str | None:
    """A plain number takes the kind of the lanes beside it."""
    return numba_type.kind if isinstance(numba_type, LanesType) else None


def _common(a: Any, b: Any) -> tuple[str, int]:
    kind = max((kind for kind in map(_kind_of, (a, b)) if kind), key=KINDS.index)
    count = max(getattr(a, "count", 1), getattr(b, "count", 1))
    return kind, count


def _type_arithmetic(context: Any) -> Any:
    def typer(a: Any, b: Any) -> Any:
        lanes = [t for t in (a, b) if isinstance(t, LanesType)]
        if lanes and all(isinstance(t, (LanesType, types.Number)) for t in (a, b)):
            kind, count = _common(a, b)
            return LanesType("pair" if kind == "exact" else kind, count)

    return typer


def _operand(context: Any, builder: Any, numba_type: Any, value: Any, kind: str, count: int) -> tuple[Any, Any]:
    """An operand as (high, low) vectors of the common kind."""
    element = FLOAT if kind == "single" else DOUBLE
    if not isinstance(numba_type, LanesType):
        scalar = context.cast(builder, value, numba_type, types.float32 if kind == "single" else types.float64)
        return splat(builder, scalar, count), None
    high, low = parts(numba_type.kind, value, builder)
    if high.type.element != element:
        high = builder.fpext(high, ir.VectorType(element, numba_type.count))
    if numba_type.count != count:
        zero = ir.Constant(I32, 0)
        high = splat(builder, builder.extract_element(high, zero), count)
        low = None if low is None else splat(builder, builder.extract_element(low, zero), count)
    return high, low


def _type_optional_arithmetic(context: Any) -> Any:
    typer = _type_arithmetic(context)
    return lambda a, b: a if types.none in (a, b) else typer(a, b)


def _arithmetic(function: Any, plain: str, exact: Any, optional: Any = None) -> None:
    """``function`` on lanes, and ``optional``, which gives back its first argument where one is None."""
    type_callable(function)(_type_arithmetic)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, count = _common(*sig.args)
        a, b = (_operand(context, builder, t, v, kind, count) for t, v in zip(sig.args, args, strict=True))
        if kind in ("single", "double"):
            return getattr(builder, plain)(a[0], b[0])
        return exact(builder, a, b)

    for signature in ((LanesType, LanesType), (LanesType, types.Number), (types.Number, LanesType)):
        lower_builtin(function, *signature)(lower)
        if optional is not None:
            lower_builtin(optional, *signature)(lower)
    if optional is None:
        return
    type_callable(optional)(_type_optional_arithmetic)
    for signature in ((types.Any, types.NoneType), (types.NoneType, types.Any), (types.NoneType, types.NoneType)):
        lower_builtin(optional, *signature)(lambda context, builder, sig, args: args[0])


_arithmetic(operator.add, "fadd", add_parts, simd.plus)
_arithmetic(operator.sub, "fsub", lambda builder, a, b: add_parts(builder, a, negate_parts(builder, b)))
_arithmetic(operator.mul, "fmul", multiply_parts, simd.times)


@type_callable(simd.add_exact_square)
def _type_add_exact_square(context: Any) -> Any:
    def typer(total: Any, lanes: Any) -> Any:
        if isinstance(total, LanesType) and isinstance(lanes, LanesType) and lanes.kind != "pair":
            return total

    return typer


@lower_builtin(simd.add_exact_square, LanesType, LanesType)
def _add_exact_square(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    total, lanes = args
    kind = sig.args[1].kind
    if kind in ("single", "double"):
        suffix = "f32" if kind == "single" else "f64"
        return intrinsic(builder, f"llvm.fmuladd.v{total.type.count}{suffix}", total.type, [lanes, lanes, total])
    return add_square_parts(builder, parts("pair", total, builder), (lanes, None))


@type_callable(simd.add_square)
def _type_add_square(context: Any) -> Any:
    def typer(total: Any, lanes: Any) -> Any:
        if isinstance(total, LanesType) and isinstance(lanes, LanesType) and total.kind == lanes.kind:
            return total

    return typer


@lower_builtin(simd.add_square, LanesType, LanesType)
def _add_square(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    total, lanes = args
    if sig.args[1].kind != "pair":
        return builder.fadd(total, builder.fmul(lanes, lanes))
    return add_square_parts(builder, parts("pair", total, builder), parts("pair", lanes, builder))


@type_callable(simd.rounded_product)
def _type_rounded_product(context: Any) -> Any:
    def typer(a: Any, b: Any) -> Any:
        if isinstance(a, LanesType) and isinstance(b, LanesType):
            kind, count = _common(a, b)
            return LanesType("single" if kind == "single" else "double", count)
        if isinstance(a, LanesType) and isinstance(b, types.NoneType):
            return a

    return typer


@lower_builtin(simd.rounded_product, LanesType, types.NoneType)
def _no_product(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return args[0]


@lower_builtin(simd.rounded_product, LanesType, LanesType)
def _rounded_product(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind, count = _common(*sig.args)
    a, b = (_operand(context, builder, t, v, kind, count) for t, v in zip(sig.args, args, strict=True))
    return rounded_product(builder, a, b)


@type_callable(simd.add_product)
def _type_add_product(context: Any) -> Any:
    def typer(total: Any, a: Any, b: Any) -> Any:
        if all(isinstance(lanes, LanesType) for lanes in (total, a, b)):
            return total

    return typer


@lower_builtin(simd.add_product, LanesType, LanesType, LanesType)
def _add_product(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    total, *factors = args
    kind, count = _common(*sig.args[1:])
    a, b = (_operand(context, builder, t, v, kind, count) for t, v in zip(sig.args[1:], factors, strict=True))
    if kind in ("single", "double"):
        suffix = "f32" if kind == "single" else "f64"
        return intrinsic(builder, f"llvm.fmuladd.v{count}{suffix}", total.type, [a[0], b[0], total])
    product = parts("pair", multiply_parts(builder, a, b), builder)
    if sig.args[0].kind == "pair":
        return add_parts(builder, parts("pair", total, builder), product)
    return builder.fadd(total, collapse(builder, pair(builder, *product)))


@type_callable(simd.first_lanes)
def _type_first_lanes(context: Any) -> Any:
    return lambda lanes, count: lanes


@lower_builtin(simd.first_lanes, LanesType, types.NoneType)
@lower_builtin(simd.joined, LanesType, LanesType, types.NoneType)
def _all_lanes(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return args[0]


def _select(builder: Any, numba_type: Any, count: Any, first: Any, rest: Any) -> Any:
    """The first `count` lanes of `first`, and those of `rest` behind, part by part."""
    chosen = mask(builder, count, numba_type.count)
    pieces = (parts(numba_type.kind, value, builder) for value in (first, rest))
    selected = [builder.select(chosen, a, b) for a, b in zip(*pieces, strict=True) if a is not None]
    return selected[0] if len(selected) == 1 else pair(builder, *selected)


@lower_builtin(simd.first_lanes, LanesType, types.Integer)
def _first_lanes(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    lanes, count = args
    return _select(builder, sig.args[0], count, lanes, ir.Constant(lanes.type, None))


@type_callable(simd.joined)
def _type_joined(context: Any) -> Any:
    return lambda first, rest, count: first if first == rest else None


@lower_builtin(simd.joined, LanesType, LanesType, types.Integer)
def _joined(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    first, rest, count = args
    return _select(builder, sig.args[0], count, first, rest)


@type_callable(simd.across)
def _type_across(context: Any) -> Any:
    def typer(lanes: Any) -> Any:
        if isinstance(lanes, LanesType):
            return types.float64 if lanes.kind in ("single", "double") else LanesType("pair", 1)

    return typer


@lower_builtin(simd.across, LanesType)
def _across(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    high, low = parts(sig.args[0].kind, args[0], builder)
    if high.type.element == FLOAT:
        high = builder.fpext(high, ir.VectorType(DOUBLE, high.type.count))
    while (half := high.type.count // 2) > 0:
        lower, upper = (ir.Constant(ir.VectorType(I32, half), list(range(first, first + half))) for first in (0, half))
        a, b = ((builder.shuffle_vector(high, high, i)) for i in (lower, upper))
        if sig.return_type == types.float64:
            high = builder.fadd(a, b)
        else:
            a_low, b_low = (None if low is None else builder.shuffle_vector(low, low, i) for i in (lower, upper))
            high, low = parts("pair", add_parts(builder, (a, a_low), (b, b_low)), builder)
    return builder.extract_element(high, ir.Constant(I32, 0)) if low is None else pair(builder, high, low)


# Scalars that are pairs: what `across` returns, and what is computed from it

type_callable(operator.truediv)(_type_arithmetic)


@lower_builtin(operator.truediv, LanesType, types.Number)
@lower_builtin(operator.truediv, types.Number, LanesType)
def _divide(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind, count = _common(*sig.args)
    a, b = (_operand(context, builder, t, v, kind, count) for t, v in zip(sig.args, args, strict=True))
    return divide_parts(builder, a, b)


@type_callable(np.sqrt)
def _type_sqrt(context: Any) -> Any:
    def typer(number: Any) -> Any:
        if isinstance(number, LanesType) and number.kind == "pair":
            return number

    return typer


@lower_builtin(np.sqrt, LanesType)
def _sqrt(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    high, low = parts("pair", args[0], builder)
    root = intrinsic(builder, f"llvm.sqrt.v{high.type.count}f64", high.type, [high])
    rest = builder.fadd(fma(builder, builder.fneg(root), root, high), low)
    return pair(builder, root, builder.fdiv(rest, builder.fadd(root, root)))


@type_callable(simd.rounded)
def _type_rounded(context: Any) -> Any:
    def typer(number: Any) -> Any:
        if isinstance(number, LanesType) and number.count > 1:
            return LanesType("double", number.count)
        return types.float64

    return typer


@lower_builtin(simd.rounded, types.Float)
def _rounded_float(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return args[0]


@lower_builtin(simd.rounded, LanesType)
def _rounded_lanes(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    value = args[0]
    if sig.args[0].kind == "pair":
        value = collapse(builder, value)
    if sig.args[0].kind == "single":
        value = builder.fpext(value, ir.VectorType(DOUBLE, value.type.count))
    return value if value.type.count > 1 else builder.extract_element(value, ir.Constant(I32, 0))
