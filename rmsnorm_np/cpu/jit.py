"""How kernels are compiled: every Numba option of the CPU engine is here.

No ``fastmath`` anywhere: kernels spell out their vectors (:mod:`rmsnorm_np.cpu.vector`), so LLVM need not be allowed
to reorder sums, NaN and infinities keep their meaning, and the bits are the same on every machine.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numba
from numba.core import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
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


class _PieceLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Code that is only linked into a kernel: it is machine code, and optimised as a whole, there."""

    def _optimize_final_module(self) -> None:
        codegen = self._codegen
        passes, builder = codegen._module_pass_manager(
            loop_vectorize=False, slp_vectorize=False, opt=codegen._opt_level, cost="cheap"
        )
        passes.run(self._final_module, builder)

    def _finalize_specific(self) -> None:
        pass


class _BlockLibrary(_PieceLibrary):
    """The same, optimised before it is linked: loops over rows become loops over vectors of rows."""

    _optimize_final_module = JITCodeLibrary._optimize_final_module


class _PieceCompiler(Compiler):  # type: ignore[misc]
    library = _PieceLibrary

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, restype: Any, flags: Any, names: Any):
        flags.no_compile = True
        own = self.library(targetctx.codegen(), f"piece{next(_numbers)}")
        super().__init__(typingctx, targetctx, own, args, restype, flags, names)


class _BlockCompiler(_PieceCompiler):
    library = _BlockLibrary


class _PieceDispatcher(CPUDispatcher):  # type: ignore[misc]
    def add_overload(self, compiled: Any) -> None:
        entry: list[Any] = []  # there is none; Numba wants some built-in function that stands for the code
        self.targetctx.insert_user_function(entry.append, compiled.fndesc, [compiled.library])
        super().add_overload(compiled._replace(entry_point=entry.append))


_numbers = itertools.count()
_suffix = ContextVar("suffix", default="")  # of the names of all functions of the kernel that is being made


def _jit(function: Callable[..., Any], pipeline: Any = None, **options: bool) -> Any:
    """`numba.njit`, but of NUMBA_DISABLE_JIT=1, which is for looking at one's own code: without a compiler there are
    no kernels.

    Numba tells functions of one name apart by a number that starts anew in each process. Of two kernels that were
    compiled in different processes and are loaded into one, one would run the other's functions.
    """
    function.__qualname__ += _suffix.get()
    if pipeline is not None:
        options["no_cpython_wrapper"] = True
        return _PieceDispatcher(function, targetoptions={**_OPTIONS, **options}, pipeline_class=pipeline)
    return CPUDispatcher(function, targetoptions={**_OPTIONS, **options})


def inlined(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that passes lanes: always inlined, so that lanes stay in registers."""
    return _jit(function, _PieceCompiler, forceinline=True)


def piece(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that passes pointers and numbers. Python must not call it: it would crash.

    It has no entry from Python or C, which spares 2/5 of the time of compiling it.
    """
    return _jit(function, _PieceCompiler)


def block_piece(function: Callable[..., Any]) -> Any:
    """A `piece` that is optimised by itself first."""
    return _jit(function, _BlockCompiler)


def compiled(label: str | None, make: Callable[[], Callable[..., Any]], args: tuple[Any, ...]) -> Callable[..., Any]:
    """The machine code of the function that `make` makes, for arguments of the types of these.

    label: tells kernels apart in the cache on disk; None for one that is not kept there, as its sources lie elsewhere.
    Records among the arguments are typed as such here; the code takes them as plain tuples.
    """
    threads.layer()
    signature = tuple(map(_type_of, args))
    token = _suffix.set("" if label is None else hashlib.sha256(f"{label} {signature}".encode()).hexdigest()[:16])
    try:
        dispatcher = _jit(make())
    finally:
        _suffix.reset(token)
    if label is not None:
        dispatcher._cache = KernelCache(label)
    code: Callable[..., Any] = dispatcher.compile(signature)
    return code


def _type_of(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return types.NamedTuple([_type_of(item) for item in value], type(value))
    kind = numba.typeof(value)
    # the code does not ask, and writes to nothing that is read
    return kind.copy(readonly=False) if isinstance(kind, types.Array) else kind
