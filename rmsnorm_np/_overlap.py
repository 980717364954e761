"""Which arrays share memory, by themselves or with others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]


def folds(a: Array) -> bool:
    """Whether an axis steps by less than what the axes inside it span: what every view of distinct elements avoids."""
    span = a.itemsize
    for step, length in sorted((abs(step), length) for step, length in zip(a.strides, a.shape, strict=True)):
        if length > 1:
            if step < span:
                return a.size > 0
            span += step * (length - 1)
    return False


def _same_memory(a: Array, b: Array) -> bool:
    """Whether two C-contiguous arrays are the same elements."""
    return (a.shape, a.dtype, a.__array_interface__["data"]) == (b.shape, b.dtype, b.__array_interface__["data"])


def may_write(out: Array, reads: tuple[Array | None, ...], parameters: tuple[Array | None, ...]) -> bool:
    """Whether an engine may write straight to out: it shares no memory, or is exactly one of those that are read."""
    for a in reads:
        if a is not None and a is not out and np.may_share_memory(out, a) and not _same_memory(out, a):
            return False
    for a in parameters:  # noqa: SIM110 (a generator takes a third of a microsecond)
        if a is not None and np.may_share_memory(out, a):
            return False
    return True


def begin_together(a: Array, b: Array) -> bool:
    """Whether the first elements of two arrays are the same memory."""
    first: tuple[int, bool] = a.__array_interface__["data"]
    return bool(first[0] == b.__array_interface__["data"][0])


def check_apart(name: str, a: Array | None, other_name: str, other: Array | None) -> None:
    """Raise if two arrays to write to share memory."""
    if a is not None and other is not None and np.shares_memory(a, other):
        raise ValueError(f"{name} and {other_name} share memory, expected two arrays apart")
