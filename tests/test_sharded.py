"""Rows that are cut over workers: each has a part of every row, and its part of the result is that of whole rows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import DTYPES
from tolerances import LONGDOUBLE_IS_WIDER, dx_terms, worst_ulp

import rmsnorm_np as rn
from rmsnorm_np import _backends, reference
from rmsnorm_np.reference import sharded

L = np.longdouble
NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
CALLS = {"rms_norm": 1, "layer_norm": 2, "add_rms_norm": 1, "add_layer_norm": 2}
CUTS = [(0, 24), (0, 12, 24), (0, 1, 24), (0, 5, 6, 24), (0, 3, 7, 12, 24)]

needs_range = pytest.mark.skipif(not sharded._HAS_RANGE, reason="longdouble is float64 here")


@pytest.fixture(params=NORMS)
def norm(request):
    """The name of a forward function."""
    return request.param


class Workers:
    """Threads that meet at a barrier in each reduction."""

    def __init__(self, count):
        self.barrier = threading.Barrier(count, timeout=60)
        self.sent, self.calls = [None] * count, [0] * count

    def reduce_of(self, worker):
        def reduce(a):
            assert a.dtype == np.float64
            assert a.flags.carray
            self.calls[worker] += 1
            self.sent[worker] = a
            self.barrier.wait()
            total = sum(self.sent[1:], self.sent[0].copy())
            self.barrier.wait()
            return total

        return reduce

    def run(self, work):
        """[work(worker, reduce), …], at the same time."""
        with ThreadPoolExecutor(len(self.sent)) as pool:
            tasks = [pool.submit(self._guarded, work, i) for i in range(len(self.sent))]
            return [task.result() for task in tasks]

    def _guarded(self, work, worker):
        try:
            return work(worker, self.reduce_of(worker))
        except BaseException:
            self.barrier.abort()  # or the others wait
            raise


def arrays(rng, shape=(9, 24), dtype=np.float32, residual_dtype=None, parameter_shape=None):
    parameter_shape = shape[-1:] if parameter_shape is None else parameter_shape
    x, residual, dy, dh = rng.standard_normal((4, *shape))
    weight, bias = rng.uniform(0.5, 1.5, parameter_shape), rng.standard_normal(parameter_shape)
    wide = residual_dtype or dtype
    kinds = {"x": dtype, "residual": wide, "dy": dtype, "dh": wide, "weight": dtype, "bias": dtype}
    given = {"x": x, "residual": residual, "dy": dy, "dh": dh, "weight": weight, "bias": bias}
    return {name: a.astype(kinds[name]) for name, a in given.items()}


def forward(norm, a, **options):
    """[y], or [y, h]."""
    given = (a["x"], a["residual"]) if norm.startswith("add") else (a["x"],)
    result = getattr(rn, norm)(*given, a["weight"], a["bias"], **options)
    return list(result) if norm.startswith("add") else [result]


def backward(norm, a, **options):
    given = (a["dy"], a["dh"], a["residual"]) if norm.startswith("add") else (a["dy"], a["x"])
    return list(getattr(rn, f"{norm}_backward")(*given, a["weight"], a["bias"], **options))


def part(a, begin, end):
    return {name: None if one is None else np.ascontiguousarray(one[..., begin:end]) for name, one in a.items()}


def in_parts(function, norm, a, cuts, **options):
    """The results of all workers, put together, and how often each called reduce."""
    workers = Workers(len(cuts) - 1)
    results = workers.run(lambda i, reduce: function(norm, part(a, *cuts[i : i + 2]), reduce=reduce, **options))
    whole = [None if parts[0] is None else np.concatenate(parts, axis=-1) for parts in zip(*results, strict=True)]
    return whole, workers.calls


def exact(norm, a, weight_offset):
    """y, dx and what they are measured by; in longdouble."""
    x = (a["residual"] if norm.startswith("add") else a["x"]).astype(L)
    forward_x = reference.add_rms_norm(a["x"], a["residual"]).h.astype(L) if norm.startswith("add") else x
    centred = "layer" in norm

    def xhat_of(x):
        for _ in range(2 if centred else 0):
            x = x - x.mean(axis=-1, keepdims=True)
        rstd = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + L(1e-6))
        return x * rstd, rstd

    scale = L(weight_offset) + a["weight"].astype(L)
    scaled = xhat_of(forward_x)[0] * scale
    y = scaled + a["bias"].astype(L)
    (xhat, rstd), g = xhat_of(x), a["dy"].astype(L) * scale
    c = (g * xhat).mean(axis=-1, keepdims=True)
    dx = rstd * (g - (g.mean(axis=-1, keepdims=True) if centred else 0) - xhat * c)
    terms = dx_terms(g, xhat, rstd, x.shape[-1], centred=centred)
    if norm.startswith("add"):
        dx = dx + a["dh"].astype(L)
        terms = np.maximum(terms, np.abs(a["dh"].astype(L)))
    return y, np.maximum(np.abs(scaled), np.abs(a["bias"].astype(L))), dx, terms


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.skipif(not LONGDOUBLE_IS_WIDER, reason="nothing to judge float64 by")
def test_each_part_is_that_of_whole_rows(norm, dtype, cuts, backend, rng):
    """Rounded once: 0.51 ULP up to float32. In float64, 0.51 and what is lost of each number that was sent."""
    a = arrays(rng, dtype=dtype)
    kept = {name: one.copy() for name, one in a.items()}
    y, y_terms, dx, terms = exact(norm, a, 0.5)
    got, calls = in_parts(forward, norm, a, cuts, weight_offset=0.5, backend=backend)
    assert calls == [CALLS[norm]] * (len(cuts) - 1)
    assert got[0].dtype == dtype
    bound = 1.0 if dtype == np.float64 else 0.51
    assert worst_ulp(got[0], y, y_terms) <= bound
    if norm.startswith("add"):
        assert got[1].tobytes() == reference.add_rms_norm(a["x"], a["residual"]).h.tobytes()
    got, calls = in_parts(backward, norm, a, cuts, weight_offset=0.5, backend=backend)
    assert calls == [CALLS[norm]] * (len(cuts) - 1)
    assert worst_ulp(got[0], dx, terms) <= bound
    want = backward(norm, a, weight_offset=0.5, backend="reference")
    for gradient, whole in zip(got[1:], want[1:], strict=True):
        assert gradient.dtype == whole.dtype
        assert worst_ulp(gradient, whole.astype(L), np.abs(whole.astype(L)).max()) <= 1.0
    for name, one in a.items():
        assert one.tobytes() == kept[name].tobytes()


@pytest.mark.parametrize("workers", [2, 8, 24])
@pytest.mark.skipif(not LONGDOUBLE_IS_WIDER, reason="nothing to judge float64 by")
@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_many_workers_lose_nothing_in_float64(norm, workers, scale, rng):
    """A plain sum of float64 over workers is off by more with each of them."""
    a = arrays(rng, (50, 240), np.float64)
    a["x"][:, :7] *= scale
    y, y_terms, dx, terms = exact(norm, a, 0.0)
    cuts = tuple(range(0, 241, 240 // workers))
    assert worst_ulp(in_parts(forward, norm, a, cuts)[0][0], y, y_terms) <= 0.52
    assert worst_ulp(in_parts(backward, norm, a, cuts)[0][0], dx, terms) <= 0.52


@pytest.mark.parametrize("mean", [1e6, -3.0])
def test_rows_far_from_zero(mean, rng):
    """The mean is known to more digits than a float64 has: elements next to it show it."""
    a = arrays(rng, (20, 24))
    a["x"] = (mean + rng.integers(-3, 4, (20, 24))).astype(np.float32)
    a["weight"][...], a["bias"] = 1.0, None
    for dtype in (np.float32, np.float64):
        a["x"], a["weight"] = a["x"].astype(dtype), a["weight"].astype(dtype)
        (y,), _ = in_parts(forward, "layer_norm", a, (0, 5, 24))
        assert worst_ulp(y, reference.layer_norm(a["x"]).astype(L)) <= 1.0
        constant = np.full_like(a["x"], 0.1)
        (y,), _ = in_parts(forward, "layer_norm", {**a, "x": constant}, (0, 5, 24))
        assert np.array_equal(y, np.zeros_like(y))


@pytest.mark.skipif(not LONGDOUBLE_IS_WIDER, reason="nothing to judge float64 by")
def test_gradients_of_rows_far_from_zero(rng):
    """What is left of the mean, times a large sum of g, is no small part of Σ g · (x - mean)."""
    a = arrays(rng, (20, 24), np.float64)
    a["x"] += 1e6
    a["dy"] += 1e3
    *_, dx, terms = exact("layer_norm", a, 0.0)
    assert worst_ulp(in_parts(backward, "layer_norm", a, (0, 5, 24))[0][0], dx, terms) <= 1.0


@needs_range
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_rows_whose_squares_leave_the_range(norm, scale, rng):
    a = arrays(rng, dtype=np.float64)
    for name in ("x", "residual"):
        a[name] *= scale
    for eps in (0.0, 1e-6):
        got, _ = in_parts(forward, norm, a, (0, 5, 24), eps=eps)
        np.testing.assert_allclose(got[0], forward(norm, a, eps=eps, backend="reference")[0], rtol=1e-15, atol=1e-15)
        a["dy"] *= min(scale, 1.0)
        got, _ = in_parts(backward, norm, a, (0, 5, 24), eps=eps)
        for one, want in zip(got, backward(norm, a, eps=eps, backend="reference"), strict=True):
            np.testing.assert_allclose(one, want, rtol=1e-13, atol=1e-13 * np.abs(want).max())


def test_nan_and_inf_stay_in_their_row(norm, rng):
    a = arrays(rng)
    name = "residual" if norm.startswith("add") else "x"
    clean_y, clean_dx = (in_parts(f, norm, a, (0, 5, 24))[0][0] for f in (forward, backward))
    a[name][2, 3], a[name][4, 20] = np.nan, np.inf
    want_y, want_dx = forward(norm, a, backend="reference")[0], backward(norm, a, backend="reference")[0]
    for function, clean, want in ((forward, clean_y, want_y), (backward, clean_dx, want_dx)):
        (got, *_), _ = in_parts(function, norm, a, (0, 5, 24))
        assert np.array_equal(np.isnan(got), np.isnan(want))
        assert np.isnan(got[2]).all()
        assert np.array_equal(np.delete(got, (2, 4), axis=0), np.delete(clean, (2, 4), axis=0))


def test_no_rows_call_reduce_as_often(norm, backend):
    """Workers stay in step: each call of one needs the call of all others."""
    empty = {name: np.ones((0, 24), np.float32) for name in ("x", "residual", "dy", "dh")}
    empty |= {name: np.ones(24, np.float32) for name in ("weight", "bias")}
    for function in (forward, backward):
        got, calls = in_parts(function, norm, empty, (0, 5, 24), backend=backend)
        assert calls == [CALLS[norm]] * 2
        assert got[0].shape == (0, 24)
        assert all((gradient == 0).all() for gradient in got[1:])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_elements(norm, n, rng):
    a = arrays(rng, (5, n))
    cuts = tuple(range(n + 1))
    for function in (forward, backward):
        got, _ = in_parts(function, norm, a, cuts)
        for one, want in zip(got, function(norm, a, backend="reference"), strict=True):
            np.testing.assert_allclose(one, want, rtol=1e-6, atol=1e-6)


def test_many_blocks_of_rows(norm, monkeypatch, rng):
    """Blocks are cut by the length of this worker's part; no bit depends on that."""
    a = arrays(rng, (40, 24))
    want = [in_parts(f, norm, a, (0, 5, 24))[0] for f in (forward, backward)]
    monkeypatch.setattr(sharded, "ELEMENTS", 100)
    for function, one in zip((forward, backward), want, strict=True):
        got, _ = in_parts(function, norm, a, (0, 5, 24))
        assert all(np.array_equal(*pair) for pair in zip(got[:1], one[:1], strict=True))
        for pair in zip(got[1:], one[1:], strict=True):
            np.testing.assert_allclose(*pair, rtol=1e-6)


@pytest.mark.parametrize("parameter_shape", [(24,), (3, 24), (2, 1, 24), (1, 1, 24)], ids=str)
def test_parameters_that_broadcast(norm, parameter_shape, rng):
    a = arrays(rng, (2, 3, 24), parameter_shape=parameter_shape)
    for function in (forward, backward):
        got, _ = in_parts(function, norm, a, (0, 7, 24))
        for one, want in zip(got, function(norm, a, backend="reference"), strict=True):
            assert one.shape == want.shape
            np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-6)


def test_with_other_arguments(norm, backend, rng):
    a = arrays(rng, (4, 3, 24), np.float16, np.float32)
    options = {"dtype": "float32", "round_xhat": True, "weight_offset": 1.0, "eps": 0.1, "backend": backend}
    got, _ = in_parts(forward, norm, a, (0, 7, 24), **options)
    for one, want in zip(got, forward(norm, a, **{**options, "backend": "reference"}), strict=True):
        assert one.dtype == want.dtype
        np.testing.assert_allclose(one, want, rtol=1e-6)
    outs = [np.zeros((4, 3, 7), np.float32), np.zeros((4, 3, 17), np.float32)]
    workers = Workers(2)
    cuts = (0, 7, 24)
    results = workers.run(
        lambda i, reduce: forward(norm, part(a, *cuts[i : i + 2]), reduce=reduce, out=outs[i], **options)[0]
    )
    assert all(one is two for one, two in zip(results, outs, strict=True))
    assert np.array_equal(np.concatenate(outs, axis=-1), got[0])


@pytest.mark.engine
def test_along_another_axis(rng):
    x, dy, weight = rng.standard_normal((6, 4)), rng.standard_normal((6, 4)), rng.uniform(0.5, 1.5, 6)
    cuts = (0, 2, 6)

    def work(i, reduce):
        mine = slice(*cuts[i : i + 2])
        y = rn.layer_norm(x[mine], weight[mine], axis=0, reduce=reduce)
        return y, rn.layer_norm_backward(dy[mine], x[mine], weight[mine], axis=0, reduce=reduce)

    (y, grads), (other_y, other_grads) = Workers(2).run(work)
    np.testing.assert_allclose(np.concatenate([y, other_y]), rn.layer_norm(x, weight, axis=0), rtol=1e-13, atol=1e-14)
    want = rn.layer_norm_backward(dy, x, weight, axis=0)
    np.testing.assert_allclose(np.concatenate([grads.dx, other_grads.dx]), want.dx, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(np.concatenate([grads.dweight, other_grads.dweight]), want.dweight, rtol=1e-12)


def test_one_column_is_the_number_of_elements(norm, rng):
    seen = []

    def reduce(a):
        seen.append(a.copy())
        return a

    a = arrays(rng)
    forward(norm, a, reduce=reduce)
    backward(norm, a, reduce=reduce)
    assert len(seen) == 2 * CALLS[norm]
    for sent in seen:
        assert sent.shape[0] == 9
        assert (sent[:, 0] == 24).all()


# Errors

X = np.ones((3, 4))
WRONG = {
    "None": (lambda a: None, TypeError, "reduce has returned NoneType, expected an ndarray of float64 (3, {q})"),
    "list": (lambda a: a.tolist(), TypeError, "reduce has returned list, expected an ndarray of float64 (3, {q})"),
    "float32": (
        lambda a: a.astype(np.float32),
        TypeError,
        "reduce has returned an array of dtype float32, expected float64",
    ),
    "one row": (
        lambda a: a.sum(axis=0),
        ValueError,
        "reduce has returned an array of shape ({q},), expected (3, {q})",
    ),
}


def any_call(norm, **options):
    a = dict.fromkeys(("x", "residual", "dy", "dh"), X) | {"weight": None, "bias": None}
    yield lambda: forward(norm, a, **options)
    yield lambda: backward(norm, a, **options)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_reduce_returns_is_checked(norm, wrong, backend):
    function, error, message = WRONG[wrong]
    columns = []

    def reduce(a):
        columns.append(a.shape[1])
        return function(a)

    for call in any_call(norm, reduce=reduce, backend=backend):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message.format(q=columns[-1])


def test_reduce_must_be_callable(norm, backend):
    for call in any_call(norm, reduce=3, backend=backend):
        with pytest.raises(TypeError, match=r"^reduce is 3, expected a callable or None$"):
            call()


@pytest.mark.parametrize("norm", ["rms_norm", "add_rms_norm"])
def test_a_part_of_each_row_is_not_known_to_a_worker(norm, backend):
    def reduce(a):
        raise AssertionError("called")

    message = "p is 0.5, expected 1.0 with reduce: a worker does not know which elements are the first"
    for call in any_call(norm, reduce=reduce, p=0.5, backend=backend):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()
    for call in any_call(norm, reduce=lambda a: a, p=1, backend=backend):
        call()


def test_a_device_array_has_an_engine_of_its_own(norm, monkeypatch):
    """It is made for the callable, once that has been looked at; see `cuda/test_reduce.py`."""

    class DeviceArray:
        __cuda_array_interface__ = None

    class Engine:
        def Reducing(self, reduce):  # noqa: N802 (as the engine has it)
            raise NotImplementedError(reduce)

    monkeypatch.setitem(_backends._engines, "cuda", Engine())
    a = {name: DeviceArray() for name in ("x", "residual", "dy", "dh")} | {"weight": None, "bias": None}
    for function in (forward, backward):
        with pytest.raises(NotImplementedError, match=r"^sum$"):
            function(norm, a, reduce=NamedSum())
        with pytest.raises(TypeError, match=r"^reduce is 1, expected a callable or None$"):
            function(norm, a, reduce=1)


class NamedSum:
    def __call__(self, a):
        return a

    def __str__(self):
        return "sum"


def test_complex_arrays_have_no_float64_sums():
    with pytest.raises(TypeError, match=r"^x has dtype complex128"):
        reference.rms_norm(np.ones((2, 3), complex), reduce=lambda a: a)


def test_an_error_of_reduce_is_the_callers(norm):
    def reduce(a):
        raise ConnectionError("gone")

    for call in any_call(norm, reduce=reduce):
        with pytest.raises(ConnectionError, match="gone"):
            call()


def test_bfloat16_and_float32_are_sent_in_one_column_each(rng):
    """What has 16 or 32 bits is summed in float64: nothing is sent twice."""
    columns = []

    def reduce(a):
        columns.append(a.shape[1])
        return a

    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        rn.rms_norm(rng.standard_normal((2, 8)).astype(dtype), reduce=reduce)
        rn.rms_norm_backward(*rng.standard_normal((2, 2, 8)).astype(dtype), reduce=reduce)
    assert columns == [2, 3] * 3


# Processes


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_under_mpi(processes):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install mpi4py mpich")
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("no mpiexec: pip install mpich")
    program = Path(__file__).with_name("sharded_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(rn.__file__).parents[1])}
    done = subprocess.run(
        [mpiexec, "-n", str(processes), sys.executable, str(program)],
        capture_output=True, text=True, timeout=120, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[1:] == [f"process {i} of {processes}: right" for i in range(processes)]
