"""Formulas as MathML, which browsers draw themselves. Sphinx's own way loads MathJax from another host."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)

SIZES = re.compile(r"\\(?:big|Big|bigg|Bigg)[lrm]?(?![a-zA-Z])\s*")
"""Sizes of brackets, which docutils does not know; MathML draws them in one size."""
OTHER_NAMES = {r"\dots": r"\ldots", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\tfrac": r"\frac", r"\dfrac": r"\frac"}
"""Commands of LaTeX that docutils does not know, and those that mean the same."""


def formula(node: nodes.Element, *, is_block: bool) -> str:
    """Return a formula as MathML; a part of LaTeX that docutils does not know is a warning."""
    text = node.astext().strip()
    known = re.sub(r"\\[a-zA-Z]+", lambda name: OTHER_NAMES.get(name[0], name[0]), SIZES.sub("", text))
    try:
        return re.sub(r">\s+<", "><", tex2mathml(known, as_block=is_block))
    except MathError as error:
        logger.warning("the formula %r cannot be written as MathML (%s)", text, error, location=node)
        return f"<code>{escape(text)}</code>"


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
