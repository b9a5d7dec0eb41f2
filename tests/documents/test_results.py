"""The pages of docs/results/ are what `make results` writes from the committed measurements, and keep their form."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest
from pages import ROOT

from narvl_plugin.bench import api, limit, startup, sweep, training
from narvl_plugin.bench.timing import LatencyStats

FOLDER = ROOT / "docs" / "results"
MOST_ROWS = 8
SCREEN = 50
"""Lines that one screen shows."""
FOLDED = re.compile(r"<details>.*?</details>", flags=re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(?:^\|.*\n)+", flags=re.MULTILINE)


def load(name: str) -> ModuleType:
    """Import a module of docs/results/."""
    sys.path.insert(0, str(FOLDER))
    try:
        found = importlib.util.spec_from_file_location(f"results_{name}", FOLDER / f"{name}.py")
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module  # dataclasses look themselves up there
        found.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(FOLDER))


make, collect, measurements = load("make"), load("collect"), load("measurements")
large_jobs = load("large_jobs")
QUESTIONS = [FOLDER / f"{name}.md" for name in make.PAGES]
PAGES = [*QUESTIONS, *(FOLDER / f"{name}.md" for name in make.FURTHER), FOLDER / "index.md", ROOT / "RESULTS.md"]


@pytest.fixture(scope="module")
def made() -> tuple[dict[Path, str], str]:
    return make.rendered()


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def read_table(kind: str, result: Any, part: str = "") -> Any:
    """Return one table of a wrapped result."""
    wrapped = {"question": "?", "kind": kind, "run": {"command": "…"}, "result": result}
    tables = {table.name: table for table in measurements.read("it", wrapped)}
    return tables[f"it_{part}" if part else "it"]


# --- What is committed is what the command writes --------------------------------------------------------------------


def test_committed_pages_are_what_the_command_writes(made: tuple[dict[Path, str], str]) -> None:
    pages = {file: text for file, text in made[0].items() if file.suffix == ".md"}
    assert set(pages) == set(PAGES)
    for file, text in pages.items():
        assert read(file) == text, f"{file.name}: run `make results`"


def test_committed_plots_are_what_the_command_draws(made: tuple[dict[Path, str], str]) -> None:
    """Another version of matplotlib may draw the same plot with other numbers."""
    drawn = {file: text for file, text in made[0].items() if file.suffix == ".svg"}
    assert set(drawn) == set((FOLDER / "plots").iterdir())
    for file, text in drawn.items():
        if f"Matplotlib v{matplotlib.__version__}," in read(file):
            assert read(file) == text, f"{file.name}: run `make results`"


def test_the_command_writes_the_same_again(made: tuple[dict[Path, str], str]) -> None:
    assert make.rendered() == made


def test_the_table_of_the_readme_is_what_the_command_writes(made: tuple[dict[Path, str], str]) -> None:
    readme = read(ROOT / "README.md")
    assert make.with_table(readme, made[1]) in (readme, None), "run `make results`"


def test_a_table_stands_between_its_markers_and_a_text_without_them_stays() -> None:
    text = "before\n\n<!-- results -->\nold\n<!-- /results -->\n\nafter\n"
    once = make.with_table(text, "| new |\n")
    assert once == "before\n\n<!-- results -->\n\n| new |\n\n<!-- /results -->\n\nafter\n"
    assert make.with_table(once, "| new |\n") == once
    assert make.with_table("no markers", "| new |") is None
    assert make.with_table("<!-- /results --> <!-- results -->", "| new |") is None


def test_only_files_that_differ_are_written(tmp_path: Path) -> None:
    (tmp_path / "same.md").write_text("same")
    (tmp_path / "old.md").write_text("old")
    files = {tmp_path / "same.md": "same", tmp_path / "old.md": "new"}
    assert list(make.write(files)) == [tmp_path / "old.md"]
    assert read(tmp_path / "old.md") == "new"


# --- Form of the pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_a_page_names_its_template_first_and_starts_with_an_answer(file: Path) -> None:
    first, _, text = read(file).partition("\n")
    (template,) = re.findall(r"<!-- Made by `make results` from (\S+)\. Edit that file\. -->", first)
    assert (ROOT / template).is_file()
    title, answer = text.strip().split("\n\n")[:2]
    assert title.startswith("# ")
    assert re.match(r"[A-Z`]", answer) and ". " in f"{answer} "


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_tables_have_few_rows_and_lines_are_short(file: Path) -> None:
    for table in TABLE.findall(read(file)):
        assert 1 <= len(table.splitlines()) - 2 <= MOST_ROWS, table
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    long = [line for line in read(file).splitlines() if len(line) > make.WIDTH and line[0] not in "|!"]
    assert long == []


@pytest.mark.parametrize("file", QUESTIONS, ids=lambda file: file.stem)
def test_a_page_shows_one_table_or_plot_and_folds_command_and_commit(file: Path) -> None:
    """A page of a study shows both."""
    text = read(file)
    shown = FOLDED.sub("", text)
    counts = [len(TABLE.findall(shown)), len(re.findall(r"^!\[", shown, flags=re.MULTILINE))]
    assert counts == [1, 1] if file.stem in make.STUDIES else sum(counts) == 1
    assert "```" not in shown
    first = FOLDED.findall(text)[0]
    assert re.search(r"^```text\n.+", first, flags=re.MULTILINE)
    assert re.search(r"^- .*commit `[0-9a-f]{7}`; \d{4}-\d\d-\d\d; ", first, flags=re.MULTILINE)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_plots_have_a_text_and_links_lead_somewhere(file: Path) -> None:
    for text, link in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", read(file)):
        assert len(text) > 30, link
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", read(file)):
        assert (file.parent / link).exists(), link


def test_index_fits_one_screen_and_results_80_lines() -> None:
    shown = FENCED.sub("", FOLDED.sub("", read(FOLDER / "index.md")))
    assert len(re.sub(r"\n{2,}", "\n\n", shown).splitlines()) <= SCREEN
    assert len(read(ROOT / "RESULTS.md").splitlines()) <= 80
    for page in QUESTIONS:
        assert f"({page.name})" in read(FOLDER / "index.md")
        assert f"(docs/results/{page.name})" in read(ROOT / "RESULTS.md")


def test_templates_hold_no_measured_number() -> None:
    """Numbers with a decimal point come from the data, but for those in names and links."""
    for file in (FOLDER / "templates").glob("*.j2"):
        text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|arXiv [\d.]+|https?://\S+|CC-BY [\d.]+", "", read(file), flags=re.DOTALL)
        named = re.sub(r"of at least 0\.5|beam 5 and 0\.5 of the teacher|Python is 3\.11\.7|IoU 0\.5", "", text)
        assert re.findall(r"\d+\.\d+", named) == [], file.name


def test_the_log_is_marked_as_history_and_its_pictures_are_there() -> None:
    text = read(FOLDER / "log.md")
    assert "**This is history.**" in text.partition("\n## ")[0]
    dates = re.findall(r"^## (?:\d{4}-\d\d-\d\d to )?(\d{4}-\d\d-\d\d): ", text, flags=re.MULTILINE)
    assert len(dates) >= 19 and dates == sorted(dates, reverse=True)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (FOLDER / link).exists(), link


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((FOLDER / "data").glob("*.json")), ids=lambda file: file.stem)
def test_a_data_file_says_how_it_was_measured(file: Path) -> None:
    content = json.loads(read(file))
    runs = content["runs"] if "runs" in content else [content["run"]]
    assert content["question"].endswith("?")
    for run in runs:
        assert run.keys() == set(measurements.RUN)
        assert run["command"] or run["note"]
        assert bool(run["commit"]) == bool(run["date"])
    assert not re.search(r'"/\w', read(file)), "a path of one machine"


def test_rows_need_names_of_their_own_and_a_known_kind() -> None:
    table = {"question": "?", "runs": [], "columns": ["name", "ms"], "rows": [["one", 1], ["one", 2]]}
    with pytest.raises(ValueError, match="one name"):
        list(measurements.read("it", table))
    with pytest.raises(ValueError, match="'other' is unknown"):
        list(measurements.read("it", {"question": "?", "kind": "other", "run": {}, "result": {}}))


def test_a_result_replaces_a_table_of_its_name(tmp_path: Path) -> None:
    runs = [dict.fromkeys(measurements.RUN)]
    table = {"question": "?", "runs": runs, "columns": ["system", "picture"], "rows": [["student", 1.0]]}
    (tmp_path / "fast_stages.json").write_text(json.dumps(table))
    result = {"systems": {"student": {"p50_ms": 3.0}}, "stages": {"student": {"picture": 2.0}}}
    wrapped = {"question": "?", "kind": "latency", "run": {}, "result": result}
    (tmp_path / "fast.json").write_text(json.dumps(wrapped))
    found = measurements.read_all(tmp_path)
    assert found["fast"]["student"]["p50_ms"] == 3.0
    assert found["fast_stages"]["student"]["picture"] == 2.0


def table_of(columns: list[str], *rows: list[Any], **facts: Any) -> Any:
    content = {"question": "?", "runs": [], "columns": columns, "rows": list(rows), "facts": facts}
    (table,) = measurements.read("it", content)
    return table


@pytest.fixture
def made_up() -> Any:
    """Give the plans that follow from round numbers."""
    gflop = ["encoder_gflop", "keys_gflop", "step_gflop", "training_gflop"]
    kernels = ["encoder_kernels", "decoder_kernels", "step_kernels", "training_kernels"]
    data = {
        "floor_h200": table_of(["what", "ms"], ["floor", 3.5], ["optimised", 9.5], tflops=10),
        "bulk": table_of(["engine", "images_s"], ["local", 1000.0], ["ray", 1000 / 1.5]),
        "startup": table_of(["program", "seconds"], ["narvl caption IMAGE", 3]),
        "reading": table_of(["image", "reading_ms"], ["640 x 480", 8]),
        "counts": table_of(
            ["size", *gflop, *kernels],
            ["nano", 1, 1, 1, 1, 50, 25, 10, 1],
            ["base", 100, 10, 1, 300, 100, 50, 20, 400],
            ["large", 200, 20, 2, 600, 200, 100, 40, 800],
        ),
        "limit_gpu_parts": table_of(
            ["size", "encoder_ms", "step_5_ms", "parallel_ms"], ["nano", 5, 4, 2], ["base", 10, 5, 4]
        ),
        "loss_h200": table_of(["loss", "ms"], ["query_ctc", 6]),
        "published": table_of(
            ["fact", "value"],
            ["GB of train2014.zip", 10],
            ["images in train2014.zip", 100_000],
            ["days of it", 10],
            ["GPUs of the training whose failures are counted", 100],
            ["unexpected failures in them", 24],
            ["images of COCO's train and restval", 3600],
            ["images of CC12M", 36_000],
        ),
    }
    return large_jobs.LargeJobs(data)


def test_a_large_job_takes_at_least_its_flops_and_at_most_one_image_at_a_time(made_up: Any) -> None:
    plan = made_up.captions()[8]
    assert plan.least.costs.device_ms == pytest.approx(4) and plan.most.costs.device_ms == pytest.approx(10)
    assert plan.least.seconds == pytest.approx(3 + 12_500 * 4) and plan.most.seconds == pytest.approx(3 + 12_500 * 10)
    assert plan.least.gigabytes_per_second == pytest.approx(8 * 100_000 / 4e-3 / 1e9)
    assert made_up.hours_between_failures == 1000


def test_times_of_large_are_those_of_base_times_the_ratio_of_kernels(made_up: Any) -> None:
    assert made_up.teacher_ms("base") == pytest.approx(((100 + 10 + 13 * 5) / 10, 10 + 13 * 5))
    assert made_up.teacher_ms("large") == pytest.approx(((200 + 20 + 13 * 5 * 2) / 10, 20 + 13 * 10))
    assert made_up.derived_of_measured() == pytest.approx((0.625, 1.0))  # a step: 5 / 2 of 4; the encoder: 10 / 2 of 5
    coco = made_up.distillations()["COCO", "large"][8]
    assert coco.least.busy == 4 and coco.least.seconds == pytest.approx(3 + 35 + 0.5)


def test_a_training_takes_its_flops_and_at_most_its_kernels_and_the_loss_beside(made_up: Any) -> None:
    assert made_up.training_ms("base") == pytest.approx((30, 30 + (400 * 0.1 + 6) / 2))
    training = made_up.trainings()[0]
    assert (training.data, training.size, training.epochs) == ("COCO", "base", 5)
    assert (training.least, training.most) == pytest.approx((0.15, 0.265))


def test_speed_ups_and_bounds_are_those_of_the_benchmark() -> None:
    parts = limit.Parts((1.0, 7.0), (0.5, 0.25, 3.0, 0.5), (2.0, 0.5, 0.125))
    case = limit.Case(1, 5, 10, 20)
    checks = [limit.Check(case, 40.0, 12.0, 41.0, 12.0)]
    result = {"sizes": {"base": limit.Limit("base", parts, checks).as_json()}}
    row = read_table("limit", json.loads(json.dumps(result)))["base/10"]
    assert row["speed_up"] == pytest.approx(parts.speed_up(case))
    assert row["bound"] == pytest.approx(parts.bound(case))
    measured = read_table("limit", result, "parts")["base"]
    assert measured["encoder_ms"] == pytest.approx(parts.encoder_ms(1))
    assert measured["step_5_ms"] == pytest.approx(3.0 + 0.5 * 5)


def test_a_sweep_is_read_as_the_benchmark_writes_it() -> None:
    found = sweep.Sweep("base", 5, 100.0, {1: 120.0, 20: 200.0}, {3: 110.0})
    table = read_table("sweep", json.loads(json.dumps(vars(found))))
    assert table["3"]["tokens_20"] == pytest.approx(200 / 110)
    assert table["encoder"]["tokens_1"] == pytest.approx(1.2)


def test_what_benchmarks_print_is_read() -> None:
    cost = training.StepCost(forward=40.0, loss=2.0, backward=50.0, optimizer=8.0, kept_mb=53.0, batch=16)
    fast = training.StepCost(forward=40.0, loss=2.0, backward=50.0, optimizer=4.0, kept_mb=53.0, batch=16)
    waits = "some/train.tsv, 1 worker: 4.40 ms wait per batch, 827.0 ms per step, share of waiting 0.53% (9 batches)\n"
    printed = waits + training.table({"adam": cost, "fused_adam": fast})
    rows = read_table("training", printed)
    assert rows["adam"]["optimizer"] == 8.0 and rows["adam"]["kept_mb"] == 53
    assert rows["fused_adam"]["speed"] == pytest.approx(100 / 96, abs=1e-3)
    assert read_table("training", printed, "waits")["train.tsv"]["share"] == pytest.approx(0.0053)

    times = {"caption": LatencyStats(12.0, 13.0, 12.0, 9)} | {
        f"caption: {part}": LatencyStats(ms, ms, ms, 9) for part, ms in zip(api.PARTS, (1, 7, 2, 0), strict=True)
    }
    row = read_table("api", api.table(times))["caption"]
    assert (row["p50_ms"], row["beside_ms"], row["ratio"], row["network"]) == (12.0, 10.0, 1.2, 7.0)

    seconds = read_table("startup", startup.table({startup.TORCH: 2.0, "narvl path": 0.03}))
    assert seconds["narvl path"]["seconds"] == 0.03

    floor = read_table("floor", "151.0 GFLOP at 67 GFLOP/s: floor 2252 ms\nplain: 3657.6 ms, 1.62 of the floor\n")
    assert (floor["floor"]["ms"], floor["plain"]["of_floor"]) == (2252, 1.62)

    loss = "query_ctc: 57.6 ms, 1 MiB, error of the gradient 7.3e-06\ntorch: 156.4 ms, error of the gradient 3.4e-05\n"
    assert read_table("loss", loss)["query_ctc"] == {"loss": "query_ctc", "ms": 57.6, "extra_mb": 1, "error": 7.3e-6}
    assert read_table("loss", loss)["torch"]["extra_mb"] is None


def test_results_of_models_decoding_and_serve_are_read() -> None:
    system = {**asdict(LatencyStats(20.0, 25.0, 21.0, 9)), "quality": 3.8, "encoder_share": 0.5}
    system |= {"images_per_second": {"8": 90.0, "32": 110.0}, "stages": {"picture": 1.0}}
    models = {"systems": {"student_greedy": system}, "metric": "cider"}
    assert read_table("models", models)["student_greedy"]["batch_32"] == 110.0
    assert read_table("models", models, "stages")["student_greedy"]["picture"] == 1.0
    ways = {"ways": {"greedy": {"quality": 0.9, "invalid": 0, "score": -1.0, "error": 0.1, "p50_ms": 5.0}}}
    assert read_table("decoding", ways)["greedy"]["p50_ms"] == 5.0
    checked = {"p50_ms": 1.0, "p95_ms": 2.0, "lost": 0, "unexpected_statuses": 1, "other_answers": 2}
    speeds = {"one_process": 100.0, "batching": 120.0}
    serve = {"images_per_second": speeds, "systems": {"batching": {**checked, "memory_mb": [700.0, None, 702.0]}}}
    row = read_table("serve", serve)["batching"]
    assert (row["ratio"], row["wrong"], row["memory_last_mb"]) == (1.2, 3, 702.0)


def test_a_collected_run_has_neither_paths_nor_long_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "DATA", tmp_path)
    run = tmp_path / "caption_quick_seed1"
    run.mkdir()
    machine = {
        "processor": "P",
        "cores": 2,
        "threads": 1,
        "precision": "float32",
        "torch": "2.14.1+cpu",
        "commit": "0" * 12,
    }
    system = {"scores": {"CIDEr": 4.0}, "object_recall": 0.9, "latency": {"p50_ms": 12.0}}
    teacher = {"scores": {"CIDEr": 5.0}, "latency": None}
    confidence = {"error": 0.02, "coverage": [0.5, 1.0], "risk": [0.1, 0.2], "share": [1.0]}
    result = {
        "systems": {"teacher_beam5": teacher, "student": system},
        "test": {"file": "/some/where/test.tsv"},
        "machine": machine,
        "calibration": {"systems": {"student": confidence}},
        "settings": {"SEED": "1", "TRAIN": "6000", "NOUNS": ""},
    }
    (run / "results.json").write_text(json.dumps(result))
    (run / "stages.tsv").write_text("data\t30\nteacher\t60\n")
    (tmp_path / "run_caption_settings.json").write_text("what the run's own settings replace")
    (tmp_path / "run_caption.json").write_text(json.dumps({"question": "Is it good?", "facts": {"test_rows": 1}}))
    content = json.loads(collect.collect("run_caption", run, "report", {"note": "alone"})[0].read_text())
    assert content["question"] == "Is it good?" and content["facts"] == {"test_rows": 1}
    assert content["result"]["test"]["file"] == "test.tsv"
    assert content["run"]["command"] == "bash run_scripts/caption.sh PRESET=quick"
    assert (content["run"]["seed"], content["run"]["commit"], content["run"]["torch"]) == (1, "0000000", "2.14.1")
    found = measurements.read_all(tmp_path)
    assert (found["run_caption"]["student"]["score"], found["run_caption"]["student"]["ratio"]) == (4.0, 0.8)
    assert found["run_caption_confidence"]["student"] == {"system": "student", "error": 0.02, "share": [1.0]}
    assert found["run_caption_settings"]["settings"]["minutes"] == 1.5
    assert found["run_caption_settings"]["settings"]["nouns"] is None
    assert found["run_caption"].runs[0]["machine"] == "P, 2 cores, 1 thread, float32"


def test_parts_of_a_study_that_have_ended_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "DATA", tmp_path)

    def cell(score: float, finished: bool = True) -> dict[str, Any]:
        machine = {"processor": "P", "cores": 2, "threads": 1, "precision": "float32"}
        return {"finished": finished, "measures": {"score": score}, "machine": machine}

    def row(label: str, *names: str) -> dict[str, Any]:
        measures = {"score": {"mean": 3.5, "sd": 0.5, "number": len(names)}}
        seeds = {str(seed): name for seed, name in enumerate(names, 1)}
        apart = {"mean": 0.1, "low": 0.0, "high": 0.2, "seeds": 2, "paired": True}
        kept = {"measures": measures, "validation": [[20, 3.5]], "difference": apart}
        return {"label": label, "cells": seeds, "finished": 2, **kept}

    of_part = {"main": "CIDEr", "compare": "loss", "reference": "a"}
    study = {
        "question": "Which?",
        "parts": {
            "two captions": of_part | {"rows": [row("a", "c1", "c2"), row("b", "c3", "c1")]},
            "boxes": of_part | {"rows": [row("a", "c1", "c4")]},
        },
        "cells": {"c1": cell(3.0), "c2": cell(4.0), "c3": cell(2.0), "c4": cell(1.0, finished=False)},
    }
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "study.json").write_text(json.dumps(study))
    (file,) = collect.collect("study_losses", tmp_path / "losses", "study", {"commit": "0000000"})
    assert file.name == "study_losses_two_captions.json"
    content = json.loads(file.read_text())
    assert content["question"] == "Which?"
    assert (content["run"]["seed"], content["run"]["commit"]) == ("1, 2", "0000000")
    assert content["run"]["command"] == "narvl study run_scripts/studies/losses.yaml --out runs/losses"
    found = measurements.read_all(tmp_path)["study_losses_two_captions"]["a"]
    assert (found["score"], found["score_sd"], found["scores"]) == (3.5, 0.5, [3.0, 4.0])
    assert found["difference_high"] == 0.2
    assert found["curve"] == [[20, 3.5]]


# --- Filters ---------------------------------------------------------------------------------------------------------


def test_numbers_are_written_as_pages_want_them() -> None:
    assert [make.fixed(value) for value in (1234.5678, None, "33 to 240")] == ["1,234.568", "–", "33 to 240"]
    assert [make.scientific(value) for value in (3e-6, "equal")] == ["3.0e-6", "equal"]
    assert make.percent(0.0123, 1) == "1.2 %"


def test_long_commands_and_paragraphs_are_broken_and_tables_stay() -> None:
    command = "narvl bench models " + " ".join(f"--option{number} value" for number in range(12))
    lines = make.code_lines(command).split("\n")
    assert len(lines) > 1 and all(line.endswith(" \\") for line in lines[:-1])
    assert " ".join(line.strip(" \\") for line in lines) == command
    text = make.tidy("word " * 60 + "\nmore\n\n\n\n| " + "cell " * 60 + "|\n- " + "item " * 60)
    assert max(len(line) for line in text.split("\n") if not line.startswith("|")) <= make.WIDTH
    assert "\n\n| cell" in text and "\n\n\n" not in text
    assert re.search(r"\n- item .*\n  item", text)


def test_the_picture_of_outputs_is_drawn_by_its_script() -> None:
    folder = ROOT / "docs" / "images"
    shown = json.loads((folder / "outputs.json").read_text(encoding="utf-8"))
    picture = runpy.run_path(str(folder / "outputs.py"))["draw"](shown)
    assert picture == (folder / "outputs.svg").read_text(encoding="utf-8")
