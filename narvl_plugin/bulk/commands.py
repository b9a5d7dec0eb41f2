"""What the program does with `--out FOLDER/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from narvl_plugin.bulk.answers import FORMATS, Distilling, Predicting
from narvl_plugin.bulk.engines import Runner
from narvl_plugin.bulk.folder import Totals, write_shards
from narvl_plugin.bulk.shards import SHARD_ROWS, Plan, Shard, plan, tsv_parts
from narvl_plugin.data.resumable import fingerprint
from narvl_plugin.errors import InputError
from narvl_plugin.inference.distillation import Distillation


def format_of_folder(out: str) -> str:
    """Return the format of the shards in a folder, by the ending of its name; without one it is TSV.

    Raises:
        InputError: for an ending that is no format.
    """
    suffix = Path(out).suffix.lower()
    if suffix and suffix not in FORMATS:
        raise InputError(f"--out {out}: a folder of shards is NAME/, or {', '.join(f'NAME{one}/' for one in FORMATS)}")
    return suffix or ".tsv"


def predict_shards(
    given: Sequence[str], out: Path, job: Predicting, runner: Runner, rows_of_shard: int = SHARD_ROWS
) -> tuple[Totals, Plan]:
    """Write predictions for inputs into a folder of shards.

    Args:
        given: the inputs, see `plan`.
        out: the folder.
        job: what to predict.
        runner: where.
        rows_of_shard: rows of a shard, where the input does not divide itself.

    Returns:
        The totals, and the shards.

    Raises:
        MissingInput, InputError, BadRow, StalePart: see `plan` and `write_shards`.
    """
    planned = plan(given, rows_of_shard)
    return write_shards(out, planned, replace(job, checkpoint=_anywhere(job.checkpoint)), runner), planned


def distill_shards(how: Distillation, out: Path, runner: Runner, rows_of_shard: int = SHARD_ROWS) -> Totals:
    """Write a TSV file with a teacher's targets into a folder of shards; see `distill`.

    Args:
        how: the options.
        out: the folder.
        runner: where.
        rows_of_shard: rows of a shard. It is rounded up to whole batches.
    """
    out, data = out.absolute(), how.data.absolute()
    whole = -(-rows_of_shard // how.batch_size) * how.batch_size
    parts = enumerate(tsv_parts(str(data), whole))
    shards = [Shard(f"{number:06}-{data.stem}", rows) for number, rows in parts]
    absolute = replace(how, data=data, teachers=tuple(one.absolute() for one in how.teachers))
    planned = Plan(shards, f"{fingerprint(data)} in {whole}", [])
    return write_shards(out, planned, Distilling(absolute, out), runner)


def _anywhere(checkpoint: Path | None) -> Path | None:
    """Return a checkpoint by its absolute path, since workers may run in another folder; hf://OWNER/NAME stays."""
    return checkpoint.absolute() if checkpoint is not None and checkpoint.exists() else checkpoint
