"""The processor's floating-point mode, which belongs to a thread: kernels compute in the standard one and give the
caller's back.

A shared object linked with -ffast-math by older compilers sets flush-to-zero in the thread that loads it: subnormal
numbers become zero there, and not on other threads. Directed rounding would break the two-sums.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import lower_builtin, type_callable

from rmsnorm_np.cpu.llvm import I32, I64, intrinsic

# Bits of the control register that are zero in the standard mode. x86's MXCSR: flush-to-zero, denormals-are-zero and
# two of the rounding direction. ARM's FPCR: FZ, FZ16, RMode, AH and FIZ.
_NONSTANDARD = {I32: 0x8000 | 0x0040 | 0x6000, I64: 1 << 24 | 1 << 19 | 3 << 22 | 3}


def standard_mode() -> int:
    """Set the standard mode in this thread; returns the mode before, for `restore_mode`. For kernels."""
    return 0


def restore_mode(mode: int) -> None:
    """Set a mode that `standard_mode` returned."""


def set_standard(builder: Any) -> Any:
    """LLVM code of `standard_mode`. Where the mode is standard already, it costs some nanoseconds."""
    register = _register_type(builder)
    if register is None:
        return ir.Constant(I64, 0)
    mode = _read(builder, register)
    with cgutils.if_unlikely(builder, _is_nonstandard(builder, mode)):
        _write(builder, builder.and_(mode, ir.Constant(register, ~_NONSTANDARD[register])))
    return builder.zext(mode, I64) if register == I32 else mode


def restore(builder: Any, mode: Any) -> None:
    """LLVM code of `restore_mode`."""
    register = _register_type(builder)
    if register is None:
        return
    mode = builder.trunc(mode, I32) if register == I32 else mode
    with cgutils.if_unlikely(builder, _is_nonstandard(builder, mode)):
        _write(builder, mode)


def _register_type(builder: Any) -> Any:
    """The type of the control register, None for a processor that this file does not know."""
    triple = builder.module.triple
    if triple.startswith("x86_64"):
        return I32
    return I64 if triple.startswith(("aarch64", "arm64")) else None


def _is_nonstandard(builder: Any, mode: Any) -> Any:
    return cgutils.is_not_null(builder, builder.and_(mode, ir.Constant(mode.type, _NONSTANDARD[mode.type])))


def _read(builder: Any, register: Any) -> Any:
    if register == I64:
        return intrinsic(builder, "llvm.aarch64.get.fpcr", I64, [])
    room = cgutils.alloca_once(builder, I32)
    intrinsic(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [builder.bitcast(room, cgutils.voidptr_t)])
    return builder.load(room)


def _write(builder: Any, mode: Any) -> None:
    if mode.type == I64:
        intrinsic(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [mode])
        return
    room = cgutils.alloca_once_value(builder, mode)
    intrinsic(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [builder.bitcast(room, cgutils.voidptr_t)])


@type_callable(standard_mode)
def _type_standard_mode(context: Any) -> Any:
    return lambda: types.int64


@lower_builtin(standard_mode)
def _standard_mode(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return set_standard(builder)


@type_callable(restore_mode)
def _type_restore_mode(context: Any) -> Any:
    return lambda mode: types.none


@lower_builtin(restore_mode, types.Integer)
def _restore_mode(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    restore(builder, args[0])
    return context.get_dummy_value()
