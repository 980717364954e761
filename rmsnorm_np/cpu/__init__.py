"""The CPU engine: normalised arguments in, arrays out. Here a call gets its memory, its kernel and its threads.

Read on in `schedule` (how rows are cut into blocks), `blocks` (what happens to one), `row` (to a row), `vector` (what a
number is) and `tracing` (how a formula becomes machine code). `extremes` finds the rows that leave the range, `rare`
has them computed once more, and `pace` takes one thread where several are slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _arguments as arguments
from rmsnorm_np import ops
from rmsnorm_np._threads import get_num_threads
from rmsnorm_np.cpu import cache, family, kernel, long_rows, memory, pace, rare, threads
from rmsnorm_np.cpu.family import new_result
from rmsnorm_np.cpu.prepared import small
from rmsnorm_np.cpu.quantized import quantized
from rmsnorm_np.cpu.vector import LINE
from rmsnorm_np.ops.operation import Columns, shared

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rmsnorm_np.ops.operation import Operation

__all__ = ["arguments", "backward", "describe", "forward", "new_result", "quantized", "small", "warmup"]

CHUNKS = 64  # at most so many partial sums of dweight; tasks enough for 64 threads
ROWS_PER_CHUNK = 16  # at least: fewer rows, and adding up the partial sums is felt
NARROW_ROW = 32  # shorter rows do not fill a vector of 32 halves: with 16 elements twice as fast with narrower ones


# Both functions take the operation's records as plain tuples, which Python makes in a tenth of the time.

_NO_TOTALS = (None, None)


def forward(
    operation: Operation, reads: Any, columns: Any, out: Any, k: int, eps: Any, wide: bool = False
) -> tuple[Any, ...]:
    """Run an operation on rows: reads (rows, n); weight and bias (m, n), where row r uses row r % m.

    out: arrays to write to, or None. What the operation keeps is written where a second array is read. eps: a number,
    or one for each row, then no row may leave the range. wide: as in `kinds.Kinds`.
    """
    if operation.keep is None:
        return (family.forward(operation, reads, columns, out, k, eps),)
    x, residual = reads
    weight, bias, offset = columns
    y, h = out
    shape = x.shape
    n = shape[1]
    way = kernel.ROWS if n <= long_rows.LONG_ROW else kernel.LONG_ROWS
    if len(shape) == 2:
        rows = shape[0]
    else:
        rows, way = shape[0] * shape[2], kernel.APART
    whole = k == n
    if way != kernel.LONG_ROWS and (rows * n < threads.PARALLEL_ELEMENTS or rows == 1):
        # a small call: the kernel takes about a microsecond, so each question that is not asked here counts
        if y is None:
            y = np.empty(shape, x.dtype)
        if h is None and residual is not None:
            h = np.empty(shape, residual.dtype)
        streaming, on_threads = 0, 1
    else:
        results = 1 if residual is None else 2
        if y is None:
            y = memory.empty(shape, x.dtype, x, results=results)
        if h is None and residual is not None:
            h = memory.empty(shape, residual.dtype, x, y, results=results)
        streaming, on_threads = memory.streams(y), threads.choose(x.size)
        if way == kernel.APART and h is not None:
            streaming = min(streaming, memory.streams(h))
    key = (
        operation.name, x.dtype, y.dtype, residual is None or residual.dtype, weight is None or weight.dtype,
        bias is None or bias.dtype, whole, offset != 0.0, way, type(eps), wide,
    )  # fmt: skip
    entry = kernel.entries.get(key)
    if entry is None:
        entry = kernel.entry(key, operation, reads, columns, (y, h), _NO_TOTALS)
    marks = np.zeros(rows, np.uint8) if entry.marks else None
    reads_, columns_, writes_ = reads, columns, (y, h)
    if entry.halves:
        if n < NARROW_ROW and entry.has_narrow:
            other = kernel.NARROW, *key
            entry = kernel.entries.get(other) or kernel.entry(other, operation, reads, columns, (y, h), _NO_TOTALS)
        reads_, writes_ = (kernel.stored(x), kernel.stored(residual)), (kernel.stored(y), kernel.stored(h))
        columns_ = kernel.stored(weight), kernel.stored(bias), offset
    args = reads_, columns_, writes_, None if whole else k, eps, streaming, marks
    if on_threads == 1:
        marked = entry.code(*args, 1)
    else:
        marked, _ = pace.run(entry, args, x.size, on_threads)
    if marked:
        call = rare.Call(operation, operation.Reads(x if h is None else h), Columns(*columns), k, eps, marks)
        with rare.standard_here():
            rare.forward(_forward_unmarked, call, y)
    return y, h


def _forward_unmarked(call: rare.Call, out: Any) -> Any:
    wide = call.reads[0].itemsize == 2
    return forward(call.operation, call.reads, call.columns, (out, None), call.k, call.eps, wide)[0]


def backward(
    operation: Operation, reads: Any, columns: Any, out: Any, k: int, eps: Any, totals: Any = None, wide: bool = False
) -> tuple[Any, Any]:
    """Run an operation that adds up shares over rows; returns its outputs and these sums. Arguments as in `forward`.

    Output j has the dtype of array j, where it is to be made. totals: what to add the shares up in; None for arrays
    like weight and bias.
    """
    x, offset = reads[0], columns[-1]
    rows, n = (x.shape[0] * x.shape[2] if x.ndim == 3 else len(x)), x.shape[1]
    for j, a in enumerate(out):
        if a is None:
            out = *out[:j], memory.empty(x.shape, reads[j].dtype, *reads, *out, results=len(out)), *out[j + 1 :]
    like_weight, like_bias = likes = shared(operation, columns)
    if totals is None:
        dweight = None if like_weight is None else memory.empty(like_weight.shape, like_weight.dtype)
        dbias = None if like_bias is None else memory.empty(like_bias.shape, like_bias.dtype)
    else:
        dweight, dbias = totals
    totals = dweight, dbias
    if rows == 0:
        for total in totals:
            if total is not None:
                total[...] = 0
        return out, totals
    m = 1
    for a in columns[:-1]:
        if a is not None and len(a) > m:
            m = len(a)
    long = n > long_rows.LONG_ROW
    way = kernel.APART if x.ndim == 3 else kernel.LONG_ROWS if long else kernel.ROWS
    partials: tuple[Any, Any] = _NO_TOTALS
    sums: tuple[Any, ...] = totals
    chunks = 1
    if long:
        sums = tuple(t if t is None or len(t) == m else np.empty((m, n)) for t in totals)
    else:
        chunks = min(CHUNKS // m or 1, rows // m // ROWS_PER_CHUNK or 1)
        room = chunks * m * n + LINE // 8  # the kernel begins at the first cache line
        partials = None if dweight is None else np.empty(room), None if dbias is None else np.empty(room)
    own = (columns[0], None, offset) if operation.unused else columns  # but the bias, which is like its sum
    # no dtypes of out: they are those of what is read
    key = (
        operation.name, *[a if a is None else a.dtype for a in (*reads, *own[:-1], *sums)], k == n, offset != 0.0, way,
        type(eps), wide,
    )  # fmt: skip
    entry = kernel.entries.get(key)
    if entry is None:
        entry = kernel.entry(key, operation, reads, own, out, sums)
    marks = np.zeros(rows, np.uint8) if entry.marks else None
    arrays: Any = reads, own, out, partials, sums
    if entry.halves:
        stored = (
            tuple(map(kernel.stored, reads)),
            (*map(kernel.stored, own[:-1]), offset),
            tuple(map(kernel.stored, out)),
        )
        arrays = *stored, partials, tuple(map(kernel.stored, sums))
    settings = None if k == n else k, eps, memory.streams(*out), m, chunks
    on_threads = threads.choose(x.size)
    if on_threads == 1:
        marked = entry.code(*arrays, settings, marks, 1)
    else:
        marked, on_threads = pace.run(entry, (*arrays, settings, marks), x.size, on_threads)
    if marked:
        if long and any(t is not None for t in sums):  # as rows were marked, they are not added up yet
            sums = tuple(None if t is None else np.empty((m, n)) for t in totals)
            again = "again", *key
            entry = kernel.entries.get(again) or kernel.entry(again, operation, reads, own, out, sums)
            entry.code(*arrays[:4], sums, settings, marks, on_threads)
        call = rare.Call(operation, operation.Reads(*reads), operation.Columns(*columns), k, eps, marks)
        with rare.standard_here():
            shares = rare.backward(_backward_unmarked, call, out, likes, m)
        if not long:
            sums = tuple(t if t is None else memory.from_line(t, (chunks * m, n)) for t in partials)
        sums = tuple(t if t is None else np.concatenate(parts) for t, *parts in zip(totals, sums, shares, strict=True))
    elif not long:
        return out, totals
    for total, rows_of_sums in zip(totals, sums, strict=True):
        if total is not None and total is not rows_of_sums:
            kernel.add_rows(rows_of_sums, kernel.stored(total), total.dtype.name, on_threads)
    return out, totals


def _backward_unmarked(call: rare.Call, with_totals: bool) -> tuple[Any, Any]:
    n, wide = call.reads[0].shape[1], call.reads[0].itemsize == 2
    operation = call.operation
    likes = call.columns.weight, getattr(call.columns, "bias", None)
    totals = tuple(np.empty((1, n)) if with_totals and a is not None else None for a in likes)
    nothing = (None,) * len(operation.Writes._fields)
    return backward(operation, call.reads, call.columns, nothing, call.k, call.eps, totals, wide)


def warmup(
    dtypes: Sequence[str] = ("float32", "float64", "float16", "bfloat16"), report: Callable[[str], None] | None = None
) -> None:
    """Compile the kernels of all norms and gradients before they are called, and keep them if a folder is writable.

    These are the kernels for rows of any length and number, without a residual, where weight and bias have the dtype
    of x or are absent, `dy` has it too, and `weight_offset` is 0. Other combinations compile at their first call, as do
    a weight and a bias for different axes with rows longer than 65,536.

    Parameters
    ----------
    dtypes : sequence of str
        Names of the dtypes of x.
    report : callable, optional
        Is told the name of each step before it begins.
    """
    for name in dtypes:
        if name == "bfloat16":
            import ml_dtypes

            dtype = np.dtype(ml_dtypes.bfloat16)
        else:
            dtype = np.dtype(name)
        shapes = [(2, 16), (2, 64), (1, long_rows.LONG_ROW + 1)]
        for parameters in (("weight",), (), ("weight", "bias")):
            if report is not None:
                report(f"{name}, {' and '.join(parameters) or 'x alone'}")
            for rows, n in shapes:
                x = np.ones((rows, n), dtype)
                x[-1] = np.inf  # for the kernels of `rare`
                weight, bias = (np.ones((1, n), dtype) if p in parameters else None for p in ("weight", "bias"))
                columns = weight, bias, 0.0
                for operation in ops.FORWARD:
                    forward(operation, (x, None), columns, (None, None), n, 1e-6)
                for operation in ops.BACKWARD:
                    backward(operation, (x, x, None), columns, (None,), n, 1e-6)


def describe() -> dict[str, Any]:
    """What the engine runs on: versions, processor, vectors, threads, threading layer, folder of compiled kernels."""
    import llvmlite
    import llvmlite.binding as llvm
    import numba

    return {
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "cpu": numba.config.CPU_NAME or llvm.get_host_cpu_name(),
        "features": sorted(name for name, present in llvm.get_host_cpu_features().items() if present),
        "vector_bits": _vector_bits(),
        "threads": get_num_threads(),
        "threading_layer": threads.layer(),
        "cache": None if cache.folder() is None else str(cache.folder()),
        "recycled_memory_limit": memory.limit(),
    }


def _vector_bits() -> int | None:
    """Bits of the vectors that LLVM uses for this processor: an addition of 512 bits is how many instructions?

    None for a processor whose instruction for it is not known here.
    """
    import re

    import llvmlite.binding as llvm
    from numba.core.registry import cpu_target

    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    add = llvm.parse_assembly("""
        define void @add(ptr %x, ptr %y) {
            %a = load <16 x float>, ptr %x
            %b = load <16 x float>, ptr %y
            %sum = fadd <16 x float> %a, %b
            store <16 x float> %sum, ptr %x
            ret void
        }""")
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    instructions = re.findall(r"^\s*(?:v?addps|fadd)\s", machine.emit_assembly(add), re.MULTILINE)
    return 512 // len(instructions) if instructions else None
