"""RMSNorm and LayerNorm: objects that give what the functions give, with parameters that may be replaced."""

from __future__ import annotations

import copy
import pickle  # of this test's own objects
import threading

import ml_dtypes
import numpy as np
import pytest
from conftest import DTYPES

import rmsnorm_np as rn
from rmsnorm_np import _backends

CLASSES = {
    "rms": (rn.RMSNorm, rn.rms_norm, rn.rms_norm_backward),
    "layer": (rn.LayerNorm, rn.layer_norm, rn.layer_norm_backward),
}
N = 48


@pytest.fixture(params=CLASSES)
def norm_and_functions(request):
    return CLASSES[request.param]


def parameters(rng, *kinds):
    return [None if kind is None else rng.uniform(0.5, 1.5, N).astype(kind) for kind in kinds]


def same(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("shape", [(1, N), (7, N), (2, 3, N), (N,), (0, N), (2000, N)], ids=str)
def test_a_call_gives_what_the_function_gives(norm_and_functions, shape, rng):
    """A short way of its own for small float32 arrays: another kernel, or the sums of another row, would be seen."""
    make, forward, backward = norm_and_functions
    weight, bias = parameters(rng, np.float32, np.float32)
    norm = make(weight, bias, eps=1e-3, weight_offset=0.5)
    options = {"weight": weight, "bias": bias, "eps": 1e-3, "weight_offset": 0.5}
    for _ in range(3):  # the first call compiles, the second finds what it compiled
        x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
        kept = x.copy()
        same(norm(x), forward(x, **options))
        for got, want in zip(norm.backward(dy, x), backward(dy, x, **options), strict=True):
            same(got, want)
        same(x, kept)
    out = np.empty_like(x)
    assert norm(x, out) is out
    same(out, forward(x, **options))
    assert norm.backward(dy, x, out=out).dx is out


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, None], ids=str)
@pytest.mark.engine
def test_every_dtype(norm_and_functions, x_dtype, kind, rng):
    """The short way has one kernel for each dtype of the parameters, and is only for float32."""
    make, forward, _ = norm_and_functions
    weight, bias = parameters(rng, kind, kind)
    norm = make(weight, bias)
    for _ in range(3):
        x = rng.standard_normal((5, N)).astype(x_dtype)
        same(norm(x), forward(x, weight, bias))


def test_arrays_of_another_kind_take_the_long_way(norm_and_functions, rng):
    make, forward, _ = norm_and_functions
    (weight,) = parameters(rng, np.float32)
    norm = make(weight)
    x = rng.standard_normal((6, 2 * N)).astype(np.float32)
    for _ in range(3):
        norm(np.ones((2, N), np.float32))
    for other in (x[:, ::2], x[:, :N], np.asfortranarray(x[:, :N]), x[:, :N].astype(">f4"), x[:, :N].tolist()):
        same(norm(other), forward(other, weight))
    with pytest.raises(ValueError, match="weight has shape"):
        norm(x)
    with pytest.raises(ValueError, match="at least one axis"):
        norm(np.float32(1.0))


def test_a_part_of_each_row(rng):
    (weight,) = parameters(rng, np.float32)
    norm = rn.RMSNorm(weight, p=0.3)
    for _ in range(3):
        x = rng.standard_normal((4, N)).astype(np.float32)
        same(norm(x), rn.rms_norm(x, weight, p=0.3))


def test_parameters_may_be_replaced_and_changed_in_place(norm_and_functions, rng):
    """A short way that is kept for the old parameters would give their result."""
    make, forward, _ = norm_and_functions
    weight, bias = parameters(rng, np.float32, np.float32)
    x = rng.standard_normal((4, N)).astype(np.float32)
    norm = make(weight, bias)
    assert norm.weight is weight
    norm(x), norm(x)
    weight *= 2
    same(norm(x), forward(x, weight, bias))
    norm.weight = other = weight + 1
    same(norm(x), forward(x, other, bias))
    norm.bias = None
    same(norm(x), forward(x, other))
    norm.eps = 0.5
    same(norm(x), forward(x, other, eps=0.5))
    norm.weight_offset = 1.0
    same(norm(x), forward(x, other, eps=0.5, weight_offset=1.0))
    norm.weight, norm.weight_offset = None, 0
    same(norm(x), forward(x, eps=0.5))
    norm.weight = rng.uniform(0.5, 1.5, (4, N)).astype(np.float32)  # one for each of four heads
    same(norm(x), forward(x, norm.weight, eps=0.5))


def test_a_parameter_set_by_another_thread_counts(norm_and_functions, monkeypatch):
    """While a call looks for its short way, for the old parameters: that must not be kept for the new ones."""
    make, forward, _ = norm_and_functions
    x, old, new = np.ones((2, N), np.float32), np.ones(N, np.float32), np.full(N, 3, np.float32)
    x[:, ::2] = 2
    norm = make(old)
    select = _backends.select

    def select_while_it_is_set(*arguments):
        if norm.weight is old:
            thread = threading.Thread(target=setattr, args=(norm, "weight", new))
            thread.start()
            thread.join()
        return select(*arguments)

    monkeypatch.setattr(_backends, "select", select_while_it_is_set)
    norm(x)
    monkeypatch.undo()
    for _ in range(3):
        same(norm(x), forward(x, new))


def test_a_parameter_is_checked_when_it_is_set(norm_and_functions):
    make = norm_and_functions[0]
    norm = make(np.ones(N))
    for name, value, error, message in (
        ("weight", np.ones(N, complex), TypeError, "weight has dtype complex128"),
        ("weight", np.float64(1.0), ValueError, r"weight has shape \(\), expected \(n,\)"),
        ("bias", np.ma.ones(N), TypeError, "bias is a masked array"),
        ("eps", -1.0, ValueError, r"eps is -1\.0"),
        ("weight_offset", np.nan, ValueError, "weight_offset is nan"),
        ("gain", 1.0, AttributeError, "no attribute 'gain'"),
    ):
        before = repr(norm)
        with pytest.raises(error, match=message):
            setattr(norm, name, value)
        assert repr(norm) == before
    with pytest.raises(ValueError, match=r"p is 2\.0"):
        rn.RMSNorm(np.ones(N), p=2.0)
    with pytest.raises(AttributeError, match="no attribute 'p'"):
        rn.LayerNorm(np.ones(N)).p = 0.5


def test_a_copy_has_parameters_of_its_own(norm_and_functions, rng):
    make = norm_and_functions[0]
    (weight,) = parameters(rng, np.float32)
    x = rng.standard_normal((4, N)).astype(np.float32)
    norm = make(weight)
    want = norm(x)
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        weight *= 3
        same(copied(x), want)
        assert not np.shares_memory(copied.weight, weight)
        weight /= 3


def test_what_it_says_of_itself():
    assert repr(rn.RMSNorm(np.ones(4, np.float32))) == (
        "RMSNorm(weight=<float32 (4,)>, bias=None, eps=1e-06, p=1.0, weight_offset=0.0, dtype=None, round_xhat=False)"
    )
