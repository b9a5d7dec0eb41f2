"""Small raw data sets in the official schemas, and what a model might say of them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.sources.coco import convert_coco
from narvl_plugin.data.sources.gqa import convert_gqa
from narvl_plugin.data.sources.grefcoco import convert_grefcoco
from narvl_plugin.data.sources.refcoco import convert_refcoco
from narvl_plugin.data.sources.snli_ve import convert_snli_ve
from narvl_plugin.data.sources.vqav2 import convert_vqav2
from narvl_plugin.data.sources.writing import ImageFolder

COCO = {73: ("val", ["One cat"]), 74: ("test", ["a red dog runs fast"]), 75: ("test", ["two cats sleep on mats"])}


@pytest.fixture
def write_generated(tmp_path: Path) -> Callable[[Mapping[str, str]], Path]:
    """Give a function that writes texts by sample id as fairseq-generate does, in batches, so the last one first."""

    def write(texts: Mapping[str, str]) -> Path:
        path = tmp_path / "generate-test.txt"
        lines = []
        for key, text in reversed(texts.items()):
            lines += [f"S-{key}\twhat?", f"T-{key}\tit", f"H-{key}\t-0.25\t{text}", f"D-{key}\t-0.25\t{text}"]
            lines += [f"P-{key}\t-0.1 -0.2", f"H-{key}\t-0.75\tsecond best", f"D-{key}\t-0.75\tsecond best"]
        path.write_text("\n".join([*lines, "Generate test with beam=5: 0.5\n"]), encoding="utf-8")
        return path

    return write


@pytest.fixture
def coco_tsv(raw: Path, tmp_path: Path, photo: Callable[..., str], write_json: Callable[..., Path]) -> Path:
    """Write captions in Karpathy's splits and the official annotations of the test images; return test.tsv."""
    images, annotations = [], []
    (raw / "train2014").mkdir()
    for cocoid, (split, texts) in COCO.items():
        name = f"COCO_val2014_{cocoid:012d}.jpg"
        photo(f"val2014/{name}")
        sentences = [
            {"tokens": text.split(), "raw": text, "imgid": cocoid, "sentid": 10 * cocoid + number}
            for number, text in enumerate(texts)
        ]
        images.append(
            {
                "filepath": "val2014",
                "sentids": [sentence["sentid"] for sentence in sentences],
                "filename": name,
                "imgid": cocoid,
                "split": split,
                "sentences": sentences,
                "cocoid": cocoid,
            }
        )
        if split == "test":
            annotations += [{"image_id": cocoid, "id": 10 * cocoid, "caption": text} for text in texts]
    write_json("dataset_coco.json", {"images": images, "dataset": "coco"})
    entries = [{"id": found["image_id"], "file_name": "", "width": 8, "height": 6} for found in annotations]
    official = {"info": {}, "images": entries, "licenses": [], "annotations": annotations}
    write_json("annotations/captions_val2014.json", official)
    return next(convert_coco(raw, tmp_path / "tsv", ImageFolder(raw), splits=["test"])).path


@pytest.fixture
def vqa_tsv(raw: Path, tmp_path: Path, photo: Callable[..., str], write_json: Callable[..., Path]) -> Path:
    """Write three questions of VQA with ten answers each; return val.tsv."""
    people = {
        42000: ("yes/no", "is the", ["yes"] * 9 + ["no"]),
        42001: ("number", "how many", ["two"] * 8 + ["3"] * 2),
        42002: ("other", "what is", ["Hot-Dog"] * 10),
    }
    questions = [{"image_id": 42, "question": "What?", "question_id": key} for key in people]
    annotations = [
        {
            "question_type": question_type,
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(answers, start=1)
            ],
            "image_id": 42,
            "answer_type": answer_type,
            "question_id": key,
        }
        for key, (answer_type, question_type, answers) in people.items()
    ]
    info = {"info": {"version": "2.0"}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    write_json(
        "v2_OpenEnded_mscoco_val2014_questions.json", {**info, "task_type": "Open-Ended", "questions": questions}
    )
    write_json("v2_mscoco_val2014_annotations.json", {**info, "annotations": annotations})
    photo("val2014/COCO_val2014_000000000042.jpg")
    return next(convert_vqav2(raw, tmp_path / "tsv", ImageFolder(raw), splits=["val"])).path


@pytest.fixture
def gqa_tsv(raw: Path, tmp_path: Path, photo: Callable[..., str], write_json: Callable[..., Path]) -> Path:
    """Write four of GQA's balanced questions; return testdev.tsv."""
    kinds = {
        "05515938": ("left", "choose", "rel"),
        "20": ("yes", "verify", "attr"),
        "201": ("t-shirt", "query", "obj"),
        "202": ("man", "query", "rel"),
    }
    questions = {
        key: {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
            "entailed": [],
            "equivalent": [key],
            "question": "Which is it?",
            "imageId": "n161313",
            "isBalanced": True,
            "groups": {"global": None, "local": "06-sky_dark"},
            "answer": answer,
            "semanticStr": "select: sky (2486325)",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "any", "semantic": semantic, "structural": structural},
            "fullAnswer": "It is.",
        }
        for key, (answer, structural, semantic) in kinds.items()
    }
    write_json("testdev_balanced_questions.json", questions)
    photo("images/n161313.jpg")
    return next(convert_gqa(raw, tmp_path / "tsv", ImageFolder(raw), splits=["testdev"])).path


@pytest.fixture
def refcoco_tsv(raw: Path, tmp_path: Path, photo: Callable[..., str], write_json: Callable[..., Path]) -> Path:
    """Write RefCOCO with an image of 640 x 480 pixels, a region in testB and two in testA; return testA.tsv."""
    name = "COCO_train2014_000000581857.jpg"
    boxes = {101: [0, 0, 320, 240], 102: [64, 96, 128, 96], 103: [1, 2, 3, 4]}
    regions = {101: ("testA", ["left half", "at the left"]), 102: ("testA", ["hat"]), 103: ("testB", ["dog"])}
    references = [
        {
            "sent_ids": [10 * ann_id + number for number in range(len(texts))],
            "file_name": f"COCO_train2014_000000581857_{ann_id}.jpg",
            "ann_id": ann_id,
            "ref_id": ann_id - 100,
            "image_id": 581857,
            "split": split,
            "sentences": [
                {"tokens": text.split(), "raw": text, "sent_id": 10 * ann_id + number, "sent": text}
                for number, text in enumerate(texts)
            ],
            "category_id": 1,
        }
        for ann_id, (split, texts) in regions.items()
    ]
    annotations = [{"id": key, "bbox": box, "image_id": 581857, "category_id": 1} for key, box in boxes.items()]
    image = {"file_name": name, "height": 480, "width": 640, "id": 581857}
    write_json("refcoco/instances.json", {"images": [image], "annotations": annotations, "categories": []})
    (raw / "refcoco/refs(unc).p").write_bytes(pickle.dumps(references, protocol=2))
    photo(f"train2014/{name}", (640, 480))
    return next(convert_refcoco(raw, tmp_path / "tsv", ImageFolder(raw), splits=["testA"])).path


@pytest.fixture
def grefcoco_tsv(raw: Path, tmp_path: Path, photo: Callable[..., str], write_json: Callable[..., Path]) -> Path:
    """Write gRefCOCO with an image of 640 x 480 pixels, four phrases in val and two in train; return val.tsv.

    A phrase of train has the id of one of val. One of val has six boxes.
    """
    name = "COCO_train2014_000000581857.jpg"
    boxes = {number: [64 * number, 0, 64, 96] for number in range(6)}
    phrases = [
        ("train", 1, [0], "left one"),
        ("train", 5, [0], "only one"),
        ("val", 1, [0, 1], "both on the left"),
        ("val", 2, [-1], "the kid"),
        ("val", 3, [-1], "nobody"),
        ("val", 4, [*boxes], "everyone"),
    ]
    references = [
        {
            "ann_id": ann_ids,
            "category_id": [1],
            "file_name": name,
            "image_id": 581857,
            "no_target": ann_ids == [-1],
            "ref_id": ref_id,
            "sent_ids": [ref_id],
            "sentences": [{"raw": text, "sent": text, "sent_id": ref_id, "tokens": text.split()}],
            "split": split,
        }
        for split, ref_id, ann_ids, text in phrases
    ]
    annotations = [{"id": key, "bbox": box, "image_id": 581857, "category_id": 1} for key, box in boxes.items()]
    image = {"file_name": name, "height": 480, "width": 640, "id": 581857}
    write_json("grefcoco/instances.json", {"images": [image], "annotations": annotations, "categories": []})
    write_json("grefcoco/grefs(unc).json", references)
    photo(f"train2014/{name}", (640, 480))
    return next(convert_grefcoco(raw, tmp_path / "tsv", ImageFolder(raw), splits=["val"], cut_boxes=True)).path


@pytest.fixture
def visual_genome(write_json: Callable[..., Path]) -> list[Path]:
    """Write Visual Genome with three images in test, one of them without relationships; return its files."""
    dog, mat, cat = (
        {"object_id": key, "x": x, "y": 0, "w": 50, "h": 40, "names": [name], "synsets": []}
        for key, (name, x) in enumerate({"dog": 0, "mat": 60, "cat": 120}.items())
    )

    def relate(subject: Any, predicate: str, other: Any) -> dict[str, Any]:
        return {"relationship_id": 1, "predicate": predicate, "synsets": [], "subject": subject, "object": other}

    related = {
        1: [relate(dog, "ON", mat), relate(cat, "on", mat), relate(dog, "near", cat)],
        2: [relate(dog, "near", mat)],
        3: [],
        4: [relate(dog, "on", mat)],
    }
    splits = {"train": [4], "val": [], "test": [1, 2, 3]}
    return [
        write_json("image_data.json", [{"image_id": key, "width": 200, "height": 150, "url": ""} for key in related]),
        write_json("relationships.json", [{"image_id": key, "relationships": found} for key, found in related.items()]),
        write_json("vg_splits.json", splits),
    ]


@pytest.fixture
def snli_ve_tsv(raw: Path, tmp_path: Path, photo: Callable[..., str]) -> Path:
    """Write five pairs of SNLI-VE, one of them without a gold label; return test.tsv."""
    labels = ["entailment", "neutral", "contradiction", "-", "neutral"]
    pairs = [
        {
            "Flickr30K_ID": "4705552913",
            "annotator_labels": [label],
            "captionID": "4705552913.jpg#2",
            "gold_label": label,
            "pairID": f"4705552913.jpg#2r{number}{label[0]}",
            "sentence1": "Two women are embracing .",
            "sentence2": "Sisters hug.",
        }
        for number, label in enumerate(labels, start=1)
    ]
    (raw / "snli_ve_test.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    photo("flickr30k-images/4705552913.jpg")
    return next(convert_snli_ve(raw, tmp_path / "tsv", ImageFolder(raw), splits=["test"])).path


@pytest.fixture
def written() -> Callable[[Path], Any]:
    """Give a function that reads a JSON file."""

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8"))

    return read
