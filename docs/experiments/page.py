"""Writes the tables and figures of docs/experiments.md, and the README's table, from what is stored in results/.

    python docs/experiments/page.py

A table stands between <!-- its name --> and <!-- end -->. Nothing else of the pages is changed.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import tables
from tables import LABELS, NOTHING, Results

DOCS = Path(__file__).parents[1]
PAGES = (DOCS / "experiments.md", DOCS.parent / "README.md")
BLOCKS = {
    "summary": tables.summary,
    "quality: rnnsearch": lambda results: tables.translation_quality(results, "rnnsearch"),
    "quality: transformer": lambda results: tables.translation_quality(results, "transformer"),
    "quality: reader": tables.reader_quality,
    "quality: order embeddings": tables.order_quality,
    "quality: convpool": tables.convpool_quality,
    "translations": tables.translations,
    "answers": tables.answers,
    "p sweep": tables.p_sweep,
    "initial weights": tables.centred,
    "table 5": tables.table5,
    "time: paper": lambda results: tables.time_of(results, "paper"),
    "time: small": lambda results: tables.time_of(results, "small"),
    "equation 10": tables.equation10,
}


def fill(text, results, blocks=BLOCKS):
    """A page's text with every block made anew, from {its name: function of the results}."""

    def block(match):
        return f"<!-- {match[1]} -->\n{blocks[match[1]](results)}\n<!-- end -->"

    return re.sub(r"^<!-- (.+) -->\n(?:(?!<!--).*\n)*<!-- end -->$", block, text, flags=re.MULTILINE)


# Figures


def loss_curves(results, places):
    """Figure 1 of the paper: the loss of RNNSearch against steps, and against the time that these steps take.

    The time of a step is that of the interleaved measurement: runs of many minutes on a shared machine do not compare.
    """
    times = results.time("rnnsearch", "small")
    for ax, (title, fused) in zip(places, LOSS_AGAINST.items(), strict=True):
        ax.set(title=title, xlabel="step" if fused is None else "minutes", ylabel="training loss", ylim=(1.5, 6))
        for kind in ("none", "layer", "rms", "prms"):
            runs = results.finished("rnnsearch", norm=kind)
            if not (runs and times):
                continue
            steps = np.array([step for step, *_ in runs[0]["curve"]])  # (points,)
            losses = np.mean([[loss for *_, loss in run["curve"]] for run in runs], axis=0)  # (points,)
            x = steps if fused is None else steps * times[kind, fused]["median"] / 60  # (points,)
            ax.plot(x, losses, label=LABELS[kind])
        if ax.lines:
            ax.legend()
        else:
            ax.text(0.5, 0.5, NOTHING, transform=ax.transAxes, ha="center")


def equation10_curves(results, places):
    """The loss of each of the three runs, without a norm and with RMSNorm."""
    curves = results.equation10()
    for ax, kind in zip(places, ("none", "rms"), strict=True):
        ax.set(title=LABELS[kind], xlabel="step", ylabel="training loss")
        of_kind = [curve for curve in curves if curve["norm"] == kind]
        for curve, style in zip(of_kind, ("-", "--", ":"), strict=False):
            label = f"{curve['delta']} W, {curve['factor']} η"
            ax.plot(range(1, len(curve["losses"]) + 1), curve["losses"], style, label=label)
        ax.legend()


LOSS_AGAINST = {"against steps": None, "against time, NumPy operations": False, "against time, kernels": True}
FIGURES = {"experiments-loss.png": (loss_curves, 3), "experiments-equation10.png": (equation10_curves, 2)}


def draw(results):
    """Make the pictures beside the page."""
    from matplotlib.figure import Figure

    for name, (plot, count) in FIGURES.items():
        figure = Figure(figsize=(4 * count, 3.2), layout="constrained")
        plot(results, figure.subplots(1, count))
        figure.savefig(DOCS / name, dpi=120, metadata={"Software": None})


def main():
    """Bring the pages up to date."""
    results = Results()
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results)


if __name__ == "__main__":
    main()
