"""What becomes of a shard: predictions of a verb for its rows, or a teacher's targets in them."""

from __future__ import annotations

import json
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Union, get_args, get_origin, get_type_hints

from narvl_plugin.api.files import as_json, as_row, decoding_record, model_record
from narvl_plugin.api.loading import BOX, load
from narvl_plugin.api.model import Decoding, Engine, checked_text
from narvl_plugin.api.prediction import Prediction
from narvl_plugin.bulk.rows import Columns, Row, TsvRows
from narvl_plugin.bulk.shards import Shard
from narvl_plugin.data.any_image import held
from narvl_plugin.data.tsv import parse_columns
from narvl_plugin.errors import BadRow, InputError, SkipBudget, harmless
from narvl_plugin.inference.distillation import Distillation, Teacher
from narvl_plugin.tasks import TASKS

FORMATS = (".tsv", ".jsonl", ".parquet")
"""Formats of shards, by the endings of their names."""


class Output(NamedTuple):
    """The output of a shard.

    Attributes:
        content: the contents of its file.
        rows: the number of rows with an output.
        skipped: what is wrong with the other rows.
    """

    content: bytes
    rows: int
    skipped: tuple[str, ...]


class Job(Protocol):
    """What to do with shards. It is sent to the processes that do it, each of which starts it once.

    Attributes:
        suffix: the ending of the output's files, one of `FORMATS`.
        device: torch's name of the device, None for a GPU if there is one.
        skip_bad_rows: how many rows may be skipped.
    """

    @property
    def suffix(self) -> str: ...  # noqa: D102
    @property
    def device(self) -> str | None: ...  # noqa: D102
    @property
    def skip_bad_rows(self) -> int: ...  # noqa: D102

    def record(self) -> dict[str, Any]:
        """Return all that the output depends on, but for the inputs."""

    def start(self) -> Callable[[Shard], Output]:
        """Load the model, and return a function from shards to outputs.

        The function raises BadRow if more rows are bad in this process than may be skipped.

        Raises:
            MissingInput, InputError: if the model cannot be used.
        """


# --- Predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Predicting:
    """Predictions of a verb; see `predict_files` for the options. Without a text each row has its own."""

    verb: str
    suffix: str
    text: str | None = None
    checkpoint: Path | None = None
    bpe_dir: Path | None = None
    device: str | None = None
    batch_size: int = 8
    workers: int = 1
    skip_bad_rows: int = 0
    decoding: Decoding = field(default_factory=Decoding)

    def record(self) -> dict[str, Any]:
        """Return all that the output depends on; see `Job`."""
        settings = {"verb": self.verb, "text": self.text, "batch_size": self.batch_size, "format": self.suffix}
        return settings | {"model": model_record(self.checkpoint or BOX)} | decoding_record(self.decoding)

    def start(self) -> Callable[[Shard], Output]:
        """Load the model; see `Job`."""
        model = load(self.checkpoint, bpe_dir=self.bpe_dir, device=self.device, **vars(self.decoding))
        engine = model.engine(self.verb)
        if engine.text_column is None or self.text is not None:
            checked_text(engine, self.text)
        return Predictions(self, engine, model.decoding_for(self.verb))


class Prepared(NamedTuple):
    """A row as the engine reads it: its name in the output, its text, and what `Engine.prepare` returns."""

    name: str
    text: str
    image: Any


class Predictions:
    """Predicts the rows of shards."""

    def __init__(self, job: Predicting, engine: Engine, decoding: Decoding) -> None:
        self.job, self.engine, self.decoding = job, engine, decoding
        self.columns = Columns(engine.text_column if job.text is None else None, _columns(engine))
        self.budget = SkipBudget(job.skip_bad_rows)

    def __call__(self, shard: Shard) -> Output:
        """Return the output of a shard; see `Job`."""
        skipped: list[str] = []
        self.budget.report = lambda error: skipped.append(str(error))
        line = as_row if self.job.suffix == ".tsv" else as_json
        lines = []
        for batch in self._batches(shard):
            predictions = self.engine.predict([one.image for one in batch], self.decoding)
            for one, prediction in zip(batch, predictions, strict=True):
                lines.append(line(one.name, replace(prediction, prompt=one.text or None)))
        return Output(contents(lines, self.job.suffix), len(lines), tuple(skipped))

    def _batches(self, shard: Shard) -> Iterator[list[Prepared]]:
        """Yield the names and prepared images of the usable rows, in batches."""
        rows = self._prepared(shard.source.rows(self.columns))
        while batch := list(islice(rows, self.job.batch_size)):
            yield batch

    def _prepared(self, rows: Iterable[Row | BadRow]) -> Iterator[Prepared]:
        """Yield the names and prepared images of the usable rows. Threads prepare the next ones meanwhile.

        Raises:
            BadRow: if the skip budget is spent.
        """
        if not self.job.workers:
            yield from chain.from_iterable(map(self._usable, map(self._prepare, rows)))
            return
        with ThreadPoolExecutor(self.job.workers) as threads:
            waiting: deque[Any] = deque()
            try:
                for row in rows:
                    waiting.append(threads.submit(self._prepare, row))
                    if len(waiting) > self.job.batch_size:
                        yield from self._usable(waiting.popleft().result())
                while waiting:
                    yield from self._usable(waiting.popleft().result())
            finally:
                for one in waiting:
                    one.cancel()

    def _prepare(self, row: Row | BadRow) -> Prepared | BadRow:
        """Return the name and the prepared image of a row, or what is wrong with it."""
        if isinstance(row, BadRow):
            return row
        try:
            text = self.job.text or "" if row.text is None else checked_text(self.engine, row.text)
            return Prepared(one_line(row.name), text, self.engine.prepare(held(row.image), text, row.where))
        except InputError as error:
            return error if isinstance(error, BadRow) else BadRow(f"{row.where}: {error}")

    def _usable(self, found: Prepared | BadRow) -> list[Prepared]:
        """Return a prepared row, or skip a bad one."""
        if isinstance(found, BadRow):
            self.budget.skip(found)
            return []
        return [found]


def one_line(name: str) -> str:
    """Return a name that fits into a column of a line."""
    return harmless(name).replace("\t", "?").replace("\n", "?")


def _columns(engine: Engine) -> dict[str, int]:
    """Return the columns of TSV files by name: those of the checkpoint's training, or the usual ones of the task."""
    task = TASKS[engine.task]
    predictor = getattr(engine, "predictor", None)  # an exported student has none
    selected = (task.config_class if predictor is None else predictor.task.cfg).selected_cols
    return task.dataset_class.columns_by_name(parse_columns(selected))


def contents(lines: Sequence[str], suffix: str) -> bytes:
    """Return lines as the contents of a file; for Parquet they are JSON objects of predictions.

    A tree has no depth of its own, so in Parquet it is a text of JSON.
    """
    if suffix != ".parquet":
        return "".join(f"{line}\n" for line in lines).encode("utf-8")
    import pyarrow
    from pyarrow import parquet

    content = BytesIO()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["tree"] = row["tree"] and json.dumps(row["tree"], ensure_ascii=False)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=prediction_schema()), content)
    return content.getvalue()


def prediction_schema() -> Any:
    """Return the columns of Parquet files, which are the same for all shards, whatever is in them."""
    import pyarrow

    known = Prediction("", 0.0, (), (), ()).to_dict()
    hints = {name: hint for name, hint in get_type_hints(Prediction).items() if name in known}
    return pyarrow.schema([("image", pyarrow.string()), *((name, arrow_type(hint)) for name, hint in hints.items())])


def arrow_type(hint: Any) -> Any:
    """Return Arrow's type for a type of Python: of plain values, tuples, named tuples, and these or None."""
    import pyarrow

    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is tuple:
        return pyarrow.list_(arrow_type(get_args(hint)[0]))
    if hasattr(hint, "_fields"):
        return pyarrow.struct([(name, arrow_type(one)) for name, one in get_type_hints(hint).items()])
    return {float: pyarrow.float64(), int: pyarrow.int64()}.get(hint, pyarrow.string())


# --- Distillation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distilling:
    """A teacher's targets in the rows of a TSV file, see `distill`.

    Attributes:
        how: the options.
        out: the folder to write.
    """

    how: Distillation
    out: Path
    suffix = ".tsv"

    @property
    def device(self) -> str | None:
        """The device; see `Job`."""
        return self.how.device

    @property
    def skip_bad_rows(self) -> int:
        """How many rows may be skipped; see `Job`."""
        return self.how.skip_bad_rows

    def record(self) -> dict[str, Any]:
        """Return all that the output depends on; see `Job`."""
        return self.how.record()

    def start(self) -> Callable[[Shard], Output]:
        """Load the teacher; see `Job`."""
        teacher = Teacher(self.how, self.out / "shard.tsv")
        size = self.how.batch_size

        def rewritten(shard: Shard) -> Output:
            rows = shard.source
            assert isinstance(rows, TsvRows)
            skipped: list[str] = []
            teacher.budget.report = lambda error: skipped.append(str(error))
            lines: list[str] = []
            for first in range(rows.first, rows.last, size):
                lines += teacher.lines(range(first, min(first + size, rows.last)))
            content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
            return Output(content, rows.last - rows.first - len(skipped), tuple(skipped))

        return rewritten
