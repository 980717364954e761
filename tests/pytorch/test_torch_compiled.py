"""The operators under PyTorch's compiler and its checks of operators."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.library import opcheck
from torch_cases import CASES, N, loss, on_reference, tensors  # noqa: F401 (a fixture)

import rmsnorm_np.torch as rt
from rmsnorm_np.torch.operators import LAYER_NORM, RMS_NORM

pytestmark = [
    pytest.mark.usefixtures("on_reference"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of PyTorch's, in PyTorch
]
OPTIONS = 1, 1e-5, 0.0


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("weight and bias", torch.float32),
        ("weight", torch.bfloat16),
        ("bias", torch.float32),
        ("nothing", torch.float32),
    ],
)
@pytest.mark.parametrize("ops", [RMS_NORM, LAYER_NORM], ids=["rms", "layer"])
def test_opcheck(ops, given, dtype):
    """Schema, shapes without computing, registration, and the compiler's gradient."""
    x, dy, weight, bias = (
        torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(3, 4, N)] * 2 + [(N,)] * 2
    )
    w, b = weight if "weight" in given else None, bias if "bias" in given else None
    for operator, args in {
        ops.forward: (x, w, b, *OPTIONS, False),
        ops.backward: (dy, x, w, b, *OPTIONS),
        ops.add: (x, dy, w, b, *OPTIONS, True),
        ops.add_backward: (dy, None if w is None else x, x, w, b, *OPTIONS),
        ops.jvp: (x, w, b, dy, w, b, *OPTIONS),
    }.items():
        opcheck(operator.overload, args)
    # no third derivative
    args = (dy, w, b, dy, x, w, b, *OPTIONS)
    opcheck(ops.double_backward.overload, [a.detach() if isinstance(a, torch.Tensor) else a for a in args])


@pytest.mark.parametrize(
    ("case", "dynamic"), [*((case, False) for case in CASES), ("rms", True), ("layer", True), ("add layer", True)]
)
def test_compiled_whole(case, dynamic):
    """In one graph, values and gradients those of the formula."""
    torch.compiler.reset()
    ours, theirs, *_ = CASES[case]
    args = tensors(case)
    compiled = torch.compile(loss(ours), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    y, expected = compiled(*args), loss(theirs)(*args)
    torch.testing.assert_close(y, expected)
    grads, expected_grads = (torch.autograd.grad(a, args, materialize_grads=True) for a in (y, expected))
    torch.testing.assert_close(grads, expected_grads)


def test_compiled_transforms():
    x, w = tensors("rms", requires_grad=False)
    f = loss(CASES["rms"][0])
    for transform in (torch.func.grad(f), lambda *a: torch.func.jvp(f, a, a), torch.func.vmap(f, (0, None))):
        torch.compiler.reset()
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, w), transform(x, w))


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for the CPU by g++")
def test_compiled_to_machine_code():
    torch.compiler.reset()
    x, w = tensors("rms", torch.float32, requires_grad=False)

    def f(x, w):
        return rt.rms_norm(x + 1, (N,), w) * 2

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x, w), f(x, w))


def test_exported():
    module = rt.RMSNorm(N)
    exported = torch.export.export(module, (torch.ones(3, N),))
    assert "torch.ops.rmsnorm_np.rms_norm.default" in exported.graph_module.code
    x = torch.randn(3, N)
    torch.testing.assert_close(exported.module()(x), module(x))


def test_no_memory_is_needed_for_shapes():
    with torch.device("meta"):
        y = rt.RMSNorm(1 << 20)(torch.empty(1 << 20, 1 << 20))
    assert y.shape == (1 << 20, 1 << 20)
    assert y.device.type == "meta"
