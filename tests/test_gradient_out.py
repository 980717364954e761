"""out=(dx, dweight, dbias) of the backward functions: results go to the very arrays that were given, or an error."""

from __future__ import annotations

import re

import numpy as np
import pytest

import rmsnorm_np as rn
from rmsnorm_np import reference

pytestmark = pytest.mark.engine  # kernels of float64

FUNCTIONS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "l2_norm")
SHAPE = (2, 3, 5)


@pytest.fixture(params=[pytest.param(op, marks=[pytest.mark.slow] * op.startswith("add")) for op in FUNCTIONS])
def op(request):
    """The name of a function with a gradient."""
    return request.param


def arrays(rng, dtype=np.float64, parameter_shape=(5,)):
    """x, dy, weight, bias."""
    made = [*rng.standard_normal((2, *SHAPE)), *rng.uniform(0.5, 1.5, (2, *parameter_shape))]
    return [a.astype(dtype) for a in made]


def backward(op, x, dy, weight, bias, **options):
    function = getattr(rn, f"{op}_backward")
    return function(dy, x / 2, x, weight, bias, **options) if op.startswith("add") else function(
        dy, x, weight, bias, **options
    )  # fmt: skip


def same(got, want):
    assert got.dtype == want.dtype
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("parameter_shape", [(5,), (3, 5), (2, 1, 5)], ids=str)
def test_results_are_the_arrays_that_were_given(op, parameter_shape, backend, rng):
    given = arrays(rng, parameter_shape=parameter_shape)
    kept = [a.copy() for a in given]
    want = backward(op, *given, backend=backend)
    for asked in ((1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 0, 1), (0, 0, 0), (1, 0, 0)):
        outs = tuple(np.full_like(a, 7) if there else None for a, there in zip(want, asked, strict=True))
        grads = backward(op, *given, out=outs, backend=backend)
        assert type(grads) is type(want)
        for got, exact, out in zip(grads, want, outs, strict=True):
            assert out is None or got is out
            same(got, exact)
    for a, before in zip(given, kept, strict=True):
        same(a, before)


LAYOUTS = {
    "strided": lambda a: np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)[..., ::2],
    "reversed": lambda a: np.zeros_like(a)[..., ::-1],
    "byte-swapped": lambda a: np.zeros(a.shape, a.dtype.newbyteorder()),
    "unaligned": lambda a: np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_any_layout(op, layout, backend, rng):
    given = arrays(rng)
    want = backward(op, *given, backend=backend)
    outs = tuple(map(LAYOUTS[layout], want))
    grads = backward(op, *given, out=outs, backend=backend)
    for got, exact, out in zip(grads, want, outs, strict=True):
        assert got is out
        assert np.array_equal(got, exact)


@pytest.mark.engine
def test_in_every_dtype(op, dtype, backend, rng):
    given = arrays(rng, dtype)
    given[2] = given[2].astype(np.float32)
    want = backward(op, *given, backend=backend)
    outs = tuple(map(np.empty_like, want))
    for got, exact in zip(backward(op, *given, out=outs, backend=backend), want, strict=True):
        same(got, exact)


def test_over_the_arguments(op, backend, rng):
    """Into dy, the weight and the bias themselves, and across their memory: all is read before it is written."""
    x, dy, weight, bias = arrays(rng)
    want = backward(op, x, dy, weight, bias, backend=backend)
    grads = backward(op, x, dy, weight, bias, out=(dy, weight, bias), backend=backend)
    assert grads.dx is dy
    assert grads.dweight is weight
    assert grads.dbias is bias
    for got, exact in zip(grads, want, strict=True):
        same(got, exact)
    x, dy, weight, bias = arrays(np.random.default_rng(1910_07467))
    want = backward(op, x, dy, weight, bias, backend=backend)
    outs = x, dy.ravel()[3:8], dy.ravel()[10:15]
    for got, exact in zip(backward(op, x, dy, weight, bias, out=outs, backend=backend), want, strict=True):
        same(got, exact)


def test_the_gradients_of_the_call_before(op, backend, rng):
    """A named tuple of gradients is a tuple of arrays to write to."""
    x, dy, weight, bias = arrays(rng)
    before = backward(op, dy, x, weight, bias, backend=backend)
    grads = backward(op, x, dy, weight, bias, out=before, backend=backend)
    assert all(one is two for one, two in zip(grads, before, strict=True))
    for got, exact in zip(grads, backward(op, x, dy, weight, bias, backend=backend), strict=True):
        same(got, exact)


def test_integers_as_a_parameter_have_float64_gradients(op, backend, rng):
    x, dy, _, _ = arrays(rng)
    out = None, np.zeros(5), None
    assert backward(op, x, dy, np.arange(5), None, out=out, backend=backend).dweight is out[1]


def test_no_rows(op, backend):
    x, weight, bias = np.ones((0, 5)), np.ones(5), np.ones(5)
    grads = backward(op, x, x, weight, bias, out=(np.ones((0, 5)), np.ones(5), np.ones(5)), backend=backend)
    assert (grads.dweight == 0).all()
    assert (grads.dbias == 0).all()


def test_nan_stays_in_its_row(op, backend, rng):
    x, dy, weight, bias = arrays(rng)
    clean = backward(op, x, dy, weight, bias, backend=backend)
    x[0, 1, 2] = np.nan
    outs = np.empty(SHAPE), np.empty(5), np.empty(5)
    grads = backward(op, x, dy, weight, bias, out=outs, backend=backend)
    assert np.isnan(grads.dx[0, 1]).all()
    grads.dx[0, 1] = clean.dx[0, 1]
    same(grads.dx, clean.dx)
    assert np.isnan(grads.dweight).all()


def locked(shape):
    a = np.zeros(shape)
    a.flags.writeable = False
    return a


SHARED = np.zeros(40)
LENGTH = "expected an array or a tuple of 3: dx, dweight, dbias"
CASES = [
    ((), TypeError, f"out is a tuple of 0, {LENGTH}"),
    ((None, None), TypeError, f"out is a tuple of 2, {LENGTH}"),
    ((None,) * 4, TypeError, f"out is a tuple of 4, {LENGTH}"),
    ([None] * 3, TypeError, "out is of type list, expected a numpy.ndarray"),
    ((np.zeros(5), None, None), ValueError, "out[0] (dx) has shape (5,), expected x.shape (2, 3, 5)"),
    ((0.0, None, None), TypeError, "out[0] (dx) is of type float, expected a numpy.ndarray"),
    ((None, np.zeros(4), None), ValueError, "out[1] (dweight) has shape (4,), expected weight.shape (5,)"),
    ((None, None, np.zeros((1, 5))), ValueError, "out[2] (dbias) has shape (1, 5), expected bias.shape (5,)"),
    (
        (None, np.zeros(5, np.float32), None),
        TypeError,
        "out[1] (dweight) has dtype float32, expected float64, the dtype of the result",
    ),
    ((None, [0.0] * 5, None), TypeError, "out[1] (dweight) is of type list, expected a numpy.ndarray"),
    ((None, None, locked(5)), ValueError, "out[2] (dbias) is read-only, expected a writable array"),
    (
        (None, np.broadcast_to(np.zeros(1), 5), None),
        ValueError,
        "out[1] (dweight) is read-only, expected a writable array",
    ),
    (
        (None, SHARED[:5], SHARED[4:9]),
        ValueError,
        "out[1] (dweight) and out[2] (dbias) share memory, expected two arrays apart",
    ),
    (
        (SHARED[:30].reshape(SHAPE), None, SHARED[29:34]),
        ValueError,
        "out[0] (dx) and out[2] (dbias) share memory, expected two arrays apart",
    ),
    (
        (SHARED[:30].reshape(SHAPE), SHARED[2:7], None),
        ValueError,
        "out[0] (dx) and out[1] (dweight) share memory, expected two arrays apart",
    ),
]


@pytest.mark.parametrize(("out", "error", "message"), CASES, ids=lambda value: str(value)[:60])
def test_errors(op, out, error, message, backend, rng):
    given = arrays(rng)
    if op.startswith("add"):
        message = message.replace("x.shape", "h.shape")
    for a in out:
        if isinstance(a, np.ndarray) and a.flags.writeable:
            a[...] = 7.0
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        backward(op, *given, out=out, backend=backend)
    assert all((a == 7.0).all() for a in out if isinstance(a, np.ndarray) and a.flags.writeable)


def test_no_gradient_is_written_without_its_parameter(op, backend, rng):
    x, dy, weight, bias = arrays(rng)
    with pytest.raises(ValueError, match=r"^out\[1\] \(dweight\) is given, expected None without a weight$"):
        backward(op, x, dy, None, bias, out=(None, np.zeros(5), None), backend=backend)
    with pytest.raises(ValueError, match=r"^out\[2\] \(dbias\) is given, expected None without a bias$"):
        backward(op, x, dy, weight, None, out=(None, None, np.zeros(5)), backend=backend)


def test_objects(backend, rng):
    if backend == "reference":
        pytest.skip("an object has no backend")
    x, dy, weight, bias = arrays(rng)
    outs = np.empty(SHAPE), np.empty(5), None
    grads = rn.LayerNorm(weight, bias).backward(dy, x, outs)
    assert grads.dx is outs[0]
    assert grads.dweight is outs[1]
    for got, want in zip(grads, reference.layer_norm_backward(dy, x, weight, bias), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-14)
