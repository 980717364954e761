"""How kernels are compiled: every Numba option of the CPU engine is here.

No ``fastmath`` anywhere: kernels spell out their vectors (:mod:`rmsnorm_np.cpu.vector`), so LLVM need not be allowed
to reorder sums, NaN and infinities keep their meaning, and the bits are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba.core import types
from numba.core.registry import CPUDispatcher

from rmsnorm_np.cpu import threads
from rmsnorm_np.cpu.cache import KernelCache

_OPTIONS: dict[str, Any] = {
    "nopython": True,
    "boundscheck": None,
    "error_model": "numpy",  # division by zero gives inf or NaN, as the formula says, and no branch
    "nogil": True,  # other Python threads run meanwhile
    "no_cfunc_wrapper": True,
}


def _jit(function: Callable[..., Any], **options: bool) -> Any:
    """`numba.njit`, but of NUMBA_DISABLE_JIT=1, which is for looking at one's own code: without a compiler there are
    no kernels.
    """
    return CPUDispatcher(function, targetoptions={**_OPTIONS, **options})


def inlined(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that passes lanes: always inlined, so that lanes stay in registers."""
    return _jit(function, no_cpython_wrapper=True, forceinline=True)


def piece(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that passes pointers and numbers. Python must not call it: it would crash.

    It has no entry from Python or C, which spares 2/5 of the time of compiling it.
    """
    return _jit(function, no_cpython_wrapper=True)


def compiled(label: str | None, make: Callable[[], Callable[..., Any]], args: tuple[Any, ...]) -> Callable[..., Any]:
    """The machine code of the function that `make` makes, for arguments of the types of these.

    label: tells kernels apart in the cache on disk; None for one that is not kept there, as its sources lie elsewhere.
    Records among the arguments are typed as such here; the code takes them as plain tuples.
    """
    threads.layer()
    signature = tuple(map(_type_of, args))
    dispatcher = _jit(make())
    if label is not None:
        dispatcher._cache = KernelCache(label)
    code: Callable[..., Any] = dispatcher.compile(signature)
    return code


def _type_of(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return types.NamedTuple([_type_of(item) for item in value], type(value))
    return numba.typeof(value)
