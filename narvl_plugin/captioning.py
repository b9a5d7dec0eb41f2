"""Captions of picture files, which workers read and decode while a model speaks."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from fairseq.dataclass.configs import FairseqConfig
from torch.utils.data import DataLoader, Dataset

from narvl_plugin import checkpoints
from narvl_plugin.data.collate import Batch, Sample
from narvl_plugin.data.images import PICTURE_SUFFIXES
from narvl_plugin.devices import choose_device, move_batch
from narvl_plugin.errors import BadRow, InputError, MissingInput, SkipBudget
from narvl_plugin.generation import generation_config
from narvl_plugin.tasks.caption import CaptionTask
from narvl_plugin.whole_files import write_whole

UNWRITABLE = re.compile(r"[\t\r\n\ud800-\udfff]")
"""What a column of a TSV file cannot hold: line ends, tabs, bytes that are no UTF-8."""


class Count(NamedTuple):
    """How many pictures were captioned and how many left out, and the seconds from the first byte read to the end."""

    captions: int
    skipped: int
    seconds: float


def caption_pictures(
    given: Sequence[Path],
    *,
    checkpoint: Path,
    out: Path | None = None,
    batch_size: int = 8,
    workers: int = 1,
    beam: int | None = None,
    skip_bad_rows: int = 0,
    bpe_dir: Path | None = None,
    device: str | None = None,
) -> Count:
    """Write a caption of each picture, in the order of `find_pictures`.

    Lines are `name <tab> caption`, written batch by batch; the model generates as its --eval-args say.

    Args:
        given: folders and picture files, see `find_pictures`.
        checkpoint: of a teacher or a student of the task caption.
        out: file to write; NAME.json becomes a list as COCO has it, [{"image_id": name, "caption": …}, …], written at
            the end; without a file lines go to the standard output.
        batch_size: pictures in one pass.
        workers: processes that read, decode and resize pictures meanwhile; with 0 the model waits for them.
        beam: width of the beam, if not that of --eval-args.
        skip_bad_rows: how many files that are no readable picture may be left out.
        bpe_dir: the vocabulary's folder, where it is not the one that the checkpoint names.
        device: torch's name of it; by default a GPU if there is one.

    Raises:
        MissingInput, InputError: the pictures, the checkpoint or its vocabulary cannot be used.
        BadRow: a file is no readable picture, and the budget is spent.
    """
    files = find_pictures(given)
    budget = SkipBudget(skip_bad_rows)
    captioner = Captioner(checkpoint, beam, bpe_dir, device)
    start = time.perf_counter()
    pairs = captioner(files, batch_size, workers, budget)
    if out is not None and out.suffix == ".json":
        records = [{"image_id": name, "caption": caption} for name, caption in pairs]
        write_whole(out, json.dumps(records) + "\n")
    else:
        with nullcontext(sys.stdout) if out is None else open(out, "w", encoding="utf-8") as stream:
            for name, caption in pairs:
                print(f"{name}\t{caption}", file=stream, flush=True)
    return Count(len(files) - budget.count, budget.count, time.perf_counter() - start)


def find_pictures(given: Sequence[Path]) -> dict[str, Path]:
    """Return picture files by name: those that are given, and all in the folders that are given and below, sorted.

    Where one folder is given, a name is the path from there; otherwise it is the path as given.

    Raises:
        MissingInput: there is no such file or folder.
        InputError: a file is none of `PICTURE_SUFFIXES`, a folder has none, or a name cannot be written.
    """
    kinds = ", ".join(PICTURE_SUFFIXES)
    found = {}
    for path in given:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
        elif not path.exists():
            raise MissingInput(f"{path}: no such picture or folder")
        elif path.suffix.lower() not in PICTURE_SUFFIXES:
            raise InputError(f"{path}: is no picture by its name; give folders, or files ending in {kinds}")
        if not files:
            raise InputError(f"{path}: there is no picture in this folder (no file ending in {kinds})")
        from_there = path.is_dir() and len(given) == 1
        found.update({str(file.relative_to(path) if from_there else file): file for file in files})
    unwritable = [name for name in found if UNWRITABLE.search(name)]
    if unwritable:
        raise InputError(f"{unwritable[0]!r}: a file of this name cannot be written of in a line; rename it")
    return found


class Captioner:
    """A model that captions picture files; see `caption_pictures` for the arguments."""

    def __init__(self, checkpoint: Path, beam: int | None, bpe_dir: Path | None, device: str | None) -> None:
        self.device = choose_device(device)
        overrides = {"data": "none", "bpe_dir": bpe_dir and str(bpe_dir)}
        self.models, task, _ = checkpoints.load(checkpoint, task_overrides=overrides, device=self.device)
        if not isinstance(task, CaptionTask):
            raise InputError(f"{checkpoint}: was trained for {task.cfg._name}; give a model of captions")
        self.task = task
        self.models[0].prepare_for_inference_(FairseqConfig())
        options = vars(task.generator_options()) | ({} if beam is None else {"beam": beam})
        self.generator = task.build_generator(self.models, generation_config(options))

    @torch.inference_mode()
    def __call__(
        self, files: Mapping[str, Path], batch_size: int, workers: int, budget: SkipBudget
    ) -> Iterator[tuple[str, str]]:
        """Yield name and caption of each picture; raises BadRow where the budget does not forgive a file."""
        pictures = Pictures(PictureTable(files), self.task)
        for errors, batch in DataLoader(pictures, batch_size, num_workers=workers, collate_fn=pictures.collate):
            for error in errors:
                budget.skip(error)
            if not batch:
                continue
            moved = move_batch(batch, self.device)
            hypotheses = self.task.inference_step(self.generator, self.models, moved)
            for name, (best, *_) in zip(batch["id"].tolist(), hypotheses, strict=True):
                yield name, " ".join(self.task.codec.decode(best["tokens"]).split())


class PictureTable:
    """Picture files as rows of id, image and caption, in place of a TSV file; the caption is never looked at."""

    path = "pictures"
    columns = (0, 1, 2)

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.rows = list(files.items())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[str]:
        name, file = self.rows[row]
        return [name, str(file), "a picture"]

    def where(self, row: int) -> str:
        """Return the file of a row, for errors."""
        return str(self.rows[row][1])


class Pictures(Dataset[Sample | BadRow]):
    """Samples of a table's rows; what is wrong with a row is handed on, so that a worker's error stays readable."""

    def __init__(self, table: PictureTable, task: CaptionTask) -> None:
        self.table = table
        self.dataset = task.build_dataset(table, "test")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Sample | BadRow:
        try:
            return self.dataset.make_sample(row, self.table[row])
        except BadRow as error:
            return error

    def collate(self, samples: Sequence[Sample | BadRow]) -> tuple[list[BadRow], Batch]:
        """Return what is wrong with some rows, and the batch of the others, empty where there are none."""
        errors = [sample for sample in samples if isinstance(sample, BadRow)]
        return errors, self.dataset.collater([sample for sample in samples if not isinstance(sample, BadRow)])
