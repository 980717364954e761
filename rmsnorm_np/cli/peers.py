"""The same norms in other libraries, as calls ready to be timed. A peer that is not installed is left out.

Every call allocates what it returns and is given the same values in the same dtype. A peer that has no kernel for
an operation or a dtype offers none, rather than one through a conversion that would be timed with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PEERS = ("torch", "jax", "onnxruntime", "openvino")  # names to import, and to install
_ALSO_NEEDED = {"onnxruntime": "onnx"}  # the models it runs are built with this


@dataclass(frozen=True)
class Problem:
    """One operation on given arrays: what every contender computes."""

    op: str  # "rms_norm", "layer_norm", or one of these after "add_"
    direction: str  # "forward" or "forward+backward"
    x: Array  # (rows, n)
    weight: Array  # (n,)
    dy: Array  # (rows, n)
    eps: float
    residual: Array | None = None  # (rows, n), as dh: where x is added to it first
    dh: Array | None = None

    @property
    def centres(self) -> bool:
        """Whether the mean is subtracted."""
        return self.op.endswith("layer_norm")


def versions(only: Sequence[str] = PEERS) -> dict[str, str]:
    """Those of these peers that are installed, with their versions."""
    return {name: metadata.version(name) for name in only if not _missing(name)}


def require(only: Sequence[str] | None) -> Sequence[str]:
    """The peers to compare with: for None all that are installed, else these.

    Raises
    ------
    argparse.ArgumentError
        If one that was asked for is not installed.
    """
    if only is None:
        return list(versions())
    missing = [package for name in only for package in _missing(name)]
    if missing:
        lacking, install = ", ".join(missing), " ".join(missing)
        raise argparse.ArgumentError(None, f"argument --peers: not installed: {lacking}; pip install {install}")
    return only


def _missing(name: str) -> list[str]:
    """The packages that a peer needs and that are not installed."""
    needed = [name, _ALSO_NEEDED[name]] if name in _ALSO_NEEDED else [name]
    return [package for package in needed if find_spec(package) is None]


def calls(problem: Problem, threads: int, only: Sequence[str] = PEERS) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Pairs of a peer's name and its call; a forward call returns y (and h), the other (dx, dweight)."""
    makers = {
        "torch": _torch,
        "torch compiled": _torch_compiled,
        "jax": _jax,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
    }
    installed = versions(only)
    for name, maker in makers.items():
        if name.split()[0] not in installed:
            continue
        call = maker(problem, threads)
        if call is not None:
            yield name, call


def as_numpy(result: Any) -> Array:
    """A contender's y as a float64 array on the host."""
    if hasattr(result, "copy_to_host"):
        result = result.copy_to_host()
    if hasattr(result, "detach"):
        result = result.detach().double().numpy()
    return np.asarray(result).astype(np.float64)


def _torch_compiled(problem: Problem, threads: int) -> Callable[[], Any] | None:
    from shutil import which

    # it needs a C++ compiler; and it takes each dtype and shape anew, as other users of it would
    return _torch(problem, threads, compiled=True) if which("c++") else None


def _torch(problem: Problem, threads: int, compiled: bool = False) -> Callable[[], Any]:
    import torch
    import torch.nn.functional as functional

    torch.set_num_threads(threads)
    x, weight, dy = (as_torch(array) for array in (problem.x, problem.weight, problem.dy))
    residual, dh = (None if array is None else as_torch(array) for array in (problem.residual, problem.dh))
    function = functional.layer_norm if problem.centres else functional.rms_norm
    shape, eps = problem.weight.shape, problem.eps

    def norm(x: Any, weight: Any) -> Any:
        if residual is None:
            return function(x, shape, weight, eps=eps)
        h = x + residual
        return function(h, shape, weight, eps=eps), h

    if compiled:
        torch._dynamo.reset()  # it gives up on a function that it has compiled for eight shapes
        norm = torch.compile(norm, dynamic=False)

    def forward() -> Any:  # nothing requires a gradient, and to enter no_grad would take as long as a small norm
        return norm(x, weight)

    def both() -> Any:
        return torch.autograd.grad(norm(x, weight), (x, weight), dy if residual is None else (dy, dh))

    if problem.direction == "forward":
        return forward
    x.requires_grad_()
    weight.requires_grad_()
    return both


def as_torch(array: Array) -> Any:
    """The array as a tensor, in the same memory."""
    import torch

    if array.dtype.name == "bfloat16":  # from_numpy does not know ml_dtypes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _jax(problem: Problem, threads: int) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    if problem.x.dtype == np.float64:
        jax.config.update("jax_enable_x64", True)
    x, weight, dy = (jnp.asarray(array) for array in (problem.x, problem.weight, problem.dy))
    residual, dh = (None if array is None else jnp.asarray(array) for array in (problem.residual, problem.dh))
    eps = problem.eps
    if residual is not None:
        dy = dy, dh

    def norm(x: Any, weight: Any, residual: Any) -> Any:
        # written as in the usual models: statistics in float32 or better, the result in x's dtype
        h = x if residual is None else x + residual
        wide = h.astype(jnp.promote_types(x.dtype, jnp.float32))
        if problem.centres:
            wide = wide - wide.mean(-1, keepdims=True)
        rstd = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
        y = (wide * rstd * weight).astype(x.dtype)
        return y if residual is None else (y, h)

    def gradients(x: Any, weight: Any, residual: Any, dy: Any) -> Any:
        y, pull_back = jax.vjp(lambda x, weight: norm(x, weight, residual), x, weight)
        return y, pull_back(dy)  # y too, or the compiler would leave the forward pass out

    if problem.direction == "forward":
        compiled = jax.jit(norm)
        return lambda: jax.block_until_ready(compiled(x, weight, residual))
    compiled = jax.jit(gradients)
    return lambda: jax.block_until_ready(compiled(x, weight, residual, dy))[1]


def _openvino(problem: Problem, threads: int) -> Callable[[], Any] | None:
    if problem.direction != "forward" or problem.x.dtype != np.float32 or problem.residual is not None:
        return None
    import openvino
    from openvino import opset13

    x = opset13.parameter(problem.x.shape, np.float32)
    axis, eps, weight = np.array([1], np.int64), np.float32(problem.eps), opset13.constant(problem.weight)
    if problem.centres:
        xhat = opset13.mvn(x, axis, True, problem.eps, "INSIDE_SQRT")
    else:  # the pattern that openvino knows as RMSNorm
        mean_square = opset13.reduce_mean(opset13.power(x, opset13.constant(np.float32(2))), axis, True)
        root = opset13.sqrt(opset13.add(mean_square, opset13.constant(eps)))
        xhat = opset13.multiply(x, opset13.divide(opset13.constant(np.float32(1)), root))
    model = openvino.Model([opset13.multiply(xhat, weight)], [x])
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(problem.x, shared_memory=True))
    return lambda: request.infer()[0]


def _onnxruntime(problem: Problem, threads: int) -> Callable[[], Any] | None:
    onnx_types = {"float32": "FLOAT", "float16": "FLOAT16", "float64": "DOUBLE"}
    name = problem.x.dtype.name
    if problem.residual is not None:
        del onnx_types["float64"]  # its operations with a residual have no kernel for it
    if problem.direction != "forward" or name not in onnx_types:
        return None
    import onnx
    import onnxruntime

    # SimplifiedLayerNormalization is onnxruntime's fused RMSNorm; its RMSNormalization is several operations
    op = "LayerNormalization" if problem.centres else "SimplifiedLayerNormalization"
    element = getattr(onnx.TensorProto, onnx_types[name])
    arrays, outputs = {"x": problem.x, "weight": problem.weight}, ["y"]
    options: dict[str, Any] = {"axis": -1}
    if problem.residual is not None:  # with a residual: Skip…, which has no axis, and h for its fourth output
        op, outputs, options = f"Skip{op}", ["y", "", "", "h"], {"domain": "com.microsoft"}
        arrays = {"x": problem.x, "residual": problem.residual, "weight": problem.weight}
    inputs = [onnx.helper.make_tensor_value_info(key, element, array.shape) for key, array in arrays.items()]
    outs = [onnx.helper.make_tensor_value_info(key, element, problem.x.shape) for key in outputs if key]
    node = onnx.helper.make_node(op, list(arrays), outputs, epsilon=problem.eps, **options)
    graph = onnx.helper.make_graph([node], "norm", inputs, outs)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    serialized = model.SerializeToString()
    session = onnxruntime.InferenceSession(serialized, session_options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, arrays)[0 if problem.residual is None else slice(None)]
