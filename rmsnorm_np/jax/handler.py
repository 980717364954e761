"""What XLA calls: a function of C's kind, which finds the arrays of a call in memory and hands them to a kernel.

XLA's foreign function interface describes a call by records of pointers (``xla/ffi/api/c_api.h``, version 0). Arguments
and results become ndarrays of that memory, so nothing is copied. Python's lock is held but while a kernel runs.
"""

from __future__ import annotations

import ctypes  # noqa: TID251 (the address of a function for XLA, and what XLA calls it with; no input becomes code)
import math
from typing import Any

import jax
import ml_dtypes
import numpy as np

from rmsnorm_np.jax.calls import call_of, function_of, is_column

TARGET = "rmsnorm_np"
_DTYPES = {
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    12: np.dtype(np.float64),
    16: np.dtype(ml_dtypes.bfloat16),
}
_METADATA, _INTERNAL = 1, 13  # a kind of extension, and a kind of error
_POINTER, _SIZE, _INT64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
_HEAD: list[tuple[str, Any]] = [("struct_size", _SIZE), ("extension", _POINTER)]


class _Buffer(ctypes.Structure):
    _fields_ = [*_HEAD, ("dtype", ctypes.c_int), ("data", _POINTER), ("rank", _INT64), ("dims", ctypes.POINTER(_INT64))]


class _Buffers(ctypes.Structure):
    _fields_ = [
        *_HEAD, ("size", _INT64), ("types", _POINTER), ("items", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    ]  # fmt: skip


class _Text(ctypes.Structure):
    _fields_ = [("start", _POINTER), ("length", _SIZE)]


class _Attributes(ctypes.Structure):
    _fields_ = [
        *_HEAD, ("size", _INT64), ("types", _POINTER), ("names", _POINTER),
        ("items", ctypes.POINTER(ctypes.POINTER(_Text))),
    ]  # fmt: skip


class _Version(ctypes.Structure):
    _fields_ = [*_HEAD, ("major", ctypes.c_int), ("minor", ctypes.c_int)]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", _SIZE), ("version", _Version), ("traits", ctypes.c_uint32)]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("struct_size", _SIZE), ("kind", ctypes.c_int), ("next", _POINTER), ("metadata", ctypes.POINTER(_Metadata)),
    ]  # fmt: skip


class _Error(ctypes.Structure):
    _fields_ = [*_HEAD, ("message", ctypes.c_char_p), ("code", ctypes.c_int)]


class _Api(ctypes.Structure):
    _fields_ = [
        *_HEAD, ("version", _Version), ("internal", _POINTER),
        ("new_error", ctypes.CFUNCTYPE(_POINTER, ctypes.POINTER(_Error))),
    ]  # fmt: skip


class _Frame(ctypes.Structure):
    _fields_ = [
        ("struct_size", _SIZE), ("extension", ctypes.POINTER(_Extension)), ("api", ctypes.POINTER(_Api)),
        ("context", _POINTER), ("stage", ctypes.c_int), ("args", _Buffers), ("results", _Buffers),
        ("attributes", _Attributes),
    ]  # fmt: skip


_known: dict[bytes, Any] = {}  # of each text of a call: the names of its arrays and results, and what computes it


def _handle(pointer: Any) -> Any:
    """Run a call; gives an error of XLA's, or None."""
    frame = pointer.contents
    try:
        if frame.extension and frame.extension.contents.kind == _METADATA:  # the compiler asks this
            version = frame.extension.contents.metadata.contents.version
            version.major, version.minor = 0, frame.api.contents.version.minor
            return None
        attribute = frame.attributes.items[0].contents
        text = ctypes.string_at(attribute.start, attribute.length)
        if text not in _known:
            call = call_of(text)
            _known[text] = call.given, call.results(), function_of(call)
        given, results, compute = _known[text]
        n = frame.args.items[0].contents
        n = n.dims[n.rank - 1]
        compute(_arrays(frame.args, given, n), _arrays(frame.results, results, n))
    except BaseException as error:  # noqa: BLE001 (it must not get into C, where it would be lost)
        message = f"{type(error).__name__}: {error}".encode()
        return frame.api.contents.new_error(_Error(ctypes.sizeof(_Error), None, message, _INTERNAL))
    return None


def _arrays(buffers: Any, names: tuple[str, ...], n: int) -> dict[str, Any]:
    arrays = {}
    for i, name in enumerate(names):
        buffer = buffers.items[i].contents
        shape, dtype = buffer.dims[: buffer.rank], _DTYPES[buffer.dtype]
        size = math.prod(shape)
        if size == n and is_column(name):
            shape = [n]  # (1, …, 1, n): the engine is quicker with (n,)
        memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(buffer.data)
        arrays[name] = np.ndarray(shape, dtype, memory)
    return arrays


handler = ctypes.CFUNCTYPE(_POINTER, ctypes.POINTER(_Frame))(_handle)
jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")
