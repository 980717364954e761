"""Both norms where each worker has a part of every row, a few rows at a time.

What a worker's part adds up to goes out by `reduce`, and what all parts add up to comes back. With c = x - mean, and
with the mean 0 and no Σx, Σc and Σg in RMSNorm::

    n, Σx              -> mean
    n, Σc², Σc         -> rstd, and what is left of the mean, as the mean was rounded
    Σg·c, Σg           -> backward, with the sums of the line before

The formulas are those of `rms` and `layer`, and so is the type they are computed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rmsnorm_np.reference._common import added, rounded, through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Reduce = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]

ELEMENTS = 1 << 15  # that are worked on at a time: in the cache, also in 16 bytes each


def check_reduce(reduce: Any, p: Any) -> None:
    """Raise if reduce cannot be called, or rows cannot be cut."""
    if not callable(reduce):
        raise TypeError(f"reduce is {reduce!r}, expected a callable or None")
    if float(p) != 1.0:
        raise ValueError(f"p is {p!r}, expected 1.0 with reduce: a worker does not know which elements are the first")


class Settings(NamedTuple):
    """What is asked for: of which norm (centred: LayerNorm), and y in which dtype, through which dtype of xhat."""

    centred: bool
    eps: float
    weight_offset: float
    dtype: np.dtype[Any] | None = None
    through_dtype: np.dtype[Any] | None = None


class Rows(NamedTuple):
    """Of each row: the mean, all of it, and rstd; backward also mean(g) and c = mean(g · xhat). Each (rows, 1)."""

    mean: Any
    rest_of_mean: Any
    rstd: Any
    mean_g: Any = 0.0
    c: Any = 0.0


def forward(x: Array, w: Any, b: Any, settings: Settings, reduce: Reduce) -> Array:
    """y of x (..., n); w and b as in `rms.forward`."""
    wide = _wide_dtype(x, w, b, dtype=settings.dtype)
    weight, bias, lead = _Parameter(w, x, wide), _Parameter(b, x, wide), x.reshape(-1, x.shape[-1])
    rows = _statistics(lead, wide, settings, reduce)
    y = np.empty(x.shape, settings.dtype or x.dtype)
    flat = y.reshape(lead.shape)
    for block in _blocks(lead):
        value = through(_xhat(lead[block].astype(wide), rows, block), settings.through_dtype)
        if w is not None:
            value = value * (settings.weight_offset + weight.at(block))
        if b is not None:
            value = value + bias.at(block)
        flat[block] = rounded(value, y.dtype)
    return y


def backward(
    arrays: tuple[Array, Array, Any], w: Any, b: Any, settings: Settings, reduce: Reduce
) -> tuple[Array, Any, Any]:
    """dx, and dweight and dbias of this worker's elements, not rounded yet; arrays: x, dy and dh, which may be None."""
    x, dy, dh = arrays
    wide = _wide_dtype(x, dy, dh, w, b)
    weight, bias = _Parameter(w, x, wide), _Parameter(b, x, wide)
    lead, dy_lead = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])

    def g_of(block: slice) -> Array:
        g: Array = dy_lead[block].astype(wide)
        return g if w is None else g * (settings.weight_offset + weight.at(block))

    rows = _statistics(lead, wide, settings, reduce, g_of)
    dx = np.empty(x.shape, x.dtype)
    flat = dx.reshape(lead.shape)
    for block in _blocks(lead):
        xhat = _xhat(lead[block].astype(wide), rows, block)
        value = g_of(block) - xhat * rows.c[block]
        if settings.centred:
            value = value - rows.mean_g[block]
        value = rows.rstd[block] * value
        if dh is not None:
            value = dh.reshape(lead.shape)[block].astype(wide) + value
        flat[block] = rounded(value, x.dtype)
        wide_dy = dy_lead[block].astype(wide)
        weight.add(block, wide_dy * xhat)
        bias.add(block, wide_dy)
    return dx, weight.total, bias.total


def summed(x: Array, residual: Array) -> Array:
    """h = x + residual, as `added` gives it."""
    h = np.empty(x.shape, residual.dtype)
    lead, residual_lead, flat = (a.reshape(-1, x.shape[-1]) for a in (x, residual, h))
    for block in _blocks(lead):
        flat[block] = added(lead[block], residual_lead[block])
    return h


def _statistics(x: Array, wide: Any, settings: Settings, reduce: Reduce, g_of: Any = None) -> Rows:
    """What all workers' parts of the rows x (rows, n) say together."""
    mean = rest = mean_g = np.zeros((len(x), 1), wide)
    if settings.centred:
        n, (total,) = _over_workers(x, lambda block: [x[block].astype(wide)], 1, wide, reduce)
        mean = total / n

    def terms(block: slice) -> Iterator[Array]:
        centred = x[block].astype(wide) - mean[block]
        yield centred * centred
        if settings.centred:
            yield centred
        if g_of is not None:
            g = g_of(block)
            yield g * centred
            if settings.centred:
                yield g

    count = (1 if g_of is None else 2) * (2 if settings.centred else 1)
    n, sums = _over_workers(x, terms, count, wide, reduce)
    squares, *others = sums
    if settings.centred:
        rest = others.pop(0) / n
        squares = np.maximum(squares - n * rest * rest, 0.0)
    rstd = 1.0 / np.sqrt(squares / n + settings.eps)
    if g_of is None:
        return Rows(mean, rest, rstd)
    products = others.pop(0)
    if settings.centred:
        mean_g = others[0] / n
        products = products - rest * others[0]
    return Rows(mean, rest, rstd, mean_g, rstd * products / n)


def _xhat(x: Array, rows: Rows, block: slice) -> Array:
    xhat: Array = (x - rows.mean[block] - rows.rest_of_mean[block]) * rows.rstd[block]
    return xhat


class _Parameter:
    """A weight or bias, whose row for each row of x is looked up, and what its gradient adds up to."""

    def __init__(self, a: Any, x: Array, wide: Any) -> None:
        self.total: Any = None
        if a is not None:
            self.rows, self.total = a.reshape(-1, a.shape[-1]).astype(wide), np.zeros(a.shape, wide)
            index = np.arange(len(self.rows)).reshape(a.shape[:-1])
            self.index = np.broadcast_to(index, x.shape[:-1]).reshape(-1)

    def at(self, block: slice) -> Array:
        """Its rows (…, n) for these rows of x."""
        rows: Array = self.rows if len(self.rows) == 1 else self.rows[self.index[block]]
        return rows

    def add(self, block: slice, terms: Array) -> None:
        """Add what these rows of x contribute to the gradient."""
        if self.total is not None:
            flat = self.total.reshape(self.rows.shape)
            if len(flat) == 1:
                flat += terms.sum(axis=0)
            else:
                np.add.at(flat, self.index[block], terms)


def _wide_dtype(*arrays: Any, dtype: Any = None) -> Any:
    """As in `widen`: float64, or longdouble where float64 is among what is given or asked for."""
    dtypes = [a.dtype for a in arrays if a is not None]
    return np.longdouble if np.float64 in (*dtypes, dtype or dtypes[0]) else np.float64


def _blocks(x: Array) -> Iterator[slice]:
    """The rows that are worked on at a time."""
    step = max(1, ELEMENTS // x.shape[-1])
    return (slice(first, min(first + step, len(x))) for first in range(0, len(x), step))


# Sums over workers


def _over_workers(
    x: Array, terms: Callable[[slice], Any], count: int, wide: Any, reduce: Reduce
) -> tuple[Array, list[Array]]:
    """The number of elements of each row of x, and so many sums over all of them; each (rows, 1)."""
    sums = np.zeros((count, len(x)), wide)
    for block in _blocks(x):
        for total, term in zip(sums, terms(block), strict=True):
            total[block] = term.sum(axis=-1)
    own = np.full((len(x), 1), float(x.shape[-1]))
    sent = np.ascontiguousarray(np.concatenate([own, *(_as_float64(a[:, None], wide) for a in sums)], axis=1))
    shape = sent.shape
    got = reduce(sent)
    if not isinstance(got, np.ndarray):
        raise TypeError(f"reduce has returned {type(got).__name__}, expected an ndarray of float64 {shape}")
    if got.dtype != np.float64:
        raise TypeError(f"reduce has returned an array of dtype {got.dtype}, expected float64")
    if got.shape != shape:
        raise ValueError(f"reduce has returned an array of shape {got.shape}, expected {shape}")
    each = (shape[1] - 1) // count
    return got[:, :1].astype(wide), [_from_float64(got[:, 1 + i * each :][:, :each], wide) for i in range(count)]


# A longdouble goes out as two float64: its first bits, whose sum over workers is exact as long as theirs are not more
# than 2**36 times as large as others', and the rest, whose rounding errors are far below. What is beyond the range goes
# out scaled, in columns of its own.
_HEAD_BITS = 12  # 64 less 52
_LARGE, _SHIFT = 900, 1100  # exponents
_HAS_RANGE = np.finfo(np.longdouble).maxexp > 2 * _SHIFT


def _as_float64(a: Array, wide: Any) -> Array:
    """A column (rows, 1) as the columns that are sent."""
    if wide is np.float64:
        return a
    columns = []
    for shift, there in _ranges(a):
        part = np.ldexp(np.where(there, a, 0.0), -shift)
        mantissa, exponent = np.frexp(part)
        head = np.ldexp(np.rint(np.ldexp(mantissa, _HEAD_BITS)), exponent - _HEAD_BITS)
        columns += [head, np.where(np.isfinite(head), part - head, 0.0)]
    return np.concatenate(columns, axis=1).astype(np.float64)


def _ranges(a: Array) -> list[tuple[int, Any]]:
    """(exponent, where numbers are to be scaled by it)."""
    if not _HAS_RANGE:
        return [(0, True)]
    large, small = np.abs(a) >= np.ldexp(a.dtype.type(1), _LARGE), np.abs(a) < np.ldexp(a.dtype.type(1), -_LARGE)
    return [(_SHIFT, large), (0, ~(large | small)), (-_SHIFT, small)]


def _from_float64(columns: Array, wide: Any) -> Array:
    """A column (rows, 1) from those that came back."""
    if wide is np.float64:
        return columns
    shifts = (_SHIFT, 0, -_SHIFT) if columns.shape[1] > 2 else (0,)
    total = np.zeros((len(columns), 1), wide)
    for i, shift in enumerate(shifts):
        head, tail = columns[:, 2 * i, None].astype(wide), columns[:, 2 * i + 1, None].astype(wide)
        total = total + np.ldexp(head + tail, shift)
    return total
