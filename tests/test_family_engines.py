"""The functions beside the norms on the CPU engine: against longdouble, at the borders of the kernels; the same bits.

Each kernel takes seconds to compile: the shapes of a case are in one test, and nearly all tests are for --engine.
"""

from __future__ import annotations

import ml_dtypes
import numba
import numpy as np
import pytest
from conftest import DTYPES
from family import ARGUMENTS, HAVE_P, ROWS, bound_of, call, exact, given, silu, ties, with_heads
from tolerances import (
    BEFORE_ROUNDING,
    GATE_BEFORE_ROUNDING,
    GATED_ULP,
    LONGDOUBLE_IS_WIDER,
    SCALE_ULP,
    Y_ULP,
    parameter_tolerance,
    worst_ulp,
)

import rmsnorm_np as rn

L = np.longdouble
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

pytestmark = pytest.mark.skipif(not LONGDOUBLE_IS_WIDER, reason="longdouble is float64 here: nothing to judge by")

# The borders of the kernels: see `test_engines`. No rows; one element; less than a vector; whole blocks and masks;
# three segments; parallel from 32768 elements on.
SHAPES = [(0, 33), (1, 1), (3, 7), (1, 1000), (65, 33), (1000, 7), (65, 1000), (3, 4099)]
FIRST_TIER = ["gated_rms_norm", "rms_norm_jvp"]


def operations(*dtypes, of=tuple(ARGUMENTS), first_tier=()):
    """Parameters op and dtype; only those of the first tier, in float32, need no --engine."""
    cases = [(op, np.dtype(dtype)) for op in of for dtype in dtypes]
    return pytest.mark.parametrize(
        ("op", "dtype"),
        [pytest.param(op, kind, id=f"{op}-{kind}", marks=_tiers(op, kind, first_tier)) for op, kind in cases],
    )


def _tiers(op, kind, first_tier):
    """float16 has the formulas and the path of bfloat16, and half of its range: for a release."""
    if op in first_tier and kind == np.float32:
        return []
    return [pytest.mark.engine, *[pytest.mark.slow] * (kind == np.float16)]


def assert_exact(op, g, eps=1e-6, p=1.0, weight_offset=0.0, **options):
    """Rows (rows, n), parameters (n,) or (heads, n): row r has row r % heads."""
    shape, dtype = g.x.shape, g.x.dtype
    spread = [None if a is None else np.resize(a, shape) if len(g.x) else a for a in g[4:]]
    with np.errstate(all="ignore"):
        want = exact(op, type(g)(*g[:4], *spread), eps, p, weight_offset)
    if p < 1.0:
        options["p"] = p
    copies = [None if a is None else a.tobytes() for a in g]
    got = call(op, with_heads(g), eps=eps, weight_offset=weight_offset, **options)
    assert copies == [None if a is None else a.tobytes() for a in g]
    for name, (value, terms) in want.rows.items():
        assert got[name].dtype == dtype
        found = worst_ulp(got[name].reshape(shape), value, terms)
        assert found <= bound_of(op, name, dtype), f"{name} of {shape} is off by {found} ULP"
    for name, sums in want.sums.items():
        parameter = getattr(g, name[1:])
        assert (got[name] is None) == (parameter is None)
        if parameter is None:
            continue
        assert (got[name].shape, got[name].dtype) == (parameter.shape, parameter.dtype)
        value, size = (a.reshape(-1, *parameter.shape).sum(axis=0) for a in sums)
        rows = len(g.x) * g.x.shape[1] // parameter.size
        # silu, and the numbers of the second derivative, are products of some factors, each with roundings of its own
        term = None if op.startswith("l2") else 2.0**-48
        tolerance = parameter_tolerance(value, size, rows, dtype, got[name].dtype, term)
        assert np.all(np.abs(got[name].astype(L) - value) <= tolerance), f"{name} of {shape}"


@operations(*DTYPES, first_tier=FIRST_TIER)
def test_results_are_exact(op, dtype, rng):
    for shape in SHAPES:
        assert_exact(op, given(rng, shape, dtype))
    for shape in ((12, 33), (2000, 33)):
        assert_exact(op, given(rng, shape, dtype, heads=(4,)))


# three kernels for each
@operations(np.float32, of=("l2_norm", "gated_rms_norm_backward", "rms_norm_jvp", "layer_norm_double_backward"))
def test_parameters_that_are_absent(op, dtype, rng):
    """Without any; with one of each kind, an offset, and, where there is one, a part of the row in the RMS."""
    p = 0.3 if op in HAVE_P else 1.0
    for shape in ((3, 7), (65, 33), (3, 4099)):
        g = given(rng, shape, dtype)
        assert_exact(op, g._replace(weight=None, bias=None, weight_dot=None, bias_dot=None))
        assert_exact(op, g._replace(bias=None, bias_dot=None), p=p, weight_offset=0.5)
        assert_exact(op, g._replace(weight=None, weight_dot=None), p=p)


@pytest.mark.engine
@pytest.mark.parametrize("op", [op for op in ARGUMENTS if "jvp" in op or "double" in op])
def test_tangents_that_are_absent(op, rng):
    """v, or all but v, or all: then the result is zero."""
    g = given(rng, (5, 33), np.dtype(np.float32))
    assert_exact(op, g._replace(v=None))
    assert_exact(op, g._replace(weight_dot=None, bias_dot=None))
    g = g._replace(v=None, weight_dot=None, bias_dot=None)
    for name, result in call(op, g).items():
        assert result.shape == (g.weight if name == "dweight" else g.x).shape
        assert not result.any()


@pytest.mark.engine
@pytest.mark.parametrize("op", ["gated_rms_norm", "gated_rms_norm_backward after", "rms_norm_jvp",
                                "layer_norm_double_backward", "l2_norm_backward"])  # fmt: skip
def test_long_rows(op, rng):
    """More than 65,536 elements have kernels of their own; they are as exact, and their bits are the same."""
    g = given(rng, (3, 70001), np.dtype(np.float32))
    assert_exact(op, g)
    alone = call(op, g._replace(**{name: getattr(g, name)[1:2] for name in ROWS}))
    for name, result in call(op, g).items():
        if "weight" not in name and "bias" not in name:
            assert result[1:2].tobytes() == alone[name].tobytes()


# -------------------------------------------------------------------------------------------------- ends of the range


# x and v, and dy: of five rows, far from 1 on both sides, subnormal, and ordinary ones between them; where x is small,
# dy is such that its gradient is in range
ENDS = {
    "float64": ([1e300, 1.0, 1e-300, 1.0, 1e-310], [1.0, 1.0, 1e-20, 1.0, 1e-20]),
    "float32": ([1e38, 1.0, 1e-36, 1.0, 1e-40], [1.0, 1.0, 1e-5, 1.0, 1e-5]),
    "bfloat16": ([1e38, 1.0, 1e-36, 1.0, 1e-39], [1.0, 1.0, 1e-5, 1.0, 1e-5]),
}


@operations(np.float64, np.float32, BFLOAT16)
def test_rows_at_the_ends_of_the_range(op, dtype, rng):
    g = given(rng, (5, 33), np.float64)
    sizes, dy_sizes = (np.reshape(size, (5, 1)) for size in ENDS[dtype.name])
    x, v = (np.clip(a, -1.7, 1.7) * sizes for a in (g.x, g.v))
    g = g._replace(x=x, v=v, dy=g.dy * dy_sizes)
    g = type(g)(*(a.astype(dtype) for a in g))
    assert_exact(op, g, eps=0.0)
    together = call(op, g, eps=0.0)
    for r in range(5):
        alone = g._replace(**{name: getattr(g, name)[r : r + 1] for name in ROWS})
        assert_exact(op, alone, eps=0.0)
        assert same_rows(call(op, alone, eps=0.0), together, slice(r, r + 1))


def same_rows(some, all_rows, rows):
    """Whether results are those of these rows; gradients of parameters are of all rows."""
    names = [name for name in some if name not in ("dweight", "dbias")]
    return all(some[name].tobytes() == all_rows[name][rows].tobytes() for name in names)


GATES = [0.0, -0.0, 1e-3, -1.278, 11.0, -11.0, 104.0, -104.0, 800.0, -800.0, 1e4, -1e4]


@operations(*DTYPES, of=[op for op in ARGUMENTS if op.startswith("gated")], first_tier=FIRST_TIER)
def test_large_gates(op, dtype, rng):
    """No NaN, and no infinity where the exact result is none."""
    largest = 1e300 if dtype == np.float64 else float(ml_dtypes.finfo(dtype).max) / 64
    gates = np.array([*GATES, largest, -largest, -largest])
    g = given(rng, (4, len(gates)), dtype)
    g = g._replace(gate=np.stack([gates, gates[::-1], np.abs(gates), -np.abs(gates)]).astype(dtype))
    g = g._replace(x=(g.x.astype(float) / 8).astype(dtype), dy=(g.dy.astype(float) / 8).astype(dtype))
    assert_exact(op, g, eps=1.0)
    for result in call(op, g, eps=1.0).values():
        assert not np.isnan(result.astype(np.float64)).any()


@pytest.mark.engine
@pytest.mark.parametrize("op", [op for op in ARGUMENTS if op.startswith("gated")])
def test_gates_that_take_a_row_out_of_the_range(op, rng):
    """The squares of x · silu(gate) are zero or infinite, though those of x are not; beside an ordinary row."""
    g = given(rng, (5, 33), np.float64)
    g = g._replace(gate=np.abs(g.gate) * [[1.0], [1e160], [1e280], [-1.0], [1.0]] - [[0], [0], [0], [600], [0]])
    g.x[2:4] *= [[1e-200], [1e100]]
    g.dy[1:4] *= 1e-30
    assert_exact(op, g, eps=0.0)


# ------------------------------------------------------------------------------------------------------------ same bits

PLACES = {"x": (1, 2), "gate": (3, 0), "dy": (5, 6), "v": (7, 3)}


@operations(np.float32, np.float64, BFLOAT16, first_tier=FIRST_TIER)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_row(op, dtype, bad, rng):
    g = given(rng, (9, 33), dtype)
    clean = call(op, g)
    for name, place in PLACES.items():
        if name not in ARGUMENTS[op].split():
            continue
        a = getattr(g, name).copy()
        a[place] = bad
        for one, result in call(op, g._replace(**{name: a})).items():
            if one in ("dweight", "dbias"):
                continue
            others = np.arange(9) != place[0]
            assert result[others].tobytes() == clean[one][others].tobytes()
            if (one, name) != ("ddy", "dy"):  # which does not depend on it
                silent = np.isfinite(result[place[0]].astype(np.float64)).all()
                assert not silent, f"{one} does not show {bad} of {name}"


@operations(np.float32, np.float64, BFLOAT16, first_tier=FIRST_TIER)
def test_bits_are_those_of_any_batch_layout_and_number_of_threads(op, dtype, rng):
    """77 rows of 1003 are enough for several threads, with blocks, parts and a tail."""
    g = given(rng, (77, 1003), dtype)
    want = call(op, g)
    before = rn.get_num_threads()
    try:
        rn.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS) if before == 1 else 1)
        assert same(call(op, g), want)
    finally:
        rn.set_num_threads(before)
    for rows in (slice(0, 1), slice(38, 41), slice(76, 77)):
        some = g._replace(**{name: getattr(g, name)[rows] for name in ROWS})
        assert same_rows(call(op, some), want, rows)
    columns = g._replace(**{name: np.asfortranarray(getattr(g, name)) for name in ROWS})
    assert same(call(op, columns), want)
    apart = g._replace(**{name: getattr(g, name).T for name in ROWS})  # axis 0 of the transposed
    assert same({name: a.T if a.ndim == 2 else a for name, a in call(op, apart, axis=0).items()}, want)


@operations(np.float32, first_tier=FIRST_TIER)
def test_results_go_where_out_says(op, dtype, rng):
    """Into arrays of any layout, and over each of the inputs; two at once."""
    g = given(rng, (6, 33), dtype)
    want = call(op, g)
    outputs = [name for name in want if name not in ("dweight", "dbias")]
    inputs = [name for name in ARGUMENTS[op].split() if name in ROWS]
    together = len(outputs) == 2

    def check(g, *outs):
        got = call(op, g, out=outs if together else outs[0])
        assert same(got, want)
        for name, out in zip(outputs, outs, strict=True):
            assert out is None or got[name] is out

    strided = np.zeros((6, 70), dtype)[:, 2:68:2]
    for name in inputs:
        for last in (strided, None):
            own = g._replace(**{name: getattr(g, name).copy()})
            check(own, getattr(own, name), *(last,) * together)
        if together:
            own = g._replace(**{name: getattr(g, name).copy()})
            check(own, None, getattr(own, name))
    if together:
        own = g._replace(**{name: getattr(g, name).copy() for name in inputs})
        for first, second in zip(inputs, inputs[1:] + inputs[:1], strict=True):
            again = g._replace(**{name: getattr(g, name).copy() for name in inputs})
            check(again, getattr(again, first), getattr(again, second))
    check(g, np.asfortranarray(np.zeros((6, 33), dtype)), *(strided,) * together)
    for name in ARGUMENTS[op].split():
        if name not in ROWS:  # the third row of out
            memory = np.zeros((6, 33), dtype)
            memory[2] = getattr(g, name)
            check(g._replace(**{name: memory[2]}), memory, *(None,) * together)


def same(some, others):
    return all(
        a is b is None or (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in zip(some.values(), others.values(), strict=True)
    )


# ------------------------------------------------------------------------------------------------- dtype, round_xhat

Y_DTYPES = [(np.float32, BFLOAT16), (BFLOAT16, np.float32), (np.float64, np.float32), (np.float16, np.float64)]
FORWARD = ["rms_norm", "layer_norm", "l2_norm", "gated_rms_norm", "gated_rms_norm after"]


def _with_y_dtypes():
    """(op, dtype of x, dtype of y): all of them of one operation; for a release, of all."""
    for op in FORWARD:
        for x_dtype, y_dtype in Y_DTYPES:
            marks = [pytest.mark.engine, *[pytest.mark.slow] * (np.float64 in (x_dtype, y_dtype) and op != "l2_norm")]
            names = np.dtype(x_dtype).name, np.dtype(y_dtype).name
            yield pytest.param(op, x_dtype, y_dtype, marks=marks, id="-".join((op, *names)))


@pytest.mark.parametrize(("op", "x_dtype", "y_dtype"), list(_with_y_dtypes()))
def test_y_in_another_dtype(op, x_dtype, y_dtype, rng):
    """At the borders of the kernels; `test_family_arguments` has each pair of dtypes."""
    x_dtype, y_dtype = np.dtype(x_dtype), np.dtype(y_dtype)
    for shape in SHAPES:
        g = given(rng, shape, x_dtype)
        with np.errstate(all="ignore"):
            value, terms = y_of(op, g)
        y = call_forward(op, g, dtype=y_dtype)
        assert y.dtype == y_dtype
        bound = GATED_ULP[op]["y"] if op in GATED_ULP and y_dtype == np.float64 else Y_ULP[y_dtype.name]
        found = worst_ulp(y, value, terms)
        assert found <= bound, f"{shape} is off by {found} ULP"
    # an extreme row, whose place is among ordinary ones
    g = given(rng, (5, 33), np.float64)
    g.x[2] *= 1e-6 if x_dtype == np.float16 else 1e-36 if x_dtype.itemsize < 8 else 1e-300
    g = type(g)(*(a.astype(x_dtype) for a in g))
    value, terms = y_of(op, g, 0.0)
    assert worst_ulp(call_forward(op, g, eps=0.0, dtype=y_dtype), value, terms) <= bound


def call_forward(op, g, **options):
    if op.startswith(("rms", "layer")):
        return getattr(rn, op)(g.x, g.weight, g.bias, **options)
    return call(op, g, **options)["y"]


def xhat_of(op, g, eps=1e-6):
    """The exact xhat, and silu(gate) where that is a factor of y."""
    x = g.x.astype(L)
    s = np.ones_like(x)
    if op.startswith("gated"):
        s = silu(g.gate.astype(L))[0]
    if op == "gated_rms_norm after":
        x, s = x * s, np.ones_like(x)
    if op == "layer_norm":
        for _ in range(2):
            x = x - x.sum(axis=1, keepdims=True) / x.shape[1]
    divisor = 1 if op == "l2_norm" else x.shape[1]
    return x / np.sqrt((x * x).sum(axis=1, keepdims=True) / divisor + L(eps)), s


def y_of(op, g, eps=1e-6):
    xhat, s = xhat_of(op, g, eps)
    term = xhat * g.weight.astype(L)
    return (term + g.bias.astype(L)) * s, np.maximum(np.abs(term), np.abs(g.bias.astype(L))) * np.abs(s)


@operations(*DTYPES, of=FORWARD)
def test_xhat_is_rounded_once_and_so_is_y(op, dtype, rng):
    """The same bits as from the exact xhat, but where that, or y, lies in the middle between two numbers."""
    undecided = total = 0
    for shape in ((65, 33), (1, 1000), (40, 1000)):
        g = given(rng, shape, dtype)
        y = call_forward(op, g, round_xhat=True)
        xhat, s = xhat_of(op, g)
        # silu is in u, and in rstd (`after`), or a factor of y
        loose = GATE_BEFORE_ROUNDING[dtype.name] if op.startswith("gated") else 0.0
        candidates = []
        for way in (-1, 1):
            near = (xhat * (1 + way * (BEFORE_ROUNDING[dtype.name] / 16 + loose))).astype(dtype).astype(L)
            exact_y = (near * g.weight.astype(L) + g.bias.astype(L)) * s
            sizes = (np.abs(near * g.weight.astype(L)) + np.abs(g.bias.astype(L))) * np.abs(s)
            for other in (-1, 1):
                candidates.append((exact_y + other * sizes * (BEFORE_ROUNDING[dtype.name] + loose)).astype(dtype))
        wide = np.array([one.astype(L) for one in candidates])
        found = (wide.min(axis=0) <= y.astype(L)) & (y.astype(L) <= wide.max(axis=0))
        assert found.all(), f"{(~found).sum()} of {shape}"
        undecided += np.any([candidates[0] != one for one in candidates[1:]], axis=0).sum()
        total += y.size
    if dtype != np.float64:
        assert undecided <= 1e-3 * total


# ---------------------------------------------------------------------------------------------------------- quantised

FORMATS = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def nearest(v, name):
    """Of longdouble quotients, the number of the format, by NumPy and ml_dtypes; saturated."""
    lowest = -128.0 if name == "int8" else -FORMATS[name]
    v = np.clip(v, lowest, FORMATS[name])
    if name == "int8":
        return np.rint(v).astype(np.float64)
    return to_odd(v).astype(name).astype(np.float64)


def to_odd(v):
    """Of longdouble, float32 that can be rounded once more, to fewer bits, as if it had not been rounded before."""
    near = v.astype(np.float32)
    bits = near.view(np.int32).copy()
    inexact = near.astype(L) != v
    bits -= inexact & (np.abs(near.astype(L)) > np.abs(v))
    bits |= inexact
    return bits.view(np.float32)


def quantised_y(x, weight, bias, eps=1e-6, k=None):
    wide = x.astype(L)
    k = k or x.shape[1]
    y = wide / np.sqrt((wide[:, :k] ** 2).sum(axis=1, keepdims=True) / k + L(eps)) * weight.astype(L)
    return y + bias.astype(L)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] * (name != "int8" and dtype != np.float32))
        for name in FORMATS
        for dtype in DTYPES
    ],
    ids=str,
)
def test_quantised_rows(name, dtype, rng):
    q_dtype = np.dtype(name)
    for shape in SHAPES:
        g = given(rng, shape, dtype)
        x = (g.x.astype(float) * np.exp(rng.standard_normal((shape[0], 1)))).astype(dtype)
        copies = [a.tobytes() for a in (x, g.weight, g.bias)]
        y = quantised_y(x, g.weight, g.bias)
        scale_dtype = np.float64 if dtype == np.float64 else np.float32
        given_scale = rng.uniform(0.5, 2, (shape[0], 1)).astype(scale_dtype) / FORMATS[name]
        bound = 2.0
        for options in ({}, {"scale_ub": bound}, {"scale": given_scale}):
            q, scale, h = rn.quantized_rms_norm(x, g.weight, g.bias, dtype=name, **options)
            assert h is None
            assert (q.shape, q.dtype, scale.shape, scale.dtype) == (shape, q_dtype, (shape[0], 1), scale_dtype)
            if "scale" in options:
                assert np.array_equal(scale, given_scale)
            else:
                largest = np.max(np.abs(y), axis=1, keepdims=True, initial=0)
                want = np.minimum(largest, options.get("scale_ub", np.inf)) / L(FORMATS[name])
                assert worst_ulp(scale, want) <= SCALE_ULP[dtype.name]
            error = BEFORE_ROUNDING[dtype.name] * spread_of(x, g.weight, g.bias, y)
            quotient = y / scale.astype(L)
            below, above = (nearest(quotient + way * error * np.abs(quotient), name) for way in (-1, 1))
            got = q.astype(np.float64)
            assert np.all((got == below) | (got == above)), f"{name} of {shape}"
            assert np.mean(below != above) < 1e-3 if q.size else True
        assert copies == [a.tobytes() for a in (x, g.weight, g.bias)]


@pytest.mark.engine
@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn"])
def test_quantised_ties_go_to_the_even_number(name, rng):
    """y = bias here. It is divided by the scale that is returned, a float32; by another one these were no ties."""
    rows = [ties(name, largest) for largest in rng.uniform(1, 100, 20).astype(np.float32)]
    y, scales, want = (np.stack(a) for a in zip(*rows, strict=True))
    q, scale, _ = rn.quantized_rms_norm(np.ones(y.shape, np.float32), np.zeros(y.shape[1]), y, dtype=name)
    assert np.array_equal(scale.ravel(), scales)
    assert np.array_equal(q.astype(np.float64), want)


@pytest.mark.engine
@pytest.mark.parametrize(
    "dtype", [BFLOAT16, pytest.param(np.float16, marks=pytest.mark.slow)], ids=["bfloat16", "float16"]
)
def test_xhat_is_not_rounded_by_way_of_float32(dtype, rng):
    """Rows that have an element next to the middle of two numbers, which float32 would take for the middle itself."""
    dtype = np.dtype(dtype)
    x = rng.standard_normal((60000, 33)).astype(dtype)
    wide = x.astype(L)
    xhat = wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    below, above = (to_odd(xhat * (1 + way * BEFORE_ROUNDING[dtype.name])).astype(dtype) for way in (-1, 1))
    chosen = (below != xhat.astype(np.float32).astype(dtype)).any(axis=1) & (below == above).all(axis=1)
    assert chosen.sum() > 3
    x, ones = x[chosen], np.ones(33, dtype)
    y = rn.l2_norm(x, ones, np.zeros(33, dtype), eps=0.0, round_xhat=True)
    assert y.tobytes() == below[chosen].tobytes()


def spread_of(x, weight, bias, y):
    """How much larger than y its terms are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.maximum(np.abs(y - bias.astype(L)), np.abs(bias.astype(L))) / np.abs(y)
    return np.where(np.isfinite(ratio), np.maximum(ratio, 1), 1)


@pytest.mark.engine
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_rows_of_a_residual_and_of_a_part(name, rng):
    """h is rounded to the residual's dtype, and the norm is that of the rounded one; p, an offset, no bias."""
    x, residual = given(rng, (65, 33), np.float32).x, given(rng, (65, 33), BFLOAT16).x
    weight = rng.standard_normal(33).astype(np.float32)
    q, scale, h = rn.quantized_rms_norm(x, weight, residual=residual, dtype=name, p=0.3, weight_offset=1.0)
    assert h.tobytes() == rn.add_rms_norm(x, residual, weight).h.tobytes()
    y = quantised_y(h, weight.astype(np.float64) + 1, np.zeros(33), k=10)
    assert worst_ulp(scale, np.max(np.abs(y), axis=1, keepdims=True) / L(FORMATS[name])) <= SCALE_ULP["float32"]
    quotient = y / scale.astype(L)
    below, above = (nearest(quotient * (1 + way * BEFORE_ROUNDING["float32"]), name) for way in (-1, 1))
    got = q.astype(np.float64)
    assert np.all((got == below) | (got == above))
    out, own = np.empty((33, 65), q.dtype).T, residual.copy()
    again = rn.quantized_rms_norm(
        x, weight, residual=own, dtype=name, p=0.3, weight_offset=1.0, out=out, residual_out=own
    )
    assert again.q is out
    assert again.h is own
    assert [a.tobytes() for a in again] == [a.tobytes() for a in (q, scale, h)]


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [np.float64, np.float32, BFLOAT16], ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_rows_at_the_ends_of_the_range_and_none(name, dtype, rng):
    """Extreme rows, zeros, NaN and infinities, each as it is in the reference, and no other row is touched."""
    dtype = np.dtype(dtype)
    g = given(rng, (9, 33), np.float64)
    sizes = np.reshape([1, *ENDS[dtype.name][0], 1, 1, 1], (9, 1))
    x = (np.clip(g.x, -1.7, 1.7) * sizes).astype(dtype)
    x[6] = 0
    x[7, 3], x[8, 4] = np.nan, np.inf
    weight, bias = g.weight.astype(dtype), g.bias.astype(dtype)
    for options in ({}, {"scale": 0.05}, {"scale_ub": 1.0}):
        for shift in (bias, None):
            got = rn.quantized_rms_norm(x, weight, shift, dtype=name, eps=1e-300, **options)
            want = rn.reference.quantized_rms_norm(x, weight, shift, dtype=name, eps=1e-300, **options)
            # where float64 is rounded in the last place, q is the neighbour at most once in 2**45 elements
            assert np.array_equal(got.q.astype(float), want.q.astype(float), equal_nan=True)
            if dtype != np.float64:  # pairs have no sign of zero
                assert got.q.tobytes() == want.q.tobytes()
            assert worst_ulp(got.scale, want.scale) <= 1
            for row in range(9):
                alone = rn.quantized_rms_norm(x[row : row + 1], weight, shift, dtype=name, eps=1e-300, **options)
                assert alone.q.tobytes() == got.q[row].tobytes()
                assert alone.scale.tobytes() == got.scale[row].tobytes()


@pytest.mark.engine
def test_quantised_bits_are_those_of_any_batch_layout_and_number_of_threads(rng):
    g = given(rng, (77, 1003), np.dtype(np.float32))
    for options in ({}, {"scale": 0.05}):
        want = rn.quantized_rms_norm(g.x, g.weight, **options)
        before = rn.get_num_threads()
        try:
            rn.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS) if before == 1 else 1)
            again = rn.quantized_rms_norm(g.x, g.weight, **options)
        finally:
            rn.set_num_threads(before)
        columns = rn.quantized_rms_norm(np.asfortranarray(g.x), g.weight, **options)
        apart = rn.quantized_rms_norm(g.x.T, g.weight, axis=0, **options)
        for q, scale, _ in (again, columns, (apart.q.T, apart.scale.T, None)):
            assert q.tobytes() == want.q.tobytes()
            assert scale.tobytes() == want.scale.tobytes()
        alone = rn.quantized_rms_norm(g.x[38:41], g.weight, **options)
        assert alone.q.tobytes() == want.q[38:41].tobytes()
        assert alone.scale.tobytes() == want.scale[38:41].tobytes()


@pytest.mark.engine
def test_quantised_long_rows(rng):
    x = given(rng, (2, 70001), np.dtype(np.float32)).x
    got, want = rn.quantized_rms_norm(x), rn.reference.quantized_rms_norm(x)
    assert got.q.tobytes() == want.q.tobytes()
    assert worst_ulp(got.scale, want.scale) <= 1
