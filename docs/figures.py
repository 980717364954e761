"""How the figures look: SVG within the page, in the colour of its text, so that they suit light and dark."""

from __future__ import annotations

import io
import re
import zlib

import matplotlib as mpl

mpl.use("svg")
from matplotlib.figure import Figure

# mid-tones, to be told from each other and from both backgrounds
BLUE, ORANGE, GREEN, PINK, GREY = COLOURS = ("#3f8fd2", "#d9772b", "#3fa66b", "#c75c9f", "#8a8a8a")
INK = "#010203"  # stands for the colour of the text around

mpl.rcParams.update(
    {
        "axes.edgecolor": INK,
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.prop_cycle": mpl.cycler(color=COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "axes.titlesize": "medium",
        "font.size": 10,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "lines.markersize": 4,
        "svg.fonttype": "none",  # text stays text, in the reader's font
        "svg.hashsalt": "figure",
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
)


def axes(title="", width=4.4, height=3.1, **settings):
    """Axes of a figure of its own; settings as for `Axes.set`."""
    ax = Figure(figsize=(width, height), layout="constrained").subplots()
    ax.set(title=title, **settings)
    return ax


class Figures:
    """Figures side by side, for a page or a notebook to show as the last value of a cell."""

    def __init__(self, alt: str, *drawn) -> None:
        self.alt, self.drawn = alt, drawn

    def _repr_html_(self) -> str:
        return f'<div class="figures" role="img" aria-label="{self.alt}">{"".join(map(_svg, self.drawn))}</div>'


def _svg(ax) -> str:
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    ax.figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px sans-serif", svg)
    # ids are of the page, not of the figure
    own = f"f{zlib.crc32(svg.encode()):x}"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}", svg)
