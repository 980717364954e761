"""What happens to one row: its sums, and the elements it gives. Shared by the kernels for blocks and for long rows.

RMSNorm and LayerNorm are one text: where `mean` or `centred` is None nothing is subtracted, and Numba drops the branch.
So for weight and bias: what is loaded from None is None, and adding or multiplying by that changes nothing.
Arguments are pointers (:func:`simd.data`), flat offsets and numbers; `_formulas` has the mathematics.
"""

from __future__ import annotations

from typing import Any

from rmsnorm_np import _formulas
from rmsnorm_np.cpu.jit import inlined, optional, unless_exact
from rmsnorm_np.cpu.simd import (
    SEGMENT,
    across,
    add_exact_square,
    add_square,
    first_lanes,
    float32,
    float64,
    keep,
    kept,
    load,
    plus,
    prefetch,
    rounded,
    rounded_product,
    store,
    stream,
    times,
    until_aligned,
    width,
    zeros,
)

reciprocal_root = inlined(_formulas.reciprocal_root)


@optional("centred", lambda centred: float32)
def forward_precision(centred: Any) -> Any:
    """RMSNorm of half types needs only float32; the difference x - mean needs more."""
    return float64


# LayerNorm's mean is a number that the dtype of x can hold, and the rest. One float64 for both would make elements
# next to it wrong: by 2.4 ULP in float32 where x is 1e6 ± 1, by thousands in float64. But x - mean[0] is exact there,
# and x - mean[0] - mean[1] is right. Squares are taken of x - mean[0], and their sum is corrected once a row:
# mean[0] is as near to the mean as any x, so the correction is at most half of the sum.


@optional("mean", lambda lanes, mean: lanes)
def minus_mean(lanes: Any, mean: Any) -> Any:
    return lanes - mean[0] - mean[1]


@optional("mean", lambda total, lanes, mean, count: add_exact_square(total, lanes))
def add_square_about(total: Any, lanes: Any, mean: Any, count: Any) -> Any:
    """Total + (lanes - mean[0])², where lanes from `count` on stay out of it."""
    return add_square(total, first_lanes(lanes - mean[0], count))


@unless_exact("x", lambda total, n, x: rounded(total / n))
def nearest_mean(total: Any, n: int, x: Any) -> Any:
    """The mean as x's dtype can hold it, or as float32 where x is narrower; of n equal numbers it is that number."""
    return float64(float32(total * (1.0 / n)))


@inlined
def like_sums(x: Any, number: float) -> Any:
    """A float64 as a number of the kind that sums over x have."""
    return across(zeros(x, float64)) + number


@inlined
def keep_mean_of(total: Any, n: int, x: Any, means: Any, j: int) -> Any:
    """From the sum of x, both parts of the mean.

    All rows have the same 1 / n, so that division is moved out of their loop: with 16 float32, 1.35 times as fast.
    """
    inverse = like_sums(x, 1.0) / n
    mean = like_sums(x, nearest_mean(total, n, x))
    rest = rounded(total - mean * n)  # its parts may cancel, and are exact
    keep(means, 2 * j, mean)
    keep(means, 2 * j + 1, like_sums(x, rest) * inverse)


@optional("mean", lambda total, mean, n: total)
def squares_minus_mean(total: Any, mean: Any, n: int) -> Any:
    """The sum of (x - mean)² from that of (x - mean[0])²."""
    return total - mean[1] * mean[1] * n


# ------------------------------------------------------------------------------------------------- sums over a row
# Each adds SEGMENT elements in the lanes and the lanes by halves; what is longer is the sum of its segments, in order.
# Four sums at once, for an addition takes four cycles and two AVX2 registers are added in each; two where a sum takes
# two registers for one (float64: up to 1.1 times as fast as with registers that spill) or two kinds of sums are taken.
# float64 takes long enough over its squares for what lies `ahead` to arrive meanwhile: forward is 1.05 to 1.08 times as
# fast as when it is asked for during the output alone. The others are faster without.


def segment_sum_in_twos(x: Any, start: int, stop: int, work: Any) -> Any:
    a, b = zeros(x, work), zeros(x, work)
    i, step = start, width(x, work)
    while i + 2 * step <= stop:
        a = a + load(x, i, work)
        b = b + load(x, i + step, work)
        i += 2 * step
    while i < stop:
        a = a + load(x, i, work, min(step, stop - i))
        i += step
    return across(a + b)


@unless_exact("x", segment_sum_in_twos)
def segment_sum(x: Any, start: int, stop: int, work: Any) -> Any:
    """Sum of x."""
    a, b, c, d = zeros(x, work), zeros(x, work), zeros(x, work), zeros(x, work)
    i, step = start, width(x, work)
    while i + 4 * step <= stop:
        a = a + load(x, i, work)
        b = b + load(x, i + step, work)
        c = c + load(x, i + 2 * step, work)
        d = d + load(x, i + 3 * step, work)
        i += 4 * step
    if i + 2 * step <= stop:
        a = a + load(x, i, work)
        b = b + load(x, i + step, work)
        i += 2 * step
    while i < stop:
        c = c + load(x, i, work, min(step, stop - i))
        i += step
    return across((a + b) + (c + d))


def segment_squares_in_twos(x: Any, start: int, stop: int, mean: Any, work: Any, ahead: int) -> Any:
    a, b = zeros(x, work), zeros(x, work)
    i, step = start, width(x, work)
    while i + 2 * step <= stop:
        a = add_square_about(a, load(x, i, work), mean, None)
        b = add_square_about(b, load(x, i + step, work), mean, None)
        prefetch(x, i + ahead)
        prefetch(x, i + step + ahead)
        i += 2 * step
    while i < stop:
        count = min(step, stop - i)
        a = add_square_about(a, load(x, i, work, count), mean, count)
        i += step
    return across(a + b)


@unless_exact("x", segment_squares_in_twos)
def segment_squares(x: Any, start: int, stop: int, mean: Any, work: Any, ahead: int) -> Any:
    """Sum of (x - mean[0])²."""
    a, b, c, d = zeros(x, work), zeros(x, work), zeros(x, work), zeros(x, work)
    i, step = start, width(x, work)
    while i + 4 * step <= stop:
        a = add_square_about(a, load(x, i, work), mean, None)
        b = add_square_about(b, load(x, i + step, work), mean, None)
        c = add_square_about(c, load(x, i + 2 * step, work), mean, None)
        d = add_square_about(d, load(x, i + 3 * step, work), mean, None)
        i += 4 * step
    if i + 2 * step <= stop:
        a = add_square_about(a, load(x, i, work), mean, None)
        b = add_square_about(b, load(x, i + step, work), mean, None)
        i += 2 * step
    while i < stop:
        count = min(step, stop - i)
        c = add_square_about(c, load(x, i, work, count), mean, count)
        i += step
    return across((a + b) + (c + d))


@inlined
def squares_of(x: Any, start: int, k: int, mean: Any, work: Any, ahead: int) -> Any:
    """Sum of (x - mean)²."""
    total = across(zeros(x, work))
    for first in range(start, start + k, SEGMENT):
        total = total + segment_squares(x, first, min(first + SEGMENT, start + k), mean, work, ahead)
    return squares_minus_mean(total, mean, k)


@optional("centred", lambda means, j, x, centred: None)
def kept_mean(means: Any, j: int, x: Any, centred: Any) -> Any:
    return rounded(kept(means, 2 * j, x)), kept(means, 2 * j + 1, x)


@optional("centred", lambda room, j, x, centred: None)
def kept_if_centred(room: Any, j: int, x: Any, centred: Any) -> Any:
    """`kept`, of a number that only LayerNorm has."""
    return kept(room, j, x)


@optional("centred", lambda x, start, n, means, j, centred: None)
def keep_mean(x: Any, start: int, n: int, means: Any, j: int, centred: Any) -> Any:
    total = across(zeros(x, float64))
    for first in range(start, start + n, SEGMENT):
        total = total + segment_sum(x, first, min(first + SEGMENT, start + n), float64)
    keep_mean_of(total, n, x, means, j)


@inlined
def keep_statistics(
    x: Any, start: int, n: int, k: int, means: Any, totals: Any, j: int, centred: Any, work: Any, ahead: int
) -> Any:
    """Put the mean (LayerNorm) and the sum of squares of the row at `start` in place j."""
    keep_mean(x, start, n, means, j, centred)
    keep(totals, j, squares_of(x, start, k, kept_mean(means, j, x, centred), work, ahead))


# ------------------------------------------------------------------------------------------------ what a row gives


@optional("shift", lambda xhat, scale, shift: rounded_product(xhat, scale))
def scaled_and_shifted(xhat: Any, scale: Any, shift: Any) -> Any:
    return times(xhat, scale) + shift


@inlined
def output_lanes(
    x: Any, weight: Any, bias: Any, i: int, shift: int, bias_shift: int, offset: Any, mean: Any, rstd: Any,
    work: Any, count: Any,
) -> Any:  # fmt: skip
    """Y of the elements from i on; weight and bias of element i are at shift + i and bias_shift + i."""
    lanes = load(x, i, work, count)
    xhat = minus_mean(lanes, mean) * rstd
    scale = plus(load(weight, shift + i, lanes, count), offset)
    return scaled_and_shifted(xhat, scale, load(bias, bias_shift + i, lanes, count))


@inlined
def write_output(
    x: Any, weight: Any, bias: Any, y: Any, start: int, stop: int, shift: int, bias_shift: int, offset: Any,
    mean: Any, rstd: Any, streaming: int, ahead: int, work: Any,
) -> None:  # fmt: skip
    """Y from start to stop, and a prefetch of what lies `ahead` of x (0: none)."""
    step = width(x, work)
    head = min(start + until_aligned(y, start, step), stop) if streaming else start
    body = stop - (stop - head) % step
    for i in range(head, body, step):
        lanes = output_lanes(x, weight, bias, i, shift, bias_shift, offset, mean, rstd, work, None)
        if streaming:
            stream(y, i, lanes)
            prefetch(x, i + ahead)
        else:
            store(y, i, lanes)
    for i, count in ((start, head - start), (body, stop - body)):  # what is before the first and after the last vector
        if count > 0:
            lanes = output_lanes(x, weight, bias, i, shift, bias_shift, offset, mean, rstd, work, count)
            store(y, i, lanes, count)


@inlined
def write_short_output(
    x: Any, weight: Any, bias: Any, y: Any, start: int, n: int, shift: int, bias_shift: int, offset: Any, mean: Any,
    rstd: Any, streaming: int, ahead: int, work: Any,
) -> None:  # fmt: skip
    """`write_output` of a whole row that has neither head nor tail: n fills vectors, each of them aligned."""
    for i in range(start, start + n, width(x, work)):
        lanes = output_lanes(x, weight, bias, i, shift, bias_shift, offset, mean, rstd, work, None)
        if streaming:
            stream(y, i, lanes)
            prefetch(x, i + ahead)
        else:
            store(y, i, lanes)
