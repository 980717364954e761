"""`info` and `warmup`: what the package runs on, and compiling it ahead of time."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import rmsnorm_np as rn
from rmsnorm_np.cli import console, peers

PACKAGES = ("numpy", "numba", "llvmlite", "ml_dtypes", "rich")
# Those that the kernels gain from; --json has all.
FEATURES = ("avx", "avx2", "avx512f", "avx512bf16", "avx512fp16", "f16c", "fma", "neon", "sse4.2", "sve")
ENGINES = {"reference": "numpy", "cpu": "numba", "cuda": 'numba-cuda: pip install "rmsnorm_np[cuda13]", or [cuda12]'}


def collect() -> dict[str, Any]:
    """Everything `info` shows."""
    from rmsnorm_np import cpu

    versions = {"rmsnorm_np": rn.__version__, "python": platform.python_version()}
    return {
        "versions": versions | {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu.describe(),
        "engines": engines(),
        "peers": peers.versions(),
    }


def engines() -> dict[str, str]:
    """For each engine "available", or what it lacks."""
    found = {}
    for name, needs in ENGINES.items():
        try:
            import_module(f"rmsnorm_np.{name}")
        except ImportError as error:
            found[name] = f"not available: needs {needs} ({error})"
        else:
            found[name] = "available"
    return found


def info(as_json: bool) -> int:
    """Print what `collect` found."""
    found = collect()
    if as_json:
        console.print_json(found)
    else:
        render(Console(highlight=False), found)
    return 0


def render(out: Console, found: dict[str, Any]) -> None:
    """Print a list for each part."""
    for title, values in found.items():
        drawn = Table(box=None, show_header=False, padding=(0, 1))
        drawn.add_column(no_wrap=True)
        drawn.add_column(overflow="fold")
        for name, value in (values if isinstance(values, dict) else {title: values}).items():
            shown = [entry for entry in value if entry in FEATURES] if name == "features" else value
            drawn.add_row(name.replace("_", " "), Text(" ".join(shown) if isinstance(shown, list) else str(shown)))
        out.print(title, style="bold")
        out.print(drawn)
        out.print()


def warmup(dtypes: Sequence[str], as_json: bool) -> int:
    """Compile the kernels of these dtypes and keep them in the cache folder, so that no later call has to."""
    from rmsnorm_np import cpu

    start = time.perf_counter()
    with Console(stderr=True).status("compiling") as status:
        cpu.warmup(dtypes, report=lambda step: status.update(f"compiling {step}"))
    took, folder = time.perf_counter() - start, cpu.describe()["cache"]
    if as_json:
        console.print_json({"seconds": took, "cache": folder})
    else:
        kept = "no folder is writable: they are gone with this process" if folder is None else f"kept in {folder}"
        Console(highlight=False).print(f"Compiled in {console.seconds(took)}; {kept}", soft_wrap=True)
    return 0
