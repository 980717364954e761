"""Rows whose elements lie apart: x of shape (outer, n, inner), normalised over n. No array is copied as a whole, and
each row has the bits that it has in a contiguous array.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import rmsnorm_np as rn
from rmsnorm_np import _arguments, _backends
from rmsnorm_np.cpu import memory

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = ["float32", "float64", "float16", "bfloat16"]
# (outer, n, inner): squares whole and in part, several blocks, several outer, one element, one row
SHAPES = [
    (2, 256, 64), (3, 17, 7), (2, 33, 1), (2, 64, 17), (3, 3, 200), (1, 1, 9), (5, 31, 5), (2, 40, 300), (1, 129, 1),
    (2, 3001, 130),
]  # fmt: skip
MANY_ROWS = (3, 37, 3136)  # backward: chunks that begin within a cache line
OPTIONS = {
    "plain": {},
    "weight and bias": {"weight": True, "bias": True},
    "weight_offset, and p": {"weight": True, "weight_offset": 1.0, "p": 0.4},
}


def random(rng, shape, dtype):
    return rng.standard_normal(shape).astype(dtype)


def last(a):
    """The array with its middle axis last, C-contiguous."""
    return None if a is None else np.ascontiguousarray(a.swapaxes(1, 2))


def bits(a):
    return np.ascontiguousarray(a).view(f"u{a.itemsize}")


def assert_same(apart, rows):
    """A result over axis 1 of x, and that over the last axis of the contiguous array of the same rows."""
    assert apart.dtype == rows.dtype
    assert apart.flags.c_contiguous
    assert np.array_equal(bits(apart.swapaxes(1, 2)), bits(rows))


def options_of(op, name, rng, n, dtype):
    options = dict(OPTIONS[name])
    if "layer" in op:
        options.pop("p", None)
    for parameter in ("weight", "bias"):
        if options.pop(parameter, False):
            options[parameter] = random(rng, n, dtype)
    return options


def check(op, shape, dtype, options, rng, spoil=lambda x: None):
    """All four functions of a norm, by both layouts."""
    x, dy, residual, dh = (random(rng, shape, dtype) for _ in range(4))
    spoil(x)
    before = [a.copy() for a in (x, dy, residual, dh)]
    forward, backward = getattr(rn, op), getattr(rn, f"{op}_backward")
    assert_same(forward(x, axis=1, **options), forward(last(x), **options))
    grads = [backward(dy, x, axis=1, **options), backward(last(dy), last(x), **options)]
    add, add_backward = getattr(rn, f"add_{op}"), getattr(rn, f"add_{op}_backward")
    for apart, rows in zip(add(x, residual, axis=1, **options), add(last(x), last(residual), **options), strict=True):
        assert_same(apart, rows)
    more = [add_backward(dy, dh, x, axis=1, **options), add_backward(last(dy), last(dh), last(x), **options)]
    for apart, rows in (grads, more):
        assert_same(apart.dx, rows.dx)
        for name in ("dweight", "dbias"):
            mine, its = getattr(apart, name), getattr(rows, name)
            assert (mine is None) == (its is None)
            assert mine is None or np.array_equal(bits(mine), bits(its))
    for a, b in zip((x, dy, residual, dh), before, strict=True):
        assert np.array_equal(bits(a), bits(b))


# float16 has the path of bfloat16, and kernels of its own: for a release
CASES = [
    pytest.param(op, dtype, options, marks=[pytest.mark.engine, *[pytest.mark.slow] * (dtype == "float16")])
    for op in ("rms_norm", "layer_norm")
    for dtype in DTYPES
    for options in OPTIONS
    # the rest would compile for ten minutes
    if options == "weight and bias" or (op, dtype) == ("rms_norm", "float32")
]


@pytest.mark.parametrize(("op", "dtype", "options"), CASES)
def test_bits_are_those_of_contiguous_rows(op, dtype, options, rng):
    for shape in [*SHAPES, MANY_ROWS]:
        check(op, shape, dtype, options_of(op, options, rng, shape[1], dtype), rng)


def beyond_the_range(x):
    """Some rows of x out of the range that sums are computed in, at the edges of squares and blocks too."""
    rows = x.swapaxes(1, 2).reshape(-1, x.shape[1])  # a copy
    size = {"float64": 1e300, "float16": 6e4, "bfloat16": 1e37}.get(x.dtype.name, 1e38)
    rows[::7] = np.copysign(size, rows[::7].astype(np.float64)).astype(x.dtype)
    rows[3::11] = (rows[3::11].astype(np.float64) * 1e-300).astype(x.dtype)
    rows[-1, 0] = np.inf
    x[...] = rows.reshape(x.shape[0], x.shape[2], -1).swapaxes(1, 2)


@pytest.mark.engine
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_bits_of_rows_out_of_range(op, dtype, rng):
    for shape in [(2, 64, 64), (3, 17, 7), (2, 70, 133)]:
        options = {"weight": random(rng, shape[1], dtype), "bias": random(rng, shape[1], dtype)}
        check(op, shape, dtype, options, rng, spoil=beyond_the_range)


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [d if d != "float16" else pytest.param(d, marks=pytest.mark.slow) for d in DTYPES])
def test_out_may_be_what_is_read(dtype, rng):
    """Rows out of range are computed from x and dy after all others: they must still be there."""
    shape = (2, 50, 77)
    x, dy, residual = (random(rng, shape, dtype) for _ in range(3))
    beyond_the_range(x)
    want, grads = rn.rms_norm(x, axis=1), rn.rms_norm_backward(dy, x, axis=1)
    assert_same(want, rn.rms_norm(last(x)))
    both = rn.add_rms_norm(x, residual, axis=1)
    for which in range(2):
        a, b = x.copy(), dy.copy()
        target = (a, b)[which]
        assert rn.rms_norm_backward(b, a, axis=1, out=target).dx is target
        assert np.array_equal(bits(target), bits(grads.dx))
        a, b = x.copy(), residual.copy()
        y, h = rn.add_rms_norm(a, b, axis=1, out=(a, b)[which], residual_out=(b, a)[which])
        assert np.array_equal(bits(y), bits(both.y))
        assert np.array_equal(bits(h), bits(both.h))
    a = x.copy()
    assert rn.rms_norm(a, axis=1, out=a) is a
    assert np.array_equal(bits(a), bits(want))


@pytest.mark.engine
def test_mixed_dtypes(rng):
    """Arrays whose lines hold different numbers of elements."""
    shape = (2, 70, 150)
    for x_dtype, other in [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float64")]:
        x, dh = random(rng, shape, x_dtype), random(rng, shape, x_dtype)
        residual, weight = random(rng, shape, other), random(rng, shape[1], other)
        pairs = zip(
            rn.add_rms_norm(x, residual, weight, axis=1),
            rn.add_rms_norm(last(x), last(residual), weight),
            strict=True,
        )
        for apart, rows in pairs:
            assert_same(apart, rows)
        apart = rn.add_rms_norm_backward(x, dh, residual, weight, axis=1)
        rows = rn.add_rms_norm_backward(last(x), last(dh), last(residual), weight)
        assert_same(apart.dx, rows.dx)
        assert np.array_equal(bits(apart.dweight), bits(rows.dweight))


def test_large_results_past_the_cache(rng):
    """Stretches that fill lines, and others; x begins within a line."""
    for n, inner in [(64, 35008), (64, 35009)]:
        room = rng.standard_normal(n * inner + 1, dtype=np.float32)
        for x in (room[:-1].reshape(1, n, inner), room[1:].reshape(1, n, inner)):
            assert x.nbytes >= memory.STREAM_BYTES
            assert_same(rn.rms_norm(x, axis=1), rn.rms_norm(last(x)))
            out = np.empty_like(x)
            assert_same(rn.rms_norm(x, axis=1, out=out), rn.rms_norm(last(x)))
            assert_same(rn.rms_norm_backward(x, x, axis=1).dx, rn.rms_norm_backward(last(x), last(x)).dx)


@pytest.mark.engine
@pytest.mark.parametrize("axis", [1, (1, 2), 0, (0, 1)])
def test_axes_that_stand_together_are_one(axis, rng):
    x, dy = random(rng, (4, 5, 6, 7), "float32"), random(rng, (4, 5, 6, 7), "float32")
    axes = axis if isinstance(axis, tuple) else (axis,)
    weight = random(rng, tuple(x.shape[i] for i in axes), "float32")
    order = (*(i for i in range(4) if i not in axes), *axes)
    moved = [np.ascontiguousarray(a.transpose(order)) for a in (x, dy)]
    last_axes = tuple(range(4 - len(axes), 4))
    y, want = rn.rms_norm(x, weight, axis=axis), rn.rms_norm(moved[0], weight, axis=last_axes)
    assert np.array_equal(bits(y.transpose(order)), bits(want))
    grads = rn.rms_norm_backward(dy, x, weight, axis=axis)
    wanted = rn.rms_norm_backward(moved[1], moved[0], weight, axis=last_axes)
    assert np.array_equal(bits(grads.dx.transpose(order)), bits(wanted.dx))
    assert np.array_equal(bits(grads.dweight), bits(wanted.dweight))


def engine_shape(x, axis):
    call = ("x", "residual", "out", "residual_out"), (x, None), (None, None, 0.0), (None, None), 1e-6, 1.0, axis
    return _backends.select(x, "cpu").arguments.engine_arguments(call)[0][0].shape


def test_which_arrays_an_engine_takes_apart():
    x = np.ones((4, 5, 6, 7), np.float32)
    assert engine_shape(x, 1) == (4, 5, 42)
    assert engine_shape(x, (0, 1)) == (1, 20, 42)
    assert engine_shape(x, (0, 2)) == (35, 24)  # not together: copied
    assert engine_shape(x[:, ::2], 1) == (4 * 42, 3)
    assert engine_shape(x[..., :1].copy(), 2) == (20, 6)  # one row after another
    assert engine_shape(np.ones((2, _arguments.LONGEST_APART + 1, 2), np.float32), 1) == (
        4,
        _arguments.LONGEST_APART + 1,
    )


@pytest.mark.engine
def test_no_array_is_copied(rng):
    x, dy, out = (random(rng, (8, 64, 2048), "float32") for _ in range(3))
    weight = random(rng, 64, "float32")
    calls = [
        lambda: rn.rms_norm(x, weight, axis=1, out=out),
        lambda: rn.rms_norm_backward(dy, x, weight, axis=1, out=out),
        lambda: rn.add_rms_norm(x, dy, weight, axis=1, out=out, residual_out=dy),
    ]
    for call in calls:
        call()
        free = list(memory._pool.free)
        tracemalloc.start()
        try:
            call()
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert most < x.nbytes / 8
        assert memory._pool.free == free


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_threads(threads, rng):
    x, dy = random(rng, (3, 48, 1001), "float32"), random(rng, (3, 48, 1001), "float32")
    weight = random(rng, 48, "float32")
    want = rn.rms_norm_backward(last(dy), last(x), weight)
    before = rn.get_num_threads()
    try:
        rn.set_num_threads(threads)
        got = rn.rms_norm_backward(dy, x, weight, axis=1)
    finally:
        rn.set_num_threads(before)
    assert_same(got.dx, want.dx)
    assert np.array_equal(bits(got.dweight), bits(want.dweight))
