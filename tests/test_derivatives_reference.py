"""Forward mode and the gradient of the gradient, in the reference.

The naive formula has the Jacobian of xhat as a matrix, and its derivative as an array of n³ numbers. It knows nothing
of the sums that the code uses, nor does the complex step through the reference's forward and backward functions.
"""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest
from tolerances import COMPLEX_STEP, spacing

import rmsnorm_np as rn
from rmsnorm_np import reference
from rmsnorm_np.gradcheck import check_gradient

L = np.longdouble
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
OPS = {"rms": ("rms", {}), "rms p=0.4": ("rms", {"p": 0.4}), "layer": ("layer", {})}

# Half an ULP for the one rounding (and 0.0001 for bfloat16's by way of float32); a few dozen roundings in the wider
# type, each of what is added up.
HALF = 0.5001
FEW = 64


def functions(norm, module=reference):
    """jvp, double backward, forward, backward"""
    return [getattr(module, f"{norm}_norm{end}") for end in ("_jvp", "_double_backward", "", "_backward")]


def allowed(exact, terms, dtype):
    wide = np.finfo(np.longdouble if dtype == np.float64 else np.float64).eps
    return HALF * spacing(exact, dtype) + FEW * wide * terms


def derivatives(row, k, eps, centred):
    """xhat (n,), its first derivative (n, n) and its second (n, n, n) by the row; and each from magnitudes alone."""
    n = len(row)
    P = np.eye(n, dtype=L) - (L(1) / n if centred else 0)
    z = P @ row
    rstd = 1 / np.sqrt(np.sum(z[:k] ** 2) / k + L(eps))
    d, zk = np.eye(n, dtype=L), np.where(np.arange(n) < k, z, 0)
    dk = d * (np.arange(n) < k)
    first = [rstd * d, -(rstd**3) / k * np.outer(z, zk)]
    second = [
        -(rstd**3) / k * np.einsum("ij,l->ijl", d, zk),
        -(rstd**3) / k * np.einsum("il,j->ijl", d, zk),
        -(rstd**3) / k * np.einsum("i,jl->ijl", z, dk),
        3 * rstd**5 / k**2 * np.einsum("i,j,l->ijl", z, zk, zk),
    ]
    one, two = sum(first) @ P, np.einsum("iab,aj,bl->ijl", sum(second), P, P)
    sizes = np.einsum("iab,aj,bl->ijl", sum(map(np.abs, second)), np.abs(P), np.abs(P))
    return (z * rstd, one, two), (np.abs(z * rstd), sum(map(np.abs, first)) @ np.abs(P), sizes)


def naive(x, dy, ddx, ddw, ddb, weight, k, eps, weight_offset, centred):
    """y_dot along (ddx, ddw, ddb), which is ddy; dx; dweight; and each from magnitudes alone."""
    x, dy, ddx, ddw, ddb, weight = (a.astype(L) for a in (x, dy, ddx, ddw, ddb, weight))
    W = L(weight_offset) + weight
    results = []
    for size in (False, True):
        ddy, dx, dweight = np.zeros_like(x), np.zeros_like(x), np.zeros_like(W)
        for r in range(len(x)):
            xhat, J, H = derivatives(x[r], k, eps, centred)[size]
            row = [dy[r], ddx[r], ddw, ddb, W]
            a, v, vw, vb, w = map(np.abs, row) if size else row
            ddy[r] = w * (J @ v) + vw * xhat + vb
            dx[r] = np.einsum("i,ijl,j->l", a * w, H, v) + (vw * a) @ J
            dweight += a * (J @ v)
        results.append((ddy, dx, dweight))
    return results


def arrays(rng, shape, dtypes=(np.float64,) * 4, parameter_shape=None):
    """x, dy, ddx (of the first three dtypes) and weight, bias, ddweight, ddbias (of the last)."""
    rows = [rng.normal(size=shape).astype(dtype) for dtype in dtypes[:3]]
    return *rows, *(rng.normal(size=parameter_shape or shape[-1:]).astype(dtypes[3]) for _ in range(4))


MIXED = (ml_dtypes.bfloat16, np.float32, np.float16, np.float64)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 16)], ids=str)
@pytest.mark.parametrize("dtypes", [*((dtype,) * 4 for dtype in DTYPES.values()), MIXED], ids=[*DTYPES, "mixed"])
@pytest.mark.parametrize("op", OPS)
def test_the_exact_result_rounded_once(op, dtypes, shape, rng):
    norm, options = OPS[op]
    dtypes = tuple(map(np.dtype, dtypes))
    x, dy, ddx, weight, bias, ddw, ddb = given = arrays(rng, shape, dtypes)
    before = [a.tobytes() for a in given]
    options = options | {"eps": 1e-3, "weight_offset": 0.5}
    k = max(1, -(-4 * shape[1] // 10)) if "p" in options else shape[1]
    exact, terms = naive(x, dy, ddx, ddw, ddb, weight, k, 1e-3, 0.5, norm == "layer")
    jvp, double_backward, _, _ = functions(norm)
    y_dot = jvp(x, weight, bias, ddx, ddw, ddb, **options)
    grads = double_backward(ddx, ddw, ddb, dy, x, weight, bias, **options)
    assert before == [a.tobytes() for a in given]
    assert (y_dot.dtype, grads.ddy.dtype, grads.dx.dtype, grads.dweight.dtype) == (
        x.dtype, dy.dtype, x.dtype, weight.dtype,
    )  # fmt: skip
    for got, want, size in ((y_dot, exact[0], terms[0]), *zip(grads, exact, terms, strict=True)):
        wide = x.dtype if np.float64 not in dtypes else np.dtype(np.float64)
        tolerance = HALF * spacing(want, got.dtype) + allowed(want, size, wide) - HALF * spacing(want, wide)
        assert np.all(np.abs(got.astype(L) - want) <= tolerance)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
@pytest.mark.parametrize("op", OPS)
def test_rows_whose_squares_leave_the_range(op, scale, rng):
    """x and its direction scaled alike: the same y_dot, ddy and dweight, and dx divided by the scale."""
    norm, options = OPS[op]
    x, dy, ddx, weight, bias, ddw, ddb = arrays(rng, (3, 8))
    scale = 2.0 ** round(np.log2(scale))  # exact
    jvp, double_backward, _, _ = functions(norm)
    options = options | {"eps": 0.0}
    want = jvp(x, weight, bias, ddx, ddw, ddb, **options)
    assert np.array_equal(jvp(x * scale, weight, bias, ddx * scale, ddw, ddb, **options), want)
    want = double_backward(ddx, ddw, ddb, dy, x, weight, bias, **options)
    got = double_backward(ddx * scale, ddw, ddb, dy, x * scale, weight, bias, **options)
    assert np.array_equal(got.ddy, want.ddy)
    assert np.array_equal(got.dx * scale, want.dx)
    assert np.array_equal(got.dweight, want.dweight)


# shape, axis, shape of weight and bias
LAYOUTS = [
    ((3, 7), -1, (7,)),
    ((2, 3, 4), -1, (3, 4)),  # per head
    ((2, 3, 4), -1, (2, 1, 4)),  # per sample of a batch
    ((2, 3, 4), -1, (1, 3, 4)),
    ((2, 3, 4), (1, 2), (3, 4)),
    ((3, 4, 2), (0, 2), (3, 2)),  # not trailing
    ((5, 3), 0, (5,)),
]


@pytest.mark.parametrize(("shape", "axis", "parameter_shape"), LAYOUTS, ids=str)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("op", OPS)
class TestComplexStep:
    def test_jvp(self, op, eps, weight_offset, shape, axis, parameter_shape, rng):
        norm, options = OPS[op]
        options = options | {"eps": eps, "weight_offset": weight_offset, "axis": axis}
        x, _, x_dot, weight, bias, weight_dot, bias_dot = arrays(rng, shape, parameter_shape=parameter_shape)
        jvp, _, forward, _ = functions(norm)
        step = 1e-100j
        moved = x + step * x_dot, weight + step * weight_dot, bias + step * bias_dot
        want = forward(*moved, **options).imag / step.imag
        got = jvp(x, weight, bias, x_dot, weight_dot, bias_dot, **options)
        assert got.shape == shape
        assert np.linalg.norm(got - want) <= COMPLEX_STEP * np.linalg.norm(want)

    def test_double_backward(self, op, eps, weight_offset, shape, axis, parameter_shape, rng):
        norm, options = OPS[op]
        options = options | {"eps": eps, "weight_offset": weight_offset, "axis": axis}
        x, dy, ddx, weight, bias, ddw, ddb = arrays(rng, shape, parameter_shape=parameter_shape)
        _, double_backward, _, backward = functions(norm)

        def loss(dy, x, weight):
            grads = backward(dy, x, weight, bias, **options)
            return np.sum(ddx * grads.dx) + np.sum(ddw * grads.dweight) + np.sum(ddb * grads.dbias)

        at = dy, x, weight
        for position, gradient in enumerate(double_backward(ddx, ddw, ddb, dy, x, weight, bias, **options)):
            assert gradient.shape == at[position].shape
            for _ in range(3):
                v = rng.normal(size=gradient.shape)
                moved = (a + 1e-100j * v if i == position else a for i, a in enumerate(at))
                want = loss(*moved).imag / 1e-100
                assert abs(np.sum(gradient * v) - want) <= COMPLEX_STEP * np.linalg.norm(gradient * v)


@pytest.mark.parametrize("op", OPS)
def test_they_agree_with_each_other(op, rng):
    """<dy, jvp> is <gradients, tangents>; ddy is the jvp along what arrives; dx is the derivative of dx along ddx."""
    norm, options = OPS[op]
    x, dy, ddx, weight, bias, ddw, ddb = arrays(rng, (4, 9))
    jvp, double_backward, _, backward = functions(norm)
    y_dot = jvp(x, weight, bias, ddx, ddw, ddb, **options)
    first = backward(dy, x, weight, bias, **options)
    second = double_backward(ddx, ddw, ddb, dy, x, weight, bias, **options)
    inner = np.sum(first.dx * ddx) + np.sum(first.dweight * ddw) + np.sum(first.dbias * ddb)
    assert abs(np.sum(dy * y_dot) - inner) <= COMPLEX_STEP * np.linalg.norm(dy * y_dot)
    assert np.array_equal(second.ddy, y_dot)
    # The Hessian of <dy, y> is symmetric: along (ddx, ddw) the gradients dx and dweight change by second's.
    moved = backward(dy, x + 1e-100j * ddx, weight + 1e-100j * ddw, bias, **options)
    for got, complex_gradient in ((second.dx, moved.dx), (second.dweight, moved.dweight)):
        want = complex_gradient.imag / 1e-100
        assert np.linalg.norm(got - want) <= COMPLEX_STEP * np.linalg.norm(want)


@pytest.mark.parametrize("op", OPS)
def test_check_gradient(op, rng):
    norm, options = OPS[op]
    x, dy, _, weight, *_ = arrays(rng, (3, 8))
    _, double_backward, _, backward = functions(norm)

    def check(which, wrong):
        return check_gradient(
            lambda dy, x, weight: getattr(backward(dy, x, weight, **options), which),
            lambda incoming, *at: wrong(
                double_backward(*((incoming, None) if which == "dx" else (None, incoming)), None, *at, **options)
            ),
            dy, x, weight,
        )  # fmt: skip

    for which in ("dx", "dweight"):
        report = check(which, lambda grads: grads)
        assert report.ok, report
        if which == "dx":  # dweight does not depend on weight, and stays real
            assert report.method == "complex-step"
        wrong = check(which, lambda grads: grads._replace(dx=1.001 * grads.dx))
        assert [part.verdict for part in wrong.inputs] == ["right", "wrong", "right"]


@pytest.mark.parametrize("op", OPS)
def test_none_is_zero(op, rng):
    """Each subset of the tangents, and of what arrives at the gradients."""
    norm, options = OPS[op]
    x, dy, ddx, weight, bias, ddw, ddb = arrays(rng, (3, 5))
    jvp, double_backward, _, _ = functions(norm)
    for mask in np.ndindex(2, 2, 2):
        some = [a if keep else None for a, keep in zip((ddx, ddw, ddb), mask, strict=True)]
        zero = [a * keep for a, keep in zip((ddx, ddw, ddb), mask, strict=True)]
        got, want = (jvp(x, weight, bias, *tangents, **options) for tangents in (some, zero))
        assert np.array_equal(got, want)
        got, want = (double_backward(*incoming, dy, x, weight, bias, **options) for incoming in (some, zero))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-15, atol=1e-16)
    # without parameters, without tangents of them
    y_dot = jvp(x, None, None, ddx, None, None, **options)
    np.testing.assert_array_equal(y_dot, jvp(x, np.ones(5), None, ddx, None, None, **options))
    grads = double_backward(ddx, None, None, dy, x, **options)
    assert grads.dweight is None
    np.testing.assert_array_equal(grads.dx, double_backward(ddx, None, None, dy, x, np.ones(5), **options).dx)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "dy", "ddx"])
@pytest.mark.parametrize("op", OPS)
def test_nan_and_inf_stay_in_their_row(op, where, bad, rng):
    norm, options = OPS[op]
    x, dy, ddx, weight, bias, ddw, ddb = arrays(rng, (4, 6))
    jvp, double_backward, _, _ = functions(norm)

    def results():
        return jvp(x, weight, bias, ddx, ddw, ddb, **options), *double_backward(
            ddx, ddw, ddb, dy, x, weight, bias, **options
        )[:2]

    clean = results()
    {"x": x, "dy": dy, "ddx": ddx}[where][1, 2] = bad
    dirty = results()
    for before, after in zip(clean, dirty, strict=True):
        assert np.array_equal(np.delete(before, 1, axis=0), np.delete(after, 1, axis=0))
    assert not np.isfinite(dirty[2][1]).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (2, 1), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_empty_batches_and_rows_of_one_element(op, shape, rng):
    norm, options = OPS[op]
    x, dy, ddx, weight, bias, ddw, ddb = arrays(rng, shape)
    jvp, double_backward, _, _ = functions(norm)
    y_dot = jvp(x, weight, bias, ddx, ddw, ddb, **options)
    grads = double_backward(ddx, ddw, ddb, dy, x, weight, bias, **options)
    assert y_dot.shape == grads.ddy.shape == grads.dx.shape == shape
    assert grads.dweight.shape == shape[-1:]
    if norm == "layer" and shape[-1] == 1:  # y is the bias, whatever x is
        assert np.array_equal(y_dot, np.broadcast_to(ddb, shape))
        assert not grads.dx.any()
        assert not grads.dweight.any()


@pytest.mark.parametrize("value", [0.1, 1e6, 3.0])
def test_a_constant_row_of_layer_norm_follows_no_direction_in_x_s_mean(value, rng):
    """x_dot and ddx that are the same in each element move the mean alone: y and dx do not depend on it."""
    x, dy, _, weight, bias, _, _ = arrays(rng, (2, 7))
    constant = np.full_like(x, value)
    assert not reference.layer_norm_jvp(x, weight, bias, constant, None, None).any()
    grads = reference.layer_norm_double_backward(constant, None, None, dy, x, weight, bias)
    assert not grads.ddy.any()
    assert not grads.dx.any()
    assert not grads.dweight.any()


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 23), (np.float64, 52)])
def test_a_row_far_from_zero_is_centred_exactly(dtype, bits, rng):
    """x and ddx whose means are as large against their spread as the dtype can hold, and the same about zero."""
    x, ddx = near = rng.integers(-4, 5, size=(2, 3, 100)).astype(dtype)
    far = (near + 2.0 ** (bits - 1) * 1.25).astype(dtype)
    dy, weight = rng.normal(size=(3, 100)).astype(dtype), rng.normal(size=100).astype(dtype)
    want = reference.layer_norm_double_backward(ddx, None, None, dy, x, weight)
    got = reference.layer_norm_double_backward(far[1], None, None, dy, far[0], weight)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2 * np.finfo(dtype).eps, atol=1e-3 * np.finfo(dtype).eps)
    y_dot = reference.layer_norm_jvp(far[0], weight, None, far[1], weight, None)
    want = reference.layer_norm_jvp(x, weight, None, ddx, weight, None)
    np.testing.assert_allclose(y_dot, want, rtol=2 * np.finfo(dtype).eps, atol=1e-3 * np.finfo(dtype).eps)


# The public functions

NAMES = [f"{norm}_norm_{end}" for norm in ("rms", "layer") for end in ("jvp", "double_backward")]


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_has_the_same_signatures(name):
    assert inspect.signature(getattr(rn, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_every_option_reaches_the_reference(norm, rng):
    x, dy, ddx, weight, bias, ddw, ddb = arrays(rng, (4, 5), parameter_shape=(4,))
    options = {"eps": 0.2, "axis": 0, "weight_offset": 0.5} | ({"p": 0.4} if norm == "rms" else {})
    got, want = (
        (
            jvp(x, weight, bias, ddx, ddw, ddb, **options, **more),
            *double_backward(ddx, ddw, ddb, dy, x, weight, bias, **options, **more),
        )
        for (jvp, double_backward, _, _), more in (
            (functions(norm, rn), {"backend": "reference"}),
            (functions(norm), {}),
        )
    )
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_results_go_where_out_says(norm, rng):
    x, dy, ddx, weight, bias, ddw, ddb = arrays(rng, (4, 5), (np.float64, np.float32, np.float64, np.float64))
    jvp, double_backward, _, _ = functions(norm)
    given = x, weight, bias, ddx, ddw, ddb
    want, out = jvp(*given), np.asfortranarray(np.zeros_like(x))
    assert jvp(*given, out=out) is out
    assert np.array_equal(out, want)
    own = x.copy()
    assert np.array_equal(jvp(own, *given[1:], out=own), want)
    want = double_backward(ddx, ddw, ddb, dy, x, weight, bias)
    for outs in ((np.zeros_like(dy), out), (None, out), (np.zeros_like(dy), None)):
        grads = double_backward(ddx, ddw, ddb, dy, x, weight, bias, out=outs)
        for got, there, right in zip(grads, (*outs, None), want, strict=True):
            assert there is None or got is there
            assert np.array_equal(got, right)
    own = dy.copy(), x.copy()
    grads = double_backward(ddx, ddw, ddb, *own, weight, bias, out=own)
    assert np.array_equal(grads.ddy, want.ddy)
    assert np.array_equal(grads.dx, want.dx)


X, W = np.ones((2, 4)), np.ones(4)
BAD = [
    ("jvp", (None, W, W, X, W, W), {}, TypeError, "x is None, expected an array"),
    ("jvp", (X, W, W, W, None, None), {}, ValueError, r"x_dot has shape \(4,\), expected x.shape \(2, 4\)"),
    ("jvp", (X, W, W, X, X, None), {}, ValueError, r"weight_dot has shape \(2, 4\), expected weight.shape \(4,\)"),
    ("jvp", (X, W, W, X, None, W[:1]), {}, ValueError, r"bias_dot has shape \(1,\), expected bias.shape \(4,\)"),
    ("jvp", (X, None, W, X, W, None), {}, ValueError, "weight_dot is given, expected None without a weight"),
    ("jvp", (X, W, None, X, None, W), {}, ValueError, "bias_dot is given, expected None without a bias"),
    ("jvp", (X, W, W, X, np.full(4, "a"), None), {}, TypeError, "weight_dot has dtype <U1, expected float16"),
    ("jvp", (X, W[:1], W, X, None, None), {}, ValueError, r"weight has shape \(1,\), expected \(4,\)"),
    ("jvp", (X, W, W, X, W, W), {"out": np.empty(4)}, ValueError, r"out has shape \(4,\), expected x.shape \(2, 4\)"),
    ("double_backward", (X, W, W, None, X, W, W), {}, TypeError, "dy is None, expected an array"),
    ("double_backward", (X, W, W, X, None, W, W), {}, TypeError, "x is None, expected an array"),
    ("double_backward", (X[:1], W, W, X, X, W, W), {}, ValueError, r"ddx has shape \(1, 4\), expected x.shape"),
    ("double_backward", (X, X, W, X, X, W, W), {}, ValueError, r"ddweight has shape \(2, 4\), expected weight.shape"),
    ("double_backward", (X, W, X, X, X, W, W), {}, ValueError, r"ddbias has shape \(2, 4\), expected bias.shape"),
    ("double_backward", (X, W, None, X, X), {}, ValueError, "ddweight is given, expected None without a weight"),
    ("double_backward", (X, W, W, X, X, W), {}, ValueError, "ddbias is given, expected None without a bias"),
    ("double_backward", (X, W, W, X, X, W, W), {"out": X}, TypeError, "out is of type ndarray, expected None or"),
    ("double_backward", (X, W, W, X, X, W, W), {"out": (None, W)}, ValueError, r"out\[1\] has shape \(4,\), expected"),
    ("double_backward", (X, W, W, X, X, W, W), {"out": (W, None)}, ValueError, r"out\[0\] has shape \(4,\), expected"),
    ("double_backward", (X, W, W, X, X, W, W), {"eps": -1.0}, ValueError, "eps is -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "options", "error", "message"), BAD)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_errors(norm, name, arguments, options, error, message):
    for module, backend in ((reference, {}), (rn, {"backend": "reference"})):
        with pytest.raises(error, match=message):
            getattr(module, f"{norm}_norm_{name}")(*arguments, **options, **backend)
