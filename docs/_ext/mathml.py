"""Formulas as MathML, which browsers draw themselves. Sphinx's own way loads MathJax from another host."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)


def formula(node: nodes.Element, *, is_block: bool) -> str:
    """Return a formula as MathML; a part of LaTeX that docutils does not know is a warning."""
    text = node.astext().strip()
    try:
        return re.sub(r">\s+<", "><", tex2mathml(text, as_block=is_block))
    except MathError as error:
        logger.warning("the formula %r cannot be written as MathML (%s)", text, error, location=node)
        return f"<code>{text}</code>"


def inline(writer: Any, node: nodes.Element) -> None:
    """Write a formula in a line of text."""
    writer.body.append(formula(node, is_block=False))
    raise nodes.SkipNode


def block(writer: Any, node: nodes.Element) -> None:
    """Write a formula on a line of its own, which scrolls if it is wider than the page."""
    writer.body.append(f'<div class="formula">{formula(node, is_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
