"""Every error that a caller can meet, by its whole message: the argument, what was given and what was expected.

Each case is tried for each function that has the argument and with each engine: no function may forget a check.
"""

from __future__ import annotations

import datetime as dt
import inspect
import re
import sys

import numpy as np
import pytest

import rmsnorm_np as rn
from rmsnorm_np import _backends, _shapes, reference

FUNCTIONS = ("rms_norm", "rms_norm_backward", "layer_norm", "layer_norm_backward")
X = np.ones((2, 4))


def call(name, backend, x=X, dy=None, **options):
    """The function of that name on x, and on an x-shaped dy where it takes one."""
    arguments = (x,) if not name.endswith("backward") else (np.ones(np.shape(x)) if dy is None else dy, x)
    return getattr(rn, name)(*arguments, backend=backend, **options)


def masked(shape):
    return np.ma.masked_array(np.ones(shape), mask=np.zeros(shape, bool))


def matrix(shape):
    return np.ones(shape).view(np.matrix)


def locked(shape):
    a = np.ones(shape)
    a.flags.writeable = False
    return a


class DeviceArray:
    """What lies on a GPU: all that this package looks at."""

    __cuda_array_interface__ = None

    def __repr__(self):  # the id of a test must not contain an address
        return "DeviceArray()"


class Tensor:
    """A PyTorch tensor that NumPy cannot read: all of it that this package looks at."""

    shape = (2, 4)
    dtype = "torch.float32"
    requires_grad = False
    error: Exception

    def __array__(self, dtype=None, copy=None):
        raise self.error

    def __repr__(self):  # the id of a test must not contain an address
        return f"{type(self).__name__}()"


class Parameter(Tensor):
    requires_grad = True
    error = RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")


class Sparse(Tensor):
    error = TypeError("can't convert Sparse layout tensor to numpy.")


FLOATS = "expected float16, bfloat16, float32 or float64"
FIT = "expected (4,), the axes (1,) of x.shape (2, 4)"
SPREAD = "or a shape that broadcasts to x.shape and has these axes in full"
SWAPPED = "weight and x look swapped: x comes first"
KEYWORD = "if eps was meant, it is keyword-only: eps=..."
TWO = "an int or a tuple of ints"

# arguments, error, message
CASES = [
    # shape of x, axis
    ({"x": 3.0}, ValueError, "x has shape (), expected at least one axis to normalise over"),
    ({"x": np.array(3.0)}, ValueError, "x has shape (), expected at least one axis to normalise over"),
    ({"x": np.ones((2, 0))}, ValueError, "x has shape (2, 0), expected at least one element along axis -1"),
    (
        {"x": np.ones((0, 2)), "axis": (0, 1)},
        ValueError,
        "x has shape (0, 2), expected at least one element along axis (0, 1)",
    ),
    ({"axis": 2}, ValueError, "axis is 2, expected -2 to 1 for x.shape (2, 4)"),
    ({"axis": -3}, ValueError, "axis is -3, expected -2 to 1 for x.shape (2, 4)"),
    ({"axis": (0, 2)}, ValueError, "axis is (0, 2), expected -2 to 1 for x.shape (2, 4)"),
    ({"axis": (1, -1)}, ValueError, "axis is (1, -1), expected each axis of x.shape (2, 4) at most once"),
    ({"axis": ()}, ValueError, "axis is (), expected at least one axis"),
    ({"axis": 1.0}, TypeError, f"axis is 1.0, expected {TWO}"),
    ({"axis": -1.0}, TypeError, f"axis is -1.0, expected {TWO}"),
    ({"axis": None}, TypeError, f"axis is None, expected {TWO}"),
    ({"axis": True}, TypeError, f"axis is True, expected {TWO}"),
    ({"axis": [0, 1]}, TypeError, f"axis is [0, 1], expected {TWO}"),
    ({"axis": (0, 1.0)}, TypeError, f"axis is (0, 1.0), expected {TWO}"),
    # kinds of arrays
    ({"x": np.ones((2, 4), np.longdouble)}, TypeError, f"x has dtype {np.dtype(np.longdouble)}, {FLOATS}"),
    ({"x": np.ones((2, 4), object)}, TypeError, f"x has dtype object, {FLOATS}"),
    ({"x": None}, TypeError, "x is None, expected an array"),
    ({"x": Parameter()}, TypeError, "x is a Parameter that requires grad, expected an array: pass x.detach()"),
    (
        {"weight": Parameter()},
        TypeError,
        "weight is a Parameter that requires grad, expected an array: pass weight.detach()",
    ),
    ({"weight": Sparse()}, TypeError, "weight is not an array: can't convert Sparse layout tensor to numpy."),
    ({"x": ["a", "b"]}, TypeError, f"x has dtype <U1, {FLOATS}"),
    ({"x": np.array([b"a"])}, TypeError, f"x has dtype |S1, {FLOATS}"),
    ({"x": np.array([dt.date(2019, 10, 16)], "M8[D]")}, TypeError, f"x has dtype datetime64[D], {FLOATS}"),
    ({"x": np.ones(3, [("a", "f4")])}, TypeError, f"x has dtype [('a', '<f4')], {FLOATS}"),
    ({"x": np.ones(3, "V2")}, TypeError, f"x has dtype |V2, {FLOATS}"),
    ({"weight": np.ones(4, object)}, TypeError, f"weight has dtype object, {FLOATS}"),
    ({"bias": ["a"] * 4}, TypeError, f"bias has dtype <U1, {FLOATS}"),
    ({"x": masked((2, 4))}, TypeError, "x is a masked array, expected one without a mask, such as x.filled(0.0)"),
    (
        {"weight": masked(4)},
        TypeError,
        "weight is a masked array, expected one without a mask, such as weight.filled(0.0)",
    ),
    ({"x": matrix((2, 4))}, TypeError, "x is a numpy.matrix, expected an ndarray, such as x.A"),
    (
        {"weight": DeviceArray()},
        TypeError,
        "weight is a device array, expected a host array like x, such as weight.copy_to_host()",
    ),
    # shapes of parameters
    ({"weight": np.ones(3)}, ValueError, f"weight has shape (3,), {FIT}"),
    ({"bias": np.ones(1)}, ValueError, f"bias has shape (1,), {FIT}"),
    ({"weight": 2.0}, ValueError, f"weight has shape (), {FIT}; {KEYWORD}"),
    ({"weight": np.ones(4), "bias": 1e-5}, ValueError, f"bias has shape (), {FIT}; {KEYWORD}"),
    ({"weight": np.ones((3, 4))}, ValueError, f"weight has shape (3, 4), {FIT}, {SPREAD}"),
    ({"bias": np.ones((2, 1))}, ValueError, f"bias has shape (2, 1), {FIT}, {SPREAD}"),
    (
        {"bias": np.ones((1, 2, 4))},
        ValueError,
        f"bias has shape (1, 2, 4), {FIT}; bias and x look swapped: x comes first",
    ),
    ({"bias": np.ones((3, 4, 2))}, ValueError, f"bias has shape (3, 4, 2), {FIT}"),
    (
        {"x": np.ones(4), "weight": np.ones((2, 4))},
        ValueError,
        f"weight has shape (2, 4), expected (4,), the axes (0,) of x.shape (4,); {SWAPPED}",
    ),
    (
        {"x": np.ones(2), "weight": np.ones((2, 4)), "axis": 0},
        ValueError,
        f"weight has shape (2, 4), expected (2,), the axes (0,) of x.shape (2,); {SWAPPED}",
    ),
    (
        {"x": np.ones((2, 3, 5, 4)), "weight": np.ones((3, 4))},
        ValueError,
        f"weight has shape (3, 4), expected (4,), the axes (3,) of x.shape (2, 3, 5, 4), {SPREAD}; "
        "for the axes (1, 3), pass weight.reshape(3, 1, 4)",
    ),
    (
        {"x": np.ones((2, 3, 5, 4)), "weight": np.ones((3, 7))},
        ValueError,
        f"weight has shape (3, 7), expected (4,), the axes (3,) of x.shape (2, 3, 5, 4), {SPREAD}",
    ),
    (
        {"weight": np.ones(4), "axis": (0, 1)},
        ValueError,
        "weight has shape (4,), expected (2, 4), the axes (0, 1) of x.shape (2, 4)",
    ),
    (
        {"weight": np.ones(4), "axis": 0},
        ValueError,
        "weight has shape (4,), expected (2,), the axes (0,) of x.shape (2, 4)",
    ),
    (
        {"bias": np.ones((2, 4)), "axis": 0},
        ValueError,
        "bias has shape (2, 4), expected (2,), the axes (0,) of x.shape (2, 4)",
    ),
    (
        {"x": np.ones((2, 3, 4)), "weight": np.ones((4, 2)), "axis": (2, 0)},
        ValueError,
        "weight has shape (4, 2), expected (2, 4), the axes (0, 2) of x.shape (2, 3, 4)",
    ),
    # numbers
    ({"eps": -1e-9}, ValueError, "eps is -1e-09, expected a finite number >= 0"),
    ({"eps": float("nan")}, ValueError, "eps is nan, expected a finite number >= 0"),
    ({"eps": float("inf")}, ValueError, "eps is inf, expected a finite number >= 0"),
    ({"eps": np.float32("inf")}, ValueError, f"eps is {np.float32('inf')!r}, expected a finite number >= 0"),
    ({"eps": True}, ValueError, "eps is True, expected a finite number >= 0"),
    ({"eps": "1e-6"}, TypeError, "eps is '1e-6', expected a finite number >= 0"),
    ({"eps": None}, TypeError, "eps is None, expected a finite number >= 0"),
    ({"eps": 1j}, TypeError, "eps is 1j, expected a finite number >= 0"),
    ({"eps": np.array(-1.0)}, ValueError, "eps is array(-1.), expected a finite number >= 0"),
    ({"eps": np.array(1j)}, TypeError, "eps is array(0.+1.j), expected a finite number >= 0"),
    ({"eps": np.array(True)}, TypeError, "eps is array(True), expected a finite number >= 0"),
    ({"eps": np.array(1, "m8[s]")}, TypeError, f"eps is {np.array(1, 'm8[s]')!r}, expected a finite number >= 0"),
    ({"eps": np.array([1e-6])}, TypeError, "eps is array([1.e-06]), expected a finite number >= 0"),
    ({"eps": np.ma.masked}, TypeError, "eps is masked, expected a finite number >= 0"),
    (
        {"weight": np.ones(4), "weight_offset": float("nan")},
        ValueError,
        "weight_offset is nan, expected a finite number",
    ),
    (
        {"weight": np.ones(4), "weight_offset": float("-inf")},
        ValueError,
        "weight_offset is -inf, expected a finite number",
    ),
    ({"weight": np.ones(4), "weight_offset": None}, TypeError, "weight_offset is None, expected a finite number"),
    ({"weight": np.ones(4), "weight_offset": False}, ValueError, "weight_offset is False, expected a finite number"),
    ({"weight_offset": 1.0}, ValueError, "weight_offset is 1.0, expected 0.0 without a weight to add it to"),
    # out
    ({"out": [0.0] * 8}, TypeError, "out is of type list, expected a numpy.ndarray"),
    ({"out": np.ones(8)}, ValueError, "out has shape (8,), expected x.shape (2, 4)"),
    ({"out": np.ones((1, 4))}, ValueError, "out has shape (1, 4), expected x.shape (2, 4)"),
    (
        {"out": np.ones((2, 4), np.float32)},
        TypeError,
        "out has dtype float32, expected float64, the dtype of the result",
    ),
    (
        {"x": np.ones((2, 4), np.float32), "out": X.copy()},
        TypeError,
        "out has dtype float64, expected float32, the dtype of the result",
    ),
    (
        {"x": np.ones((2, 4), int), "out": np.ones((2, 4), int)},
        TypeError,
        "out has dtype int64, expected float64, the dtype of the result",
    ),
    ({"out": locked((2, 4))}, ValueError, "out is read-only, expected a writable array"),
    ({"out": masked((2, 4))}, TypeError, "out is a masked array, expected one without a mask, such as out.filled(0.0)"),
    ({"out": matrix((2, 4))}, TypeError, "out is a numpy.matrix, expected an ndarray, such as out.A"),
]

# of one function or two
PARTIAL_CASES = [
    ({"p": p}, error, f"p is {p!r}, expected a number with 0 < p <= 1")
    for error, values in {
        ValueError: (0.0, 0, -0.5, 1.0000001, 2, float("nan"), float("inf"), True, False, 10**400, np.float32(0))
        + (np.array(2.0),),
        TypeError: ("0.5", None, 1j, [0.5], np.ones(2), np.array("0.5")),
    }.items()
    for p in values
]
BACKWARD_CASES = [
    ({"dy": np.ones((2, 3))}, ValueError, "dy has shape (2, 3), expected x.shape (2, 4)"),
    (
        {"dy": np.ones(4)},
        ValueError,
        "dy has shape (4,), expected x.shape (2, 4); the arguments are dy, x, weight, bias, in this order",
    ),
    (
        {"x": np.ones(4), "dy": np.ones((2, 4)), "weight": np.ones((2, 4))},
        ValueError,
        "dy has shape (2, 4), expected x.shape (4,); the arguments are dy, x, weight, bias, in this order",
    ),
    ({"dy": Parameter()}, TypeError, "dy is a Parameter that requires grad, expected an array: pass dy.detach()"),
    ({"dy": np.ones((2, 4), object)}, TypeError, f"dy has dtype object, {FLOATS}"),
    ({"dy": masked((2, 4))}, TypeError, "dy is a masked array, expected one without a mask, such as dy.filled(0.0)"),
    ({"dy": DeviceArray()}, TypeError, "dy is a device array, expected a host array like x, such as dy.copy_to_host()"),
]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("arguments", "error", "message"), CASES, ids=lambda value: str(value)[:60])
def test_error(name, backend, arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(name, backend, **arguments)


@pytest.mark.parametrize("name", ["rms_norm", "rms_norm_backward"])
@pytest.mark.parametrize(("arguments", "error", "message"), PARTIAL_CASES, ids=lambda value: str(value)[:60])
def test_error_of_p(name, backend, arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(name, backend, **arguments)


@pytest.mark.parametrize("name", ["rms_norm_backward", "layer_norm_backward"])
@pytest.mark.parametrize(("arguments", "error", "message"), BACKWARD_CASES, ids=lambda value: str(value)[:60])
def test_error_of_dy(name, backend, arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(name, backend, **arguments)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", [np.complex64, np.complex128])
def test_engines_refuse_complex_arrays(name, kind):
    """The reference takes them, for the complex step; no engine does, and none drops the imaginary part."""
    message = f"^x has dtype {np.dtype(kind)}, {FLOATS}$"
    with pytest.raises(TypeError, match=message):
        call(name, "cpu", x=np.ones((2, 4), kind))
    with pytest.raises(TypeError, match=f"^weight has dtype {np.dtype(kind)}, {FLOATS}$"):
        call(name, "cpu", weight=np.ones(4, kind))


ROWS = ("x", "h", "dy", "dh", "gate", "x_dot", "ddx")


def by_position(name):
    """The arguments of a function in their order, each right: rows as X, and what has one row."""
    parameters = inspect.signature(getattr(rn, name)).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return {one: X if one in ROWS else np.ones(4) for one in names}


@pytest.mark.parametrize(
    "name", [name for name in rn.__all__ if name.endswith(("backward", "jvp")) or name == "gated_rms_norm"]
)
def test_the_order_of_arguments_is_that_of_the_function(name, backend):
    arguments = by_position(name)
    x_name = "h" if "h" in arguments else "x"
    for wrong in set(arguments) & {"dy", "gate", "x_dot", "ddx"}:
        message = (
            f"{wrong} has shape (4,), expected {x_name}.shape (2, 4); the arguments are {', '.join(arguments)}, in "
            "this order"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            getattr(rn, name)(**arguments | {wrong: np.ones(4)}, backend=backend)


@pytest.mark.parametrize("name", [name for name in rn.__all__ if name.endswith(("jvp", "double_backward"))])
def test_directions_are_no_complex_arrays_either(name):
    arguments = by_position(name)
    for wrong in set(arguments) - {"x", "dy"}:
        complex_one = arguments[wrong].astype(np.complex128)
        with pytest.raises(TypeError, match=f"^{wrong} has dtype complex128, {FLOATS}$"):
            getattr(rn, name)(**arguments | {wrong: complex_one}, backend="cpu")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_ragged_list_names_its_argument(name, backend):
    with pytest.raises(ValueError, match=r"^x is not an array: .*inhomogeneous"):
        call(name, backend, x=[[1.0, 2.0], [3.0]], dy=X)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_out_is_untouched_after_an_error(name, backend):
    out = np.full((2, 4), 7.0)
    with pytest.raises(ValueError, match=r"^weight has shape"):
        call(name, backend, out=out, weight=np.ones(3))
    assert (out == 7.0).all()


def test_the_errors_of_real_tensors():
    """What they say to do is done, and works."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; Tensor stands in for it above")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.nn.Parameter(torch.arange(8, dtype=dtype).reshape(2, 4))
        with pytest.raises(TypeError, match=r"^x is a Parameter that requires grad, expected an array: ") as caught:
            rn.rms_norm(x, backend="reference")
        converted = eval(str(caught.value).split("pass ")[1], {"x": x})
        assert rn.rms_norm(converted, backend="reference").dtype.name == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "axis", "axes"),
    [((2, 3, 5, 4), (3, 4), -1, (1, 3)), ((2, 3, 5, 4), (2, 4), -1, (0, 3)), ((3, 3, 5, 4), (3, 4), -1, (1, 3)),
     ((2, 3, 5, 7, 4), (2, 5, 4), -1, (0, 2, 4)), ((2, 3, 5, 4), (2, 5, 4), (2, 3), (0, 2, 3))],
    ids=str,
)  # fmt: skip
def test_the_shape_that_an_error_suggests(x_shape, weight_shape, axis, axes, rng):
    """The weight then belongs to the axes that the message names."""
    x, weight = rng.normal(size=x_shape), 2.0 ** rng.integers(-9, 9, size=weight_shape)  # products are exact
    with pytest.raises(ValueError, match=r"; for the axes ") as caught:
        rn.rms_norm(x, weight, axis=axis, backend="reference")
    named, shape = re.search(r"for the axes (\(.*?\)), pass weight.reshape(\(.*\))$", str(caught.value)).groups()
    assert named == str(axes)
    y = rn.rms_norm(x, weight.reshape(eval(shape)), axis=axis, backend="reference")
    wide = weight.reshape([length if i in axes else 1 for i, length in enumerate(x_shape)])
    np.testing.assert_array_equal(y, rn.rms_norm(x, axis=axis, backend="reference") * wide)


# Backends


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("unknown", ["numba", "CPU", "", 1])
def test_unknown_backend(name, unknown):
    message = f"backend is {unknown!r}, expected None, 'reference', 'cpu' or 'cuda'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(name, unknown)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_has_no_other_backend(name):
    arguments = (X, X) if name.endswith("backward") else (X,)
    message = "backend is 'cpu', expected None or 'reference' from a function of the reference"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(reference, name)(*arguments, backend="cpu")


@pytest.mark.parametrize(
    "x", [X, [1.0, 2.0], (1.0, 2.0), X.view(np.matrix)], ids=["ndarray", "list", "tuple", "matrix"]
)
def test_a_host_array_does_not_travel_unasked(x):
    message = (
        f"x is a host array ({type(x).__name__}), backend 'cuda' takes device arrays: "
        "move it with numba.cuda.to_device(x)"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        rn.rms_norm(x, backend="cuda")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_device_array_does_not_travel_unasked(backend):
    message = f"x is a device array (DeviceArray), backend {backend!r} takes host arrays: move it with x.copy_to_host()"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        rn.rms_norm(DeviceArray(), backend=backend)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_missing_engine_names_what_to_install(name, monkeypatch):
    """No other engine takes its place, and the cause is kept."""
    monkeypatch.setattr(_backends, "_engines", {})
    monkeypatch.setitem(sys.modules, f"rmsnorm_np.{name}", None)
    expected = {
        "cpu": "backend 'cpu' needs numba: pip install numba",
        "cuda": "backend 'cuda' needs numba-cuda: pip install \"rmsnorm_np[cuda13]\", or [cuda12] for a CUDA 12 driver",
    }[name]
    with pytest.raises(ImportError, match=f"^{re.escape(expected)}$") as caught:
        rn.rms_norm(X if name == "cpu" else DeviceArray())
    assert isinstance(caught.value.__cause__, ImportError)


def test_shape_checks_need_no_array():
    """They serve arrays on any device: shapes and dtypes are all that they take."""
    assert _shapes.axes_of((-1, 0), (2, 3, 4)) == (0, 2)
    assert _shapes.parameter_lead("weight", (3, 4), (2, 3, 4), (2,)) == (3,)
    assert _shapes.parameter_lead("weight", (2, 4), (2, 3, 4), (0, 2)) == ()
    with pytest.raises(ValueError, match=r"^dy has shape"):
        _shapes.check_same_shape("dy", (1,), "x", (2,))


@pytest.mark.parametrize("name", ["rms_norm_backward", "layer_norm_backward"])
@pytest.mark.parametrize("module", [rn, rn.reference], ids=["public", "reference"])
def test_a_missing_dy_is_named(name, module):
    """A forward call has no dy either: the arguments of a backward one would pass for those."""
    with pytest.raises(TypeError, match="dy is None, expected an array"):
        getattr(module, name)(None, X, backend="reference")
