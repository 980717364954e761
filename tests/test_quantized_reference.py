"""RMSNorm in 8 bits, in the reference: each rounding of each format, the scales, and the rows that have none."""

from __future__ import annotations

import inspect
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import rmsnorm_np as rn
from rmsnorm_np import _formats, reference
from rmsnorm_np.reference import quantized_rms_norm
from rmsnorm_np.reference.quantized import quantize

L = np.longdouble
FLOATS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
FORMATS = {
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
SMALLEST_SCALE = np.float32(2.0**-126)


def numbers(name):
    """All finite numbers of the format, in order, as float64; and whether the last bit of each is 0."""
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(FORMATS[name]).astype(np.float64)
    finite = np.isfinite(values) & ~((values == 0.0) & np.signbit(values))
    order = np.argsort(values[finite])
    return values[finite][order], codes[finite][order] % 2 == 0


def nearest(v, name):
    """The number of the format next to v, the even one of two, by looking at all; NaN stays, or is 0 in int8."""
    values, even = numbers(name)
    distance = np.abs(np.clip(v, values[0], values[-1])[..., None] - values)
    result = values[np.argmin(np.where(even, distance, np.nextafter(distance, np.inf)), axis=-1)]
    return np.where(np.isnan(v), 0.0 if name == "int8" else np.nan, result)


def values_of(y, name, **options):
    """What y becomes, as float64: with a weight of zero, the bias alone makes y, exactly."""
    y = np.asarray(y, np.float64)
    result = quantized_rms_norm(np.ones((1, len(y))), np.zeros(len(y)), y, dtype=name, **options)
    assert result.q.dtype == FORMATS[name]
    return result.q[0].astype(np.float64)


# Rounding


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_every_tie_and_their_neighbours(name):
    values, even = numbers(name)
    assert len(values) == {"int8": 256, "float8_e4m3fn": 253, "float8_e5m2": 247}[name]
    assert (values[0], values[-1]) == ((-128.0 if name == "int8" else -LARGEST[name]), LARGEST[name])
    assert np.array_equal(values_of(values, name, scale=1.0), values)
    ties = (values[:-1] + values[1:]) / 2
    assert np.array_equal(values_of(ties, name, scale=1.0), np.where(even[:-1], values[:-1], values[1:]))
    assert np.array_equal(values_of(np.nextafter(ties, -np.inf), name, scale=1.0), values[:-1])
    assert np.array_equal(values_of(np.nextafter(ties, np.inf), name, scale=1.0), values[1:])
    # a scale that is a power of two moves the ties along, and rounds nothing
    assert np.array_equal(values_of(ties * 2.0**-9, name, scale=2.0**-9), np.where(even[:-1], values[:-1], values[1:]))


def test_ties_of_int8_are_those_of_python():
    halves = np.arange(-127.5, 127.5)
    assert values_of(halves, "int8", scale=1.0).tolist() == [float(round(v)) for v in halves]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_out_of_range_saturates(name):
    lowest, largest = (-128.0 if name == "int8" else -LARGEST[name]), LARGEST[name]
    beyond = np.array([largest * (1 + 2.0**-50), largest + 0.5, largest * 1.2, 1e5, 1e300, np.inf])
    assert np.array_equal(values_of(beyond, name, scale=1.0), np.full(6, largest))
    assert np.array_equal(values_of(-beyond - (name == "int8"), name, scale=1.0), np.full(6, lowest))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_a_zero_keeps_its_sign(name):
    """As rounding of y alone does; -1e-9 is rounded to zero."""
    q = quantized_rms_norm(np.array([[-1.0, 1.0, 0.0]]), np.full(3, 1e-9), dtype=name, scale=1.0).q
    assert np.signbit(q.astype(np.float64)).tolist() == [[True, False, False]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_against_a_longdouble_formula(name, dtype, rng):
    x = (rng.normal(size=(40, 37)) * np.exp(3 * rng.normal(size=(40, 1)))).astype(FLOATS[dtype])
    weight, bias = (a.astype(FLOATS[dtype]) for a in rng.normal(size=(2, 37)))
    before = [a.tobytes() for a in (x, weight, bias)]
    for p, k in ((1.0, 37), (0.4, 15)):
        q, scale, h = quantized_rms_norm(x, weight, bias, dtype=name, eps=1e-3, p=p, weight_offset=0.5)
        assert h is None
        assert q.shape == x.shape
        assert scale.shape == (40, 1)
        assert scale.dtype == (np.float64 if dtype == "float64" else np.float32)
        wide = x.astype(L)
        y = wide / np.sqrt(np.mean(wide[:, :k] ** 2, axis=1, keepdims=True) + L(1e-3))
        y = y * (L(0.5) + weight.astype(L)) + bias.astype(L)
        want = np.max(np.abs(y), axis=1, keepdims=True) / LARGEST[name]
        # rounded to nearest: half a unit, and 1 % of one for what precedes it in the wider type
        assert np.all(np.abs(scale - want) <= 0.51 * np.spacing(want.astype(scale.dtype)).astype(L))
        quotient = (y / scale.astype(L)).astype(np.float64)
        near_tie = nearest(quotient * (1 - 1e-9), name) != nearest(quotient * (1 + 1e-9), name)
        assert near_tie.mean() < 1e-3  # there, one rounding more may tip the balance
        assert np.array_equal(q.astype(np.float64)[~near_tie], nearest(quotient, name)[~near_tie])
        assert np.all(np.max(np.abs(q.astype(np.float64)), axis=1) == LARGEST[name])
    assert before == [a.tobytes() for a in (x, weight, bias)]


# Scales


def test_q_is_of_the_scale_that_is_returned():
    """A scale is rounded to float32 first: 0.15 is a bit more than 1.5 times 0.1, and less than 1.5 times float32's."""
    y = np.array([0.15000000000000002, 0.0])
    for dtype, want in ((np.float32, 1), (np.float64, 2)):
        q, scale, _ = quantized_rms_norm(np.ones((1, 2), dtype), np.zeros(2), y, scale=0.1)
        assert scale.dtype == dtype
        assert scale == dtype(0.1)
        assert q[0, 0] == want


@pytest.mark.parametrize("name", FORMATS)
def test_the_scale_of_zeros_and_of_tiny_rows(name):
    tiny = 2.0**-126 * LARGEST[name]
    for x_dtype in (np.float32, np.float64):
        for y, want in ((0.0, 0.0), (tiny / 4, LARGEST[name] / 4), (tiny, LARGEST[name]), (1e-300, 0.0)):
            row = np.array([y, 0.0])
            q, scale, _ = quantized_rms_norm(np.ones((1, 2), x_dtype), np.zeros(2), row, dtype=name)
            assert scale == SMALLEST_SCALE
            assert scale.dtype == x_dtype
            assert q.astype(np.float64)[0, 0] == nearest(np.array(want), name)
    q, scale, _ = quantized_rms_norm(np.zeros((3, 5), np.float32), dtype=name)
    assert (scale == SMALLEST_SCALE).all()
    assert not q.astype(np.float64).any()


@pytest.mark.parametrize("name", FORMATS)
def test_scale_ub_bounds_the_scale_and_the_rest_saturates(name, rng):
    x = rng.normal(size=(6, 16)).astype(np.float32)
    x[::2, 3] = 50.0  # an outlier
    own, bounded = (quantized_rms_norm(x, dtype=name, scale_ub=ub) for ub in (None, 2.5))
    ub = np.float32(2.5 / LARGEST[name])
    assert np.array_equal(bounded.scale, np.minimum(own.scale, ub))
    assert (own.scale[::2] > ub).all()
    assert (bounded.q[::2, 3].astype(np.float64) == LARGEST[name]).all()
    small = (own.scale <= ub)[:, 0]
    assert small.any()
    assert np.array_equal(bounded.q[small].astype(np.float64), own.q[small].astype(np.float64))
    given = quantized_rms_norm(x, dtype=name, scale=np.minimum(own.scale, ub))
    assert np.array_equal(given.q.astype(np.float64), bounded.q.astype(np.float64))
    assert np.array_equal(quantized_rms_norm(x, dtype=name, scale_ub=np.inf).scale, own.scale)
    assert (quantized_rms_norm(x, dtype=name, scale_ub=1e-300).scale == SMALLEST_SCALE).all()


@pytest.mark.parametrize(
    ("shape", "axis", "scale_shapes"),
    [
        ((3, 8), -1, [(), (1,), (1, 1), (3, 1)]),
        ((2, 3, 8), -1, [(), (1,), (3, 1), (2, 1, 1), (1, 3, 1), (2, 3, 1)]),
        ((2, 3, 8), (1, 2), [(), (2, 1, 1)]),
        ((2, 3, 8), 1, [(), (8,), (1, 8), (2, 1, 1), (2, 1, 8)]),
        ((2, 3, 8), (0, 2), [(3, 1), (1, 3, 1)]),
    ],
    ids=str,
)
def test_a_given_scale_broadcasts(shape, axis, scale_shapes, rng):
    x = rng.normal(size=shape).astype(np.float32)
    y = reference.rms_norm(x.astype(np.float64), axis=axis)
    own = quantized_rms_norm(x, axis=axis)
    per_row = own.scale.shape
    assert per_row == tuple(1 if i in np.atleast_1d(axis) % x.ndim else length for i, length in enumerate(shape))
    assert np.all(np.max(np.abs(own.q * own.scale - y), axis=axis, keepdims=True) <= 0.5001 * own.scale)
    for scale_shape in scale_shapes:
        scale = rng.uniform(0.01, 0.1, size=scale_shape)
        q, got, _ = quantized_rms_norm(x, axis=axis, scale=scale)
        assert (got.dtype, got.shape) == (np.float32, per_row)
        assert np.array_equal(got, np.broadcast_to(np.float32(scale), per_row))
        assert got.flags.owndata
        quotient = y / got.astype(np.float64)
        assert np.array_equal(q, np.clip(np.rint(quotient), -128, 127))
    # the scale that a call returned gives the same q
    assert np.array_equal(quantized_rms_norm(x, axis=axis, scale=own.scale).q, own.q)


def test_a_row_is_the_same_in_any_batch(rng):
    x, weight = rng.normal(size=(50, 33)).astype(np.float32), rng.normal(size=33).astype(np.float32)
    q, scale, _ = quantized_rms_norm(x, weight)
    alone = quantized_rms_norm(x[7], weight)
    assert np.array_equal(alone.q, q[7])
    assert np.array_equal(alone.scale, scale[7])


# NaN and infinities


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_with_nan_and_infinities(name, scale, rng):
    x = rng.normal(size=(6, 5)).astype(np.float32)
    clean = quantized_rms_norm(x[[0, 2, 4]], dtype=name, scale=scale)
    x[1, 2], x[3, 3], x[5, 0] = np.nan, np.inf, -np.inf  # each gives y a NaN
    for options in ({}, {"scale_ub": 1.0}) if scale is None else ({},):
        if options:
            clean = quantized_rms_norm(x[[0, 2, 4]], dtype=name, **options)
        q, got, _ = quantized_rms_norm(x, dtype=name, scale=scale, **options)
        assert np.array_equal(q[[0, 2, 4]].view(np.uint8), clean.q.view(np.uint8))
        assert np.array_equal(got[[0, 2, 4]], clean.scale)
        values = q.astype(np.float64)
        gone = values == 0.0 if name == "int8" else np.isnan(values)
        if scale is None:
            assert np.isnan(got[[1, 3, 5]]).all()
            assert gone[[1, 3, 5]].all()
        else:  # y is NaN everywhere in row 1, and at the infinity in the others, which are 0 elsewhere
            assert (got == np.float32(scale)).all()
            assert gone[1].all()
            assert gone[3, 3]
            assert gone[5, 0]
            assert not np.delete(values[3], 3).any()


def test_a_nan_is_zero_before_it_is_cast_to_int8():
    """What the cast itself makes of a NaN is the processor's choice."""
    y = np.array([[np.nan, 2.0]])
    assert quantize(y, np.ones((1, 1)), _formats.FORMATS["int8"]).tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize("name", FORMATS)
def test_an_infinite_y(name):
    """Of a bias: its scale is infinite, unless it is bounded or given; then it saturates."""
    x, bias = np.ones((1, 3), np.float32), np.array([np.inf, 1.0, -np.inf])
    q, scale, _ = quantized_rms_norm(x, np.zeros(3), bias, dtype=name)
    assert np.isposinf(scale).all()
    values = q.astype(np.float64)[0]
    assert values[1] == 0.0
    assert values[[0, 2]].tolist() == [0.0, 0.0] if name == "int8" else np.isnan(values[[0, 2]]).all()
    lowest = -128.0 if name == "int8" else -LARGEST[name]
    for options in ({"scale_ub": LARGEST[name]}, {"scale": 1.0}):
        q, scale, _ = quantized_rms_norm(x, np.zeros(3), bias, dtype=name, **options)
        assert scale == 1.0
        assert q.astype(np.float64)[0].tolist() == [LARGEST[name], 1.0, lowest]


# Residual, out


@pytest.mark.parametrize("residual_dtype", ["float16", "float32"])
def test_it_is_of_the_rounded_sum(residual_dtype, rng):
    x = rng.normal(size=(20, 9)).astype(np.float32)
    residual = (300 * rng.normal(size=(20, 9))).astype(residual_dtype)  # float16 rounds the sum to an eighth
    weight = rng.normal(size=9).astype(np.float32)
    q, scale, h = quantized_rms_norm(x, weight, residual=residual, eps=0.1)
    assert h.dtype == residual.dtype
    assert h.tobytes() == reference.add_rms_norm(x, residual).h.tobytes()
    want = quantized_rms_norm(h, weight, eps=0.1)
    assert np.array_equal(q, want.q)
    assert np.array_equal(scale, want.scale)
    exact = quantized_rms_norm(x.astype(np.float64) + residual, weight, eps=0.1)
    assert residual_dtype == "float32" or not np.array_equal(scale, exact.scale.astype(np.float32))


def test_the_scale_has_the_precision_of_x_and_h_the_dtype_of_the_residual(rng):
    x, residual = rng.normal(size=(2, 3, 4))
    for x_dtype, scale_dtype in ((np.float64, np.float64), (np.float16, np.float32), (np.float32, np.float32)):
        for residual_dtype in (np.float16, np.float64):
            result = quantized_rms_norm(x.astype(x_dtype), residual=residual.astype(residual_dtype))
            assert result.scale.dtype == scale_dtype
            assert result.h.dtype == residual_dtype


@pytest.mark.parametrize("name", FORMATS)
def test_results_go_where_out_says(name, rng):
    x, residual = rng.normal(size=(2, 4, 6))
    q, scale, h = quantized_rms_norm(x, dtype=name, residual=residual)
    for axis_out in (np.empty((4, 6), FORMATS[name]), np.empty((6, 4), FORMATS[name]).T):
        own = residual.copy()
        got = quantized_rms_norm(x, dtype=name, residual=own, out=axis_out, residual_out=own)
        assert got.q is axis_out
        assert got.h is own
        assert np.array_equal(axis_out.view(np.uint8), q.view(np.uint8))
        assert np.array_equal(got.scale, scale)
        assert np.array_equal(own, h)
    moved = quantized_rms_norm(x.T, dtype=name, residual=residual.T, axis=0, out=axis_out.T)
    assert np.array_equal(moved.q.T.view(np.uint8), q.view(np.uint8))
    assert np.array_equal(moved.scale.T, scale)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (2, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_empty_batches_and_rows_of_one_element(name, shape):
    q, scale, _ = quantized_rms_norm(np.full(shape, -2.0, np.float32), dtype=name)
    assert q.shape == shape
    assert scale.shape == (*shape[:-1], 1)
    assert (q.astype(np.float64) == -LARGEST[name]).all()


# The dtype, and mistakes


@pytest.mark.parametrize("name", FORMATS)
def test_the_dtype_may_be_a_name_a_dtype_or_a_type(name):
    for given in (name, FORMATS[name], FORMATS[name].type):
        assert quantized_rms_norm(np.ones((1, 2)), dtype=given).q.dtype == FORMATS[name]


def test_names_of_dtypes_are_known_before_ml_dtypes_is_loaded():
    code = """
import sys, numpy as np
import rmsnorm_np as rn
def q(name):
    return rn.quantized_rms_norm(np.ones((1, 2)), dtype=name, backend="reference").q.dtype.name
assert q("int8") == "int8" and "ml_dtypes" not in sys.modules
assert q("float8_e5m2") == "float8_e5m2"
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


X = np.ones((2, 4), np.float32)
BAD = [
    ({"x": None}, TypeError, "x is None, expected an array"),
    ({"x": X + 1j}, TypeError, "x has dtype complex64, expected float16, bfloat16, float32 or float64"),
    ({"dtype": "int4"}, TypeError, "dtype is 'int4', expected 'int8', 'float8_e4m3fn' or 'float8_e5m2'"),
    ({"dtype": np.uint8}, TypeError, "dtype is <class 'numpy.uint8'>, expected 'int8'"),
    ({"dtype": "float8_e4m3"}, TypeError, "dtype is 'float8_e4m3', expected"),
    ({"dtype": None}, TypeError, "dtype is None, expected"),
    ({"dtype": 8}, TypeError, "dtype is 8, expected"),
    ({"scale": 0.0}, ValueError, "scale has the value 0.0 in float32, expected finite numbers > 0"),
    ({"scale": 1e-60}, ValueError, "scale has the value 0.0 in float32, expected finite numbers > 0"),
    ({"scale": 1e60}, ValueError, "scale has the value inf in float32, expected finite numbers > 0"),
    ({"scale": [[1.0], [-2.0]]}, ValueError, "scale has the value -2.0 in float32, expected finite numbers > 0"),
    ({"scale": np.nan}, ValueError, "scale has the value nan in float32, expected finite numbers > 0"),
    ({"scale": np.ones(2)}, ValueError, r"scale has shape \(2,\), expected one that broadcasts to \(2, 1\)"),
    ({"scale": np.ones((2, 4))}, ValueError, r"scale has shape \(2, 4\), expected one that broadcasts to \(2, 1\)"),
    ({"scale": np.ones((1, 2, 1))}, ValueError, r"scale has shape \(1, 2, 1\), expected one that broadcasts"),
    ({"scale": "a"}, TypeError, "scale has dtype <U1, expected float16"),
    ({"scale_ub": 0.0}, ValueError, "scale_ub is 0.0, expected a number > 0"),
    ({"scale_ub": np.nan}, ValueError, "scale_ub is nan, expected a number > 0"),
    ({"scale_ub": "1"}, TypeError, "scale_ub is '1', expected a number > 0"),
    ({"scale_ub": 1.0, "scale": 1.0}, ValueError, "scale_ub is 1.0, expected None where scale is given"),
    ({"residual": X[0]}, ValueError, r"residual has shape \(4,\), expected x.shape \(2, 4\)"),
    ({"residual_out": X}, ValueError, "residual_out is given, expected None without a residual"),
    ({"residual": X, "residual_out": X[0]}, ValueError, r"residual_out has shape \(4,\), expected x.shape"),
    ({"out": np.empty((2, 4), np.float32)}, TypeError, "out has dtype float32, expected int8, the dtype of the result"),
    ({"out": np.empty((2, 3), np.int8)}, ValueError, r"out has shape \(2, 3\), expected x.shape \(2, 4\)"),
    ({"out": [0]}, TypeError, "out is of type list, expected a numpy.ndarray"),
    ({"weight": np.ones(3)}, ValueError, r"weight has shape \(3,\), expected \(4,\)"),
    ({"p": 2.0}, ValueError, "p is 2.0, expected a number with 0 < p <= 1"),
    ({"backend": "gpu"}, ValueError, "backend is 'gpu', expected"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors(change, error, message):
    for function, backend in ((quantized_rms_norm, {}), (rn.quantized_rms_norm, {"backend": "reference"})):
        arguments = {"x": X} | backend | change
        with pytest.raises(error, match=message):
            function(arguments.pop("x"), **arguments)


def test_out_and_residual_out_are_apart():
    residual = np.zeros((2, 4), np.float16)
    shared = residual.view(np.int8)[:, :4]
    for function in (quantized_rms_norm, rn.quantized_rms_norm):
        with pytest.raises(ValueError, match="out and residual_out share memory, expected two arrays apart"):
            function(X, residual=residual, out=shared, residual_out=residual)


def test_the_reference_has_the_same_signature_and_gets_every_option(rng):
    assert inspect.signature(rn.quantized_rms_norm) == inspect.signature(quantized_rms_norm)
    x, residual = rng.normal(size=(2, 4, 6))
    weight, bias = rng.normal(size=(2, 4))
    options = {"eps": 0.2, "p": 0.4, "axis": 0, "weight_offset": 0.5, "dtype": "float8_e5m2", "residual": residual}
    for more in ({"scale": 0.5}, {"scale_ub": 0.5}):
        got = rn.quantized_rms_norm(x, weight, bias, **options, **more, backend="reference")
        want = quantized_rms_norm(x, weight, bias, **options, **more)
        for a, b in zip(got, want, strict=True):
            assert a.tobytes() == b.tobytes()
