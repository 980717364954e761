"""How kernels are compiled: every Numba option of the CPU engine is here.

No ``fastmath`` anywhere: kernels spell out their vectors (:mod:`rmsnorm_np.cpu.vector`), so LLVM need not be allowed
to reorder sums, NaN and infinities keep their meaning, and the bits are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core import types

from rmsnorm_np.cpu import threads
from rmsnorm_np.cpu.cache import KernelCache

_OPTIONS: dict[str, Any] = {
    "error_model": "numpy",  # division by zero gives inf or NaN, as the formula says, and no branch
    "nogil": True,  # other Python threads run meanwhile
}

# No entry from Python or C for what only kernels call: that spares 2/5 of the time of compiling a kernel. Python must
# not call these functions then; it would crash.
_PIECE: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def inlined(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that passes lanes: always inlined, so that lanes stay in registers."""
    return numba.njit(forceinline=True, **_PIECE)(function)


def piece(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that passes pointers and numbers."""
    return numba.njit(**_PIECE)(function)


def compiled(label: str, make: Callable[[], Callable[..., Any]], args: tuple[Any, ...]) -> Callable[..., Any]:
    """The machine code of the function that `make` makes, for arguments of the types of these.

    label: tells kernels apart in the cache. Records among the arguments are typed as such here; the code takes them as
    plain tuples, which Python makes in a tenth of the time. With NUMBA_DISABLE_JIT=1 it is the function itself.
    """
    if numba.config.DISABLE_JIT:
        return make()
    threads.layer()
    signature = tuple(map(_type_of, args))
    dispatcher = numba.njit(no_cfunc_wrapper=True, **_OPTIONS)(make())
    dispatcher._cache = KernelCache(label)
    code: Callable[..., Any] = dispatcher.compile(signature)
    return code


def _type_of(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return types.NamedTuple([_type_of(item) for item in value], type(value))
    return numba.typeof(value)
