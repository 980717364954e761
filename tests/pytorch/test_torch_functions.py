"""The functions beside PyTorch's: its own samples of arguments, the dtypes, the memory, the errors."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map_only
from torch_cases import N, on_reference  # noqa: F401 (a fixture)

import rmsnorm_np as rn
import rmsnorm_np.torch as rt
from rmsnorm_np.torch.operators import to_array, to_tensor

DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
OP_INFO = {op.name.removeprefix("nn.functional."): op for op in op_db if op.name.endswith((".rms_norm", ".layer_norm"))}


@pytest.mark.usefixtures("on_reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_samples_of_pytorch(name, dtype):
    """Values and gradients of what PyTorch tests its own function with, to its tolerance: beside it in float64."""
    count = 0
    for sample in OP_INFO[name].sample_inputs("cpu", dtype, requires_grad=True):
        args, kwargs = (sample.input, *sample.args), sample.kwargs
        if (kwargs.get("eps") or 0) < 0:  # which PyTorch takes
            with pytest.raises(ValueError, match=r"eps is -0\.5"):
                getattr(rt, name)(*args, **kwargs)
            kwargs["eps"] = 0.5
        kwargs.setdefault("eps", 1e-5)  # as float64 has another default
        y = getattr(rt, name)(*args, **kwargs)
        wide = tree_map_only(torch.Tensor, lambda a: a.detach().double().requires_grad_(), (args, kwargs))
        expected = getattr(torch.nn.functional, name)(*wide[0], **wide[1])
        torch.testing.assert_close(y, expected.to(dtype))
        dy = torch.randn_like(y)
        by, by_wide = (
            [a for a in tree_leaves(given) if isinstance(a, torch.Tensor)] for given in ((args, kwargs), wide)
        )
        grads, expected = torch.autograd.grad(y, by, dy), torch.autograd.grad(expected, by_wide, dy.double())
        torch.testing.assert_close(grads, tuple(a.to(dtype) for a in expected))
        count += 1
    assert count > 3


@pytest.mark.usefixtures("on_reference")
def test_errors_of_pytorch():
    """What PyTorch refuses is refused."""
    count = 0
    for error in OP_INFO["rms_norm"].error_inputs_func(OP_INFO["rms_norm"], "cpu"):
        sample = error.sample_input
        with pytest.raises((ValueError, TypeError)):
            rt.rms_norm(sample.input, *sample.args, **sample.kwargs)
        count += 1
    assert count > 0


@pytest.mark.usefixtures("on_reference")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_eps(dtype):
    """None is PyTorch's, which rows of small numbers show."""
    x = torch.full((2, N), 1e-4, dtype=dtype)
    torch.testing.assert_close(rt.rms_norm(x, (N,)), torch.nn.functional.rms_norm(x, (N,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_is_shared(dtype):
    tensor = torch.arange(6, dtype=dtype).reshape(2, 3).T
    array = to_array(tensor)
    assert array.dtype == np.dtype({torch.bfloat16: ml_dtypes.bfloat16}.get(dtype, str(dtype).removeprefix("torch.")))
    assert array.shape == tensor.shape
    back = to_tensor(array)
    assert back.data_ptr() == tensor.data_ptr()
    assert back.dtype == dtype
    tensor[0, 1] = 7
    assert float(array[0, 1]) == float(back[0, 1]) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels(dtype):
    """The compiled engine's bits, forward and backward."""
    x, w = torch.randn(7, 48, dtype=dtype, requires_grad=True), torch.rand(48, dtype=dtype, requires_grad=True)
    y = rt.rms_norm(x, (48,), w, 1e-6)
    dy = torch.randn_like(y)
    arrays = [to_array(a.detach()) for a in (dy, x, w)]
    np.testing.assert_array_equal(to_array(y.detach()), rn.rms_norm(*arrays[1:]))
    expected = rn.rms_norm_backward(*arrays)
    for a, b in zip(torch.autograd.grad(y, (x, w), dy), expected, strict=False):
        np.testing.assert_array_equal(to_array(a), b)


@pytest.mark.usefixtures("on_reference")
def test_layouts():
    """Strided, expanded and negated tensors; several axes; no rows."""
    x = torch.randn(4, 6, N)
    for a in (
        x.transpose(0, 1),
        x[::2, 1:],
        x[:1].expand(3, 6, N),
        x[:0],
        torch.view_as_complex(torch.randn(3, N, 2)).conj().imag,
    ):
        y = rt.rms_norm(a, (N,))
        assert y.is_contiguous()
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(a, (N,)))
    w, b = torch.randn(2, 6, N)
    torch.testing.assert_close(rt.layer_norm(x, (6, N), w, b), torch.nn.functional.layer_norm(x, (6, N), w, b))


@pytest.mark.usefixtures("on_reference")
def test_parameters_broadcast():
    """Adaptive norm: a scale and a shift for each of a batch."""
    x, scale, shift = torch.randn(3, 4, N), torch.randn(3, 1, N), torch.randn(3, 1, N)
    y = rt.layer_norm(x, (N,), scale, shift, weight_offset=1.0)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (N,)) * (1 + scale) + shift)


@pytest.mark.usefixtures("on_reference")
def test_order_of_rounding():
    """Llama's: the row is rounded before the weight, and the result has the dtype of both."""
    x, w = torch.randn(64, N, dtype=torch.bfloat16), torch.rand(N)
    xhat = torch.nn.functional.rms_norm(x, (N,), eps=1e-6)
    for weight in (w, w.bfloat16()):
        y = rt.rms_norm(x, (N,), weight, 1e-6, round_xhat=True)
        torch.testing.assert_close(y, weight * xhat, rtol=0, atol=0)
    y, h = rt.add_rms_norm(x, torch.zeros_like(x), (N,), w, 1e-6, round_xhat=True)
    torch.testing.assert_close((y, h), (w * xhat, x), rtol=0, atol=0)


def test_errors_name_what_is_wrong():
    x, w = torch.ones(2, N), torch.ones(N)
    with pytest.raises(TypeError, match=r"input has dtype torch\.int64, expected float16"):
        rt.rms_norm(x.long(), (N,))
    with pytest.raises(TypeError, match=r"residual has dtype torch\.int64"):
        rt.add_rms_norm(x, x.long(), (N,))
    with pytest.raises(
        ValueError, match=r"normalized_shape is \(4,\), expected the last axes of input\.shape \(2, 5\)"
    ):
        rt.layer_norm(x, (4,))
    with pytest.raises(ValueError, match=r"residual has shape \(5,\), expected input\.shape \(2, 5\)"):
        rt.add_layer_norm(x, w, (N,))
    with pytest.raises(ValueError, match=r"weight has shape \(2,\)"):
        rt.rms_norm(x, (N,), w[:2])
    with pytest.raises(ValueError, match=r"eps is -1\.0"):
        rt.rms_norm(x, (N,), w, -1.0)
    with pytest.raises(NotImplementedError, match="rmsnorm_np::rms_norm"):
        rt.rms_norm(x.to_sparse(), (N,))


@pytest.mark.usefixtures("on_reference")
def test_examples():
    """Those of the docstrings, which the doctests of `pytest` alone leave out."""
    names = [f"rmsnorm_np.torch.{module.name}" for module in pkgutil.iter_modules(rt.__path__)]
    results = [doctest.testmod(importlib.import_module(name)) for name in ["rmsnorm_np.torch", *names]]
    assert sum(result.attempted for result in results) > 20
    assert sum(result.failed for result in results) == 0
