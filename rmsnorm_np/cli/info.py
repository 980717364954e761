"""`info` and `warmup`: what the package runs on, and compiling it ahead of time."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import rmsnorm_np as rn
from rmsnorm_np.cli import console, device, peers

PACKAGES = ("numpy", "numba", "llvmlite", "ml_dtypes", "rich")
# Those that the kernels gain from; --json has all.
FEATURES = ("avx", "avx2", "avx512f", "avx512bf16", "avx512fp16", "f16c", "fma", "neon", "sse4.2", "sve")
LABELS = {
    "vector_bits": "vector width",
    "threading_layer": "threading layer",
    "cache": "compiled kernels",
    "recycled_memory_limit": "memory kept for reuse",
}
TITLES = {"cpu": "CPU engine", "cuda": "CUDA engine", "peers": "libraries that bench compares with"}


def collect() -> dict[str, Any]:
    """Everything `info` shows."""
    from rmsnorm_np import cpu

    versions = {"rmsnorm_np": rn.__version__, "python": platform.python_version()}
    found: dict[str, Any] = {
        "versions": versions | {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "engines": engines(),
        "cpu": cpu.describe(),
        "peers": peers.versions(),
    }
    if found["engines"]["cuda"] == "available":
        from rmsnorm_np import cuda

        found["cuda"] = cuda.describe()
    return found


def engines() -> dict[str, str]:
    """For each engine "available", or what it lacks. The first two need nothing that is not installed with them."""
    missing = device.missing()
    return {
        "reference": "available",
        "cpu": "available",
        "cuda": "available" if missing is None else f"not available: {missing}",
    }


def info(as_json: bool) -> int:
    """Print what `collect` found."""
    found = collect()
    if as_json:
        console.print_json(found)
    else:
        render(console.stdout(), found)
    return 0


def render(out: Console, found: dict[str, Any]) -> None:
    """Print a list for each part that has entries."""
    for title, values in found.items():
        if not values:
            continue
        drawn = Table(box=None, show_header=False, padding=(0, 1))
        drawn.add_column(no_wrap=True)
        drawn.add_column(overflow="fold")
        if isinstance(values, dict):
            for name, value in values.items():
                drawn.add_row(LABELS.get(name, name), Text(_shown(name, value)))
        else:
            drawn.add_row(Text(values))
        out.print(TITLES.get(title, title), style="bold")
        out.print(drawn)
        out.print()


def _shown(name: str, value: Any) -> str:
    if name == "features":
        return " ".join(feature for feature in value if feature in FEATURES)
    if name == "vector_bits":
        return "unknown" if value is None else f"{value} bits"
    if name == "recycled_memory_limit":
        return console.size(value)
    if name == "cache" and value is None:
        return "not kept, as no folder can be written"
    return str(value)


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
        kept = "not kept, as no folder can be written" if folder is None else f"kept in {folder}"
        console.stdout().print(f"Compiled in {console.seconds(took)}; {kept}", soft_wrap=True)
    return 0
