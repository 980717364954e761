"""How kernels are compiled: every Numba option of the CPU engine is here.

No ``fastmath`` anywhere: kernels spell out their vectors (:mod:`rmsnorm_np.cpu.simd`), so LLVM need not be allowed
to reorder sums, NaN and infinities keep their meaning, and the bits are the same on every machine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numba.extending

from rmsnorm_np.cpu import arithmetic, lowering, threads  # noqa: F401  (registers how simd compiles)
from rmsnorm_np.cpu.cache import cached
from rmsnorm_np.cpu.simd import keeps_errors

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


def contracted(function: Callable[..., Any]) -> Any:
    """As `inlined`, and its one sum of a product is a multiply-add where the processor has that."""
    return numba.njit(forceinline=True, fastmath={"contract"}, **_PIECE)(function)


def piece(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that passes pointers and numbers."""
    return numba.njit(**_PIECE)(function)


def optional(name: str, absent: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """The decorated function where argument `name` is given, and `absent` where it is None.

    The choice is made by type, when the caller is compiled: the other text need not even compile. (Numba's own
    pruning of ``if x is None`` drops a branch where x is None, but keeps both where it is not.)
    """
    return _either(name, absent, lambda value: value is None, lambda type_: isinstance(type_, numba.types.NoneType))


def unless_exact(name: str, exact: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """The decorated function, and `exact` where what is loaded from argument `name` keeps its rounding errors."""
    return _either(name, exact, keeps_errors, lambda type_: type_.dtype == numba.types.float64)


def _either(
    name: str, other: Callable[..., Any], is_other: Callable[[Any], bool], is_type_of_other: Callable[[Any], bool]
) -> Callable[[Callable[..., Any]], Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        position = list(inspect.signature(function).parameters).index(name)

        def either(*args: Any) -> Any:
            return (other if is_other(args[position]) else function)(*args)

        either.__name__, either.__doc__ = function.__name__, function.__doc__

        @numba.extending.overload(either, strict=False, jit_options={"forceinline": True, **_PIECE})
        def choose(*args: Any) -> Any:
            return other if is_type_of_other(args[position]) else function

        return either

    return decorate


class Kernel:
    """A function over all rows, compiled for each combination of argument types, which the caller knows by a key.

    Numba's dispatcher looks at each argument to find its type, which takes as long as the norm of 2000 elements. Here
    the caller vouches for the types: two calls with one key have arguments of the same types.
    """

    def __init__(self, function: Callable[..., bool | None]) -> None:
        self.dispatcher = cached(numba.njit(no_cfunc_wrapper=True, **_OPTIONS)(function))
        self.compiled: dict[Any, Callable[..., bool | None]] = {}

    def compile(self, key: Any, args: tuple[Any, ...]) -> Callable[..., bool | None]:
        """The code for arguments of the types of `args`, which `key` stands for; from then on it is in `compiled`."""
        # with NUMBA_DISABLE_JIT=1 the dispatcher is the plain function
        code: Callable[..., bool | None] = self.dispatcher
        if hasattr(code, "compile"):
            threads.layer()
            code = code.compile(tuple(map(numba.typeof, args)))
        self.compiled[key] = code
        return code
