"""The page of `narvl demo` in a browser without a window, and the server's beginning and end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

import narvl
from narvl_plugin.program import ENDINGS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
HERE = Path(narvl.__file__).parent


class Server(NamedTuple):
    """A server of the page, its address, and the folder of its temporary files."""

    process: subprocess.Popen[str]
    address: str
    temporary: Path


def start(checkpoint: Path, folder: Path) -> Server:
    """Start a server at a free port. It sees no internet: a request to another machine would fail."""
    pytest.importorskip("gradio", reason="the page needs the package gradio")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        **{"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
    }
    process = subprocess.Popen(
        [sys.executable, HERE / "narvl.py", "demo", checkpoint, "--device", "cpu", "--port", "0"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.match(r"(http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", line)
    if found is None:
        process.kill()
        raise AssertionError(f"the server did not start: {line!r} {process.communicate()[1]}")
    return Server(process, found[1], folder)


@pytest.fixture(scope="module")
def server(several_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Give a server of a random student of all tasks. It ends when it is asked to, while a browser may be connected."""
    server = start(several_tasks, tmp_path_factory.mktemp("demo"))
    yield server
    end(server, signal.SIGTERM)
    assert server.process.returncode == 143


def end(server: Server, number: signal.Signals) -> None:
    """End a server by a signal, while a stream is open that would never end. One line says so, and no file is left."""
    with urllib.request.urlopen(f"{server.address}/gradio_api/heartbeat/abc"):
        server.process.send_signal(number)
        _, complaints = server.process.communicate(timeout=30)
    assert complaints == f"{ENDINGS[number]}; start the same command again to go on\n"
    assert list(server.temporary.iterdir()) == [], "uploads are deleted, and nothing else is written"


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
def open_page(server: Server, browser: Any) -> Iterator[Any]:
    """Give a function that opens the page; at the end, nothing may have gone or failed to go to another machine."""
    pages, addresses, complaints = [], [], []

    def open_page(width: int = 1280, height: int = 900) -> Any:
        page = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
        page.set_default_timeout(60_000)  # the machine may be busy
        page.on("request", lambda request: addresses.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(server.address)
        page.locator("#ask").wait_for()
        page.locator("#result .text").wait_for()
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert addresses
    assert [one for one in addresses if not one.startswith((f"{server.address}/", "data:", "blob:"))] == []
    assert complaints == []


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(file)
    return file


def upload(page: Any, file: Path) -> None:
    """Upload an image, and wait until the page has loaded it from the server: the page then holds no other image."""
    with page.expect_response(lambda answer: "/gradio_api/file=" in answer.url and answer.url.endswith(file.name)):
        page.locator("#image input[type=file]").set_input_files(file)


def ask(page: Any) -> None:
    """Ask, and wait for another answer."""
    page.evaluate("document.querySelector('#result .narvl, #result .error').dataset.old = ''")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(":is(#result .narvl, #result .error):not([data-old])").wait_for()


@pytest.mark.integration
def test_an_uploaded_image_is_captioned_and_a_touched_token_shows_where_the_model_looked(
    open_page: Any, photo: Path
) -> None:
    page = open_page()
    upload(page, photo)
    ask(page)
    assert page.locator("#result .text").inner_text()
    assert page.locator("#result .queries li").count() == 8
    assert page.locator("#result svg").get_attribute("viewBox") == "0 0 40 30", "it is the uploaded image"
    shown = page.locator("#result svg image")
    plain = shown.get_attribute("href")
    token = page.locator("#result button[data-token]").first
    token.click()
    assert token.get_attribute("aria-pressed") == "true"
    assert shown.get_attribute("href") != plain
    assert page.locator("#result figcaption").inner_text().startswith("Bright where the model looked for")
    token.click()
    assert shown.get_attribute("href") == plain


@pytest.mark.integration
def test_questions_are_answered_and_an_empty_one_shows_its_reason(open_page: Any) -> None:
    page = open_page()
    page.get_by_label("Question").check()
    field = page.get_by_label("Your question")
    assert field.input_value(), "the example has a question"
    field.fill("{{what}} ${color} <b>is</b> it?")
    ask(page)
    assert page.locator("#result .text").inner_text()
    field.fill("")
    ask(page)
    assert page.get_by_role("alert").inner_text() == "the question is empty; answer needs one"


@pytest.mark.integration
def test_an_example_with_a_region_gets_its_box(open_page: Any) -> None:
    page = open_page()
    page.get_by_label("Region").check()
    page.get_by_label("Words for the region").wait_for()
    page.locator("#examples button").nth(2).click()
    page.locator("#result rect").first.wait_for()
    assert page.locator("#result rect").count() == 2, "a box with a rim"
    assert page.locator("#result .text").inner_text().startswith("box from ")
    assert page.get_by_label("Words for the region").input_value()


@pytest.mark.integration
def test_bad_images_and_missing_ones_show_their_reason(open_page: Any, tmp_path: Path) -> None:
    page = open_page()
    page.get_by_label("Remove Image").click()
    ask(page)
    assert page.get_by_role("alert").inner_text() == "there is no image; upload one, or choose an example"
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    upload(page, tmp_path / "broken.png")
    ask(page)
    assert page.get_by_role("alert").inner_text().startswith("broken.png: the image is not readable")


@pytest.mark.integration
def test_the_keyboard_is_enough(open_page: Any) -> None:
    page = open_page()
    focused = "document.activeElement.matches({!r})".format

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(focused(selector)):
                style = "(({outlineStyle, outlineWidth}) => outlineStyle + ' ' + outlineWidth)"
                assert page.evaluate(f"{style}(getComputedStyle(document.activeElement))") == "solid 3px"
                return
        raise AssertionError(f"no Tab leads to {selector}")

    tab_to("#examples button[data-number='1']")
    tab_to("#verbs input[value=entails]")
    page.keyboard.press("Space")
    page.locator("#words textarea, #words input").wait_for()
    tab_to("#words :is(textarea, input)")
    page.keyboard.type("there are two dogs")
    page.evaluate("document.querySelector('#result .narvl').dataset.old = ''")
    page.keyboard.press("Enter")
    page.locator("#result .narvl:not([data-old])").wait_for()
    assert page.locator("#result .text").inner_text() in ("yes", "no", "maybe")
    tab_to("#result button[data-token]")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(one => one.offsetParent && "
        "!(one.innerText || one.ariaLabel || one.title || one.labels?.length)).map(one => one.outerHTML)"
    )
    assert unnamed == [], "everything that can be used has a name"


@pytest.mark.integration
def test_a_phone_has_room_for_it(open_page: Any) -> None:
    page = open_page(390, 844)
    ask(page)
    page.get_by_role("button", name="Options").click()
    widths = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
    assert max(widths) <= 390
    beyond = page.evaluate(
        "[...document.querySelectorAll('#result *, #examples *, #verbs *')]"
        ".filter(one => one.getBoundingClientRect().right > 390).length"
    )
    assert beyond == 0


@pytest.mark.integration
def test_the_page_itself_names_nothing_that_a_browser_loads_from_elsewhere(server: Server) -> None:
    with urllib.request.urlopen(f"{server.address}/") as answer:
        text = answer.read().decode()
    # What is left are tags for pages that preview links, which no browser loads.
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(\w+:)?//""", text)
    assert loaded == []
    assert '"analytics_enabled":false' in text and "fonts.g" not in text


@pytest.mark.integration
def test_ctrl_c_ends_it(several_tasks: Path, tmp_path: Path) -> None:
    server = start(several_tasks, tmp_path)
    end(server, signal.SIGINT)
    assert server.process.returncode == 130


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["narvl", "demo", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        narvl.main()  # type: ignore[attr-defined]
    return int(ended.value.code or 0)


def test_a_port_that_is_taken_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run(monkeypatch, "--port", port) == 1
    assert capsys.readouterr().err == (
        f"narvl: --host 127.0.0.1 --port {port}: cannot be listened at (Address already in use); choose another by "
        "--port or --host\n"
    )
    assert run(monkeypatch, "--host", "no-such-host.invalid") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_help_imports_neither_torch_nor_gradio() -> None:
    script = (
        "import sys, contextlib; sys.argv = ['narvl', 'demo', '--help']; import narvl\n"
        "with contextlib.suppress(SystemExit): narvl.main()\n"
        "assert not {'torch', 'gradio'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": str(HERE)}, check=True, capture_output=True)
