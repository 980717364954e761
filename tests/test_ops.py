"""The descriptions of the operations on plain NumPy arrays, against the reference: no compiler has a part in it."""

from __future__ import annotations

import numpy as np
import pytest
from family import ARGUMENTS, HAVE_P, call, given, ties
from tolerances import DX_ULP, GATED_ULP, Y_ULP, worst_ulp

from rmsnorm_np import reference
from rmsnorm_np.ops import gated, l2
from rmsnorm_np.ops.double import LAYER_NORM_DOUBLE_BACKWARD, RMS_NORM_DOUBLE_BACKWARD
from rmsnorm_np.ops.jvp import LAYER_NORM_JVP, RMS_NORM_JVP
from rmsnorm_np.ops.layer import LAYER_NORM, LAYER_NORM_BACKWARD
from rmsnorm_np.ops.operation import Columns, GradientReads, Reads, Totals
from rmsnorm_np.ops.primitives import Pair, over, plus, reciprocal_root, rounded, times
from rmsnorm_np.ops.quantized import FORMATS, Largest, quantized_rms_norm
from rmsnorm_np.ops.rms import RMS_NORM, RMS_NORM_BACKWARD, Rstd
from rmsnorm_np.ops.rounding import rounding_xhat

L = np.longdouble
OPERATIONS = {"rms": (RMS_NORM, RMS_NORM_BACKWARD), "layer": (LAYER_NORM, LAYER_NORM_BACKWARD)}
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def lifted(record, exact):
    """What an engine hands in: float64, with no rounding error yet."""

    def lift(a):
        a = None if a is None else np.asarray(a, np.float64)
        return Pair(a, None) if exact and a is not None else a

    return type(record)(*map(lift, record))


def each(record, function):
    """The function of each array in nested records."""
    if record is None:
        return None
    if isinstance(record, tuple):
        return type(record)(*(each(item, function) for item in record))
    return function(record)


def element(record, i):
    return each(record, lambda a: a[..., i] if a.ndim else a)


def run(operation, reads, columns, eps, k, exact):
    """An engine in NumPy: element by element, all rows at once. Returns the outputs, and the sums over rows."""
    rows, n = reads[0].shape
    e, c, m = operation.enter(lifted(reads, exact)), lifted(columns, exact), None
    kept = operation.keep is not None and len(reads) > 1 and reads[1] is not None
    if kept:  # rounded, and from there on what was kept
        h = rounded(e).astype(reads[1].dtype)
        e = Pair(h, None) if exact else h.astype(np.float64)
    for stage in operation.stages:
        zero = np.zeros(rows)
        fields = set(stage.Sums._fields) - ({*stage.Sums._field_defaults} if exact else set())
        pairs = exact and not stage.largest
        s = stage.Sums(**{name: Pair(zero, zero) if pairs else zero for name in fields})
        for i in range(k if stage.first_k else n):
            s = stage.add(s, element(e, i), element(c, i), m, None if k == n else np.bool_(i < k))
        m = stage.numbers(s, np.float64(n), np.float64(k), eps if operation.scales else np.float64(eps), m)
    m = each(m, lambda a: np.broadcast_to(a, rows)[:, None])
    outputs = operation.leave(e, m, c, None if k == n else np.arange(n) < k)
    bias = columns[1] if operation.Columns is Columns else None  # others have directions in its place
    totals = Totals(*(None if a is None else np.zeros(n) for a in (columns[0], bias)))
    if operation.share is not None:
        for r in range(rows):
            totals = operation.share(totals, each(e, lambda a, r=r: a[r]), each(m, lambda a, r=r: a[r]))
    return [h if a is None and kept else rounded(a) for a in outputs if a is not None or kept], totals


def arrays(dtype, shape, rng, mean=0.0):
    from rmsnorm_np import _arguments

    dtype = np.dtype(dtype) if dtype != "bfloat16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    _arguments.native_dtype("x", dtype)
    rows, n = shape
    return [
        (a + shift).astype(dtype)
        for a, shift in zip(
            (*rng.standard_normal((4, rows, n)), rng.uniform(0.5, 1.5, n), rng.standard_normal(n)),
            (mean, 0.0, 0.0, 0.0, 0.0, 0.0),
            strict=True,
        )
    ]


CALLS = {
    "weight and bias": ({}, True, True),
    "x alone": ({}, False, False),
    "weight_offset": ({"weight_offset": 0.25}, True, False),
    "eps 0": ({"eps": 0.0}, True, True),
    "a part of the row": ({"p": 0.4}, True, True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("norm", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_description_is_the_reference(norm, dtype, call, residual, rng):
    options, has_weight, has_bias = call
    if norm == "layer" and "p" in options:
        pytest.skip("LayerNorm has no p")
    x, r, dy, dh, weight, bias = arrays(dtype, (6, 33), rng, mean=3.0)
    weight, bias = weight if has_weight else None, bias if has_bias else None
    n, exact = 33, dtype == "float64"
    k = int(np.ceil(n * options.get("p", 1.0)))
    columns = Columns(weight, bias, options.get("weight_offset"))
    forward, backward = OPERATIONS[norm]
    eps = options.get("eps", 1e-6)
    name = f"add_{norm}_norm" if residual else f"{norm}_norm"
    want = getattr(reference, name)(*((x, r) if residual else (x,)), weight, bias, **options)
    with np.errstate(all="ignore"):
        got, _ = run(forward, Reads(x, r if residual else None), columns, eps, k, exact)
    if residual:
        want, h = want
        assert np.array_equal(got[1], h)
        x = h
    else:
        dh = None
    # the reference is rounded itself, by half an ULP
    assert worst_ulp(got[0].astype(x.dtype), want.astype(L)) <= Y_ULP[dtype] + 0.5
    grads = (dy, dh, x) if residual else (dy, x)
    want = getattr(reference, name + "_backward")(*grads, weight, bias, **options)
    with np.errstate(all="ignore"):
        (dx,), totals = run(backward, GradientReads(x, dy, dh), columns, eps, k, exact)
    scale = np.max(np.abs(want.dx.astype(L)), axis=1, keepdims=True)
    assert worst_ulp(dx.astype(x.dtype), want.dx.astype(L), scale) <= DX_ULP[dtype] + 0.5
    for total, gradient in zip(totals, want[1:], strict=True):
        assert (total is None) == (gradient is None)
        if total is not None:
            unit = float(np.max(np.abs(gradient.astype(float)))) * {"bfloat16": 2**-8, "float16": 2**-11}.get(
                dtype, 2**-23
            )
            assert np.max(np.abs(total - gradient.astype(float))) <= (unit if dtype != "float64" else 1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elements_next_to_the_mean(dtype, rng):
    """Rows at 1e6 ± 1: one number for the mean is off by 2.4 ULP in float32, by thousands in float64."""
    x, _, _, _, weight, _ = arrays(dtype, (20, 50), rng, mean=1e6)
    (y,), _ = run(LAYER_NORM, Reads(x), Columns(weight), 1e-6, 50, dtype == "float64")
    want = reference.layer_norm(x, weight)
    assert worst_ulp(y.astype(dtype), want.astype(L)) <= Y_ULP[dtype] + 0.5


# an operation, and the fields of `family.Given` that it reads, and that are its columns
FAMILY = {
    "l2_norm": (l2.L2_NORM, "x", "weight bias"),
    "l2_norm_backward": (l2.L2_NORM_BACKWARD, "x dy", "weight bias"),
    "gated_rms_norm": (gated.NORM_FIRST, "x gate", "weight bias"),
    "gated_rms_norm after": (gated.GATE_FIRST, "x gate", "weight bias"),
    "gated_rms_norm_backward": (gated.NORM_FIRST_BACKWARD, "x gate dy", "weight bias"),
    "gated_rms_norm_backward after": (gated.GATE_FIRST_BACKWARD, "x gate dy", "weight bias"),
    "rms_norm_jvp": (RMS_NORM_JVP, "x v", "weight weight_dot bias_dot"),
    "layer_norm_jvp": (LAYER_NORM_JVP, "x v", "weight weight_dot bias_dot"),
    "rms_norm_double_backward": (RMS_NORM_DOUBLE_BACKWARD, "x dy v", "weight weight_dot bias_dot"),
    "layer_norm_double_backward": (LAYER_NORM_DOUBLE_BACKWARD, "x dy v", "weight weight_dot bias_dot"),
}
# what is None, and options
FAMILY_CALLS = {
    "all": ("", {}),
    "x alone": ("weight bias weight_dot bias_dot", {"p": 0.4}),
    "weight_offset": ("bias bias_dot", {"weight_offset": 0.25, "eps": 0.0}),
    "no direction of x": ("v", {"p": 0.4}),
    "no direction of weight": ("weight_dot bias_dot", {}),
}
FAMILY_CASES = [
    pytest.param(op, absent.split(), options if op in HAVE_P or "p" not in options else {}, id=f"{op}-{name}")
    for op in FAMILY
    for name, (absent, options) in FAMILY_CALLS.items()
    if "direction" not in name or " v" in FAMILY[op][1]
]


def test_the_family_is_complete():
    assert FAMILY.keys() == ARGUMENTS.keys()


@pytest.mark.parametrize(("op", "without", "options"), FAMILY_CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_description_of_the_family_is_the_reference(op, dtype, without, options, rng):
    operation, reads, columns = FAMILY[op]
    g = given(rng, (6, 33), np.dtype(dtype))._replace(**dict.fromkeys(without))
    want = call(op, g, reference, **options)
    k = int(np.ceil(33 * options.get("p", 1.0)))
    offset = options.get("weight_offset")
    with np.errstate(all="ignore"):
        got, totals = run(
            operation, operation.Reads(*(getattr(g, name) for name in reads.split())),
            operation.Columns(*(getattr(g, name) for name in columns.split()), offset),
            options.get("eps", 1e-6), k, dtype == "float64",
        )  # fmt: skip
    named = dict(zip((name for name in operation.Writes._fields if name != "h"), got, strict=True))
    for name, result in want.items():
        if name in ("dweight", "dbias"):
            total = getattr(totals, name)
            assert (result is None) == (total is None)
            if result is not None:
                unit = np.max(np.abs(result)) * (2.0**-23 if dtype == "float32" else 1e-13)
                assert np.max(np.abs(total - result)) <= unit
            continue
        result = result.astype(L)
        size = np.max(np.abs(result), axis=1, keepdims=True)
        found = np.broadcast_to(named["y_dot" if "jvp" in op else name], result.shape)
        # silu is no pair, and the reference is rounded itself, as is NumPy's exponential
        bound = GATED_ULP[op][name] if dtype == "float64" and op in GATED_ULP else Y_ULP[dtype]
        assert worst_ulp(found.astype(dtype), result, size) <= bound + 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "l2_norm", "gated_rms_norm", "gated_rms_norm after"])
def test_description_of_a_rounded_xhat(op, dtype, rng):
    x, gate, _, _, weight, bias = arrays(dtype, (6, 33), rng, mean=0.5)
    operation = {"rms_norm": RMS_NORM, "layer_norm": LAYER_NORM}.get(op) or FAMILY[op][0]
    reads = operation.Reads(x, gate if "gated" in op else None)
    options = {"norm_before_gate": False} if op.endswith("after") else {}
    want = getattr(reference, op.split()[0])(
        *((x, gate) if "gated" in op else (x,)), weight, bias, round_xhat=True, **options
    )
    with np.errstate(all="ignore"):
        (y, *_), _ = run(rounding_xhat(operation, dtype), reads, Columns(weight, bias), 1e-6, 33, False)
    assert np.mean(y.astype(x.dtype) == want) > 0.99  # all but those between two numbers
    (plain, *_), _ = run(operation, reads, Columns(weight, bias), 1e-6, 33, False)
    assert np.mean(plain.astype(x.dtype) == want) < 0.95


@pytest.mark.parametrize("given_scale", [None, 0.02])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FORMATS)
def test_description_of_quantised_rows(name, dtype, given_scale, rng):
    x, _, _, _, weight, bias = arrays(dtype, (6, 33), rng)
    options = {"scale": given_scale} if given_scale else {"scale_ub": 2.0}
    want = reference.quantized_rms_norm(x, weight, bias, dtype=name, **options)
    exact = dtype == "float64"
    operation = quantized_rms_norm(name, given_scale is not None, not exact)
    scale = np.asarray(given_scale or 0, dtype).astype(np.float64)
    (q, *_), _ = run(operation, Reads(x), Columns(weight, bias), (1e-6, scale, 2.0), 33, exact)
    assert np.array_equal(q, want.q.astype(np.float64))


@pytest.mark.parametrize("given_scale", [None, 0.02])
@pytest.mark.parametrize("name", FORMATS)
def test_ties_go_to_the_even_number_of_the_scale_that_is_returned(name, given_scale):
    """y = bias, numbers half-way between two of the format, times a scale with all the digits of a float32."""
    for largest in np.random.default_rng(7).uniform(1, 100, 20).astype(np.float32):
        y, scale, want = ties(name, largest, given_scale)
        operation = quantized_rms_norm(name, given_scale is not None, True)
        settings = (1e-6, np.float64(scale), np.inf)
        x = np.ones((1, len(y)), np.float32)
        (q, *_), _ = run(operation, Reads(x), Columns(np.zeros(len(y)), y), settings, len(y), False)
        assert np.array_equal(q[0], want)
        assert name == "int8" or np.array_equal(np.signbit(q[0]), np.signbit(want))  # which has one zero


@pytest.mark.parametrize("name", FORMATS)
def test_a_nan_and_a_row_of_zeros_have_scales(name):
    to = FORMATS[name]
    own = quantized_rms_norm(name, False, True).stages[1].numbers
    for y, want in ((np.nan, np.nan), (np.inf, np.inf), (0.0, 2.0**-126), (2.0**-126, 2.0**-126)):
        scale = own(Largest(np.float64(y)), None, None, (0.0, None, np.inf), Rstd(np.float64(1.0))).scale
        assert np.array_equal(scale, want, equal_nan=True)
    assert own(Largest(np.float64(9.0)), None, None, (0.0, None, 3.0), Rstd(1.0)).scale == np.float32(3.0 / to.largest)


# ---- pairs


def test_pairs_keep_what_float64_rounds_off(rng):
    a, b = rng.standard_normal((2, 1000)) * 2.0 ** rng.integers(-30, 30, (2, 1000))
    exact = L(a) + L(b)
    for result, want in [
        (plus(Pair(a, None), b), exact),
        (times(Pair(a, None), b), L(a) * L(b)),
        (over(Pair(a, None), b), L(a) / L(b)),
        (reciprocal_root(Pair(np.abs(a), None)), 1 / np.sqrt(L(np.abs(a)))),
    ]:
        assert np.max(np.abs((L(result.head) + L(result.tail) - want) / want)) < 2.0**-62


def test_none_is_absent():
    assert plus(1.0, None) == 1.0
    assert plus(None, 1.0) is None
    assert times(2.0, None) == 2.0
    assert times(None, 2.0) is None


def test_an_infinite_head_is_the_result():
    with np.errstate(all="ignore"):
        assert rounded(times(Pair(np.float64(1e300), None), 1e300)) == np.inf
        assert rounded(over(Pair(np.float64(1.0), None), np.float64(np.inf))) == 0.0
