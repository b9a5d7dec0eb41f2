"""The reference says what is there: commands, keys, columns, batches; and the landing page's block runs."""

from __future__ import annotations

import importlib.util
import pickle
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY, setup_task
from omegaconf import OmegaConf
from pages import ROOT, Page, draw_scene

import narvl
import narvl_plugin.registered  # noqa: F401 - registers the tasks
from narvl_plugin import ctc
from narvl_plugin.cli.app import app
from narvl_plugin.data.dataset import STAND_IN, TsvDataset
from narvl_plugin.data.mixture import Mixture
from narvl_plugin.data.survey import does_not_fit
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.models.config import NarvlConfig
from narvl_plugin.models.registered import FAMILIES
from narvl_plugin.tasks import TASKS

REFERENCE = ROOT / "docs" / "reference"
INDEX = Page("docs/index.md")
CELL = re.compile(r"(?<!\\)\|")


@pytest.fixture(scope="module")
def from_code() -> Any:
    """Give the module that writes the pages' parts from the code."""
    spec = importlib.util.spec_from_file_location("from_code", ROOT / "docs" / "_ext" / "from_code.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(page: str) -> str:
    return (REFERENCE / page).read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """Return the text below a heading of any level, up to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^## |\Z)", text_of(page), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page} has no heading {title}"
    return found[2]


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables in a text, with marks of code, and without the tables' heads."""
    for table in re.findall(r"^\| .*\n\| ---.*\n((?:\|.*\n)*)", text, re.MULTILINE):
        for line in table.splitlines():
            yield [cell.strip().replace(r"\|", "|") for cell in CELL.split(line)[1:-1]]


def keys(text: str) -> list[str]:
    """Return the first cells of the tables in a text, without the marks of code."""
    return [cells[0].strip("`") for cells in rows(text)]


def test_every_block_is_tested() -> None:
    INDEX.require_tests()


@pytest.mark.integration
@INDEX.block("import narvl")
def test_the_landing_page_captions(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_scene(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert len(capsys.readouterr().out.split()) > 3


# --- Parts from the code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted(file.name for file in REFERENCE.glob("*.md")))
def test_parts_from_the_code_are_up_to_date(page: str, from_code: Any) -> None:
    text = text_of(page)
    assert from_code.with_parts(text) == text, "run: python docs/_ext/from_code.py"


def test_every_command_is_listed_and_its_section_has_each_option_default_and_help() -> None:
    listed = dict(re.findall(r"^\| \[`(narvl [a-z0-9 -]+)`\]\(#\S+\) \| (.+) \|$", text_of("cli.md"), re.MULTILINE))

    def check(command: Any, name: str) -> None:
        below = getattr(command, "commands", {})
        for word, one in below.items():
            check(one, f"{name} {word}")
        if below:
            return
        assert listed.pop(name).replace("`", "").replace("\\", "") == command.help.splitlines()[0]
        text = section("cli.md", name)
        words = " ".join(text.replace("`", "").replace("\\", "").split())
        for paragraph in command.help.split("\n\n"):
            assert " ".join(paragraph.split()).removeprefix("Example: ").rstrip(".") in words
        shown = {cells[0]: cells for cells in rows(text)}
        for parameter in command.params:
            spelled = (
                parameter.metavar or parameter.opts[0] if parameter.param_type_name == "argument" else parameter.opts[0]
            )
            first = next(cells for names, cells in shown.items() if f"`{spelled}" in names)
            assert all(flag in first[0] for flag in parameter.secondary_opts)
            assert (first[1] == "required") == parameter.required
            if type(parameter.default) in (int, float):
                assert first[1].strip("`") == str(parameter.default)
            help_text = " ".join(parameter.help.split()).rstrip(".").replace("`", "")
            assert help_text[1:] in first[2].replace("`", "").replace("\\", "")

    check(typer.main.get_command(app), "narvl")
    assert listed == {}, "these commands are not there"


@pytest.mark.parametrize(
    ("text", "words"), [("x>=1", "At least 1."), ("0<=x<=1", "From 0 to 1."), ("0.5<=x<=10", "From 0.5 to 10.")]
)
def test_ranges_are_written_in_words(text: str, words: str, from_code: Any) -> None:
    assert from_code.limit(text) == words


def test_help_texts_are_escaped(from_code: Any) -> None:
    assert from_code.plain("see --beam, a*b [x] or <s> | `c|d`") == r"see `--beam`, a\*b \[x\] or `<s>` \| `c\|d`"
    assert from_code.described("--json", "Write [x].") == ["`--json`", "off", r"Write \[x\]."]
    assert from_code.described("--beam <int range>", "Width.  [default: 5; x>=1]") == [
        *("`--beam` int", "`5`", "Width. At least 1.")
    ]


def test_configuration_has_all_keys_of_our_tasks_models_and_criterions() -> None:
    page = set(keys(text_of("configuration.md")))
    ours: list[Any] = [
        *(kind for name, kind in TASK_DATACLASS_REGISTRY.items() if name in (*TASKS, "multitask")),
        *(kind for name, kind in MODEL_DATACLASS_REGISTRY.items() if re.match("(ofa|narvl)", name)),
        *(kind for name, kind in CRITERION_DATACLASS_REGISTRY.items() if kind.__module__.startswith("criterions")),
    ]
    assert len(ours) >= 5 + 12 + 3
    expected = {one.name for kind in ours for one in fields(kind) if one.metadata.get("help")}
    assert expected - page == set()
    for title, kind in (("caption", TASK_DATACLASS_REGISTRY["caption"]), ("Student only", NarvlConfig)):
        found = re.search(rf"^### {title}\n(.*?)(?=^#)", text_of("configuration.md"), re.MULTILINE | re.DOTALL)
        assert found is not None
        defaults = {one.name: one.default for one in fields(kind)}
        for name, _, default, _ in rows(found[1]):
            expected_default = defaults[name.strip("`")]
            if type(expected_default) in (int, float):
                assert default == f"`{expected_default}`"


def test_index_pages_become_the_navigation(from_code: Any) -> None:
    text = "# A\n\n- [B](b.md) is b.\n- **[C](c.md)**\n- see [D](d.md)\n- [other](../x/e.md)\n| [F](f.md) | f |\n"
    assert from_code.with_contents("a/index", text).endswith("```{toctree}\n:hidden:\n\nb\nc\nf\n```\n")
    assert from_code.with_contents("index", "- [B](b/index.md)\n- [C](b/c.md)\n").endswith("\n\nb/index\n```\n")
    assert from_code.with_contents("a/b", text) == text
    assert from_code.with_contents("a/index", "```{toctree}\nb\n```\n") == "```{toctree}\nb\n```\n"


# --- Python and glossary ---------------------------------------------------------------------------------------------


def test_what_people_import_is_on_the_page() -> None:
    text = text_of("python.md")
    directives = dict(re.findall(r"auto(?:class|function|exception|module):: (\S+)(?:\n +:members: (.+))?", text))
    assert {f"narvl.{name}" for name in narvl.__all__} <= directives.keys()
    documented = {one for members in directives.values() for one in members.split(", ")}
    assert documented & set(ctc.__all__) >= {
        *("query_ctc_loss", "query_ctc_any_loss", "bigram_f1", "viterbi", "token_posteriors", "collapse", "greedy"),
        *("prefix_beam_search", "beam_outputs", "Automaton", "one_of", "sequence_of", "LengthRange", "BoxSets"),
        *("score_candidates", "build_trie", "sample_paths", "expected_score", "min_queries"),
    }


def test_the_glossary_has_the_terms_in_order() -> None:
    terms = re.findall(r"^## (.+)$", text_of("glossary.md"), re.MULTILINE)
    assert terms == sorted(terms, key=str.lower)
    assert set(terms) >= {
        *("query", "blank", "collapse", "path", "alignment", "any reference", "teacher", "student", "distillation"),
        *("beam", "n-best", "constraint", "automaton", "calibration", "temperature", "coverage and risk", "backbone"),
        *("patch", "bins", "TSV", "user-dir", "CIDEr", "IoU", "model in the box", "Query-CTC", "scene", "verb"),
    }


# --- TSV files and batches -------------------------------------------------------------------------------------------


@pytest.fixture
def opened(answer_vocabulary: Path, tmp_path: Path) -> Callable[..., Any]:
    """Give a function that returns a task with a file of given rows."""

    def make(task: str, content: list[list[str]] | bytes, **options: Any) -> Any:
        file = tmp_path / f"{task}.tsv"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text("".join("\t".join(row) + "\n" for row in content), encoding="utf-8")
        given = {"data": str(file), "bpe_dir": str(answer_vocabulary), "patch_image_size": 32, **options}
        return setup_task(OmegaConf.structured(TASK_DATACLASS_REGISTRY[task](_name=task, **given)))

    return make


def test_columns_of_each_task_are_those_of_its_data_set() -> None:
    found = [cells for cells in rows(section("tsv.md", "Columns of each task")) if len(cells) == 4]
    assert {cells[0].strip("`") for cells in found} == set(TASKS)
    for task, whole, selected, read in found:
        name = task.strip("`")
        assert selected.strip("`") == TASKS[name].config_class.selected_cols
        names = TASKS[name].dataset_class.column_names
        assert tuple(read.split(", ")) == names
        columns = whole.split(", ")
        assert tuple(columns[number] for number in map(int, selected.strip("`").split(","))) == names


def error_of(open_file: Callable[[], Any]) -> str:
    """Return the message of the error that opening a file, or reading its first row as a student does, ends in."""
    with pytest.raises((InputError, BadRow)) as raised:
        dataset: TsvDataset = open_file()
        dataset.sample(0)
        if (need := dataset.min_queries(0)) > 3:
            raise does_not_fit(dataset.where(0), need, 3)
    return str(raised.value)


def test_each_message_that_the_page_quotes_is_the_one_that_comes(
    opened: Callable[..., Any],
    tmp_path: Path,
    caption_rows: list[list[str]],
    refcoco_rows: list[list[str]],
    snli_ve_rows: list[list[str]],
    vqa_rows: list[list[str]],
) -> None:
    def changed(row: list[str], column: int, value: str) -> list[str]:
        return [*row[:column], value, *row[column + 1 :]]

    def reading(task: str, content: list[list[str]] | bytes, **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            one = opened(task, content, **options)
            one.load_dataset("train")
            return one.dataset("train")

        return run

    caption, box = caption_rows[0], refcoco_rows[0]
    in_latin = "\t".join(changed(caption, 2, "caf\u00e9 on a wall")).encode("latin-1") + b"\n"
    shares = [changed(row, 3, f"0.1,0.1,0.{number}5,0.9") for number, row in enumerate(refcoco_rows, 4)]
    errors = {
        "the row has too few columns": reading("caption", [caption[:4]]),
        "the row is blank": reading("caption", [[""], caption]),
        "the text is not UTF-8": reading("caption", in_latin),
        "the image column is empty": reading("caption", [changed(caption, 4, "")]),
        "the image column is neither base64 nor a path": reading("caption", [changed(caption, 4, "no image here")]),
        "the image file does not exist": reading("caption", [changed(caption, 4, "gone.png")]),
        "the image is broken": reading("caption", [changed(caption, 4, caption[4][:60])]),
        "the image column is an address": reading("caption", [changed(caption, 4, "https://localhost/a.png")]),
        "the caption has no words": reading("caption", [changed(caption, 2, "...")]),
        "the box is not four numbers": reading("refcoco", [changed(box, 3, "1,2,3")]),
        "the box has no area, as x,y,width,height often has": reading("refcoco", [changed(box, 3, "5,3,2,2")]),
        "an edge lies more than a pixel outside of the image": reading("refcoco", [changed(box, 3, "0,0,90,3")]),
        "the label is unknown": reading("snli_ve", [changed(snli_ve_rows[0], 5, "perhaps")]),
        "the answers have another form": reading("vqa_gen", [changed(vqa_rows[0], 3, "red")]),
        "the target is longer than the queries allow": reading("caption", [caption]),
        "the file does not exist": lambda: TsvFile(tmp_path / "gone.tsv", "0"),
        "the file is empty": reading("caption", b""),
        "the file is something else, such as a web page or an archive": reading("caption", b"<!doctype html>\n"),
        "`--selected-cols` names too few or too many columns": reading("caption", [caption], selected_cols="0,4"),
        "a column is certainly of another kind, such as images in place of captions": reading(
            "caption", caption_rows, selected_cols="0,4,4"
        ),
        "all boxes are shares of the image, from 0 to 1": reading("refcoco", shares),
    }
    quoted = {what: message.strip("`") for what, message in rows(section("tsv.md", "How it is checked"))}
    assert quoted.keys() == errors.keys()
    for what, open_file in errors.items():
        assert quoted[what] in error_of(open_file), what


def test_a_file_of_two_columns_needs_no_change(opened: Callable[..., Any], tmp_path: Path) -> None:
    draw_scene(tmp_path)
    task = opened("caption", [["scene.png", "a crab on a beach"]], selected_cols="0,0,1")
    task.load_dataset("train")
    assert task.dataset("train").sample(0)["id"] == "scene.png"


def described(title: str) -> dict[str, list[str]]:
    """Return the rows of a section of the page of batches by their keys."""
    text = re.search(rf"^(#+) {title}\n(.*?)(?=^#|\Z)", text_of("batches.md"), re.MULTILINE | re.DOTALL)
    assert text is not None
    return {cells[0].strip("`"): cells[1:] for cells in rows(text[2])}


def check(value: Any, cell: str, sizes: dict[str, int]) -> None:
    """Check a value against what the page says of its type and shape; sizes are learnt where a letter is new."""
    if isinstance(value, torch.Tensor):
        if kind := re.match(r"(?:list of B )?(int64|float32|float64|bool)\b", cell):
            assert value.dtype == getattr(torch, kind[1])
        if (shape := re.search(r"\(([^)]*)\)", cell)) is None:
            assert cell == "empty" and value.numel() == 0
            return
        letters = [letter.strip() for letter in shape[1].split(",") if letter]
        assert value.dim() == len(letters), cell
        for letter, size in zip(letters, value.shape, strict=True):
            name, _, added = letter.partition(" ")
            number = int(added.replace(" ", "")) if added else 0
            assert name.isdigit() or sizes.setdefault(name, size - number) == size - number, (cell, letter)
    elif isinstance(value, list):
        assert cell.startswith("list of") or "list" in cell
        assert "B" not in cell.split(" ")[2:3] or len(value) == sizes["B"]
    else:
        expected = {"int": int, "dict": dict, "text": str, "None": type(None), "True": bool}
        kinds = [kind for word, kind in expected.items() if re.search(rf"\b{word}\b", cell)]
        assert type(value).__module__ == "numpy" or isinstance(value, tuple(kinds)), cell


@pytest.mark.integration
@pytest.mark.parametrize("task", TASKS)
def test_batches_outputs_and_hypotheses_have_the_keys_of_the_page(
    task: str, opened: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    content = request.getfixturevalue({"vqa_gen": "vqa_rows"}.get(task, f"{task}_rows"))
    options: dict[str, Any] = {"any_reference": True} if task == "caption" else {}
    if task == "vqa_gen":
        (tmp_path / "answers.pkl").write_bytes(pickle.dumps({"red": 0, "two": 1, "a cat": 2}))
        options["ans2label_file"] = str(tmp_path / "answers.pkl")
    if task == "scene_graph":
        options["names_file"] = str(request.getfixturevalue("names_file"))
        options["bpe_dir"] = str(request.getfixturevalue("graph_vocabulary"))
    if task == "scene_tree":
        options["names_file"] = str(request.getfixturevalue("tree_names_file"))
        options["bpe_dir"] = str(request.getfixturevalue("tree_vocabulary"))
    inputs, added = described("net_input"), described("Batch")
    always = [key for key, cells in added.items() if len(cells) == 2]
    assert len(always) == 8
    batch: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        one = opened(task, content, **options)
        one.load_dataset(split)
        dataset = one.dataset(split)
        batch = dataset.collater([dataset[row] for row in range(2)])
        expected = {
            key
            for key, cells in added.items()
            if len(cells) == 2
            or (
                f"`{task}`" in cells[1]
                and (split == "train" or "in training" not in cells[1])
                and (split != "train" or "in validation and test" not in cells[1] or task not in cells[1].split(",")[0])
                and (split != "test" or "not in test" not in cells[1])
            )
        }
        assert batch.keys() == expected, split
        assert batch["net_input"].keys() == inputs.keys() - {"queries"}
        sizes: dict[str, int] = {"B": 2}
        for part, page in ((batch["net_input"], inputs), (batch, added)):
            for key, value in part.items():
                check(value, page[key][0], {**sizes} if key in ("patch_images", "decoder_prompts") else sizes)
        if split != "test":  # a mixture's batch, and one of rows that were skipped
            mixture = Mixture({"some": dataset}, {"some": 1.0})
            assert mixture.collater([mixture[0]]).keys() - batch.keys() == {"member"} <= added.keys()
            assert dataset.collater([None]).keys() - batch.keys() == {STAND_IN} <= added.keys()
        else:
            assert dataset.collater([None]) == {}
        if task == "caption" and split != "train":
            assert all(f"`{key}`" in added["first_reference"][2] for key in batch["first_reference"])

    outputs, hypotheses = described("Output of a model"), described("Hypothesis")
    for family in ("narvl", "ofa"):
        small = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet", "freeze_resnet": True}
        model = one.build_model(OmegaConf.structured(FAMILIES[family][0](_name=family, **small, **layers)))
        model.eval()
        logits, extra = model(**batch["net_input"])
        assert extra.keys() == outputs.keys()
        places = {"B": 2, "D": 16, "N" if family == "narvl" else "T": logits.size(1)}
        check(extra["encoder_out"], outputs["encoder_out"][0], places)
        assert list(extra["inner_states"][0].shape) == [logits.size(1), 2, 16]
        generator = one.build_generator([model], Namespace(beam=2, max_len_b=10))
        hypothesis = one.inference_step(generator, [model], batch)[0][0]
        expected = {key for key, cells in hypotheses.items() if cells[1] == "both"}
        if family == "narvl":
            own = [(key, cells[1]) for key, cells in hypotheses.items() if cells[1].startswith("student")]
            expected |= {key for key, of in own if of == "student" or f"`{task}`" in of}
        assert hypothesis.keys() == expected
        counted = {"N": logits.size(1)} if family == "narvl" else {}
        counted["T"] = len(hypothesis["tokens"]) - 1
        for key, value in hypothesis.items():
            if family == "narvl" or key != "alignment":
                check(value, hypotheses[key][0], counted)
