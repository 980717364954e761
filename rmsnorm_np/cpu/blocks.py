"""What happens to a block of rows that stays in the first-level cache: the sums of each row, then what it gives.

A row whose sums leave the range of the type they are computed in is skipped: :mod:`rmsnorm_np.cpu.extreme` takes it.
``bound`` tells such rows: the sums of an ordinary one are below it and above its reciprocal. It is None where nothing
can leave the range (float32 in float64), and then Numba drops the question.
"""

from __future__ import annotations

from typing import Any

from rmsnorm_np.cpu.gradients import (
    add_bias_share,
    keep_gradient_numbers,
    keep_moments,
    write_row_gradient,
    write_short_gradient,
)
from rmsnorm_np.cpu.jit import inlined, optional, piece, unless_exact
from rmsnorm_np.cpu.rows import (
    forward_precision,
    keep_mean,
    keep_statistics,
    kept_mean,
    reciprocal_root,
    squares_of,
    write_output,
    write_short_output,
)
from rmsnorm_np.cpu.simd import LANES, float32, keep, kept, rounded, scratch, width

DOUBLE_BOUND = 2.0**900
HALF_BOUND = 2.0**90
GRADIENT_BOUND = 2.0**300  # rstd³ times a sum has to stay in the range of float64

# Marks of skipped rows: to be computed as they are, or to be brought into the range first.
IN_RANGE, EXTREME = 1, 2

SHORT_ROW = 64  # up to here what is done once a row counts: with 16 elements 1.35 times as fast, with 64 the same


@unless_exact("x", lambda x: DOUBLE_BOUND)
def bound_of(x: Any) -> float:
    return HALF_BOUND


@optional("skipped", lambda skipped, x: None)
def bound_for(skipped: Any, x: Any) -> Any:
    """The bound of sums of squares; there is none where there are no marks for rows that are skipped."""
    return bound_of(x)


@optional("skipped", lambda skipped: None)
def gradient_bound_for(skipped: Any) -> Any:
    return GRADIENT_BOUND


@inlined
def is_ordinary(total: Any, k: int, eps: float, bound: Any) -> Any:
    """Whether the mean square + eps is inside the bounds."""
    if bound is None:
        return True
    mean_square = rounded(total) / k + eps
    return 1.0 / bound < mean_square < bound


@optional("centred", lambda total, x, start, n, centred, bound: True)
def is_ordinary_deviation(total: Any, x: Any, start: int, n: int, centred: Any, bound: Any) -> Any:
    """Whether x - mean is large enough to be held in pairs without subnormal parts, or zero for all x."""
    if bound is None or rounded(total) > 1.0 / bound:
        return True
    return is_constant(x, start, n)


@unless_exact("x", lambda x, start, n, k, rstd, bound: True)
def is_ordinary_outside(x: Any, start: int, n: int, k: int, rstd: Any, bound: Any) -> Any:
    """Whether x · rstd stays in range behind the RMS's k elements, too. Of float64, which has no wider type, all is."""
    if bound is None or k == n or rstd <= 1.0:
        return True
    return rounded(squares_of(x, start + k, n - k, None, float32, 0)) * rstd * rstd < bound


@inlined
def is_ordinary_gradient(
    sums: Any, products: Any, dy: Any, x: Any, start: int, n: int, centred: Any, bound: Any
) -> Any:
    """Whether the sums of g and of g · xhat are inside the bounds, or dy or xhat is all zeros, as in padding."""
    if bound is None:
        return True
    size = abs(rounded(products))
    if abs(rounded(sums)) < bound and (1.0 / bound < size < bound or is_xhat_zero(x, start, n, centred)):
        return True
    return is_zero(dy, start, n)


@optional("centred", lambda x, start, n, centred: is_zero(x, start, n))
def is_xhat_zero(x: Any, start: int, n: int, centred: Any) -> Any:
    return is_constant(x, start, n)


@piece
def is_zero(numbers: Any, start: int, n: int) -> bool:
    for i in range(start, start + n):  # noqa: SIM110 (Numba has no generators to give to `all`)
        if numbers[i] != 0:
            return False
    return True


@piece
def is_constant(numbers: Any, start: int, n: int) -> bool:
    for i in range(start + 1, start + n):  # noqa: SIM110
        if numbers[i] != numbers[start]:
            return False
    return True


@piece
def forward_block(
    x: Any, weight: Any, bias: Any, y: Any, base: int, first: int, rows: int, n: int, k: int, m: int, bias_m: int,
    offset: Any, eps: float, streaming: int, centred: Any, bound: Any,
) -> int:  # fmt: skip
    """Rows first, first + 1, … from base on. Bit j of what is returned: row first + j was skipped."""
    work = forward_precision(centred)
    means, totals, rstds = scratch(), scratch(), scratch()
    for j in range(rows):
        keep_statistics(x, base + j * n, n, k, means, totals, j, centred, work, rows * n if streaming else 0)
    for j in range(rows):  # a loop of its own: LLVM takes several roots and divisions at once
        keep(rstds, j, reciprocal_root(kept(totals, j, x), k, eps))
    h, bias_h = first % m, first % bias_m
    short = n <= SHORT_ROW and n % width(x, work) == 0  # then memory.streams has seen to it that rows begin on lines
    skipped = 0
    for j in range(rows):
        start = base + j * n
        total = kept(totals, j, x)
        ordinary = is_ordinary(total, k, eps, bound) and is_ordinary_deviation(total, x, start, n, centred, bound)
        if not (ordinary and is_ordinary_outside(x, start, n, k, kept(rstds, j, x), bound)):
            skipped |= 1 << j
        elif short:
            write_short_output(
                x, weight, bias, y, start, n, h * n - start, bias_h * n - start, offset,
                kept_mean(means, j, x, centred), kept(rstds, j, x), streaming, rows * n, work,
            )  # fmt: skip
        else:
            write_output(
                x, weight, bias, y, start, start + n, h * n - start, bias_h * n - start, offset,
                kept_mean(means, j, x, centred), kept(rstds, j, x), streaming, rows * n, work,
            )  # fmt: skip
        h = h + 1 if h + 1 < m else 0  # the next row's row of weight and of bias: a division costs as much as
        bias_h = bias_h + 1 if bias_h + 1 < bias_m else 0  # 16 elements
    return skipped


@piece
def backward_block(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, rows: int, base: int, step: int, n: int, k: int,
    shift: int, sum_shift: int, offset: Any, eps: float, streaming: int, centred: Any, bound: Any,
) -> int:  # fmt: skip
    """Rows that start at base, base + step, …; shift and sum_shift: where their row of weight and of dweight starts.

    Bit j of what is returned: the row that starts at base + j * step was skipped, but for its share of dbias.
    """
    means, rstds, bs, cs = scratch(), scratch(), scratch(), scratch()
    # while this block's sums are taken, dy of the next is fetched, and x while its gradients are written: neither
    # memory nor arithmetic waits for the other (measured: x and dy both at the end 1.1, not at all 1.3 times as long)
    ahead = rows * step if streaming else 0
    for j in range(rows):
        start = base + j * step
        keep_mean(x, start, n, means, j, centred)
        keep_moments(
            dy, x, weight, start, n, k, shift - start, offset, kept_mean(means, j, x, centred), ahead, rstds, bs, cs, j
        )
    skipped = 0
    for j in range(rows):  # a loop of its own, as in forward
        start, total = base + j * step, kept(rstds, j, x)
        ordinary = is_ordinary(total, k, eps, bound) and is_ordinary_deviation(total, x, start, n, centred, bound)
        sums, products = kept(bs, j, x), kept(cs, j, x)
        if not (ordinary and is_ordinary_gradient(sums, products, dy, x, start, n, centred, bound)):
            skipped |= 1 << j
        keep_gradient_numbers(x, k, eps, rstds, bs, cs, j, centred)
    short = n <= SHORT_ROW and n % LANES == 0 and k == n
    for j in range(rows):
        if skipped >> j & 1:
            add_bias_share(
                dy, base + j * step, x, dbias, sum_shift, n
            )  # in its turn: the sum keeps its order, and bits
        elif short:
            write_short_gradient(
                dy, x, weight, dx, dweight, dbias, base + j * step, n, shift, sum_shift, offset, means, rstds, bs, cs,
                j, streaming, ahead, centred,
            )  # fmt: skip
        else:
            write_row_gradient(
                dy, x, weight, dx, dweight, dbias, 0, n, base + j * step, k, shift, sum_shift, offset, means, rstds,
                bs, cs, j, streaming, ahead, centred,
            )  # fmt: skip
    return skipped
