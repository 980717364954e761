"""Nested records, as formulas take and give them: at the ends numbers, or what stands for them, or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def leaves(value: Any) -> list[Any]:
    """What is at the ends, None left out."""
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if value is None else [value]


def mapped(make: Callable[..., Any], value: Any, *others: Any) -> Any:
    """The record with make(leaf, …) in place of each leaf; others: records of the same shape."""
    if isinstance(value, tuple):
        return like(value, [mapped(make, *items) for items in zip(value, *others, strict=True)])
    return None if value is None else make(value, *others)


def given(record: Any, make: Callable[..., Any], *others: Any) -> Any:
    """make(item, …) for each item of the records, None where the first has None."""
    return like(record, [None if item[0] is None else make(*item) for item in zip(record, *others, strict=True)])


def rebuilt(shape: Any, found: list[Any]) -> Any:
    """The record of this shape whose leaves are found; takes them from the list."""
    return mapped(lambda _: found.pop(0), shape)


def like(record: Any, items: list[Any]) -> Any:
    """A record, or a tuple, of the same type."""
    return type(record)(*items) if hasattr(record, "_fields") else tuple(items)
