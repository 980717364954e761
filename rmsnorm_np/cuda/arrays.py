"""Device arrays of any library, as the kernels take them: contiguous rows, 16-bit floats by their bits. Nothing here
copies between host and device.
"""

from __future__ import annotations

import contextlib
import math
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cuda

from rmsnorm_np import _arguments
from rmsnorm_np.cuda.vector import BYTES, STORED

if TYPE_CHECKING:
    from collections.abc import Iterator

_stream: ContextVar[Any] = ContextVar("stream", default=None)


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
    token = _stream.set(cuda.external_stream(stream) if isinstance(stream, int) and stream else stream)
    try:
        yield
    finally:
        _stream.reset(token)


def stream_for(values: tuple[Any, ...]) -> Any:
    """The stream that a call with these arguments runs on, made to wait for those of the arguments."""
    addresses = []
    for value in values:
        interface = getattr(value, "__cuda_array_interface__", None)
        if interface is not None and interface.get("stream"):
            addresses.append(int(interface["stream"]))
    chosen = _stream.get()
    if chosen is None:
        chosen = cuda.external_stream(addresses[0]) if addresses else 0
        addresses = [address for address in addresses[1:] if address != addresses[0]]
    for address in dict.fromkeys(addresses):
        event = cuda.event(timing=False)
        event.record(cuda.external_stream(address))
        event.wait(chosen)
    return chosen


def as_device_array(name: str, value: Any) -> Any:
    """The value as a Numba device array of the same memory."""
    if getattr(value, "__cuda_ndarray__", False):
        array = value
    else:
        interface = getattr(value, "__cuda_array_interface__", None)
        if interface is None:
            raise TypeError(
                f"{name} is a host array ({type(value).__name__}), expected a device array like x, "
                "such as numba.cuda.to_device(...)"
            )
        array = cuda.as_cuda_array(value, sync=False)
    dtype = np.dtype(array.dtype)
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        import ml_dtypes  # the interface has no name for bfloat16; libraries pass it as two bytes

        return viewed(array, array.shape, array.strides, np.dtype(ml_dtypes.bfloat16))
    if dtype.name not in STORED or not dtype.isnative:
        raise TypeError(f"{name} has dtype {dtype}, expected float16, bfloat16, float32 or float64 on a device")
    return array


def viewed(array: Any, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Another look at the array's memory, from its first element."""
    from numba.cuda.cudadrv.devicearray import DeviceNDArray

    return DeviceNDArray(shape=shape, strides=strides, dtype=dtype, stream=array.stream, gpu_data=array.gpu_data)


def address(array: Any) -> int:
    """Where the first element lies."""
    pointer: int = array.__cuda_array_interface__["data"][0]
    return pointer


def _is_contiguous(array: Any) -> bool:
    expected = array.dtype.itemsize
    for size, stride in zip(reversed(tuple(array.shape)), reversed(tuple(array.strides)), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) * itemsize for i in range(len(shape)))


def _bounds(array: Any) -> tuple[int, int]:
    """First byte of the array's memory, and the one behind the last."""
    spans = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    start = address(array)
    return start + sum(min(0, s) for s in spans), start + sum(max(0, s) for s in spans) + array.dtype.itemsize


def _overlaps(a: Any, b: Any) -> bool:
    if b is None or 0 in tuple(a.shape) or 0 in tuple(b.shape):
        return False
    (a_first, a_stop), (b_first, b_stop) = _bounds(a), _bounds(b)
    return a_first < b_stop and b_first < a_stop


def empty(shape: tuple[int, ...], dtype: Any, stream: Any) -> Any:
    """A new device array."""
    return cuda.device_array(shape, dtype, stream=stream)


def copy(source: Any, target: Any, stream: Any) -> None:
    """Element by element on the device, between any layouts."""
    bits = np.dtype(STORED[source.dtype.name])
    source, target = (viewed(a, tuple(a.shape), tuple(a.strides), bits) for a in (source, target))
    target.setitem(Ellipsis, source, stream=stream)


def flat(array: Any) -> Any:
    """A contiguous array as the kernels see it."""
    size = math.prod(array.shape)
    return viewed(array, (size,), (array.dtype.itemsize,), np.dtype(STORED[array.dtype.name]))


def are_aligned(n: int, lanes: int, arrays: tuple[Any, ...]) -> bool:
    """Whether every vector of these contiguous arrays, in rows of n, begins at a multiple of its size."""
    return n % lanes == 0 and all(address(a) % BYTES == 0 for a in arrays if a is not None)


def engine_arguments(
    x: Any, dy: Any, weight: Any, bias: Any, eps: Any, p: Any, axis: Any, weight_offset: Any, out: Any
) -> tuple[Any, ...]:
    """As `_arguments.engine_arguments`, for device arrays; all errors but that of the dtype are those of the host."""
    stream = stream_for((x, dy, weight, bias, out))
    x = as_device_array("x", x)
    shape = tuple(x.shape)
    axes = _arguments.axes_of(axis, shape)
    trailing = _arguments.are_trailing(axes, len(shape))
    order = (*(i for i in range(len(shape)) if i not in axes), *axes)
    moved = tuple(shape[i] for i in order)
    n = math.prod(shape[i] for i in axes)
    rows = math.prod(shape) // n
    k = _arguments.elements_in_rms(n, p)
    eps = _arguments.check_eps(eps)
    weight_offset = _arguments.check_weight_offset(weight_offset, weight is not None)

    def permuted(array: Any) -> Any:
        return viewed(array, moved, tuple(array.strides[i] for i in order), array.dtype)

    def rows_of(array: Any, lead: int) -> Any:
        if not _is_contiguous(array):
            source, array = array, empty(tuple(array.shape), array.dtype, stream)
            copy(source, array, stream)
        return viewed(array, (lead, n), (n * array.dtype.itemsize, array.dtype.itemsize), array.dtype)

    def parameter_of(name: str, value: Any) -> Any:
        if value is None:
            return None
        array = as_device_array(name, value)
        return rows_of(array, math.prod(_arguments.parameter_lead(name, tuple(array.shape), shape, axes)))

    x_rows = rows_of(permuted(x), rows)
    if dy is not None:
        dy = as_device_array("dy", dy)
        _arguments.check_dy_shape(tuple(dy.shape), shape)
        dy = rows_of(permuted(dy), rows)
    weight, bias = parameter_of("weight", weight), parameter_of("bias", bias)

    target = direct = None
    if out is not None:
        target = as_device_array("out", out)
        if tuple(target.shape) != shape:
            raise ValueError(f"out has shape {tuple(target.shape)}, expected x.shape {shape}")
        if target.dtype != x.dtype:
            raise TypeError(f"out has dtype {target.dtype}, expected {x.dtype}, the dtype of the result")
        interface = getattr(out, "__cuda_array_interface__", None)
        if interface is not None and interface["data"][1]:
            raise ValueError("out is read-only, expected a writable array")
        same = [a for a in (x_rows, dy) if a is not None and address(a) == address(target) and a.dtype == x.dtype]
        apart = all(a in same or not _overlaps(target, a) for a in (x_rows, dy, weight, bias))
        if trailing and _is_contiguous(target) and apart:
            direct = rows_of(target, rows)

    def restore(result: Any) -> Any:
        if direct is not None:
            return out
        strides = _contiguous_strides(moved, result.dtype.itemsize)
        back = tuple(np.argsort(order))
        result = viewed(result, shape, tuple(strides[i] for i in back), result.dtype)
        if out is None and trailing:
            return result
        answer = empty(shape, result.dtype, stream) if target is None else target
        copy(result, answer, stream)
        return answer if out is None else out

    return x_rows, dy, weight, bias, k, eps, weight_offset, direct, restore


def restore_parameter(gradient: Any, parameter: Any) -> Any:
    """The gradient (m, n) of a weight or bias in the shape of that parameter."""
    if gradient is None:
        return None
    shape = tuple(as_device_array("parameter", parameter).shape)
    return viewed(gradient, shape, _contiguous_strides(shape, gradient.dtype.itemsize), gradient.dtype)
