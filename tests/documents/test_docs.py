"""Every page of docs/ whose blocks can be run has its tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import ROOT, RUN, Page

FILES = (file.relative_to(ROOT) for file in (ROOT / "docs").rglob("*.md"))
PAGES = sorted(str(file) for file in FILES if "_build" not in file.parts)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_with_blocks_to_run_has_a_test_file(name: str) -> None:
    """That file calls `require_tests` of the page."""
    if any(block.language in RUN for block in Page(name).blocks):
        tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
        assert f'Page("{name}")' in tests
        assert "require_tests()" in tests
