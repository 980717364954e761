"""Whatever the arguments are: the reference's result within bounds, or an error that names the argument; nothing else.

Most calls run on an engine of NumPy behind the same checks, for kernels compile for each combination of dtypes; the CPU
engine itself gets the calls whose arrays have one dtype. `fuzz_arguments.py` looks for further calls by coverage.
"""

from __future__ import annotations

import collections
import re
import sys

import numpy as np
import pytest
from calls import Same, assert_close, calls
from hypothesis import HealthCheck, given, settings

from rmsnorm_np import _arguments, _backends, reference

ARGUMENTS = ("x", "dy", "weight", "bias", "eps", "p", "axis", "weight_offset", "out")
seen = collections.Counter()  # how many calls there were, and what became of them


class NumPyEngine:
    """An engine that demands what kernels rely on, and lets the reference compute."""

    arguments = _arguments

    @staticmethod
    def new_result(x, dtype):
        return np.empty(x.shape, dtype)

    def forward(self, operation, reads, parameters, out, k, eps):
        x, residual = reads
        self._check(reads, parameters, out, eps)
        assert residual is None
        y = self._called(operation, (self._rows(x),), parameters, k, eps)
        return self._written(self._like(y, x), out[0]), None

    def backward(self, operation, reads, parameters, out, k, eps, totals=(None, None)):
        x, dy, dh = reads
        self._check(reads, parameters, out, eps)
        assert dh is None
        dx, *gradients = self._called(operation, (self._rows(dy), self._rows(x)), parameters, k, eps)
        sums = map(self._gathered, gradients, parameters, totals)
        return (self._written(self._like(dx, x), out[0]),), [*map(self._written, sums, totals)]

    def _called(self, operation, arrays, parameters, k, eps):
        (weight, bias, offset), x = parameters, arrays[-1]
        p = {"p": k / x.shape[1]} if operation.name.startswith("rms") else {}
        function = getattr(reference, operation.name)
        return function(*arrays, self._spread(weight, x), self._spread(bias, x), eps=eps, weight_offset=offset, **p)

    @staticmethod
    def _rows(a):
        """(rows, n), also of an array (outer, n, inner)."""
        return a if a.ndim == 2 else np.moveaxis(a, 1, 2).reshape(-1, a.shape[1])

    @staticmethod
    def _like(rows, x):
        return rows if x.ndim == 2 else np.moveaxis(rows.reshape(x.shape[0], x.shape[2], -1), 2, 1)

    @staticmethod
    def _check(reads, parameters, out, eps):
        x, (weight, bias, offset), given_out = reads[0], parameters, out[0]
        for array in (*reads, weight, bias, *out):
            assert array is None or (type(array) is np.ndarray and array.ndim in (2, 3))
            assert array is None or (array.flags.c_contiguous and array.flags.aligned)  # it may be read-only
            assert array is None or array.dtype in (*_arguments.native_dtypes,)
        for array in reads:
            assert array is None or array.shape == x.shape
        rows = x.size // x.shape[1]
        for parameter in (weight, bias):
            assert parameter is None or parameter.shape[1] == x.shape[1]
            assert parameter is None or rows == len(parameter) == 0 or rows % len(parameter) == 0
            assert parameter is None or parameter.ndim == 2
            assert given_out is None or parameter is None or not np.may_share_memory(given_out, parameter)
        assert type(eps) is type(offset) is float
        assert 0.0 <= eps < np.inf
        if given_out is not None:
            assert given_out.flags.carray
            assert (given_out.shape, given_out.dtype) == (x.shape, x.dtype)
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
        name = re.match(rf"({'|'.join(ARGUMENTS)}) (is|has) ", message)
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
    out = used.get("out")
    if out is not None:
        assert results[0] is out
        same = isinstance(call.options.get("out"), Same)
        (call.arrays[call.options["out"]] if same else call.arrays["out"]).place.cover(written)
    for array in results[out is not None :]:
        assert array is None or not np.shares_memory(array, arena)
    assert np.array_equal(arena[~written], before[~written]), "memory was written that is not out's"
    assert_close(call, call.arguments(before), results, wants)


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
