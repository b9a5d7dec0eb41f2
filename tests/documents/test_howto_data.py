"""The how-to pages about training files and checkpoints: each block is run as it is printed."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.registry import REGISTRIES
from pages import ROOT, SHORT, SMALL, Newcomer, Page, commands, draw_scene, lines_of, save_model
from PIL import Image
from port_folders import LABELS, write_folder

from narvl_plugin.checkpoints.finding import CONFIG_FILE, SETTINGS_FILE, WEIGHTS
from narvl_plugin.checkpoints.ports import TASK_OPTIONS
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data.images import orientation
from narvl_plugin.data.text import load_codec
from narvl_plugin.data.vocabulary import MERGES_FILE, PORT_FILE
from narvl_plugin.models import build
from narvl_plugin.models.config import SIZES, OfaConfig
from narvl_plugin.models.interop import flags_of
from narvl_plugin.models.ports import UNSUPPORTED
from narvl_plugin.pipeline.keys import KEYS
from narvl_plugin.tasks import TASKS

OWN = Page("docs/how-to/own-tsv.md")
RAW = Page("docs/how-to/raw-data-sets.md")
OFA = Page("docs/how-to/ofa-checkpoints.md")
PORTS = Page("docs/how-to/ofa-ports.md")
EVALUATE = Page("docs/how-to/evaluate.md")


def test_every_block_is_tested() -> None:
    for page in (OWN, RAW, OFA, PORTS, EVALUATE):
        page.require_tests()


# --- A TSV file of one's own -----------------------------------------------------------------------------------------

CAPTIONS = {f"{color}.png": [f"a {color} wall", f'the "{color}", tall\nwall && more'] for color in ("red", "blue")} | {
    f"{color}.png": [f"a {color} wall"] for color in ("green", "white", "gray", "black")
}


@pytest.fixture
def photos(newcomer: Newcomer) -> Newcomer:
    """Give a newcomer with images and their captions."""
    (newcomer.folder / "photos").mkdir()
    with open(newcomer.folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        for name, captions in CAPTIONS.items():
            Image.new("RGB", (32, 24), Path(name).stem).save(newcomer.folder / "photos" / name)
            csv.writer(file).writerows([name, caption] for caption in captions)
    return newcomer


@OWN.block("import csv")
def test_a_folder_and_captions_become_tsv_files(block: str, photos: Newcomer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.folder)
    exec(block, {})
    rows = {
        split: [line.split("\t") for line in lines_of(Path(f"{split}.tsv"))] for split in ("train", "valid", "test")
    }
    assert {split: len(found) for split, found in rows.items()} == {"train": 4, "valid": 1, "test": 1}
    for row in sum(rows.values(), []):
        *_, image = row
        assert len(row) == 5 and Path(image).is_file()
        assert len(row[2].split("&&")) == len(CAPTIONS[Path(image).name])
    assert {row[4] for row in sum(rows.values(), [])} == {f"photos/{name}" for name in CAPTIONS}


@pytest.mark.integration
@OWN.block("import csv", "writing")
@OWN.block("fairseq-train train.tsv,valid.tsv", "training")
@OWN.block("fairseq-generate test.tsv", "asking")
def test_own_captions_train_a_student(
    writing: str,
    training: str,
    asking: str,
    photos: Newcomer,
    save_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(photos.folder)
    exec(writing, {})
    photos.types(OWN.in_text("narvl vocab train.tsv --out vocab"))
    save_checkpoint(photos.folder / "teacher.pt", "ofa", "caption", bpe_dir=str(photos.folder / "vocab"))
    photos.types(training, f"{SMALL} --patch-image-size 32 --max-update 2 --cpu --num-workers 0")
    best = read_checkpoint(photos.folder / "checkpoints" / "checkpoint_best.pt")
    assert "cider" in str(best["cfg"]["checkpoint"]["best_checkpoint_metric"])
    assert best["cfg"]["task"]["any_reference"] is True
    generate, caption = commands(asking)
    assert len(photos.generated(f"{generate} --cpu")) == 1
    photos.types(caption)
    assert [line.split("\t")[0] for line in lines_of(photos.folder / "captions.tsv")] == sorted(CAPTIONS)


def test_the_table_of_tasks_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| `([0-9,]+)` \| (\d) ?", OWN.text, flags=re.MULTILINE)
    rows += re.findall(r"^\| `(caption)` \| (.*?) \| `([0-9,]+)` \| (20) ", OWN.text, flags=re.MULTILINE)
    assert {name for name, *_ in rows} == set(TASKS)
    for name, columns, selected, _ in rows:
        assert TASKS[name].config_class().selected_cols == selected
        columns = columns.replace("`x0,y0,x1,y1`", "box").replace("`x0,y0,x1,y1&&…`", "boxes")
        written = re.split(r", (?![xy][01])", columns.replace(r"\|", "|"))
        names = [written[int(number)].replace("`confidence|!+answer&&…`", "answers") for number in selected.split(",")]
        assert [one.replace("captions", "caption") for one in names] == list(TASKS[name].dataset_class.column_names)


def test_a_sideways_photo_is_saved_upright(tmp_path: Path) -> None:
    """As the page says, with Pillow's function."""
    assert "`ImageOps.exif_transpose`" in OWN.text
    from PIL import ImageOps

    image = Image.new("RGB", (8, 6))
    image.getexif()[274] = 6
    image.save(tmp_path / "sideways.jpg", exif=image.getexif())
    with Image.open(tmp_path / "sideways.jpg") as sideways:
        assert orientation(sideways) == 6
        upright = ImageOps.exif_transpose(sideways)
        assert upright.size == (6, 8) and orientation(upright) == 1


# --- Published data sets and benchmarks ------------------------------------------------------------------------------


@pytest.mark.integration
@RAW.block("narvl data coco")
def test_raw_data_become_tsv_files(block: str, newcomer: Newcomer, write_raw_data: Callable[[Path], None]) -> None:
    write_raw_data(newcomer.folder / "DIR")
    *converters, easy_vqa = commands(block)
    for command in converters:
        said = newcomer.types(command)
        (out,) = re.findall(r"--out (\S+)", command)
        written = {file.stem for file in (newcomer.folder / out).glob("*.tsv")}
        assert len(written) >= 3 and all(f"{out}/{split}.tsv: " in said for split in written)
        assert "rows written" in said
    if importlib.util.find_spec("easy_vqa") is None:
        pytest.skip("all but its last line is tested: pip install easy-vqa==1.0")
    newcomer.types(easy_vqa)
    assert (newcomer.folder / "easy_vqa_tsv" / "trainval_ans2label.pkl").is_file()


def test_the_table_of_raw_files_is_that_of_the_modules() -> None:
    """Each file and folder in backticks is named by the first lines of a data set's module."""
    from narvl_plugin.data.sources import coco, gqa, grefcoco, refcoco, snli_ve, visual_genome, vqav2

    rows = dict(re.findall(r"^\| ([\w+ -]+?) \| (`.* \| .* \| .*) \|$", RAW.text, flags=re.MULTILINE))
    modules = {"COCO captions": coco, "VQAv2": vqav2, "GQA": gqa, "SNLI-VE": snli_ve}
    modules |= {"gRefCOCO": grefcoco, "Visual Genome": visual_genome}
    modules |= dict.fromkeys(("RefCOCO", "RefCOCO+", "RefCOCOg"), refcoco)
    assert modules.keys() <= rows.keys()
    for name, module in modules.items():
        files, folders, splits = rows[name].split(" | ")
        for place in re.findall(r"`([^`]+)`", files + folders):
            beginning, _, end = place.partition("…")
            assert re.search(f"{re.escape(beginning)}.*{re.escape(end)}", str(module.__doc__)), place
        known = (
            module.SPLITS
            if module is not refcoco
            else refcoco.SPLITS[name.lower(), "unc" if name != "RefCOCOg" else "umd"]
        )
        assert [split for split in re.findall(r"`([^`]+)`", splits) if split != "restval"] == list(known)


@pytest.mark.integration
@EVALUATE.block("fairseq-generate vqa_tsv/val.tsv", "predicting")
@EVALUATE.block("narvl evaluate caption.json", "evaluating")
def test_outputs_are_scored_as_benchmarks_do(
    predicting: str,
    evaluating: str,
    newcomer: Newcomer,
    write_raw_data: Callable[[Path], None],
    predictions: dict[str, Any],
    save_checkpoint: Callable[..., Path],
) -> None:
    folder = newcomer.folder
    write_raw_data(folder)
    newcomer.types("narvl data vqav2 --raw . --out vqa_tsv --splits val")
    save_checkpoint(folder / "student.pt", "narvl", "vqa_gen", bpe_dir=str(folder / "vocab"), patch_image_size=32)
    generate, *rest = commands(predicting)
    newcomer.types(generate, "--cpu")
    for command in rest:
        newcomer.types(command)
    assert json.loads((folder / "scores.json").read_text())["tables"].keys() == {"answer type", "question type"}
    for name, correct in predictions.items():
        (folder / name).write_text(json.dumps(correct))
    for command in commands(evaluating):
        assert "1.0000" in newcomer.types(command)


@pytest.mark.parametrize("task", ["caption", "vqa", "gqa", "refcoco", "snli_ve", "grefcoco", "visual_genome"])
def test_forms_of_predictions_are_those_of_the_code(task: str) -> None:
    from narvl_plugin.evaluation.predictions import FORMS

    (entry,) = re.findall(rf"^\| `{task}` \| `\{{(.*?)\}}`", EVALUATE.text, flags=re.MULTILINE)
    assert re.findall(r'"(\w+)":', entry) == [FORMS[task].key, FORMS[task].value]


def test_a_triplet_is_of_the_form_that_the_pages_show() -> None:
    from narvl_plugin.data.triplets import read_triplets
    from narvl_plugin.evaluation.predictions import FORMS

    def shown(page: Page, beginning: str) -> str:
        (text,) = (block.text for block in page.blocks if block.text.startswith(beginning))
        return text

    assert FORMS["visual_genome"].is_value([json.loads(shown(EVALUATE, '{"subject"'))])
    assert len(read_triplets(shown(RAW, "dog 12,40"), "raw-data-sets.md:1")) == 2


def test_scorers_that_the_page_names_are_there() -> None:
    named = re.findall(r"^\| `(\w+)` \| `(\w+)`(?:, or `(\w+)`)? \|$", EVALUATE.text, flags=re.MULTILINE)
    assert {task for task, *_ in named} == set(TASKS)
    scorers = {scorer for _, *scorers in named for scorer in scorers if scorer}
    assert scorers <= REGISTRIES["scoring"]["registry"].keys() and len(scorers) == 8


# --- Published checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.integration
@OFA.block("fairseq-train … --arch narvl_base")
def test_published_checkpoints(block: str, newcomer: Newcomer) -> None:
    """With stand-ins of OFA's sizes, of random weights and few words."""
    folder = newcomer.folder
    (folder / "bpe").mkdir()
    (folder / "bpe" / "dict.txt").write_text("".join(f"{token} 1\n" for token in range(1000)))
    save_model(folder / "ofa_base.pt", "base", len(load_codec(folder / "bpe").dictionary), layout=flags_of)
    train, generate, to_student, to_ofa, to_safetensors = commands(block)
    caption = '--user-dir "$(narvl path)" --task caption --bpe-dir bpe --patch-image-size 32'
    # sgd has no state beside each weight; with so few words a caption takes more tokens than there are queries.
    short = SHORT.replace("adam", "sgd") + " --skip-bad-rows 1"
    newcomer.types(train, f"train.tsv,valid.tsv {caption} --criterion qctc {short} --no-save --disable-validation")
    assert len(newcomer.generated(generate, f"test.tsv {caption} --max-len-b 2 --cpu")) == 2
    newcomer.types(to_student)
    state = read_checkpoint(folder / "student.pt")
    assert state["model"]["decoder.query_embed.weight"].shape == (20, 768)

    save_model(folder / "teacher.pt", "tiny", 200)
    newcomer.types(to_ofa)
    assert isinstance(read_checkpoint(folder / "ofa.pt")["cfg"]["model"], Namespace)
    newcomer.types(to_safetensors)
    description = json.loads((folder / "student.json").read_text())
    assert description["cfg"]["model"]["num_queries"] == 20


@pytest.mark.integration
@OFA.block("import narvl\n")
def test_a_published_checkpoint_answers_in_python(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in of size tiny and of small images, since size base takes long on a CPU."""
    draw_scene(tmp_path)
    (tmp_path / "bpe").mkdir()
    (tmp_path / "bpe" / "dict.txt").write_text("".join(f"{token} 1\n" for token in range(1000)))
    save_model(tmp_path / "ofa_base.pt", "tiny", len(load_codec(tmp_path / "bpe").dictionary), layout=flags_of)
    state = torch.load(tmp_path / "ofa_base.pt", weights_only=False)
    state["cfg"]["task"]["patch_image_size"] = 64
    torch.save(state, tmp_path / "ofa_base.pt")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["teacher"].verbs == ("caption",)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_sizes_are_those_of_the_code() -> None:
    rows = re.findall(
        r"^\| `ofa_(\w+)`, `narvl_(\w+)` \| (\d+) \| (\d+) and (\d+) \| ResNet-(\d+) \|$", OFA.text, re.MULTILINE
    )
    assert {size for size, *_ in rows} == set(SIZES) - {"nano"}
    for size, again, *numbers in rows:
        config = OfaConfig(**SIZES[size])
        found = (config.encoder_embed_dim, config.encoder_layers, config.decoder_layers)
        assert size == again
        assert [*map(str, found), config.vision_trunk.removeprefix("resnet")] == numbers


@pytest.mark.integration
@PORTS.block("narvl convert ofa-port")
def test_ports_of_published_checkpoints(block: str, newcomer: Newcomer) -> None:
    """With a stand-in of size tiny, since size base takes long on a CPU."""
    folder = newcomer.folder
    write_folder(folder / "ofa-port", build("ofa_tiny", vocab_size=LABELS))
    to_student, to_ofa, to_port, train, generate = commands(block.replace("narvl_base", "narvl_tiny"))
    newcomer.types(to_student)
    assert read_checkpoint(folder / "student.pt")["model"]["decoder.query_embed.weight"].shape == (20, 256)
    newcomer.types(to_ofa)
    assert read_checkpoint(folder / "ofa_base.pt")["cfg"]["model"].arch == "ofa_tiny"
    newcomer.types(to_port)
    for name in ("vocab.json", "merges.txt"):
        read = json.loads if name == "vocab.json" else str
        assert read((folder / "new-port" / name).read_text()) == read((folder / "ofa-port" / name).read_text())
    caption = '--user-dir "$(narvl path)" --task caption --patch-image-size 32'
    short = SHORT.replace("adam", "sgd") + " --skip-bad-rows 9"  # letters of this vocabulary take more than 20 queries
    given = f"train.tsv,valid.tsv {caption} --bpe-dir ofa-port --criterion qctc {short} --max-tgt-length 2"
    newcomer.types(train, f"{given} --no-save --disable-validation")
    assert len(newcomer.generated(generate, f"test.tsv {caption} --max-len-b 2 --cpu")) == 2


@pytest.mark.integration
@PORTS.block("import narvl\n")
def test_a_port_answers_in_python(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_scene(tmp_path)
    port = write_folder(tmp_path / "ofa-port", build("ofa_tiny", vocab_size=LABELS))
    (port / "configuration.json").write_text('{"patch_image_size": 64}')
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["teacher"].verbs == ("caption",)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_parts_and_files_of_ports_are_those_of_the_code() -> None:
    files, options = (" ".join(re.findall(r"^\| `.*$", PORTS.text, re.MULTILINE)), PORTS.text)
    for name in (CONFIG_FILE, SETTINGS_FILE, PORT_FILE, MERGES_FILE, *WEIGHTS[::2]):
        assert f"`{name}`" in files
    for name in UNSUPPORTED.keys() - {"temperature_init_value", "entangle_position_embedding"}:
        assert f"`{name}`" in options
    named = re.findall(r"ModelScope's options of the task: (.*) \|", PORTS.text)[0]
    assert set(re.findall(r"`(\w+)`", named)) == set(TASK_OPTIONS) - {"imagenet_default_mean_and_std"}


@pytest.mark.parametrize("page", [RAW, OFA, PORTS], ids=["raw-data-sets", "ofa-checkpoints", "ofa-ports"])
def test_pipelines_that_the_pages_name_are_there(page: Page) -> None:
    """test_readme.py runs such a command."""
    _, script, *settings = page.in_text("bash run_scripts/").split()
    assert (ROOT / script).is_file() and settings
    listed = {key.name for key in KEYS}
    assert [one for one in settings if one.partition("=")[0] not in listed] == []


def test_files_of_a_vocabulary_may_lie_beside_dict(tmp_path: Path) -> None:
    from narvl_plugin.data.gpt2 import gpt2_file

    for name in ("encoder.json", "vocab.bpe"):
        assert gpt2_file(tmp_path, name).is_file()  # of the package
        shutil.copyfile(gpt2_file(tmp_path, name), tmp_path / name)
        assert gpt2_file(tmp_path, name) == tmp_path / name
