"""The CUDA engine: device arrays in, device arrays out, of any operation of :mod:`rmsnorm_np.ops`.

Here a call gets its memory, its plan and its grid. Read on in `launch` (how work is cut), `schedule` (the kernels: who
takes which row), `row` (the program for one row), `team` (sums over threads), `rare` (rows out of range). Below:
`tracing` (how formulas become code), `number` (a number in a register), `words` (what a thread moves), `kernel` (what
is launched), `arguments`, `copies` and `arrays` (what a caller has), `scales` (of rows in 8 bits) and `reduced` (rows
that are cut over workers).
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numba_cuda  # without it Numba has an older numba.cuda of its own, which will not do
from numba import cuda

from rmsnorm_np import _formats
from rmsnorm_np.cuda import arguments, arrays, launch, rare, schedule
from rmsnorm_np.cuda.arrays import to_device, use_stream
from rmsnorm_np.cuda.elements import RowScales, Size
from rmsnorm_np.cuda.launch import Kinds, Plan
from rmsnorm_np.cuda.reduced import sums_of_all
from rmsnorm_np.cuda.scales import scales_of
from rmsnorm_np.cuda.words import BYTES
from rmsnorm_np.ops.operation import Operation, Totals
from rmsnorm_np.ops.records import given

if TYPE_CHECKING:
    from collections.abc import Callable

    from rmsnorm_np.cuda.arrays import Seen
    from rmsnorm_np.cuda.kernel import Capability

__all__ = [
    "Reducing",
    "arguments",
    "backward",
    "describe",
    "forward",
    "quantized",
    "run",
    "to_device",
    "use_stream",
]


def run(
    operation: Operation, reads: Any, columns: Any, out: Any, k: int, eps: float, scales: RowScales | None = None,
    reduce: Any = None,
) -> tuple[Any, Totals]:  # fmt: skip
    """(writes, totals) of an operation on device arrays. Records may be plain tuples.

    reads: a record of (rows, n), `Seen`. columns: a record of (m, n), those like weight with one m, those like bias
    with another, or None; last the weight offset. out: a record of arrays to write to, None for those to be made:
    output j has the dtype of array j, and is written where there is one. k: elements in the RMS. totals: the gradients
    by weight and bias, of the operations that have them. scales: of operations whose rows have them. reduce:
    where rows are cut over workers, see `reduced`.
    """
    reads, columns, out = operation.Reads(*reads), operation.Columns(*columns), operation.Writes(*out)
    rows, n = reads[0].shape
    stream = arrays.stream_for((*reads, *columns[:-1], *out, *(scales or ())[1:]))
    for field, target, like in zip(out._fields, out, reads, strict=False):
        if target is None and like is not None:
            out = out._replace(**{field: arrays.seen("", arrays.empty((rows, n), like.dtype, stream))})
    sums, tasks = Totals(reads[0].address, reads[0].address), 0
    if rows > 0 or reduce is not None:
        planned = _planned(operation, reads, columns, out, k, eps, scales, reduce is not None)
        kept = None if reduce is None else sums_of_all(*planned, stream, reduce)
        if rows > 0:
            sums, tasks = _launched(*planned, scales, kept, stream)
    totals = given(
        _like_totals(operation, columns), lambda like, partial: _total(like, partial, tasks, n, stream), sums
    )
    arrays.leave_scratch()
    return given(out, lambda a: a.owner), totals


def _like_totals(operation: Operation, columns: Any) -> Totals:
    """The columns whose gradients are summed."""
    return Totals() if operation.share is None else Totals(columns.weight, getattr(columns, "bias", None))


def _total(parameter: Seen, partial: int, tasks: int, n: int, stream: int) -> Any:
    """The gradient of a parameter, from the sums of all blocks."""
    rows = parameter.shape[0]
    total = arrays.empty((rows, n), parameter.dtype, stream)
    slices = launch.SLICES[tasks // rows <= launch.MANY_TASKS]
    schedule.add_partials(parameter.dtype.name, arrays.capability_here(), slices)(
        rows * -(-n // schedule.COLUMNS), stream, partial, tasks, rows, n, arrays.seen("", total).address
    )
    return total


def _planned(
    operation: Operation,
    reads: Any,
    columns: Any,
    out: Any,
    k: int,
    eps: float,
    scales: RowScales | None,
    reduced: bool,
) -> tuple[Plan, Size, list[int]]:
    """The plan of a call, from its shape and dtypes; its numbers; the addresses of its arrays."""
    rows, n = reads[0].shape
    backward, offset = operation.share is not None, columns.weight_offset or 0.0
    weight_m, bias_m = _rows_of_columns(columns)
    m = max(weight_m, bias_m) if backward else 1
    used = columns._replace(weight_offset=None, **dict.fromkeys(operation.unused))
    records = (reads, used, out)
    kept = operation.keep and getattr(out, operation.keep)
    addresses = [0 if a is None else a.address for record in records for a in record]
    # whether every vector begins at a multiple of its size
    aligned = n % (BYTES // (kept or reads[0]).dtype.itemsize) == 0 and all(a % BYTES == 0 for a in addresses)
    dtypes = tuple(tuple(None if a is None else a.dtype for a in record) for record in (*records, (scales or ())[1:]))
    sums = tuple(a is not None for a in _like_totals(operation, columns))
    flags = offset != 0.0, k < n, reduced
    plan = _plan_for(operation, dtypes, sums, flags, n, aligned, arrays.capability_here())
    chunks = _chunks(plan, rows // m, m, n) if backward else min(rows, launch.RARE_BLOCKS)
    return plan, Size(rows, n, k, 1.0 / n, 1.0 / k, eps, offset, weight_m, bias_m, m, chunks), addresses


def _rows_of_columns(columns: Any) -> tuple[int, int]:
    """How many rows columns like weight have, and those like bias."""
    weight_m = bias_m = 1
    for field, a in zip(columns._fields[:-1], columns[:-1], strict=True):
        if a is not None and "bias" in field:
            bias_m = a.shape[0]
        elif a is not None:
            weight_m = a.shape[0]
    return weight_m, bias_m


def _launched(
    plan: Plan, size: Size, addresses: list[int], scales: RowScales | None, reduced: list[Seen] | None, stream: int
) -> tuple[Any, int]:
    """Launches the kernels of a call: the addresses of the partial sums, and how many rows of them there are."""
    tasks = size.chunks * size.m
    pieces = -(-size.n // plan.length) if plan.split else 1
    widths = schedule.widths(plan) if plan.split and reduced is None else ()
    wanted = [size.rows, *(size.rows * pieces * width * 4 for width in widths)]
    wanted += [tasks * size.n * 8 if there else 0 for there in plan.kinds.totals]
    marks, *rest = arrays.scratch(tuple(wanted), stream)
    kept, sums = rest[: len(widths)], Totals(*rest[len(widths) :])
    totals = [address if there else 0 for address, there in zip(sums, plan.kinds.totals, strict=True)]
    of_rows = scales and (scales.number, *(0 if a is None else a.address for a in scales[1:]))
    common = [*addresses, *totals, *(of_rows or ()), marks, *size]  # in the order of `Arrays`
    for s in range(len(widths)):
        schedule.pieces_kernel(plan, s)(size.rows * pieces, stream, *common, *kept)
    if reduced is not None:
        kept = [a.address for a in reduced]
    blocks = tasks if plan.backward else -(-size.rows // plan.teams)
    schedule.rows_kernel(plan)(blocks * pieces, stream, *common, *kept)
    if plan.marks:
        rare.rare_kernel(launch.rare_plan(plan))(tasks, stream, *common)
    return sums, tasks


@lru_cache(maxsize=1024)
def _plan_for(
    operation: Operation,
    dtypes: Any,
    sums: Any,
    flags: tuple[bool, bool, bool],
    n: int,
    aligned: bool,
    capability: Capability,
) -> Plan:
    offset, first_k, reduced = flags
    reads, columns, writes, scales = (
        tuple(None if dtype is None else dtype.name for dtype in record) for record in dtypes
    )
    kinds = Kinds(
        operation, operation.Reads(*reads), operation.Columns(*columns[:-1], offset or None), operation.Writes(*writes),
        Totals(*(there or None for there in sums)), first_k,
        RowScales(True, *scales) if scales else None, reduced,
    )  # fmt: skip
    return launch.plan_for(n, kinds, aligned, capability)


def _chunks(plan: Plan, groups: int, m: int, n: int) -> int:
    """Parts of the rows that share a row of the parameters: for each of these, and each piece, a block."""
    most = max(1, -(-groups // plan.teams))
    if not any(plan.kinds.totals):
        return most
    # Sums cost traffic: few of them, but where rows are few, blocks enough to give each multiprocessor one.
    enough = launch.MULTIPROCESSORS * (plan.resident or max(1, launch.SPLIT_THREADS // plan.block))
    blocks = m * (-(-n // plan.length) if plan.split else 1)
    return max(1, min(most, max(groups // launch.ROWS_PER_CHUNK, enough // 4), enough // blocks))


def forward(operation: Operation, reads: Any, columns: Any, out: Any, k: int, eps: float) -> Any:
    """The outputs of `run`."""
    return run(operation, reads, columns, out, k, eps)[0]


class Reducing(NamedTuple):
    """An engine for rows that are cut over workers: `reduce` sums what their parts add up to, see `reduced`."""

    reduce: Callable[[Any], Any]
    arguments: ModuleType = arguments

    def forward(self, operation: Operation, reads: Any, columns: Any, out: Any, k: int, eps: float) -> Any:
        """As of the engine."""
        return run(operation, reads, columns, out, k, eps, reduce=self.reduce)[0]

    def backward(
        self, operation: Operation, reads: Any, columns: Any, out: Any, k: int, eps: float
    ) -> tuple[Any, list[Any]]:
        """As of the engine."""
        writes, totals = run(operation, reads, columns, out, k, eps, reduce=self.reduce)
        return writes, _like_parameters(operation, totals, columns)


def quantized(call: tuple[Any, ...], dtype: Any, scale: Any, bound: float) -> tuple[Any, Any, Any]:
    """(q of this dtype, the scales of the rows, h) of a call as in `_arguments.Call`, whose first output is for q."""
    reads, columns, out, k, eps, restore = arguments.engine_arguments(call, dtype)
    operation = _formats.operation(dtype, scale is not None, reads[0].dtype)
    scales, finish = scales_of(call, (*reads, *columns[:-1]), out, scale, bound)
    run(operation, reads, columns, out, k, eps, scales)
    q, h = restore(None)
    return q, finish(), h


def backward(operation: Operation, reads: Any, columns: Any, out: Any, k: int, eps: float) -> tuple[Any, Any]:
    """The outputs and totals of `run`; the totals in the shapes of the parameters."""
    writes, totals = run(operation, reads, columns, out, k, eps)
    return writes, _like_parameters(operation, totals, columns)


def _like_parameters(operation: Operation, totals: Totals, columns: Any) -> list[Any]:
    likes = _like_totals(operation, operation.Columns(*columns))
    return [arrays.shaped_like(total, like) for total, like in zip(totals, likes, strict=True)]


def describe() -> dict[str, Any]:
    """What the engine runs on: versions and the device."""
    device = cuda.get_current_device()
    return {
        "numba-cuda": numba_cuda.__version__,
        "device": device.name.decode() if isinstance(device.name, bytes) else device.name,
        "compute_capability": ".".join(map(str, device.compute_capability)),
        "multiprocessors": device.MULTIPROCESSOR_COUNT,
    }
