"""The CPU engine: normalised arguments in, arrays out. Here a call gets its memory, its kernel and its threads.

Read on in `kernels` (how rows are cut into blocks), `blocks` (what happens to one), `rows` and `gradients` (to a row),
`simd` (what a vector is); `extreme` has rows that leave the range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rmsnorm_np import _arguments as arguments
from rmsnorm_np._threads import get_num_threads
from rmsnorm_np.cpu import cache, extreme, kernels, long_rows, memory, threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["arguments", "describe", "layer_backward", "layer_forward", "rms_backward", "rms_forward", "warmup"]

# Numba has no 16-bit floats on CPUs: the kernels see their bits, and tell the two formats apart by these types.
_FLOAT16, _FLOAT16_BITS, _BFLOAT16_BITS = map(np.dtype, (np.float16, np.uint16, np.int16))

_MARK = np.dtype(np.uint8)  # for each row whether it was skipped, for `extreme` to take

CHUNKS = 64  # at most so many partial sums of dweight; tasks enough for 64 threads
SCALED_ROWS = 128  # from so many rows on, a backward pass over halves converts weight once for all of them (1.1 to 1.2
SCALE_BYTES = 1 << 14  # times as fast), if that takes no more than half of a first-level cache
ROWS_PER_CHUNK = 16  # at least: fewer rows, and adding up the partial sums is felt


def rms_forward(x: Any, weight: Any, bias: Any, k: int, eps: float, weight_offset: float, out: Any) -> Any:
    """Y = x · rstd · (weight_offset + weight) + bias for each row of x, see :func:`rmsnorm_np.rms_norm`."""
    return _forward(x, weight, bias, k, eps, weight_offset, out, None)


def layer_forward(x: Any, weight: Any, bias: Any, eps: float, weight_offset: float, out: Any) -> Any:
    """Y = (x - mean) · rstd · (weight_offset + weight) + bias for each row, see :func:`rmsnorm_np.layer_norm`."""
    return _forward(x, weight, bias, x.shape[1], eps, weight_offset, out, 1)


def rms_backward(dy: Any, x: Any, weight: Any, bias: Any, k: int, eps: float, weight_offset: float, out: Any) -> Any:
    """dx, dweight and dbias of `rms_forward`, see :func:`rmsnorm_np.rms_norm_backward`."""
    return _backward(dy, x, weight, bias, k, eps, weight_offset, out, None)


def layer_backward(dy: Any, x: Any, weight: Any, bias: Any, eps: float, weight_offset: float, out: Any) -> Any:
    """dx, dweight and dbias of `layer_forward`, see :func:`rmsnorm_np.layer_norm_backward`."""
    return _backward(dy, x, weight, bias, x.shape[1], eps, weight_offset, out, 1)


def _forward(
    x: Any, weight: Any, bias: Any, k: int, eps: float, weight_offset: float, out: Any, centred: int | None
) -> Any:
    rows, n = x.shape
    if n <= long_rows.LONG_ROW and (rows * n < threads.PARALLEL_ELEMENTS or rows == 1):
        # a small call: the kernel takes about a microsecond, so each question that is not asked here counts
        y = np.empty((rows, n), x.dtype) if out is None else out
        kernel, streaming, on_threads = kernels.forward, 0, 1
    else:
        y = memory.empty((rows, n), x.dtype, x) if out is None else out
        kernel = long_rows.long_forward if n > long_rows.LONG_ROW else kernels.forward
        on_threads = threads.choose(x.size)
        streaming = memory.streams(y)
    key = x.dtype, weight is None or weight.dtype, bias is None or bias.dtype, centred, weight_offset != 0.0
    skipped = None
    x_stored, y_stored = x, y
    if x.itemsize != 4:
        if centred is None or x.itemsize == 8:  # else float64 inside, and no sum leaves its range
            skipped = np.zeros(rows, _MARK)
        x_stored, y_stored = _stored(x), _stored(y)
    weight_m = bias_m = 1
    if weight is not None:
        weight_m = len(weight)
        if weight.itemsize == 2:
            weight = _stored(weight)
    if bias is not None:
        bias_m, bias = len(bias), _stored(bias)
    args = (
        x_stored, weight, bias, k, weight_m, bias_m, weight_offset or None, eps, streaming, centred, skipped,
        on_threads, y_stored,
    )  # fmt: skip
    if (kernel.compiled.get(key) or kernel.compile(key, args))(*args):  # `_run`, without a call of its own
        _run(extreme.forward, key, (*args[:8], centred, skipped, on_threads, y_stored))
    return y


def _backward(
    dy: Any, x: Any, weight: Any, bias: Any, k: int, eps: float, weight_offset: float, out: Any, centred: int | None
) -> Any:
    rows, n = x.shape
    dx = memory.empty(x.shape, x.dtype, x, dy) if out is None else out
    dweight, dbias = (None if a is None else memory.empty(a.shape, a.dtype) for a in (weight, bias))
    if rows == 0:
        for total in (dweight, dbias):
            if total is not None:
                total[...] = 0
        return dx, dweight, dbias
    if weight is not None:
        weight, weight_offset = _scale(x, weight, weight_offset)
    weight_m = 1 if weight is None else len(weight)
    m = max(weight_m, 1 if bias is None else len(bias))
    streaming = memory.streams(dx)
    key: tuple[Any, ...] = (
        dy.dtype, x.dtype, weight is None or weight.dtype, dweight is None or dweight.dtype,
        dbias is None or dbias.dtype, centred, not weight_offset,
    )  # fmt: skip
    before = (_stored(dy), _stored(x), _stored(weight), k, weight_m, m)
    skipped = np.zeros(rows, _MARK) if x.itemsize == 8 else None
    on_threads = threads.choose(x.size)
    numbers = weight_offset or None, eps
    after = (streaming, centred, skipped, on_threads, _stored(dx))
    if n <= long_rows.LONG_ROW:
        sums: list[Any] = [dweight, dbias]
        chunks = min(max(1, CHUNKS // m), max(1, rows // m // ROWS_PER_CHUNK))
        partials = [None if total is None else np.empty((chunks * m, n)) for total in sums]
        some = _run(kernels.backward, key, (*before, chunks, *numbers, *after, *partials, *map(_stored, sums)))
    else:
        # each column is added up over the rows at once; only a parameter with fewer rows than the other needs more
        sums = [None if t is None else t if len(t) == m else np.empty((m, n)) for t in (dweight, dbias)]
        key = (key, *(s is None or s.dtype for s in sums))
        some = _run(long_rows.long_backward, key, (*before, *numbers, *after, *map(_stored, sums)))
        chunks, partials = 1, [None if total is None or not some else np.zeros((m, n)) for total in sums]
    if some:
        marks = skipped, int(n > long_rows.LONG_ROW), on_threads
        args = (*before, chunks, *numbers, centred, *marks, _stored(dx), *partials, *map(_stored, sums))
        _run(extreme.backward, key, args)
    for total, sum_ in zip((dweight, dbias), sums, strict=True):
        if total is not None and total is not sum_:
            _run(kernels.add_rows, total.dtype, (sum_, _stored(total), on_threads))
    return dx, dweight, dbias


def _run(kernel: Any, key: Any, args: tuple[Any, ...]) -> Any:
    return (kernel.compiled.get(key) or kernel.compile(key, args))(*args)


def _scale(x: Any, weight: Any, weight_offset: float) -> tuple[Any, float]:
    """weight_offset + weight in float64, and an offset of zero, where that pays: in a backward pass over many rows of
    halves, each of which would convert it twice.

    Not where it would crowd the row out of the first-level cache. Forward, and in float32, each row does it faster.
    """
    rows, n = x.shape
    if x.itemsize != 2 or rows < SCALED_ROWS or 8 * n > SCALE_BYTES:
        return weight, weight_offset
    with np.errstate(invalid="ignore"):  # a signalling NaN: no more is said of it than of any other
        scale = weight.astype(np.float64)
    if weight_offset != 0.0:  # adding 0.0 would turn -0.0 round
        scale += weight_offset
    return scale, 0.0


def _stored(array: Any) -> Any:
    """The array as the kernels see it."""
    if array is None or array.itemsize > 2:
        return array
    return array.view(_FLOAT16_BITS if array.dtype == _FLOAT16 else _BFLOAT16_BITS)


def warmup(
    dtypes: Sequence[str] = ("float32", "float64", "float16", "bfloat16"), report: Callable[[str], None] | None = None
) -> None:
    """Compile the kernels of all four functions, so that no later call has to, and keep them if a folder is writable.

    These are the kernels for rows of any length and number, where weight and bias have the dtype of x or are absent,
    `dy` has it too, and `weight_offset` is 0. Other combinations compile at their first call, as do a weight and a
    bias for different axes with rows longer than 65,536.

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
        shapes = [(2, 64), (1, long_rows.LONG_ROW + 1)]
        if dtype.itemsize == 2:
            shapes.append((SCALED_ROWS, 64))
        for parameters in (("weight",), (), ("weight", "bias")):
            if report is not None:
                report(f"{name}, {' and '.join(parameters) or 'x alone'}")
            for rows, n in shapes:
                x = np.ones((rows, n), dtype)
                x[-1] = np.nan  # for the kernels of `extreme`
                weight, bias = (np.ones((1, n), dtype) if p in parameters else None for p in ("weight", "bias"))
                rms_forward(x, weight, bias, n, 1e-6, 0.0, None)
                layer_forward(x, weight, bias, 1e-6, 0.0, None)
                rms_backward(x, x, weight, bias, n, 1e-6, 0.0, None)
                layer_backward(x, x, weight, bias, 1e-6, 0.0, None)


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
