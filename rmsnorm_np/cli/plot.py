"""The roofline picture: bandwidth against size, one line per contender, and the limit above them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmsnorm_np.cli.cases import LIMIT, Case
from rmsnorm_np.cli.inputs import dtype_named

LIMIT_STYLE: dict[str, Any] = {"color": "black", "linestyle": "--", "marker": None}


def require(path: str) -> None:
    """Refuse, with `argparse.ArgumentError`, a picture that could not be written; leaves no file behind."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise argparse.ArgumentError(None, "argument --plot: needs matplotlib: pip install matplotlib") from error
    endings = sorted(Figure().canvas.get_supported_filetypes())
    file = Path(path)
    if file.suffix[1:].lower() not in endings:
        expected = f"expected a file name that ends in .{', .'.join(endings)}"
        raise argparse.ArgumentError(None, f"argument --plot: {path!r}: {expected}")
    existed = file.exists()
    try:
        file.open("ab").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise argparse.ArgumentError(None, f"argument --plot: {path!r}: {error.strerror}") from error


def draw(cases: Sequence[Case], path: str) -> None:
    """Write the picture to `path`, in the format that its ending names."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((case.norm, case.direction) for case in cases))
    figure = Figure(figsize=(6.0 * len(kinds) / 2, 8.0), layout="constrained")
    for axes, kind in zip(figure.subplots(2, -(-len(kinds) // 2), squeeze=False).flat, kinds, strict=False):
        for name, points in lines([case for case in cases if (case.norm, case.direction) == kind]).items():
            style = LIMIT_STYLE if name == LIMIT else {"marker": "o", "markersize": 4}
            axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set_title(", ".join(kind))
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("bytes in x")
        axes.set_ylabel("GB/s")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path)


def lines(cases: Sequence[Case]) -> dict[str, list[tuple[int, float]]]:
    """For each contender its points (bytes in x, GB/s), smallest first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        rows, n = case.shape
        for entry in case.entries:
            points = found.setdefault(entry.contender, [])
            points.append((rows * n * dtype_named(case.dtype).itemsize, entry.bandwidth / 1e9))
    return {name: sorted(points) for name, points in found.items()}
