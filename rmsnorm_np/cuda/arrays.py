"""Device arrays of any library: where they are, the stream that a call on them runs on, and memory for new ones."""

from __future__ import annotations

import contextlib
import math
import threading
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
from numba import cuda

from rmsnorm_np.cuda.words import EIGHT_BITS, STORED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rmsnorm_np.cuda.kernel import Capability

_stream: ContextVar[int | None] = ContextVar("stream", default=None)


class Seen(NamedTuple):
    """A device array as its library describes it, or a part of one."""

    address: int  # of the first element
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: np.dtype[Any]
    stream: int  # the one its library works on, 0 for none
    read_only: bool
    owner: Any  # keeps the memory


@contextlib.contextmanager
def use_stream(stream: Any) -> Iterator[None]:
    """Within this context, calls of the CUDA engine run on `stream`; they return before the work is done.

    Without it a call runs on the stream that x names in its ``__cuda_array_interface__``, or on Numba's default
    stream. In both cases it waits, on the device, for what the streams of its other arguments have been given to do.

    Parameters
    ----------
    stream : numba.cuda stream or int
        A stream of Numba, or the address of another library's (``torch.cuda.Stream.cuda_stream``,
        ``cupy.cuda.Stream.ptr``).
    """
    token = _stream.set(int(stream))
    try:
        yield
    finally:
        _stream.reset(token)


def stream_for(arrays: tuple[Seen | None, ...]) -> int:
    """The stream that a call with these arguments runs on, made to wait for those of the arguments."""
    addresses = [array.stream for array in arrays if array is not None and array.stream]
    chosen = _stream.get()
    if chosen is None:
        if not addresses:
            return 0
        chosen = addresses[0]
    for address in dict.fromkeys(addresses):
        wait_for(address, chosen)
    return chosen


def wait_for(address: int, stream: int) -> None:
    """Lets a stream wait, on the device, for what another one has been given to do."""
    if address != stream:
        event = cuda.event(timing=False)
        event.record(_numba_stream(address))
        event.wait(_numba_stream(stream))


def _numba_stream(address: int) -> Any:
    return cuda.external_stream(address) if address else cuda.default_stream()


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {np.dtype(name): np.dtype(name) for name in STORED if name != "bfloat16"} | {_BFLOAT16: _BFLOAT16}
# The interface has no name for bfloat16; libraries pass it as two bytes.
_TYPESTRS = {dtype.str: dtype for dtype in _DTYPES if dtype != _BFLOAT16} | {"<V2": _BFLOAT16, "|V2": _BFLOAT16}
# What an array to write 8 bits to may be of. The interface has no name for float8 either: ml_dtypes has some, and other
# libraries pass the bytes.
_ANY_BYTE = "<V1", "|V1", "<f1", "|f1", "|u1", "uint8"
_BYTES = {"int8": ("|i1", "int8"), **{name: (*_ANY_BYTE, name) for name in EIGHT_BITS if name != "int8"}}


def seen(name: str, value: Any, eight_bits: np.dtype[Any] | None = None) -> Seen:
    """What `value` is, by its ``__cuda_array_interface__``; `name` is for errors.

    eight_bits: a dtype that the array may have, too; of a float8, the bytes of an array of uint8 are taken for it.

    Raises
    ------
    TypeError
        If the value is no device array, or of a dtype that the engine does not know.
    """
    if getattr(value, "__cuda_ndarray__", False):  # Numba's own, past the interface: that takes 5 times as long
        dtype = _DTYPES.get(value.dtype) or _as_bytes(value.dtype.name, eight_bits)
        if dtype is None:
            raise _wrong_dtype(name, value.dtype, eight_bits)
        address = value.device_ctypes_pointer.value or 0
        return Seen(address, value.shape, value.strides, dtype, int(value.stream), False, value)
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        if hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] == _DLPACK_CUDA:
            raise TypeError(
                f"{name} ({type(value).__name__}) lies on a GPU, but has no __cuda_array_interface__ (JAX gives none "
                "to bfloat16): hand it over by a library whose arrays have one, for instance torch.from_dlpack(...)"
            )
        raise TypeError(
            f"{name} is a host array ({type(value).__name__}), expected a device array like x, "
            "such as numba.cuda.to_device(...)"
        )
    dtype = _TYPESTRS.get(interface["typestr"]) or _as_bytes(interface["typestr"], eight_bits)
    if dtype is None:
        raise _wrong_dtype(name, np.dtype(interface["typestr"]), eight_bits)
    if interface.get("mask") is not None:
        raise TypeError(f"{name} has a mask, expected a device array without one")
    shape, strides, (address, read_only) = tuple(interface["shape"]), interface.get("strides"), interface["data"]
    strides = _contiguous_strides(shape, dtype.itemsize) if strides is None else tuple(strides)
    return Seen(address, shape, strides, dtype, interface.get("stream") or 0, read_only, value)


_DLPACK_CUDA = 2


def _as_bytes(found: str, eight_bits: np.dtype[Any] | None) -> np.dtype[Any] | None:
    """The dtype of 8 bits that is wanted, if an array of what was found may be of it."""
    return eight_bits if eight_bits is not None and found in _BYTES[eight_bits.name] else None


def _wrong_dtype(name: str, dtype: Any, eight_bits: np.dtype[Any] | None) -> TypeError:
    if eight_bits is not None:
        return TypeError(f"{name} has dtype {dtype}, expected {eight_bits}, the dtype of the result")
    return TypeError(f"{name} has dtype {dtype}, expected float16, bfloat16, float32 or float64 on a device")


def viewed(array: Any, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Another look at the memory of an array of Numba, from its first element."""
    from numba.cuda.cudadrv.devicearray import DeviceNDArray

    return DeviceNDArray(shape=shape, strides=strides, dtype=dtype, stream=array.stream, gpu_data=array.gpu_data)


def shaped_like(array: Any, other: Seen | None) -> Any:
    """An array of Numba in the shape that the owner of `other` has; None where one of them is."""
    if array is None or other is None:
        return None
    shape = tuple(other.owner.shape)
    return viewed(array, shape, _contiguous_strides(shape, array.dtype.itemsize), array.dtype)


@lru_cache(maxsize=1024)
def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) * itemsize for i in range(len(shape)))


def is_contiguous(array: Seen) -> bool:
    """Whether it is in C order, without gaps."""
    expected = _contiguous_strides(array.shape, array.dtype.itemsize)
    return array.strides == expected or all(
        stride == wanted for size, stride, wanted in zip(array.shape, array.strides, expected, strict=True) if size != 1
    )


def _bounds(array: Seen) -> tuple[int, int]:
    """First byte of the array's memory, and the one behind the last."""
    if is_contiguous(array):
        return array.address, array.address + math.prod(array.shape) * array.dtype.itemsize
    spans = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    first = array.address + sum(min(0, s) for s in spans)
    return first, array.address + sum(max(0, s) for s in spans) + array.dtype.itemsize


def overlaps(a: Seen, b: Seen) -> bool:
    """Whether the memory that the two arrays span has a byte in common."""
    if 0 in a.shape or 0 in b.shape:
        return False
    (a_first, a_stop), (b_first, b_stop) = _bounds(a), _bounds(b)
    return a_first < b_stop and b_first < a_stop


def to_device(array: np.ndarray[Any, Any]) -> Any:
    """A copy of a host array as a device array of Numba. `numba.cuda.to_device` does not take bfloat16.

    Parameters
    ----------
    array : numpy.ndarray
        Of any shape; float16, bfloat16 (of ml_dtypes), float32 or float64.

    Returns
    -------
    numba.cuda device array
        Of the same shape and dtype, in C order. Its ``copy_to_host()`` gives the array back.
    """
    array = np.ascontiguousarray(array)
    bits = cuda.to_device(array.view(STORED[array.dtype.name]))
    return viewed(bits, array.shape, bits.strides, array.dtype)


def empty(shape: tuple[int, ...], dtype: Any, stream: int) -> Any:
    """A new device array of Numba."""
    return cuda.device_array(shape, dtype, stream=_numba_stream(stream) if stream else 0)


def capability_here() -> Capability:
    """The compute capability of the current GPU, which is made current for this thread if none is."""
    capability: Capability = cuda.current_context().device.compute_capability
    return capability


class _Scratch(threading.local):
    """Memory that the thread's last call left behind."""

    place: Any = None  # the context and the stream it is for: work on one stream is done in order
    array: Any = None


_scratch = _Scratch()
_ALIGNMENT = 256
_KEPT = 64 * 2**20  # bytes at most that stay allocated; for more, time to allocate is little against that to compute


def scratch(sizes: tuple[int, ...], stream: int) -> list[int]:
    """Addresses of so many bytes each, this thread's until `leave_scratch`: to allocate takes longer than to launch."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size + -size % _ALIGNMENT)
    place = (cuda.current_context(), stream)
    if _scratch.array is None or _scratch.place != place or _scratch.array.size < ends[-1]:
        _scratch.place, _scratch.array = place, empty((ends[-1],), np.dtype(np.uint8), stream)
    first = _scratch.array.device_ctypes_pointer.value
    return [first + end for end in ends[:-1]]


def leave_scratch() -> None:
    """All that works there has been launched: what is too large to keep is given back."""
    if _scratch.array is not None and _scratch.array.size > _KEPT:
        _scratch.array = None
