"""Rows that are cut over workers: what this worker's part of each adds up to goes out, what all parts do comes back.

In place of the pieces of a row that one worker has, all workers' parts are summed, by a function of the caller's. Of
each row it is given one row of float64: the number of elements, and the sums of a stage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from rmsnorm_np.cuda import arrays, schedule
from rmsnorm_np.cuda.arguments import rows_in
from rmsnorm_np.cuda.arrays import Seen
from rmsnorm_np.cuda.elements import Size
from rmsnorm_np.cuda.kernel import Kernel, array_of
from rmsnorm_np.cuda.launch import Plan
from rmsnorm_np.cuda.number import DOUBLE, Number
from rmsnorm_np.cuda.row import Program
from rmsnorm_np.cuda.team import put, total_of
from rmsnorm_np.cuda.tracing import step
from rmsnorm_np.ops.primitives import Pair, either, is_finite, is_pair
from rmsnorm_np.ops.records import given

# Of a pair the first 12 bits go out alone, so that their sum over workers is exact as long as one is not more than
# 2**36 times as large as another; the rest has as many bits as a float64 again.
_SPLIT = 2.0**41 + 1


def apart(a: Any) -> Any:
    """A pair whose head has 12 bits; a number as it is."""
    if not is_pair(a):
        return a
    wide = a.head.product(_SPLIT)
    head = wide - (wide - a.head)
    fine = is_finite(head)
    return Pair(either(fine, head, a.head), either(fine, (a.head - head) + a.tail, a.tail.constant(0.0)))


@lru_cache
def sums_kernel(plan: Plan, s: int) -> Kernel:
    """kernel(kept, sent, n): block `row` adds up what the pieces of that row have left of stage s."""
    program = Program(plan)
    add, total = schedule.pieces_adder(program, s), total_of(plan.team, program.sums[s], program.join(s))

    def body(b: Any, sent: Any, row: Any, n: Any, sums: Any) -> None:
        put(b, sent, row, (Number(b, b.sitofp(n, DOUBLE)), given(sums, apart)))

    leave = step(body)

    def row_sums(kept: Any, sent: Any, n: Any) -> None:
        row = np.int64(cuda.blockIdx.x)
        sums = total(add(kept, row, n))
        if cuda.threadIdx.x == 0:
            leave((sent, row, n, sums))

    return Kernel(row_sums, plan.capability, plan.block, 0, (array_of(4), array_of(4), types.int64))


def sums_of_all(plan: Plan, size: Size, addresses: list[int], stream: int, reduce: Callable[[Any], Any]) -> list[Seen]:
    """What the sums of each stage come to over all workers, as the later kernels read it."""
    widths = schedule.widths(plan)
    pieces, common = -(-size.n // plan.length), [*addresses, *[0] * len(plan.kinds.totals), 0, *size]
    found: list[Seen] = []
    for s, width in enumerate(widths):
        sent = arrays.empty((size.rows, 1 + width // 2), np.dtype(np.float64), stream)
        if size.rows:
            # not the scratch memory: `reduce` may call this engine
            made = arrays.empty((size.rows * pieces * width // 2,), np.dtype(np.float64), stream)
            room, target = (arrays.seen("", a).address for a in (made, sent))
            kept = [*(a.address for a in found), room, *[0] * (len(widths) - 1 - s)]
            schedule.pieces_kernel(plan, s)(size.rows * pieces, stream, *common, *kept)
            sums_kernel(plan, s)(size.rows, stream, room, target, size.n)
        shape = tuple(sent.shape)
        found.append(_checked(reduce(sent), shape, stream))
    return found


def _checked(got: Any, shape: tuple[int, ...], stream: int) -> Seen:
    if not hasattr(got, "__cuda_array_interface__"):
        raise TypeError(f"reduce has returned {type(got).__name__}, expected a device array of float64 {shape}")
    array = arrays.seen("what reduce has returned", got)
    if array.dtype != np.float64:
        raise TypeError(f"reduce has returned an array of dtype {array.dtype}, expected float64")
    if array.shape != shape:
        raise ValueError(f"reduce has returned an array of shape {array.shape}, expected {shape}")
    if array.stream:
        arrays.wait_for(array.stream, stream)
    return rows_in(array, shape, stream)  # type: ignore[arg-type]
