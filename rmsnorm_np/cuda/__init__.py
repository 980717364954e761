"""The CUDA engine: normalised device arrays in, device arrays out. Here a call gets its memory, its plan and its grid.

Read on in `launch` (how work is cut), `kernels` and `long_rows` (who takes which row), `moments` (what is summed over a
row), `elements` (what becomes of it), `parameters` (dweight and dbias). Below: `rows` (a row in registers), `reduce`
(sums over threads), `pairs` (numbers with twice the digits), `vector` (what a thread moves), `intrinsics`, `kernel`
(what is launched), `arguments`, `copies` and `arrays` (what a caller has).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numba_cuda  # without it Numba has an older numba.cuda of its own, which will not do
import numpy as np
from numba import cuda

from rmsnorm_np.cuda import arguments, arrays, kernels, launch, long_rows, parameters, vector
from rmsnorm_np.cuda.arrays import to_device, use_stream
from rmsnorm_np.cuda.moments import MOMENTS, NUMBERS
from rmsnorm_np.cuda.reduce import WARP

if TYPE_CHECKING:
    from rmsnorm_np.cuda.arrays import Seen
    from rmsnorm_np.cuda.kernel import Capability

__all__ = [
    "arguments",
    "describe",
    "layer_backward",
    "layer_forward",
    "rms_backward",
    "rms_forward",
    "to_device",
    "use_stream",
]


def forward(operation, reads, parameters, out, k, eps):  # for the time being
    weight, bias, offset = parameters
    return _forward(reads[0], weight, bias, k, eps, offset, out[0], operation.recentring), None


def backward(operation, reads, parameters, out, k, eps):
    weight, bias, offset = parameters
    dx, *totals = _backward(reads[1], reads[0], weight, bias, k, eps, offset, out[0], operation.recentring)
    return (dx,), totals


def rms_forward(
    x: Seen, weight: Seen | None, bias: Seen | None, k: int, eps: float, weight_offset: float, out: Seen
) -> None:
    """y = x · rstd · (weight_offset + weight) + bias for each row of x, see :func:`rmsnorm_np.rms_norm`."""
    return _forward(x, weight, bias, k, eps, weight_offset, out, False)


def layer_forward(x: Seen, weight: Seen | None, bias: Seen | None, eps: float, weight_offset: float, out: Seen) -> None:
    """y = (x - mean) · rstd · (weight_offset + weight) + bias for each row, see :func:`rmsnorm_np.layer_norm`."""
    return _forward(x, weight, bias, x.shape[1], eps, weight_offset, out, True)


def rms_backward(
    dy: Seen, x: Seen, weight: Seen | None, bias: Seen | None, k: int, eps: float, weight_offset: float, out: Seen
) -> Any:
    """dx, dweight and dbias of `rms_forward`, see :func:`rmsnorm_np.rms_norm_backward`."""
    return _backward(dy, x, weight, bias, k, eps, weight_offset, out, False)


def layer_backward(
    dy: Seen, x: Seen, weight: Seen | None, bias: Seen | None, eps: float, weight_offset: float, out: Seen
) -> Any:
    """dx, dweight and dbias of `layer_forward`, see :func:`rmsnorm_np.layer_norm_backward`."""
    return _backward(dy, x, weight, bias, x.shape[1], eps, weight_offset, out, True)


def _plan(
    x: Seen, dy: Seen | None, weight: Seen | None, bias: Seen | None, k: int, weight_offset: float, out: Seen,
    centred: bool,
) -> launch.Plan:  # fmt: skip
    n = x.shape[1]
    given = [a for a in (x, dy, weight, bias) if a is not None]
    aligned = arrays.are_aligned(n, vector.BYTES // x.dtype.itemsize, tuple(a.address for a in (*given, out)))
    dtypes = [None if a is None else a.dtype for a in (x, dy, weight, bias)]
    return _plan_for(n, *dtypes, centred, k < n, weight_offset != 0.0, aligned, arrays.capability_here())


@lru_cache(maxsize=1024)
def _plan_for(
    n: int, x: Any, dy: Any, weight: Any, bias: Any, centred: bool, partial: bool, offset: bool, aligned: bool,
    capability: Capability,
) -> launch.Plan:  # fmt: skip
    names = (None if dtype is None else dtype.name for dtype in (dy, weight, bias))
    return launch.plan_for(
        n, x.name, *names, centred=centred, partial=partial, offset=offset, aligned=aligned, capability=capability
    )


def _forward(
    x: Seen, weight: Seen | None, bias: Seen | None, k: int, eps: float, weight_offset: float, out: Seen, centred: bool
) -> None:
    rows, n = x.shape
    if rows == 0:
        return
    stream = arrays.stream_for((x, weight, bias, out))
    plan = _plan(x, None, weight, bias, k, weight_offset, out, centred)
    source, target = x.address, out.address
    w, b = (source if a is None else a.address for a in (weight, bias))  # what is not there is not looked at
    weight_rows, bias_rows = (1 if a is None else a.shape[0] for a in (weight, bias))
    if not plan.split:
        kernels.forward(plan)(
            -(-rows // plan.teams), stream,
            source, w, b, rows, n, k, 1.0 / k, weight_rows, bias_rows, weight_offset, eps, target,
        )  # fmt: skip
        return
    pieces = -(-n // plan.length)
    numbers = _numbers(plan, None, x, None, k, eps, weight_offset, pieces, [], stream)[0]
    long_rows.piece_forward(plan)(
        rows * pieces, stream, source, w, b, numbers, rows, n, weight_rows, bias_rows, weight_offset, target
    )
    arrays.leave_scratch()


def _numbers(
    plan: launch.Plan, dy: Seen | None, x: Seen, weight: Seen | None, k: int, eps: float, weight_offset: float,
    pieces: int, more: list[int], stream: int,
) -> list[int]:  # fmt: skip
    """Where the numbers of each long row are, from the moments of its pieces; and `more` bytes, for the same call."""
    rows, n = x.shape
    itemsize = np.dtype(plan.work).itemsize
    numbers, kept, *rest = arrays.scratch((rows * NUMBERS * itemsize, rows * pieces * MOMENTS * 8, *more), stream)
    inverse_last = 1.0 / (n - (pieces - 1) * plan.length)  # a division in a kernel costs it registers
    gradient, w = (x.address if a is None else a.address for a in (dy, weight))
    long_rows.piece_moments(plan)(
        rows * pieces, stream, gradient, x.address, w, n, k, inverse_last, 1 if weight is None else weight.shape[0],
        weight_offset, eps, kept,
    )  # fmt: skip
    team = WARP if pieces <= launch.WARP_PIECES else plan.block
    long_rows.row_numbers(plan, team)(rows, stream, kept, n, k, 1.0 / k, inverse_last, eps, numbers)
    return [numbers, *rest]


def _backward(
    dy: Seen, x: Seen, weight: Seen | None, bias: Seen | None, k: int, eps: float, weight_offset: float, out: Seen,
    centred: bool,
) -> Any:  # fmt: skip
    rows, n = x.shape
    stream = arrays.stream_for((x, dy, weight, bias, out))
    plan = _plan(x, dy, weight, bias, k, weight_offset, out, centred)
    weight_rows, bias_rows = (1 if a is None else a.shape[0] for a in (weight, bias))
    m = max(weight_rows, bias_rows)
    given = [a is not None for a in (weight, bias)]
    pieces = -(-n // plan.length) if plan.split else 1
    chunks = _chunks(plan, rows // m, m * pieces, any(given))
    tasks = chunks * m
    sizes = [tasks * n * np.dtype(plan.work).itemsize if there else 0 for there in given]
    sums = [x.address] * 2
    if rows > 0:
        w = x.address if weight is None else weight.address
        if plan.split:
            numbers, *sums = _numbers(plan, dy, x, weight, k, eps, weight_offset, pieces, sizes, stream)
            long_rows.piece_backward(plan)(
                tasks * pieces, stream, dy.address, x.address, w, numbers, rows, n, weight_rows, m, chunks, k,
                weight_offset, out.address, *sums,
            )  # fmt: skip
        else:
            if any(given):
                sums = arrays.scratch(tuple(sizes), stream)
            kernels.backward(plan)(
                tasks, stream, dy.address, x.address, w, rows, n, k, 1.0 / k, weight_rows, m, chunks, weight_offset,
                eps, out.address, *sums,
            )  # fmt: skip
    else:
        tasks = 0
    totals = [
        None if parameter is None else _total(plan, parameter, partial, tasks, n, stream)
        for parameter, partial in zip((weight, bias), sums, strict=True)
    ]
    arrays.leave_scratch()
    return None, *totals


def _chunks(plan: launch.Plan, groups: int, blocks: int, sums: bool) -> int:
    """Parts of the rows that share a row of the parameters; `blocks` blocks take each part, and have sums to write."""
    most = max(1, -(-groups // plan.teams))
    if not sums:
        return most
    # Sums cost traffic: few of them, but where rows are few, blocks enough to give each multiprocessor one.
    enough = launch.MULTIPROCESSORS * (plan.resident or max(1, launch.SPLIT_THREADS // plan.block))
    return max(1, min(most, max(groups // launch.ROWS_PER_CHUNK, enough // 4), enough // blocks))


def _total(plan: launch.Plan, parameter: Seen, partial: int, tasks: int, n: int, stream: int) -> Any:
    """The gradient of a parameter, from the sums of all blocks."""
    total = arrays.empty(tuple(parameter.owner.shape), parameter.dtype, stream)
    rows = parameter.shape[0]
    slices = launch.SLICES[tasks // rows <= launch.MANY_TASKS]
    parameters.add_partials(plan.work, parameter.dtype.name, plan.capability, slices)(
        rows * -(-n // parameters.COLUMNS), stream, partial, tasks, rows, n, arrays.seen("", total).address
    )
    return total


def describe() -> dict[str, Any]:
    """What the engine runs on: versions and the device."""
    device = cuda.get_current_device()
    return {
        "numba-cuda": numba_cuda.__version__,
        "device": device.name.decode() if isinstance(device.name, bytes) else device.name,
        "compute_capability": ".".join(map(str, device.compute_capability)),
        "multiprocessors": device.MULTIPROCESSOR_COUNT,
    }
