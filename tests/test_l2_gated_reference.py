"""The L2 norm and RMSNorm with a gate, in the reference: against longdouble, the complex step, and `check_gradient`."""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest
from tolerances import COMPLEX_STEP, parameter_tolerance, spacing

import rmsnorm_np as rn
from rmsnorm_np import reference
from rmsnorm_np.gradcheck import check_gradient

L = np.longdouble
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
NAMES = ["l2_norm", "gated_rms_norm", "gated_rms_norm after"]
SHAPES = [(1, 1), (3, 7), (5, 130)]

# Half an ULP for the one rounding (and 0.0001 for bfloat16's by way of float32); a few dozen roundings in the wider
# type, each of what is added up.
HALF = 0.5001
FEW = 64


def allowed(exact, terms, dtype):
    wide = np.finfo(np.longdouble if dtype == np.float64 else np.float64).eps
    return HALF * spacing(exact, dtype) + FEW * wide * terms


class Exact:
    """y and the gradients by the definition, with matrices: J is the Jacobian of xhat by what is normalised."""

    def __init__(self, name, dy, x, gate, weight, bias, *, k=None, eps, weight_offset):
        dy, x, gate, weight, bias = (None if a is None else a.astype(L) for a in (dy, x, gate, weight, bias))
        n = x.shape[1]
        W = np.ones(n, L) if weight is None else L(weight_offset) + weight
        b = np.zeros(n, L) if bias is None else bias
        s = ds = np.ones_like(x)
        if gate is not None:
            sigmoid = 1 / (1 + np.exp(-gate))
            s, ds = gate * sigmoid, sigmoid + gate * sigmoid * (1 / (1 + np.exp(gate)))
        after = name.endswith("after")
        u = x * s if after else x
        k, divisor = (n, 1) if name == "l2_norm" else (k or n, k or n)
        in_rms = np.arange(n) < k
        self.y, self.dx, self.dgate, self.xhat = (np.zeros_like(x) for _ in range(4))
        self.y_terms, self.dx_terms, self.dgate_terms = (np.zeros_like(x) for _ in range(3))
        d = dy if after or gate is None else dy * s  # the gradient by the norm
        for r, row in enumerate(u):
            rstd = 1 / np.sqrt(np.sum(row[in_rms] ** 2) / divisor + L(eps))
            J = rstd * np.eye(n, dtype=L) - rstd**3 / divisor * np.outer(row, np.where(in_rms, row, 0))
            sizes = rstd * np.eye(n, dtype=L) + rstd**3 / divisor * np.abs(np.outer(row, np.where(in_rms, row, 0)))
            self.xhat[r] = row * rstd
            norm, norm_terms = self.xhat[r] * W + b, np.abs(self.xhat[r] * W) + np.abs(b)
            du, du_terms = (d[r] * W) @ J, np.abs(d[r] * W) @ sizes
            if gate is None:
                self.y[r], self.y_terms[r], self.dx[r], self.dx_terms[r] = norm, norm_terms, du, du_terms
            elif after:
                self.y[r], self.y_terms[r] = norm, norm_terms
                self.dx[r], self.dx_terms[r] = du * s[r], du_terms * np.abs(s[r])
                self.dgate[r], self.dgate_terms[r] = du * x[r] * ds[r], du_terms * np.abs(x[r] * ds[r])
            else:
                self.y[r], self.y_terms[r] = norm * s[r], norm_terms * np.abs(s[r])
                self.dx[r], self.dx_terms[r] = du, du_terms
                self.dgate[r], self.dgate_terms[r] = dy[r] * norm * ds[r], np.abs(dy[r] * ds[r]) * norm_terms
        self.dweight, self.dweight_terms = np.sum(d * self.xhat, axis=0), np.sum(np.abs(d * self.xhat), axis=0)
        self.dbias, self.dbias_terms = np.sum(d, axis=0), np.sum(np.abs(d), axis=0)


def functions(name, module=reference):
    """Forward and backward, each with the order (x, gate, weight, bias), gate None for `l2_norm`."""
    if name == "l2_norm":
        return (
            lambda x, gate, weight, bias, **options: module.l2_norm(x, weight, bias, **options),
            lambda dy, x, gate, weight, bias, **options: _with_gate(
                module.l2_norm_backward(dy, x, weight, bias, **options)
            ),
        )
    before = {"norm_before_gate": not name.endswith("after")}
    return (
        lambda *arrays, **options: module.gated_rms_norm(*arrays, **before, **options),
        lambda *arrays, **options: module.gated_rms_norm_backward(*arrays, **before, **options),
    )


def _with_gate(grads):
    return rn.GatedNormGrads(grads.dx, None, grads.dweight, grads.dbias)


def arrays(rng, name, shape, dtype=np.float64, parameter_shape=None):
    """dy, x, gate, weight, bias"""
    dy, x, gate = (a.astype(dtype) for a in rng.normal(size=(3, *shape)))
    weight, bias = (a.astype(dtype) for a in rng.normal(size=(2, *(parameter_shape or shape[-1:]))))
    return dy, x, None if name == "l2_norm" else (gate * np.asarray(3, dtype)).astype(dtype), weight, bias


def k_of(n, p):
    return max(1, -(-int(10 * p) * n // 10))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_exact_result_rounded_once(name, dtype, shape, rng):
    dtype = np.dtype(DTYPES[dtype])
    dy, x, gate, weight, bias = arrays(rng, name, shape, dtype)
    before = [a.tobytes() for a in (dy, x, weight, bias)]
    forward, backward = functions(name)
    for given in (None, None), (weight, None), (None, bias), (weight, bias):
        for p in (1.0,) if name == "l2_norm" else (1.0, 0.3):
            options = {"eps": 1e-3, "weight_offset": 0.0 if given[0] is None else 0.5}
            exact = Exact(name, dy, x, gate, *given, k=k_of(shape[1], p), **options)
            if p < 1.0:
                options["p"] = p
            y, grads = forward(x, gate, *given, **options), backward(dy, x, gate, *given, **options)
            assert y.dtype == grads.dx.dtype == dtype
            assert np.all(np.abs(y.astype(L) - exact.y) <= allowed(exact.y, exact.y_terms, dtype))
            assert np.all(np.abs(grads.dx.astype(L) - exact.dx) <= allowed(exact.dx, exact.dx_terms, dtype))
            if gate is not None:
                assert grads.dgate.dtype == gate.dtype
                assert np.all(
                    np.abs(grads.dgate.astype(L) - exact.dgate) <= allowed(exact.dgate, exact.dgate_terms, dtype)
                )
            for parameter, which in zip(given, ("dweight", "dbias"), strict=True):
                got = getattr(grads, which)
                assert (got is None) == (parameter is None)
                if got is not None:
                    want, terms = getattr(exact, which), getattr(exact, which + "_terms")
                    tolerance = parameter_tolerance(want, terms, shape[0], np.float64, dtype) + allowed(want, 0, dtype)
                    assert got.dtype == dtype
                    assert np.all(np.abs(got.astype(L) - want) <= tolerance)
    assert before == [a.tobytes() for a in (dy, x, weight, bias)]


# shape, axis, shape of weight and bias
LAYOUTS = [
    ((3, 7), -1, (7,)),
    ((2, 3, 4), -1, (3, 4)),  # per head, per group
    ((2, 3, 4), -1, (2, 1, 4)),  # per sample of a batch
    ((2, 3, 4), -1, (1, 3, 4)),
    ((2, 3, 4), (1, 2), (3, 4)),
    ((3, 4, 2), (0, 2), (3, 2)),  # not trailing
    ((5, 3), 0, (5,)),
]


@pytest.mark.parametrize(("shape", "axis", "parameter_shape"), LAYOUTS, ids=str)
@pytest.mark.parametrize("name", [*NAMES, "gated_rms_norm p=0.4", "gated_rms_norm p=0.4 after"])
def test_gradients_agree_with_the_complex_step(name, shape, axis, parameter_shape, rng):
    dy, *at = arrays(rng, name, shape, parameter_shape=parameter_shape)
    options = {"eps": 0.1, "axis": axis, "weight_offset": 0.5} | ({"p": 0.4} if "p=" in name else {})
    forward, backward = functions(name)
    grads = backward(dy, *at, **options)
    for position, gradient in enumerate(grads):
        if gradient is None:
            continue
        assert gradient.shape == at[position].shape
        v = rng.normal(size=gradient.shape)
        moved = [a + 1e-100j * v if i == position else a for i, a in enumerate(at)]
        want = np.sum(dy * forward(*moved, **options)).imag / 1e-100
        assert abs(np.sum(gradient * v) - want) <= COMPLEX_STEP * np.linalg.norm(gradient * v)


@pytest.mark.parametrize("name", NAMES)
def test_check_gradient(name, rng):
    _, *at = arrays(rng, name, (3, 8))
    forward, backward = functions(name)
    report = check_gradient(forward, backward, *at)
    assert report.ok, report
    assert report.method == "complex-step"

    def wrong(*arrays):
        grads = backward(*arrays)
        return grads._replace(dx=1.001 * grads.dx)

    assert check_gradient(forward, wrong, *at).verdict == "wrong"


def test_the_l2_norm_is_rms_norm_by_the_root_of_n(rng):
    dy, x, _, weight, _ = arrays(rng, "l2_norm", (4, 9))
    y = reference.l2_norm(x, weight, eps=9e-3)
    np.testing.assert_allclose(3.0 * y, reference.rms_norm(x, weight, eps=1e-3), rtol=1e-15)
    grads = reference.l2_norm_backward(dy, x, weight, eps=9e-3)
    want = reference.rms_norm_backward(dy, x, weight, eps=1e-3)
    np.testing.assert_allclose(3.0 * grads.dx, want.dx, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(3.0 * grads.dweight, want.dweight, rtol=1e-14)
    np.testing.assert_allclose(np.sum(reference.l2_norm(x, eps=0.0) ** 2, axis=1), 1.0, rtol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("after", [False, True])
def test_a_large_gate_neither_overflows_nor_makes_nan(after, dtype):
    dtype = np.dtype(DTYPES[dtype])
    largest = float(ml_dtypes.finfo(dtype).max)
    gate = np.array([[0.0, -0.0, 11.0, -11.0, 104.0, -104.0, 800.0, -800.0, 65504.0, -65504.0, largest, -largest]])
    x = np.where(np.abs(gate) < 1e4, 1.0, 0.0).astype(dtype)  # x · silu(gate) in range, in x's dtype or in a wider
    gate = gate.astype(dtype)
    y = reference.gated_rms_norm(x, gate, norm_before_gate=not after, eps=1.0)
    grads = reference.gated_rms_norm_backward(np.ones_like(x), x, gate, norm_before_gate=not after, eps=1.0)
    for result in (y, grads.dx, grads.dgate):
        assert np.isfinite(result.astype(np.float64)).all()
    if not after:
        # silu of a large gate is the gate itself, or next to zero
        norm = reference.rms_norm(x, eps=1.0).astype(np.float64)
        assert abs(float(y[0, 6]) - 800.0 * norm[0, 6]) <= 800.0 * float(ml_dtypes.finfo(dtype).eps)
        assert float(y[0, 7]) == 0.0 or float(y[0, 7]) > -1e-300
        assert float(y[0, 3]) < 0.0  # -11 · exp(-11) is not zero


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "gate", "dy"])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_stay_in_their_row(name, where, bad, rng):
    dy, x, gate, weight, bias = arrays(rng, name, (4, 6))
    if where == "gate" and gate is None:
        pytest.skip("no gate")
    forward, backward = functions(name)
    clean = forward(x, gate, weight, bias), *backward(dy, x, gate, weight, bias)[:2]
    {"x": x, "gate": gate, "dy": dy}[where][1, 2] = bad
    dirty = forward(x, gate, weight, bias), *backward(dy, x, gate, weight, bias)[:2]
    for before, after in zip(clean, dirty, strict=True):
        if before is not None:
            assert np.array_equal(np.delete(before, 1, axis=0), np.delete(after, 1, axis=0))
    assert not np.isfinite(dirty[1][1]).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (2, 1), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_and_rows_of_one_element(name, shape, rng):
    dy, x, gate, weight, bias = arrays(rng, name, shape)
    forward, backward = functions(name)
    y, grads = forward(x, gate, weight, bias), backward(dy, x, gate, weight, bias)
    assert y.shape == grads.dx.shape == shape
    assert grads.dweight.shape == grads.dbias.shape == shape[-1:]
    if 0 in shape:
        assert not grads.dweight.any()


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_other_dtypes_keep_their_own(name, rng):
    dy, x, gate, weight, bias = arrays(rng, name, (3, 5))
    dy, x, weight = dy.astype(np.float64), x.astype(np.float16), weight.astype(np.float32)
    gate = None if gate is None else gate.astype(ml_dtypes.bfloat16)
    forward, backward = functions(name)
    grads = backward(dy, x, gate, weight, bias)
    assert forward(x, gate, weight, bias).dtype == grads.dx.dtype == np.float16
    assert (grads.dweight.dtype, grads.dbias.dtype) == (np.float32, np.float64)
    assert gate is None or grads.dgate.dtype == ml_dtypes.bfloat16


def test_groups_by_reshape(rng):
    """Each group has an RMS of its own, and the weight of its own channels."""
    dy, x, gate, weight, _ = arrays(rng, "gated_rms_norm", (2, 3, 8))
    groups = 2, 4
    reshaped = [a.reshape(*a.shape[:-1], *groups) for a in (dy, x, gate)]
    y = reference.gated_rms_norm(*reshaped[1:], weight.reshape(groups)).reshape(x.shape)
    grads = reference.gated_rms_norm_backward(*reshaped, weight.reshape(groups))
    for g in (slice(0, 4), slice(4, 8)):
        part = [np.ascontiguousarray(a[..., g]) for a in (dy, x, gate)]
        assert np.array_equal(y[..., g], reference.gated_rms_norm(*part[1:], weight[g]))
        want = reference.gated_rms_norm_backward(*part, weight[g])
        assert np.array_equal(grads.dx.reshape(x.shape)[..., g], want.dx)
        assert np.array_equal(grads.dweight.reshape(-1)[g], want.dweight)


# The public functions


@pytest.mark.parametrize("name", ["l2_norm", "l2_norm_backward", "gated_rms_norm", "gated_rms_norm_backward"])
def test_the_reference_has_the_same_signatures(name):
    assert inspect.signature(getattr(rn, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_reaches_the_reference(name, rng):
    dy, *given = arrays(rng, name, (4, 5), parameter_shape=(4,))
    options = {"eps": 0.2, "axis": 0, "weight_offset": 0.5} | ({} if name == "l2_norm" else {"p": 0.4})
    (forward, backward), (own_forward, own_backward) = functions(name, rn), functions(name)
    got = forward(*given, **options, backend="reference"), *backward(dy, *given, **options, backend="reference")
    want = own_forward(*given, **options), *own_backward(dy, *given, **options)
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or np.array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_results_go_where_out_says(name, rng):
    dy, x, gate, weight, bias = arrays(rng, name, (4, 5))
    forward, backward = functions(name, rn)
    want = forward(x, gate, weight, bias, backend="reference")
    wanted = backward(dy, x, gate, weight, bias, backend="reference")
    out = np.asfortranarray(np.zeros_like(x))
    assert forward(x, gate, weight, bias, out=out, backend="reference") is out
    assert np.array_equal(out, want)
    own = x.copy()
    assert np.array_equal(forward(own, gate, weight, bias, out=own, backend="reference"), want)
    if gate is None:
        assert backward(dy, x, gate, weight, bias, out=out, backend="reference").dx is out
        assert np.array_equal(out, wanted.dx)
        return
    for outs in ((out, np.zeros_like(x)), (None, out), (out, None)):
        grads = backward(dy, x, gate, weight, bias, out=outs, backend="reference")
        for got, there, right in zip(grads, outs, wanted, strict=False):
            assert there is None or got is there
            assert np.array_equal(got, right)
    own = x.copy(), gate.copy()
    grads = backward(dy, *own, weight, bias, out=own[::-1], backend="reference")
    assert np.array_equal(grads.dx, wanted.dx)
    assert grads.dx is own[1]
    assert np.array_equal(grads.dgate, wanted.dgate)


X = np.ones((2, 4))
BAD = [
    ("l2_norm", (None,), {}, TypeError, "x is None, expected an array"),
    ("l2_norm", (X, np.ones(3)), {}, ValueError, r"weight has shape \(3,\), expected \(4,\)"),
    ("l2_norm", (X,), {"eps": -1.0}, ValueError, "eps is -1.0, expected a finite number >= 0"),
    ("l2_norm", (X,), {"weight_offset": 1.0}, ValueError, "weight_offset is 1.0, expected 0.0 without a weight"),
    ("l2_norm_backward", (None, X), {}, TypeError, "dy is None, expected an array"),
    ("l2_norm_backward", (X[:1], X), {}, ValueError, r"dy has shape \(1, 4\), expected x.shape \(2, 4\)"),
    ("gated_rms_norm", (X, None), {}, TypeError, "gate is None, expected an array"),
    ("gated_rms_norm", (X, X[0]), {}, ValueError, r"gate has shape \(4,\), expected x.shape \(2, 4\)"),
    ("gated_rms_norm", (X, X), {"norm_before_gate": 1}, TypeError, "norm_before_gate is 1, expected True or False"),
    ("gated_rms_norm", (X, X), {"norm_before_gate": None}, TypeError, "norm_before_gate is None, expected True or"),
    ("gated_rms_norm", (X, X), {"p": 0.0}, ValueError, "p is 0.0, expected a number with 0 < p <= 1"),
    ("gated_rms_norm", (X, X), {"out": np.empty((2, 3))}, ValueError, r"out has shape \(2, 3\), expected x.shape"),
    ("gated_rms_norm_backward", (None, X, X), {}, TypeError, "dy is None, expected an array"),
    ("gated_rms_norm_backward", (X, X, None), {}, TypeError, "gate is None, expected an array"),
    ("gated_rms_norm_backward", (X, X, X[:1]), {}, ValueError, r"gate has shape \(1, 4\), expected x.shape"),
    ("gated_rms_norm_backward", (X, X, X), {"norm_before_gate": "no"}, TypeError, "norm_before_gate is 'no', exp"),
    ("gated_rms_norm_backward", (X, X, X), {"out": X}, TypeError, "out is of type ndarray, expected None or a tuple"),
    ("gated_rms_norm_backward", (X, X, X), {"out": (X,)}, TypeError, "out is a tuple of 1, expected .*: dx, dgate"),
    ("gated_rms_norm_backward", (X, X, X), {"out": (None, X[:1])}, ValueError, r"out\[1\] has shape \(1, 4\)"),
    ("gated_rms_norm_backward", (X, X, X), {"out": (X, X)}, ValueError, r"out\[0\] and out\[1\] share memory"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "options", "error", "message"), BAD)
def test_errors(name, arguments, options, error, message):
    for module, backend in ((reference, {}), (rn, {"backend": "reference"})):
        with pytest.raises(error, match=message):
            getattr(module, name)(*arguments, **options, **backend)
