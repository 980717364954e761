"""Compiled kernels on disk, so that a process compiles only what none has compiled before.

Numba's own cache looks at the file of the kernel alone: it would keep machine code after a change of a function that
the kernel calls in another module. Here the name of a cached file is a digest of everything the machine code depends
on: the sources of the engine and of the formulas, the versions of Numba, llvmlite and Python, the processor, the
signature. So a file is right or not looked at; it is written whole, under another name first, so processes that compile
at once do not disturb each other; and it carries its checksum, so a damaged file is compiled anew. Where no folder can
be written, kernels are compiled in each process.

The folder: ``NUMBA_CACHE_DIR`` where that is set; else ``__pycache__`` beside this file, else the user's cache folder.
Kernels are looked for in all of them, and kept in the first that can be written: an image can bring them read-only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.resources
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching, config
from numba.core.serialize import dumps

_DIGEST = 32  # bytes of a SHA-256

# Files of the engine that no machine code depends on. All others count, so a new file can only recompile too much.
_NOT_COMPILED = {"__init__", "cache", "memory", "pace", "prepared", "quantized", "rare"}


def _places() -> Iterator[Path]:
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR) / "rmsnorm_np"
        return
    yield Path(__file__).parent / "__pycache__" / "rmsnorm_np"
    user = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    try:
        yield (Path(user) if user else Path.home() / ".cache") / "rmsnorm_np"
    except RuntimeError:  # a user without a home, as in a container that knows the number alone
        return


@functools.cache
def folder() -> Path | None:
    """Where compiled kernels are kept, None where no place can be written to."""
    for path in _places():
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError:
            continue
        return path
    return None


@functools.cache
def _sources() -> bytes | None:
    """A digest of what kernels are compiled from and of what compiles them, None where the files cannot be read."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.version} {config.BOUNDSCHECK}".encode())
    package = importlib.resources.files("rmsnorm_np")  # in a folder or in a zip file
    files = [
        file
        for place in (package / "cpu", package / "ops")
        for file in sorted(place.iterdir(), key=lambda file: file.name)
        if _is_compiled(place.name, *file.name.rpartition(".")[::2])
    ]
    for file in files:
        digest.update(file.read_bytes())
    return digest.digest() if files else None


def _is_compiled(folder: str, name: str, suffix: str) -> bool:
    """Whether machine code depends on a file."""
    if suffix not in ("py", "pyc"):  # an install can be without the sources
        return False
    return folder == "ops" or name not in _NOT_COMPILED


class KernelCache(caching.NullCache):  # type: ignore[misc]
    """The cache of one kernel. label: what tells it from others that are compiled of the same sources."""

    def __init__(self, label: str) -> None:
        self._label = label

    @property
    def cache_path(self) -> str | None:
        """The folder, as Numba asks for it."""
        path = folder()
        return None if path is None else str(path)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled kernel for a signature, or None."""
        name = self._name(sig, target_context.codegen())
        if name is None:
            return None
        target_context.refresh()
        for place in _places():
            try:
                content = (place / name).read_bytes()
            except OSError:
                continue
            payload = content[_DIGEST:]
            if _checksum(name, payload) == content[:_DIGEST]:
                import pickle  # noqa: TID251 (of a folder that only who may write the code may write to)

                return numba.core.compiler.CompileResult._rebuild(target_context, *pickle.loads(payload))
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled kernel, if there is a place for it."""
        path, name = folder(), self._name(sig, data.codegen)
        if path is None or name is None or data.library.has_dynamic_globals:
            return
        try:
            payload = dumps(data._reduce())
        except RuntimeError:  # Ctrl-C fell into the hook by which LLVM hands Numba the machine code: it can only run
            return
        part = None
        try:
            with tempfile.NamedTemporaryFile(dir=path, delete=False) as file:
                part = Path(file.name)
                file.write(_checksum(name, payload) + payload)
            part.replace(path / name)
        except OSError:  # a full or vanished disk costs the next process a compilation, not this one its result
            return
        finally:
            if part is not None:  # half a file, after an error or Ctrl-C
                with contextlib.suppress(OSError):
                    part.unlink()

    def _name(self, sig: Any, codegen: Any) -> str | None:
        sources = _sources()
        if sources is None:
            return None
        key = f"{self._label} {sig} {codegen.magic_tuple()}".encode()
        return f"{self._label.split()[0]}-{hashlib.sha256(sources + key).hexdigest()[:32]}.nbc"


def _checksum(name: str, payload: bytes) -> bytes:
    """Of the name, too: a whole file can come back under another's name from a repaired file system."""
    return hashlib.sha256(name.encode() + payload).digest()
