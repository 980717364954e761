"""Arguments that all functions have in common: dtype and round_xhat.

They are tried on each engine against the formula in longdouble, written here once more.
"""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest
from conftest import BACKENDS, DTYPES
from tolerances import Y_ULP, worst_ulp

import rmsnorm_np as rn
from rmsnorm_np import reference

pytestmark = pytest.mark.engine  # many combinations of dtypes

L = np.longdouble
NAMES = [dtype.name for dtype in DTYPES]
ENGINE = [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float64"), ("float64", "float16")]
FORWARD = {"rms": rn.rms_norm, "layer": rn.layer_norm, "add_rms": rn.add_rms_norm, "add_layer": rn.add_layer_norm}
# what an engine's xhat may be off by, relative, before it is rounded: see `parameter_tolerance`
XHAT = {"float16": 2.0**-21, "bfloat16": 2.0**-21, "float32": 2.0**-50, "float64": 2.0**-58}


@pytest.fixture(params=[pytest.param(op, marks=[pytest.mark.slow] * (op == "add_layer")) for op in FORWARD])
def op(request):
    """A forward function."""
    return request.param


def arrays(rng, shape, dtype, parameter_shape=None):
    """x, residual, weight, bias."""
    x, residual = rng.standard_normal((2, *shape))
    parameter_shape = shape[-1:] if parameter_shape is None else parameter_shape
    weight, bias = rng.uniform(0.5, 1.5, parameter_shape), rng.standard_normal(parameter_shape)
    return [a.astype(dtype) for a in (x, residual, weight, bias)]


def call(op, x, residual, weight, bias, **options):
    """Y alone, of any function."""
    if op.startswith("add"):
        return FORWARD[op](x, residual, weight, bias, **options).y
    return FORWARD[op](x, weight, bias, **options)


def exact_xhat(op, x, residual, eps=1e-6, **_):
    h = reference.add_rms_norm(x, residual).h if op.startswith("add") else x
    wide = h.astype(L)
    if op.endswith("layer"):
        wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide - wide.mean(axis=-1, keepdims=True)
    return wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + L(eps))


def y_and_terms(xhat, weight, bias, weight_offset=0.0):
    scaled = xhat * (L(weight_offset) + weight.astype(L))
    y = scaled + bias.astype(L)
    return y, np.maximum(np.abs(y), np.maximum(np.abs(scaled), np.abs(bias.astype(L))))


# dtype


@pytest.mark.parametrize("shape", [(5, 37), (2, 3, 8), (1, 1), (3, 1), (4,)], ids=str)
@pytest.mark.parametrize(
    ("x_name", "y_name"),
    [
        pytest.param(x, y, marks=[pytest.mark.slow] * ((x, y) not in ENGINE))  # each pair compiles eight kernels
        for x in NAMES
        for y in NAMES
    ],
)
def test_y_is_rounded_once_to_the_dtype_asked_for(op, x_name, y_name, shape, backend, rng):
    x, residual, weight, bias = arrays(rng, shape, np.dtype(x_name))
    y = call(op, x, residual, weight, bias, dtype=y_name, weight_offset=0.5, backend=backend)
    assert (y.dtype, y.shape) == (np.dtype(y_name), shape)
    want, terms = y_and_terms(exact_xhat(op, x, residual), weight, bias, 0.5)
    # an engine computes in a type that is wide enough for the narrower of both dtypes
    bound = Y_ULP[y_name]
    assert worst_ulp(y, want, terms) <= bound


def test_a_wider_dtype_has_the_bits_that_x_has_no_room_for(op, backend, rng):
    """Rounding twice, to the dtype of x and then to that of y, would leave half of the bits zero."""
    x, residual, weight, bias = arrays(rng, (4, 32), np.float32)
    y = call(op, x, residual, weight, bias, dtype="float64", backend=backend)
    assert (y != y.astype(np.float32)).mean() > 0.9


@pytest.mark.parametrize("spelling", ["float16", np.float16, np.dtype(np.float16), "f2", "e"], ids=str)
def test_dtype_by_any_of_its_names(spelling, backend, rng):
    x, _, weight, _ = arrays(rng, (3, 8), np.float32)
    y = rn.rms_norm(x, weight, dtype=spelling, backend=backend)
    assert y.dtype == np.float16
    assert y.tobytes() == rn.rms_norm(x, weight, dtype="float16", backend=backend).tobytes()


@pytest.mark.parametrize("spelling", ["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_bfloat16_is_a_dtype(spelling, backend, rng):
    x, _, weight, _ = arrays(rng, (3, 8), np.float32)
    assert rn.rms_norm(x, weight, dtype=spelling, backend=backend).dtype == np.dtype(ml_dtypes.bfloat16)


def test_the_dtype_of_x_changes_nothing(op, backend, rng):
    given = arrays(rng, (2, 3, 8), np.float32)
    for axis in (-1, 0) if op == "rms" else (-1,):
        parameters = given[2:] if axis == -1 else (np.ones(2, np.float32), None)
        want = call(op, *given[:2], *parameters, axis=axis, backend=backend)
        got = call(op, *given[:2], *parameters, axis=axis, dtype=np.float32, round_xhat=False, backend=backend)
        assert got.dtype == want.dtype
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("axis", [-1, (1, 2), 1, 0, (0, 2)], ids=str)
@pytest.mark.parametrize("given_out", ["none", "plain", "strided", "over x"])
def test_dtype_in_any_axis_and_out(op, axis, given_out, backend, rng):
    """Axes that are not trailing are transposed; an out over x, of another dtype, must not be written early."""
    shape = (4, 3, 6)
    axes = [a % 3 for a in (axis if isinstance(axis, tuple) else (axis,))]
    kept = tuple(shape[a] for a in sorted(axes))
    memory = rng.standard_normal(4 * 3 * 6 + 40)
    x = memory[:72].reshape(shape)
    residual = rng.standard_normal(shape)
    weight, bias = rng.uniform(0.5, 1.5, kept), rng.standard_normal(kept)
    moved = [np.moveaxis(a, sorted(axes), range(3 - len(axes), 3)).reshape(-1, weight.size) for a in (x, residual)]
    want = call(op, *moved, weight.ravel(), bias.ravel(), dtype="float32", backend=backend)
    out = {
        "none": None,
        "plain": np.zeros(shape, np.float32),
        "strided": np.zeros((4, 3, 12), np.float32)[..., ::2],
        "over x": memory.view(np.float32)[3:75].reshape(shape),
    }[given_out]
    y = call(op, x, residual, weight, bias, axis=axis, dtype="float32", out=out, backend=backend)
    assert out is None or y is out
    got = np.moveaxis(y, sorted(axes), range(3 - len(axes), 3)).reshape(want.shape)
    assert np.array_equal(got, want)


@pytest.mark.parametrize(("op", "residual_dtype"), [("add_rms", np.float64), ("add_layer", np.float16)])
def test_h_keeps_the_dtype_of_the_residual(op, residual_dtype, backend, rng):
    x, residual, weight, bias = arrays(rng, (3, 8), np.float32)
    residual = residual.astype(residual_dtype)
    y, h = FORWARD[op](x, residual, weight, bias, dtype="bfloat16", round_xhat=True, backend=backend)
    assert (y.dtype.name, h.dtype) == ("bfloat16", residual_dtype)
    assert h.tobytes() == FORWARD[op](x, residual, weight, bias, backend=backend).h.tobytes()


@pytest.mark.parametrize(
    "dtype", ["int8", "complex64", "bool", np.int32, int, bool, ">f4", "float128", "longdouble", "", "nonsense"]
    + [1, 4.0, [], np.ones(3), "V2", "U4", "f4,f4", object], ids=repr,
)  # fmt: skip
def test_another_dtype_is_an_error_that_names_it(op, dtype, backend):
    x = np.ones((2, 4), np.float32)
    with pytest.raises(TypeError) as error:
        call(op, x, x, None, None, dtype=dtype, backend=backend)
    assert str(error.value) == f"dtype is {dtype!r}, expected float16, bfloat16, float32 or float64"


@pytest.mark.parametrize("value", [1, 0, None, "yes", np.ones(1, bool), 1.0], ids=repr)
def test_round_xhat_is_true_or_false(op, value, backend):
    x = np.ones((2, 4), np.float32)
    with pytest.raises(TypeError) as error:
        call(op, x, x, None, None, round_xhat=value, backend=backend)
    assert str(error.value) == f"round_xhat is {value!r}, expected True or False"


def test_out_must_have_the_dtype_asked_for(op, backend):
    x = np.ones((2, 4), np.float32)
    with pytest.raises(TypeError, match=r"^out has dtype float32, expected float64, the dtype of the result$"):
        call(op, x, x, None, None, dtype="float64", out=np.ones((2, 4), np.float32), backend=backend)


# round_xhat


@pytest.mark.parametrize("shape", [(6, 37), (2, 3, 8), (3, 1)], ids=str)
@pytest.mark.parametrize("y_name", [None, pytest.param("float32", marks=pytest.mark.slow)])
def test_xhat_is_rounded_before_the_weight(op, y_name, shape, dtype, backend, rng):
    x, residual, weight, bias = arrays(rng, shape, dtype)
    kept = [a.copy() for a in (x, residual, weight, bias)]
    y = call(op, x, residual, weight, bias, round_xhat=True, weight_offset=0.5, dtype=y_name, backend=backend)
    assert (y.dtype, y.shape) == (np.dtype(y_name or dtype), shape)
    xhat = exact_xhat(op, x, residual)
    # either neighbour is right where xhat lies between two numbers of its dtype, to within what it is known to
    errors = []
    for near in (xhat * (1 - XHAT[dtype.name]), xhat * (1 + XHAT[dtype.name])):
        want, terms = y_and_terms(near.astype(dtype).astype(L), weight, bias, 0.5)
        errors.append([worst_ulp(*one) for one in zip(y.ravel(), want.ravel(), terms.ravel(), strict=True)])
    assert np.min(errors, axis=0).max() <= Y_ULP[y.dtype.name]
    for before, after in zip(kept, (x, residual, weight, bias), strict=True):
        assert before.tobytes() == after.tobytes()


def test_without_parameters_it_changes_no_bit_but_in_a_wider_dtype(backend, rng):
    x = rng.standard_normal((4, 32)).astype(np.float16)
    y = rn.rms_norm(x, backend=backend)
    assert rn.rms_norm(x, round_xhat=True, backend=backend).tobytes() == y.tobytes()
    wide = rn.rms_norm(x, round_xhat=True, dtype="float32", backend=backend)
    assert np.array_equal(wide, y.astype(np.float32))


def test_it_is_what_llama_computes(backend, rng):
    """The lines of its RMSNorm, in NumPy: float32 inside, then the dtype of x, then the weight."""
    x = rng.standard_normal((64, 128)).astype(ml_dtypes.bfloat16)
    weight = rng.uniform(0.5, 1.5, 128).astype(ml_dtypes.bfloat16)
    wide = x.astype(np.float32)
    xhat = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(1e-6))
    want = weight * xhat.astype(x.dtype)
    got = rn.rms_norm(x, weight, round_xhat=True, backend=backend)
    assert np.mean(got == want) > 0.999
    assert np.mean(rn.rms_norm(x, weight, backend=backend) == want) < 0.95


def test_nan_stays_in_its_row(op, backend, rng):
    x, residual, weight, bias = arrays(rng, (5, 9), np.float32)
    clean = call(op, x, residual, weight, bias, round_xhat=True, dtype="float16", backend=backend)
    x[2, 4] = np.nan
    y = call(op, x, residual, weight, bias, round_xhat=True, dtype="float16", backend=backend)
    assert np.isnan(y[2]).all()
    assert np.array_equal(np.delete(y, 2, axis=0), np.delete(clean, 2, axis=0))


def test_no_rows(op, backend):
    x = np.ones((0, 3, 4), np.float32)
    y = call(op, x, x, np.ones(4), None, round_xhat=True, dtype="bfloat16", backend=backend)
    assert (y.shape, y.dtype.name) == ((0, 3, 4), "bfloat16")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [rn.RMSNorm, rn.LayerNorm])
def test_objects_take_them(make, backend, rng):
    forward = {rn.RMSNorm: rn.rms_norm, rn.LayerNorm: rn.layer_norm}[make]
    backward = {rn.RMSNorm: rn.rms_norm_backward, rn.LayerNorm: rn.layer_norm_backward}[make]
    if backend == "reference":
        pytest.skip("an object has no backend")
    x, dy, weight, bias = arrays(rng, (4, 16), np.float32)
    norm = make(weight, bias, dtype="float64", round_xhat=True)
    assert (norm.dtype, norm.round_xhat) == (np.float64, True)
    assert repr(norm).endswith("dtype=float64, round_xhat=True)")
    for _ in range(3):
        assert norm(x).tobytes() == forward(x, weight, bias, dtype="float64", round_xhat=True).tobytes()
    for got, want in zip(norm.backward(dy, x), backward(dy, x, weight, bias), strict=True):
        assert got.tobytes() == want.tobytes()
    norm.dtype, norm.round_xhat = None, False
    for _ in range(3):
        assert norm(x).tobytes() == forward(x, weight, bias).tobytes()
    with pytest.raises(TypeError, match=r"^dtype is 'int8'"):
        norm.dtype = "int8"
    with pytest.raises(TypeError, match=r"^round_xhat is 1, expected True or False$"):
        norm.round_xhat = 1


@pytest.mark.parametrize("name", [name for name in rn.__all__ if "_norm" in name])
def test_the_reference_has_the_same_signatures(name):
    if hasattr(reference, name):
        assert inspect.signature(getattr(rn, name)) == inspect.signature(getattr(reference, name))
