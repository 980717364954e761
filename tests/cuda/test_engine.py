"""The CUDA engine by its public functions, on a GPU or, without one, by executing its compiled PTX."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from bounds import DX_ULP, ULP, exact_backward, exact_forward, parameter_tolerance
from device import fill, pretend_small, to_device, to_host, view_of
from tolerances import worst_ulp

import rmsnorm_np as rn
from rmsnorm_np.cuda.arrays import seen
from rmsnorm_np.ops.rms import RMS_NORM, RMS_NORM_BACKWARD


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    pretend_small(monkeypatch)


DTYPES = {name: np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name) for name in ULP}
FORWARD = {"rms": rn.rms_norm, "layer": rn.layer_norm}
BACKWARD = {"rms": rn.rms_norm_backward, "layer": rn.layer_norm_backward}

# (vectors, elements more): the row's length
LENGTHS = {
    "one element": (0, 1),
    "a thread, not full": (0, 3),
    "a thread": (2, 0),
    "part of a warp, not aligned": (5, 1),
    "part of a warp": (16, 0),
    "a warp": (64, 0),
    "a block, not full": (65, 0),
    "a block": (128, 0),
    "pieces, not aligned": (128, 1),
    "pieces": (136, 0),
    "many pieces": (270, 0),
}


def numbers(rng, shape, dtype, scale=1.0, shift=0.0):
    return (rng.standard_normal(shape) * scale + shift).astype(dtype)


def check(op, x, dy, weight, bias, k=None, eps=1e-6, offset=0.0):
    """All results of both functions, in public form, against the exact ones."""
    n = x.shape[1]
    options = {"eps": eps, "weight_offset": offset, "backend": "cuda"}
    if k is not None:
        options["p"] = k / n
    k = k or n
    flat = [x, *(None if a is None else a[0] for a in (weight, bias))]  # (n,), as a user has them
    arrays = [None if a is None else to_device(a) for a in flat]
    y = to_host(FORWARD[op](*arrays, **options))
    exact, magnitude = exact_forward(op, x, weight, bias, k, eps, offset)
    assert y.dtype == x.dtype
    assert worst_ulp(y, exact, magnitude) <= ULP[x.dtype.name]

    grads = [to_host(a) for a in BACKWARD[op](to_device(dy), *arrays, **options)]
    exact, magnitude, *sums = exact_backward(op, dy, x, weight, bias, k, eps, offset)
    assert worst_ulp(grads[0], exact, magnitude) <= DX_ULP[x.dtype.name]
    work = np.result_type(*(np.float64 for a in (x, dy, weight, bias) if a is not None and a.itemsize == 8), np.float32)
    for gradient, parameter, sum_ in zip(grads[1:], flat[1:], sums, strict=True):
        assert (gradient is None) == (parameter is None)
        if gradient is not None:
            assert gradient.dtype == parameter.dtype
            limit = parameter_tolerance(*sum_, len(x), work, parameter.dtype)
            assert np.all(np.abs(gradient - sum_[0]) <= limit)

    for device, given in zip(arrays, flat, strict=True):
        assert device is None or to_host(device).tobytes() == given.tobytes(), "an input was written"


@pytest.fixture
def rng():
    return np.random.default_rng(4)


# All lengths with both norms in float32. In another dtype rows of up to a warp with one norm or the other, each length
# with each of them in some dtype; of longer rows two kinds, with one norm.
LONG = ("a block, not full", "a block", "pieces, not aligned", "pieces", "many pieces")
CHOSEN = {
    "float16": ("layer", "a block, not full", "pieces"),
    "bfloat16": ("rms", "a block", "pieces, not aligned"),
    "float64": ("layer", "a block", "pieces"),
}
SHORT = [length for length in LENGTHS if length not in LONG]
BORDERS = [
    (op, dtype, length) for op in FORWARD for d, dtype in enumerate(DTYPES) for length in LENGTHS
    if dtype == "float32" or (op == CHOSEN[dtype][0] and length in CHOSEN[dtype])
    or (length in SHORT and op == list(FORWARD)[(SHORT.index(length) + d) % 2])
]  # fmt: skip


@pytest.mark.parametrize(("op", "dtype", "length"), BORDERS)
def test_every_border(op, dtype, length, rng):
    vectors, more = LENGTHS[length]
    dtype, rows = DTYPES[dtype], 2 if length in LONG else 3
    n = vectors * 16 // dtype.itemsize + more
    x, dy = numbers(rng, (rows, n), dtype, shift=0.5), numbers(rng, (rows, n), dtype)
    weight = numbers(rng, (1, n), dtype)
    bias = numbers(rng, (1, n), dtype) if op == "layer" else None
    check(op, x, dy, weight, bias, eps=1e-6 if n > 1 else 1.0)


@pytest.mark.parametrize("length", ["a thread, not full", "part of a warp", "pieces"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_partial_rms_and_offset(dtype, length, rng):
    vectors, more = LENGTHS[length]
    dtype = DTYPES[dtype]
    n = vectors * 16 // dtype.itemsize + more
    x, dy, weight = numbers(rng, (3, n), dtype), numbers(rng, (3, n), dtype), numbers(rng, (1, n), dtype)
    check("rms", x, dy, weight, None, k=n // 3, offset=1.0)


@pytest.mark.parametrize(
    ("x_dtype", "other"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float64")]
)
@pytest.mark.parametrize("vectors", [3, 129])
def test_mixed_dtypes(x_dtype, other, vectors, rng):
    rows, n = 4 if vectors == 3 else 2, vectors * 16 // DTYPES[x_dtype].itemsize
    x, dy = numbers(rng, (rows, n), DTYPES[x_dtype]), numbers(rng, (rows, n), DTYPES[other])
    weight, bias = numbers(rng, (1, n), DTYPES[other]), numbers(rng, (1, n), DTYPES[x_dtype])
    check("layer", x, dy, weight, bias)
    check("rms", x, dy, None, bias)


@pytest.mark.parametrize(("rows", "m", "bias_m", "n"), [(12, 3, 1, 8), (12, 2, 6, 20), (4, 4, 2, 516), (7, 7, 7, 5)])
def test_parameters_per_head(rows, m, bias_m, n, rng):
    """Rows with a weight of their own, more partial sums than blocks, a parameter with fewer rows than the other."""
    x, dy = numbers(rng, (rows, n), np.float32), numbers(rng, (rows, n), np.float32)
    device = [seen("array", to_device(a)) for a in (dy, x)]
    from rmsnorm_np import cuda as engine

    weight, bias = numbers(rng, (m, n), np.float32), numbers(rng, (bias_m, n), np.float32)
    parameters = [seen("parameter", to_device(a)) for a in (weight, bias)]
    y = to_device(np.zeros_like(x))
    columns = (*parameters, 0.0)
    engine.forward(RMS_NORM, (device[1], None), columns, (seen("y", y), None), n, 1e-6)
    assert worst_ulp(to_host(y), *exact_forward("rms", x, weight, bias, n, 1e-6, 0.0)) <= ULP["float32"]
    dx = to_device(np.zeros_like(x))
    reads = device[1], device[0], None
    _, grads = engine.backward(RMS_NORM_BACKWARD, reads, columns, (seen("dx", dx),), n, 1e-6)
    exact, magnitude, *sums = exact_backward("rms", dy, x, weight, bias, n, 1e-6, 0.0)
    assert worst_ulp(to_host(dx), exact, magnitude) <= DX_ULP["float32"]
    for gradient, sum_ in zip(grads, sums, strict=True):
        limit = parameter_tolerance(*sum_, rows, np.float32, np.float32)
        assert np.all(np.abs(to_host(gradient) - sum_[0]) <= limit)


@pytest.mark.parametrize("vectors", [4, 65, 129])
@pytest.mark.parametrize(
    ("op", "dtype"), [("rms", "float32"), ("layer", "float32"), ("layer", "bfloat16"), ("layer", "float64")]
)
def test_ends_of_the_range(op, dtype, vectors, rng):
    """Rows whose squares overflow or vanish in the type inside, next to ordinary ones in the same warp."""
    n = vectors * 16 // DTYPES[dtype].itemsize
    far = 200.0 if dtype == "float64" else 25.0
    scales = 10.0 ** np.array([[0.0], [far], [-far], [0.0]])
    x = numbers(rng, (4, n), np.float64, shift=0.1) * scales
    dy = numbers(rng, (4, n), np.float64) * scales[[0, 1, 2, 2]]
    dtype = DTYPES[dtype]
    check(op, x.astype(dtype), dy.astype(dtype), numbers(rng, (1, n), dtype), None, eps=0.0)


NEXT_TO_THE_MEAN = [
    # x - mean is less than half an ULP of x
    lambda n, dtype: np.where(np.arange(n) == 0, np.nextafter(dtype.type(3), dtype.type(4)), 3),
    # x - mean is a few ULP of x
    lambda n, dtype: 2**20 + np.arange(n) % 5 * np.spacing(dtype.type(2**20)),
    lambda n, dtype: 1e6 + np.random.default_rng(n).choice([-1, 0, 1], n),
]


@pytest.mark.parametrize("vectors", [2, 5, 40, 129])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layer_norm_next_to_the_mean(dtype, vectors, rng):
    """x - mean cancels: what is left is as small as the rounding of the mean, in a row and between pieces of one."""
    dtype = DTYPES[dtype]
    n = vectors * 16 // dtype.itemsize - 1
    x = np.stack([row(n, dtype).astype(dtype) for row in NEXT_TO_THE_MEAN])
    check("layer", x, numbers(rng, x.shape, dtype), numbers(rng, (1, n), dtype), None, eps=0.0)


def test_layer_norm_of_three_numbers():
    x = np.array([[1e6, 1e6 + 0.0625, 1e6 + 0.0625]], np.float32)
    y = to_host(rn.layer_norm(to_device(x), eps=0.0, backend="cuda"))
    assert worst_ulp(y, np.longdouble([[-2, 1, 1]]) / np.sqrt(np.longdouble(2))) <= ULP["float32"]


@pytest.mark.parametrize("vectors", [0, 4, 129])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_constant_rows(dtype, vectors, rng):
    """y is bias; dx is (g - mean(g)) / sqrt(eps), 0 where all of g is the same: at every magnitude."""
    dtype = DTYPES[dtype]
    info = ml_dtypes.finfo(dtype)
    n = vectors * 16 // dtype.itemsize or 1
    magnitudes = [info.max, info.min, np.sqrt(np.longdouble(info.max)), 3, info.tiny, info.smallest_subnormal]
    x = np.repeat(np.array(magnitudes, np.longdouble).astype(dtype)[:, None], n, axis=1)
    weight, bias = numbers(rng, (1, n), dtype), numbers(rng, (1, n), dtype)
    check("layer", x, numbers(rng, x.shape, dtype), weight, bias, eps=1e-5)
    same = to_device(np.ones_like(x))
    y = to_host(rn.layer_norm(to_device(x), bias=to_device(bias[0]), backend="cuda"))
    assert (y == bias).all()
    assert (to_host(rn.layer_norm_backward(same, to_device(x), backend="cuda").dx) == 0).all()


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize(("weight", "offset"), [([0.0], 0.0), ([-1.0], 1.0), ([0.0, 1.0, 1.0, 0.0], 0.0)])
def test_weights_of_zero(op, weight, offset):
    """All of dy · weight is zero or small, beside a dy that a scale for it would make infinite."""
    dy = np.array([[300.0], [1.0], [0.0]] if len(weight) == 1 else [[1e25, 1e-30, 2e-30, 1.0]], np.float32)
    x = np.repeat(np.arange(1, len(weight) + 1, dtype=np.float32)[None], len(dy), axis=0)
    check(op, x, dy, np.array([weight], np.float32), None, offset=offset)


@pytest.mark.parametrize("op", FORWARD)
def test_weights_and_elements_of_zero_in_some_pieces(op, rng):
    n = 129 * 4
    x, dy, weight = numbers(rng, (2, n), np.float32), numbers(rng, (2, n), np.float32), numbers(rng, (1, n), np.float32)
    x[0, 128:], x[0, :128], weight[0, 128:] = 0, x[0, :128] * np.float32(1e-30), 0
    check(op, x, dy, weight, None, eps=0.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pieces_far_from_each_other(dtype, rng):
    """Each is constant, in range by itself; the squares of their distances are not."""
    dtype = DTYPES[dtype]
    n = 129 * 16 // dtype.itemsize
    x = np.full((1, n), np.finfo(dtype).max, dtype)
    x[0, n // 2 :] *= -1
    check("layer", x, numbers(rng, (1, n), dtype), numbers(rng, (1, n), dtype), None)


def test_second_try_looks_at_the_partial_rms_alone(rng):
    """The squares of its numbers vanish, but beside others that are 30 orders of magnitude larger."""
    x = numbers(rng, (2, 16), np.float32)
    x[0, :8], x[0, 8:] = x[0, :8] * 1e-25, x[0, 8:] * 1e5
    y = to_host(rn.rms_norm(to_device(x), p=0.5, eps=0.0, backend="cuda"))
    assert worst_ulp(y, *exact_forward("rms", x, None, None, 8, 0.0, 0.0)) <= ULP["float32"]


@pytest.mark.parametrize("n", [16, 520])
def test_nan_and_infinity_stay_in_their_row(n, rng):
    x = numbers(rng, (5, n), np.float32)
    x[1, 3], x[3, n - 1] = np.nan, np.inf
    y = to_host(rn.rms_norm(to_device(x), backend="cuda"))
    assert np.isnan(y[1]).all()
    expected = np.zeros(n)
    expected[n - 1] = np.nan
    np.testing.assert_array_equal(np.abs(y[3]), expected)
    ordinary = [0, 2, 4]
    again = to_host(rn.rms_norm(to_device(x[ordinary]), backend="cuda"))
    assert y[ordinary].tobytes() == again.tobytes()


@pytest.mark.parametrize("n", [16, 520])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_infinity_outside_a_partial_rms(n, offset, rng):
    """It is not in the RMS: y is infinite there alone, and dx is infinite or NaN only where c comes in."""
    x, dy, weight = numbers(rng, (3, n), np.float32), numbers(rng, (3, n), np.float32), numbers(rng, (n,), np.float32)
    x[1, n - 2] = np.inf
    arrays, options = (dy, x, weight), {"p": 0.5, "weight_offset": offset}
    device = [to_device(a) for a in arrays]
    y = to_host(rn.rms_norm(*device[1:], **options, backend="cuda"))
    dx, dweight, _ = map(to_host, rn.rms_norm_backward(*device, **options, backend="cuda"))
    with np.errstate(invalid="ignore"):
        exact_y, magnitude_y = exact_forward("rms", x, weight[None], None, n // 2, 1e-6, offset)
        exact_dx, magnitude_dx, sums, _ = exact_backward("rms", dy, x, weight[None], None, n // 2, 1e-6, offset)
        assert worst_ulp(y, exact_y, magnitude_y) <= ULP["float32"]
        finite = np.ones(dx.shape, bool)
        finite[1, : n // 2] = False
        magnitude_dx = np.where(np.isfinite(magnitude_dx), magnitude_dx, 0)  # where c has no part in dx, in its row
        assert worst_ulp(dx[finite], exact_dx[finite], magnitude_dx[finite]) <= DX_ULP["float32"]
        assert not np.isfinite(dx[1, : n // 2]).any()
        infinite = np.arange(n) == n - 2
        assert np.isinf(dweight[infinite]).all()
        limit = parameter_tolerance(*sums, len(x), np.float32, np.float32)[0]
        assert np.all(np.abs(dweight - sums[0][0])[~infinite] <= limit[~infinite])


@pytest.mark.parametrize("n", [8, 264, 520])
def test_same_bits_in_any_batch_and_at_any_address(n, rng):
    x, dy, weight = (numbers(rng, shape, np.float32) for shape in ((5, n), (5, n), (n,)))
    y = to_host(rn.rms_norm(*map(to_device, (x, weight)), backend="cuda"))
    assert to_host(rn.rms_norm(*map(to_device, (x[3:4], weight)), backend="cuda")).tobytes() == y[3:4].tobytes()
    room = to_device(np.zeros(5 * n + 1, np.float32))
    shifted = view_of(room[1:], (5, n), (4 * n, 4), np.float32)
    fill(shifted, x)
    assert to_host(rn.rms_norm(shifted, to_device(weight), backend="cuda")).tobytes() == y.tobytes()
    aligned, at_odd_address = (
        rn.rms_norm_backward(to_device(dy), a, to_device(weight), backend="cuda") for a in (to_device(x), shifted)
    )
    for one, other in zip(aligned[:2], at_odd_address[:2], strict=True):
        assert to_host(one).tobytes() == to_host(other).tobytes()
