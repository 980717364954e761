"""Copies on the device between arrays of any layout: what is not in contiguous rows is brought there, and back."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cuda
from numba.cuda import types

from rmsnorm_np.cuda.kernel import Capability, Kernel, array_of

if TYPE_CHECKING:
    from rmsnorm_np.cuda.arrays import Seen

BLOCK = 256


@lru_cache
def _copier(capability: Capability, itemsize: int, ndim: int) -> Kernel:
    def copy_kernel(
        source: Any, target: Any, here: Any, there: Any, count: Any, shape: Any, source_steps: Any, target_steps: Any
    ) -> None:
        i = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
        if i < count:
            for d in range(ndim):
                axis = ndim - 1 - d
                index = i % shape[axis]
                i //= shape[axis]
                here += index * source_steps[axis]
                there += index * target_steps[axis]
            target[there] = source[here]

    numbers, steps = types.UniTuple(types.int64, 3), types.UniTuple(types.int64, ndim)
    arguments = (array_of(itemsize), array_of(itemsize), *numbers, steps, steps, steps)
    return Kernel(copy_kernel, capability, BLOCK, 0, arguments)


def copy(source: Seen, target: Seen, capability: Capability, stream: int) -> None:
    """Element by element: both of the same shape and dtype."""
    count, itemsize = math.prod(source.shape), source.dtype.itemsize
    if count:
        (begin, here, steps), (target_begin, there, target_steps) = map(_walk, (source, target))
        run = _copier(capability, itemsize, len(source.shape))
        run(-(-count // BLOCK), stream, begin, target_begin, here, there, count, *source.shape, *steps, *target_steps)


def _walk(array: Seen) -> tuple[int, int, tuple[int, ...]]:
    """Where the array's memory begins, how many elements on its first one is, and the steps along its axes."""
    itemsize = array.dtype.itemsize
    steps = tuple(stride // itemsize for stride in array.strides)
    first = -sum(min(0, (size - 1) * step) for size, step in zip(array.shape, steps, strict=True))
    return array.address - first * itemsize, first, steps
