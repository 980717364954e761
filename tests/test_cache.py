"""Compiled kernels on disk: found again, never wrong, never an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from rmsnorm_np.cpu import cache

PROGRAM = """
import numpy as np
import rmsnorm_np as rn
from numba.core.registry import CPUDispatcher
from rmsnorm_np.cpu import cache
made = []
init = CPUDispatcher.__init__
CPUDispatcher.__init__ = lambda self, *args, **kwargs: made.append(self) or init(self, *args, **kwargs)
y = rn.rms_norm(np.array([[3.0, 4.0]], np.float32), eps=0.0)
assert abs(y - [[0.84852814, 1.13137085]]).max() < 1e-6
kept = [dispatcher.stats for dispatcher in made if isinstance(dispatcher._cache, cache.KernelCache)]
print(sum(sum(stats.cache_hits.values()) for stats in kept), sum(sum(stats.cache_misses.values()) for stats in kept))
"""


def run(folder):
    """(hits, misses) of a process that compiles one kernel or finds it in the folder."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    return tuple(map(int, out.stdout.split()))


def test_a_second_process_finds_it_and_a_damaged_file_is_compiled_anew(tmp_path):
    assert run(tmp_path) == (0, 1)
    assert run(tmp_path) == (1, 0)
    (file,) = (tmp_path / "rmsnorm_np").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:5000] + b"?" + content[5001:])
    assert run(tmp_path) == (0, 1)
    assert run(tmp_path) == (1, 0)


def test_damage_of_any_kind_is_seen(tmp_path, monkeypatch):
    class Codegen:
        def codegen(self):
            return self

        def magic_tuple(self):
            return ("a", "b")

        def refresh(self):
            pass

    monkeypatch.setattr(cache, "_places", lambda: [tmp_path])
    store = cache.KernelCache("rms_norm and its dtypes")
    path = tmp_path / store._name("signature", Codegen())
    for content in (b"", b"short", b"\0" * 32, b"\0" * 32 + b"a pickle that is none", os.urandom(1000)):
        path.write_bytes(content)
        assert store.load_overload("signature", Codegen()) is None


CALLS = """
import sys
import numpy as np
import rmsnorm_np as rn
for name in sys.argv[1:]:
    call, dtype = getattr(rn, name.split()[0]), name.split()[1]
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(dtype)
    weight = x[0] + 1
    np.testing.assert_allclose(call(x, weight), call(x, weight, backend="reference"), 1e-3)
"""


@pytest.mark.engine
@pytest.mark.parametrize(
    "calls", [("rms_norm float32", "layer_norm float32"), ("rms_norm float32", "rms_norm float16")], ids=str
)
def test_kernels_of_different_processes_meet_in_one(calls, tmp_path):
    """Numba numbers functions anew in each process: by their numbers, one kernel would run another's functions."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for each in ([calls[0]], [calls[1]], calls, calls[::-1]):
        command = [sys.executable, "-W", "error", "-c", CALLS, *each]
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr


@pytest.mark.engine
def test_without_a_folder_kernels_are_compiled_in_each_process(tmp_path):
    blocked = tmp_path / "a file, not a folder"
    blocked.write_text("")
    assert run(blocked) == (0, 1)
    assert run(blocked) == (0, 1)


def test_the_folder_is_numbas_or_beside_the_package_or_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    assert cache.folder.__wrapped__() == tmp_path / "numba" / "rmsnorm_np"
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    assert cache.folder.__wrapped__().parent.name == "__pycache__"
    unwritable = tmp_path / "unwritable"
    unwritable.write_text("")
    monkeypatch.setattr(cache, "__file__", str(unwritable / "cache.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "home"))
    assert cache.folder.__wrapped__() == tmp_path / "home" / "rmsnorm_np"
    monkeypatch.setenv("XDG_CACHE_HOME", str(unwritable))
    monkeypatch.setenv("LOCALAPPDATA", str(unwritable))
    assert cache.folder.__wrapped__() is None


def test_each_kernel_and_signature_has_a_file_of_its_own():
    class Codegen:
        def magic_tuple(self):
            return ("a", "b")

    names = {
        cache.KernelCache(label)._name(signature, Codegen())
        for label in ("rms_norm float16", "rms_norm bfloat16")
        for signature in ("one", "two")
    }
    assert len(names) == 4


# What no machine code depends on: a change there must recompile nothing, and one anywhere else in `cpu` or `ops` must
# recompile everything.
HOST_FILES = {
    "cpu/__init__.py", "cpu/cache.py", "cpu/memory.py", "cpu/pace.py", "cpu/prepared.py", "cpu/quantized.py",
    "cpu/rare.py",
}  # fmt: skip


def test_kernels_are_compiled_anew_after_a_change_to_what_they_are_compiled_from(tmp_path, monkeypatch):
    """A blank in a docstring of norms.py recompiled every kernel; one to vector.py that recompiles none is worse."""
    package = Path(cache.__file__).parents[1]
    copy = tmp_path / "rmsnorm_np"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "data"))
    monkeypatch.setattr(cache.importlib.resources, "files", lambda name: tmp_path / name)
    before = cache._sources.__wrapped__()
    changed = set()
    for file in sorted(copy.rglob("*.py")):
        source = file.read_text()
        file.write_text(source + " ")
        if cache._sources.__wrapped__() != before:
            changed.add(file.relative_to(copy).as_posix())
        file.write_text(source)
    sources = {file.relative_to(package).as_posix() for part in ("cpu", "ops") for file in package.glob(f"{part}/*.py")}
    assert changed == sources - HOST_FILES
