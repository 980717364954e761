"""Compiled kernels on disk in odd installs: never a wrong result, at worst a compilation more."""

from __future__ import annotations

import compileall
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from programs import PATIENCE, ROOT, command, environment, run

pytestmark = [pytest.mark.engine]

# One kernel: how often it was found and how often compiled; 1, or the factor that a changed package multiplies by; and
# where kernels are kept.
PROGRAM = """
import numpy as np
import rmsnorm_np as rn
from numba.core.registry import CPUDispatcher
from rmsnorm_np.cpu import cache

made = []
init = CPUDispatcher.__init__
CPUDispatcher.__init__ = lambda self, *args, **kwargs: made.append(self) or init(self, *args, **kwargs)
y = rn.rms_norm(np.array([[3.0, 4.0]], np.float32), eps=0.0)
factor = round(y[0, 0] / 0.84852814)
assert abs(y - factor * np.array([[0.84852814, 1.13137085]])).max() < 1e-6
(stats,) = [dispatcher.stats for dispatcher in made if isinstance(dispatcher._cache, cache.KernelCache)]
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), factor, cache.folder(), sep=";")
"""

FOUND, COMPILED = (1, 0), (0, 1)


def use(*, factor=1, preexec_fn=None, program=PROGRAM, **variables):
    """FOUND or COMPILED and the folder, after one call in a process of its own."""
    hits, misses, got, folder = run(program, preexec_fn=preexec_fn, **variables).strip().split(";")
    assert int(got) == factor, "machine code of another version of the package"
    return (int(hits), int(misses)), folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))


@pytest.fixture
def installed(tmp_path):
    """A copy of the package, as an installer lays it down."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "rmsnorm_np", site / "rmsnorm_np", ignore=shutil.ignore_patterns("__pycache__", "cuda"))
    return site


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def upgrade(package):
    """Change what the kernels call, in a file that is none of theirs; sizes and times stay as they were."""
    file = package / "ops" / "rms.py"
    text, times = file.read_text(), file.stat()
    changed = text.replace("over(s.squares, k), eps)))", "over(s.squares, k * 4.0), eps)))")
    assert changed != text
    file.write_text(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def lock(folder):
    """Nobody may write here."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)


def obey_permissions():
    """Root is asked for permission like everyone else, in the program that follows (Linux)."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


no_permissions = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="how root obeys permissions is Linux's own way"
)


@pytest.mark.slow
@no_permissions
def test_nothing_can_be_written_anywhere(installed, home):
    """A read-only image: each process compiles, and says nothing."""
    lock(installed)
    lock(home)
    before = files(home.parent)
    for variables in (
        {"NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": None},
        {"NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": home},
        {"NUMBA_CACHE_DIR": home},
    ):
        found = use(package=installed, HOME=home, preexec_fn=obey_permissions, **variables)
        assert found == (COMPILED, "None")
    assert files(home.parent) == before


@no_permissions
def test_a_read_only_install_keeps_kernels_in_the_home(installed, home):
    lock(installed)
    variables = {"package": installed, "HOME": home, "NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": None}
    folder = str(home / ".cache" / "rmsnorm_np")
    assert use(preexec_fn=obey_permissions, **variables) == (COMPILED, folder)
    assert use(preexec_fn=obey_permissions, **variables) == (FOUND, folder)


@no_permissions
def test_kernels_that_an_image_brings_are_found(installed, home):
    """Compiled while it was built; read-only since, as is all else."""
    variables = {"package": installed, "HOME": home, "NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": None}
    assert use(**variables)[0] == COMPILED
    lock(installed)
    lock(home)
    assert use(preexec_fn=obey_permissions, **variables) == (FOUND, "None")


HOMELESS = """
import os
import pwd

def unknown(_):
    raise KeyError("no such user")

pwd.getpwuid = unknown
os.environ.pop("HOME", None)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a user without a home is Unix's")
def test_a_user_without_a_home(installed):
    """In a container the number of the user may stand for nobody."""
    variables = {"package": installed, "HOME": None, "NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": None}
    result, folder = use(program=HOMELESS + PROGRAM, **variables)
    assert (result, folder) == (COMPILED, str(installed / "rmsnorm_np" / "cpu" / "__pycache__" / "rmsnorm_np"))
    blocked = installed / "rmsnorm_np" / "cpu" / "__pycache__"
    shutil.rmtree(blocked)
    blocked.write_text("a file, not a folder")
    assert use(program=HOMELESS + PROGRAM, **variables) == (COMPILED, "None")


@pytest.mark.parametrize(
    "kind", ["files", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("compiled files alone", "zip"))]
)
def test_an_upgrade_is_compiled_anew(installed, tmp_path, kind):
    """Machine code of the version before would be found, if its name did not tell what it was made from."""
    place = installed
    if kind == "zip":
        place = tmp_path / "package.zip"

    def install():
        for old in installed.rglob("*.pyc"):
            old.unlink()
        if kind == "zip":
            with zipfile.ZipFile(place, "w") as archive:
                for file in filter(lambda file: (installed / file).is_file(), files(installed)):
                    archive.writestr(zipfile.ZipInfo(file, (2026, 1, 1, 0, 0, 0)), (installed / file).read_bytes())
            os.utime(place, (1.7e9, 1.7e9))
        if kind == "compiled files alone":
            compileall.compile_dir(installed, quiet=1, legacy=True)
            shutil.move(installed / "rmsnorm_np", tmp_path / "sources")
            shutil.copytree(tmp_path / "sources", installed / "rmsnorm_np", ignore=shutil.ignore_patterns("*.py"))

    sources = tmp_path / "sources" if kind == "compiled files alone" else installed / "rmsnorm_np"
    variables = {"package": place, "NUMBA_CACHE_DIR": tmp_path / "cache"}
    install()
    assert use(**variables)[0] == COMPILED
    assert use(**variables)[0] == FOUND
    upgrade(sources)
    if kind == "compiled files alone":
        shutil.rmtree(installed / "rmsnorm_np")
        shutil.move(sources, installed / "rmsnorm_np")
    install()
    assert use(factor=2, **variables)[0] == COMPILED
    assert use(factor=2, **variables)[0] == FOUND


def test_kernels_of_another_processor_are_left_alone(tmp_path):
    """A home on a file server is that of machines which do not have each other's instructions."""
    old = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    for variables, want in ((old, COMPILED), ({}, COMPILED), (old, FOUND), ({}, FOUND)):
        assert use(NUMBA_CACHE_DIR=tmp_path, **variables)[0] == want
    assert len(files(tmp_path / "rmsnorm_np")) == 2


@pytest.mark.slow
def test_eight_processes_compile_at_once(tmp_path):
    """None finds half a file of another's."""
    variables = environment(NUMBA_CACHE_DIR=tmp_path)
    processes = [
        subprocess.Popen(
            command(PROGRAM), env=variables, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    for process in processes:
        out, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (0, "")
        assert out.split(";")[2] == "1"
    assert use(NUMBA_CACHE_DIR=tmp_path)[0] == FOUND
    assert len(files(tmp_path / "rmsnorm_np")) == 1


@pytest.mark.slow
def test_a_damaged_file_is_compiled_anew(tmp_path):
    """Cut off, overwritten, empty; or another kernel's under its name, as after a repair of the file system."""
    folder = tmp_path / "rmsnorm_np"
    assert use(NUMBA_CACHE_DIR=tmp_path)[0] == COMPILED
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    other = PROGRAM.replace("rn.rms_norm(", "rn.layer_norm(np.eye(2)); y = rn.rms_norm(")
    run(other, NUMBA_CACHE_DIR=tmp_path)
    (stranger,) = set(folder.iterdir()) - {file}
    middle = len(whole) // 2
    damages = (
        b"",
        whole[:middle],
        whole[:middle] + bytes(len(whole) - middle),
        bytes(32) + whole[32:],
        stranger.read_bytes(),
    )
    for damage in damages:
        file.write_bytes(damage)
        assert use(NUMBA_CACHE_DIR=tmp_path)[0] == COMPILED
        assert file.read_bytes()[32:64] == whole[32:64]
        assert len(files(folder)) == 2


def limit_file_size():
    """The disk is full after 4 KiB."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="this system has no limit to set")
def test_a_full_disk_costs_nothing_but_time(tmp_path):
    """And each process that finds it full leaves it as full as before."""
    for _ in range(2):
        assert use(NUMBA_CACHE_DIR=tmp_path, PYTHONDONTWRITEBYTECODE=1, preexec_fn=limit_file_size)[0] == COMPILED
    assert files(tmp_path / "rmsnorm_np") == []


VANISHED = """
import shutil
from rmsnorm_np.cpu import cache

shutil.rmtree(cache.folder())
"""


def test_a_folder_that_vanishes_costs_nothing_but_time(tmp_path):
    assert use(program=VANISHED + PROGRAM, NUMBA_CACHE_DIR=tmp_path)[0] == COMPILED
