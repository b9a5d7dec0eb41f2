"""Stand-ins for programs that take too long, and for the raw files of data sets."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pages import ROOT, SHORT, SMALL, Newcomer, Page, commands, lines_of
from PIL import Image

from narvl_plugin.compat import command_lines
from narvl_plugin.data.scenes import write_scenes
from narvl_plugin.data.text import train_sentencepiece


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with data, embedded scenes of 32 pixels, and a vocabulary of them."""
    folder = tmp_path_factory.mktemp("pages")
    write_scenes(folder, train=4, valid=2, test=2, size=32, nouns=8, max_objects=1, tasks=("caption", "vqa_gen"))
    (folder / "vqa_gen").rename(folder / "gqa")
    shutil.copyfile(folder / "gqa" / "test.tsv", folder / "gqa_test.tsv")
    for split in ("train", "valid", "test"):
        shutil.copyfile(folder / "caption" / f"{split}.tsv", folder / f"{split}.tsv")
    rows = [line.split("\t") for file in folder.rglob("*.tsv") for line in lines_of(file)]
    (folder / "texts").write_text("".join(f"{row[2]} {row[3]}\n" for row in rows), encoding="utf-8")
    train_sentencepiece(folder / "texts", [0], folder / "vocab", 400)
    return folder


@pytest.fixture
def newcomer(files: Path, programs: Path, tmp_path: Path) -> Iterator[Newcomer]:
    """Give a newcomer in a folder of those files, which goes with the test: some checkpoints are of half a gigabyte."""
    shutil.copytree(files, tmp_path / "folder")
    yield Newcomer(tmp_path / "folder", programs)
    shutil.rmtree(tmp_path / "folder")


@pytest.fixture(scope="module")
def captioner(
    files: Path, programs: Path, save_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Newcomer:
    """Give a newcomer who has trained a student of captions, student.pt, as README does first."""
    newcomer = Newcomer(tmp_path_factory.mktemp("captioner") / "folder", programs)
    shutil.copytree(files, newcomer.folder)
    for name in ("ofa_base.pt", "teacher.pt"):
        save_checkpoint(newcomer.folder / name, "ofa", "caption", bpe_dir=str(newcomer.folder / "vocab"))
    train, *_ = commands(
        next(block.text for block in Page("README.md").blocks if block.text.startswith("fairseq-train train"))
    )
    newcomer.types(train, f"{SMALL} {SHORT} --patch-image-size 32")
    newcomer.keep_last("student.pt")
    return newcomer


def as_fairseq_train(call: list[str]) -> list[str]:
    """Return a training's call with the options of its configuration, as those of fairseq-train."""
    cfg = OmegaConf.to_container(OmegaConf.load(Path(call[call.index("--config-dir") + 1]) / "train.yaml"))
    assert isinstance(cfg, dict)
    words = ["fairseq-train", cfg["task"].pop("data")]
    names = {"task": "task", "model": "arch", "criterion": "criterion", "optimizer": "optimizer"}
    for section, name in {**names, "lr_scheduler": "lr-scheduler"}.items():
        words += [f"--{name}", cfg[section].pop("_name")]
    for section in sorted(cfg.keys() - {"hydra", "defaults"}):
        for key, value in cfg[section].items():
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            given = (
                []
                if value is None or value is False
                else [f"--{key.replace('_', '-')}", *([] if value is True else [text])]
            )
            words += given
    return words


@pytest.fixture
def recorded(newcomer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """Put stand-ins of the programs into .venv, and give a function that reads how they were called."""
    for name in ("Makefile", "setup.py"):
        shutil.copyfile(ROOT / name, newcomer.folder / name)
    shutil.copytree(ROOT / "run_scripts", newcomer.folder / "run_scripts")
    programs = newcomer.folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for program in ("narvl", "fairseq-train", "fairseq-hydra-train", "fairseq-generate", "python"):
        stand_in = shlex.join([sys.executable, "-SE", str(Path(__file__).with_name("recorder.py"))])
        real = f'[ "$1" != run ] || exec {newcomer.programs / "narvl"} "$@"\n' if program == "narvl" else ""
        (programs / program).write_text(f'#!/bin/sh\n{real}exec {stand_in} {program} "$@"\n')
        (programs / program).chmod(0o755)
    (newcomer.folder / ".venv" / ".installed").touch()  # newer than setup.py: all is installed
    record = newcomer.folder / "record"
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.setenv("PLUGIN", str(ROOT / "narvl_plugin"))
    monkeypatch.setattr(
        command_lines, "take_up_options", lambda *given: None
    )  # those of checkpoints that are not there

    def read() -> list[list[str]]:
        calls = [json.loads(line) for line in record.read_text().splitlines()]
        record.unlink()
        return [as_fairseq_train(call) if call[0] == "fairseq-hydra-train" else call for call in calls]

    return read


@pytest.fixture
def predictions() -> dict[str, list[dict[str, Any]]]:
    """Give right predictions, by their files in README, of what write_raw_data writes."""
    return {
        "caption.json": [{"image_id": 74, "caption": "a dog on a beach"}],
        "gqa.json": [{"questionId": "3", "prediction": "yes"}],
        "boxes.json": [{"sent_id": 13, "box": [1, 2, 4, 6]}],
        "snli.json": [{"pairID": "9.jpg#2r3e", "label": "entailment"}],
        "sets.json": [{"id": "13-13", "boxes": [[1, 2, 4, 6]]}],
        "graphs.json": [
            {
                "image_id": 3,
                "triplets": [
                    {
                        "subject": "dog",
                        "subject_box": [1, 2, 4, 6],
                        "relation": "on",
                        "object": "beach",
                        "object_box": [0, 0, 8, 6],
                    }
                ],
            }
        ],
    }


@pytest.fixture
def write_raw_data() -> Callable[[Path], None]:
    """Give a function that writes a few images of each data set, and what is published of them, by official names."""

    def write_all(folder: Path) -> None:
        def write(name: str, content: Any) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content))

        def draw(name: str) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), "red").save(folder / name)

        coco = [(9, "train2014", "train"), (73, "val2014", "val"), (74, "val2014", "test")]
        images = []
        for key, part, split in coco:
            image = {"cocoid": key, "filepath": part, "filename": f"COCO_{part}_{key:012d}.jpg", "split": split}
            images.append({**image, "sentences": [{"sentid": key, "raw": "a dog on a beach"}]})
            draw(f"{part}/{image['filename']}")
        write("dataset_coco.json", {"images": images})

        for part, key in (("train2014", 9), ("val2014", 73), ("test2015", 1), ("test-dev2015", 1)):
            numbers = range(key * 1000, key * 1000 + 9)  # nine questions make an answer a frequent one
            questions = [{"question_id": number, "image_id": key, "question": "is it red"} for number in numbers]
            write(f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": questions})
            answer = {"multiple_choice_answer": "yes", "answers": [{"answer": "yes"}] * 10}
            kinds = {"question_type": "is it", "answer_type": "yes/no"}
            answers = [{**question, **answer, **kinds} for question in questions]
            write(f"v2_mscoco_{part}_annotations.json", {"annotations": answers})
        draw("test2015/COCO_test2015_000000000001.jpg")

        for number, split in enumerate(("train", "val", "testdev"), start=1):
            question = {"imageId": "5", "question": "is it red", "answer": "yes"}
            types = {"structural": "verify", "semantic": "attr"}
            write(f"{split}_balanced_questions.json", {str(number): {**question, "types": types}})
        draw("images/5.jpg")

        refs, boxes = [], []
        for number, split in enumerate(("train", "val", "testA", "testB"), start=10):
            sentence = {"sent_id": number, "sent": "the dog", "raw": "the dog", "tokens": ["the", "dog"]}
            refs.append({"ref_id": number, "ann_id": number, "image_id": 9, "split": split, "sentences": [sentence]})
            boxes.append({"id": number, "image_id": 9, "bbox": [1, 2, 3, 4], "category_id": 1})
        image = {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 8, "height": 6}
        write("refcoco/instances.json", {"images": [image], "annotations": boxes, "categories": []})
        (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))

        write("grefcoco/instances.json", {"images": [image], "annotations": boxes, "categories": []})
        write("grefcoco/grefs(unc).json", [{**ref, "ann_id": [ref["ann_id"]], "no_target": False} for ref in refs])

        dog = {"object_id": 1, "x": 1, "y": 2, "w": 3, "h": 4, "names": ["dog"]}
        beach = {"object_id": 2, "x": 0, "y": 0, "w": 8, "h": 6, "name": "beach"}
        on = {"relationship_id": 1, "predicate": "on", "subject": dog, "object": beach}
        write("image_data.json", [{"image_id": key, "width": 8, "height": 6} for key in (1, 2, 3)])
        write("relationships.json", [{"image_id": key, "relationships": [on]} for key in (1, 2, 3)])
        write("vg_splits.json", {"train": [1], "val": [2], "test": [3]})
        for name in ("VG_100K/1.jpg", "VG_100K/2.jpg", "VG_100K_2/3.jpg"):
            draw(name)

        for number, split in enumerate(("train", "dev", "test"), start=1):
            pair = {"Flickr30K_ID": "9", "pairID": f"9.jpg#2r{number}e", "gold_label": "entailment"}
            write(f"snli_ve_{split}.jsonl", {**pair, "sentence1": "a dog on a beach", "sentence2": "a dog is out"})
        draw("flickr30k-images/9.jpg")

    return write_all
