"""What happens to one row: its sums, and the elements it gives. Shared by the kernels for blocks and for long rows.

RMSNorm and LayerNorm are one text: where `mean` or `centred` is None nothing is subtracted, and Numba drops the branch.
Arguments are pointers (:func:`simd.data`), flat offsets and numbers; `_formulas` has the mathematics.
"""

from __future__ import annotations

from typing import Any

from rmsnorm_np import _formulas
from rmsnorm_np.cpu.jit import contracted, inlined, optional
from rmsnorm_np.cpu.simd import (
    LANES,
    SEGMENT,
    across,
    add_exact_square,
    add_product,
    first_lanes,
    float32,
    float64,
    keep,
    keeps_errors,
    kept,
    load,
    prefetch,
    prefetch_second,
    rounded,
    store,
    stream,
    until_aligned,
    zeros,
)

reciprocal_root = inlined(_formulas.reciprocal_root)
rms_gradient = contracted(_formulas.rms_gradient)
layer_gradient = contracted(_formulas.layer_gradient)


@optional("mean", lambda lanes, mean: lanes)
def minus(lanes: Any, mean: Any) -> Any:
    return lanes - mean


@optional("offset", lambda lanes, offset: lanes)
def plus(lanes: Any, offset: Any) -> Any:
    return lanes + offset


@optional("weight", lambda weight, offset, i, like, count: None)
def scale_of(weight: Any, offset: Any, i: int, like: Any, count: Any) -> Any:
    """(weight_offset + weight), or None without a weight; an offset of zero is passed as None."""
    return plus(load(weight, i, like, count), offset)


@optional("scale", lambda lanes, scale: lanes)
def times(lanes: Any, scale: Any) -> Any:
    return lanes * scale


@inlined
def scaled_gradient(dy: Any, weight: Any, i: int, shift: int, offset: Any, like: Any, count: Any) -> Any:
    """g = dy · (weight_offset + weight)."""
    return times(load(dy, i, like, count), scale_of(weight, offset, shift + i, like, count))


@optional("bias", lambda lanes, bias, i, like, count: lanes)
def plus_bias(lanes: Any, bias: Any, i: int, like: Any, count: Any) -> Any:
    return lanes + load(bias, i, like, count)


@optional("centred", lambda centred: float32)
def forward_precision(centred: Any) -> Any:
    """RMSNorm of half types needs only float32; the difference x - mean needs more."""
    return float64


@optional("mean", lambda total, lanes, mean, count: add_exact_square(total, lanes))
def add_square(total: Any, lanes: Any, mean: Any, count: Any) -> Any:
    """Total + (lanes - mean)², where lanes from `count` on stay out of it."""
    difference = first_lanes(lanes - mean, count)
    return total + difference * difference


@optional("mean", lambda total, lanes, mean: total)
def add_if_centred(total: Any, lanes: Any, mean: Any) -> Any:
    return total + lanes


# ------------------------------------------------------------------------------------------------- sums over a row
# Each adds SEGMENT elements in the lanes and the lanes by halves; what is longer is the sum of its segments, in order.
# Four sums at once, for an addition takes four cycles and two AVX2 registers are added in each; fewer where a sum takes
# two registers for one (float64: 1.2 to 1.4 times as fast as with registers that spill) or two kinds of sums are taken.


@inlined
def segment_sum(x: Any, start: int, stop: int, work: Any) -> Any:
    """Sum of x."""
    a, b, c, d = zeros(x, work), zeros(x, work), zeros(x, work), zeros(x, work)
    i = start
    while not keeps_errors(x) and i + 4 * LANES <= stop:
        a = a + load(x, i, work)
        b = b + load(x, i + LANES, work)
        c = c + load(x, i + 2 * LANES, work)
        d = d + load(x, i + 3 * LANES, work)
        i += 4 * LANES
    while i + 2 * LANES <= stop:
        a = a + load(x, i, work)
        b = b + load(x, i + LANES, work)
        i += 2 * LANES
    if i + LANES <= stop:
        a = a + load(x, i, work)
        i += LANES
    if i < stop:
        b = b + load(x, i, work, stop - i)
    return across((a + b) + (c + d))


@inlined
def segment_squares(x: Any, start: int, stop: int, mean: Any, work: Any) -> Any:
    """Sum of (x - mean)²."""
    a, b, c, d = zeros(x, work), zeros(x, work), zeros(x, work), zeros(x, work)
    i = start
    while not keeps_errors(x) and i + 4 * LANES <= stop:
        a = add_square(a, load(x, i, work), mean, None)
        b = add_square(b, load(x, i + LANES, work), mean, None)
        c = add_square(c, load(x, i + 2 * LANES, work), mean, None)
        d = add_square(d, load(x, i + 3 * LANES, work), mean, None)
        i += 4 * LANES
    while i + 2 * LANES <= stop:
        a = add_square(a, load(x, i, work), mean, None)
        b = add_square(b, load(x, i + LANES, work), mean, None)
        i += 2 * LANES
    if i + LANES <= stop:
        a = add_square(a, load(x, i, work), mean, None)
        i += LANES
    if i < stop:
        b = add_square(b, load(x, i, work, stop - i), mean, stop - i)
    return across((a + b) + (c + d))


@inlined
def segment_products(
    dy: Any, x: Any, weight: Any, start: int, stop: int, shift: int, offset: Any, mean: Any, ahead: int, work: Any
) -> Any:
    """Sums of g (for LayerNorm, which has a mean) and of g · (x - mean); weight of element i is at shift + i."""
    a, b, a_sum, b_sum = zeros(x, work), zeros(x, work), zeros(x, work), zeros(x, work)
    i = start
    while not keeps_errors(x) and i + 2 * LANES <= stop:
        g = scaled_gradient(dy, weight, i, shift, offset, a, None)
        h = scaled_gradient(dy, weight, i + LANES, shift, offset, a, None)
        a_sum = add_if_centred(a_sum, g, mean)
        b_sum = add_if_centred(b_sum, h, mean)
        a = add_product(a, g, minus(load(x, i, work), mean))
        b = add_product(b, h, minus(load(x, i + LANES, work), mean))
        prefetch_second(dy, i + ahead)
        i += 2 * LANES
    while i + LANES <= stop:
        g = scaled_gradient(dy, weight, i, shift, offset, a, None)
        a_sum = add_if_centred(a_sum, g, mean)
        a = add_product(a, g, minus(load(x, i, work), mean))
        i += LANES
    if i < stop:
        g = scaled_gradient(dy, weight, i, shift, offset, a, stop - i)
        b_sum = add_if_centred(b_sum, g, mean)
        b = add_product(b, g, minus(load(x, i, work, stop - i), mean))
    return across(a_sum + b_sum), across(a + b)


@inlined
def segment_squares_and_products(
    dy: Any, x: Any, weight: Any, start: int, stop: int, shift: int, offset: Any, ahead: int, work: Any
) -> Any:
    """Sums of x² and of g · x, from one reading of x."""
    a, b, a_squares, b_squares = zeros(x, work), zeros(x, work), zeros(x, work), zeros(x, work)
    i = start
    while not keeps_errors(x) and i + 2 * LANES <= stop:
        lanes, more = load(x, i, work), load(x, i + LANES, work)
        a_squares = add_exact_square(a_squares, lanes)
        b_squares = add_exact_square(b_squares, more)
        a = add_product(a, scaled_gradient(dy, weight, i, shift, offset, a, None), lanes)
        b = add_product(b, scaled_gradient(dy, weight, i + LANES, shift, offset, a, None), more)
        prefetch_second(dy, i + ahead)
        i += 2 * LANES
    while i + LANES <= stop:
        lanes = load(x, i, work)
        a_squares = add_exact_square(a_squares, lanes)
        a = add_product(a, scaled_gradient(dy, weight, i, shift, offset, a, None), lanes)
        i += LANES
    if i < stop:
        lanes = load(x, i, work, stop - i)
        b_squares = add_exact_square(b_squares, lanes)
        b = add_product(b, scaled_gradient(dy, weight, i, shift, offset, a, stop - i), lanes)
    return across(a_squares + b_squares), across(a + b)


def segment_rms_moments(
    dy: Any, x: Any, weight: Any, start: int, stop: int, border: int, shift: int, offset: Any, mean: Any, ahead: int,
    work: Any,
) -> Any:  # fmt: skip
    """For RMSNorm: the sum of squares before the border, zero in place of the sum of g, the sum of g · x."""
    if stop <= border:
        squares, products = segment_squares_and_products(dy, x, weight, start, stop, shift, offset, ahead, work)
    else:
        squares = segment_squares(x, start, max(start, border), None, work)
        products = segment_products(dy, x, weight, start, stop, shift, offset, None, ahead, work)[1]
    return squares, across(zeros(x, work)), products


@optional("mean", segment_rms_moments)
def segment_moments(
    dy: Any, x: Any, weight: Any, start: int, stop: int, border: int, shift: int, offset: Any, mean: Any, ahead: int,
    work: Any,
) -> Any:  # fmt: skip
    """The sums of (x - mean)², of g and of g · (x - mean)."""
    sums, products = segment_products(dy, x, weight, start, stop, shift, offset, mean, ahead, work)
    return segment_squares(x, start, stop, mean, work), sums, products


@inlined
def mean_of(x: Any, start: int, n: int, work: Any) -> Any:
    total = across(zeros(x, work))
    for first in range(start, start + n, SEGMENT):
        total = total + segment_sum(x, first, min(first + SEGMENT, start + n), work)
    return total / n


@inlined
def squares_of(x: Any, start: int, k: int, mean: Any, work: Any) -> Any:
    total = across(zeros(x, work))
    for first in range(start, start + k, SEGMENT):
        total = total + segment_squares(x, first, min(first + SEGMENT, start + k), mean, work)
    return total


@inlined
def moments_of(
    dy: Any, x: Any, weight: Any, start: int, n: int, k: int, shift: int, offset: Any, mean: Any, ahead: int, work: Any
) -> Any:
    squares = sums = products = across(zeros(x, work))
    for first in range(start, start + n, SEGMENT):
        stop = min(first + SEGMENT, start + n)
        square, g_sum, product = segment_moments(
            dy, x, weight, first, stop, start + k, shift, offset, mean, ahead, work
        )
        squares = squares + square
        sums = sums + g_sum
        products = products + product
    return squares, sums, products


@inlined
def keep_gradient_numbers(
    squares: Any, sums: Any, products: Any, k: int, eps: float, rstds: Any, bs: Any, cs: Any, j: int
) -> None:
    """Put what `gradient_lanes` needs to know of a row in place j: rstd, b = rstd · mean(g), c = rstd² · mean(g · xhat)."""
    rstd = reciprocal_root(squares, k, eps)
    keep(rstds, j, rstd)
    keep(bs, j, sums / k * rstd)
    keep(cs, j, products * rstd / k * rstd * rstd)


@optional("centred", lambda means, j, x, centred: None)
def kept_mean(means: Any, j: int, x: Any, centred: Any) -> Any:
    return kept(means, j, x)


@optional("centred", lambda x, start, n, means, j, centred: None)
def keep_mean(x: Any, start: int, n: int, means: Any, j: int, centred: Any) -> Any:
    keep(means, j, mean_of(x, start, n, float64))


@inlined
def keep_statistics(
    x: Any, start: int, n: int, k: int, means: Any, totals: Any, j: int, centred: Any, work: Any
) -> Any:
    """Put the mean (LayerNorm) and the sum of squares of the row at `start` in place j."""
    keep_mean(x, start, n, means, j, centred)
    keep(totals, j, squares_of(x, start, k, kept_mean(means, j, x, centred), work))


# ------------------------------------------------------------------------------------------------ what a row gives


@inlined
def output_lanes(
    x: Any, weight: Any, bias: Any, i: int, shift: int, bias_shift: int, offset: Any, mean: Any, rstd: Any,
    work: Any, count: Any,
) -> Any:  # fmt: skip
    """Y of the elements from i on; weight and bias of element i are at shift + i and bias_shift + i."""
    lanes = load(x, i, work, count)
    xhat = minus(lanes, mean) * rstd
    y = times(xhat, scale_of(weight, offset, shift + i, lanes, count))
    return plus_bias(y, bias, bias_shift + i, lanes, count)


@inlined
def write_output(
    x: Any, weight: Any, bias: Any, y: Any, start: int, stop: int, shift: int, bias_shift: int, offset: Any,
    mean: Any, rstd: Any, streaming: int, ahead: int, work: Any,
) -> None:  # fmt: skip
    """Y from start to stop, and a prefetch of what lies `ahead` of x (0: none)."""
    head = start
    if streaming:
        head = min(start + until_aligned(y, start), stop)
        if start < head:
            count = head - start
            first = output_lanes(x, weight, bias, start, shift, bias_shift, offset, mean, rstd, work, count)
            store(y, start, first, count)
    body = stop - (stop - head) % LANES
    if streaming:
        for i in range(head, body, LANES):
            stream(y, i, output_lanes(x, weight, bias, i, shift, bias_shift, offset, mean, rstd, work, None))
            prefetch(x, i + ahead)
    else:
        for i in range(head, body, LANES):
            store(y, i, output_lanes(x, weight, bias, i, shift, bias_shift, offset, mean, rstd, work, None))
    if body < stop:
        count = stop - body
        last = output_lanes(x, weight, bias, body, shift, bias_shift, offset, mean, rstd, work, count)
        store(y, body, last, count)


@inlined
def write_short_output(
    x: Any, weight: Any, bias: Any, y: Any, start: int, n: int, shift: int, bias_shift: int, offset: Any, mean: Any,
    rstd: Any, streaming: int, ahead: int, work: Any,
) -> None:  # fmt: skip
    """`write_output` of a whole row that has neither head nor tail: n is a multiple of LANES, each vector aligned."""
    for i in range(start, start + n, LANES):
        lanes = output_lanes(x, weight, bias, i, shift, bias_shift, offset, mean, rstd, work, None)
        if streaming:
            stream(y, i, lanes)
            prefetch(x, i + ahead)
        else:
            store(y, i, lanes)


@inlined
def gradient_lanes(
    dy: Any, x: Any, weight: Any, dweight: Any, dbias: Any, i: int, shift: int, sum_shift: int, offset: Any, mean: Any,
    rstd: Any, b: Any, c: Any, inside: int, work: Any, count: Any,
) -> Any:  # fmt: skip
    """Dx of the elements from i on; their share of dweight and dbias is added to what stands at sum_shift + i."""
    like = zeros(x, work)
    u = load(dy, i, like, count) * rstd
    lanes = minus(load(x, i, work, count), mean)
    if dweight is not None:  # dy · xhat = u · (x - mean)
        sums = rounded(load(dweight, sum_shift + i, rounded(like), count))
        store(dweight, sum_shift + i, add_product(sums, u, lanes), count)
    if dbias is not None:
        sums = rounded(load(dbias, sum_shift + i, rounded(like), count))
        store(dbias, sum_shift + i, sums + rounded(load(dy, i, like, count)), count)
    g = times(u, scale_of(weight, offset, shift + i, like, count))
    if b is not None:
        return layer_gradient(g, lanes, b, c)
    if inside:
        return rms_gradient(g, lanes, c)
    return g


@inlined
def write_gradient(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, start: int, stop: int, shift: int, sum_shift: int,
    offset: Any, mean: Any, rstd: Any, b: Any, c: Any, inside: int, streaming: int, ahead: int, work: Any,
) -> None:  # fmt: skip
    """Dx from start to stop, the shares of dweight and dbias, and a prefetch of what lies `ahead` of x."""
    head = start
    if streaming:
        head = min(start + until_aligned(dx, start), stop)
        if start < head:
            first = gradient_lanes(
                dy, x, weight, dweight, dbias, start, shift, sum_shift, offset, mean, rstd, b, c, inside, work,
                head - start,
            )  # fmt: skip
            store(dx, start, first, head - start)
    body = stop - (stop - head) % LANES
    if streaming:
        for i in range(head, body, LANES):
            lanes = gradient_lanes(
                dy, x, weight, dweight, dbias, i, shift, sum_shift, offset, mean, rstd, b, c, inside, work, None
            )
            stream(dx, i, lanes)
            prefetch_second(x, i + ahead)
    else:
        for i in range(head, body, LANES):
            lanes = gradient_lanes(
                dy, x, weight, dweight, dbias, i, shift, sum_shift, offset, mean, rstd, b, c, inside, work, None
            )
            store(dx, i, lanes)
    if body < stop:
        last = gradient_lanes(
            dy, x, weight, dweight, dbias, body, shift, sum_shift, offset, mean, rstd, b, c, inside, work, stop - body
        )
        store(dx, body, last, stop - body)
