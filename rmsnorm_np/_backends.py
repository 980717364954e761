"""Which engine runs a call. Engines are imported on first use: `import rmsnorm_np` compiles and loads nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from rmsnorm_np import _arguments, _broadcast, _formats, _shapes, ops, reference
from rmsnorm_np._numbers import check_flag
from rmsnorm_np._overlap import check_apart
from rmsnorm_np.ops.quantized import quantized_rms_norm
from rmsnorm_np.reference.sharded import check_reduce

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from rmsnorm_np.ops.operation import Operation

_INSTALL = {
    "dask": 'dask: pip install "rmsnorm_np[dask]"',
    "cpu": "numba: pip install numba",
    "cuda": 'numba-cuda: pip install "rmsnorm_np[cuda13]", or [cuda12] for a CUDA 12 driver',
}
_engines: dict[str, ModuleType] = {"reference": reference}


def select(x: Any, backend: str | None) -> ModuleType:
    """The engine named by `backend`; for None, "cuda" where x is a device array, and "cpu" where it lies on the host.

    A Dask array has an engine of its own, which runs "cpu" on its blocks.

    Raises
    ------
    ValueError
        If there is no backend of that name, or one is named for a Dask array.
    TypeError
        If x lies on the host and the backend is "cuda", or the other way round. Nothing is moved unasked.
    ImportError
        If the engine's requirements are not installed. No other engine takes its place.
    """
    if backend is None and type(x) is ndarray:
        engine = _engines.get("cpu")
        return _load("cpu") if engine is None else engine
    on_device = hasattr(x, "__cuda_array_interface__")
    if hasattr(x, "__dask_graph__"):
        if backend is not None:
            raise ValueError(f"backend is {backend!r}, expected None where x is a dask array: 'cpu' runs on its blocks")
        backend = "dask"
    elif backend is None:
        backend = "cuda" if on_device else "cpu"
    elif backend == "cuda":
        # Refuse only what is certain to lie on the host: the engine's own error is the better one for all else.
        if isinstance(x, (ndarray, np.generic, list, tuple, int, float, complex)):
            raise TypeError(
                f"x is a host array ({type(x).__name__}), backend 'cuda' takes device arrays: "
                "move it with numba.cuda.to_device(x)"
            )
    elif backend not in ("reference", "cpu"):
        raise ValueError(f"backend is {backend!r}, expected None, 'reference', 'cpu' or 'cuda'")
    elif on_device:
        raise TypeError(
            f"x is a device array ({type(x).__name__}), backend {backend!r} takes host arrays: "
            "move it with x.copy_to_host()"
        )
    engine = _engines.get(backend)
    return _load(backend) if engine is None else engine


def for_reduce(engine: Any, reduce: Any, p: Any = 1.0) -> Any:
    """The engine for rows that are cut over workers: on the host, NumPy."""
    if hasattr(engine, "Reducing"):
        check_reduce(reduce, p)
        return engine.Reducing(reduce)
    if engine is _engines.get("dask"):
        raise ValueError("reduce is given, expected None where x is a dask array: its chunks may cut the rows")
    return reference


def _load(backend: str) -> ModuleType:
    from importlib import import_module  # noqa: TID251 (of this package, one of the engines above)

    try:
        engine = import_module(f"rmsnorm_np.{backend}")
    except ImportError as error:
        raise ImportError(f"backend {backend!r} needs {_INSTALL[backend]}") from error
    _engines[backend] = engine
    return engine


def forward(
    engine: Any, operation: Operation, call: tuple[Any, ...], dtype: Any = None, round_xhat: Any = False
) -> Any:
    """The outputs of a call, given as the items of `_arguments.Call`."""
    if dtype is None and round_xhat is False:
        reads, parameters, out, k, eps, restore = engine.arguments.engine_arguments(call)
    else:
        wanted = _arguments.result_dtype(dtype)
        reads, parameters, out, k, eps, restore = engine.arguments.engine_arguments(call, wanted)
        x = reads[0]
        if check_flag("round_xhat", round_xhat):
            operation = ops.rounding_xhat(operation, x.dtype.name)
        if out[0] is None and wanted is not None and wanted != x.dtype:
            out = engine.new_result(x, wanted), *out[1:]
    if type(parameters) is not tuple:
        engine, parameters = _in_parts(engine, parameters)
    results = engine.forward(operation, reads, parameters, out, k, eps)
    return results if restore is None else restore(results)


def _in_parts(engine: Any, spread: _broadcast.Spread) -> tuple[Any, tuple[Any, Any, float]]:
    """An engine for parameters that broadcast in another way than engines know, and these parameters."""
    return _broadcast.InParts(engine, spread.cut), spread[:3]


def run(
    engine: Any, operation: Operation, call: tuple[Any, ...], directions: Any = None, dtype: Any = None,
    round_xhat: Any = False,
) -> tuple[Any, Any]:  # fmt: skip
    """(outputs, gradients by weight and bias) of any operation that keeps nothing; arguments as of `forward`.

    directions: (name, array) of what the operation has in place of the bias, a direction of the weight and one of the
    bias, each None or of its shape.
    """
    arguments = engine.arguments
    wanted = _arguments.result_dtype(dtype)
    reads, columns, out, k, eps, restore = arguments.engine_arguments(call, wanted, 0)
    if type(columns) is not tuple:
        if columns is None:
            raise ValueError(arguments.NO_ORDER)
        engine, columns = _in_parts(engine, columns)
    if check_flag("round_xhat", round_xhat):
        operation = ops.rounding_xhat(operation, reads[0].dtype.name)
    weight, bias, offset = columns
    if directions is not None:
        like = ("weight", call[2][0], weight), ("bias", call[2][1], bias)
        along = (arguments.column(*given, *parameter, out) for given, parameter in zip(directions, like, strict=True))
        columns = weight, *along, offset
    if out[0] is None and wanted is not None and wanted != reads[0].dtype:
        out = engine.new_result(reads[0], wanted), *out[1:]
    totals: Any = ()
    if operation.share is None:
        results = engine.forward(operation, reads, columns, out, k, eps)
    else:
        results, totals = engine.backward(operation, reads, columns, out, k, eps)
        totals = [arguments.restore_parameter(*pair) for pair in zip(totals, call[2][:2], strict=True)]
    return (results if restore is None else restore(results)), totals


def quantize(
    engine: Any, call: tuple[Any, ...], dtype: Any, scale: Any, bound: float, out: Any
) -> tuple[Any, Any, Any]:
    """(q, scale, h) of a call as in `forward`, whose first output is q, of this dtype, in `out` if that is given."""

    def operation_of(given: bool, scale_dtype: Any) -> Operation:
        return quantized_rms_norm(dtype.name, given, scale_dtype == np.float32)

    if hasattr(engine, "quantized"):
        names, arrays, columns, (_, h), *numbers = call
        found: tuple[Any, Any, Any] = engine.quantized(
            operation_of, (names, arrays, columns, (out, h), *numbers), dtype, scale, bound
        )
        return found
    if not hasattr(engine, "quantize"):
        name = engine.__name__.rpartition(".")[2]
        raise ValueError(
            f"x is an array for {name!r}, expected an ndarray or a device array: quantized_rms_norm runs on 'cpu' "
            "and 'cuda'"
        )
    reads, parameters, (_, h), k, eps, restore = engine.arguments.engine_arguments(call, None, 0)
    axis, shape = call[-1], np.shape(call[1][0])
    x, per_row, scale_dtype = reads[0], _formats.scale_shape(shape, axis), _formats.scale_dtype(reads[0].dtype)
    given = _formats.check_scale(scale, per_row, scale_dtype)
    wanted = None if out is None else _arguments.check_out("out", out, shape, dtype)
    check_apart("out", wanted, "residual_out", call[3][1])
    direct = wanted is not None and _is_direct(wanted, axis, (*call[1], *call[2][:2], scale, call[3][1]))
    q = wanted.reshape(x.shape) if wanted is not None and direct else engine.new_result(x, dtype)
    scales = np.empty(len(x)) if given is None else np.ravel(np.broadcast_to(given, per_row)).astype(np.float64)
    operation = operation_of(given is not None, scale_dtype)
    if type(parameters) is not tuple:
        engine, parameters = _in_parts(engine, parameters)
    results = engine.quantize(operation, reads, parameters, (q, h), k, (eps, scales, bound))
    q, h = results if restore is None else restore(results)
    if wanted is not None and not direct:
        np.copyto(wanted, q)
    return q if out is None else out, scales.astype(scale_dtype).reshape(per_row), h


def _is_direct(out: Any, axis: Any, others: Sequence[Any]) -> bool:
    """Whether an engine may write rows straight to out: they lie there in order, and nothing else does."""
    axes = _shapes.axes_of(axis, out.shape)
    trailing = axes == tuple(range(out.ndim - len(axes), out.ndim))
    return trailing and out.flags.c_contiguous and not any(np.may_share_memory(out, a) for a in others if a is not None)


def backward(engine: Any, operation: Operation, call: tuple[Any, ...]) -> Any:
    """The gradients of a call, given as the items of `_arguments.Call`: dx, dweight, dbias. Its out may be a tuple."""
    arguments = engine.arguments
    if isinstance(call[3][0], tuple):
        names, reads, parameters, (out,), *numbers = call
        name, dx_out, into = arguments.gradient_out(out, *parameters[:2])
        return into(*backward(engine, operation, ((*names[:-1], name), reads, parameters, (dx_out,), *numbers)))
    reads, parameters, out, k, eps, restore = arguments.engine_arguments(call)
    if type(parameters) is not tuple:
        if parameters is None:
            return _one_after_the_other(engine, operation, call)
        engine, parameters = _in_parts(engine, parameters)
    results, (dweight, dbias) = engine.backward(operation, reads, parameters, out, k, eps)
    (dx,) = results if restore is None else restore(results)
    weight, bias, _ = call[2]
    return dx, arguments.restore_parameter(dweight, weight), arguments.restore_parameter(dbias, bias)


def _one_after_the_other(engine: Any, operation: Operation, call: tuple[Any, ...]) -> Any:
    """The gradients of a call whose weight and bias are for different axes, where an engine takes one of them alone."""
    names, reads, (weight, bias, offset), out, *numbers = call
    dbias = backward(engine, operation, (names, reads, (None, bias, 0.0), (None,), *numbers))[2]
    dx, dweight, _ = backward(
        engine, operation, (names, reads, (weight, None, offset), out, *numbers)
    )  # may be over dy
    return dx, dweight, dbias
