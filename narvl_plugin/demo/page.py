"""The page, in Gradio."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from narvl_plugin.api import Model
from narvl_plugin.demo.answers import MOST_ALTERNATIVES, ask
from narvl_plugin.demo.examples import Example
from narvl_plugin.demo.gate import MAX_UPLOAD
from narvl_plugin.demo.view import asked_html, error_html, examples_html
from narvl_plugin.errors import InputError

VERBS = {
    "caption": ("Caption", "", ""),
    "answer": ("Question", "Your question", "what color is the background"),
    "regions": ("All regions", "Words for the regions", "every dog"),
    "locate": ("Region", "Words for the region", "the dog on the left"),
    "graph": ("Graph", "", ""),
    "tree": ("Tree", "", ""),
    "entails": ("Statement", "Your statement", "there are two dogs"),
}
"""Verb -> its name on the page, the label of its text, and an example of a text."""
ALTERNATIVES = 5
"""Number of alternatives at first. Side by side it is 1, as more of them take longer, and times are compared."""
WAITING = 16
"""Largest number of questions that wait for the model."""
NAME_VERBS = "() => document.querySelector('#verbs').setAttribute('aria-label', 'Ask for')"
"""Gives the group of verbs its name, which Gradio shows, but does not tell to screen readers."""
KEPT = 3600
"""Time for which uploaded files are kept, in seconds."""

CSS = Path(__file__).with_name("page.css")
FONT = ("system-ui", "sans-serif")
MONOSPACED = ("ui-monospace", "monospace")


def build_page(models: Mapping[str, Model], examples: list[Example]) -> gr.Blocks:
    """Build the page. The first example is answered at once, so that the page opens with an answer.

    Args:
        models: the models by their names. The verbs are those of the first.
        examples: the example images.

    Raises:
        InputError: if the page can show none of the verbs.
    """
    first = next(iter(models.values()))
    verbs = [verb for verb in VERBS if verb in first.verbs]
    if not verbs:
        raise InputError(f"{first.name}: has {', '.join(first.verbs)}; narvl demo shows {', '.join(VERBS)}")
    alternatives = ALTERNATIVES if len(models) == 1 else 1

    def answer(image: Any, verb: Any, text: Any, alternatives: Any, abstain_below: Any) -> str:
        """Return the answers to what a visitor sent, which Gradio hands on as it came."""
        try:
            path = image.get("path") if isinstance(image, dict) else None
            if not isinstance(path, str):
                raise InputError("there is no image; upload one, or choose an example")
            file = Path(path)
            return asked_html(ask(models, verb, _read(file), file.name[-80:], text, alternatives, abstain_below))
        except InputError as error:
            return error_html(str(error))

    def choose_example(verb: Any, chosen: gr.EventData) -> tuple[Any, Any, int]:
        """Return the image and the text of an example, and its number."""
        number = chosen._data["number"]
        if number not in range(len(examples)):
            raise gr.Error("There is no such example.")
        return examples[number].image, _text_field(verb, examples[number]), number

    def choose_verb(verb: Any, number: int | None) -> Any:
        """Return the field for the text of a verb, with the example's text if there is an example."""
        return _text_field(verb, None if number is None else examples[number])

    opening = examples[0]
    text = opening.texts.get(verbs[0], "")
    for _ in range(2):  # a model's first pass takes longer, and times are shown
        asked = ask(models, verbs[0], opening.image, "the example", text, alternatives)
    opened = asked_html(asked)
    with gr.Blocks(title="narvl", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as page:
        _html(_header_html(first, len(models) > 1), elem_id="top", js_on_load=None)
        example = gr.State(0)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    opening.image,
                    format="png",  # examples keep their pixels
                    label="Image",
                    sources=["upload", "webcam", "clipboard"],
                    height=300,
                    buttons=[],
                    elem_id="image",
                    placeholder="Drop an image here",
                    alt_text="your image",
                )
                gallery = _html(examples_html(examples), elem_id="examples", js_on_load=_script("examples.js"))
                verb = gr.Radio(
                    [(VERBS[one][0], one) for one in verbs], value=verbs[0], label="Ask for", elem_id="verbs"
                )
                words = _text_field(verbs[0], opening)
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                with gr.Accordion("Options", open=False):
                    number = gr.Slider(1, MOST_ALTERNATIVES, alternatives, step=1, label="Alternatives")
                    abstain = gr.Slider(0, 1, 0, step=0.05, label="Abstain below this confidence")
            with gr.Column(scale=3, min_width=300):
                result = _html(opened, elem_id="result", js_on_load=_script("result.js"))
        asking: dict[str, Any] = {
            "fn": answer,
            "inputs": [image, verb, words, number, abstain],
            "outputs": result,
            "preprocess": False,  # Gradio would open images in any format; they stay files until `ask` reads them
            "show_progress": "minimal",
            "concurrency_id": "models",
            "api_visibility": "private",
        }
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(None, js=NAME_VERBS)
        button.click(**asking)
        words.submit(**asking)
        gallery.click(choose_example, verb, [image, words, example], **quick).then(**asking)
        verb.input(choose_verb, [verb, example], words, **quick)
        image.input(lambda: None, None, example, **quick)
        image.clear(lambda: None, None, example, **quick)
    page.queue(max_size=WAITING, api_open=False, default_concurrency_limit=1)
    return page


def mount(app: Any, page: gr.Blocks) -> None:
    """Mount the page on an application of FastAPI, without anything that would be loaded from elsewhere."""
    colors = gr.themes.colors
    theme = gr.themes.Base(primary_hue=colors.blue, neutral_hue=colors.slate, font=FONT, font_mono=MONOSPACED).set(
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700"
    )
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme,
        css_paths=[CSS],
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )


def _html(content: str, **options: Any) -> gr.HTML:
    """Return a piece of HTML in our own style."""
    return gr.HTML(content, apply_default_css=False, **options)


def _script(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _text_field(verb: Any, example: Example | None) -> gr.Textbox:
    """Return the field for the text of a verb; hidden for verbs that read none."""
    _, label, placeholder = VERBS.get(verb, ("", "", ""))
    return gr.Textbox(
        example.texts.get(verb, "") if example else "",
        label=label or "Text",
        placeholder=placeholder,
        visible=bool(label),
        lines=1,
        max_lines=1,
        elem_id="words",
    )


def _read(file: Path) -> bytes:
    """Return the bytes of an uploaded file."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError("the image is no longer there; upload it again") from error


def _header_html(model: Model, compared: bool) -> str:
    """Return the head of the page."""
    about = "The student predicts all tokens at once, the teacher one after the other. "
    return (
        f"<header><h1>narvl</h1><p>Ask a model about an image. {about if compared else ''}"
        f"<span>Model: {escape(model.name)}</span></p></header>"
    )
