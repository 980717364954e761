"""The norms of JAX arrays. Derivatives are checked with the reference in place of kernels, which compiles nothing."""

from __future__ import annotations

import doctest
import functools
import json
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from test_import import run

import rmsnorm_np as rn

jax = pytest.importorskip("jax", reason="JAX is not installed")
check_grads = pytest.importorskip("jax.test_util", reason="JAX is not installed").check_grads
jnp = jax.numpy
rj = pytest.importorskip("rmsnorm_np.jax", reason="JAX is not installed")
calls, functions, handler = (sys.modules[f"rmsnorm_np.jax.{name}"] for name in ("calls", "functions", "handler"))

N = 5


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def by_reference(monkeypatch):
    """No kernels. Compiled programs know the functions by a text alone, so those of other tests will do."""
    monkeypatch.setattr(calls, "rn", rn.reference)
    monkeypatch.setattr(handler, "_known", {})


@pytest.fixture
def float64_by_reference(by_reference, x64):
    """The same, in float64."""


def draw(rng, *shapes, dtype=np.float64):
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def plain(norm, x, weight=None, bias=None, *, eps=1e-6, p=1.0, weight_offset=0.0):
    """The formula, differentiated by JAX itself."""
    h = x - jnp.mean(x, -1, keepdims=True) if norm == "layer_norm" else x
    k = int(np.ceil(x.shape[-1] * p))
    y = h / jnp.sqrt(jnp.mean(h[..., :k] ** 2, -1, keepdims=True) + eps)
    if weight is not None:
        y = y * (weight_offset + weight)
    return y if bias is None else y + bias


def plain_add(norm, x, residual, *parameters, **options):
    h = x + residual
    return plain(norm, h, *parameters, **options), h


NORMS = {
    "rms": (rj.rms_norm, functools.partial(plain, "rms_norm"), {"p": 0.5, "weight_offset": 1.0}),
    "layer": (rj.layer_norm, functools.partial(plain, "layer_norm"), {"eps": 0.1}),
    "add_rms": (rj.add_rms_norm, functools.partial(plain_add, "rms_norm"), {"eps": 0.1}),
    "add_layer": (rj.add_layer_norm, functools.partial(plain_add, "layer_norm"), {"weight_offset": 1.0}),
}


@pytest.fixture(params=NORMS)
def norm(request):
    """(function, the same in plain operations, arrays it takes first), both with their options."""
    ours, theirs, options = NORMS[request.param]
    shapes = [(3, 2, N)] * (2 if request.param.startswith("add") else 1)
    return functools.partial(ours, **options), functools.partial(theirs, **options), shapes


def close(got, want, atol=1e-12):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# Values: the kernels


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_is_that_of_the_numpy_function(dtype, rng):
    x, residual, weight = draw(rng, (6, 16), (6, 16), 16, dtype=dtype)
    for wrap in (lambda f: f, jax.jit):
        y = wrap(rj.rms_norm)(x, weight)
        assert y.dtype == x.dtype
        assert np.asarray(y).tobytes() == rn.rms_norm(x, weight).tobytes()
    if dtype == "float32":
        for got, want in zip(
            jax.jit(rj.add_rms_norm)(x, residual, weight), rn.add_rms_norm(x, residual, weight), strict=True
        ):
            assert np.asarray(got).tobytes() == want.tobytes()


def test_the_gradient_is_a_kernel(rng):
    x, dy, weight = draw(rng, (6, 16), (6, 16), 16, dtype=np.float32)
    _, pull_back = jax.vjp(rj.rms_norm, x, weight)
    dx, dweight = jax.jit(pull_back)(dy)
    want = rn.rms_norm_backward(dy, x, weight)
    assert np.asarray(dx).tobytes() == want.dx.tobytes()
    assert np.asarray(dweight).tobytes() == want.dweight.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_and_shapes(dtype, float64_by_reference, rng):
    for shape in ((7,), (1, 7), (2, 3, 4, 7), (0, 7), (2, 0, 7), (3, 1)):
        x, weight = draw(rng, shape, shape[-1:], dtype=dtype)
        (bias,) = draw(rng, shape[-1:], dtype=np.float32)
        y = jax.jit(rj.layer_norm)(x, weight, bias)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        want = rn.reference.layer_norm(np.asarray(x), np.asarray(weight), np.asarray(bias))
        assert np.asarray(y).tobytes() == want.tobytes()


def test_results_have_the_dtypes_of_their_arguments(float64_by_reference, rng):
    x, residual, weight = draw(rng, (2, N), (2, N), N)
    x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.float16)
    y, h = rj.add_rms_norm(x, residual, weight)
    assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float64)
    grads = jax.grad(lambda *args: sum(jnp.sum(a.astype(float)) for a in rj.add_rms_norm(*args)), (0, 1, 2))
    assert [a.dtype for a in grads(x, residual, weight)] == [jnp.bfloat16, jnp.float64, jnp.float16]
    y_dot, h_dot = jax.jvp(rj.add_rms_norm, (x, residual, weight), (x, residual, weight))[1]
    assert (y_dot.dtype, h_dot.dtype) == (jnp.bfloat16, jnp.float64)


def test_what_is_no_jax_array_yet(by_reference):
    want = rn.reference.rms_norm([[1.0, 2.0]]).astype(np.float32)
    for x in (np.array([[1.0, 2.0]], np.float32), np.array([[1, 2]]), jnp.array([[1, 2]])):
        np.testing.assert_allclose(rj.rms_norm(x), want, rtol=1e-6)
    assert rj.rms_norm(np.ones((1, 2), ml_dtypes.bfloat16)).dtype == jnp.bfloat16


def test_donated_memory(float64_by_reference, rng):
    x, residual, weight = draw(rng, (64, 64), (64, 64), 64)
    want = plain_add("rms_norm", x, residual, weight)
    step = jax.jit(rj.add_rms_norm, donate_argnums=(0, 1))
    got = step(x, residual, weight)
    close(got, want)
    assert x.is_deleted()
    assert residual.is_deleted()


# Derivatives


@pytest.mark.parametrize("parameters", [0, 2])
def test_gradients_are_those_of_the_formula(parameters, norm, float64_by_reference, rng):
    ours, theirs, shapes = norm
    if parameters == 0 and "weight_offset" in ours.keywords:
        ours, theirs = (functools.partial(f.func, *f.args) for f in (ours, theirs))
    args = draw(rng, *shapes, *[N, (2, N)][:parameters])

    def gradient(f):
        def loss(*args):
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(f(*args)))

        return jax.jit(jax.grad(loss, tuple(range(len(args)))))(*args)

    close(gradient(ours), gradient(theirs))


def test_gradients_without_jit(float64_by_reference, rng):
    x, weight = draw(rng, (3, N), N)
    got = jax.grad(lambda *args: jnp.sum(rj.rms_norm(*args)), (0, 1))(x, weight)
    close(got, rn.reference.rms_norm_backward(np.ones((3, N)), x, weight)[:2])


def second_order(f):
    """Derivatives of a sum of f's results in each mode over each, along one direction of all arrays; jitted."""

    def loss(*args):
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(f(*args)))

    def derivatives(*args):
        every, along = tuple(range(len(args))), tuple(map(jnp.cos, args))

        def forward(*args):
            return jax.jvp(loss, args, along)[1]

        def reverse(*args):
            return sum(jnp.vdot(*pair) for pair in zip(jax.grad(loss, every)(*args), along, strict=True))

        return [
            [jax.jvp(inner, args, along)[1] for inner in (forward, reverse)],
            [jax.grad(inner, every)(*args) for inner in (forward, reverse)],
        ]

    return jax.jit(derivatives)


def test_derivatives_to_the_second_order(norm, float64_by_reference, rng):
    ours, theirs, shapes = norm
    arrays = draw(rng, *[shape[1:] for shape in shapes], N, N)
    got, want = (second_order(f)(*arrays) for f in (ours, theirs))
    close(got, want, 1e-11)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_derivatives_by_differences(name, float64_by_reference, rng):
    ours, _, options = NORMS[name]
    f = jax.jit(functools.partial(ours, **options))
    check_grads(f, draw(rng, (2, N), N, N), order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4)


def test_the_third_order(float64_by_reference, rng):
    x, weight = draw(rng, (2, N), N)

    def third(f):
        return jax.jit(jax.grad(lambda x: sum(map(jnp.sum, jax.tree.leaves(second_order(f)(x, weight))))))(x)

    close(third(rj.layer_norm), third(functools.partial(plain, "layer_norm")), 1e-9)


def test_a_gradient_asks_for_what_it_needs(monkeypatch, float64_by_reference, rng):
    """One call forward and one backward, with h's gradient added in the kernel; without sums that nobody wants."""
    x, residual, weight = draw(rng, (3, N), (3, N), N)
    seen = []
    known = calls.function_of
    monkeypatch.setattr(handler, "function_of", lambda call: seen.append(call) or known(call))

    def loss(x, residual, weight):
        y, h = rj.add_rms_norm(x, residual, weight)
        return jnp.sum(y * h)

    jax.jit(jax.grad(loss))(x, residual, weight)
    forward, backward = seen
    assert forward.results() == ("y", "h")
    assert backward.given == ("dy", "x", "weight", "dh")
    assert backward.results() == ("dx",)


# Batches


def test_a_batch_of_rows_is_one_call(float64_by_reference, norm, rng):
    ours, theirs, shapes = norm
    *arrays, weight = draw(rng, *shapes, N)
    for axis in (0, 1):
        axes = *[axis] * len(shapes), None
        got, want = (jax.jit(jax.vmap(f, axes))(*arrays, weight) for f in (ours, theirs))
        close(got, want)
    assert str(jax.make_jaxpr(jax.vmap(ours, axes))(*arrays, weight)).count("rmsnorm_np_forward") == 1


def test_a_batch_of_weights(float64_by_reference, norm, rng):
    ours, theirs, shapes = norm
    *arrays, weight, bias = draw(rng, *shapes, (4, N), (N, 4))
    axes = *[None] * len(shapes), 0, 1
    got, want = (jax.jit(jax.vmap(f, axes))(*arrays, weight, bias) for f in (ours, theirs))
    close(got, want)


@pytest.mark.parametrize("axes", [(0, None, None), (1, 0, None), (None, None, 1)], ids=str)
def test_batches_of_derivatives(axes, float64_by_reference, rng):
    shapes = [(2, N), (N,), (N,)]
    for i, axis in enumerate(axes):
        if axis is not None:
            shapes[i] = *shapes[i][:axis], 3, *shapes[i][axis:]
    args = draw(rng, *shapes)
    got, want = (
        jax.vmap(second_order(f), axes)(*args) for f in (rj.layer_norm, functools.partial(plain, "layer_norm"))
    )
    close(got, want, 1e-11)


# What is refused


class Wrong:
    """Not an array."""


CASES = [
    ((None,), {}, TypeError, "x is None, expected an array"),
    ((Wrong(),), {}, TypeError, "x is not an array: "),
    (
        (np.ones((2, 4), np.complex64),),
        {},
        TypeError,
        "x has dtype complex64, expected float16, bfloat16, float32 or float64",
    ),
    ((3.0,), {}, ValueError, r"x has shape \(\), expected at least one axis"),
    ((np.ones((2, 0)),), {}, ValueError, r"x has shape \(2, 0\), expected at least one element along axis -1"),
    ((np.ones((2, 4)), np.ones(3)), {}, ValueError, r"weight has shape \(3,\), expected \(4,\)"),
    ((np.ones((2, 4)), None, np.ones((3, 4))), {}, ValueError, r"bias has shape \(3, 4\), expected \(4,\)"),
    ((np.ones((2, 4)),), {"eps": -1.0}, ValueError, "eps is -1.0, expected a finite number >= 0"),
    ((np.ones((2, 4)),), {"p": 0.0}, ValueError, "p is 0.0, expected a number with 0 < p <= 1"),
    ((np.ones((2, 4)),), {"weight_offset": 1.0}, ValueError, "weight_offset is 1.0, expected 0.0 without a weight"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), CASES)
def test_wrong_arguments(args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        rj.rms_norm(*args, **options)


def test_a_traced_number_is_refused():
    with pytest.raises(TypeError, match=r"^eps is .*Tracer.*, expected a finite number >= 0"):
        jax.jit(lambda x, eps: rj.rms_norm(x, eps=eps))(jnp.ones(4), 1e-6)


def test_the_residual():
    with pytest.raises(ValueError, match=r"^residual has shape \(4,\), expected x.shape \(2, 4\)$"):
        rj.add_rms_norm(jnp.ones((2, 4)), jnp.ones(4))
    with pytest.raises(TypeError, match=r"^residual is None, expected an array$"):
        rj.add_layer_norm(jnp.ones((2, 4)), None)


def test_an_error_in_the_handler_reaches_the_caller(monkeypatch, by_reference):
    def fail(call):
        raise ValueError("planted")

    monkeypatch.setattr(handler, "function_of", fail)
    with pytest.raises(Exception, match="ValueError: planted"):
        jax.block_until_ready(jax.jit(rj.rms_norm)(jnp.ones((2, 4))))


# The way to the kernel


def test_nothing_is_copied(monkeypatch, float64_by_reference, rng):
    """The kernel reads the memory of the argument and writes that of the result."""
    seen = {}

    def function_of(call):
        def compute(arrays, out):
            seen.update(x=arrays["x"].__array_interface__["data"][0], y=out["y"].__array_interface__["data"][0])
            out["y"][...] = arrays["x"]

        return compute

    monkeypatch.setattr(handler, "function_of", function_of)
    (x,) = draw(rng, (64, 64))
    y = jax.block_until_ready(jax.jit(rj.rms_norm)(x))
    assert seen == {"x": x.unsafe_buffer_pointer(), "y": y.unsafe_buffer_pointer()}
    assert np.array_equal(x, y)


def test_several_threads(rng):
    x, weight = draw(rng, (64, 1024), 1024, dtype=np.float32)
    f = jax.jit(lambda x, weight: [rj.rms_norm(x + i, weight) for i in range(4)])
    want = [np.asarray(a) for a in f(x, weight)]
    wrong = []

    def work():
        for _ in range(20):
            if not all(map(np.array_equal, f(x, weight), want)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_is_the_same_after_its_text():
    """A compiled program may be read from disk by another process: it holds all of the call, to the last bit."""
    call = calls.Call("rms_norm", 1 / 3, 0.1, -0.7, calls.GRADIENT, ("dy", "x"), False, True, ((2, 1, 4), "float32"))
    again = calls.call_of(call.text().encode())
    assert again._replace(bias=call.bias) == call
    assert json.loads(call.text())[-1] == [[2, 1, 4], "float32"]


@pytest.mark.parametrize("p", [1.0, 0.07, 0.3, 1e-9, np.float32(0.07)])
def test_the_number_of_elements_in_the_rms(p, float64_by_reference, rng):
    for n in (1, 3, 100, 1000):
        (x,) = draw(rng, (2, n))
        np.testing.assert_array_equal(rj.rms_norm(x, p=p), rn.reference.rms_norm(x, p=p))


def test_jax_is_imported_when_asked_for():
    assert run("import rmsnorm_np\nprint('jax' in sys.modules)") == "False"


@pytest.mark.parametrize("module", [sys.modules["rmsnorm_np.jax"], functions], ids=lambda module: module.__name__)
def test_the_examples(module, by_reference):
    found = doctest.testmod(module)
    assert found.attempted > 3
    assert found.failed == 0
