"""Compiled kernels on disk, so that a process compiles only what none has compiled before.

Numba's own cache looks at the file of the kernel alone: it would keep machine code after a change of a function that
the kernel calls in another module. Here the name of a cached file is a digest of everything the machine code depends
on: all sources of this package, the versions of Numba, llvmlite and Python, the processor, the signature. So a file is
right or not looked at; it is written whole, under another name first, so processes that compile at once do not disturb
each other; and it carries its checksum, so a damaged file is compiled anew. Where no folder can be written, kernels are
compiled in each process.

The folder: ``NUMBA_CACHE_DIR`` where that is set; else ``__pycache__`` beside this file, else the user's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching, config
from numba.core.serialize import dumps

_DIGEST = 32  # bytes of a SHA-256


@functools.cache
def folder() -> Path | None:
    """Where compiled kernels are kept, None where no place can be written to."""
    if config.CACHE_DIR:
        candidates = [Path(config.CACHE_DIR)]
    else:
        user = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
        candidates = [Path(__file__).parent / "__pycache__", Path(user or "~/.cache").expanduser()]
    for candidate in candidates:
        path = candidate / "rmsnorm_np"
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError:
            continue
        return path
    return None


@functools.cache
def _sources() -> bytes:
    """A digest of this package's sources and of what compiles them."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version} {config.BOUNDSCHECK}".encode())
    package = Path(__file__).parent.parent
    for path in (*sorted(package.glob("*.py")), *sorted(package.glob("cpu/*.py"))):
        try:
            digest.update(path.read_bytes())
        except OSError:  # inside a zip file: its modification time stands for all
            digest.update(str(package.parent.stat().st_mtime_ns).encode())
            break
    return digest.digest()


class KernelCache(caching.NullCache):  # type: ignore[misc]
    """The cache of one dispatcher."""

    def __init__(self, function: Any) -> None:
        self._function = function

    @property
    def cache_path(self) -> str | None:
        """The folder, as Numba asks for it."""
        path = folder()
        return None if path is None else str(path)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel for a signature, or None."""
        path = self._path(sig, target_context.codegen())
        if path is None:
            return None
        target_context.refresh()
        try:
            content = path.read_bytes()
        except OSError:
            return None
        payload = content[_DIGEST:]
        if hashlib.sha256(payload).digest() != content[:_DIGEST]:
            return None
        import pickle

        return numba.core.compiler.CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled kernel, if there is a place for it."""
        path = self._path(sig, data.codegen)
        if path is None or data.library.has_dynamic_globals:
            return
        payload = dumps(data._reduce())
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            Path(file.name).replace(path)
        except OSError:  # a full or vanished disk costs the next process a compilation, not this one its result
            return

    def _path(self, sig: Any, codegen: Any) -> Path | None:
        path = folder()
        if path is None:
            return None
        key = f"{self._function.__qualname__} {sig} {codegen.magic_tuple()}".encode()
        name = hashlib.sha256(_sources() + key).hexdigest()[:32]
        return path / f"{self._function.__name__.lstrip('_')}-{name}.nbc"


def cached(dispatcher: Any) -> Any:
    """The dispatcher with its cache; with ``NUMBA_DISABLE_JIT=1`` it is a plain function, and stays one."""
    if hasattr(dispatcher, "py_func"):
        dispatcher._cache = KernelCache(dispatcher.py_func)
    return dispatcher
