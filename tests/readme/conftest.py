"""Stand-ins for programs that take too long, and for the raw files of data sets."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from narvl_plugin.compat import command_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recorded(newcomer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """Put stand-ins of the programs into .venv, and give a function that reads how they were called."""
    for name in ("Makefile", "setup.py"):
        shutil.copyfile(ROOT / name, newcomer.folder / name)
    shutil.copytree(ROOT / "run_scripts", newcomer.folder / "run_scripts")
    programs = newcomer.folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for program in ("narvl", "fairseq-train", "fairseq-generate", "python"):
        stand_in = shlex.join([sys.executable, "-SE", str(Path(__file__).with_name("recorder.py"))])
        (programs / program).write_text(f'#!/bin/sh\nexec {stand_in} {program} "$@"\n')
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
        return calls

    return read


@pytest.fixture
def predictions() -> dict[str, list[dict[str, Any]]]:
    """Give right predictions, by their files in README, of what write_raw_data writes."""
    return {
        "caption.json": [{"image_id": 74, "caption": "a dog on a beach"}],
        "gqa.json": [{"questionId": "3", "prediction": "yes"}],
        "boxes.json": [{"sent_id": 13, "box": [1, 2, 4, 6]}],
        "snli.json": [{"pairID": "9.jpg#2r3e", "label": "entailment"}],
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

        for number, split in enumerate(("train", "dev", "test"), start=1):
            pair = {"Flickr30K_ID": "9", "pairID": f"9.jpg#2r{number}e", "gold_label": "entailment"}
            write(f"snli_ve_{split}.jsonl", {**pair, "sentence1": "a dog on a beach", "sentence2": "a dog is out"})
        draw("flickr30k-images/9.jpg")

    return write_all
