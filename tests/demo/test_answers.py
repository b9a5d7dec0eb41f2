"""The functions behind the page: what models are asked, and how their answers are shown."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import narvl
from narvl_plugin.api import FoundTriplet
from narvl_plugin.demo.answers import LONGEST_TEXT, Answer, Asked, ask
from narvl_plugin.demo.examples import CHOSEN, draw_examples
from narvl_plugin.demo.view import asked_html, error_html, slow_motion
from narvl_plugin.errors import InputError

TEXTS = {"caption": "", "answer": "what color is the cat?", "locate": "the cat", "entails": "a cat sits"}


@pytest.fixture
def models(several_tasks: Path) -> dict[str, narvl.Model]:
    return {"Model": narvl.load(several_tasks, device="cpu")}


@pytest.fixture
def image() -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("verb", TEXTS)
def test_an_answer_has_its_time_and_a_heat_map_for_each_token(
    models: dict[str, narvl.Model], image: bytes, verb: str
) -> None:
    asked = ask(models, verb, image, "cat.png", TEXTS[verb], 3)
    answer = asked.answers["Model"]
    assert asked.image.size == (40, 30)
    assert answer.prediction is not None and answer.seconds > 0
    assert len(answer.heat_maps) == len(answer.prediction.tokens)
    shown = asked_html(asked)
    meaning = " in exactly these words" if verb == "caption" else ""
    assert f"confidence {answer.prediction.confidence:.3f}{meaning}</span>" in shown
    assert f"{len(answer.prediction.queries)} queries, all at once" in shown
    heats = json.loads(html.unescape(re.findall(r'data-heats="([^"]*)"', shown)[0]))
    assert [text for text, _ in heats] == [token.text.strip() for token in answer.prediction.tokens]
    touchable = {int(number) for number in re.findall(r'data-token="(\d+)"', shown)}
    assert touchable == set(range(len(heats))), "each token can be touched, and each heat map reached"
    assert shown.count('class="blank') - ('<i class="blank"' in shown) == sum(
        query.kind == "blank" for query in answer.prediction.queries
    )
    assert (shown.count("<rect") > 0) == (verb == "locate")
    assert "http:" not in shown.replace("http://www.w3.org/2000/svg", "") and "https:" not in shown


def test_all_boxes_are_drawn_with_their_numbers(write_regions: Callable[[str], Path], image: bytes) -> None:
    models = {"Model": narvl.load(write_regions("narvl"), device="cpu")}
    asked = ask(models, "regions", image, "cat.png", "every cat", 3)
    found = asked.answers["Model"].prediction
    assert found is not None and len(found.boxes) > 1
    shown = asked_html(asked)
    assert f'<p class="text">{len(found.boxes)} regions</p>' in shown
    assert re.findall(r"<text [^>]*>(\d)</text>", shown) == [str(number + 1) for number in range(len(found.boxes))]
    assert all(f"<td>{one.probability:.3f}</td>" in shown for one in found.boxes)
    assert f"confidence {found.confidence:.3f} that all of this is right, and nothing is missing</span>" in shown
    one = ask(models, "locate", image, "cat.png", "every cat")
    assert '<p class="text">box from ' in asked_html(one) and asked_html(one).count("<rect") == 2


def test_a_graph_is_drawn_beside_the_boxes_of_its_objects(write_graphs: Callable[[str], Path], image: bytes) -> None:
    asked = ask({"Model": narvl.load(write_graphs("narvl"), device="cpu")}, "graph", image, "cat.png", "")
    found = asked.answers["Model"].prediction
    assert found is not None and found.triplets
    shown = asked_html(asked)
    assert '<div class="graph"><svg' in shown and shown.count("<rect ") >= 2
    assert all(f"</td><td>{one.probability:.3f}</td>" in shown for one in found.triplets)


def test_objects_of_one_noun_are_numbered_wherever_they_are_named() -> None:
    one, two, hat = (0.0, 0.0, 9.0, 9.0), (20.0, 0.0, 29.0, 9.0), (1.0, 0.0, 9.0, 9.0)
    triplets = (
        FoundTriplet("dog", one, "left of", "dog", two, 0.75),
        FoundTriplet("dog", (0.0, 0.0, 9.0, 8.0), "costs $5 to $9 more than", "hat", hat, 0.5),
    )
    image = Image.new("RGB", (40, 30))
    found = narvl.Prediction("", 0.5, (), (), (), triplets=triplets, task="scene_graph", image=image)
    shown = asked_html(Asked(image, {"Model": Answer(found)}))
    assert "<td>dog 1 left of dog 2</td><td>0.750</td>" in shown
    assert "<td>dog 1 costs $5 to $9 more than hat</td>" in shown, "both first boxes are of one dog"
    boxes, _, graph = shown.partition('<div class="graph">')
    assert re.findall(r"<text [^>]*>([^<]*)</text>", boxes) == ["dog 1", "dog 2", "hat"]
    for name in ("dog 1", "dog 2", "hat", "left of", "costs $5 to $9 more than"):
        assert f">{name}</text>" in graph, "and no formula"


def test_an_empty_set_says_so() -> None:
    for task, words in {"regions": "no such region", "scene_graph": "no relations"}.items():
        empty = Answer(narvl.Prediction("", 0.5, (), (), (), task=task))
        shown = asked_html(Asked(Image.new("RGB", (4, 4)), {"Model": empty}))
        assert words in shown and "abstained" not in shown


def test_a_page_opens_with_the_verbs_of_the_model(
    write_regions: Callable[[str], Path], write_graphs: Callable[[str], Path]
) -> None:
    page = pytest.importorskip("narvl_plugin.demo.page", reason="the page needs the package gradio")
    for checkpoint, verbs in ((write_regions("narvl"), ["regions", "locate"]), (write_graphs("narvl"), ["graph"])):
        built = page.build_page({"Model": narvl.load(checkpoint, device="cpu")}, draw_examples())
        (radio,) = [block for block in built.blocks.values() if block.elem_id == "verbs"]
        assert [value for _, value in radio.choices] == verbs
    other = narvl.load(write_graphs("narvl"), device="cpu")
    other.engines = {"sing": other.engines["graph"]}
    with pytest.raises(InputError, match="graphs.pt: has sing; narvl demo shows caption, answer, regions"):
        page.build_page({"Model": other}, draw_examples())


def test_the_number_of_alternatives_and_abstention_are_the_visitors(
    models: dict[str, narvl.Model], image: bytes
) -> None:
    found = ask(models, "caption", image, "cat.png", "", 4).answers["Model"].prediction
    assert found is not None and len(found.alternatives) == 4
    abstained = ask(models, "caption", image, "cat.png", "", None, 1)
    assert "the model abstained" in asked_html(abstained)


@pytest.mark.parametrize(
    ("verb", "text", "alternatives", "abstain_below", "message"),
    [
        ("answer", "", 5, 0, "the question is empty"),
        ("locate", "  ", 5, 0, "is empty"),
        ("answer", None, 5, 0, "the question is empty"),
        ("answer", ["a"], 5, 0, "the question is empty"),
        ("answer", "a" * (LONGEST_TEXT + 1), 5, 0, "the text has 501 characters"),
        ("predict", "", 5, 0, "the model cannot 'predict'; it has caption"),
        ({"a": 1}, "", 5, 0, "the model cannot"),
        ("caption", "", 11, 0, "11 alternatives: choose 1 to 10"),
        ("caption", "", 0, 0, "0 alternatives"),
        ("caption", "", "many", 0, "'many' alternatives"),
        ("caption", "", 5, 2, "expected a confidence from 0 to 1"),
        ("caption", "", 5, float("nan"), "expected a confidence from 0 to 1"),
        ("caption", "", 5, "high", "is not a number"),
    ],
)
def test_what_cannot_be_answered_has_a_reason_of_one_line(
    models: dict[str, narvl.Model],
    image: bytes,
    verb: Any,
    text: Any,
    alternatives: Any,
    abstain_below: Any,
    message: str,
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        ask(models, verb, image, "cat.png", text, alternatives, abstain_below)
    assert "\n" not in str(raised.value)


def test_a_bad_image_is_named(models: dict[str, narvl.Model]) -> None:
    with pytest.raises(InputError, match=r"^cat.png: the image is not readable"):
        ask(models, "caption", b"no image at all", "cat.png", "")


@pytest.mark.integration
def test_a_teacher_stands_beside_its_student_and_is_slower_by_the_token(
    models: dict[str, narvl.Model], image: bytes, write_checkpoint: Callable[..., Path], answer_vocabulary: Path
) -> None:
    options = {"bpe_dir": str(answer_vocabulary), "patch_image_size": 32, "eval_args": '{"beam": 2, "max_len_b": 5}'}
    models["Teacher"] = narvl.load(write_checkpoint("teacher.pt", "ofa", "caption", **options), device="cpu")
    asked = ask(models, "caption", image, "cat.png", "", 1, 0.0)
    taught = asked.answers["Teacher"].prediction
    assert taught is not None and not taught.queries
    shown = asked_html(asked)
    assert shown.index("<h2>Model</h2>") < shown.index("<h2>Teacher</h2>")
    assert re.findall(r"--steps: (\d+)", shown) == ["1", str(len(taught.tokens))]
    assert f"{len(taught.tokens)} tokens, one by one" in shown and "ms a token" in shown
    refused = ask(models, "answer", image, "cat.png", "what is it?", 1)
    assert refused.answers["Model"].prediction is not None
    assert refused.answers["Teacher"].reason.endswith("was not trained for answer; it has caption")
    assert "was not trained for answer" in asked_html(refused)


def test_answers_are_slowed_down_until_they_can_be_watched() -> None:
    assert slow_motion([0.002, 0.05]) == 50
    assert slow_motion([0.1, 3.0]) == 1
    assert slow_motion([0.0, 0.0]) == 1000


def test_texts_are_no_html() -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    prediction = narvl.Prediction(evil, 0.5, (), (), ())
    for shown in (error_html(evil), asked_html(Asked(Image.new("RGB", (4, 4)), {evil: Answer(prediction)}))):
        assert "<img" not in shown and "&lt;img" in shown


def test_examples_are_the_same_each_time_and_have_texts_for_each_verb() -> None:
    examples, again = draw_examples(), draw_examples()
    assert len(examples) == len(CHOSEN) <= 8
    assert [one.image.tobytes() for one in examples] == [one.image.tobytes() for one in again]
    assert [one.texts for one in examples] == [one.texts for one in again]
    for one in examples:
        assert one.name and set(one.texts) == {"answer", "regions", "locate", "entails"} and all(one.texts.values())
