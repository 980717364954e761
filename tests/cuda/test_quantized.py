"""RMSNorm in 8 bits on device arrays, by its public name: q, scale and h are those of the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from device import EXECUTED, device, pretend_small, to_device, to_host, view_of
from tolerances import worst_ulp

import rmsnorm_np as rn

FORMATS = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("int8", "float8_e4m3fn", "float8_e5m2")}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BFLOAT16, np.dtype(np.float64)]


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    pretend_small(monkeypatch)


@pytest.fixture
def rng():
    return np.random.default_rng(6)


def bits(a):
    return None if a is None else (a.shape, a.dtype, a.tobytes())


def on_device(a):
    return to_device(a) if isinstance(a, np.ndarray) else a


@np.errstate(all="ignore")
def check(x, *parameters, scale=None, residual=None, **options):
    """Calls it on device arrays and compares all results with the reference; returns those."""
    arrays = x, *parameters, scale, residual
    x_, *parameters_, scale_, residual_ = there = tuple(map(on_device, arrays))
    got = rn.quantized_rms_norm(x_, *parameters_, scale=scale_, residual=residual_, **options)
    want = rn.reference.quantized_rms_norm(x, *parameters, scale=scale, residual=residual, **options)
    for host, array in zip(arrays, there, strict=True):
        assert array is host or bits(to_host(array)) == bits(host)
    q, found, h = map(to_host, got)
    assert bits(h) == bits(want.h)
    assert (found.shape, found.dtype) == (want.scale.shape, want.scale.dtype)
    if found.dtype == np.float32:
        assert bits(q) == bits(want.q)
        assert bits(np.abs(found)) == bits(np.abs(want.scale))  # NaN may have a sign
    else:  # where float64 is rounded in the last place, q is the neighbour at most once in 2**45 elements
        assert (q.shape, q.dtype) == (want.q.shape, want.q.dtype)
        assert np.array_equal(q.astype(float), want.q.astype(float), equal_nan=True)
        assert worst_ulp(found, want.scale) <= 1
    return got


@pytest.mark.parametrize(
    ("dtype", "name"),
    [*((dtype, name) for dtype in DTYPES[:2] for name in FORMATS), (DTYPES[2], "float8_e4m3fn")],
    ids=str,
)
def test_formats(name, dtype, rng):
    """Ordinary rows, one of zeros, with a NaN, with an infinity; several of them in a block."""
    n = 24
    x = (rng.standard_normal((7, n)) * np.exp(rng.standard_normal((7, 1)))).astype(dtype)
    x[2], x[4, 3], x[5, 0] = 0, np.nan, np.inf
    weight, bias = (rng.standard_normal(n).astype(dtype) for _ in range(2))
    for options in ({}, {"scale_ub": 1.0}, {"scale": 0.02}):
        check(x, weight, bias, dtype=name, **options)
    if dtype == np.float32:
        got = check(x, dtype=FORMATS[name])
        assert to_host(got.scale)[2] == 2.0**-126


@pytest.mark.parametrize("name", FORMATS)
def test_rounding(name):
    """Of all numbers of the format, of what is halfway between two neighbours, and of what is next to that."""
    numbers = np.arange(256, dtype=np.uint8).view(FORMATS[name]).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    halfway = (numbers[1:] + numbers[:-1]) / 2
    near = [np.nextafter(halfway, way) for way in (-np.inf, np.inf)]
    beyond = [-0.0, np.nan, np.inf, -np.inf, *(numbers[[0, -1]] * 1.1), *(halfway[[0, -1]] * 2)]
    y = np.concatenate([numbers, halfway, *near, beyond])
    x = np.ones((1, y.size), np.float16)  # y is the bias
    for shift in (y.astype(np.float32), y):
        check(x, np.zeros(y.size, np.float16), shift, dtype=name, scale=1.0)


@pytest.mark.parametrize("n", [1, 130, 203, 1024, 1301])
def test_lengths(n, rng):
    """Teams of one thread, of a warp and of two; rows in pieces, also of vectors that are not aligned."""
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, n), n, n))
    for place in (0, -1):  # of the largest: in the first piece, and in the last
        x[:, place] = 40
        check(x, weight, bias)
        x[:, place] = 0
    check(x, weight, bias, scale=np.full((3, 1), 0.03, np.float32))
    if EXECUTED:
        assert ("piece_sums" in {name for name, _ in device.launched}) == (n > 512)


@pytest.mark.parametrize("residual_dtype", [BFLOAT16, np.dtype(np.float64)], ids=str)
def test_residual_and_a_part_in_the_rms(residual_dtype, rng):
    x = rng.standard_normal((3, 33)).astype(np.float32)
    residual, weight = (100 * rng.standard_normal((3, 33))).astype(residual_dtype), rng.standard_normal(33)
    options = {"p": 0.3, "weight_offset": 1.0, "eps": 0.1}
    weight = weight.astype(np.float32)
    q, scale, _ = check(x, weight, residual=residual, **options)
    if residual_dtype == np.float64:  # one compilation is enough
        return
    own, out = to_device(residual), to_device(np.zeros(x.shape, np.int8))
    again = rn.quantized_rms_norm(
        to_device(x), to_device(weight), residual=own, out=out, residual_out=own, scale=scale, **options
    )
    assert again.q is out
    assert again.h is own
    assert bits(to_host(out)) == bits(to_host(q))


def test_other_axes_and_scales_that_broadcast(rng):
    """The scale of each row is in its place, whatever the order that the kernels take the rows in."""
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    for axis, shapes in ((0, [(3, 8), (1, 3, 1)]), ((1, 2), [(2, 1, 1), ()]), (-1, [(3, 1), (2, 1, 1), (2, 3, 1)])):
        check(x, axis=axis)
        for shape in shapes:
            check(x, axis=axis, scale=rng.uniform(0.01, 0.1, shape))  # rounded to float32
    weight, bias = rng.standard_normal((2, 1, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    check(x, weight, bias)
    check(x, weight, scale=rng.uniform(0.01, 0.1, (2, 3, 1)).astype(np.float32))
    check(x, weight, rng.standard_normal((3, 8)).astype(np.float32))
    check(x[0, 0], weight[0, 0])
    check(np.zeros((0, 5), np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_out(name, rng):
    """Strided, in another order than the rows, over x itself, and as bytes."""
    x = rng.standard_normal((6, 24)).astype(np.float32)
    want = bits(to_host(check(x, dtype=name).q))
    room = to_device(np.zeros((6, 48), FORMATS[name]))
    out = view_of(room, (6, 24), (48, 2), FORMATS[name])
    assert rn.quantized_rms_norm(to_device(x), dtype=name, out=out).q is out
    assert bits(np.ascontiguousarray(to_host(room)[:, ::2])) == want
    over = to_device(x)
    out = view_of(over, (6, 24), (24, 1), FORMATS[name])
    assert bits(to_host(rn.quantized_rms_norm(over, dtype=name, out=out).q)) == want
    turned = to_device(np.zeros((24, 6), FORMATS[name]))
    rn.quantized_rms_norm(to_device(np.ascontiguousarray(x.T)), dtype=name, axis=0, out=turned)
    assert bits(np.ascontiguousarray(to_host(turned).T)) == want
    plain = to_device(np.zeros((6, 24), np.uint8))
    if name == "int8":
        with pytest.raises(TypeError, match="out has dtype uint8, expected int8, the dtype of the result"):
            rn.quantized_rms_norm(to_device(x), out=plain)
    else:
        assert rn.quantized_rms_norm(to_device(x), dtype=name, out=plain).q is plain
        assert bits(to_host(plain).view(FORMATS[name])) == want


@pytest.mark.parametrize("n", [9, 301])
def test_rows_out_of_range(n, rng):
    """Their sums are not what a float64 holds; their scales and q are as ever, in whole rows and in pieces."""
    sizes = np.reshape([1, 1e300, 1, 1e-300, 1e-310], (5, 1))
    x = np.clip(rng.standard_normal((5, n)), -1.7, 1.7) * sizes
    weight, bias = rng.standard_normal((2, n))
    check(x, weight, bias, eps=1e-300)
    check(x, weight, bias, eps=1e-300, scale_ub=1.0)
    check(x, weight, eps=0.0, scale=rng.uniform(0.01, 0.1, (5, 1)))


@pytest.mark.parametrize("scale", [3e-310, 8e307])
def test_a_scale_that_has_no_inverse(scale, rng):
    x, weight = rng.choice([-1.0, 1.0], (2, 8)), rng.uniform(0.1, 2, 8) * scale
    check(x, weight, scale=scale, dtype="float8_e4m3fn")


def test_a_given_scale_is_rounded():
    """To float32, where x is no float64. y is the bias: y / scale is halfway between two numbers then."""
    x, y = np.ones((1, 2), np.float32), np.array([1.125, -1.125], np.float32)
    q, _, _ = check(x, np.zeros(2, np.float32), y, scale=np.full((1, 1), 0.75 * (1 + 2**-30)))
    assert to_host(q).tolist() == [[2, -2]]


def test_a_scale_in_the_memory_of_a_result(rng):
    """A row out of range is computed when others are written."""
    x, scale = rng.standard_normal((6, 24)), rng.uniform(0.01, 0.1, (6, 1))
    x[4] *= 1e300
    want = rn.reference.quantized_rms_norm(x, scale=scale)
    room = to_device(np.resize(scale, 18))
    device_scale, out = view_of(room, (6, 1), (8, 8), np.float64), view_of(room, (6, 24), (24, 1), np.int8)
    got = rn.quantized_rms_norm(to_device(x), scale=device_scale, out=out)
    assert bits(to_host(got.q)) == bits(want.q)
    assert bits(to_host(got.scale)) == bits(want.scale)


def test_errors():
    x = to_device(np.ones((2, 4), np.float32))
    cases = [
        ({"scale": np.ones((2, 1))}, TypeError, r"scale is a host array \(ndarray\), expected a device array like x"),
        ({"scale": 0.0}, ValueError, "scale has the value 0.0 in float32, expected finite numbers > 0"),
        ({"scale": to_device(np.ones(3, np.float32))}, ValueError,
         r"scale has shape \(3,\), expected one that broadcasts to \(2, 1\)"),
        ({"scale": to_device(np.ones(1, np.int32))}, TypeError, "scale has dtype int32, expected float16"),
        ({"out": to_device(np.zeros((2, 4), np.int32))}, TypeError, "out has dtype int32, expected int8"),
        ({"out": to_device(np.zeros((2, 4), np.float32))}, TypeError, "out has dtype float32, expected int8"),
        ({"out": to_device(np.zeros((4, 2), np.int8))}, ValueError, r"out has shape \(4, 2\), expected x.shape"),
        ({"out": np.zeros((2, 4), np.int8)}, TypeError, r"out is a host array \(ndarray\)"),
        ({"residual": x, "residual_out": x, "out": view_of(x, (2, 4), (4, 1), np.int8)}, ValueError,
         "out and residual_out share memory"),
        ({"weight": to_device(np.ones(4, np.int8))}, TypeError, "weight has dtype int8, expected float16"),
    ]  # fmt: skip
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            rn.quantized_rms_norm(x, **options)
