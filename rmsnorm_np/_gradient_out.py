"""Where gradients are written: an array for dx, or a tuple of arrays for dx, dweight and dbias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rmsnorm_np._arrays import as_array, check_out, native_dtype
from rmsnorm_np._overlap import check_apart

if TYPE_CHECKING:
    from collections.abc import Callable

_NAMES = "out[0] (dx)", "out[1] (dweight)", "out[2] (dbias)"


class GradientOut(NamedTuple):
    """name, dx: of the array that dx is written to, if there is one. into: takes dx, dweight and dbias, brings the last
    two to where they are asked for, and gives all three, as the arrays that the caller gave.
    """

    name: str
    dx: Any
    into: Callable[[Any, Any, Any], tuple[Any, Any, Any]]


def gradient_out(out: Any, weight: Any, bias: Any) -> GradientOut:
    """The out of a backward function, checked but for dx."""

    def check(name: str, a: Any, like_name: str, like: Any) -> Any:
        dtype = native_dtype(like_name, as_array(like_name, like).dtype, complex_too=True)
        return check_out(name, a, np.shape(like), dtype, like_name)

    return gradient_out_by(out, weight, bias, check, check_apart, np.copyto)


def gradient_out_by(
    out: Any,
    weight: Any,
    bias: Any,
    check: Callable[[str, Any, str, Any], Any],
    apart: Callable[[str, Any, str, Any], None],
    write: Callable[[Any, Any], None],
) -> GradientOut:
    """The same for arrays of any kind. check: of an array to write to, which it gives in the form that the other two
    take: apart, which checks two of them, and write, which copies a gradient there.
    """
    if not isinstance(out, tuple):
        return GradientOut("out", out, lambda *gradients: gradients)
    if len(out) != 3:
        raise TypeError(f"out is a tuple of {len(out)}, expected an array or a tuple of 3: dx, dweight, dbias")
    targets: list[Any] = [None, None]
    for j, (name, a, like_name, like) in enumerate(
        zip(_NAMES[1:], out[1:], ("weight", "bias"), (weight, bias), strict=True)
    ):
        if a is not None:
            if like is None:
                raise ValueError(f"{name} is given, expected None without a {like_name}")
            targets[j] = check(name, a, like_name, like)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        if out[i] is not None and out[j] is not None:
            apart(_NAMES[i], out[i], _NAMES[j], out[j])

    def into(dx: Any, *gradients: Any) -> tuple[Any, Any, Any]:
        for target, gradient in zip(targets, gradients, strict=True):
            if target is not None:
                write(target, gradient)
        dweight, dbias = (made if a is None else a for a, made in zip(out[1:], gradients, strict=True))
        return dx, dweight, dbias

    return GradientOut(_NAMES[0], out[0], into)
