"""The CUDA engine: normalised device arrays in, device arrays out. Here a call gets its memory, its plan and its grid.

Read on in `launch` (how work is cut), `kernels` and `long_rows` (who takes which row), `moments` (what is summed over a
row), `elements` (what becomes of it), `parameters` (dweight and dbias). Below: `rows` (a row in registers), `reduce`
(sums over threads), `pairs` (numbers with twice the digits), `vector` (what a thread moves), `intrinsics`.
"""

from __future__ import annotations

import warnings
from typing import Any

import numba_cuda  # without it Numba has an older numba.cuda of its own, which will not do
import numpy as np
from numba import cuda
from numba.core.errors import NumbaPerformanceWarning

from rmsnorm_np.cuda import arrays, kernels, launch, long_rows, parameters, vector
from rmsnorm_np.cuda import arrays as arguments
from rmsnorm_np.cuda.arrays import use_stream
from rmsnorm_np.cuda.moments import MOMENTS

__all__ = ["arguments", "describe", "layer_backward", "layer_forward", "rms_backward", "rms_forward", "use_stream"]

_NUMBA_WARNS_BELOW = 128  # blocks


def rms_forward(x: Any, weight: Any, bias: Any, k: int, eps: float, weight_offset: float, out: Any) -> Any:
    """y = x · rstd · (weight_offset + weight) + bias for each row of x, see :func:`rmsnorm_np.rms_norm`."""
    return _forward(x, weight, bias, k, eps, weight_offset, out, False)


def layer_forward(x: Any, weight: Any, bias: Any, eps: float, weight_offset: float, out: Any) -> Any:
    """y = (x - mean) · rstd · (weight_offset + weight) + bias for each row, see :func:`rmsnorm_np.layer_norm`."""
    return _forward(x, weight, bias, x.shape[1], eps, weight_offset, out, True)


def rms_backward(dy: Any, x: Any, weight: Any, bias: Any, k: int, eps: float, weight_offset: float, out: Any) -> Any:
    """dx, dweight and dbias of `rms_forward`, see :func:`rmsnorm_np.rms_norm_backward`."""
    return _backward(dy, x, weight, bias, k, eps, weight_offset, out, False)


def layer_backward(dy: Any, x: Any, weight: Any, bias: Any, eps: float, weight_offset: float, out: Any) -> Any:
    """dx, dweight and dbias of `layer_forward`, see :func:`rmsnorm_np.layer_norm_backward`."""
    return _backward(dy, x, weight, bias, x.shape[1], eps, weight_offset, out, True)


def _plan(x: Any, dy: Any, weight: Any, bias: Any, k: int, weight_offset: float, y: Any, centred: bool) -> launch.Plan:
    n = x.shape[1]
    lanes = vector.BYTES // x.dtype.itemsize
    names = (None if a is None else a.dtype.name for a in (dy, weight, bias))
    return launch.plan_for(
        n, x.dtype.name, *names, centred=centred, partial=k < n, offset=weight_offset != 0.0,
        aligned=arrays.are_aligned(n, lanes, (x, dy, weight, bias, y)), native_bfloat16=_rounds_to_bfloat16(),
    )  # fmt: skip


def _forward(x: Any, weight: Any, bias: Any, k: int, eps: float, weight_offset: float, out: Any, centred: bool) -> Any:
    rows, n = x.shape
    stream = arrays.stream_for((x, weight, bias, out))
    y = arrays.empty((rows, n), x.dtype, stream) if out is None else out
    if rows == 0:
        return y
    plan = _plan(x, None, weight, bias, k, weight_offset, y, centred)
    source, target = arrays.flat(x), arrays.flat(y)
    w, b = (source if a is None else arrays.flat(a) for a in (weight, bias))
    weight_rows, bias_rows = (1 if a is None else a.shape[0] for a in (weight, bias))
    if not plan.split:
        blocks = -(-rows // plan.teams)
        _launch(
            kernels.forward(plan), blocks, plan.block, stream,
            source, w, b, rows, n, k, 1.0 / k, weight_rows, bias_rows, weight_offset, eps, target,
        )  # fmt: skip
        return y
    pieces, inverse_last = _pieces(plan, n)
    together = min(rows, max(1, launch.L2_BYTES // (n * x.dtype.itemsize)))
    kept = arrays.empty((together * pieces * MOMENTS,), np.dtype(np.float64), stream)
    for first in range(0, rows, together):
        blocks = min(together, rows - first) * pieces
        _launch(
            long_rows.piece_moments(plan), blocks, plan.block, stream,
            source, source, source, first, n, k, inverse_last, 1, 0.0, eps, kept,
        )  # fmt: skip
        _launch(
            long_rows.piece_forward(plan), blocks, plan.block, stream,
            source, w, b, kept, first, n, k, 1.0 / k, inverse_last, weight_rows, bias_rows, weight_offset, eps, target,
        )  # fmt: skip
    return y


def _pieces(plan: launch.Plan, n: int) -> tuple[int, float]:
    """How many pieces a row has, and 1 / the elements of the last: a division in a kernel costs it registers."""
    pieces = -(-n // plan.length)
    return pieces, 1.0 / (n - (pieces - 1) * plan.length)


def _backward(
    dy: Any, x: Any, weight: Any, bias: Any, k: int, eps: float, weight_offset: float, out: Any, centred: bool
) -> Any:
    rows, n = x.shape
    stream = arrays.stream_for((x, dy, weight, bias, out))
    dx = arrays.empty((rows, n), x.dtype, stream) if out is None else out
    plan = _plan(x, dy, weight, bias, k, weight_offset, dx, centred)
    weight_rows, bias_rows = (1 if a is None else a.shape[0] for a in (weight, bias))
    m = max(weight_rows, bias_rows)
    tasks = 0
    partials: dict[str, Any] = {}
    if rows > 0:
        run = _split_backward if plan.split else _whole_backward
        tasks, partials = run(plan, dy, x, weight, bias, k, eps, weight_offset, dx, m, stream)
    totals: list[Any] = []
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            totals.append(None)
            continue
        parameter_rows = parameter.shape[0]
        total = arrays.empty((parameter_rows, n), parameter.dtype, stream)
        partial = partials[name] if partials else arrays.empty((1,), np.dtype(plan.work), stream)
        _launch(
            parameters.add_partials(plan.work, parameter.dtype.name, plan.native_bfloat16),
            parameter_rows * -(-n // parameters.COLUMNS), parameters.COLUMNS * launch.SLICES, stream,
            partial, tasks, parameter_rows, n, arrays.flat(total),
        )  # fmt: skip
        totals.append(total)
    return dx, *totals


def _partials(plan: launch.Plan, tasks: int, n: int, stream: Any) -> dict[str, Any]:
    """One row of sums a task, for each parameter that there is."""
    names = [name for name, dtype in (("weight", plan.weight), ("bias", plan.bias)) if dtype is not None]
    return {name: arrays.empty((tasks * n,), np.dtype(plan.work), stream) for name in names}


def _whole_backward(
    plan: launch.Plan, dy: Any, x: Any, weight: Any, bias: Any, k: int, eps: float, weight_offset: float, dx: Any,
    m: int, stream: Any,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    rows, n = x.shape
    groups = rows // m
    chunks = -(-groups // plan.teams)
    if plan.weight is not None or plan.bias is not None:
        # sums cost traffic: few of them, but where rows are few, blocks enough to give each multiprocessor one
        chunks = max(1, min(chunks, max(groups // launch.ROWS_PER_CHUNK, launch.CHUNKS // 4), launch.CHUNKS // m))
    partials = _partials(plan, chunks * m, n, stream)
    source = arrays.flat(x)
    w = source if weight is None else arrays.flat(weight)
    sums = (arrays.flat(partials[name]) if name in partials else source for name in ("weight", "bias"))
    _launch(
        kernels.backward(plan), chunks * m, plan.block, stream,
        arrays.flat(dy), source, w, rows, n, k, 1.0 / k, 1 if weight is None else weight.shape[0], m, chunks,
        weight_offset, eps, arrays.flat(dx), *sums,
    )  # fmt: skip
    return chunks * m, partials


def _split_backward(
    plan: launch.Plan, dy: Any, x: Any, weight: Any, bias: Any, k: int, eps: float, weight_offset: float, dx: Any,
    m: int, stream: Any,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    rows, n = x.shape
    pieces, inverse_last = _pieces(plan, n)
    groups = rows // m
    together = min(groups, max(1, launch.L2_BYTES // (n * (x.dtype.itemsize + dy.dtype.itemsize) * m)))
    parts = [(first, min(together, groups - first)) for first in range(0, groups, together)]
    chunks = [min(count, max(1, launch.CHUNKS // (pieces * m))) for _, count in parts]
    partials = _partials(plan, sum(chunks) * m, n, stream)
    kept = arrays.empty((together * m * pieces * MOMENTS,), np.dtype(np.float64), stream)
    gradient, source, result = arrays.flat(dy), arrays.flat(x), arrays.flat(dx)
    w = source if weight is None else arrays.flat(weight)
    weight_rows = 1 if weight is None else weight.shape[0]
    sums = [arrays.flat(partials[name]) if name in partials else source for name in ("weight", "bias")]
    tasks = 0
    for (first, count), chunk in zip(parts, chunks, strict=True):
        _launch(
            long_rows.piece_moments(plan), count * m * pieces, plan.block, stream,
            gradient, source, w, first * m, n, k, inverse_last, weight_rows, weight_offset, eps, kept,
        )  # fmt: skip
        _launch(
            long_rows.piece_backward(plan), chunk * m * pieces, plan.block, stream,
            gradient, source, w, kept, first * m, count * m, tasks, n, k, 1.0 / k, inverse_last, weight_rows, m, chunk,
            weight_offset, eps, result, *sums,
        )  # fmt: skip
        tasks += chunk * m
    return tasks, partials


def _launch(kernel: Any, blocks: int, threads: int, stream: Any, *arguments: Any) -> None:
    if blocks >= _NUMBA_WARNS_BELOW:
        kernel[blocks, threads, stream](*arguments)
        return
    with warnings.catch_warnings():  # a small call has few blocks, and nothing can be done about it
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        kernel[blocks, threads, stream](*arguments)


def _rounds_to_bfloat16() -> bool:
    capability: tuple[int, int] = cuda.get_current_device().compute_capability
    return capability >= (8, 0)


def describe() -> dict[str, Any]:
    """What the engine runs on: versions and the device."""
    device = cuda.get_current_device()
    return {
        "numba-cuda": numba_cuda.__version__,
        "device": device.name.decode() if isinstance(device.name, bytes) else device.name,
        "compute_capability": ".".join(map(str, device.compute_capability)),
        "multiprocessors": device.MULTIPROCESSOR_COUNT,
    }
