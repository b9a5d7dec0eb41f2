"""The report on a small output folder: what is read, what is scored, what the files hold."""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from narvl_plugin.data.scenes.backgrounds import Background
from narvl_plugin.data.scenes.scene import Group, Scene, Thing, scene_as_json
from narvl_plugin.errors import BadRow, InputError, MissingInput
from narvl_plugin.inference.calibration import Reliability
from narvl_plugin.pipeline.keys import KEYS
from narvl_plugin.report import build, build_report
from narvl_plugin.report.about import SETTINGS, Stage, about, count_parameters, duration, read_stages
from narvl_plugin.report.charts import Targets, training_charts
from narvl_plugin.report.outputs import (
    TrainingLog,
    outputs_by_row,
    read_rows,
    read_training_log,
)
from narvl_plugin.report.readings import HEAT, AttentionMap, QueryView, Slot, heat_map, pale, slot_kinds
from narvl_plugin.report.subjects import Row
from narvl_plugin.report.subjects.caption import CaptionReport

RED = Background("red", "plain", 0)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCENES = [
    ("a red dog left of a big bus&&one dog and a bus", "dog&&bus"),
    ("two cats on a blue background&&a pair of cats", "cat"),
    ("an owl above three apples&&apples below an owl", "owl&&apple"),
]
GENERATED = {
    "teacher_beam5": [
        "a red dog left of a big bus",
        "two cats on a blue background",
        "an owl above an apple",
    ],
    "teacher_greedy": ["a red dog left of a bus", "two cats on a blue background", "an owl above an apple"],
    "student": ["a red dog left of a bus", "two cats", "an owl <b>above</b>"],
}
LATENCY = {
    "systems": {
        "teacher_beam5": {"p50_ms": 40.0, "p95_ms": 50.0, "mean_ms": 41.0, "n": 6},
        "student": {"p50_ms": 10.0, "p95_ms": 12.0, "mean_ms": 10.5, "n": 6},
    },
    "machine": {"processor": "Abacus 3", "threads": 1},
}


def image(colour: str) -> str:
    """Make a small image as base64 of its PNG file."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def generated_file(captions: Sequence[str]) -> str:
    """Write captions the way fairseq-generate does, the last image first."""
    lines = ["2024-01-01 00:00:00 | INFO | fairseq_cli.generate | D- is no caption"]
    for row in reversed(range(len(captions))):
        name = f"test-{row:06d}"
        lines += [
            f"S-{name}\twhat does the image describe?",
            f"T-{name}\t{SCENES[row][0]}",
            f"H-{name}\t-0.5\t▁tokens",
            f"D-{name}\t-0.5\t{captions[row]}",
            f"P-{name}\t-0.1 -0.2",
        ]
    return "\n".join([*lines, "Generate test with beam=5: CIDEr 1.0", ""])


def caption_rows(tsv: Path) -> Sequence[Row]:
    """Read a test file of captions."""
    return read_rows(tsv, CaptionReport(None, tsv))


@pytest.fixture
def run_folder(tmp_path: Path, no_java: None) -> Path:
    """Make the output folder of a finished run, without checkpoints."""
    test_tsv = tmp_path / "data" / "caption" / "test.tsv"
    test_tsv.parent.mkdir(parents=True)
    rows = [
        f"test-{row:06d}\ttest-{row:06d}\t{references}\t{objects}\t{image(colour)}\n"
        for row, ((references, objects), colour) in enumerate(zip(SCENES, ("red", "blue", "green"), strict=True))
    ]
    test_tsv.write_text("".join(rows))
    for name, captions in GENERATED.items():
        path = tmp_path / "generate" / name / "generate-test.txt"
        path.parent.mkdir(parents=True)
        path.write_text(generated_file(captions))
    (tmp_path / "latency.json").write_text(json.dumps(LATENCY))
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(
            '{"epoch": 1, "nll_loss": "5.0", "blank_share": "0.9", "num_updates": "10", "wall": "3"}\n'
            '{"epoch": 1, "nll_loss": "3.0", "blank_share": "0.6", "num_updates": "20", "wall": "6"}\n'
            '{"epoch": 1, "valid_nll_loss": "3.1", "valid_cider": "1.5", "valid_num_updates": "20"}\n'
        )
    return tmp_path


def test_results_hold_every_system(run_folder: Path) -> None:
    content = build_report(run_folder, settings={"SEED": "1"})
    assert json.loads((run_folder / "results.json").read_text()) == content
    assert list(content["systems"]) == ["teacher_beam5", "teacher_greedy", "student", "nouns_only"]
    teacher, student = content["systems"]["teacher_beam5"], content["systems"]["student"]
    # dog, bus, cat, owl, apple; the student leaves out the apple.
    assert teacher["object_recall"] == pytest.approx(1.0)
    assert student["object_recall"] == pytest.approx(4 / 5)
    assert content["systems"]["nouns_only"]["object_recall"] == pytest.approx(1.0)
    assert content["systems"]["nouns_only"]["scores"]["BLEU-4"] == pytest.approx(0, abs=1e-6)
    assert student["latency_ratio_to_teacher_beam5"] == pytest.approx(0.25)
    assert student["cider_ratio_to_teacher_beam5"] == pytest.approx(
        student["scores"]["CIDEr"] / teacher["scores"]["CIDEr"]
    )
    assert teacher["cider_ratio_to_teacher_beam5"] == pytest.approx(1.0)
    assert student["tokenizer"] == "plain"
    assert "Java" in student["missing_scores"]["METEOR"]
    assert content["test"]["pictures"] == 3
    assert content["settings"] == {"SEED": "1"}


def test_table_and_terminal(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_report(run_folder)
    lines = (run_folder / "table.md").read_text().splitlines()
    assert lines[0] == (
        "| system | BLEU-4 | METEOR | ROUGE-L | CIDEr | object recall | p50 ms | ratio | CIDEr/teacher |"
    )
    student = next(line for line in lines if line.startswith("| Student |"))
    cells = [cell.strip() for cell in student.strip("|").split("|")]
    assert cells[2] == "–"
    assert cells[5:8] == ["0.800", "10.0", "0.250"]
    text = "\n".join(lines)
    assert "plain tokeniser" in text
    assert "No METEOR: METEOR needs Java" in text
    assert "Abacus 3" in text
    printed = capsys.readouterr().out.splitlines()
    printed_cells = next(line for line in printed if line.startswith("Student ")).split()
    assert printed_cells[-4:] == ["0.800", "10.0", "0.250", cells[-1]]
    assert all(len(line) <= 80 for line in printed)


def test_page_stands_alone(run_folder: Path) -> None:
    build_report(run_folder, settings={"SEED": "17"})
    page = (run_folder / "report.html").read_text()
    for text in (*GENERATED["teacher_beam5"], "two cats", "apples below an owl", "Abacus 3", "SEED", "17"):
        assert text in page
    assert "an owl &lt;b&gt;above&lt;/b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == len(SCENES)
    assert page.count("<svg") == 5
    assert "<script" not in page
    assert "4.0 ×" in page
    # Nothing is fetched: every address is inline data or a place in the page itself.
    for address in re.findall(r"""(?:src|href|url|action|poster)\s*[=(]\s*["']?([^"')\s>]+)""", page):
        assert address.startswith(("data:", "#")), address
    assert not re.search(r"https?:|@import|//\w+\.\w+/", page)


def test_page_shows_the_queries(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = [Slot("owl", 0.875, "token"), Slot("owl", 0.5, "repeat"), Slot("", 0.99, "blank")]
    reading = QueryView(
        slots,
        [AttentionMap("owl", "data:image/png;base64,AAAA")],
        "data:image/jpeg;base64,BBBB",
        [("an owl", 0.5), ("an eagle", 0.25), ("a hen", 0.0001)],
    )
    monkeypatch.setattr(build, "_readings", lambda student, shown, images: [reading for _ in shown])
    build_report(run_folder, num_images=2)
    page = (run_folder / "report.html").read_text()
    assert page.count('<img src="data:image/png;base64,AAAA" alt=""></span>owl') == 2
    assert page.count('style="--pale: url(data:image/jpeg;base64,BBBB)"') == 2
    assert page.count("<li>an eagle<small>25.0 %</small></li>") == 2
    assert page.count("<li>a hen<small>&lt; 0.1 %</small></li>") == 2
    assert "A percentage after an output is the student's probability." in page
    assert page.count('<li class="slot token" title="query 1: owl, 87.5 %"') == 2
    assert page.count('<li class="slot repeat"') == 2
    assert page.count('<li class="slot blank" title="query 3: blank, 99.0 %">·<small>99</small>') == 2


def test_an_output_without_others_is_not_listed_again(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = QueryView([], [], "", [("an owl", 0.5)])
    monkeypatch.setattr(build, "_readings", lambda student, shown, images: [reading for _ in shown])
    build_report(run_folder)
    page = (run_folder / "report.html").read_text()
    assert "considered" not in page and "<small>50.0 %" not in page and "A percentage" not in page


def test_confidence_in_a_caption_is_in_the_results_alone(run_folder: Path) -> None:
    """A caption is correct only if it equals a reference word by word, which says little about the others."""
    sure = Reliability.of(np.array([0.95, 0.9, 0.4, 0.35]), np.array([1.0, 1.0, 1.0, 0.0]))
    systems = dict.fromkeys(("student_uncalibrated", "student", "teacher"), asdict(sure))
    measured = {"temperature": 1.5, "slope": 1.2, "offset": -0.1, "fitted_on": 4, "systems": systems}
    (run_folder / "calibration.json").write_text(json.dumps(measured))
    content = build_report(run_folder)
    assert content["calibration"] == measured
    assert "onfidence" not in (run_folder / "report.html").read_text()
    assert "onfidence" not in (run_folder / "table.md").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Give a browser; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.integration
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(run_folder: Path, browser: Any, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """On a phone the table scrolls within its box and says so; attention is enlarged by the keyboard alone."""
    picture = Image.new("RGB", (30, 20), "red")
    looks = [AttentionMap(text, heat_map(torch.tensor([0.0, 0.1, 0.2, 0.3]))) for text in ("an", "owl")]
    reading = QueryView([Slot("owl", 0.875, "token")], looks, pale(picture), [("an owl", 0.5), ("a hen", 0.25)])
    monkeypatch.setattr(build, "_readings", lambda student, shown, images: [reading for _ in shown])
    build_report(run_folder, settings={"SEED": "17", "TEACHER_LR": "2e-3"})
    page = browser.new_page(viewport={"width": width, "height": 800})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(f"file://{run_folder / 'report.html'}")

    phone = width == 390
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".scroll").first.evaluate("box => box.scrollWidth > box.clientWidth") == phone
    assert page.locator(".hint").first.is_visible() == phone
    chart = page.locator(".chart svg").first
    box, label = chart.bounding_box(), chart.locator("text").first.bounding_box()
    assert label["height"] >= 11 and (box["width"] > 0.8 * width) == phone

    look = page.locator("details.look summary").first
    look.focus()
    small = look.locator(".map").bounding_box()
    assert small["width"] == small["height"] >= 96
    page.keyboard.press("Enter")
    large = look.locator(".map").bounding_box()
    assert large["width"] == large["height"] > 300
    assert large["x"] >= 0 and large["x"] + large["width"] <= width
    page.keyboard.press("Enter")
    assert look.locator(".map").bounding_box() == small
    assert complaints == []
    page.close()


class TestWording:
    """The column, the headline and the table of captions with words that no training caption has in a row."""

    @pytest.fixture
    def training_file(self, run_folder: Path) -> Path:
        """Write a training file of embedded scenes, which knows the teacher's sentences."""
        captions = [*GENERATED["teacher_beam5"], "one cat and a bus", "a pair of cats", "apples below an owl"]
        captions += ["an owl above three apples", "a red dog left of a bus"]
        file = run_folder / "data" / "caption" / "train.tsv"
        file.write_text(f"train-0\ttrain-0\t{'&&'.join(captions)}\tdog\tAAAA\n")
        return file

    def test_table_headline_and_note(
        self, training_file: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        systems = build_report(run_folder)["systems"]
        # "two cats" alone, and "an owl <b>above</b>" with its tags, are no training captions.
        assert [systems[name]["new_runs"] for name in ("teacher_beam5", "student", "nouns_only")] == [0, 2 / 3, 1]
        assert [systems["student"][name] for name in ("doubled", "cut")] == [0, 1 / 3]
        assert systems["student"]["references_new_runs"] == 0
        table = (run_folder / "table.md").read_text()
        assert "| object recall | new runs | p50 ms |" in table
        assert "| 0.800 | 66.7 % | 10.0 |" in table
        assert "(nouns count as one word, and so do colours)" in table
        assert "| Student | 66.7 % | 0.0 % | 33.3 % | 66.7 % | – |\n" in table
        assert "| References | 0.0 % | 0.0 % | 0.0 % | 0.0 % | – |\n" in table
        page = (run_folder / "report.html").read_text()
        assert "<dt>66.7 %</dt><dd>of the student&#39;s captions have 4 words in a row that no training" in page
        printed = capsys.readouterr().out
        assert "66.7 %" in printed and "…" not in printed
        assert all(len(line) <= 80 for line in printed.splitlines())

    def test_words_of_other_captions_stand_for_themselves(self, training_file: Path, run_folder: Path) -> None:
        test_tsv = training_file.with_name("test.tsv")
        test_tsv.write_text(test_tsv.read_text().replace("dog&&bus", "surfboard&&bus"))
        student = build_report(run_folder)["systems"]["student"]
        assert student["abstracted"] is False
        assert "nouns count as one word" not in (run_folder / "table.md").read_text()


def test_outputs_that_the_teacher_cannot_read_have_no_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_long(*arguments: object) -> dict[str, float]:
        raise BadRow("test.tsv:1: the output has 2,000 tokens")

    checkpoint = tmp_path / "teacher.pt"
    checkpoint.touch()
    task = SimpleNamespace(name="caption")
    student = SimpleNamespace(task=task, dataset=SimpleNamespace(tsv=SimpleNamespace(path="test.tsv")))
    monkeypatch.setattr(build.Predictor, "load", lambda *arguments, **options: SimpleNamespace(task=task))
    monkeypatch.setattr(build, "perplexities", too_long)
    assert build._perplexities(checkpoint, student, None, {"student": {0: "a dog"}}, [0]) == {}
    assert "perplexity is not measured: test.tsv:1: the output has 2,000 tokens" in caplog.text


class TestTruth:
    """Where the content of the scenes is known: the columns and the headline of sentences and of true ones."""

    LEFT, RIGHT, TOP = Thing((0.0, 0.4, 0.2, 0.6)), Thing((0.6, 0.4, 0.9, 0.6)), Thing((0.4, 0.0, 0.6, 0.2))
    BOTTOM = Thing((0.4, 0.6, 0.6, 0.8))
    SCENES = [
        Scene((Group("dog", "", (LEFT,)), Group("bus", "big", (RIGHT,))), RED),
        Scene((Group("cat", "", (LEFT, RIGHT)),), RED),
        Scene((Group("owl", "", (TOP,)), Group("apple", "", (BOTTOM,))), RED),
    ]
    SAID = {
        "teacher_beam5": ["a dog left of a bus", "two cats side by side", "an owl above an apple"],
        "teacher_greedy": ["a dog left of a bus", "two cats", "an owl below an apple"],
        "student": ["a dog left of a dog", "two cats", "an owl below an apple"],
    }

    @pytest.fixture
    def scenes(self, run_folder: Path) -> Path:
        """Write the content of the scenes, and captions of them."""
        for name, captions in self.SAID.items():
            whole = [f"{caption} on a red background" for caption in captions]
            (run_folder / "generate" / name / "generate-test.txt").write_text(generated_file(whole))
        lines = [json.dumps({"id": f"test-{row:06d}", **scene_as_json(scene)}) for row, scene in enumerate(self.SCENES)]
        file = run_folder / "data" / "caption" / "test.scenes.jsonl"
        file.write_text("\n".join(lines) + "\n")
        return file

    def test_table_and_headline(self, scenes: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        systems = build_report(run_folder)["systems"]
        shares = {
            name: [round(systems[name][key], 2) for key in ("sentences", "true", "complete")] for name in self.SAID
        }
        assert shares == {
            "teacher_beam5": [1.0, 1.0, 1.0],
            "teacher_greedy": [1.0, 0.67, 1.0],
            "student": [0.67, 0.33, 0.67],
        }
        table = (run_folder / "table.md").read_text()
        assert "| CIDEr | sentences | true | p50 ms |" in table
        assert "| 66.7 % | 33.3 % | 10.0 |" in table
        page = (run_folder / "report.html").read_text()
        assert "<dt>33.3 %</dt><dd>of the student&#39;s captions are true sentences (teacher: 100.0 %)</dd>" in page
        assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())

    def test_content_of_other_images_is_refused(self, scenes: Path, run_folder: Path) -> None:
        scenes.write_text("\n".join(scenes.read_text().splitlines()[:2]) + "\n")
        with pytest.raises(InputError, match="test-000002: the file of scenes has no image of this id"):
            build_report(run_folder)


def test_images_without_a_caption_are_left_out_and_said(run_folder: Path) -> None:
    path = run_folder / "generate" / "student" / "generate-test.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "-test-000001" not in line))
    content = build_report(run_folder)
    assert content["test"] == {
        "file": str(run_folder / "data" / "caption" / "test.tsv"),
        "pictures": 2,
        "left_out": 1,
    }
    assert "1 test pictures are left out" in (run_folder / "table.md").read_text()


def test_without_latency_logs_and_objects(run_folder: Path) -> None:
    (run_folder / "latency.json").unlink()
    shutil.rmtree(run_folder / "teacher")
    shutil.rmtree(run_folder / "student")
    test_tsv = run_folder / "data" / "caption" / "test.tsv"
    rows = [line.split("\t") for line in test_tsv.read_text().splitlines()]
    test_tsv.write_text("".join("\t".join([*row[:3], "", row[4]]) + "\n" for row in rows))
    content = build_report(run_folder)
    assert "nouns_only" not in content["systems"]
    assert content["systems"]["student"]["object_recall"] is None
    assert content["systems"]["student"]["latency_ratio_to_teacher_beam5"] is None
    assert "<svg" not in (run_folder / "report.html").read_text()


def test_missing_files_are_named(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(MissingInput, match="elsewhere.tsv"):
        build_report(run_folder, test_tsv=tmp_path / "elsewhere.tsv")
    shutil.rmtree(run_folder / "generate")
    with pytest.raises(MissingInput, match="run fairseq-generate first"):
        build_report(run_folder)


@pytest.mark.parametrize("name", ["latency.json", "calibration.json"])
@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "{", "[]", '{"systems": 3}', '{"systems": {"student": {"p50_ms": "<b>", "n": 1}}, "machine": {}}'],
)
def test_measurements_of_another_form_are_named(run_folder: Path, name: str, content: str) -> None:
    (run_folder / name).write_text(content)
    with pytest.raises(InputError, match=name):
        build_report(run_folder)


def test_texts_of_a_run_are_no_html(run_folder: Path) -> None:
    attack = "<script>x</script>\"'><img src=x onerror=x>"
    for file in run_folder.glob("generate/*/generate-test.txt"):
        file.write_text(re.sub("(?m)^(D-[^\t]*\t[^\t]*\t).*$", lambda line: line[1] + attack, file.read_text()))
    test_tsv = run_folder / "data" / "caption" / "test.tsv"
    test_tsv.write_text("".join(f"{line.replace('a ', attack)}\n" for line in test_tsv.read_text().splitlines()))
    measured = json.loads((run_folder / "latency.json").read_text()) | {"machine": {attack: attack}}
    (run_folder / "latency.json").write_text(json.dumps(measured))
    (run_folder / "generate/student").rename(run_folder / "generate/<script>[bold]")
    build_report(run_folder, settings={attack: attack})
    page = (run_folder / "report.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page and "<img src=x" not in page


class TestCaptionsByRow:
    """Which row of the test file a caption belongs to."""

    def test_image_ids_serve_as_well(self, tmp_path: Path) -> None:
        tsv = tmp_path / "test.tsv"
        tsv.write_text("u0\timage-0\ta dog\t\t\nu1\timage-1\ta cat\t\t\n")
        rows = caption_rows(tsv)
        by_image = {"image-1": "a cat", "image-0": "a dog"}
        assert outputs_by_row(by_image, rows, tsv) == {0: "a dog", 1: "a cat"}
        assert outputs_by_row({"u1": "a cat"}, rows, tsv) == {1: "a cat"}
        with pytest.raises(InputError, match="1 of 2 outputs belong to no row.*such as image-7"):
            outputs_by_row({"image-7": "", "image-0": ""}, rows, tsv)

    def test_shared_ids_are_an_error(self, tmp_path: Path) -> None:
        tsv = tmp_path / "test.tsv"
        tsv.write_text("u0\timage\ta dog\t\t\nu1\timage\ta cat\t\t\n")
        with pytest.raises(InputError, match="2 rows of the test file share 1 ids"):
            outputs_by_row({"image": "a dog"}, caption_rows(tsv), tsv)


class TestTrainingLog:
    """The reader of fairseq's JSON logs."""

    def test_repeated_broken_and_infinite_lines(self, tmp_path: Path) -> None:
        step = '{"epoch": 1, "loss": "5.0", "num_updates": "10"}\n'
        path = tmp_path / "train.jsonl"
        path.write_text(
            f"INFO training\n{step}{step}"
            '{"epoch": 1, "loss": "inf", "num_updates": "20"}\n'
            '{"epoch": 1, "valid_loss": "4.5", "valid_num_updates": "20"}\n'
            '{"epoch": 1, "train_loss": "4.8", "train_num_updates": "20"}\n'
            '{"num_updates": NaN, "loss": 1}\n{"num_updates": [1], "loss": 1}\n{"num_updates": 1e999, "loss": 1}\n'
            f'{{"num_updates": 30, "loss": 1{"0" * 400}, "acc": 1e300}}\n{{"a":{"[" * 100_000}\n'
            '{"epoch": 2, "los'
        )
        log = read_training_log(path)
        assert log.curves["loss"] == [(10, 5.0)]
        assert log.curves["valid_loss"] == [(20, 4.5)]
        assert "acc" not in log.curves

    def test_updates_done_again_after_a_stop_count_once(self, tmp_path: Path) -> None:
        path = tmp_path / "train.jsonl"
        steps = [(10, 5.0), (20, 4.0), (30, 3.0), (20, 4.5), (30, 3.5)]
        path.write_text("".join(f'{{"loss": "{loss}", "num_updates": "{step}"}}\n' for step, loss in steps))
        assert read_training_log(path).curves["loss"] == [(10, 5.0), (20, 4.5), (30, 3.5)]


LABELS = {"teacher": "Teacher", "student": "Student", "student_ce": "Student, cross entropy"}


class TestTrainingCharts:
    """Which curves share a chart, and what is said of them."""

    def charts(self, targets: Targets, **curves: list[tuple[int, float]]) -> dict[str, Any]:
        """Draw the same curves of a teacher and a student; return the charts by title."""
        log = TrainingLog(curves)
        charts = training_charts(
            {"teacher": log, "student": log}, LABELS, ("valid_cider", "CIDEr"), {"student": targets}
        )
        return {chart.title: chart for chart in charts}

    def test_only_curves_with_points_become_charts(self) -> None:
        log = TrainingLog({"nll_loss": [(1, 2.0), (2, 1.0)]})
        charts = training_charts({"teacher": log}, {"teacher": "Teacher"}, ("valid_cider", "CIDEr"), {})
        assert [chart.title for chart in charts] == ["Teacher: loss"]
        assert charts[0].svg.startswith("<svg")

    @pytest.mark.parametrize(
        ("targets", "words"),
        [
            (Targets(taught=True, any_of_row=True), "any of the outputs that the teacher wrote for a row"),
            (Targets(taught=True, any_of_row=False), "one of the outputs that the teacher wrote for a row"),
            (Targets(taught=False, any_of_row=True), "any of the outputs that the data has for a row"),
            (Targets(), "the outputs that the training file has for a row"),
        ],
    )
    def test_losses_of_different_targets_are_apart(self, targets: Targets, words: str) -> None:
        charts = self.charts(targets, nll_loss=[(1, 2.0), (2, 1.0)], valid_nll_loss=[(2, 7.0)])
        assert list(charts) == ["Teacher: loss", "Student: loss in training", "Student: loss in validation"]
        assert charts["Student: loss in training"].note == f"Bits per token of {words}."
        assert "the first output that the data has" in charts["Student: loss in validation"].note
        assert "validation" not in charts["Student: loss in training"].svg

    def test_losses_of_the_same_targets_share_a_chart(self) -> None:
        targets = Targets(taught=False, any_of_row=False)
        charts = self.charts(targets, nll_loss=[(1, 2.0), (2, 1.0)], valid_nll_loss=[(2, 7.0)])
        assert list(charts) == ["Teacher: loss", "Student: loss"]
        for label in ("Student, training", "Student, validation"):
            assert label in charts["Student: loss"].svg

    def test_the_score_comes_first(self) -> None:
        charts = self.charts(Targets(), nll_loss=[(1, 2.0)], valid_cider=[(1, 3.0), (2, 4.0)])
        assert next(iter(charts)) == "CIDEr in validation"

    @pytest.mark.parametrize(("shares", "drawn"), [([0.0, 0.0], False), ([0.3, 0.31], False), ([0.0, 0.2], True)])
    def test_blanks_are_drawn_where_they_change(self, shares: list[float], drawn: bool) -> None:
        charts = self.charts(Targets(), blank_share=list(enumerate(shares)))
        assert ("Blanks" in charts) == drawn


def test_what_the_students_learned() -> None:
    any_reference = SimpleNamespace(task=SimpleNamespace(cfg=SimpleNamespace(any_reference=True)))
    found = build._targets({"DISTIL": "1"}, any_reference)
    assert found["student"] == found["student_ce"] == Targets(taught=True, any_of_row=True)
    assert found["student_nodistill"] == Targets(taught=False, any_of_row=True)
    boxes = SimpleNamespace(task=SimpleNamespace(cfg=SimpleNamespace()))
    assert build._targets({"DISTIL": "0"}, boxes)["student"].as_in_validation
    assert build._targets({}, None)["student"] == Targets()


class TestAbout:
    """What the page says about the run."""

    def test_settings_in_groups_and_words(self) -> None:
        settings = {"SEED": "17", "DISTIL": "0", "DATA": "", "QUERIES": "24", "SCORE_WEIGHT": "0", "TEACHER_LR": "2e-3"}
        found = about(settings | {"NEW": "x"}, {}, {"processor": "Abacus 3"}, [])
        assert {group: [fact.value for fact in facts] for group, facts in found.groups.items()} == {
            "Run": ["17"],
            "Data": ["embedded, made by narvl data"],
            "Models": ["24"],
            "Training": ["the outputs of the data"],
            "Machine": ["Abacus 3"],
        }
        assert [(group, fact.name, fact.value) for group, fact in found.rest] == [
            ("Training", "TEACHER_LR", "2e-3"),
            ("Training", "SCORE_WEIGHT", "0"),
            ("Other", "NEW", "x"),
        ]
        assert found.rest[0][1].words == "learning rate of the teacher"

    def test_every_setting_of_the_scripts_has_words(self) -> None:
        keys = [key.name for key in KEYS if key.kept]
        assert len(keys) > 35 and set(keys) <= SETTINGS.keys()

    def test_stages_with_and_without_the_moment_of_their_end(self, tmp_path: Path) -> None:
        file = tmp_path / "stages.tsv"
        assert read_stages(file) == []
        file.write_text("teacher\t94.5\nstudent\t3700\t2025-01-31T12:00:05Z\nbroken\n")
        stages = read_stages(file)
        assert stages == [Stage("teacher", 94.5, ""), Stage("student", 3700.0, "2025-01-31T12:00:05Z")]
        found = about({}, {}, {}, stages)
        assert [(fact.words, fact.value) for fact in found.groups["Run"]] == [
            ("last stage ended", "2025-01-31 12:00:05 UTC"),
            ("training of the teacher", "1 min 34 s"),
            ("training of the student", "1 h 2 min"),
            ("all stages, added up", "1 h 3 min"),
        ]
        assert [fact.value for fact in found.stages] == ["1 min 34 s", "1 h 2 min"]

    def test_durations(self) -> None:
        assert [duration(seconds) for seconds in (4.44, 59.9, 61, 3599.6)] == [
            "4.4 s",
            "59.9 s",
            "1 min 1 s",
            "1 h 0 min",
        ]

    def test_parameters(self) -> None:
        encoder = torch.nn.ModuleDict({"embed_images": torch.nn.Linear(3, 4), "layer": torch.nn.Linear(2, 2)})
        assert count_parameters(torch.nn.ModuleDict({"encoder": encoder})) == {"backbone": 16, "others": 6}
        sizes = {"teacher": {"others": 2_270_000, "backbone": 701_000}, "student": {"others": 40_000, "backbone": 0}}
        assert [(fact.words, fact.value) for fact in about({}, sizes, {}, []).groups["Models"]] == [
            ("parameters of the teacher", "2.27 million"),
            ("parameters of the student", "0.04 million"),
            ("parameters of the vision backbone", "0.70 million"),
        ]

    def test_all_of_it_is_on_the_page(self, run_folder: Path) -> None:
        (run_folder / "stages.tsv").write_text("teacher\t94.5\t2025-01-31T12:00:05Z\n")
        content = build_report(run_folder, settings={"SEED": "17", "TEACHER_LR": "2e-3"})
        page = (run_folder / "report.html").read_text()
        assert "<dt>seed of the scenes and of training <code>SEED</code></dt><dd>17</dd>" in page
        assert "<dt>last stage ended</dt><dd>2025-01-31 12:00:05 UTC</dd>" in page
        assert "<code>TEACHER_LR</code></td><td>Training: learning rate of the teacher</td><td>2e-3</td>" in page
        assert content["stages"] == [{"name": "teacher", "seconds": 94.5, "ended": "2025-01-31T12:00:05Z"}]


def opened(uri: str) -> Image.Image:
    """Open the image of a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_heat_has_the_colours_of_the_legend() -> None:
    heat = opened(heat_map(torch.tensor([0.0, 0.1, 0.2, 0.3])))
    assert heat.size == (2, 2)
    assert [heat.getpixel(place) for place in ((0, 0), (1, 0), (0, 1), (1, 1))] == list(HEAT)


def test_heat_lies_on_a_light_square(run_folder: Path) -> None:
    picture = Image.new("RGB", (400, 300), "black")
    picture.paste("white", (0, 0, 200, 300))
    square = opened(pale(picture))
    assert square.size == (240, 240) and square.mode == "L"
    assert square.getextrema()[0] >= 160


def test_slot_kinds() -> None:
    path = torch.tensor([9, 4, 4, 9, 4, 5, 5, 9])
    assert slot_kinds(path, blank=9) == [
        "blank",
        *("token", "repeat", "blank"),
        *("token", "token", "repeat", "blank"),
    ]
