"""Rows that are cut over workers, on device arrays: each worker's part of the result is that of whole rows."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install rmsnorm_np[cuda13]")

from bounds import parameter_tolerance
from device import pretend_small, to_device, to_host
from tolerances import dx_terms, worst_ulp

import rmsnorm_np as rn

L = np.longdouble
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CALLS = {"rms_norm": 1, "layer_norm": 2, "add_rms_norm": 1, "add_layer_norm": 2}
ULP = {"bfloat16": 0.51, "float32": 0.51, "float64": 1.0}


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    pretend_small(monkeypatch)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


class _SentError(Exception):
    pass


def in_parts(work, workers):
    """[(work(worker, reduce), …], one worker after the other, and how often each called reduce.

    Each is run again for each reduction, up to the one whose sum is not known yet.
    """
    known = []

    def reducer(sent):
        calls = iter(known)

        def reduce(a):
            total = next(calls, None)
            if total is None:
                sent.append(to_host(a))
                raise _SentError
            assert (a.shape, a.dtype) == (total.shape, np.float64)
            return to_device(total)

        return reduce

    while True:
        sent, results = [], []
        for worker in range(workers):
            with contextlib.suppress(_SentError):
                results.append(work(worker, reducer(sent)))
        if not sent:
            return results, len(known)
        assert len(sent) == workers
        known.append(sum(sent))


def parts_of(arrays, begin, end):
    return [None if a is None else to_device(np.ascontiguousarray(a[..., begin:end])) for a in arrays]


def whole(parts):
    return None if parts[0] is None else np.concatenate([to_host(a) for a in parts], axis=-1)


def exact(norm, x, dy, dh, weight, bias, eps):
    """(y, its magnitude), (dx, its magnitude), terms of dweight."""
    x, dy, weight, bias = (a.astype(L) for a in (x, dy, weight, bias))
    centred = "layer" in norm
    for _ in range(2 if centred else 0):
        x = x - x.mean(axis=-1, keepdims=True)
    rstd = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + L(eps))
    xhat, g = x * rstd, dy * weight
    y = xhat * weight + bias
    c = (g * xhat).mean(axis=-1, keepdims=True)
    dx = rstd * (g - (g.mean(axis=-1, keepdims=True) if centred else 0) - xhat * c)
    terms = dx_terms(g, xhat, rstd, x.shape[-1], centred=centred)
    if dh is not None:
        dx, terms = dx + dh.astype(L), np.maximum(terms, np.abs(dh.astype(L)))
    return (y, np.maximum(np.abs(xhat * weight), np.abs(bias))), (dx, terms), dy * xhat


def check(norm, dtype, rows, cuts, rng, shift=0.0):
    n, workers, eps = cuts[-1], len(cuts) - 1, 1e-5
    x, residual, dy, dh = ((rng.standard_normal((rows, n)) + shift).astype(dtype) for _ in range(4))
    weight, bias = rng.uniform(0.5, 1.5, n).astype(dtype), rng.standard_normal(n).astype(dtype)
    add = norm.startswith("add")

    def forward(worker, reduce):
        given = parts_of([x, residual, weight, bias] if add else [x, weight, bias], *cuts[worker : worker + 2])
        copies = [to_host(a).tobytes() for a in given]
        result = getattr(rn, norm)(*given, eps=eps, reduce=reduce)
        assert copies == [to_host(a).tobytes() for a in given]
        return result if add else (result,)

    results, calls = in_parts(forward, workers)
    assert calls == CALLS[norm]
    y, *h = map(whole, zip(*results, strict=True))
    if add:
        assert h[0].tobytes() == rn.reference.add_rms_norm(x, residual).h.tobytes()
        x = h[0]
    want, dx_want, dweight_terms = exact(norm, x, dy, dh if add else None, weight, bias, eps)
    assert worst_ulp(y, *want) <= ULP[x.dtype.name]

    def backward(worker, reduce):
        given = parts_of([dy, dh, x, weight, bias] if add else [dy, x, weight, bias], *cuts[worker : worker + 2])
        return getattr(rn, f"{norm}_backward")(*given, eps=eps, reduce=reduce)

    results, calls = in_parts(backward, workers)
    assert calls == CALLS[norm]
    dx, dweight, dbias = map(whole, zip(*results, strict=True))
    assert worst_ulp(dx, *dx_want) <= max(ULP[x.dtype.name], 1.02 * (x.dtype == np.float64))
    work = np.result_type(np.float32, x.dtype if x.dtype == np.float64 else np.float32)
    for got, terms in ((dweight, dweight_terms), (dbias, dy.astype(L))):
        limit = parameter_tolerance(terms.sum(axis=0), np.abs(terms).sum(axis=0), rows, work, got.dtype, roundings=12)
        assert np.all(np.abs(got.astype(L) - terms.sum(axis=0)) <= limit)


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [("rms_norm", np.float32), ("add_rms_norm", BFLOAT16), ("add_layer_norm", np.float32), ("layer_norm", np.float64)],
)
def test_parts_are_those_of_whole_rows(norm, dtype, rng):
    check(norm, dtype, 5, (0, 24, 40), rng)


def test_parts_of_one_element_and_in_pieces(rng):
    """The pieces of a worker's part are added up first."""
    check("rms_norm", np.float32, 2, (0, 1, 300), rng)


def test_means_far_from_zero(rng):
    """A mean of float64 is known to more digits than a float64 has, and so is a sum over workers."""
    check("layer_norm", np.float64, 3, (0, 24, 40), rng, 1e6)


def test_float64_out_of_range(rng):
    """A row whose squares leave the range is NaN, and no other is."""
    x = rng.standard_normal((4, 40)) * np.reshape([1, 1e100, 1e200, 1e-200], (4, 1))
    want = rn.reference.layer_norm(x, eps=0.0)
    parts = [x[:, :24], x[:, 24:]]
    results, _ = in_parts(
        lambda worker, reduce: rn.layer_norm(to_device(np.ascontiguousarray(parts[worker])), eps=0.0, reduce=reduce), 2
    )
    y = whole(results)
    assert np.isnan(y).all(axis=1).tolist() == [False, False, True, True]
    assert worst_ulp(y[:2], want[:2]) <= 1.5


def test_other_arguments(rng):
    """dtype, round_xhat, weight_offset, other axes, and where results go."""
    x, residual = rng.standard_normal((2, 6, 2, 4)).astype(np.float32)
    weight = rng.standard_normal((6, 4)).astype(np.float32)
    options = {"axis": (0, 2), "weight_offset": 1.0, "dtype": "float16", "round_xhat": True}
    want = rn.reference.add_rms_norm(x, residual, weight, **options)

    def work(worker, reduce):
        mine = slice(3 * worker, 3 * worker + 3)
        given = [to_device(np.ascontiguousarray(a[mine])) for a in (x, residual, weight)]
        out = to_device(np.zeros((3, 2, 4), np.float16))
        y, h = rn.add_rms_norm(*given, **options, reduce=reduce, out=out, residual_out=given[1])
        assert y is out
        assert h is given[1]
        return to_host(y), to_host(h)

    results, _ = in_parts(work, 2)
    y, h = (np.concatenate(parts) for parts in zip(*results, strict=True))
    assert h.tobytes() == want.h.tobytes()
    assert y.tobytes() == want.y.tobytes()


def test_no_rows_call_it_too():
    x, weight = to_device(np.zeros((0, 6), np.float32)), to_device(np.ones(6, np.float32))
    for norm, calls in CALLS.items():
        if norm.startswith("add"):
            continue
        shapes = []

        def reduce(a, shapes=shapes):
            shapes.append(a.shape)
            return a

        assert to_host(getattr(rn, norm)(x, weight, reduce=reduce)).shape == (0, 6)
        assert [shape[0] for shape in shapes] == [0] * calls
        grads = getattr(rn, f"{norm}_backward")(x, x, weight, reduce=reduce)
        assert len(shapes) == 2 * calls
        assert not to_host(grads.dweight).any()


def test_errors():
    x = to_device(np.ones((2, 4), np.float32))
    cases = [
        (lambda a: to_host(a), TypeError, r"reduce has returned ndarray, expected a device array of float64 \(2, 2\)"),
        (lambda a: to_device(np.ones((2, 2), np.float32)), TypeError,
         "reduce has returned an array of dtype float32, expected float64"),
        (lambda a: to_device(np.ones((2, 3))), ValueError,
         r"reduce has returned an array of shape \(2, 3\), expected \(2, 2\)"),
        (1, TypeError, "reduce is 1, expected a callable or None"),
    ]  # fmt: skip
    for reduce, error, match in cases:
        with pytest.raises(error, match=match):
            rn.rms_norm(x, reduce=reduce)
    with pytest.raises(ValueError, match=r"p is 0.5, expected 1.0 with reduce"):
        rn.rms_norm(x, p=0.5, reduce=lambda a: a)
