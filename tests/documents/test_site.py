"""The site of docs/: it builds without a network, its links lead somewhere, and its search finds what people ask.

Notebooks among the pages are not run here.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock
from pages import ROOT

import narvl

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
WITHOUT_NETWORK = """
import socket, sys
def refuse(*arguments): raise OSError("the site must build without a network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""
DOCS = ROOT / "docs"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *(file for file in sorted(DOCS.rglob("*.md")) if "_build" not in file.parts),
]
FENCE = re.compile(r"^ *(```+|~~~+).*?^ *\1`* *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(
    r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]^]+\]:\s*(\S+)|(?:src|href)=\"([^\"]+)\"", re.MULTILINE
)


# --- The repository's own pages, as GitHub shows them ----------------------------------------------------------------


@cache
def anchors(file: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page, and those that the page itself sets."""
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    found: set[str] = set(re.findall(r"<\w+ [^>]*\b(?:id|name)=\"([^\"]+)\"", text))
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6} +(.*?)(?: +#+)?$", text, re.MULTILINE):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def broken_links(file: Path, root: Path = ROOT) -> list[str]:
    """Return the links of a page to files or headings that are not in the repository, whose folder is `root`."""
    text = CODE.sub("", FENCE.sub("", file.read_text(encoding="utf-8")))
    broken = []
    for link in ("".join(parts) for parts in LINK.findall(text)):
        address = urlsplit(link)
        if address.scheme or address.netloc:
            continue
        target = (file.parent / unquote(address.path)).resolve() if address.path else file
        is_ours = target.exists() and target.is_relative_to(root) and "_build" not in target.parts
        if not is_ours or (address.fragment and target.suffix == ".md" and address.fragment not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings_of_the_repository(file: Path) -> None:
    assert broken_links(file) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    assert anchors(DOCS / "reference" / "configuration.md") >= {"all-tasks", "snli_ve-and-vqa_gen"}
    folder = tmp_path / "repository"
    folder.mkdir()
    (tmp_path / "outside.md").touch()
    (folder / "other.md").write_text("# Other\n\n## A `b`: [c](d.md)?\n\n```bash\n# no heading\n```\n\n## A b c\n")
    good = (
        "[a](other.md) [a](other.md#a-b-c) [a](other.md#a-b-c-1) [a](#page) `[a](gone.md)` [a](https://localhost/gone)"
    )
    bad = "[b](gone.md) [b](other.md#no-heading) ![b](images/gone.svg) [b](../outside.md)"
    (folder / "page.md").write_text(f'# Page\n\n{good}\n{bad}\n<img src="gone.png">\n\n[b]: gone.txt\n')
    found = broken_links(folder / "page.md", folder)
    assert found == ["gone.md", "other.md#no-heading", "images/gone.svg", "../outside.md", "gone.png", "gone.txt"]


@pytest.mark.parametrize("section", ["tutorial", "how-to", "concepts", "reference"])
def test_index_pages_link_to_each_page_by_its_title(section: str) -> None:
    text = (DOCS / section / "index.md").read_text(encoding="utf-8")
    links = dict((target, title) for title, target in re.findall(r"\[([^]]+)\]\(([\w-]+\.md)\)", text))
    pages = {file.name: file.read_text(encoding="utf-8") for file in (DOCS / section).glob("*.md")}
    titles = {name: re.search(r"^# (.+)$", page, re.MULTILINE) for name, page in pages.items() if name != "index.md"}
    assert links == {name: found and found[1] for name, found in titles.items()}


# --- The built site --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of the site, which is built once for all processes of a test run."""
    pytest.importorskip("furo", reason="the site needs the extra docs: pip install 'narvl[docs]'")
    pytest.importorskip("myst_nb", reason="the site needs the extra docs: pip install 'narvl[docs]'")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with FileLock(f"{folder}.lock"):
        if not (folder / "built").is_file():
            options = ("--fail-on-warning", "--keep-going", "--quiet", "-D", "nb_execution_mode=off")
            done = subprocess.run(
                [sys.executable, "-c", WITHOUT_NETWORK, *options, DOCS, folder],
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            (folder / "built").touch()
    return folder


class Tags(HTMLParser):
    """The ids, the links and the addresses of what a browser loads by itself, in a page."""

    LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev", "index", "search", "author"):
            self.loaded.append(given.get("href", ""))
        if tag in self.LOADED and self.LOADED[tag] in given:
            self.loaded.append(given[self.LOADED[tag]])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Tags]:
    """Give the tags of all pages of the site."""
    return {file: Tags(file) for file in site.rglob("*.html")}


@pytest.mark.integration
def test_links_of_the_site_lead_to_files_and_anchors(pages: dict[Path, Tags]) -> None:
    broken = []
    for file, page in pages.items():
        for link in (*page.links, *page.loaded):
            address = urlsplit(link)
            if address.scheme or address.netloc or link == "#":
                continue
            target = (file.parent / unquote(address.path)).resolve() if address.path else file
            fragment = unquote(address.fragment)
            if not target.is_file() or (fragment and target in pages and fragment not in pages[target].ids):
                broken.append(f"{file.name}: {link}")
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 1000


@pytest.mark.integration
def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Tags]) -> None:
    for file, page in pages.items():
        assert [one for one in page.loaded if urlsplit(one).netloc or urlsplit(one).scheme not in ("", "data")] == [], (
            file
        )
    for style in site.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", style.read_text(encoding="utf-8"), flags=re.DOTALL)
        named = re.findall(r"url\([\"']?([^)\"']+)|@import\s+[\"']([^\"']+)", text)
        assert [one for one in map("".join, named) if re.match(r"(https?:)?//", one)] == [], style


@pytest.mark.parametrize(
    ("formula", "parts"),
    [
        (r"p(y) = \sum_{i < j} \prod_i z_i", ["<munder>", "∑", "∏", "&lt;"]),
        (r"\Big( \frac{1}{n} \big| \text{share} \big|", ["<mfrac>", "<mtext>share</mtext>", "|"]),
        (r"y_1, \dots, y_K", ["<msub>", "…"]),
    ],
)
def test_formulas_are_drawn_by_the_browser_itself(
    formula: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = pytest.importorskip("docutils.nodes", reason="the site needs the extra docs: pip install 'narvl[docs]'")
    monkeypatch.syspath_prepend(DOCS / "_ext")
    mathml = importlib.import_module("mathml")
    written = mathml.formula(nodes.math(formula, formula), is_block=True)
    assert written.startswith("<math") and all(part in written for part in parts)


@pytest.mark.integration
def test_the_python_page_describes_what_people_import(site: Path, pages: dict[Path, Tags]) -> None:
    file = site / "reference" / "python.html"
    assert {f"narvl.{name}" for name in narvl.__all__} <= pages[file].ids
    text = re.sub(r"<[^>]+>", "", file.read_text(encoding="utf-8"))
    assert "(B, N, V), of any float type, unnormalised." in text
    assert [one for one in ("``", ":param", ":rtype:", ":class:", " -- ", "Args:", "Attributes:") if one in text] == []


# --- In a browser ----------------------------------------------------------------------------------------------------


class Handler(SimpleHTTPRequestHandler):
    """Serves files, and writes no log."""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Write nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Give the address of a server of the site."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Give a browser; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """Give a page of a desktop's width; at the end, nothing may have gone to another host or failed."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page.set_default_timeout(15_000)
    addresses, complaints = [], []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    page.close()
    assert addresses
    assert [one for one in addresses if not one.startswith((f"{address}/", "data:"))] == []
    assert [one for one in complaints if "favicon" not in one and "404" not in one] == []


@pytest.mark.integration
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("how do I fine-tune on my own captions", "how-to/own-tsv"),
        ("how sure is it", "concepts/confidence"),
        ("How sure is it?", "concepts/confidence"),
        ("why is it only 1.4 times as fast on my CPU", "concepts/speed-up"),
        ("calibrate confidence", "how-to/calibrate"),
        ("export a student", "how-to/export"),
        ("install", "how-to/install"),
        ("where do I get a checkpoint", "how-to/ofa-checkpoints"),
        ("use a Hugging Face port", "how-to/ofa-ports"),
        ("security", "reference/security"),
        ("prefix_beam_search", "reference/python"),
    ],
)
def test_the_first_result_of_the_search_answers_a_question(question: str, answer: str, page: Any, address: str) -> None:
    page.goto(f"{address}/index.html")
    field = page.locator("input[name=q]").first
    field.fill(question)
    field.press("Enter")
    page.get_by_text("Search finished").wait_for()
    first = page.locator("#search-results ul.search li a").first
    first.click()
    page.wait_for_url(re.compile(rf"{re.escape(f'{address}/{answer}')}\.html"))
    title = re.search(r"^# (.+)$", (DOCS / f"{answer}.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert title is not None
    assert title[1] in page.locator("h1").inner_text()


@pytest.mark.integration
def test_no_page_is_wider_than_a_phone(site: Path, pages: dict[Path, Tags], page: Any, address: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    wide = {}
    for file in pages:
        name = file.relative_to(site).as_posix()
        if name.startswith("_modules/"):
            continue
        page.goto(f"{address}/{name}", wait_until="load")
        width = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        if width > 390:
            wide[name] = width
    assert wide == {}
