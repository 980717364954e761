"""Rows whose sums leave the range of the type they are computed in: gathered, brought into the range, run once more.

Rows of 16-bit floats, which the engine computes in float32, are then computed in float64. A row of float64 is scaled by
a power of two, which is exact, and eps by its square: the norm of s·x with eps·s² is the norm of x with eps. The scale
makes the root mean square lie between 1 and 2, so neither xhat nor a product of dy and rstd leaves the range unless the
result does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rmsnorm_np.cpu.jit import compiled
from rmsnorm_np.cpu.mode import restore_mode, standard_mode
from rmsnorm_np.ops.operation import Operation, Totals
from rmsnorm_np.ops.records import leaves

if TYPE_CHECKING:
    from collections.abc import Callable


@contextlib.contextmanager
def standard_here() -> Iterator[None]:
    """A block of Python in the standard mode of this thread: NumPy, too, would find zeros for subnormal numbers."""
    set_it, restore_it = _functions()
    before = set_it()
    try:
        yield
    finally:
        restore_it(before)


@functools.cache
def _functions() -> tuple[Any, Any]:
    return (
        compiled("standard_mode", lambda: lambda: standard_mode(), ()),
        compiled("restore_mode", lambda: lambda before: restore_mode(before), (0,)),
    )


# Exponent of the standard deviation where a mean is taken off: an element next to it is a small difference, whose low
# part must not be subnormal.
GOAL = 100
AT_ONCE = 1 << 16  # elements that NumPy works on at a time: they stay in the cache, and fresh memory costs more
LARGE = 2.0**900  # dy from here on leaves no room for a factor of 2**GOAL


def goal_of(operation: Operation) -> int:
    """The exponent that the root mean square of a row, less its mean if that is taken off, is to have."""
    return GOAL if operation.recentring else 0


def others_of(call: Call, place: Any, e: Any) -> dict[str, Any]:
    """What is read beside the first array, of these rows; times 2**e (rows, 1) where that goes with the first."""

    def one(field: str, a: Any) -> Any:
        if a is None or e is None or field not in call.operation.scaled:
            return None if a is None else a[place]
        return times_power(a[place].astype(np.float64), e)

    return {field: one(field, a) for field, a in zip(call.reads._fields[1:], call.reads[1:], strict=True)}


def groups(marks: Any, columns: Any, m: int, at_once: int) -> Iterator[tuple[int, Any, Any]]:
    """(h, marked rows that share row h of the totals, at most at_once of them, their columns)."""
    rows = np.flatnonzero(marks)
    for h in np.unique(rows % m):
        own = [None if a is None else a[h % len(a)][None] for a in columns[:-1]]
        chosen = rows[rows % m == h]
        for first in range(0, len(chosen), at_once):
            yield int(h), chosen[first : first + at_once], type(columns)(*own, columns.weight_offset)


@np.errstate(all="ignore")
def in_range(operation: Operation, x: Any, others: Any, k: int, eps: Any) -> tuple[Any, Any, Any]:
    """x, exponents e (rows, 1) that bring it into the range, and eps (rows,) to go with x · 2**e.

    x is float64, a copy, and less its first element where that is exact and makes no difference. others: what else is
    read of these rows; it may be a factor of what their sums are about.
    """
    if operation.recentring:  # less its first element, if no element is so far away that the difference is rounded
        first = x[:, :1].copy()
        near = (np.abs(x - first) <= 0.5 * np.abs(first)).all(axis=1)  # Sterbenz' lemma
        x[near] -= first[near]
    about = leaves(operation.enter(operation.Reads(x, **others)))[0]
    before: Any = 0
    if about is not x:
        before = _exponent(np.fmax.reduce(np.abs(x), axis=1, keepdims=True))  # no product overflows then
        about = leaves(operation.enter(operation.Reads(times_power(x, before), **others)))[0]
        eps = _scaled(eps, before, before)
    inside = about[:, :k]
    largest = np.fmax(np.fmax.reduce(np.abs(inside), axis=1, keepdims=True), np.sqrt(eps))
    e = _exponent(largest)
    inside = times_power(inside, e)
    if operation.recentring:
        inside = inside - np.mean(inside, axis=1, keepdims=True)
    e += (
        _exponent(np.sqrt(np.mean(inside * inside, axis=1, keepdims=True) + _scaled(eps, e, e)))
        + 1
        + goal_of(operation)
    )
    e = np.where(np.isfinite(largest), e, 0)  # beside an infinity the others become zero, and must not overflow first
    return x, e + before, _scaled(eps, e, e)[:, 0]


def times_power(a: Any, e: Any) -> Any:
    """a · 2**e for exponents (rows, 1) of any size: `np.ldexp` in a fifth of the time."""
    while e.any():
        part = np.clip(e, -1000, 1000)
        a = a * np.ldexp(1.0, part)
        e = e - part
    return a


def _exponent(size: Any) -> Any:
    """What brings sizes between 1/2 and 1; 0 for what is zero, infinite or NaN."""
    ordinary = np.isfinite(size) & (size > 0)
    return np.where(ordinary, np.minimum(-np.frexp(size)[1], 1023), 0)


def _scaled(numbers: Any, *exponents: Any) -> Any:
    """numbers · 2**e for each e, one after another: one power of two may be out of range."""
    for e in exponents:
        numbers = np.ldexp(numbers, e)
    return numbers


class Call(NamedTuple):
    """A call whose rows left the range. k, eps: as the engine has them; marks: 1 for each of those rows."""

    operation: Operation
    reads: Any
    columns: Any
    k: int
    eps: float
    marks: Any


def place_of(rows: Any, a: Any) -> Any:
    """The index of these rows of an array (rows, n), or (outer, n, inner), as an array (rows, n)."""
    if a.ndim == 3:
        return rows // a.shape[2], slice(None), rows % a.shape[2]
    # a slice copies nothing
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows


@np.errstate(all="ignore")  # a result beyond the range of a 16-bit float is infinity, in silence as in the kernels
def forward(run: Callable[..., Any], call: Call, y: Any) -> None:
    """The rows of y that are marked. run(call, out) gives y of rows that need no marks, in out if that is not None."""
    x = call.reads[0]
    if x.itemsize > 2 or y.itemsize == 8:  # float64 outputs are computed in pairs, which have no more range
        for place, _, ready in scaled(call):
            y[place] = run(ready, None)
        return
    m = max(1 if a is None else len(a) for a in call.columns[:-1])
    for _, rows, own in groups(call.marks, call.columns, m, len(call.marks)):
        place = place_of(rows, x)
        reads = call.operation.Reads(*(None if a is None else a[place] for a in call.reads))
        out = y[place] if isinstance(place, slice) else np.empty(reads[0].shape, y.dtype)
        y[place] = run(call._replace(reads=reads, columns=own, marks=None), out)


@np.errstate(all="ignore")
def scaled(call: Call) -> Iterator[tuple[Any, Any, Call]]:
    """(their place, their numbers, a call of them in the range) of the rows that are marked, some at a time."""
    x = call.reads[0]
    m = max(1 if a is None else len(a) for a in call.columns[:-1])
    for _, rows, own in groups(call.marks, call.columns, m, max(1, AT_ONCE // x.shape[1])):
        place = place_of(rows, x)
        beside = others_of(call, place, None)
        chosen, e, eps = in_range(call.operation, x[place].astype(np.float64), beside, call.k, call.eps)
        reads = call.operation.Reads(times_power(chosen, e), **others_of(call, place, e))
        yield place, rows, call._replace(reads=reads, columns=own, eps=eps, marks=None)


@np.errstate(all="ignore")
def backward(run: Callable[..., Any], call: Call, out: Any, likes: Any, m: int) -> Totals:
    """The rows of the outputs that are marked; returns their shares of the totals, float64 (m, n), but for those that
    the kernel adds. likes: the columns that the totals are like, or None.

    run(call, totals) gives the outputs of rows that need no marks and, if totals is true, float64 sums. For the outputs
    each row of dy is scaled to its size. Not for dweight, where a large dy meets small ones of other rows: xhat has no
    scale, and dy has the factor of x as long as there is room for it, so that their product with rstd is as large as
    dy.
    """
    operation, (x, *_) = call.operation, call.reads
    dy, dh = call.reads.dy, getattr(call.reads, "dh", None)
    totals = Totals(*(None if a is None else np.zeros((m, x.shape[1])) for a in likes))
    at_once = len(call.marks) if x.itemsize == 2 else max(1, AT_ONCE // x.shape[1])

    def add(h: int, shares: Totals, exponent: int) -> None:
        for name, total, share in zip(Totals._fields, totals, shares, strict=True):
            if total is not None and name not in operation.always:
                total[h] += np.ldexp(share[0], exponent)

    for h, rows, own in groups(call.marks, call.columns, m, at_once):
        place = place_of(rows, x)
        if x.itemsize == 2:
            reads = operation.Reads(*(None if a is None else a[place] for a in call.reads))
            results, shares = run(call._replace(reads=reads, columns=own, marks=None), True)
            for a, result in zip(out, results, strict=True):
                a[place] = result
            add(h, shares, 0)
            continue
        beside = others_of(call, place, None)
        chosen, e, eps = in_range(operation, x[place].astype(np.float64), beside, call.k, call.eps)
        gradient = dy[place].astype(np.float64)
        d = _exponent(np.fmax.reduce(np.abs(gradient), axis=1, keepdims=True))
        ready = call._replace(columns=own, eps=eps, marks=None)

        def reads_of(x: Any, e: Any, dy: Any, place: Any = place) -> Any:
            # dh may be too small, or large, for the row's scale
            others = {**others_of(call, place, e), "dy": dy} | ({} if dh is None else {"dh": None})
            return operation.Reads(times_power(x, e), **others)

        results = run(ready._replace(reads=reads_of(chosen, e, times_power(gradient, d))), False)[0]
        for field, a, result in zip(operation.Writes._fields, out, results, strict=True):
            exponent = e * (field in operation.divided) - d * (field in operation.linear)
            result = times_power(result, exponent)
            a[place] = result if dh is None else result + dh[place]
        large = np.fmax.reduce(np.abs(gradient), axis=1) >= LARGE
        usual = goal_of(operation)
        for some, goal in ((~large, usual), (large, 0)):
            if any(t is not None for t in totals) and some.any():
                at = place_of(rows[some], x)
                reads = reads_of(chosen[some], e[some] - usual + goal, gradient[some] * 2.0**goal, at)
                eps_some = np.ldexp(eps[some], 2 * (goal - usual))
                add(h, run(ready._replace(reads=reads, eps=eps_some), True)[1], -goal)
    return totals
