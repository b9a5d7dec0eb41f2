"""Predictions for image files. Workers read and decode images while the model runs."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from narvl_plugin.api.exported import SETTINGS_FILE
from narvl_plugin.api.html import page_html
from narvl_plugin.api.loading import BOX, load
from narvl_plugin.api.model import Decoding, Engine, checked_text, with_input
from narvl_plugin.api.prediction import Prediction
from narvl_plugin.checkpoints.reading import checkpoint_fingerprint
from narvl_plugin.data.image_files import coco_ids, search_images
from narvl_plugin.data.resumable import SKIPPED, ResumableWriter, fingerprint
from narvl_plugin.errors import BadRow, InputError, SkipBudget, harmless
from narvl_plugin.whole_files import require_writable, write_whole

logger = logging.getLogger(__name__)

SHOWN = 200
"""Largest number of images on the page of `--show`."""


class Count(NamedTuple):
    """Numbers of images, and the time.

    Attributes:
        captions: images with a prediction.
        skipped: files that are not readable images.
        seconds: the time from the first byte read to the end.
        unread: files in folders with a name of another image format.
    """

    captions: int
    skipped: int
    seconds: float
    unread: int


@dataclass(frozen=True)
class Format:
    """A format of predictions in a file.

    Attributes:
        line: returns a prediction of a named image as a line of the unfinished file.
        finish: turns the unfinished file into the file, if its lines are not the file already.
    """

    line: Callable[[str, Prediction], str]
    finish: Callable[[Path, Path, Sequence[str]], None] | None = None


def as_row(name: str, prediction: Prediction) -> str:
    """Return `name <tab> text`, and for verbs other than caption a third column with the confidence."""
    text = plain(prediction.text)
    return f"{name}\t{text}" if prediction.task == "caption" else f"{name}\t{text}\t{prediction.confidence:.4f}"


def as_json(name: str, prediction: Prediction) -> str:
    """Return a JSON object in one line: the name of the image, and all that is known of the prediction."""
    record = {"image": name, **prediction.to_dict(), "text": plain(prediction.text)}
    return json.dumps(record, ensure_ascii=False)


def plain(text: str) -> str:
    """Return a text in one line, without what a terminal could read as commands."""
    return harmless(" ".join(text.split()), "")


def _finish_coco(part: Path, out: Path, names: Sequence[str]) -> None:
    """Write COCO's results format, [{"image_id": 42, "caption": …}, …]."""
    ids = coco_ids(names)
    records = map(json.loads, part.read_text(encoding="utf-8").splitlines())
    results = [{"image_id": ids[record["image"]], "caption": record["text"]} for record in records]
    write_whole(out, json.dumps(results) + "\n")


def _finish_json(part: Path, out: Path, names: Sequence[str]) -> None:
    """Write one list of all predictions."""
    records = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    write_whole(out, json.dumps(records, ensure_ascii=False) + "\n")


def _finish_parquet(part: Path, out: Path, names: Sequence[str]) -> None:
    """Write a table of Parquet with a row for each image."""
    from pyarrow import json as arrow_json
    from pyarrow import parquet

    content = BytesIO()
    parquet.write_table(arrow_json.read_json(part), content)
    write_whole(out, content.getvalue())


def format_of(out: Path | None, as_json_lines: bool, verb: str) -> Format:
    """Return the format of an output, by the ending of its name.

    Args:
        out: the file; None for the standard output.
        as_json_lines: whether lines are JSON in any case.
        verb: what is predicted.

    Raises:
        InputError: if the package for a format is not installed.
    """
    suffix = "" if out is None else out.suffix.lower()
    if suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise InputError(f"--out {out}: needs the package pyarrow; pip install 'narvl[parquet]'") from None
        return Format(as_json, _finish_parquet)
    if suffix == ".json":
        return Format(as_json, _finish_coco if verb == "caption" else _finish_json)
    return Format(as_json if as_json_lines or suffix == ".jsonl" else as_row)


def predict_files(
    given: Sequence[Path],
    *,
    verb: str = "caption",
    text: str | None = None,
    checkpoint: Path | None = None,
    out: Path | None = None,
    as_json_lines: bool = False,
    show: Path | None = None,
    batch_size: int = 8,
    workers: int = 1,
    beam: int | None = None,
    nbest: int | None = None,
    answers: Sequence[str] | None = None,
    abstain_below: float = 0.0,
    skip_bad_rows: int = 0,
    bpe_dir: Path | None = None,
    device: str | None = None,
    ngram_automaton: Path | None = None,
    ngram_weight: float = 0.2,
) -> Count:
    """Write a prediction for each image, in the order of `find_images`.

    Images are seen as people see them: turned by their EXIF orientation, and on a white background if they are
    transparent. The output is written as NAME.part and renamed when all images are done. A killed run resumes there,
    if the images have the same names and sizes as before.

    Args:
        given: folders, image files and patterns, see `find_images`.
        verb: what to predict: caption, answer, locate, regions, graph, tree or entails.
        text: the question, words or statement about every image.
        checkpoint: see `narvl.load`; None is the model in the box.
        out: file to write. NAME.tsv has lines of path and text, NAME.jsonl of JSON, NAME.parquet a row for each image;
            NAME.json is a list, of captions in COCO's results format (see `coco_ids`). Without a file lines go to the
            standard output.
        as_json_lines: write lines of JSON instead of path and text.
        show: HTML file to write with the images, boxes, queries and heat maps of the first `SHOWN` images.
        batch_size: images in one pass.
        workers: processes that read, decode and resize images meanwhile; with 0 the model waits for them.
        beam: width of the beam, if not that of --eval-args.
        nbest: number of alternatives.
        answers: a closed list of answers.
        abstain_below: confidence below which nothing is predicted.
        skip_bad_rows: how many files may be skipped that are not readable images.
        bpe_dir: the vocabulary's folder; by default the one that the checkpoint names.
        device: torch's name of it; by default a GPU if there is one.
        ngram_automaton: see `Decoding`, as the one below.
        ngram_weight: factor of the n-grams' log-probabilities.

    Raises:
        MissingInput, InputError: if the images, the checkpoint or its vocabulary cannot be used.
        BadRow: if a file is not a readable image, and the skip budget is spent.
    """
    if out is not None and out.exists() and not out.is_file():
        raise InputError(f"--out {out}: is not a file that can be replaced; give the name of a file")
    for file in (out, show):
        if file is not None:
            require_writable(file)
    files, others = search_images(given)
    for file in (out, show):
        if file is not None and file.exists() and any(file.samefile(one) for one in files.values() if one.exists()):
            option = "--out" if file is out else "--show"
            raise InputError(f"{option} {file}: is one of the images, which it would replace; give another name")
    kind = format_of(out, as_json_lines, verb)
    if kind.finish is _finish_coco:
        coco_ids(files)  # refuses names before the model is loaded
    if others:
        shown = ", ".join(repr(str(file)) for file in others[:5]) + (", …" if len(others) > 5 else "")
        logger.warning("%d file(s) left out, of unsupported image formats: %s", len(others), shown)
    model = load(
        checkpoint,
        bpe_dir=bpe_dir,
        device=device,
        beam=beam,
        nbest=nbest,
        answers=answers,
        abstain_below=abstain_below,
        ngram_automaton=ngram_automaton,
        ngram_weight=ngram_weight,
    )
    engine, decoding = model.engine(verb), model.decoding_for(verb)
    run = Run(engine, decoding, files, checked_text(engine, text), batch_size, workers, SkipBudget(skip_bad_rows))
    start = time.perf_counter()
    if out is None:
        for name, prediction in run.predictions(0):
            print(kind.line(name, prediction), flush=True)
    else:
        settings = {"verb": verb, "text": text, "images": len(files), "batch_size": batch_size}
        settings |= {"inputs": inputs_record(files), "model": model_record(checkpoint or BOX)}
        settings |= decoding_record(decoding)
        run.write(out, kind, settings)
    seconds = time.perf_counter() - start
    if show is not None:
        write_whole(show, run.page())
    return Count(run.answered, len(files) - run.answered, seconds, len(others))


def decoding_record(decoding: Decoding) -> dict[str, Any]:
    """Return what tells a way to decode from others; a file of n-grams is told by all of its bytes."""
    record = {name: value for name, value in vars(decoding).items() if value is not None}
    if decoding.ngram_automaton is None:
        return {name: value for name, value in record.items() if name != "ngram_weight"}
    with open(decoding.ngram_automaton, "rb") as file:
        return record | {"ngram_automaton": hashlib.file_digest(file, "sha256").hexdigest()[:16]}


def inputs_record(files: Mapping[str, Path]) -> str:
    """Return what tells these image files from others: the first and the last name, and a hash of all names and sizes.

    Args:
        files: the files by name, in their order; some may be gone.
    """
    digest = hashlib.sha256()
    for name, file in files.items():
        size = file.stat().st_size if file.exists() else -1
        digest.update(f"{name}\t{size}\n".encode())
    names = list(files)
    return f"{names[0]} … {names[-1]} ({digest.hexdigest()[:12]})"


def model_record(path: Path) -> str:
    """Return what tells a checkpoint, or the files of an exported folder, from others."""
    if not (path / SETTINGS_FILE).is_file():
        return checkpoint_fingerprint(path)
    prints = (f"{file.name} {fingerprint(file)}\n" for file in sorted(path.iterdir()) if file.is_file())
    return hashlib.sha256("".join(prints).encode()).hexdigest()[:16]


class Run:
    """Predictions of an engine for image files.

    Attributes:
        answered: number of images that have a prediction so far.
    """

    def __init__(
        self,
        engine: Engine,
        decoding: Decoding,
        files: Mapping[str, Path],
        text: str,
        batch_size: int,
        workers: int,
        budget: SkipBudget,
    ) -> None:
        self.engine, self.decoding, self.files, self.text = engine, decoding, files, text
        self.batch_size, self.workers, self.budget = batch_size, workers, budget
        self.answered = 0

    def batches(self, first: int) -> Iterator[tuple[list[BadRow], list[tuple[str, Prediction]]]]:
        """Yield what is wrong with some images of a batch, and the predictions of the others, from the image `first`.

        Raises:
            BadRow: if a file is not a readable image, and the skip budget is spent.
        """
        names = list(self.files)[first:]
        reading = Reading(self.engine, [self.files[name] for name in names], self.text)
        loader = DataLoader(reading, self.batch_size, num_workers=self.workers, collate_fn=list)
        with tqdm(total=len(self.files), initial=first, unit="image", disable=None, leave=False) as progress:
            for batch in loader:
                here, names = names[: len(batch)], names[len(batch) :]
                errors = [found for found in batch if isinstance(found, BadRow)]
                for error in errors:
                    self.budget.skip(error)
                good = [(name, one) for name, one in zip(here, batch, strict=True) if not isinstance(one, BadRow)]
                found = self.engine.predict([one for _, one in good], self.decoding) if good else []
                self.answered += len(found)
                yield errors, [(name, one) for (name, _), one in zip(good, found, strict=True)]
                progress.update(len(batch))

    def predictions(self, first: int) -> Iterator[tuple[str, Prediction]]:
        """Yield name and prediction of each image, from the image `first`; see `batches`."""
        for _, found in self.batches(first):
            yield from found

    def write(self, out: Path, kind: Format, settings: dict[str, Any]) -> None:
        """Write a file; a killed run goes on in NAME.part."""
        out = out.resolve()  # where a link leads
        with ResumableWriter(out, settings, replace=True) as writer:
            done = writer.counts[SKIPPED]
            self.budget.charge(done)
            self.answered = writer.rows_done - done
            for errors, found in self.batches(writer.rows_done):
                lines = [kind.line(name, prediction) for name, prediction in found]
                writer.append(lines, len(errors) + len(found), {SKIPPED: len(errors)})
            finish = kind.finish
            writer.finish(None if finish is None else lambda part: finish(part, out, list(self.files)))

    def page(self) -> str:
        """Return a page of the first images with their predictions."""
        names, predictions = [], []
        for name, file in list(self.files.items())[:SHOWN]:
            try:
                (found,) = self.engine.predict([self.engine.prepare(file, self.text, str(file))], self.decoding)
            except BadRow:  # counted already
                continue
            names.append(name)
            predictions.append(with_input(found, self.engine, file, self.text))
        return page_html(predictions, names)


class Reading(Dataset[Any]):
    """Image files as an engine reads them; the error of a bad one is handed on, so that it stays readable."""

    def __init__(self, engine: Engine, files: Sequence[Path], text: str) -> None:
        self.engine, self.files, self.text = engine, files, text

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Any:
        file = self.files[row]
        try:
            return self.engine.prepare(file, self.text, str(file))
        except BadRow as error:
            return error
