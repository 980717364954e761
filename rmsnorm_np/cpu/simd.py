"""Vectors of LANES numbers, so that a row kernel reads like the formula it computes.

A kernel says ``v = load(x, i)`` and then ``v * rstd * load(weight, i, v)``. Each function below is plain Python on
NumPy arrays: that text says what it means, and it is what runs under ``NUMBA_DISABLE_JIT=1``. How it compiles to
vector instructions is in :mod:`rmsnorm_np.cpu.lowering`.

What the lanes hold depends on what was loaded, so that one kernel text serves every dtype:

========  ===============================  ==========================================================
kind      loaded from                      arithmetic
========  ===============================  ==========================================================
single    float16, bfloat16                float32, where the caller says that is enough
double    float32; half types otherwise    float64: the product of two such numbers is exact
exact     float64                          float64 whose products and sums keep their rounding error
pair      (results of ``exact``)           the unevaluated sum of two float64, about 106 bits
========  ===============================  ==========================================================

Twice as many bfloat16 fill a vector as 32-bit words do, so 16 of them are read at once: a word shifted to the left is
the element in its lower half, a word with its lower half cleared the other, and no element has to change its place.
So `single` lanes of bfloat16 hold the elements with even numbers and then those with odd ones, whatever is to meet
them is loaded in the same order, and `store` undoes it: forward takes 11 operations for eight elements in place of 17.

LANES is the same on every machine, LLVM cuts the vectors to what the processor has, and nothing is reordered. Forward,
multiply-add is used only where the product is exact anyway, so the bits are the same with SSE2, AVX-512 or NEON.
Backward uses it where it saves an instruction (`add_product`, and the formulas that are `contracted`): there a
processor without it may round the last bit of an inner result otherwise, within the same bounds.

Numba's CPU target has no 16-bit floats: such arrays arrive as their stored bits, uint16 for float16 and int16 for
bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 8  # of float64: one AVX-512 register, two AVX2 registers. A kernel holds up to seven such vectors
SEGMENT = 2048  # elements summed in the lanes before the lanes are added up: bounds the error of float32 sums

BLOCK = 64  # rows that are worked on together, at most

Lanes = Any  # compiled: a vector type of its own; in plain Python: an array of float32, float64 or longdouble

float32 = np.float32  # "halves may be computed in float32"
float64 = np.float64  # "halves are computed in float64"


def data(array: NDArray[Any] | None) -> Any:
    """The array as a pointer to its first element, None for None. Pointers count no references: passing an array
    to a function costs two atomic additions, on one cache line for all threads (measured: 6 times slower at n = 64).
    """
    return None if array is None else array.reshape(-1)


def hold(array: NDArray[Any]) -> None:
    """Keep the memory of an array that a kernel made for itself until here, where its pointers were used last. Compiled
    code gives it back after the last line that names the array, and a pointer does not.
    """


def keeps_errors(source: Any) -> bool:
    """Whether numbers from here are `exact`, and their sums pairs."""
    return bool(source.dtype == np.float64)


def width(source: Any, work: Any) -> int:
    """How many elements ``load(source, ..., work)`` takes: LANES, and twice as many of bfloat16 for float32."""
    if isinstance(work, np.ndarray):
        return len(work)
    return 2 * LANES if source.dtype == np.int16 and work is float32 else LANES


def load(source: Any, start: int, work: Any, count: int | None = None) -> Lanes:
    """Elements ``start`` to ``start + count`` (all by default), and zeros in the lanes behind.

    ``work`` is the precision for half types, `float32` or `float64`; or it is lanes, whose kind is matched. From None
    comes None.
    """
    if source is None:
        return None
    lanes = zeros(source, work)
    count = len(lanes) if count is None else count
    stored = source[start : start + count]
    if source.dtype == np.uint16:
        stored = stored.view(np.float16)
    elif source.dtype == np.int16:
        stored = (stored.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    lanes[:count] = stored
    return lanes if len(lanes) == LANES else np.concatenate((lanes[0::2], lanes[1::2]))


def zeros(source: Any, work: Any) -> Lanes:
    """Zeros of the kind that sums of ``load(source, ...)`` have."""
    return np.zeros(width(source, work), _working_dtype(source.dtype, work))


def store(target: Any, start: int, lanes: Lanes, count: int | None = None) -> None:
    """Round each of the first ``count`` lanes once to the target's dtype and write them from ``start`` on."""
    count = len(lanes) if count is None else count
    if len(lanes) > LANES:
        lanes = lanes.reshape(2, -1).T.ravel()
    if target.dtype == np.uint16:
        stored = lanes.astype(np.float32).astype(np.float16).view(np.uint16)
    elif target.dtype == np.int16:
        bits = lanes.astype(np.float32).view(np.uint32)
        even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # round half to even
        quiet = bits | np.uint32(0x400000)
        stored = (np.where(np.isnan(lanes), quiet, even) >> np.uint32(16)).astype(np.uint16).view(np.int16)
    else:
        stored = lanes.astype(target.dtype)
    target[start : start + count] = stored[:count]


def stream(target: Any, start: int, lanes: Lanes) -> None:
    """`store` past the cache: the line is not read first. ``target[start]`` must be aligned to the bytes written."""
    store(target, start, lanes)


def prefetch(source: Any, start: int) -> None:
    """Ask for the cache line of element ``start``, into the first-level cache; harmless where there is none."""


def prefetch_second(source: Any, start: int) -> None:
    """`prefetch` into the second-level cache, for more than the first holds."""


def until_aligned(target: Any, start: int, count: int) -> int:
    """How many elements lie between ``start`` and the next address to which `stream` can write ``count`` elements."""
    return int(-(target.ctypes.data + start * target.itemsize) % (count * target.itemsize)) // int(target.itemsize)


def add_atomically(numbers: Any, i: int, number: int) -> int:
    """Add to the int64 in place ``i`` while no other thread does; returns what it was before."""
    before = int(numbers[i])
    numbers[i] += number
    return before


def plus(lanes: Any, other: Any) -> Any:
    """``lanes + other``; ``lanes`` where one of them is None."""
    return lanes if lanes is None or other is None else lanes + other


def times(lanes: Lanes, other: Any) -> Lanes:
    """``lanes * other``, or ``lanes`` where that is None."""
    return lanes if other is None else lanes * other


def rounded_product(lanes: Lanes, other: Any) -> Lanes:
    """`times`, where nothing is to be computed from the product: for `exact` and `pair` it is plain float64."""
    product = times(lanes, other)
    return product if other is None else product.astype(min(product.dtype, np.dtype(np.float64)))


def first_lanes(lanes: Lanes, count: int | None) -> Lanes:
    """The first ``count`` lanes, and zeros in the lanes behind; all lanes for None."""
    return lanes if count is None else np.where(np.arange(LANES) < count, lanes, lanes.dtype.type(0))


def joined(first: Lanes, rest: Lanes, count: int | None) -> Lanes:
    """The first ``count`` lanes of ``first`` (None: all), and those of ``rest`` behind."""
    return first if count is None else np.where(np.arange(LANES) < count, first, rest)


def add_exact_square(total: Lanes, lanes: Lanes) -> Lanes:
    """``total + lanes * lanes``; the square is exact for every kind, so fusing it changes no bit."""
    return total + lanes * lanes


def add_square(total: Lanes, lanes: Lanes) -> Lanes:
    """``total + lanes * lanes``, where the square need not be exact: it is never fused."""
    return total + lanes * lanes


def add_product(total: Lanes, a: Lanes, b: Lanes) -> Lanes:
    """``total + a * b`` with one rounding where the processor has fused multiply-add, with two where it has not.

    The total of lanes that are `double` stays so, whatever the factors are.
    """
    return (total + a * b).astype(total.dtype)


def across(lanes: Lanes) -> Any:
    """The sum over the lanes, by halves: 8 to 4 to 2 to 1. A float64; for `exact` and `pair` a pair."""
    lanes = lanes.astype(np.result_type(lanes.dtype, np.float64))
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def rounded(number: Any) -> Any:
    """Lanes, or a number from `across`, as plain float64."""
    return np.asarray(number).astype(np.float64)[()]


def scratch() -> Any:
    """Room on the stack for 2 * BLOCK numbers, for `keep` and `kept`; elsewhere: two float64 for each number."""
    return np.empty(4 * BLOCK)


def counters(count: int) -> Any:
    """Room on the stack for so many int64, all zero. Stack that a loop asks for is not given back before the end."""
    return np.zeros(count, np.int64)


def keep(room: Any, j: int, number: Any) -> None:
    """Put a number from `across`, or one computed from it, in place ``j``; a pair takes two float64."""
    if isinstance(number, np.longdouble):
        room[2 * j] = np.float64(number)
        room[2 * j + 1] = np.float64(number - room[2 * j]) if np.isfinite(number) else 0.0
    else:
        room[j] = number


def kept(room: Any, j: int, source: Any) -> Any:
    """The number in place ``j``, of the kind that sums of ``load(source, ...)`` have."""
    return np.longdouble(room[2 * j]) + room[2 * j + 1] if source.dtype == np.float64 else room[j]


def _working_dtype(stored: np.dtype[Any], work: Any) -> Any:
    if isinstance(work, np.ndarray):
        if work.dtype == np.float32 and stored == np.float64:
            return np.float64
        return work.dtype
    if stored == np.float64:
        return np.longdouble
    return np.float64 if stored == np.float32 else work
