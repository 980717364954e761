"""What happens to one row in a backward pass: its sums, dx, and its share of dweight and dbias."""

from __future__ import annotations

from typing import Any

from rmsnorm_np import _formulas
from rmsnorm_np.cpu.jit import contracted, inlined, optional
from rmsnorm_np.cpu.rows import (
    kept_if_centred,
    kept_mean,
    minus_mean,
    reciprocal_root,
    segment_squares,
    squares_minus_mean,
)
from rmsnorm_np.cpu.simd import (
    LANES,
    SEGMENT,
    across,
    add_exact_square,
    add_product,
    float64,
    joined,
    keep,
    kept,
    load,
    plus,
    prefetch_second,
    rounded,
    store,
    stream,
    times,
    until_aligned,
    zeros,
)

rms_gradient = contracted(_formulas.rms_gradient)
layer_gradient = contracted(_formulas.layer_gradient)


@inlined
def scaled_gradient(dy: Any, weight: Any, i: int, shift: int, offset: Any, like: Any, count: Any) -> Any:
    """g = dy · (weight_offset + weight)."""
    return times(load(dy, i, like, count), plus(load(weight, shift + i, like, count), offset))


@optional("mean", lambda total, lanes, mean: total)
def add_if_centred(total: Any, lanes: Any, mean: Any) -> Any:
    return total + lanes


# ------------------------------------------------------------------------------------------------- sums over a row
# Two vectors in each turn, as in `rows`; one for float64, whose pairs fill the registers as it is.


@inlined
def segment_products(
    dy: Any, x: Any, weight: Any, start: int, stop: int, shift: int, offset: Any, mean: Any, ahead: int, work: Any
) -> Any:
    """Sums of g (for LayerNorm, which has a mean) and of g · (x - mean); weight of element i is at shift + i."""
    a, b, a_sum, b_sum = zeros(x, work), zeros(x, work), zeros(x, work), zeros(x, work)
    i = start
    while i + 2 * LANES <= stop:
        g = scaled_gradient(dy, weight, i, shift, offset, a, None)
        h = scaled_gradient(dy, weight, i + LANES, shift, offset, a, None)
        a_sum = add_if_centred(a_sum, g, mean)
        b_sum = add_if_centred(b_sum, h, mean)
        a = add_product(a, g, minus_mean(load(x, i, work), mean))
        b = add_product(b, h, minus_mean(load(x, i + LANES, work), mean))
        prefetch_second(dy, i + ahead)
        i += 2 * LANES
    while i < stop:
        count = min(LANES, stop - i)
        g = scaled_gradient(dy, weight, i, shift, offset, a, count)
        a_sum = add_if_centred(a_sum, g, mean)
        a = add_product(a, g, minus_mean(load(x, i, work, count), mean))
        i += LANES
    return across(a_sum + b_sum), across(a + b)


@inlined
def segment_squares_and_products(
    dy: Any, x: Any, weight: Any, start: int, stop: int, shift: int, offset: Any, ahead: int, work: Any
) -> Any:
    """Sums of x² and of g · x, from one reading of x."""
    a, b, a_squares, b_squares = zeros(x, work), zeros(x, work), zeros(x, work), zeros(x, work)
    i = start
    while i + 2 * LANES <= stop:
        lanes, more = load(x, i, work), load(x, i + LANES, work)
        a_squares = add_exact_square(a_squares, lanes)
        b_squares = add_exact_square(b_squares, more)
        a = add_product(a, scaled_gradient(dy, weight, i, shift, offset, a, None), lanes)
        b = add_product(b, scaled_gradient(dy, weight, i + LANES, shift, offset, a, None), more)
        prefetch_second(dy, i + ahead)
        i += 2 * LANES
    while i < stop:
        count = min(LANES, stop - i)
        lanes = load(x, i, work, count)
        a_squares = add_exact_square(a_squares, lanes)
        a = add_product(a, scaled_gradient(dy, weight, i, shift, offset, a, count), lanes)
        i += LANES
    return across(a_squares + b_squares), across(a + b)


def segment_rms_moments(
    dy: Any, x: Any, weight: Any, start: int, stop: int, border: int, shift: int, offset: Any, mean: Any, ahead: int,
    work: Any,
) -> Any:  # fmt: skip
    """For RMSNorm: the sum of squares before the border, zero in place of the sum of g, the sum of g · x."""
    if stop <= border:
        squares, products = segment_squares_and_products(dy, x, weight, start, stop, shift, offset, ahead, work)
    else:
        squares = segment_squares(x, start, max(start, border), None, work, 0)
        products = segment_products(dy, x, weight, start, stop, shift, offset, None, ahead, work)[1]
    return squares, across(zeros(x, work)), products


@optional("mean", segment_rms_moments)
def segment_moments(
    dy: Any, x: Any, weight: Any, start: int, stop: int, border: int, shift: int, offset: Any, mean: Any, ahead: int,
    work: Any,
) -> Any:  # fmt: skip
    """The sums of (x - mean[0])², of g and of g · (x - mean)."""
    sums, products = segment_products(dy, x, weight, start, stop, shift, offset, mean, ahead, work)
    return segment_squares(x, start, stop, mean, work, 0), sums, products


@inlined
def keep_moments(
    dy: Any, x: Any, weight: Any, start: int, n: int, k: int, shift: int, offset: Any, mean: Any, ahead: int,
    squares: Any, sums: Any, products: Any, j: int,
) -> None:  # fmt: skip
    """Put the sums of (x - mean)², of g and of g · (x - mean) over the row at `start` in place j."""
    square_total = sum_total = product_total = across(zeros(x, float64))
    for first in range(start, start + n, SEGMENT):
        stop = min(first + SEGMENT, start + n)
        square, g_sum, product = segment_moments(
            dy, x, weight, first, stop, start + k, shift, offset, mean, ahead, float64
        )
        square_total = square_total + square
        sum_total = sum_total + g_sum
        product_total = product_total + product
    keep(squares, j, squares_minus_mean(square_total, mean, n))
    keep(sums, j, sum_total)
    keep(products, j, product_total)


@optional("centred", lambda rstd, n, centred: rstd)
def unless_alone(rstd: Any, n: int, centred: Any) -> Any:
    """Zero for LayerNorm of one element: dx and dweight are zero, of which roundings would leave some 1e-17."""
    return rstd * 0.0 if n == 1 else rstd


@inlined
def keep_gradient_numbers(x: Any, k: int, eps: float, rstds: Any, bs: Any, cs: Any, j: int, centred: Any) -> None:
    """From what `keep_moments` put in place j, what a row's gradient needs.

    These are rstd, b = rstd · mean(g) and c = rstd² · mean(g · xhat).
    """
    rstd = unless_alone(reciprocal_root(kept(rstds, j, x), k, eps), k, centred)
    keep(rstds, j, rstd)
    keep(bs, j, kept(bs, j, x) / k * rstd)
    keep(cs, j, kept(cs, j, x) * rstd / k * rstd * rstd)


# ------------------------------------------------------------------------------------------------ what a row gives


@inlined
def gradient_lanes(
    dy: Any, x: Any, weight: Any, dweight: Any, dbias: Any, i: int, shift: int, sum_shift: int, offset: Any, mean: Any,
    rstd: Any, b: Any, c: Any, inside: Any, work: Any, count: Any,
) -> Any:  # fmt: skip
    """Dx of the elements from i on, of which the first `inside` are in the RMS (None: all).

    Their share of dweight and dbias is added to what stands at sum_shift + i.
    """
    like = zeros(x, work)
    u = load(dy, i, like, count) * rstd
    lanes = minus_mean(load(x, i, work, count), mean)
    if dweight is not None:  # dy · xhat = u · (x - mean)
        sums = rounded(load(dweight, sum_shift + i, rounded(like), count))
        store(dweight, sum_shift + i, add_product(sums, u, lanes), count)
    if dbias is not None:
        sums = rounded(load(dbias, sum_shift + i, rounded(like), count))
        store(dbias, sum_shift + i, sums + rounded(load(dy, i, like, count)), count)
    g = times(u, plus(load(weight, shift + i, like, count), offset))
    if b is not None:
        return layer_gradient(g, lanes, b, c)
    return joined(rms_gradient(g, lanes, c), g, inside)


@optional("border", lambda border, i: None)
def before(border: Any, i: int) -> Any:
    """How many elements there are from i on before the border."""
    return border - i


@inlined
def write_gradient_lanes(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, head: int, body: int, shift: int, sum_shift: int,
    offset: Any, mean: Any, rstd: Any, b: Any, c: Any, border: Any, streaming: int, ahead: int,
) -> None:  # fmt: skip
    """The vectors from head to body, of a row in whose RMS are the elements before the border (None: all)."""
    for i in range(head, body, LANES):
        lanes = gradient_lanes(
            dy,
            x,
            weight,
            dweight,
            dbias,
            i,
            shift,
            sum_shift,
            offset,
            mean,
            rstd,
            b,
            c,
            before(border, i),
            float64,
            None,
        )
        if streaming:
            stream(dx, i, lanes)
            prefetch_second(x, i + ahead)
        else:
            store(dx, i, lanes)


@inlined
def write_row_gradient(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, first: int, last: int, start: int, k: int,
    shift: int, sum_shift: int, offset: Any, means: Any, rstds: Any, bs: Any, cs: Any, j: int, streaming: int,
    ahead: int, centred: Any,
) -> None:  # fmt: skip
    """Columns first to last of the row at `start`, whose numbers are in place j.

    That is dx, the shares of dweight and dbias, and a prefetch of what lies `ahead` of x.
    """
    mean, b = kept_mean(means, j, x, centred), kept_if_centred(bs, j, x, centred)
    rstd, c = kept(rstds, j, x), kept(cs, j, x)
    begin, end, border = start + first, start + last, start + k
    head = min(begin + until_aligned(dx, begin, LANES), end) if streaming else begin
    body = end - (end - head) % LANES
    # Not what is before the border, then what is behind: the cache line that is streamed in two parts took more than a
    # third of the time of rows of 576 elements, and of k % LANES != 0.
    if border >= end:
        write_gradient_lanes(
            dy, x, weight, dx, dweight, dbias, head, body, shift - start, sum_shift - start, offset, mean, rstd, b, c,
            None, streaming, ahead,
        )  # fmt: skip
    else:
        write_gradient_lanes(
            dy, x, weight, dx, dweight, dbias, head, body, shift - start, sum_shift - start, offset, mean, rstd, b, c,
            border, streaming, ahead,
        )  # fmt: skip
    for i, count in ((begin, head - begin), (body, end - body)):  # what is before the first and after the last vector
        if count > 0:
            lanes = gradient_lanes(
                dy, x, weight, dweight, dbias, i, shift - start, sum_shift - start, offset, mean, rstd, b, c,
                border - i, float64, count,
            )  # fmt: skip
            store(dx, i, lanes, count)


@inlined
def write_short_gradient(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, dbias: Any, start: int, n: int, shift: int, sum_shift: int,
    offset: Any, means: Any, rstds: Any, bs: Any, cs: Any, j: int, streaming: int, ahead: int, centred: Any,
) -> None:  # fmt: skip
    """`write_row_gradient` of a row that has neither head nor tail, all of it in the RMS."""
    mean, b = kept_mean(means, j, x, centred), kept_if_centred(bs, j, x, centred)
    rstd, c = kept(rstds, j, x), kept(cs, j, x)
    for i in range(start, start + n, LANES):
        lanes = gradient_lanes(
            dy, x, weight, dweight, dbias, i, shift - start, sum_shift - start, offset, mean, rstd, b, c, None,
            float64, None,
        )  # fmt: skip
        if streaming:
            stream(dx, i, lanes)
            prefetch_second(x, i + ahead)
        else:
            store(dx, i, lanes)


@optional("dbias", lambda dy, start, x, dbias, sum_shift, n: None)
def add_bias_share(dy: Any, start: int, x: Any, dbias: Any, sum_shift: int, n: int) -> Any:
    """dy of one row, added to what stands at sum_shift."""
    like = rounded(zeros(x, float64))
    for i in range(0, n, LANES):
        count = min(LANES, n - i)
        sums = load(dbias, sum_shift + i, like, count)
        store(dbias, sum_shift + i, rounded(sums) + rounded(load(dy, start + i, like, count)), count)


# ------------------------------------------------------------------------------------- rows of sums over many rows


@optional("target", lambda target, sums: None)
def absent_with(target: Any, sums: Any) -> Any:
    """The sums, or None where there is no target for them."""
    return sums


@optional("sums", lambda sums, start, n: None)
def clear(sums: Any, start: int, n: int) -> Any:
    for i in range(start, start + n):
        sums[i] = 0.0


@optional("target", lambda target, start, sums, n, streaming: None)
def put_sums(target: Any, start: int, sums: Any, n: int, streaming: int) -> Any:
    """The sums, rounded to the target's dtype, from `start` on."""
    like = rounded(zeros(sums, float64))
    if streaming and until_aligned(target, start, LANES) == 0 and n % LANES == 0:
        for i in range(0, n, LANES):
            stream(target, start + i, load(sums, i, like))
    else:
        for i in range(0, n, LANES):
            count = min(LANES, n - i)
            store(target, start + i, load(sums, i, like, count), count)
