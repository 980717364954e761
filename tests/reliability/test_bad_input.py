"""Whatever the arguments are: a result within bounds, or an error that names the argument; nothing else.

Most calls run on an engine of NumPy behind the same checks, for kernels compile for each combination of dtypes; the CPU
engine itself gets the calls whose arrays have one dtype. `fuzz_arguments.py` looks for further calls by coverage.
"""

from __future__ import annotations

import collections
import inspect
import re
import sys

import numpy as np
import pytest
from calls import FAMILY, PLACES, SIGNATURES, assert_close, assert_close_family, calls
from hypothesis import HealthCheck, given, settings

import rmsnorm_np as rn
from rmsnorm_np import _arguments, _backends, reference
from rmsnorm_np.cpu.quantized import quantized

seen = collections.Counter()  # how many calls there were, and what became of them


class NumPyEngine:
    """An engine that demands what kernels rely on, and lets the reference compute."""

    arguments = _arguments

    @staticmethod
    def new_result(x, dtype):
        return np.empty(x.shape, dtype)

    def forward(self, operation, reads, parameters, out, k, eps):
        results = self._called(operation, reads, parameters, out, k, eps)
        outputs = [name for name in operation.Writes._fields if name != operation.keep]
        found = [self._result(results[name], reads[0], *pair) for name, *pair in zip(outputs, out, strict=False)]
        return found if operation.keep is None else [*found, None]

    def backward(self, operation, reads, parameters, out, k, eps, totals=(None, None)):
        results = self._called(operation, reads, parameters, out, k, eps)
        found = [self._result(results[n], reads[0], o) for n, o in zip(operation.Writes._fields, out, strict=True)]
        likes = parameters[0], parameters[1] if "bias" in operation.Columns._fields else None
        sums = map(self._gathered, (results.get("dweight"), results.get("dbias")), likes, totals)
        return found, [*map(self._written, sums, totals)]

    def quantized(self, call, dtype, scale, bound):
        return quantized(call, dtype, scale, bound, engine=self)

    def quantize(self, operation, reads, parameters, out, k, settings):
        eps, scales, bound = settings
        dtype = operation.name.split()[1]
        assert scales.shape == reads[0].shape[:1]
        options = {"scale": scales[:, None]} if operation.scales == "in" else {"scale_ub": bound}
        self._check(reads, parameters, (None, out[1]), eps)
        results = self._called(operation, reads, parameters, (), k, eps, dtype=dtype, **options)
        scales[...] = results["scale"][:, 0]
        return self._written(results["q"], out[0]), self._written(results["h"], out[1])

    def _called(self, operation, reads, parameters, out, k, eps, **options):
        """The results of the reference by their names; of y_dot it is y."""
        self._check(reads, parameters, out, eps)
        x = self._rows(reads[0])
        given = {name: self._rows(a) for name, a in zip(operation.Reads._fields, reads, strict=True) if a is not None}
        fields = zip(operation.Columns._fields[:-1], parameters[:-1], strict=True)
        given |= {name: self._spread(a, x) for name, a in fields}
        given |= {name: x for name, along in (("bias", "bias_dot"), ("bias", "ddbias")) if given.get(along) is not None}
        given |= options | {"eps": eps, "p": k / x.shape[1], "weight_offset": parameters[-1]}
        name = operation.name.split()[0]
        if name.startswith("rms_norm_of_gated"):
            name, given["norm_before_gate"] = name.replace("rms_norm_of_gated", "gated_rms_norm"), False
        function = getattr(reference, name)
        wanted = inspect.signature(function).parameters
        needed = [name for name, one in wanted.items() if name in given or one.default is one.empty]
        result = function(**{name: given.get(name) for name in needed})
        return result._asdict() if isinstance(result, tuple) else {operation.Writes._fields[0]: result}

    def _result(self, rows, x, out):
        return self._written(self._like(rows, x), out)

    @staticmethod
    def _rows(a):
        """(rows, n), also of an array (outer, n, inner)."""
        return a if a is None or a.ndim == 2 else np.moveaxis(a, 1, 2).reshape(-1, a.shape[1])

    @staticmethod
    def _like(rows, x):
        return rows if x.ndim == 2 else np.moveaxis(rows.reshape(x.shape[0], x.shape[2], -1), 2, 1)

    @staticmethod
    def _check(reads, parameters, out, eps):
        x, (*columns, offset) = reads[0], parameters
        for array in (*reads, *columns, *out):
            assert array is None or (type(array) is np.ndarray and array.ndim in (2, 3))
            assert array is None or (array.flags.c_contiguous and array.flags.aligned)  # it may be read-only
            assert array is None or array.dtype in (*_arguments.native_dtypes,)
        for array in reads:
            assert array is None or array.shape == x.shape
        rows = x.size // x.shape[1]
        for column in columns:
            assert column is None or column.shape[1] == x.shape[1]
            assert column is None or rows == len(column) == 0 or rows % len(column) == 0
            assert column is None or column.ndim == 2
        assert type(eps) is type(offset) is float
        assert 0.0 <= eps < np.inf
        for j, given_out in enumerate(out):
            if given_out is None:
                continue
            assert given_out.flags.carray
            assert (given_out.shape, given_out.dtype) == (x.shape, reads[j].dtype)
            assert not any(column is not None and np.may_share_memory(given_out, column) for column in columns)
            for array in reads:
                if array is not None and np.may_share_memory(given_out, array):
                    assert given_out.ctypes.data == array.ctypes.data
                    assert given_out.dtype == array.dtype

    @staticmethod
    @np.errstate(invalid="ignore")  # bytes that were never meant as numbers can be a signalling NaN
    def _spread(parameter, x):
        """Row r has row r % m; in float64, so that sums of the gradient are not made of rounded numbers."""
        return None if parameter is None else np.resize(parameter.astype(np.float64), x.shape)

    @staticmethod
    @np.errstate(all="ignore")
    def _gathered(gradient, parameter, total):
        if parameter is None:
            return None
        assert total is None or (total.shape == parameter.shape and total.flags.carray)
        wide = gradient.astype(np.longdouble).reshape(len(gradient) // max(1, len(parameter)), *parameter.shape)
        return wide.sum(axis=0).astype((parameter if total is None else total).dtype)

    @staticmethod
    def _written(result, out):
        if out is None:
            return result
        out[...] = result
        return out


def attempt(call, backend, arena):
    """The error, or the result and the arguments."""
    try:
        return None, *call.on(backend, arena)
    except (TypeError, ValueError) as error:
        return error, None, None


def check(call):
    """Make the call, and hold what becomes of it against the reference and against what was meant to go wrong."""
    seen["calls"] += 1
    arena, other, before = call.arena(), call.arena(), call.arena()
    error, result, used = attempt(call, "cpu", arena)
    if error is not None:
        message = str(error)
        name = re.match(r"([\w\[\]]+) (is|has|and) ", message)
        assert name, f"an error that names no argument: {message}"
        assert (name[1], type(error)) in call.wrong, message
        assert arena.tobytes() == before.tobytes(), "memory was written before an error"
        seen["refused"] += 1
        if "complex" not in message:  # which the reference takes
            again, _, _ = attempt(call, "reference", other)
            assert (type(again), str(again)) == (type(error), message)
        return
    assert not call.wrong, "accepted"
    seen["computed"] += 1
    _, want, _ = attempt(call, "reference", other)
    results, wants = ((a,) if isinstance(a, np.ndarray) else tuple(a) for a in (result, want))

    written = np.zeros(len(arena), bool)
    places = call.out_places()
    for name, place in places.items():
        assert results[PLACES[name]] is used[name]
        place.cover(written)
    for place, array in enumerate(results):
        assert array is None or place in map(PLACES.get, places) or not np.shares_memory(array, arena)
    assert np.array_equal(arena[~written], before[~written]), "memory was written that is not out's"
    compare = assert_close_family if call.function in FAMILY else assert_close
    compare(call, call.arguments(before), results, wants)


quiet = settings(deadline=None, suppress_health_check=list(HealthCheck))  # the strategy is large and at times slow


@pytest.fixture
def numpy_engine(monkeypatch):
    monkeypatch.setitem(_backends._engines, "cpu", NumPyEngine())


@pytest.fixture(autouse=True)
def report():
    seen.clear()
    yield
    sys.stdout.write(f"{dict(seen)}\n")  # shown with -rP


@pytest.mark.usefixtures("numpy_engine")
@settings(quiet, max_examples=300)
@given(call=calls())
def test_any_call(call):
    check(call)


@pytest.mark.engine
@pytest.mark.usefixtures("numpy_engine")
@settings(quiet, max_examples=1500)
@given(call=calls())
def test_more_calls(call):
    check(call)


@pytest.mark.slow
@pytest.mark.usefixtures("numpy_engine")
@settings(quiet, max_examples=100_000)
@given(call=calls())
def test_many_calls(call):
    check(call)


OPTIONS = {
    "eps": 0.5,
    "p": 0.4,
    "axis": 1,
    "weight_offset": 0.5,
    "norm_before_gate": False,
    "dtype": "float8_e5m2",
    "scale": 0.05,
    "scale_ub": 1.0,
}


@pytest.mark.usefixtures("numpy_engine")
@pytest.mark.parametrize("name", SIGNATURES)
def test_every_option_reaches_the_engine(name, rng):
    """And changes the result to that of the reference."""
    parameters = inspect.signature(getattr(rn, name)).parameters
    like_x = "x", *SIGNATURES[name].rows, *SIGNATURES[name].maybe
    arrays = {one: rng.standard_normal((3, 6, 6)) for one in like_x}
    arrays |= {one: rng.standard_normal(6) for one in ("weight", "bias", *SIGNATURES[name].along)}
    plain = results_of(name, arrays)
    for option, value in OPTIONS.items():
        if option not in parameters or (option == "dtype" and "scale" not in parameters):
            continue
        got, want = (results_of(name, arrays | {option: value}, backend) for backend in ("cpu", "reference"))
        for a, exact in zip(got, want, strict=True):
            np.testing.assert_allclose(a, exact, rtol=1e-12, atol=1e-13)
        assert any(not np.array_equal(a, before) for a, before in zip(got, plain, strict=True)), option


def results_of(name, arguments, backend="cpu"):
    """Those that are arrays; 8 bits as float64."""
    result = getattr(rn, name)(**arguments, backend=backend)
    results = result if isinstance(result, tuple) else (result,)
    return [a if a.dtype == np.float64 else a.astype(np.float64) for a in results if a is not None]


@pytest.mark.usefixtures("numpy_engine")
@settings(quiet, max_examples=300)
@given(call=calls(functions=tuple(FAMILY)))
def test_any_call_of_the_family(call):
    check(call)


@pytest.mark.engine
@pytest.mark.usefixtures("numpy_engine")
@settings(quiet, max_examples=1000)
@given(call=calls(functions=tuple(FAMILY)))
def test_more_calls_of_the_family(call):
    check(call)


@pytest.mark.slow
@pytest.mark.usefixtures("numpy_engine")
@settings(quiet, max_examples=100_000)
@given(call=calls(functions=tuple(FAMILY)))
def test_many_calls_of_the_family(call):
    check(call)


@pytest.mark.engine
@settings(quiet, max_examples=200)
@given(call=calls(mixed=False, functions=tuple(FAMILY), one_kernel=True))
def test_any_call_of_the_family_on_the_compiled_engine(call):
    """With the kernels that `test_family_engines` compiles for exact results."""
    check(call)


@pytest.mark.slow  # hardly a call in the time that its kernel takes to compile
@settings(quiet, max_examples=500)
@given(call=calls(mixed=False))
def test_any_call_of_the_compiled_engine(call):
    check(call)


@pytest.mark.slow
@settings(quiet, max_examples=50_000)
@given(call=calls(mixed=False, most=5000))
def test_many_calls_of_the_compiled_engine(call):
    check(call)
