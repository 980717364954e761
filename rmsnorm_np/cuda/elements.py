"""What becomes of the elements of one row: y, or dx and this thread's part of dweight and dbias."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from rmsnorm_np import _formulas
from rmsnorm_np.cuda.intrinsics import product
from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.moments import (
    B_TAIL,
    C_TAIL,
    DY_TIMES,
    DY_UNDO,
    MEAN,
    MEAN_TAIL,
    RSTD,
    RSTD_TAIL,
    UNDO,
    UNDO_AGAIN,
    X_TIMES,
    B,
    C,
)
from rmsnorm_np.cuda.pairs import distance_pair, lost_in_difference
from rmsnorm_np.cuda.rows import factor, factor_pair, weight_kept
from rmsnorm_np.cuda.vector import decoder, encoder, inlined, reader, unrolled, words_of, writer

rms_gradient = inlined(_formulas.rms_gradient)
layer_gradient = inlined(_formulas.layer_gradient)


@lru_cache
def standardiser(plan: Plan) -> Any:
    """standardised(value, numbers): xhat for half types.

    They need the whole mean, of which little may be left in the difference, but not the whole rstd.
    """
    centred = plan.centred

    @inlined
    def standardised(value: Any, numbers: Any) -> Any:
        distance = (value - numbers[MEAN]) - numbers[MEAN_TAIL] if centred else value
        return distance * numbers[RSTD]

    return standardised


@lru_cache
def standardiser_pair(plan: Plan) -> Any:
    """standardised_pair(value, numbers): xhat, as a pair."""
    centred = plan.centred

    @inlined
    def standardised_pair(value: Any, numbers: Any) -> Any:
        rstd, rstd_tail = numbers[RSTD], numbers[RSTD_TAIL]
        if centred:
            distance, distance_tail = distance_pair(value, numbers[MEAN], numbers[MEAN_TAIL])
            head = product(distance, rstd)
            tail = cuda.fma(distance, rstd, -head) + (distance * rstd_tail + distance_tail * rstd)
        else:
            head = product(value, rstd)
            tail = cuda.fma(value, rstd, -head) + value * rstd_tail
        return head, tail

    return standardised_pair


@lru_cache
def simple_value(plan: Plan) -> Any:
    """value_of(x, weight, e, bias, offset, numbers): y of one element, for half types."""
    standardised, scaled, has_bias = standardiser(plan), factor(plan), plan.bias is not None

    @inlined
    def value_of(x: Any, weight: Any, e: Any, bias: Any, offset: Any, numbers: Any) -> Any:
        value = scaled(standardised(x, numbers), weight, 0, e, offset)
        return value + bias if has_bias else value

    return value_of


@lru_cache
def exact_value(plan: Plan) -> Any:
    """As `simple_value`, where the result has as many digits as the type inside: one rounding counts, the last."""
    standardised_pair, scaled_pair, scaled = standardiser_pair(plan), factor_pair(plan), factor(plan)
    has_bias, zero = plan.bias is not None, plan.work(0)

    @inlined
    def value_of(x: Any, weight: Any, e: Any, bias: Any, offset: Any, numbers: Any) -> Any:
        xhat, xhat_tail = standardised_pair(x, numbers)
        value, tail = scaled_pair(xhat, weight, 0, e, offset)
        tail += scaled(xhat_tail, weight, 0, e, offset)
        if has_bias:
            shifted = value + bias
            tail += lost_in_difference(value, -bias, shifted)
            value = shifted
        # an infinite number has no tail: infinity less infinity is NaN
        return value + (tail if abs(tail) < math.inf else zero)

    return value_of


@lru_cache
def simple_gradient(plan: Plan) -> Any:
    """gradient_of(x, d, weight, at, e, inside, offset, numbers): (dx, xhat) of one element; inside: it is in the RMS.

    For half types: float32 inside has digits to spare.
    """
    centred = plan.centred
    scaled, standardised = factor(plan, again=True), standardiser(plan)

    @inlined
    def gradient_of(x: Any, d: Any, weight: Any, at: Any, e: Any, inside: Any, offset: Any, numbers: Any) -> Any:
        xhat, g = standardised(x, numbers), scaled(d, weight, at, e, offset)
        if centred:
            gradient = layer_gradient(g, xhat, numbers[B], numbers[C])
        else:
            gradient = rms_gradient(g, xhat, numbers[C]) if inside else g
        return gradient * numbers[RSTD], xhat

    return gradient_of


@lru_cache
def exact_gradient(plan: Plan) -> Any:
    """As `simple_gradient`, where the result has as many digits as the type inside.

    g, b, c and xhat are pairs. The formula of their heads rounds once; the tails, and what g - b rounds off, go through
    the same formula, which is linear in each. Two roundings count: that of the difference, which may be three times its
    largest term, and that of the result. In float64, where a GPU has arithmetic to spare for it, only the last one.
    """
    centred, zero, careful = plan.centred, plan.work(0), plan.work is np.float64
    scaled_pair, standardised_pair = factor_pair(plan), standardiser_pair(plan)

    @inlined
    def lost_in_formula(outer: Any, xhat: Any, c: Any, gradient: Any) -> Any:
        """outer - xhat · c - gradient."""
        share = product(xhat, c)
        difference = outer - share  # as near to gradient as the last bit of share: the difference of the two is exact
        return lost_in_difference(outer, share, difference) - cuda.fma(xhat, c, -share) + (difference - gradient)

    @inlined
    def gradient_of(x: Any, d: Any, weight: Any, at: Any, e: Any, inside: Any, offset: Any, numbers: Any) -> Any:
        xhat, xhat_tail = standardised_pair(x, numbers)
        g, g_tail = scaled_pair(d, weight, at, e, offset)
        c, c_tail, rstd = numbers[C], numbers[C_TAIL], numbers[RSTD]
        gradient, tail = g, g_tail
        if centred:
            b = numbers[B]
            gradient = layer_gradient(g, xhat, b, c)
            tail += lost_in_difference(g, b, g - b)
            if careful:
                tail += lost_in_formula(g - b, xhat, c, gradient)
            tail = rms_gradient(layer_gradient(tail, xhat, numbers[B_TAIL], c_tail), xhat_tail, c)
        elif inside:
            gradient = rms_gradient(g, xhat, c)
            if careful:
                tail += lost_in_formula(g, xhat, c, gradient)
            tail = rms_gradient(rms_gradient(tail, xhat, c_tail), xhat_tail, c)
        correction = gradient * numbers[RSTD_TAIL] + tail * rstd
        # an infinite number has no correction: infinity less infinity is NaN
        gradient = cuda.fma(gradient, rstd, correction if abs(correction) < math.inf else zero)
        return gradient, xhat + (xhat_tail if abs(xhat_tail) < math.inf else zero)

    return gradient_of


@lru_cache
def row_writer(plan: Plan) -> Any:
    """write_row(x, weight, bias, y, start, weight_start, bias_start, lane, n, stop, offset, numbers): y of one row.

    x: words; weight, bias, y: arrays. Element e of the piece is at start + e of y, at weight_start + e of weight.
    """
    work, lanes, trips, team = plan.work, plan.lanes, plan.trips, plan.team
    x_element, put = decoder(plan.x, work, again=True), encoder(plan.x, plan.native_bfloat16)
    has_weight, has_bias = plan.weight is not None, plan.bias is not None
    weight_name, bias_name = plan.weight or "float32", plan.bias or "float32"
    read_weight, read_bias = (reader(name, lanes, plan.aligned) for name in (weight_name, bias_name))
    weight_words, bias_words = words_of(weight_name, lanes), words_of(bias_name, lanes)
    bias_element, zero = decoder(bias_name, work), work(0)
    write = writer(plan.x, lanes, plan.aligned)
    value_of = exact_value(plan) if plan.exact else simple_value(plan)

    @inlined
    def put_element(e: Any, t: Any, x: Any, w: Any, b: Any, offset: Any, numbers: Any, result: Any) -> None:
        bias = bias_element(b, 0, e) if has_bias else zero
        put(result, 0, e, value_of(x_element(x, 4 * t, e), w, e, bias, offset, numbers))

    put_elements = unrolled(put_element, lanes)

    @inlined
    def write_vector(
        t: Any, x: Any, weight: Any, bias: Any, y: Any, start: Any, weight_start: Any, bias_start: Any, lane: Any,
        stop: Any, offset: Any, numbers: Any,
    ) -> None:  # fmt: skip
        w = cuda.local.array(weight_words, np.uint32)
        b = cuda.local.array(bias_words, np.uint32)
        result = cuda.local.array(4, np.uint32)
        i = (t * team + lane) * lanes
        if has_weight:
            read_weight(weight, weight_start + i, weight_start + stop, w, 0)
        if has_bias:
            read_bias(bias, bias_start + i, bias_start + stop, b, 0)
        put_elements(t, x, w, b, offset, numbers, result)
        write(y, start + i, start + stop, result)

    return unrolled(write_vector, trips)


@lru_cache
def gradient_writer(plan: Plan) -> Any:
    """write_gradient(x, dy, weight, dx, start, lane, stop, k, offset, numbers, dweight, dbias): dx of one row.

    x, dy, weight: words, the same elements of each. dweight and dbias, this thread's sums, take their share.
    """
    write_ordinary, write_rescaled = vector_gradient_writer(plan, False), vector_gradient_writer(plan, True)
    scalable = plan.x != "float16" or plan.dy != "float16"

    @inlined
    def write_gradient(
        x: Any, dy: Any, weight: Any, dx: Any, start: Any, lane: Any, stop: Any, k: Any, offset: Any, numbers: Any,
        dweight: Any, dbias: Any,
    ) -> None:  # fmt: skip
        if scalable and (numbers[X_TIMES] != 1 or numbers[DY_TIMES] != 1):
            write_rescaled(x, dy, weight, dx, start, lane, stop, k, offset, numbers, dweight, dbias)
        else:
            write_ordinary(x, dy, weight, dx, start, lane, stop, k, offset, numbers, dweight, dbias)

    return write_gradient


@lru_cache
def vector_gradient_writer(plan: Plan, rescaled: bool) -> Any:
    """As `gradient_writer`, for rows that were rescaled or for those that were not.

    To multiply by ones in all rows would be 3 of some 20 instructions for an element.
    """
    work, lanes, trips, team = plan.work, plan.lanes, plan.trips, plan.team
    partial = plan.partial
    has_weight, has_bias = plan.weight is not None, plan.bias is not None
    dy_name = plan.dy or "float32"
    x_element, dy_element = decoder(plan.x, work, again=True), decoder(dy_name, work, again=True)
    put = encoder(plan.x, plan.native_bfloat16)
    dy_words, weight_words = words_of(dy_name, lanes), words_of(weight_kept(plan), lanes)
    gradient_of = exact_gradient(plan) if plan.exact else simple_gradient(plan)
    write = writer(plan.x, lanes, plan.aligned)

    @inlined
    def put_element(
        e: Any, t: Any, i: Any, x: Any, dy: Any, weight: Any, k: Any, offset: Any, numbers: Any, result: Any,
        dweight: Any, dbias: Any,
    ) -> None:  # fmt: skip
        d = dy_element(dy, t * dy_words, e)
        inside = not partial or i + e < k
        gradient, xhat = gradient_of(x_element(x, 4 * t, e), d, weight, t * weight_words, e, inside, offset, numbers)
        if rescaled:
            gradient *= numbers[UNDO]
            gradient *= numbers[UNDO_AGAIN]
            d *= numbers[DY_UNDO]
        put(result, 0, e, gradient)
        if has_weight:
            # the compiler would move the addition, without the product, behind both branches of `gradient_writer`
            dweight[t * lanes + e] = cuda.fma(d, xhat, dweight[t * lanes + e])
        if has_bias:
            dbias[t * lanes + e] += d

    put_elements = unrolled(put_element, lanes)

    @inlined
    def write_vector(
        t: Any, x: Any, dy: Any, weight: Any, dx: Any, start: Any, lane: Any, stop: Any, k: Any, offset: Any,
        numbers: Any, dweight: Any, dbias: Any,
    ) -> None:  # fmt: skip
        result = cuda.local.array(4, np.uint32)
        i = (t * team + lane) * lanes
        put_elements(t, i, x, dy, weight, k, offset, numbers, result, dweight, dbias)
        write(dx, start + i, start + stop, result)

    return unrolled(write_vector, trips)
