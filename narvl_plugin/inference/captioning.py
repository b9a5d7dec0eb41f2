"""Captions of image files. Workers read and decode images while a model predicts."""

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
"""Suffixes of image formats that cannot be read here."""
COCO_NAME = re.compile(r"(?:COCO_[A-Za-z0-9]+_)?([0-9]{1,12})")
SURROGATES = re.compile(r"[\ud800-\udfff]")
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that a line of text cannot hold: line ends, tabs, other control characters, and bytes that are not
UTF-8."""


class Count(NamedTuple):
    """Numbers of images, and the time.

    Attributes:
        captions: images with a caption.
        skipped: files that are not readable images.
        seconds: the time from the first byte read to the end.
        unread: files in folders with a name of another image format.
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

    Lines are `name <tab> caption`. The model generates with the options of its --eval-args. It sees images as people
    do: turned by their EXIF orientation, and on a white background if they are transparent. The output is written as
    NAME.part and renamed when all images are done. If a run stops, an older file stays as it was.

    Args:
        given: folders and image files, see `find_images`.
        checkpoint: a teacher or a student of the task caption.
        out: the file to write. NAME.json is a list in COCO's form, [{"image_id": 42, "caption": …}, …], see `coco_ids`.
            None writes lines to the standard output.
        batch_size: the number of images in a batch.
        workers: the number of processes that read, decode and resize images in parallel to the model; 0 for none.
        beam: the width of the beam; by default that of --eval-args.
        skip_bad_rows: how many files may be skipped that are not readable images.
        bpe_dir: the vocabulary's folder; by default the one that the checkpoint names.
        device: torch's name of the device; by default a GPU if there is one.

    Raises:
        MissingInput, InputError: if the images, the checkpoint or its vocabulary cannot be used.
        BadRow: if a file is not a readable image, and the skip budget is spent.
    """
    if out is not None and out.exists() and not out.is_file():
        raise InputError(f"--out {out}: is not a file that can be replaced; give the name of a file")
    if out is not None:
        require_writable(out)
    files, others = search_images(given)
    if out is not None and out.exists() and any(out.samefile(file) for file in files.values() if file.exists()):
        raise InputError(f"--out {out}: is one of the images, which it would replace; give the name of another file")
    as_json = out is not None and out.suffix.lower() == ".json"
    ids = coco_ids(files) if as_json else {}
    if others:
        shown = ", ".join(repr(str(file)) for file in others[:5]) + (", …" if len(others) > 5 else "")
        logger.warning("%d file(s) left out, of unsupported image formats: %s", len(others), shown)
    budget = SkipBudget(skip_bad_rows)
    captions = 0
    records = []
    with nullcontext(sys.stdout) if out is None else _replacing(out) as stream:
        overrides = {"bpe_dir": bpe_dir and str(bpe_dir)}
        chosen = choose_device(device)
        model = Predictor.load(checkpoint, task_overrides=overrides, generation={"beam": beam}, device=chosen)
        if model.task.name != "caption":
            raise InputError(f"{checkpoint}: was trained for {model.task.name}; give a checkpoint of the task caption")
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
    """Open a text file NAME.part that replaces `path` at the end. After an error, NAME.part stays.

    Raises:
        InputError: if another program writes the file.
    """
    path = path.resolve()  # replaces the target of a link, not the link
    part = path.with_name(path.name + ".part")
    with naming(path), sole_writer(path):
        with open(part, "w", encoding="utf-8") as stream:
            yield stream
        os.replace(part, path)


def coco_ids(names: Iterable[str]) -> dict[str, int] | dict[str, str]:
    """Return the image id of each image's name: 42 for COCO_val2014_000000000042.jpg, 000000000042.jpg and 42.jpg.

    COCO's programs accept only whole numbers. If no name has a number, the images are not COCO's, and the names are the
    ids.

    Raises:
        InputError: if only some names have a number, or if two images have the same id.
    """
    matches = {name: COCO_NAME.fullmatch(Path(name).stem) for name in names}
    if not any(matches.values()):
        logger.warning("no image has a number as its name, as in COCO; each image_id will be the image's name")
        return {name: name for name in matches}
    ids: dict[str, int] = {}
    name_of: dict[int, str] = {}
    advice = "COCO's results identify images by numbers: rename it, leave it out, or give --out NAME.tsv"
    for name, match in matches.items():
        if match is None:
            raise InputError(
                f"{name}: has no number for an image_id, unlike {next(filter(matches.get, matches))}; {advice}"
            )
        ids[name] = int(match[1])
        if (other := name_of.setdefault(ids[name], name)) != name:
            raise InputError(f"{name}: has the same image_id, {ids[name]}, as {other}; {advice}")
    return ids


def find_images(given: Sequence[Path]) -> dict[str, Path]:
    """Return image files by name, see `search_images`."""
    return search_images(given)[0]


def search_images(given: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Return image files by name: the given files, and all in and below the given folders, sorted.

    If only one folder is given, a name is the path below it; else it is the path as given. Links below a folder are
    followed. Hidden entries (their names begin with a dot) are left out.

    Returns:
        The images, and the files in folders whose names have the suffix of another image format.

    Raises:
        MissingInput: if a file or folder does not exist.
        InputError: if a given file has none of `IMAGE_SUFFIXES`, a folder has no such file or cannot be read, or a name
            cannot be written.
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
            raise MissingInput(f"{path}: no such image or folder")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(f"{path}: its name is not that of an image; give folders, or files ending in {kinds}")
        if not files:
            raise InputError(f"{path}: there is no image in this folder (no file ending in {kinds})")
        from_there = path.is_dir() and len(given) == 1
        found.update({str(file.relative_to(path) if from_there else file): file for file in files})
    unwritable = [name for name in found if UNWRITABLE.search(name)]
    if unwritable:
        advice = encoding_advice(unwritable[0]) if SURROGATES.search(unwritable[0]) else "rename it"
        raise InputError(f"{unwritable[0]!r}: this name does not fit into a line of text; {advice}")
    return found, others


def files_below(folder: Path) -> list[Path]:
    """Return all files in and below a folder, sorted, without hidden ones.

    Linked folders are searched, too. Each folder is searched once, so circles of links end. If a folder is also here
    under its own name, that name is used.

    Raises:
        InputError: if a folder cannot be read.
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
        BadRow: if a file is not a readable image, and the skip budget is spent.
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
    """Samples of a data set. An error of a row is returned, not raised, so a worker's error stays readable."""

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
        """Return the errors of bad rows, and the batch of the other rows; it is empty if there are none."""
        errors = [sample for sample in samples if isinstance(sample, BadRow)]
        return errors, self.dataset.collater([sample for sample in samples if not isinstance(sample, BadRow)])
