"""The promises of the public functions about shapes, axes, dtypes, layouts and memory, for each engine.

Values are compared with formulas in plain broadcasting, which share nothing with the argument handling under test:
no axis is moved there, and no row is flattened.
"""

from __future__ import annotations

import inspect
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from conftest import BACKENDS, DTYPES
from tolerances import spacing

import rmsnorm_np as rn
from rmsnorm_np import _arguments, _backends, _numbers, reference

# float64 in two orders of summation, of at most 24 terms
CLOSE = {"rtol": 1e-13, "atol": 1e-14}

OPS = ("rms", "layer")
FORWARD = {"rms": rn.rms_norm, "layer": rn.layer_norm}
BACKWARD = {"rms": rn.rms_norm_backward, "layer": rn.layer_norm_backward}


@pytest.fixture(params=OPS)
def op(request):
    """One of the two norms."""
    return request.param


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def grads_same_bits(a, b):
    return all((one is None and two is None) or same_bits(one, two) for one, two in zip(a, b, strict=True))


# Shapes and axes


class Plain:
    """y and the gradients by broadcasting over x as it lies; weight and bias spread along the axes they belong to."""

    def __init__(self, op, dy, x, weight, bias, axis, eps, weight_offset):
        axes = tuple(a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,)))
        n = math.prod(x.shape[a] for a in axes)

        def spread(parameter):
            """In x.ndim dimensions, 1 long where x is to share it."""
            if sorted(axes) == list(range(x.ndim - len(axes), x.ndim)):
                return parameter.reshape((1,) * (x.ndim - parameter.ndim) + parameter.shape)
            return parameter.reshape([length if i in axes else 1 for i, length in enumerate(x.shape)])

        def mean(a):
            return a.sum(axis=axes, keepdims=True) / n

        def gradient(terms, parameter):
            if parameter is None:
                return None
            wide = spread(parameter)
            shared = tuple(i for i in range(x.ndim) if wide.shape[i] == 1)
            return terms.sum(axis=shared, keepdims=True).reshape(parameter.shape)

        centred = x - mean(x) if op == "layer" else x
        rstd = (mean(centred**2) + eps) ** -0.5
        xhat = centred * rstd
        scale = 1.0 if weight is None else weight_offset + spread(weight)
        self.y = xhat * scale + (0.0 if bias is None else spread(bias))
        g = dy * scale
        self.dx = rstd * (g - xhat * mean(g * xhat) - (mean(g) if op == "layer" else 0.0))
        self.dweight = gradient(dy * xhat, weight)
        self.dbias = gradient(dy, bias)


# x.shape, axis, weight.shape, bias.shape. Axes of different length, so that a mix-up does not pass for right.
SHAPES = [
    ((5,), -1, (5,), (5,)),  # a single row
    ((5,), 0, (5,), None),
    ((3, 5), -1, (5,), (5,)),  # the ordinary case
    ((3, 5), 1, None, (5,)),
    ((3, 5), -1, None, None),
    ((3, 5), -1, (3, 5), (5,)),  # a weight for each row, and a bias that all rows share
    ((2, 3, 5), -1, (5,), (5,)),
    ((2, 3, 5), -1, (3, 5), (3, 5)),  # per head
    ((2, 3, 5), -1, (5,), (3, 5)),  # weight and bias shared by different rows
    ((2, 3, 5), 2, (2, 3, 5), (3, 5)),
    ((4, 2, 3, 5), -1, (2, 3, 5), (3, 5)),
    ((2, 3, 5), (1, 2), (3, 5), (3, 5)),  # images: two axes
    ((2, 3, 5), (-1, -2), (3, 5), (2, 3, 5)),  # in the order of x, whatever the order in the tuple
    ((2, 3, 5), (0, 1, 2), (2, 3, 5), (2, 3, 5)),  # one row
    ((2, 3, 5), (2,), (5,), (5,)),  # a tuple of one
    ((3, 5), 0, (3,), (3,)),  # axes that are not trailing
    ((2, 3, 5), 1, (3,), (3,)),
    ((2, 3, 5), -3, (2,), None),
    ((2, 3, 5), (0, 1), (2, 3), (2, 3)),
    ((2, 3, 5), (2, 0), (2, 5), (2, 5)),
    ((2, 3, 3), 1, (3,), (3,)),  # the weight would fit the last axis as well
    ((3, 1), -1, (1,), (1,)),  # n = 1
    ((1, 5), -1, (5,), (5,)),  # one row
    ((1, 1, 4), (0, 2), (1, 4), (1, 4)),
]


@pytest.mark.engine
@pytest.mark.parametrize(("shape", "axis", "weight_shape", "bias_shape"), SHAPES, ids=str)
def test_shapes_and_axes(op, shape, axis, weight_shape, bias_shape, backend, rng):
    x, dy = rng.normal(size=shape), rng.normal(size=shape)
    weight = None if weight_shape is None else rng.normal(size=weight_shape)
    bias = None if bias_shape is None else rng.normal(size=bias_shape)
    for weight_offset in (0.0,) if weight is None else (0.0, 1.0):
        want = Plain(op, dy, x, weight, bias, axis, 0.01, weight_offset)
        options = {"eps": 0.01, "axis": axis, "weight_offset": weight_offset, "backend": backend}
        y = FORWARD[op](x, weight, bias, **options)
        grads = BACKWARD[op](dy, x, weight, bias, **options)
        for got, expected in [(y, want.y), *((getattr(grads, f), getattr(want, f)) for f in grads._fields)]:
            if expected is None:
                assert got is None
            else:
                assert got.shape == expected.shape
                assert got.flags.c_contiguous
                np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize("seq", [5, 3])
def test_one_weight_per_head_where_heads_is_not_next_to_last(op, seq, backend, rng):
    """The recipe of the docstring: transposed views, out= as well, also where heads equals seq."""
    x, dy, weight = rng.normal(size=(2, 3, seq, 4)), rng.normal(size=(2, 3, seq, 4)), rng.normal(size=(3, 4))
    y, dx = np.empty_like(x), np.empty_like(x)
    FORWARD[op](x.swapaxes(1, 2), weight, out=y.swapaxes(1, 2), backend=backend)
    grads = BACKWARD[op](dy.swapaxes(1, 2), x.swapaxes(1, 2), weight, out=dx.swapaxes(1, 2), backend=backend)
    for head in range(3):
        x_head, w, dweight = x[:, head], weight[head], grads.dweight[head]
        want = BACKWARD[op](dy[:, head], x_head, w, backend=backend)
        assert np.array_equal(y[:, head], FORWARD[op](x_head, w, backend=backend))
        assert np.array_equal(dx[:, head], want.dx)
        np.testing.assert_allclose(dweight, want.dweight, **CLOSE)
    if seq == 3:  # as documented, and not by accident: shapes are matched from the end
        per_position = FORWARD[op](x, weight, backend=backend)
        for position in range(3):
            want = FORWARD[op](x[:, :, position], weight[position], backend=backend)
            assert np.array_equal(per_position[:, :, position], want)


def test_gradients_are_named_tuples_of_three(op, backend):
    grads = BACKWARD[op](np.ones((2, 3)), np.ones((2, 3)), backend=backend)
    assert type(grads) is (rn.RMSNormGrads if op == "rms" else rn.LayerNormGrads)
    assert grads._fields == ("dx", "dweight", "dbias")
    assert grads.dweight is None
    assert grads.dbias is None


@pytest.mark.parametrize(
    ("shape", "weight_shape"), [((0, 4), (4,)), ((2, 0, 4), (4,)), ((2, 0, 4), (0, 4)), ((0, 3, 4), (3, 4))], ids=str
)
def test_no_rows(op, shape, weight_shape, dtype, backend):
    """Nothing in, nothing out, and gradients that are sums of nothing."""
    x, weight = np.ones(shape, dtype), np.ones(weight_shape, dtype)
    y = FORWARD[op](x, weight, weight, backend=backend)
    assert (y.shape, y.dtype) == (shape, dtype)
    dx, dweight, dbias = BACKWARD[op](x, x, weight, weight, backend=backend)
    assert (dx.shape, dx.dtype) == (shape, dtype)
    for gradient in (dweight, dbias):
        assert same_bits(gradient, np.zeros(weight_shape, dtype))
    out = np.ones(shape, dtype)
    assert FORWARD[op](x, weight, out=out, backend=backend) is out


# The partial RMS


def test_k_is_exact_wherever_p_is_a_ratio():
    """No p = k / n may give k + 1 (or k - 1), although k / n is rounded."""
    for n in (*range(1, 260), 768, 4096, 50257, 2**20, 2**31 + 1):
        for k in range(1, n + 1) if n < 260 else (1, 3, n // 7, n // 3, n // 2, n - 1, n):
            assert _numbers.elements_in_rms(n, k / n) == k


@pytest.mark.parametrize("n", [1, 3, 10, 50, 100, 576, 1000, 4096])
def test_k_is_the_ceiling_of_the_decimal_product(n):
    for thousandths in range(1, 1001):
        p = thousandths / 1000
        assert _numbers.elements_in_rms(n, p) == math.ceil(Fraction(thousandths, 1000) * n)


@pytest.mark.parametrize(
    ("n", "p", "k"),
    [
        (100, 0.07, 7),  # 100 * 0.07 = 7.000000000000001
        (10, 0.1 + 0.2, 3),  # 0.30000000000000004
        (6, 5 / 6, 5),  # the float above 5/6
        (100, np.float32(0.07), 7),  # 0.07000000029802322
        (100, np.array(0.07), 7),
        (100, np.array(0.07, np.float32), 7),
        (3, 0.5, 2),
        (3, 1 / 3, 1),
        (10, 0.101, 2),
        (10, 1e-300, 1),
        (10, 5e-324, 1),
        (7, 1, 7),
        (7, Fraction(3, 7), 3),
    ],
)
def test_k_of_notable_p(n, p, k, backend, rng):
    assert _numbers.elements_in_rms(n, p) == k
    x = rng.normal(size=(4, n))
    want = x / np.sqrt(np.mean(x[:, :k] ** 2, axis=1, keepdims=True) + 0.01)
    np.testing.assert_allclose(rn.rms_norm(x, p=p, eps=0.01, backend=backend), want, **CLOSE)


@pytest.mark.parametrize("axis", [0, 1, (0, 1), (1, 2), (0, 2)])
def test_partial_rms_takes_the_leading_elements_in_the_order_of_x(axis, backend, rng):
    x, dy = rng.normal(size=(4, 5, 6)), rng.normal(size=(4, 5, 6))
    axes = axis if isinstance(axis, tuple) else (axis,)
    rest = tuple(i for i in range(3) if i not in axes)
    rows = x.transpose(*rest, *axes).reshape(math.prod(x.shape[i] for i in rest), -1)
    drows = dy.transpose(*rest, *axes).reshape(rows.shape)
    y = rn.rms_norm(x, p=0.3, axis=axis, backend=backend)
    dx = rn.rms_norm_backward(dy, x, p=0.3, axis=axis, backend=backend).dx
    k = math.ceil(0.3 * rows.shape[1])
    rstd = 1 / np.sqrt(np.mean(rows[:, :k] ** 2, axis=1, keepdims=True) + 1e-6)
    want_dx = drows * rstd
    want_dx[:, :k] -= rstd * (rows * rstd)[:, :k] * np.sum(drows * rows * rstd, axis=1, keepdims=True) / k
    for got, want in [(y, rows * rstd), (dx, want_dx)]:
        np.testing.assert_allclose(got.transpose(*rest, *axes).reshape(rows.shape), want, **CLOSE)


# Numbers


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["f2", "f4", ">f4", "f8", ">f8", "g", "bfloat16", "i8", "u1"])
def test_a_0d_array_is_a_number(op, kind, backend, rng):
    """As np.load returns it."""
    x, weight = rng.normal(size=(3, 8)), rng.normal(size=8)
    part = 1 if kind in ("i8", "u1") else 0.25
    numbers = {"eps": np.array(part, kind), "weight_offset": np.array(2, kind)}
    if op == "rms":
        numbers["p"] = np.array(part, kind)
    floats = {name: float(number) for name, number in numbers.items()}
    y = FORWARD[op](x, weight, **numbers, backend=backend)
    assert same_bits(y, FORWARD[op](x, weight, **floats, backend=backend))
    grads = BACKWARD[op](x, x, weight, **numbers, backend=backend)
    assert grads_same_bits(grads, BACKWARD[op](x, x, weight, **floats, backend=backend))


# Dtypes


def _pairs():
    """(dtype, other): each as each of the two, once with another one; for a release all others, with kernels of their
    own.
    """
    for i, dtype in enumerate(DTYPES):
        for j, other in enumerate(DTYPES):
            marks = [pytest.mark.engine, *[pytest.mark.slow] * ((j - i) % len(DTYPES) > 1)]
            yield pytest.param(dtype, other, marks=marks, id=f"{dtype.name}-{other.name}")


@pytest.mark.parametrize(("dtype", "other"), list(_pairs()))
def test_each_result_has_the_dtype_of_its_argument(op, dtype, other, backend, rng):
    """An element read as the wrong type is off by far more than the few ULP of the largest element allowed here."""
    x = rng.normal(size=(3, 8)).astype(dtype)
    dy, weight, bias = (rng.normal(size=shape).astype(other) for shape in ((3, 8), (8,), (8,)))
    y = FORWARD[op](x, weight, bias, backend=backend)
    grads = BACKWARD[op](dy, x, weight, bias, backend=backend)
    assert y.dtype == grads.dx.dtype == dtype
    assert grads.dweight.dtype == grads.dbias.dtype == other
    wide = tuple(a.astype(np.float64) for a in (dy, x, weight, bias))
    want_y, want_grads = FORWARD[op](*wide[1:], backend=backend), BACKWARD[op](*wide, backend=backend)
    for got, want in zip((y, *grads), (want_y, *want_grads), strict=True):
        ulp = float(spacing(np.abs(want).max(), got.dtype))
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=0, atol=2 * ulp)


@pytest.mark.engine
@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64, np.bool_])
def test_integers_and_bools_are_float64(op, kind, backend, rng):
    x, dy, weight = (rng.integers(0, 2, size=shape).astype(kind) for shape in ((3, 5), (3, 5), (5,)))
    x[:, 0], x[:, 1] = 1, 0
    floats = tuple(a.astype(np.float64) for a in (dy, x, weight, weight))
    grads = BACKWARD[op](dy, x, weight, weight, backend=backend)
    assert grads_same_bits(grads, BACKWARD[op](*floats, backend=backend))
    assert grads.dx.dtype == grads.dweight.dtype == np.float64
    assert same_bits(FORWARD[op](x, weight, backend=backend), FORWARD[op](*floats[1:3], backend=backend))


def test_lists_are_float64(op, backend):
    dy, x, weight = [[1, 0, 2.5], [True, 1, 2]], [[1, 2, 4], [8, 16, 3]], [1, 2, 3]
    arrays = tuple(np.array(a, np.float64) for a in (dy, x, weight, weight))
    assert grads_same_bits(
        BACKWARD[op](dy, x, weight, tuple(weight), backend=backend), BACKWARD[op](*arrays, backend=backend)
    )


# Layouts. Each function makes an array with the values of a C-contiguous one that lies in memory in another way.


def strided(a):
    big = np.zeros(tuple(2 * length for length in a.shape), a.dtype)
    big[tuple(slice(None, None, 2) for _ in a.shape)] = a
    return big[tuple(slice(None, None, 2) for _ in a.shape)]


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def byte_swapped(a):
    return a.astype(a.dtype.newbyteorder())


def unaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)[1:]
    view = memory.view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


class Subclass(np.ndarray):
    """Neither a masked array nor a matrix."""


LAYOUTS = {
    "strided": strided,
    "reversed": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "reversed rows": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "fortran": lambda a: np.array(a, order="F"),
    "columns of a larger array": lambda a: np.concatenate([a, a], axis=-1)[..., : a.shape[-1]],
    "read-only": read_only,
    "byte-swapped": byte_swapped,
    "unaligned": unaligned,
    "subclass": lambda a: a.view(Subclass),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_change_a_bit(op, layout, dtype, backend, rng):
    if layout == "byte-swapped" and dtype.name == "bfloat16":
        pytest.skip("ml_dtypes has no byte-swapped bfloat16")
    dy, x = (rng.normal(size=(4, 3, 6)).astype(dtype) for _ in range(2))
    weight, bias = (rng.normal(size=(3, 6)).astype(dtype) for _ in range(2))
    arrays = dy, x, weight, bias
    odd = tuple(map(LAYOUTS[layout], arrays))
    for a, b in zip(arrays, odd, strict=True):
        assert np.array_equal(a, b)
    copies = [a.tobytes() for a in odd]
    y, grads = FORWARD[op](*odd[1:], backend=backend), BACKWARD[op](*odd, backend=backend)
    assert same_bits(y, FORWARD[op](*arrays[1:], backend=backend))
    assert grads_same_bits(grads, BACKWARD[op](*arrays, backend=backend))
    assert type(y) is type(grads.dweight) is np.ndarray
    assert [a.tobytes() for a in odd] == copies  # inputs are never written


def test_one_value_seen_as_many_rows(op, backend, rng):
    """A broadcast array: strides of 0, so that a row written in place would change its neighbours."""
    row = rng.normal(size=6)
    x = np.broadcast_to(row, (4, 6))
    assert same_bits(FORWARD[op](x, backend=backend), FORWARD[op](x.copy(), backend=backend))


def test_inputs_stay_and_results_are_new(op, dtype, backend, rng):
    arrays = tuple(rng.normal(size=shape).astype(dtype) for shape in ((5, 6), (5, 6), (6,), (6,)))
    copies = [a.copy() for a in arrays]
    results = [FORWARD[op](*arrays[1:], backend=backend), *BACKWARD[op](*arrays, backend=backend)]
    assert all(same_bits(a, b) for a, b in zip(arrays, copies, strict=True))
    for result in results:
        assert result.flags.writeable
        assert not any(np.shares_memory(result, a) for a in arrays)


# What the engines get


def engine_arguments(
    x, dy=None, weight=None, bias=None, *, eps=1e-6, p=1.0, axis=-1, weight_offset=0.0, out=None, dtype=None
):
    call = ("x", "dy", "out"), (x, dy), (weight, bias, weight_offset), (out,), eps, p, axis
    (x, dy), (weight, bias, weight_offset), (out,), k, eps, restore = _arguments.engine_arguments(call, dtype)
    return x, dy, weight, bias, k, eps, weight_offset, out, restore and (lambda result: restore([result])[0])


def test_trailing_axes_are_not_copied(rng):
    for shape, axis in [((4, 6), -1), ((2, 3, 4, 5), -1), ((2, 3, 4, 5), (2, 3)), ((7,), 0)]:
        x = rng.normal(size=shape)
        rows = engine_arguments(x, axis=axis)[0]
        assert rows.ndim == 2
        assert np.shares_memory(rows, x)
        locked = read_only(x)
        assert np.shares_memory(engine_arguments(locked, axis=axis)[0], locked)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("axis", "parameter_shape"), [(-1, (6,)), (-1, (3, 6)), (0, (4,)), ((0, 2), (4, 6))], ids=str)
def test_engines_get_rows_in_the_plainest_layout(layout, axis, parameter_shape, rng):
    """Compiled kernels read one type of array each: (rows, n), or (outer, n, inner) of an x whose axis 0 is normalised;
    C-contiguous, aligned and native.
    """
    x, dy = (LAYOUTS[layout](rng.normal(size=(4, 3, 6))) for _ in range(2))
    parameter = LAYOUTS[layout](rng.normal(size=parameter_shape))
    for rows in engine_arguments(x, dy, parameter, parameter, axis=axis)[:4]:
        assert type(rows) is np.ndarray
        assert rows.shape in (
            [(1, 4, 18), (18, 4), (1, 4)] if axis == 0 else [(rows.size // rows.shape[-1], rows.shape[-1])]
        )
        assert rows.flags.c_contiguous
        assert rows.flags.aligned
        assert rows.dtype == np.float64
        assert rows.dtype.isnative


ORDINARY = {
    "x": {},
    "all": {"dy": True, "weight": True, "bias": True},
    "p": {"p": 0.3},
    "numbers": {"p": 1, "eps": 0, "weight": True, "weight_offset": 1},
    "out": {"out": True, "dy": True, "weight": True},
    "in place": {"out": "x", "weight": True},
    "into dy": {"out": "dy", "dy": True},
    "another dtype": {"dtype": np.dtype(np.float64), "weight": True},
    "out of another dtype": {"dtype": np.dtype(np.float64), "out": "float64"},
}


@pytest.mark.parametrize("options", ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (0, 6), (3, 1)], ids=str)
def test_the_short_cut_leads_where_the_full_check_leads(options, shape, dtype, monkeypatch, rng):
    """`engine_arguments` goes past the checks for ordinary arrays: same arrays, same numbers, same result for both."""
    options, arrays = dict(options), {"x": rng.normal(size=shape).astype(dtype)}
    for name in ("dy", "weight", "bias"):
        if options.get(name):
            arrays[name] = rng.normal(size=shape if name == "dy" else shape[-1:]).astype(dtype)
    if out := options.get("out"):
        options["out"] = arrays[out] if out in arrays else np.zeros(shape, dtype if out is True else out)
    short = engine_arguments(**{**options, **arrays})
    monkeypatch.setattr(_arguments, "is_ordinary", lambda _: False)
    full = engine_arguments(**{**options, **arrays})
    for one, two in zip(short[:-1], full[:-1], strict=True):
        if isinstance(one, np.ndarray):
            assert same_bits(one, two)
            assert one.size == 0 or np.shares_memory(one, two)
        else:
            assert (type(one), one) == (type(two), two)
    result = np.ones_like(full[0], dtype=options.get("dtype"))
    want = full[-1](result)
    got = result if short[-1] is None else short[-1](result)
    if "out" in options:
        assert want is options["out"]
        assert got is options["out"] or short[-1] is None  # then the engine returns the out that it is given
    else:
        assert same_bits(got, want)


def test_read_only_arrays_take_the_short_cut(monkeypatch, rng):
    """Such are arrays of JAX and of files in memory. The long way takes 20 µs more."""
    x, weight = read_only(rng.normal(size=(4, 6)).astype(np.float32)), read_only(np.ones(6, np.float32))
    want, norm = rn.rms_norm(x, weight), rn.RMSNorm(weight)
    norm(x)
    monkeypatch.setattr(_arguments, "prepare", None)
    assert same_bits(rn.rms_norm(x, weight), want)
    assert same_bits(rn.rms_norm_backward(x, x, weight).dx, rn.rms_norm_backward(x.copy(), x.copy(), weight.copy()).dx)
    monkeypatch.setattr(type(norm), "_forward", None)
    assert same_bits(norm(x), want)


# In each, one argument is not ordinary, and an error or another path has to follow.
NOT_ORDINARY = {
    "axis is a float": {"axis": -1.0},
    "dy is longer": {"dy": np.ones((5, 6))},
    "dy is turned": {"dy": np.ones((6, 4))},
    "weight is shorter": {"weight": np.ones(5)},
    "bias is longer": {"bias": np.ones(7)},
    "out is longer": {"out": np.ones((5, 6))},
    "out has another dtype": {"out": np.ones((4, 6), np.float32)},
    "out has not the dtype asked for": {"out": np.ones((4, 6)), "dtype": np.dtype(np.float32)},
    "out is read-only": {"out": read_only(np.ones((4, 6)))},
    "weight is complex": {"weight": np.ones(6, np.complex128)},
    "offset to no weight": {"weight_offset": 1.0},
}


@pytest.mark.parametrize("options", NOT_ORDINARY.values(), ids=NOT_ORDINARY)
def test_the_short_cut_forgives_nothing(options):
    with pytest.raises((TypeError, ValueError), match=r"expected"):
        engine_arguments(np.ones((4, 6)), **options)


# out


OUTS = {
    "same layout": lambda a: a.copy(),
    "strided": strided,
    "reversed": LAYOUTS["reversed"],
    "fortran": LAYOUTS["fortran"],
    "byte-swapped": byte_swapped,
    "unaligned": unaligned,
    "subclass": LAYOUTS["subclass"],
}


@pytest.mark.parametrize("axis", [-1, (1, 2), 0, (0, 2)])
@pytest.mark.parametrize("layout", OUTS)
def test_out_takes_the_result_in_any_layout(op, layout, axis, dtype, backend, rng):
    if layout == "byte-swapped" and dtype.name == "bfloat16":
        pytest.skip("ml_dtypes has no byte-swapped bfloat16")
    dy, x = (rng.normal(size=(3, 4, 6)).astype(dtype) for _ in range(2))
    out = OUTS[layout](np.full_like(x, 7))
    # with both parameters, as most calls of the other tests: the kernels are the same
    weight = bias = np.full([x.shape[i] for i in np.atleast_1d(axis)], 0.5, dtype)
    assert FORWARD[op](x, weight, bias, axis=axis, out=out, backend=backend) is out
    assert np.array_equal(out, FORWARD[op](x, weight, bias, axis=axis, backend=backend))
    grads = BACKWARD[op](dy, x, weight, bias, axis=axis, out=out, backend=backend)
    assert grads.dx is out
    assert np.array_equal(out, BACKWARD[op](dy, x, weight, bias, axis=axis, backend=backend).dx)


def test_out_may_be_a_part_of_a_larger_array(op, backend, rng):
    """The neighbours are not touched."""
    x = rng.normal(size=(3, 5))
    big = np.full((5, 9), 7.0)
    FORWARD[op](x, out=big[1:4, 2:7], backend=backend)
    assert np.array_equal(big[1:4, 2:7], FORWARD[op](x, backend=backend))
    big[1:4, 2:7] = 7.0
    assert (big == 7.0).all()


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[...], LAYOUTS["subclass"]], ids=["x", "view", "subclass"])
def test_in_place(op, shape, view, dtype, backend, rng):
    dy, x = (rng.normal(size=shape).astype(dtype) for _ in range(2))
    weight = rng.normal(size=6).astype(dtype)
    y, grads = FORWARD[op](x, weight, backend=backend), BACKWARD[op](dy, x, weight, backend=backend)
    inplace = x.copy()
    out = view(inplace)
    assert FORWARD[op](inplace, weight, out=out, backend=backend) is out
    assert same_bits(inplace, y)
    for position in (0, 1):  # dx into dy, dx into x
        arrays = [dy.copy(), x.copy()]
        out = view(arrays[position])
        got = BACKWARD[op](*arrays, weight, out=out, backend=backend)
        assert got.dx is out
        assert same_bits(arrays[position], grads.dx)
        assert same_bits(got.dweight, grads.dweight)
        assert same_bits(arrays[1 - position], (dy, x)[1 - position])


def test_in_place_with_dy_being_x(op, backend, rng):
    x, weight = rng.normal(size=(4, 6)), rng.normal(size=6)
    want = BACKWARD[op](x.copy(), x, weight, backend=backend)
    both = x.copy()
    assert grads_same_bits(BACKWARD[op](both, both, weight, out=both, backend=backend), want)


def test_in_place_along_another_axis(op, backend, rng):
    x = rng.normal(size=(4, 6))
    want = FORWARD[op](x, axis=0, backend=backend)
    assert np.shares_memory(engine_arguments(x, axis=0, out=x)[7], x)
    assert np.array_equal(FORWARD[op](x, axis=0, out=x, backend=backend), want)


def test_in_place_along_axes_that_do_not_stand_together(op, backend, rng):
    x = rng.normal(size=(4, 3, 6))
    want = FORWARD[op](x, axis=(0, 2), backend=backend)
    assert engine_arguments(x, axis=(0, 2), out=x)[7] is None
    assert np.array_equal(FORWARD[op](x, axis=(0, 2), out=x, backend=backend), want)


def test_exact_in_place_needs_no_temporary(rng):
    x, weight = rng.normal(size=(4, 6)), rng.normal(size=6)
    for axis, out in [(-1, x), (-1, x[...]), (1, x), ((0, 1), x)]:
        parameter = weight if axis != (0, 1) else None
        assert np.shares_memory(engine_arguments(x, weight=parameter, axis=axis, out=out)[7], x)


# x, dy, weight and out as parts of one stretch of memory: where each begins. x is (4, 6).
OVERLAPS = {
    "one element after x": (0, 100, 200, 1),
    "one row after x": (0, 100, 200, 6),
    "one element before x": (1, 100, 200, 0),
    "one row before dy": (100, 6, 200, 0),
    "x itself, but half of dy": (0, 12, 200, 0),
    "weight in out": (100, 200, 6, 0),
    "weight begins with out": (100, 200, 0, 0),
    "x itself, with weight in it": (0, 100, 6, 0),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("ndim", [2, 3])
def test_any_overlap_of_out_is_handled(op, ndim, overlap, backend, rng):
    shape = (4, 6) if ndim == 2 else (2, 2, 6)
    memory = rng.normal(size=300)
    x_at, dy_at, weight_at, out_at = OVERLAPS[overlap]

    def views(memory):
        x, dy, out = (memory[at : at + 24].reshape(shape) for at in (x_at, dy_at, out_at))
        return dy, x, memory[weight_at : weight_at + 6], out

    dy, x, weight, _ = (a.copy() for a in views(memory))
    y, grads = FORWARD[op](x, weight, backend=backend), BACKWARD[op](dy, x, weight, weight, backend=backend)

    _, x, weight, out = views(memory.copy())
    FORWARD[op](x, weight, out=out, backend=backend)
    assert np.array_equal(out, y)
    dy, x, weight, out = views(memory.copy())
    for parameters in [(weight, None), (None, weight)]:
        assert engine_arguments(x, dy, *parameters, out=out)[7] is None  # no engine meets an overlap
    got = BACKWARD[op](dy, x, weight, weight, out=out, backend=backend)
    assert np.array_equal(out, grads.dx)
    assert same_bits(got.dweight, grads.dweight)
    assert same_bits(got.dbias, grads.dbias)


def test_out_over_a_transposed_x(op, backend, rng):
    x = rng.normal(size=(5, 5))
    want = FORWARD[op](x.T.copy(), backend=backend)
    assert np.array_equal(FORWARD[op](x.T, out=x, backend=backend), want)


# Backends


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_backward", "layer_norm", "layer_norm_backward"])
def test_the_reference_has_the_same_signatures(name):
    public, readable = getattr(rn, name), getattr(reference, name)
    assert inspect.signature(public) == inspect.signature(readable)
    assert public is not readable


class Spy:
    """An engine that tells its name."""

    arguments = _arguments

    def __init__(self, name):
        self.name = name

    def forward(self, *_):
        return [np.array(self.name)]


class DeviceArray:
    """What lies on a GPU: all that the dispatch may look at."""

    __cuda_array_interface__ = None


@pytest.fixture
def spies(monkeypatch):
    """Engines in place of the real ones."""
    engines = {name: Spy(name) for name in ("cpu", "cuda")}
    monkeypatch.setattr(_backends, "_engines", {"reference": reference, **engines})
    return engines


def test_backend_follows_the_array(spies):
    assert _backends.select(np.ones(3), None) is spies["cpu"]
    assert _backends.select([1.0, 2.0], None) is spies["cpu"]
    assert _backends.select(np.ones(3).view(Subclass), None) is spies["cpu"]
    assert _backends.select(DeviceArray(), None) is spies["cuda"]


def test_backend_follows_its_name(spies):
    assert _backends.select(np.ones(3), "cpu") is spies["cpu"]
    assert _backends.select(np.ones(3), "reference") is reference
    assert _backends.select(DeviceArray(), "cuda") is spies["cuda"]
    assert _backends.select(object(), "cuda") is spies["cuda"]  # the engine tells what is wrong with it


@pytest.mark.usefixtures("spies")
def test_public_functions_ask_the_selected_engine():
    assert str(rn.rms_norm(np.ones((1, 2)))) == "cpu"
    assert same_bits(rn.rms_norm(np.ones((1, 2)), backend="reference"), reference.rms_norm(np.ones((1, 2))))


def test_every_backend_is_tested():
    """The list in conftest is that of the library, less those for arrays that are not NumPy's."""
    assert set(BACKENDS) == {"reference", *_backends._INSTALL} - {"cuda", "dask"}


def test_bfloat16_is_recognised_by_name():
    assert _arguments.native_dtype("x", np.dtype(ml_dtypes.bfloat16)).name == "bfloat16"
