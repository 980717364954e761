"""Dask arrays: nothing is computed at the call; the bits of the plain call where chunks hold whole rows."""

from __future__ import annotations

import contextlib
import sys

import family
import ml_dtypes
import numpy as np
import pytest
from tolerances import dx_terms, worst_ulp

import rmsnorm_np as rn
from rmsnorm_np import _pieces, _threads, reference

da = pytest.importorskip("dask.array", reason="needs dask: pip install dask[array,distributed]")
dask = sys.modules["dask"]

BF16, L = np.dtype(ml_dtypes.bfloat16), np.longdouble
SHAPE = 6, 10, 48
WHOLE, CUT = (4, 3, 48), (4, 10, 20)  # chunks: rows whole; rows cut into 20, 20 and 8 elements
NORMS = ["rms_norm", "layer_norm", "l2_norm"]
compiled = pytest.mark.engine  # each kernel takes seconds; where rows are cut, NumPy computes, and the reference judges


@pytest.fixture(autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def arrays(rng):
    """x, dy, residual, gate: float32; weight, bias."""
    shapes = [SHAPE] * 4 + [SHAPE[-1:]] * 2
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def cut(a, chunks):
    """A Dask array of these chunks along the axes it has, in whole or as one."""
    return da.from_array(a, tuple(min(c, n) for c, n in zip(chunks[len(chunks) - a.ndim :], a.shape, strict=True)))


def same(got, want):
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def near(got, want, magnitude=0.0):
    """Whether results are those of the plain call, to one neighbour."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    return worst_ulp(got, want.astype(L), magnitude) <= 1.0


def never(*_, **__):
    raise AssertionError("computed")


def exploding(shape, chunks, dtype=np.float32):
    """An array that must not be computed."""
    return da.ones(shape, chunks=chunks, dtype=dtype).map_blocks(never, dtype=dtype, meta=np.empty((0,) * 3, dtype))


# ---- what is lazy


# how many arrays like x the backward function takes
BACKWARD = dict.fromkeys(NORMS, 2) | {"add_rms_norm": 3, "add_layer_norm": 3, "gated_rms_norm": 3}


@pytest.mark.parametrize("chunks", [WHOLE, CUT])
@pytest.mark.parametrize("norm", BACKWARD)
def test_nothing_is_computed_at_the_call(norm, chunks):
    x, weight = exploding(SHAPE, chunks), np.ones(48, np.float32)
    forward = getattr(rn, norm)(*[x] * (1 if norm in NORMS else 2), weight, weight)
    backward = getattr(rn, f"{norm}_backward")(*[x] * BACKWARD[norm], weight, weight)
    results = [*(forward if isinstance(forward, tuple) else [forward]), *backward]
    assert all(isinstance(a, da.Array) for a in results)
    assert {(a.shape, a.dtype) for a in results} == {(SHAPE, np.dtype(np.float32)), ((48,), np.dtype(np.float32))}
    assert all(a.chunks == x.chunks for a in results if a.ndim == 3)
    with pytest.raises(AssertionError, match="computed"):  # or else the test could not fail
        results[0].compute()


def test_the_same_call_has_the_same_keys(arrays):
    """Then Dask computes it once, and finds what it has kept of it."""
    x, weight = cut(arrays[0], CUT), arrays[4]
    assert rn.rms_norm(x, weight, round_xhat=True).name == rn.rms_norm(x, weight, round_xhat=True).name
    assert rn.rms_norm(x, weight).name != rn.rms_norm(x, weight, eps=0.5).name
    assert rn.rms_norm(x, weight).name != rn.layer_norm(x, weight).name
    assert rn.quantized_rms_norm(x).q.name == rn.quantized_rms_norm(x).q.name
    assert rn.quantized_rms_norm(x).q.name != rn.quantized_rms_norm(x, scale_ub=2.0).q.name


def test_a_chunk_is_computed_once_for_all_results(arrays):
    x, dy, *_, weight, bias = arrays
    calls = []

    def counted(block):
        calls.append(None)
        return block

    lazy = cut(x, WHOLE).map_blocks(counted, dtype=x.dtype, meta=x[:0])
    dask.compute(*rn.rms_norm_backward(dy, lazy, weight, bias, weight_offset=1.0))
    assert len(calls) == lazy.npartitions == 8


# ---- results


@pytest.mark.parametrize("norm", ["rms_norm", *(pytest.param(norm, marks=compiled) for norm in NORMS[1:])])
@pytest.mark.parametrize("chunks", [WHOLE, (1, 10, 48), (6, 10, 48), ((0, 6), 5, 48)], ids=str)
def test_whole_rows_have_the_bits_of_the_plain_call(norm, chunks, arrays):
    x, dy, *_, weight, bias = arrays
    lazy, call, options = da.from_array(x, chunks), getattr(rn, norm), {"eps": 1e-3, "weight_offset": 1.0}
    assert same(call(lazy, weight, bias, **options).compute(), call(x, weight, bias, **options))
    backward = getattr(rn, f"{norm}_backward")
    got, want = dask.compute(*backward(dy, lazy, weight, bias, **options)), backward(dy, x, weight, bias, **options)
    assert same(got[0], want[0])
    assert near(got[1], want[1])
    assert near(got[2], want[2])


@pytest.mark.parametrize("chunks", [pytest.param(WHOLE, marks=compiled), CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_residual(norm, chunks, arrays):
    x, dy, residual, dh, weight, bias = arrays
    call, backward = getattr(rn, f"add_{norm}"), getattr(rn, f"add_{norm}_backward")
    plain = {"backend": "reference" if chunks == CUT else "cpu"}
    lazy = cut(x, chunks)
    got, (y, h) = dask.compute(*call(lazy, residual, weight, bias)), call(x, residual, weight, bias, **plain)
    assert same(got[1], h)
    assert near(got[0], y, bias) if chunks == CUT else same(got[0], y)
    got, want = dask.compute(*backward(dy, dh, lazy, weight)), backward(dy, dh, x, weight, **plain)
    assert got[2] is want[2] is None
    assert near(got[0], want[0], np.abs(dh)) if chunks == CUT else same(got[0], want[0])
    assert near(got[1], want[1])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("chunks", [pytest.param(WHOLE, marks=compiled), CUT], ids=["whole", "cut"])
def test_gate(first, chunks, arrays):
    x, dy, gate, _, weight, bias = arrays
    plain = {"backend": "reference" if chunks == CUT else "cpu"}
    lazy, options = cut(x, chunks), {"norm_before_gate": first}
    got, want = (
        rn.gated_rms_norm(lazy, gate, weight, **options).compute(),
        rn.gated_rms_norm(x, gate, weight, **options, **plain),
    )
    assert near(got, want) if chunks == CUT else same(got, want)
    given = gate, weight, bias
    got = dask.compute(*rn.gated_rms_norm_backward(dy, lazy, *given, **options))
    want = rn.gated_rms_norm_backward(dy, x, *given, **options, **plain)
    for j, (a, b) in enumerate(zip(got, want, strict=True)):
        assert near(a, b, np.max(np.abs(b))) if chunks == CUT or j > 1 else same(a, b)


CALLS = {
    "x alone": {"weight": None, "bias": None},
    "part": {"p": 0.4},
    "part of two axes": {"p": 0.4, "axis": (1, 2), "weight": (10, 48), "bias": None},
    "all dtypes": {"dtype": "float64"},
    "rounded xhat": {"round_xhat": True, "dtype": "float16"},
    "no eps": {"eps": 0.0, "weight_offset": 0.25},
    "axis 1": {"axis": 1, "weight": (10,), "bias": (10,)},
    "axes 0 and 2": {"axis": (0, 2), "weight": (6, 48), "bias": None},
    "two axes": {"axis": (1, 2), "weight": (10, 48), "bias": (6, 10, 48)},
    "heads": {"weight": (10, 48), "bias": (48,)},
    "batch": {"weight": (6, 1, 48), "bias": (1, 1, 48)},
    "both": {"weight": (6, 1, 48), "bias": (10, 48)},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize(
    "chunks", [pytest.param((6, 3, 48), marks=compiled), (4, 3, 20)], ids=["whole, but along axis 1", "cut"]
)
def test_arguments(norm, call, chunks, arrays, rng):
    if norm == "layer_norm" and "p" in call:
        pytest.skip("LayerNorm has no p")
    x, dy, options = *arrays[:2], dict(call)
    weight, bias = (
        None if shape is None else rng.standard_normal(shape).astype(np.float32)
        for shape in (options.pop("weight", (48,)), options.pop("bias", (48,)))
    )
    axes = options.get("axis", -1)
    whole = chunks[2] == 48 and axes in (-1, (0, 2))
    plain = {"backend": "cpu" if whole else "reference"}
    largest = 0.0 if bias is None else np.max(np.abs(bias))
    forward, backward = getattr(rn, norm), getattr(rn, f"{norm}_backward")
    chunked = [None if a is None else da.from_array(a, a.shape[:-1] + (20,)) for a in (weight, bias)]
    lazy = cut(x, chunks)
    want = forward(x, weight, bias, **options, **plain)
    for parameters in ((weight, bias), chunked):
        got = forward(lazy, *parameters, **options).compute()
        assert same(got, want) if whole else near(got, want, largest)
    for name in ("dtype", "round_xhat"):
        options.pop(name, None)
    want = backward(dy, x, weight, bias, **options, **plain)
    for parameters in ((weight, bias), chunked):
        got = dask.compute(*backward(dy, lazy, *parameters, **options))
        for j, (a, b) in enumerate(zip(got, want, strict=True)):
            assert (a is None) == (b is None)
            assert a is None or (same(a, b) if whole and j == 0 else near(a, b, np.max(np.abs(b))))


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64], ids=lambda d: np.dtype(d).name)
def test_cut_rows_are_right(norm, dtype, rng):
    """Against the reference, with every piece of another size, rows near 1e3 and other dtypes beside x."""
    x, dy = ((rng.standard_normal((7, 300)) + mean).astype(dtype) for mean in (100.0, 0.0))
    weight, bias = rng.standard_normal((2, 300)).astype(np.float32)
    lazy = da.from_array(x, ((2, 5), (1, 99, 0, 130, 70)))
    got = getattr(rn, norm)(lazy, weight, bias).compute()
    want = getattr(reference, norm)(x, weight, bias)
    assert near(got, want, np.max(np.abs(bias)))
    got = dask.compute(*getattr(rn, f"{norm}_backward")(dy, lazy, weight, bias))
    want = getattr(reference, f"{norm}_backward")(dy, x, weight, bias)
    centred = norm == "layer_norm"
    wide = x.astype(L) - (x.astype(L).mean(axis=1, keepdims=True) if centred else 0)
    rstd = 1 / np.sqrt(np.mean(wide * wide, axis=1, keepdims=True) + 1e-6)
    terms = dx_terms(dy.astype(L) * weight, wide * rstd, rstd, 300, centred=centred)
    assert near(got[0], want[0], terms)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert near(a, b, np.max(np.abs(b)))


DERIVATIVES = ["rms_norm_jvp", "layer_norm_jvp", "rms_norm_double_backward", "layer_norm_double_backward"]


@pytest.mark.parametrize("left_out", [(), ("v",), ("weight_dot", "bias_dot"), ("weight", "weight_dot")], ids=str)
@pytest.mark.parametrize("chunks", [pytest.param(WHOLE, marks=compiled), CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("op", DERIVATIVES)
def test_derivatives(op, chunks, left_out, rng):
    """Each result is off by no more than an ULP of its largest; a plain array beside a Dask array is as good as one."""
    plain = family.given(rng, SHAPE, np.float32, (10,))._replace(gate=None, **dict.fromkeys(left_out))
    lazy = plain._replace(
        x=cut(plain.x, chunks), weight_dot=plain.weight_dot if left_out else da.asarray(plain.weight_dot)
    )
    options = {"weight_offset": 0.25 if plain.weight is not None else 0.0} | (
        {"p": 0.4} if op.startswith("rms") else {}
    )
    want = family.call(op, plain, backend="reference" if chunks == CUT else "cpu", **options)
    found = family.call(op, lazy, **options)
    assert found.keys() == want.keys()
    for name, got in zip(found, dask.compute(*found.values()), strict=True):
        if want[name] is None:
            assert got is None
        elif chunks == WHOLE and name != "dweight":
            assert same(got, want[name])
        else:
            assert near(got, want[name], np.max(np.abs(want[name])))


@pytest.mark.parametrize("op", DERIVATIVES)
def test_derivatives_are_lazy(op):
    x = exploding(SHAPE, CUT)
    given = family.Given(x, None, x, x, *np.ones((4, 48), np.float32))
    results = [a for a in family.call(op, given).values() if a is not None]
    assert all(isinstance(a, da.Array) and a.dtype == np.float32 for a in results)
    assert [a.shape for a in results] == [SHAPE, SHAPE, (48,)][: len(results)]


QUANTIZED = {
    "own scale": {"weight": True, "bias": True},
    "x alone": {},
    "bound": {"scale_ub": 1.5, "p": 0.4},
    "one scale": {"scale": 0.02},
    "scales": {"scale": "plain", "weight": True},
    "lazy scales": {"scale": "lazy"},
    "residual": {"residual": True, "weight": True, "weight_offset": 1.0},
    "axis 1": {"axis": 1, "weight": 10},
}


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("options", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("chunks", [pytest.param(WHOLE, marks=compiled), CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=compiled)])
def test_8_bits(dtype, chunks, options, name, arrays, rng):
    """q and h are bit for bit those of the plain call, and the scales too where they are float32."""
    x, residual = (a.astype(dtype) for a in arrays[:2])
    options = {"dtype": name, **options}
    for key in {"weight", "bias"} & options.keys():
        options[key] = rng.standard_normal(48 if options[key] is True else options[key]).astype(np.float32)
    if options.get("residual"):
        options["residual"] = residual
    beside = dict(options)
    if isinstance(scale := options.get("scale"), str):
        options["scale"] = beside["scale"] = rng.uniform(0.01, 0.05, (6, 1, 1)).astype(dtype)
        if scale == "lazy":
            beside["scale"] = da.from_array(options["scale"], 2)
    got = rn.quantized_rms_norm(cut(x, chunks), **beside)
    assert all(isinstance(a, da.Array) for a in got if a is not None)
    q, scale, h = dask.compute(*got)
    want = rn.quantized_rms_norm(x, **options, backend="reference" if chunks == CUT else "cpu")
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (got.q.dtype, got.q.shape, got.scale.dtype, got.scale.shape)
    assert same(q, want.q)
    assert same(scale, want.scale) if dtype == np.float32 else near(scale, want.scale)
    assert h is want.h is None or same(h, want.h)


@pytest.mark.parametrize("chunks", [pytest.param((2, 48), marks=compiled), (4, 13), (4, (0, 48))], ids=str)
def test_8_bits_of_rows_with_nan_and_infinity(chunks, rng):
    x = rng.standard_normal((9, 48)).astype(np.float32)
    x[2, 5], x[4, 40], x[7] = np.nan, np.inf, 0.0
    q, scale, _ = dask.compute(*rn.quantized_rms_norm(da.from_array(x, chunks)))
    want = reference.quantized_rms_norm(x)
    assert same(q, want.q)
    assert np.array_equal(scale, want.scale, equal_nan=True)


@pytest.mark.parametrize("chunks", [pytest.param(WHOLE, marks=compiled), CUT], ids=["whole", "cut"])
def test_scales_of_a_dask_array_are_checked_when_they_are_there(chunks, arrays):
    scales = da.from_array(np.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0], np.float32).reshape(6, 1, 1), 3)
    q = rn.quantized_rms_norm(cut(arrays[0], chunks), scale=scales).q
    with pytest.raises(ValueError, match=r"scale has the value 0\.0 in float32, expected finite numbers > 0"):
        q.compute()


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_long_pieces(norm, rng):
    """A piece is computed some elements at a time."""
    n = _pieces.AT_ONCE + 100
    x = rng.standard_normal((2, n + 7)).astype(np.float32)
    lazy = da.from_array(x, (2, n))
    assert near(getattr(rn, norm)(lazy).compute(), getattr(reference, norm)(x))


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_cut_rows_next_to_their_mean(norm, rng):
    x = (1e6 + rng.standard_normal((5, 64))).astype(np.float32)
    assert near(getattr(rn, norm)(da.from_array(x, (5, 7))).compute(), getattr(reference, norm)(x))
    constant = np.full((2, 64), 3.1, np.float32)
    assert not getattr(rn, norm)(da.from_array(constant, (2, 7))).compute().any() or norm == "rms_norm"


@pytest.mark.skipif(np.finfo(L).maxexp < 2000, reason="longdouble has no more range than float64")
@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_cut_rows_of_any_size(size, rng):
    x = rng.standard_normal((3, 40)) * size
    for call in (rn.rms_norm, rn.layer_norm):
        assert near(call(da.from_array(x, (3, 11)), eps=0.0).compute(), call(x, eps=0.0, backend="reference"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("chunks", [pytest.param((2, 48), marks=compiled), (4, 13)], ids=["whole", "cut"])
def test_nan_and_infinity_stay_in_their_rows(norm, chunks, rng):
    x, dy = rng.standard_normal((2, 9, 48)).astype(np.float32)
    x[2, 5], x[4, 40], x[7, 0] = np.nan, np.inf, -np.inf
    lazy = da.from_array(x, chunks)
    want = getattr(reference, norm)(x)
    got = getattr(rn, norm)(lazy).compute()
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert near(got, want)
    got = getattr(rn, f"{norm}_backward")(dy, lazy).dx.compute()
    want = getattr(reference, f"{norm}_backward")(dy, x).dx
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert near(got, want, np.nanmax(np.abs(want)))


def test_nan_outside_the_part_stays_outside(rng):
    x = rng.standard_normal((2, 48)).astype(np.float32)
    x[0, 40] = np.nan
    y = rn.rms_norm(da.from_array(x, (2, 13)), p=0.5).compute()
    assert np.flatnonzero(np.isnan(y)).tolist() == [40]


@pytest.mark.parametrize("chunks", [((0, 3, 0), 8), ((1, 2), (0, 5, 3))], ids=["rows", "elements"])
def test_empty_chunks(chunks, rng):
    x, weight = rng.standard_normal((3, 8)).astype(np.float32), np.ones(8, np.float32)
    lazy, given = da.from_array(x, chunks), (weight, weight)
    got, want = (call(a, *given, weight_offset=1.0) for call, a in ((rn.rms_norm, lazy), (reference.rms_norm, x)))
    assert near(got.compute(), want, 1.0)
    got = dask.compute(*rn.rms_norm_backward(lazy, lazy, *given, weight_offset=1.0))
    assert near(got[1], reference.rms_norm_backward(x, x, *given, weight_offset=1.0).dweight, 1.0)


@pytest.mark.parametrize("chunks", [((0,), 8), ((0, 0), (5, 3))], ids=["whole", "cut"])
def test_no_rows(chunks):
    x, weight = da.from_array(np.empty((0, 8), np.float32), chunks), np.ones((8,), np.float32)
    given, options = (weight, weight), {"weight_offset": 1.0}
    assert rn.rms_norm(x, *given, **options).compute().shape == (0, 8)
    assert not np.any(rn.rms_norm_backward(x, x, *given, **options).dweight.compute())


@pytest.mark.parametrize("chunks", [(1, 2), (1, 1)], ids=["whole", "cut"])
def test_dweight_is_summed_in_float64(chunks):
    """In float32, 1e8 would swallow the ones of all other chunks; in float16 it would be infinite on the way."""
    dy = np.ones((101, 2), np.float32)
    dy[0], dy[-1] = 1e8, -1e8
    x, weight = da.from_array(np.ones((101, 2), np.float32), chunks), np.ones(2, np.float32)
    for dtype in (np.float32, np.float16):
        dbias = rn.rms_norm_backward(dy, x, weight, weight.astype(dtype), weight_offset=1.0).dbias.compute()
        assert same(dbias, np.full(2, 99, dtype))


def test_integers_and_lists_become_float64():
    x = np.arange(12).reshape(3, 4)
    assert near(rn.rms_norm(da.from_array(x, (2, 2)), [1, 2, 3, 4]).compute(), reference.rms_norm(x, [1, 2, 3, 4]))


def test_a_norm_with_parameters_takes_dask_arrays(arrays):
    x, weight, bias = arrays[0], *arrays[4:]
    norm = rn.RMSNorm(weight, bias, weight_offset=1.0)
    assert same(norm(cut(x, WHOLE)).compute(), rn.rms_norm(x, weight, bias, weight_offset=1.0))


# ---- errors

X = np.ones((2, 4), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: rn.rms_norm(x, out=X), TypeError, "out is given, expected None where x is a dask array"),
        (lambda x: rn.rms_norm_backward(x, x, out=X), TypeError, "out is given, expected None where x is a dask array"),
        (lambda x: rn.rms_norm_backward(x, x, x[0], out=(X, None, None)), TypeError, "out is given, expected None"),
        (lambda x: rn.rms_norm(x, reduce=np.copy), ValueError, "reduce is given, expected None where x is a dask"),
        (lambda x: rn.add_rms_norm(x, x, residual_out=X), TypeError, "residual_out is given, expected None"),
        (lambda x: rn.add_rms_norm_backward(x, x, x, out=X), TypeError, "expected None where h is a dask array"),
        (lambda x: rn.rms_norm(x, np.ones(3)), ValueError, r"weight has shape \(3,\), expected \(4,\)"),
        (lambda x: rn.rms_norm(x, da.ones(3)), ValueError, r"weight has shape \(3,\), expected \(4,\)"),
        (lambda x: rn.rms_norm_backward(X[:1], x), ValueError, r"dy has shape \(1, 4\), expected x.shape \(2, 4\)"),
        (lambda x: rn.rms_norm(x.astype(complex)), TypeError, "x has dtype complex128"),
        (lambda x: rn.rms_norm(x, eps=-1), ValueError, "eps is -1"),
        (lambda x: rn.rms_norm(x, axis=2), ValueError, "axis is 2"),
        (lambda x: rn.rms_norm(x, dtype="int8"), TypeError, "dtype is 'int8'"),
        (lambda x: rn.rms_norm(x, backend="reference"), ValueError, "backend is 'reference', expected None where x is"),
        (lambda x: rn.rms_norm(x[x[:, 0] > 0]), ValueError, r"x has chunks of unknown size.*x.compute_chunk_sizes\(\)"),
        (lambda x: rn.rms_norm(x.map_blocks(np.ma.asarray)), TypeError, "x is a dask array of MaskedArray"),
        (lambda x: rn.rms_norm(dask.delayed(X)), TypeError, "x is of type Delayed.*, expected a dask array"),
        (lambda x: rn.rms_norm(X, x[0]), TypeError, r"weight is a dask array, expected an ndarray.*weight.compute\(\)"),
        (lambda x: rn.rms_norm_backward(x, X), TypeError, "dy is a dask array, expected an ndarray"),
        (lambda x: reference.rms_norm(x), TypeError, "x is a dask array, expected an ndarray"),
        (lambda x: rn.rms_norm_jvp(x, None, None, X[:1], None, None), ValueError, "x_dot has shape"),
        (lambda x: rn.rms_norm_jvp(x, None, None, x, X[0], None), ValueError, "weight_dot is given.* without a weight"),
        (lambda x: rn.rms_norm_jvp(x, X[0], None, x, X, None), ValueError, "weight_dot has shape"),
        (lambda x: rn.rms_norm_jvp(x, None, None, x, None, None, out=X), TypeError, "out is given, expected None"),
        (lambda x: rn.quantized_rms_norm(x, out=X.astype("int8")), TypeError, "out is given, expected None where x is"),
        (lambda x: rn.quantized_rms_norm(x, scale=da.ones(3)), ValueError, r"scale has shape \(3,\)"),
        (lambda x: rn.quantized_rms_norm(x, scale=[0.0]), ValueError, "scale has the value 0.0"),
        (lambda x: rn.quantized_rms_norm(x, scale=da.ones(1, dtype=complex)), TypeError, "scale has dtype complex128"),
    ],
)  # fmt: skip
def test_errors_are_raised_at_the_call(call, error, message):
    with pytest.raises(error, match=message):
        call(da.from_array(X, (1, 4)))


# ---- threads, processes, memory


def test_tasks_share_the_threads(monkeypatch, arrays):
    from rmsnorm_np.dask import tasks

    monkeypatch.setattr(_threads, "_requested", 4)
    assert tasks._own_threads() == 4
    seen = []
    x = da.ones((4, 8), chunks=(1, 8)).map_blocks(lambda a: seen.append(tasks._own_threads()) or a, meta=X)
    with dask.config.set(scheduler="threads", num_workers=2):
        x.compute()
    assert set(seen) == {2}
    with _threads.at_most(3):
        assert rn.get_num_threads() == 3
        with _threads.at_most(1):
            assert rn.get_num_threads() == 1
        assert rn.get_num_threads() == 3
    assert rn.get_num_threads() == 4


def test_threads_give_the_same_bits(arrays):
    x, dy, *_, weight, bias = arrays
    made = [
        *rn.layer_norm_backward(dy, cut(x, CUT), weight, bias),
        *rn.rms_norm_backward(dy, cut(x, WHOLE), weight, bias),
    ]
    want = dask.compute(*made)
    got = dask.compute(*made, scheduler="threads", num_workers=3)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def cluster():
    """cluster(workers): a client of so many worker processes."""
    distributed = pytest.importorskip("distributed", reason="needs distributed: pip install dask[distributed]")
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set({"scheduler": None, "distributed.comm.timeouts.connect": 60}))

        def start(workers):
            options = {"n_workers": workers, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
            local = stack.enter_context(distributed.LocalCluster(memory_limit=MEMORY, **options))
            return stack.enter_context(distributed.Client(local))

        yield start


MEMORY = 512 << 20  # of a worker, of which Python, Numba and a kernel's compilation take 300 MB


@pytest.mark.engine
def test_worker_processes_give_the_same_bits(cluster, arrays):
    x, dy, *_, weight, bias = arrays
    client = cluster(2)
    for chunks in (WHOLE, CUT):
        lazy = cut(x, chunks)
        made = [rn.rms_norm(lazy, weight, round_xhat=True), *rn.layer_norm_backward(dy, lazy, weight, bias)]
        made += [*rn.quantized_rms_norm(lazy)[:2], rn.rms_norm_jvp(lazy, weight, None, dy, bias, None)]
        got = [future.result() for future in client.compute(made)]
        assert all(same(a, b) for a, b in zip(got, dask.compute(*made, scheduler="synchronous"), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 512], ids=["whole", "cut"])
def test_ten_times_the_memory_of_a_worker(cluster, length):
    """y, dx and dweight of an array that is made chunk by chunk, and of which sums are kept alone."""
    n, rows = 2048, 10 * MEMORY // 4 // 2048
    x = da.random.default_rng(0).random((rows, n), dtype=np.float32, chunks=(2048, length))
    assert x.nbytes == 10 * MEMORY
    weight = np.full(n, 0.5, np.float32)
    y, grads = rn.rms_norm(x, weight), rn.rms_norm_backward(x, x, weight)
    wanted = [(y.astype(np.float64) ** 2).mean(), abs(grads.dx).max(), grads.dweight]
    square, largest, dweight = (future.result() for future in cluster(1).compute(wanted))
    assert abs(square - 0.25) < 1e-5
    assert largest < 1e-3  # y grows along x only as far as eps lets it
    assert np.all(np.abs(dweight / np.mean(dweight, dtype=np.float64) - 1.0) < 0.05)
