"""Captions of image files, which workers read and decode while a model speaks."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple, TextIO

from torch.utils.data import DataLoader, Dataset

from narvl_plugin.data.collate import Batch, Sample
from narvl_plugin.data.dataset import TsvDataset
from narvl_plugin.data.images import IMAGE_SUFFIXES, upright_on_white
from narvl_plugin.devices import choose_device, move_batch
from narvl_plugin.errors import BadRow, InputError, MissingInput, SkipBudget, encoding_advice, harmless
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.whole_files import naming, require_writable, sole_writer

logger = logging.getLogger(__name__)

OTHER_SUFFIXES = {
    *(
        ".avif",
        ".heic",
        ".heif",
        ".jp2",
        ".j2k",
        ".jxl",
        ".svg",
        ".psd",
        ".eps",
        ".ico",
        ".tga",
        ".ppm",
        ".pgm",
        ".pbm",
    ),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
} - {*IMAGE_SUFFIXES}
"""What images are called that cannot be read here."""
COCO_NAME = re.compile(r"(?:COCO_[A-Za-z0-9]+_)?([0-9]{1,12})")
SURROGATES = re.compile(r"[\ud800-\udfff]")
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What a line of text cannot hold: line ends, tabs and other control characters, bytes that are no UTF-8."""


class Count(NamedTuple):
    """How many images were captioned and how many left out, and the seconds from the first byte read to the end.

    Left out are files that are no readable image and, `unread`, files in folders whose names tell of an image of
    another format.
    """

    captions: int
    skipped: int
    seconds: float
    unread: int


def caption_images(
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
    """Write a caption of each image, in the order of `find_images`.

    Lines are `name <tab> caption`; the model generates as its --eval-args say, and sees images as people do: upright
    as EXIF says, and on white ground where they are transparent. A file is written as NAME.part, which gets its name
    when all images are done, so that a run that stops leaves an older file as it was.

    Args:
        given: folders and image files, see `find_images`.
        checkpoint: of a teacher or a student of the task caption.
        out: file to write; NAME.json becomes a list as COCO has it, [{"image_id": 42, "caption": …}, …], see
            `coco_ids`; without a file lines go to the standard output.
        batch_size: images in one pass.
        workers: processes that read, decode and resize images meanwhile; with 0 the model waits for them.
        beam: width of the beam, if not that of --eval-args.
        skip_bad_rows: how many files that are no readable image may be left out.
        bpe_dir: the vocabulary's folder, where it is not the one that the checkpoint names.
        device: torch's name of it; by default a GPU if there is one.

    Raises:
        MissingInput, InputError: the images, the checkpoint or its vocabulary cannot be used.
        BadRow: a file is no readable image, and the budget is spent.
    """
    if out is not None and out.exists() and not out.is_file():
        raise InputError(f"--out {out}: is no file that can be replaced; give the name of a file")
    if out is not None:
        require_writable(out)
    files, others = search_images(given)
    if out is not None and out.exists() and any(out.samefile(file) for file in files.values() if file.exists()):
        raise InputError(f"--out {out}: is one of the pictures, which it would replace; give the name of another file")
    as_json = out is not None and out.suffix.lower() == ".json"
    ids = coco_ids(files) if as_json else {}
    if others:
        shown = ", ".join(repr(str(file)) for file in others[:5]) + (", …" if len(others) > 5 else "")
        logger.warning("%d left out, of formats that cannot be read here: %s", len(others), shown)
    budget = SkipBudget(skip_bad_rows)
    captions = 0
    records = []
    with nullcontext(sys.stdout) if out is None else _replacing(out) as stream:
        overrides = {"bpe_dir": bpe_dir and str(bpe_dir)}
        chosen = choose_device(device)
        model = Predictor.load(checkpoint, task_overrides=overrides, generation={"beam": beam}, device=chosen)
        if model.task.name != "caption":
            raise InputError(f"{checkpoint}: was trained for {model.task.name}; give a model of captions")
        start = time.perf_counter()
        for name, caption in captions_of(model, files, batch_size, workers, budget):
            captions += 1
            if as_json:
                records.append({"image_id": ids[name], "caption": caption})
            else:
                print(f"{name}\t{caption}", file=stream, flush=True)
        if as_json:
            stream.write(json.dumps(records) + "\n")
    return Count(captions, len(files) - captions, time.perf_counter() - start, len(others))


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """Give a text file to write that takes the place of `path` at the end; after an error NAME.part stays.

    Raises InputError where another program writes it.
    """
    path = path.resolve()  # where a link leads
    part = path.with_name(path.name + ".part")
    with naming(path), sole_writer(path):
        with open(part, "w", encoding="utf-8") as stream:
            yield stream
        os.replace(part, path)


def coco_ids(names: Iterable[str]) -> dict[str, int] | dict[str, str]:
    """Return the image id of each image's name: 42 of COCO_val2014_000000000042.jpg, 000000000042.jpg and 42.jpg.

    COCO's programs take whole numbers alone. Where no image has a number for its name, the images are not COCO's,
    and the names are the ids.

    Raises InputError where only some names are numbers, or two are the same.
    """
    matches = {name: COCO_NAME.fullmatch(Path(name).stem) for name in names}
    if not any(matches.values()):
        logger.warning("no picture is named by a number as COCO's are; each image_id will be the picture's name")
        return {name: name for name in matches}
    ids: dict[str, int] = {}
    name_of: dict[int, str] = {}
    advice = "COCO's results name pictures by numbers: rename it, leave it out, or give --out NAME.tsv"
    for name, match in matches.items():
        if match is None:
            raise InputError(
                f"{name}: has no number for an image_id, as {next(filter(matches.get, matches))} has; {advice}"
            )
        ids[name] = int(match[1])
        if (other := name_of.setdefault(ids[name], name)) != name:
            raise InputError(f"{name}: has the same image_id, {ids[name]}, as {other}; {advice}")
    return ids


def find_images(given: Sequence[Path]) -> dict[str, Path]:
    """Return image files by name, see `search_images`."""
    return search_images(given)[0]


def search_images(given: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Return image files by name: those that are given, and all in the folders that are given and below, sorted.

    Where one folder is given, a name is the path from there; otherwise it is the path as given. Below a folder links
    are followed, and what is hidden (its name begins with a dot) is no part of it.

    Returns:
        the images, and those files in folders whose names tell of images in other formats.

    Raises:
        MissingInput: there is no such file or folder.
        InputError: a file is none of `IMAGE_SUFFIXES`, a folder has none or cannot be read, or a name cannot be
            written.
    """
    kinds = ", ".join(IMAGE_SUFFIXES)
    found: dict[str, Path] = {}
    others: list[Path] = []
    for path in given:
        files = [path]
        if path.is_dir():
            inside = files_below(path)
            files = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES]
            others += (file for file in inside if file.suffix.lower() in OTHER_SUFFIXES)
        elif not path.exists():
            raise MissingInput(f"{path}: no such picture or folder")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(f"{path}: is no picture by its name; give folders, or files ending in {kinds}")
        if not files:
            raise InputError(f"{path}: there is no picture in this folder (no file ending in {kinds})")
        from_there = path.is_dir() and len(given) == 1
        found.update({str(file.relative_to(path) if from_there else file): file for file in files})
    unwritable = [name for name in found if UNWRITABLE.search(name)]
    if unwritable:
        advice = encoding_advice(unwritable[0]) if SURROGATES.search(unwritable[0]) else "rename it"
        raise InputError(f"{unwritable[0]!r}: a file of this name cannot be written of in a line; {advice}")
    return found, others


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and below, sorted, less hidden ones.

    A linked folder is searched, too, unless it was already: each folder counts once, by its own name if it has one
    here, so that links in a circle come to an end.

    Raises InputError for a folder that cannot be read.
    """
    files: list[Path] = []
    folders, links = [folder], deque[Path]()
    seen = set()
    while folders or links:
        here = folders.pop() if folders else links.popleft()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = [(entry, entry.is_dir()) for entry in sorted(here.iterdir()) if not entry.name.startswith(".")]
        except OSError as error:
            raise InputError(f"{here}: this folder cannot be read ({error.strerror})") from error
        for entry, is_folder in entries:
            if not is_folder:
                files.append(entry)
            elif entry.is_symlink():
                links.append(entry)
            else:
                folders.append(entry)
    return sorted(files)


def captions_of(
    model: Predictor, files: Mapping[str, Path], batch_size: int, workers: int, budget: SkipBudget
) -> Iterator[tuple[str, str]]:
    """Yield name and caption of each image; see `caption_images`.

    Raises:
        BadRow: a file is no readable image, and the budget is spent.
    """
    images = Images(model.files(files))
    batches = DataLoader(images, batch_size, num_workers=workers, collate_fn=images.collate)
    for errors, batch in batches:
        for error in errors:
            budget.skip(error)
        if batch:
            hypotheses = model.search(move_batch(batch, model.device))
            for name, beam in zip(batch["id"].tolist(), hypotheses, strict=True):
                yield name, harmless(" ".join(model.text(beam).split()), "")


class Images(Dataset[Sample | BadRow]):
    """Samples of a data set; what is wrong with a row is handed on, so that a worker's error stays readable."""

    def __init__(self, dataset: TsvDataset) -> None:
        self.dataset = dataset
        self.dataset.read_image.to_rgb = upright_on_white

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Sample | BadRow:
        try:
            return self.dataset.make_sample(row, self.dataset.tsv[row])
        except BadRow as error:
            return error

    def collate(self, samples: Sequence[Sample | BadRow]) -> tuple[list[BadRow], Batch]:
        """Return what is wrong with some rows, and the batch of the others, empty where there are none."""
        errors = [sample for sample in samples if isinstance(sample, BadRow)]
        return errors, self.dataset.collater([sample for sample in samples if not isinstance(sample, BadRow)])
