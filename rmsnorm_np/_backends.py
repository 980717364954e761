"""Which engine runs a call. Engines are imported on first use: `import rmsnorm_np` compiles and loads nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from rmsnorm_np import _arguments, ops, reference
from rmsnorm_np._broadcast import in_parts
from rmsnorm_np._numbers import check_flag
from rmsnorm_np.reference.sharded import check_reduce

if TYPE_CHECKING:
    from types import ModuleType

    from rmsnorm_np.ops.operation import Operation

_INSTALL = {
    "dask": 'dask: pip install "rmsnorm_np[dask]"',
    "cpu": "numba: pip install numba",
    "cuda": 'numba-cuda: pip install "rmsnorm_np[cuda13]", or [cuda12] for a CUDA 12 driver',
}
_engines: dict[str, ModuleType] = {"reference": reference}
_rounding: dict[tuple[str, np.dtype[Any]], Operation] = {}


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
            operation = _rounding_xhat(operation, x.dtype)
        if out[0] is None and wanted is not None and wanted != x.dtype:
            out = engine.new_result(x, wanted), *out[1:]
    if type(parameters) is not tuple:
        engine, parameters = in_parts(engine, parameters)
    results = engine.forward(operation, reads, parameters, out, k, eps)
    return results if restore is None else restore(results)


def _rounding_xhat(operation: Operation, dtype: np.dtype[Any]) -> Operation:
    """The operation with xhat rounded to this dtype. (Finding it by the name of the dtype takes 6 µs.)"""
    found = _rounding.get((operation.name, dtype))
    if found is None:
        found = _rounding[operation.name, dtype] = ops.rounding_xhat(operation, dtype.name)
    return found


def prepared(
    engine: Any, call: tuple[Any, ...], directions: Any = None, dtype: Any = None, apart: int = 0
) -> tuple[Any, ...]:
    """(an engine, what it takes: reads, columns, out, k, eps, and restore) of a call; apart: as of the engine's.

    directions: (name, array) of what the operation has in place of the bias, a direction of the weight and one of the
    bias, each None or of its shape.
    """
    arguments = engine.arguments
    reads, columns, out, k, eps, restore = arguments.engine_arguments(call, dtype, apart)
    if type(columns) is not tuple:
        if columns is None:
            raise ValueError(arguments.NO_ORDER)
        engine, columns = in_parts(engine, columns)
    weight, bias, offset = columns
    if directions is not None:
        like = ("weight", call[2][0], weight), ("bias", call[2][1], bias)
        along = (arguments.column(*given, *parameter, out) for given, parameter in zip(directions, like, strict=True))
        columns = weight, *along, offset
    return engine, reads, columns, out, k, eps, restore


def run(
    engine: Any, operation: Operation, call: tuple[Any, ...], directions: Any = None, dtype: Any = None,
    round_xhat: Any = False,
) -> tuple[Any, Any]:  # fmt: skip
    """(outputs, gradients by weight and bias) of any operation that keeps nothing; arguments as of `forward`.

    directions: as of `prepared`.
    """
    arguments, wanted = engine.arguments, _arguments.result_dtype(dtype)
    engine, reads, columns, out, k, eps, restore = prepared(engine, call, directions, wanted)
    if check_flag("round_xhat", round_xhat):
        operation = _rounding_xhat(operation, reads[0].dtype)
    if out[0] is None and wanted is not None and wanted != reads[0].dtype:
        out = engine.new_result(reads[0], wanted), *out[1:]
    totals: Any = ()
    if operation.share is None:
        results = engine.forward(operation, reads, columns, out, k, eps)
    else:
        results, totals = engine.backward(operation, reads, columns, out, k, eps)
        totals = [arguments.restore_parameter(*pair) for pair in zip(totals, call[2][:2], strict=True)]
    return (results if restore is None else restore(results)), totals


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
        engine, parameters = in_parts(engine, parameters)
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
