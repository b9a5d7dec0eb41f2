"""`narvl.load` and its verbs: images of all kinds, several tasks, decoding, errors, threads."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import narvl
from narvl_plugin.api.prediction import box_text
from narvl_plugin.ctc import LengthRange
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.tasks import loading
from narvl_plugin.tasks.regions import RegionsTask

TEXTS = {"caption": None, "answer": "what color is the cat?", "locate": "the cat", "entails": "a cat sits"}


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8))


@pytest.fixture
def student(several_tasks: Path) -> narvl.Model:
    return narvl.load(several_tasks, device="cpu")


def test_verbs_are_those_that_it_was_trained_for(student: narvl.Model, write_checkpoint: Any, vocabulary: Path) -> None:
    assert student.verbs == ("caption", "answer", "locate", "entails")
    one = narvl.load(write_checkpoint("one.pt", "narvl", "caption", bpe_dir=str(vocabulary), patch_image_size=32))
    assert one.verbs == ("caption",)
    with pytest.raises(narvl.InputError, match=r"one.pt: was not trained for locate; it has caption$"):
        one.locate(Image.new("RGB", (8, 6)), "a cat")


@pytest.fixture
def regions(write_regions: Callable[[str], Path]) -> narvl.Model:
    return narvl.load(write_regions("narvl"), device="cpu")


PHRASES = ["every cat", "all dogs", "nothing", "everything but the cats"]


@pytest.mark.parametrize("family", ["narvl", "ofa"])
def test_all_boxes_of_a_phrase_are_found_the_most_probable_first(
    write_regions: Callable[[str], Path], image: Image.Image, family: str
) -> None:
    model = narvl.load(write_regions(family), device="cpu")
    assert model.verbs == ("regions", "locate")
    predictions = model.locate(image, PHRASES, all=True)
    assert any(len(found.boxes) > 1 for found in predictions)
    for found in predictions:
        assert found.box is None and found.alternatives[0].box is None
        assert found.text == "&&".join(",".join(f"{edge:.6g}" for edge in box) for box, _ in found.boxes)
        assert found.text == found.alternatives[0].text
        probabilities = [one.probability for one in found.boxes]
        assert probabilities == sorted(probabilities, reverse=True)
        for (left, upper, right, lower), probability in found.boxes:
            assert 0 <= left <= right <= 8 and 0 <= upper <= lower <= 6
            assert found.confidence - 1e-6 <= probability <= 1
        record = json.loads(json.dumps(found.to_dict()))
        assert [one["probability"] for one in record["boxes"]] == probabilities
    with pytest.raises(narvl.InputError, match="constraint"):
        model.locate(image, "every cat", all=True, constraint=LengthRange(1, 2))


def test_boxes_are_sorted_by_their_probabilities(
    regions: narvl.Model, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, *others = (found.box for found in regions.locate(image, PHRASES[0], all=True).boxes)
    shares = [0.25, *(0.5 + 0.01 * number for number in range(len(others)))]
    monkeypatch.setattr(RegionsTask, "element_confidences", lambda task, beam: shares)
    found = regions.locate(image, PHRASES[0], all=True)
    assert [box.probability for box in found.boxes] == shares[::-1]
    assert found.text == found.alternatives[0].text == "&&".join(map(box_text, (box for box, _ in found.boxes)))
    assert regions.locate(image, PHRASES[0]).box == found.boxes[0].box != found.boxes[-1].box
    assert {box for box, _ in found.boxes} == {one, *others} and others


def test_without_all_a_model_of_regions_gives_the_most_probable_box(regions: narvl.Model, image: Image.Image) -> None:
    for found, all_of_them in zip(
        regions.locate(image, PHRASES), regions.locate(image, PHRASES, all=True), strict=True
    ):
        first = all_of_them.boxes[0]
        assert (found.box, found.confidence) == (first.box, pytest.approx(first.probability, abs=1e-6))
        assert found.text == ",".join(f"{edge:.6g}" for edge in first.box)
        assert found.boxes == () and len(found.alternatives) == 1
        assert len(found.attention()) == len(found.tokens)
        three = regions.locate(image, found.prompt, nbest=3).alternatives
        assert [one.box for one in three] == [
            one.box for one in regions.locate(image, found.prompt, all=True).boxes[:3]
        ]


def test_without_a_region_there_is_no_box(
    regions: narvl.Model, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = regions.predict("regions", image, "cats")
    nothing = replace(nothing, text="", boxes=(), confidence=0.75)
    monkeypatch.setattr(type(regions.engine("regions")), "predict", lambda *given: [nothing])
    found = regions.locate(image, "cats")
    assert (found.box, found.text, found.confidence) == (None, "", 0.75)
    assert [one.text for one in found.alternatives] == [""]


@pytest.mark.parametrize("family", ["narvl", "ofa"])
def test_a_graph_has_its_triplets_the_most_probable_first(
    write_graphs: Callable[[str], Path], image: Image.Image, family: str
) -> None:
    model = narvl.load(write_graphs(family), device="cpu")
    assert model.verbs == ("graph",)
    one, other = model.graph([image, Image.new("RGB", (8, 6), "red")], batch_size=1)
    if family == "narvl":
        assert one.triplets and other.triplets
    else:  # this teacher's best graph is empty; the next ones are not
        assert any(" | " in found.text for found in model.graph(image, nbest=5).alternatives)
    for found in (one, other):
        assert (found.box, found.boxes) == (None, ())
        probabilities = [triplet.probability for triplet in found.triplets]
        assert probabilities == sorted(probabilities, reverse=True)
        assert found.text.count(" | ") == 2 * len(found.triplets)
        for triplet in found.triplets:
            assert triplet.subject in ("dog", "red hat", "red") and triplet.relation in ("on", "left of")
            for left, upper, right, lower in (triplet.subject_box, triplet.object_box):
                assert 0 <= left <= right <= 8 and 0 <= upper <= lower <= 6
            assert found.confidence - 1e-6 <= triplet.probability <= 1
        record = json.loads(json.dumps(found.to_dict()))["triplets"]
        assert [one["object_box"] for one in record] == [list(one.object_box) for one in found.triplets]


def test_a_graph_of_improbable_triplets_is_left_empty(write_graphs: Callable[[str], Path], image: Image.Image) -> None:
    model = narvl.load(write_graphs("narvl"), device="cpu")
    best = max(one.probability for one in model.graph(image).triplets)
    assert model.graph(image, abstain_below=best).triplets
    assert not model.graph(image, abstain_below=min(1, best + 1e-3)).triplets


def test_options_that_are_not_for_graphs_are_refused(write_graphs: Callable[[str], Path], image: Image.Image) -> None:
    model = narvl.load(write_graphs("narvl"), device="cpu")
    with pytest.raises(narvl.InputError, match="constraint: is not for boxes"):
        model.graph(image, constraint=LengthRange(1, 2))
    with pytest.raises(narvl.InputError, match="scene_graph has no list of answers"):
        model.graph(image, answers=["dog"])


def test_models_of_other_tasks_name_what_they_can_do(
    student: narvl.Model, regions: narvl.Model, image: Image.Image
) -> None:
    message = r"was not trained for regions \(all boxes of a text\); it has caption, answer, locate, entails$"
    with pytest.raises(narvl.InputError, match=message):
        student.locate(image, "cats", all=True)
    with pytest.raises(narvl.InputError, match="was not trained for graph; it has caption, answer, locate, entails$"):
        student.graph(image)
    with pytest.raises(narvl.InputError, match="was not trained for caption; it has regions, locate$"):
        regions.caption(image)


@pytest.mark.parametrize("family", ["narvl", "ofa"])
def test_a_model_of_trees_predicts_a_tree_with_probabilities(
    write_checkpoint: Any, tree_vocabulary: Path, tree_names_file: Path, image: Image.Image, family: str
) -> None:
    options = {"bpe_dir": str(tree_vocabulary), "patch_image_size": 32, "num_bins": 0}
    file = write_checkpoint("tree.pt", family, "scene_tree", names_file=str(tree_names_file), **options)
    model = narvl.load(file, device="cpu")
    assert model.verbs == ("tree",)
    found = model.tree(image)
    assert (found.box, found.boxes) == (None, ())

    def in_brackets(node: dict[str, Any]) -> str:
        assert 0 <= node["probability"] <= 1
        return " ".join(("(", node["label"], *map(in_brackets, node["children"]), ")"))

    assert found.tree is not None and found.tree["probability"] == found.confidence
    assert in_brackets(found.tree) == found.text
    assert json.loads(json.dumps(found.to_dict()))["tree"] == found.tree
    if family == "narvl":
        assert model.tree([image], abstain_below=1.0)[0].tree is None


@pytest.mark.parametrize("verb", TEXTS)
def test_each_verb_predicts(student: narvl.Model, image: Image.Image, verb: str) -> None:
    words = [] if TEXTS[verb] is None else [TEXTS[verb]]
    found = getattr(student, verb)(image, *words)
    assert 0 <= found.confidence <= 1
    spoken = "".join(query.text for query in found.queries if query.kind == "token")
    assert spoken == "".join(token.text for token in found.tokens)
    assert found.alternatives[0].text == found.text
    if verb == "locate":
        left, upper, right, lower = found.box
        assert 0 <= left <= right <= 8 and 0 <= upper <= lower <= 6
    else:
        assert found.box is None
    if verb == "entails":
        assert {one.text for one in found.alternatives} == {"yes", "no", "maybe"}
        assert sum(one.confidence for one in found.alternatives) == pytest.approx(1, abs=1e-5)
    record = json.loads(json.dumps(found.to_dict()))
    assert record["text"] == found.text and len(record["queries"]) == len(found.queries)
    assert 'class="narvl"' in found._repr_html_()
    assert ("in exactly these words" in found._repr_html_()) == (verb == "caption")


def test_an_image_may_come_in_any_form(student: narvl.Model, image: Image.Image, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    image.save(file)
    pixels = np.asarray(image)
    with open(file, "rb") as stream:
        forms = [
            *(file, str(file), file.read_bytes(), bytearray(file.read_bytes()), io.BytesIO(file.read_bytes()), stream),
            *(image, pixels, torch.tensor(pixels).permute(2, 0, 1), pixels.astype(np.float32) / 255),
            np.dstack([pixels, np.full((6, 8), 255, np.uint8)]),
        ]
        found = student.caption(forms)
    assert len(found) == len(forms)
    assert len({one.text for one in found}) == 1
    assert [one.confidence for one in found] == pytest.approx([found[0].confidence] * len(forms), rel=1e-3)
    gray = pixels[..., 0]
    same = student.caption([gray, gray[..., None], torch.tensor(gray)[None], Image.fromarray(gray)])
    assert [one.confidence for one in same] == pytest.approx([same[0].confidence] * 4, rel=1e-3)


def test_one_image_gives_one_prediction_and_a_list_gives_a_list(student: narvl.Model, image: Image.Image) -> None:
    other = Image.new("RGB", (8, 6), "red")
    questions = ["what color?", "how many cats?", "is it red?"]
    one_by_one = [student.answer(image, question) for question in questions]
    for found in (student.answer(image, questions), student.answer([image] * 3, questions, batch_size=2)):
        assert [one.text for one in found] == [one.text for one in one_by_one]
        assert [one.prompt for one in found] == questions
        assert [one.confidence for one in found] == pytest.approx([one.confidence for one in one_by_one], rel=1e-3)
    assert [one.prompt for one in student.answer([image, other], "what color?")] == ["what color?"] * 2
    assert student.caption([]) == []
    with pytest.raises(InputError, match="2 images and 3 texts"):
        student.answer([image, other], questions)


def test_an_answer_is_one_of_a_list_of_ones_own(student: narvl.Model, image: Image.Image) -> None:
    colors = ["red", "blue", "a cat"]
    found = student.answer(image, "what color is it?", answers=colors)
    assert {one.text for one in found.alternatives} == set(colors)
    assert sum(one.confidence for one in found.alternatives) == pytest.approx(1, abs=1e-5)
    confidences = [one.confidence for one in found.alternatives]
    assert confidences == sorted(confidences, reverse=True)
    assert found.text == found.alternatives[0].text
    assert len(student.answer(image, "what color is it?", answers=colors, nbest=2).alternatives) == 2


def test_options_say_how_to_search(student: narvl.Model, image: Image.Image) -> None:
    wide = student.caption(image, beam=5, nbest=3)
    assert len(wide.alternatives) == 3
    assert len({one.text for one in wide.alternatives}) == 3
    scores = [one.confidence for one in wide.alternatives]
    assert scores == sorted(scores, reverse=True)
    assert len(student.caption(image, constraint=LengthRange(2, 2)).tokens) == 2
    assert student.caption(image, abstain_below=1.0).text == ""
    assert student.caption(image).text != ""


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("caption", {"beem": 3}, "there is no option beem; the options are beam, nbest, answers"),
        ("caption", {"beam": 0}, "beam=0: expected a whole number above 0"),
        ("caption", {"abstain_below": 2}, "abstain_below=2: expected a confidence from 0 to 1"),
        ("caption", {"batch_size": 0}, "batch_size=0: expected a whole number above 0"),
        ("caption", {"answers": ["a"]}, "the task caption has no list of answers"),
        ("answer", {"answers": []}, "answers: the list is empty"),
        ("answer", {"answers": "red"}, "answers: expected a list of texts"),
        ("answer", {"answers": ["a cat " * 20]}, "queries have no path .*; allow shorter outputs by answers"),
        ("caption", {"constraint": LengthRange(20, 20)}, "; allow shorter outputs by answers or constraint"),
        ("locate", {"constraint": LengthRange(1, 2)}, "constraint: is not for boxes"),
    ],
)
def test_wrong_options_are_named(
    student: narvl.Model, image: Image.Image, verb: str, options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        student.predict(verb, image, TEXTS[verb], **options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("gone.jpg", r"^gone.jpg: the image file gone.jpg cannot be read \(No such file"),
        (b"", "^image 1: the image is not readable"),
        (
            b"a text file\n" * 9,
            "^image 1: the image is not readable .it is broken, or none of .*; it is text that begins",
        ),
        ("https://example.org/a.jpg", "is an address, and images are not downloaded"),
        (io.StringIO("x"), "was opened as text; open it in binary mode"),
        (3, "^image 1: an image cannot be a int"),
        (np.zeros((2, 6, 8, 3), np.uint8), "is not one image; give a list of images"),
        (np.zeros((3, 6, 8), np.uint8), "is no image; arrays are"),
        (np.zeros((6, 8, 3), np.int64), "pixels are uint8"),
        (np.full((6, 8, 3), 2.0), "values outside of 0 to 1"),
        (np.full((6, 8, 3), np.nan), "values outside of 0 to 1"),
        (np.zeros((0, 8, 3), np.uint8), "has no pixels"),
        (np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (20_000, 20_000), (0, 0)), "has 20000 x 20000 pixels"),
    ],
)
def test_bad_images_are_named(student: narvl.Model, image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        student.caption(image)


@pytest.mark.parametrize("text", ["", "  ", "???"])
@pytest.mark.parametrize("verb", ["answer", "locate", "entails"])
def test_empty_texts_are_refused(student: narvl.Model, image: Image.Image, verb: str, text: str) -> None:
    with pytest.raises(InputError, match=r"is empty|has no words") as raised:
        getattr(student, verb)(image, text)
    assert "--" not in str(raised.value), "options of the command line mean nothing here"


def test_hostile_and_odd_images(student: narvl.Model, image: Image.Image, tmp_path: Path) -> None:
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray((np.arange(48, dtype=np.uint16) * 1000).reshape(6, 8)).save(tmp_path / "deep.png")
    image.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (8, 6))])
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    for name in ("cmyk.jpg", "deep.png", "animated.gif", "one.png"):
        assert student.caption(tmp_path / name).text
    image.resize((200, 200)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"cut.jpg: the image is not readable \(image file is truncated"):
        student.caption(tmp_path / "cut.jpg")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="bomb.png: the image (has 20000 x 20000 pixels|is refused)"):
        student.caption(tmp_path / "bomb.png")


def test_a_box_is_that_of_the_image_as_a_person_sees_it(student: narvl.Model, tmp_path: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 10, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert student.locate(tmp_path / "turned.png", "the cat").box == student.locate(upright, "the cat").box


def test_attention_is_computed_when_asked_for(student: narvl.Model, image: Image.Image) -> None:
    for verb, text in TEXTS.items():
        found = student.predict(verb, image, text)
        maps = found.attention()
        assert [heat.text for heat in maps] == [token.text for token in found.tokens]
        for heat in maps:
            assert heat.weights.ndim == 2 and heat.weights.min() >= 0 and 0 < heat.weights.sum() <= 1 + 1e-5


def test_a_prediction_is_a_value(student: narvl.Model, image: Image.Image) -> None:
    found = student.caption(image)
    with pytest.raises(AttributeError):
        found.text = "another"  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(found))
    assert again == found and copy.deepcopy(found) == found
    with pytest.raises(InputError, match="has lost its model"):
        again.attention()


def test_threads_share_a_model(student: narvl.Model) -> None:
    draw = np.random.default_rng(3)
    images = [draw.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(6)]
    jobs = [(verb, image) for image in images for verb in TEXTS]
    expected = [student.predict(verb, image, TEXTS[verb]) for verb, image in jobs]
    predictions: list[Any] = [None] * len(jobs)

    def work(start: int) -> None:
        for place in range(start, len(jobs), 4):
            verb, image = jobs[place]
            predictions[place] = student.predict(verb, image, TEXTS[verb])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert predictions == expected


def test_a_teacher_answers_too(write_checkpoint: Callable[..., Path], vocabulary: Path, image: Image.Image) -> None:
    teacher = narvl.load(
        write_checkpoint("teacher.pt", "ofa", "caption", bpe_dir=str(vocabulary), patch_image_size=32), device="cpu"
    )
    found = teacher.caption(image, beam=2, nbest=2)
    assert found.queries == () and len(found.alternatives) == 2
    assert len(found.attention()) == len(found.tokens)
    with pytest.raises(InputError, match="are for students"):
        teacher.caption(image, abstain_below=0.5)


def test_the_vocabulary_may_lie_beside_the_checkpoint(
    write_checkpoint: Callable[..., Path], vocabulary: Path, image: Image.Image, tmp_path: Path
) -> None:
    student = write_checkpoint("moved.pt", "narvl", "caption", bpe_dir=str(vocabulary), patch_image_size=32)
    state = torch.load(student, weights_only=False)
    state["cfg"]["task"]["bpe_dir"] = str(tmp_path / "gone")
    torch.save(state, student)
    with pytest.raises(InputError, match="gone"):
        narvl.load(student)
    (student.parent / "spm.model").write_bytes((vocabulary / "spm.model").read_bytes())
    assert narvl.load(student).caption(image).text
    assert loading.load(student).task.cfg.bpe_dir == str(student.parent)  # what the other commands use
    (student.parent / "spm.model").unlink()
    assert narvl.load(student, bpe_dir=vocabulary).caption(image).text


def test_the_convention_of_fairseq_works(several_tasks: Path, image: Image.Image) -> None:
    from narvl_plugin.models.narvl import NarvlModel
    from narvl_plugin.models.registered import RegisteredNarvlModel

    for kind in (NarvlModel, RegisteredNarvlModel):
        model = kind.from_pretrained(str(several_tasks.parent), several_tasks.name, device="cpu")
        assert isinstance(model, narvl.Model) and model.caption(image).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "gone.pt"}, "gone.pt: no such checkpoint"),
        ({"checkpoint": "."}, "is a folder; give the checkpoint in it"),
        ({"precision": "int4"}, "precision='int4': choose float32 or bfloat16"),
        ({"device": "gpu7"}, "device='gpu7': cannot be used"),
        ({"task": "ocr"}, "task='ocr': choose one of"),
        ({"answers": "red"}, "answers: expected a list of texts"),
        ({"member": "ocr"}, "not on 'ocr'"),
    ],
)
def test_what_cannot_be_loaded_is_named(several_tasks: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, MissingInput), match=message):
        narvl.load(**{"checkpoint": several_tasks, **options})


def test_importing_narvl_imports_no_torch(programs: Path) -> None:
    import subprocess
    import sys

    code = "import sys, narvl; assert 'torch' not in sys.modules; narvl.InputError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
