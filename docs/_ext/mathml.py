"""Formulas as MathML, which browsers draw by themselves: no script, and nothing fetched from another site."""

from __future__ import annotations

from typing import Any

import latex2mathml.converter
from docutils import nodes


def _mathml(latex: str, display: str) -> str:
    return latex2mathml.converter.convert(latex, display=display)


def _inline(translator: Any, node: nodes.Element) -> None:
    translator.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.Element) -> None:
    translator.body.append(f'<div class="formula">{_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
