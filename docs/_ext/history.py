"""asv's pages of the figures of each commit, in the folder `asv` of the built site.

asv reads the commits' dates in git: where the sources are no clone, the site has no such folder.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sphinx.util import logging

ROOT = Path(__file__).parents[2]


def _add_pages(app: Any, exception: Exception | None) -> None:
    """Sphinx's build-finished."""
    if exception is not None or app.builder.name != "html":
        return
    if not (ROOT / ".git").exists():
        logging.getLogger(__name__).info("no pages of asv: these sources are no clone")
        return
    spec = importlib.util.spec_from_file_location("benchmark_history", ROOT / "asv_benchmarks" / "history.py")
    history = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(history)
    history.pages(Path(app.outdir, "asv"))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("build-finished", _add_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
