"""Weights and biases broadcast against x as NumPy's arrays do, and their gradients are summed over what was broadcast.

What is right is computed with a weight and a bias that have been spread over all of x before, and gradients summed by
NumPy after.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import rmsnorm_np as rn
from rmsnorm_np import _arguments, _broadcast

pytestmark = pytest.mark.engine  # kernels of float64

OPS = ("rms", "layer", "add_rms", "add_layer")
CLOSE = {"rtol": 1e-13, "atol": 1e-13}

# x.shape, axis, weight.shape, bias.shape; lengths differ, so that a mix-up does not pass for right
CASES = [
    ((2, 3, 5), -1, (2, 1, 5), (2, 1, 5)),  # adaptive norm: one scale for each of a batch
    ((2, 3, 5), -1, (2, 1, 5), (5,)),
    ((2, 3, 5), -1, (5,), (2, 1, 5)),
    ((2, 3, 5), -1, (2, 1, 5), None),
    ((2, 3, 5), -1, None, (2, 1, 5)),
    ((2, 3, 5), -1, (2, 1, 5), (3, 5)),  # no order of the rows suits both
    ((2, 3, 5), -1, (1, 5), (1, 1, 5)),
    ((2, 3, 5), -1, (1, 3, 5), (2, 3, 5)),
    ((2, 4, 3, 5), -1, (2, 1, 3, 5), (2, 1, 1, 5)),  # one for each of a batch and head
    ((2, 4, 3, 5), -1, (4, 1, 5), (2, 1, 3, 5)),
    ((2, 4, 3, 5), -1, (2, 4, 1, 5), (1, 4, 1, 5)),
    ((2, 4, 3, 2, 5), -1, (2, 1, 3, 1, 5), (4, 1, 2, 5)),  # shared, own, shared, own
    ((2, 4, 3, 5), (2, 3), (2, 1, 3, 5), (3, 5)),
    ((2, 4, 3, 5), (-1, -2), (1, 3, 5), (2, 1, 3, 5)),
    ((2, 1, 3, 5), -1, (2, 1, 1, 5), (2, 1, 3, 5)),
    ((1, 3, 5), -1, (1, 1, 5), (3, 5)),
    ((2, 1, 5), -1, (2, 1, 5), (1, 5)),
    ((2, 2, 5), -1, (2, 5), (2, 1, 5)),  # aligned from the right: (2, 5) is for the axis next to the last
    ((3, 4, 1), -1, (3, 1, 1), (1,)),  # n = 1
    ((3, 5), -1, (1, 5), (3, 5)),
    ((0, 3, 5), -1, (1, 3, 5), (0, 1, 5)),
    ((2, 0, 5), -1, (2, 1, 5), (5,)),
    ((2, 0, 5), -1, (2, 1, 5), (2, 0, 5)),
]


def numbers(rng, shape, dtype=np.float64):
    return None if shape is None else rng.uniform(0.5, 1.5, shape).astype(dtype)


def forward(op, x, residual, weight, bias, **options):
    """(y, h or None)."""
    function = getattr(rn, f"{op}_norm")
    if op.startswith("add"):
        return function(x, residual, weight, bias, **options)
    return function(x, weight, bias, **options), None


def backward(op, dy, dh, h, weight, bias, **options):
    function = getattr(rn, f"{op}_norm_backward")
    return (
        function(dy, dh, h, weight, bias, **options)
        if op.startswith("add")
        else function(dy, h, weight, bias, **options)
    )


def total(gradient, shape):
    """The gradient of a spread parameter, summed to the shape that it had."""
    lead = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    return lead.sum(axis=tuple(i for i, length in enumerate(shape) if length == 1), keepdims=True)


@pytest.fixture(params=[pytest.param(op, marks=[pytest.mark.slow] * op.startswith("add")) for op in OPS])
def op(request):
    """A norm, with a residual or without."""
    return request.param


@pytest.mark.parametrize(("shape", "axis", "weight_shape", "bias_shape"), CASES, ids=str)
def test_it_is_as_if_the_parameter_had_been_spread_over_x(op, shape, axis, weight_shape, bias_shape, backend, rng):
    x, residual, dy, dh = rng.standard_normal((4, *shape))
    weight, bias = numbers(rng, weight_shape), numbers(rng, bias_shape)
    kept = [None if a is None else a.copy() for a in (x, residual, dy, dh, weight, bias)]
    wide = [None if a is None else np.broadcast_to(a, shape).copy() for a in (weight, bias)]
    options = {"axis": axis, "weight_offset": 0.0 if weight is None else 1.0, "eps": 0.1, "backend": backend}
    y, h = forward(op, x, residual, weight, bias, **options)
    want_y, want_h = forward(op, x, residual, *wide, **options)
    assert y.flags.c_contiguous
    assert np.array_equal(y, want_y)
    assert h is None or np.array_equal(h, want_h)
    grads = backward(op, dy, dh, x, weight, bias, **options)
    want = backward(op, dy, dh, x, *wide, **options)
    assert np.array_equal(grads.dx, want.dx)
    for gradient, spread, parameter in zip(grads[1:], want[1:], (weight, bias), strict=True):
        if parameter is None:
            assert gradient is None
            continue
        assert (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype)
        np.testing.assert_allclose(gradient, total(spread, parameter.shape), **CLOSE)
    for before, after in zip(kept, (x, residual, dy, dh, weight, bias), strict=True):
        assert before is None or np.array_equal(before, after)


@pytest.mark.engine
@pytest.mark.parametrize("parameter_dtype", ["same", "float64"])
def test_in_every_dtype(op, parameter_dtype, dtype, backend, rng):
    """A sum over calls is rounded once: made of rounded parts, some gradient would be off by more than one ULP."""
    shape, kind = (40, 3, 6), dtype if parameter_dtype == "same" else np.dtype(np.float64)
    x, residual, dy = (a.astype(dtype) for a in rng.standard_normal((3, *shape)))
    weight, bias = numbers(rng, (40, 1, 6), kind), numbers(rng, (6,), kind)
    y, _ = forward(op, x, residual, weight, bias, backend=backend)
    for i in range(40):
        part, _ = forward(op, x[i], residual[i], weight[i, 0], bias, backend=backend)
        assert y[i].tobytes() == part.tobytes()
    grads = backward(op, dy, None, x, weight, bias, backend=backend)
    assert (grads.dweight.dtype, grads.dbias.dtype) == (kind, kind)
    exact = dy.astype(np.longdouble).sum(axis=(0, 1))
    error = np.abs(grads.dbias.astype(np.longdouble) - exact)
    assert (error <= 0.51 * np.abs(np.spacing(exact.astype(kind)).astype(np.float64))).all() or kind == np.float64
    for i in range(40):
        part = backward(op, dy[i], None, x[i], weight[i, 0], bias, backend=backend)
        assert grads.dx[i].tobytes() == part.dx.tobytes()
        assert grads.dweight[i, 0].tobytes() == part.dweight.tobytes()


@pytest.mark.parametrize("p", [1.0, 0.4])
@pytest.mark.parametrize("given_out", ["plain", "x", "strided", "one after x"])
def test_with_out(p, given_out, backend, rng):
    memory = rng.standard_normal(200)
    x = memory[:60].reshape(3, 4, 5)
    dy, weight, bias = rng.standard_normal((3, 4, 5)), numbers(rng, (3, 1, 5)), numbers(rng, (4, 5))
    want = rn.rms_norm(x, weight, bias, p=p, backend=backend)
    want_grads = rn.rms_norm_backward(dy, x, weight, bias, p=p, backend=backend)
    outs = {
        "plain": np.zeros((3, 4, 5)),
        "x": x,
        "strided": np.zeros((3, 4, 10))[..., ::2],
        "one after x": memory[1:61].reshape(3, 4, 5),
    }
    x_before, out = x.copy(), outs[given_out]
    assert rn.rms_norm(x, weight, bias, p=p, out=out, backend=backend) is out
    assert np.array_equal(out, want)
    x[...] = x_before
    grads = rn.rms_norm_backward(dy, x, weight, bias, p=p, out=out, backend=backend)
    assert grads.dx is out
    assert np.array_equal(out, want_grads.dx)
    assert np.array_equal(grads.dweight, want_grads.dweight)
    assert np.array_equal(grads.dbias, want_grads.dbias)


def test_residual_out(backend, rng):
    x, residual = rng.standard_normal((2, 3, 4, 5))
    weight = numbers(rng, (3, 1, 5))
    want = rn.add_rms_norm(x, residual, weight, backend=backend)
    y, h = rn.add_rms_norm(x, residual, weight, residual_out=residual, out=x, backend=backend)
    assert y is x
    assert h is residual
    assert np.array_equal(y, want.y)
    assert np.array_equal(h, want.h)


def test_nan_stays_in_its_row(op, backend, rng):
    x, residual, dy = rng.standard_normal((3, 3, 4, 5))
    weight, bias = numbers(rng, (3, 1, 5)), numbers(rng, (4, 5))
    clean, _ = forward(op, x, residual, weight, bias, backend=backend)
    clean_grads = backward(op, dy, None, x, weight, bias, backend=backend)
    x[1, 2, 3] = np.nan
    y, _ = forward(op, x, residual, weight, bias, backend=backend)
    grads = backward(op, dy, None, x, weight, bias, backend=backend)
    for got, want in ((y, clean), (grads.dx, clean_grads.dx)):
        assert np.isnan(got[1, 2]).all()
        got[1, 2] = want[1, 2]
        assert np.array_equal(got, want)
    assert np.isnan(grads.dweight[1]).all()
    assert np.array_equal(np.delete(grads.dweight, 1, axis=0), np.delete(clean_grads.dweight, 1, axis=0))
    assert np.array_equal(grads.dbias, clean_grads.dbias)


def test_objects_take_such_weights(rng):
    x, dy = rng.standard_normal((2, 3, 4, 5))
    scale, shift = numbers(rng, (3, 1, 5)), numbers(rng, (3, 1, 5))
    norm = rn.LayerNorm(scale, shift, weight_offset=1.0)
    assert np.array_equal(norm(x), rn.layer_norm(x, scale, shift, weight_offset=1.0))
    assert norm.backward(dy, x).dweight.shape == scale.shape


def test_lists_and_other_layouts(backend, rng):
    x, weight = rng.standard_normal((3, 4, 5)), numbers(rng, (3, 1, 5))
    want = rn.rms_norm(x, weight, backend=backend)
    turned = np.array(weight[::-1], order="F")[::-1]
    for other in (weight.tolist(), turned, np.broadcast_to(weight[:1], (3, 1, 5))):
        got = rn.rms_norm(np.asfortranarray(x), other, backend=backend)
        assert np.array_equal(got, rn.rms_norm(x, np.array(other), backend=backend))
    assert np.array_equal(rn.rms_norm(x, turned, backend=backend), want)


@pytest.mark.parametrize(
    "shape", [(2, 5), (3, 4), (2, 4, 5), (3, 2, 5), (1, 3, 1, 5), (3, 1, 1), (1,), (4, 1, 5)], ids=str
)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_shape_that_does_not_broadcast_is_an_error_that_names_both(op, name, shape, backend):
    x = np.ones((3, 4, 5))
    with pytest.raises(ValueError, match=r"expected \(5,\), the axes \(2,\) of x.shape \(3, 4, 5\)") as error:
        forward(op, x, x, **{"weight": None, "bias": None, name: np.ones(shape)}, backend=backend)
    assert str(error.value).startswith(f"{name} has shape {shape}, expected")


# How calls are cut


@pytest.mark.parametrize(
    ("shape", "weight", "bias", "calls"),
    [
        ((2, 3, 5), (5,), (5,), 1),
        ((2, 3, 5), (3, 5), (5,), 1),
        ((2, 3, 5), (2, 3, 5), (3, 5), 1),
        ((2, 3, 5), (1, 3, 5), (1, 5), 1),
        ((2, 3, 5), (2, 1, 5), (5,), 2),
        ((2, 1, 5), (2, 1, 5), (5,), 1),
        ((2, 3, 5), (2, 1, 5), (2, 3, 5), 2),
        ((2, 4, 3, 5), (2, 1, 3, 5), None, 2),
        ((2, 4, 3, 5), (4, 1, 5), None, 8),
        ((2, 4, 1, 3, 5), (4, 1, 1, 5), (2, 1, 1, 1, 5), 8),
    ],
    ids=str,
)
def test_no_more_calls_than_have_to_be(shape, weight, bias, calls):
    given = tuple(None if a is None else np.ones(a) for a in (weight, bias))
    call = ("x", "residual", "out", "residual_out"), (np.ones(shape), None), (*given, 0.0), (None, None), 1e-6, 1.0, -1
    parameters = _arguments.engine_arguments(call)[1]
    made = math.prod(parameters.cut) if isinstance(parameters, _broadcast.Spread) else 1
    assert made == calls


# The other functions


def others(rng, shape, weight_shape, bias_shape):
    """(name, its arguments, which results belong to weight and bias, by their position)."""
    x, gate, dy, tangent = rng.standard_normal((4, *shape))
    weight, dot = rng.uniform(0.5, 1.5, (2, *weight_shape))
    bias, bias_dot = rng.standard_normal((2, *bias_shape))
    yield "l2_norm", (x, weight, bias), ()
    yield "quantized_rms_norm", (x, weight, bias), ()
    yield "l2_norm_backward", (dy, x, weight, bias), (1, 2)
    yield "gated_rms_norm", (x, gate, weight, bias), ()
    yield "gated_rms_norm_backward", (dy, x, gate, weight, bias), (2, 3)
    for norm in ("rms", "layer"):
        yield f"{norm}_norm_jvp", (x, weight, bias, tangent, dot, bias_dot), ()
        yield f"{norm}_norm_double_backward", (tangent, dot, bias_dot, dy, x, weight, bias), (2,)


@pytest.mark.parametrize(("weight_shape", "bias_shape"), [((2, 1, 5), (2, 1, 5)), ((2, 1, 5), (3, 5))], ids=str)
def test_every_function_takes_such_parameters(weight_shape, bias_shape, backend, rng):
    shape = (2, 3, 5)
    for name, arguments, of_parameters in others(rng, shape, weight_shape, bias_shape):
        wide = [np.broadcast_to(a, shape).copy() for a in arguments]
        got, want = (getattr(rn, name)(*given, backend=backend) for given in (arguments, wide))
        got, want = (list(a) if isinstance(a, tuple) else [a] for a in (got, want))
        for position, parameter in zip(of_parameters, (weight_shape, bias_shape), strict=False):
            want[position] = total(want[position], parameter)
        for one, two in zip(got, want, strict=True):
            assert (one is None) == (two is None)
            if one is None:
                continue
            assert one.shape == two.shape, name
            one, two = (a.astype(np.float64) for a in (one, two))
            np.testing.assert_allclose(one, two, **CLOSE, err_msg=name)
