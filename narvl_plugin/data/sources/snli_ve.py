"""SNLI-VE as OFA's snli_ve TSV.

Official files and their places (RAW and IMAGES may be the same folder)::

    RAW/snli_ve_train.jsonl                      https://github.com/necla-ml/SNLI-VE
    RAW/snli_ve_dev.jsonl                        the same
    RAW/snli_ve_test.jsonl                       the same
    IMAGES/flickr30k-images/1000092795.jpg …     flickr30k-images.tar.gz, https://shannon.cs.illinois.edu/DenotationGraph/

A line is a record of SNLI. `Flickr30K_ID` is the image, `pairID` the id, `sentence1` the caption that the hypothesis
was written for, and `sentence2` the hypothesis. `gold_label` is entailment, neutral, contradiction, or `-` if
annotators disagreed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from narvl_plugin.data.sources.reading import Record, chosen_splits, need, not_as_published, pick
from narvl_plugin.data.sources.writing import Columns, Dropped, ImageFolder, Notes, Outcome, clean, write_split

SPLITS = ("train", "dev", "test")
LABELS = ("entailment", "neutral", "contradiction")
UNDECIDED = "-"
FOLDER = "flickr30k-images"
DOWNLOAD = "download it (github.com/necla-ml/SNLI-VE; the images: shannon.cs.illinois.edu/DenotationGraph)"
PAIR = {"Flickr30K_ID": str, "pairID": str, "sentence1": str, "sentence2": str, "gold_label": str}


def convert_snli_ve(
    raw: Path, out: Path, images: ImageFolder, *, splits: Sequence[str] | None = None
) -> Iterator[Outcome]:
    """Write OUT/{train,dev,test}.tsv and yield the outcome of each; pairs without a gold label are dropped.

    Args:
        raw: the folder of the official files.
        out: the folder to write into.
        images: the images' folder, and their form in the rows.
        splits: the splits to write; all by default.

    Yields:
        The outcome of each file.

    Raises:
        MissingInput: if a file or folder does not exist; raised before anything is written.
        BadRow: if a line is not as published.
    """
    files = {split: raw / f"snli_ve_{split}.jsonl" for split in chosen_splits(splits, SPLITS)}
    need(files.values(), [images.folder / FOLDER], DOWNLOAD)
    for split, file in files.items():
        yield write_split(out / f"{split}.tsv", partial(load, file), pair_row, inputs=[file], images=images)


def load(file: Path) -> list[Record]:
    """Return the pairs of a file."""
    pairs = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                not_as_published(where, f"is not JSON ({error})")
            pair = pick(record, PAIR, where)
            if pair["gold_label"] not in (*LABELS, UNDECIDED):
                not_as_published(where, f"gold_label is {pair['gold_label']!r}, not one of {', '.join(LABELS)}")
            pairs.append(pair)
    return pairs


def pair_row(pair: Record, notes: Notes) -> Columns:
    """Return uniq-id, image-id, image, hypothesis, caption, label."""
    if pair["gold_label"] == UNDECIDED:
        raise Dropped("no gold label")
    return [
        clean(pair["pairID"], notes),
        clean(pair["Flickr30K_ID"], notes),
        Path(FOLDER, f"{pair['Flickr30K_ID']}.jpg"),
        clean(pair["sentence2"], notes),
        clean(pair["sentence1"], notes),
        pair["gold_label"],
    ]
