"""A folder of outputs, a file for each shard. A killed job goes on with the shards that are missing."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

from narvl_plugin.bulk.answers import Job, Output
from narvl_plugin.bulk.engines import Runner
from narvl_plugin.bulk.shards import Plan
from narvl_plugin.data.resumable import StalePart
from narvl_plugin.errors import BadRow, InputError, SkipBudget
from narvl_plugin.whole_files import naming, require_writable, sole_writer, write_whole

logger = logging.getLogger(__name__)

PROGRESS = "_progress"
"""The file with the settings of a job in its first line, and a line for each finished shard."""
SUCCESS = "_SUCCESS"
"""The file with the totals, which is written last."""


class Totals(NamedTuple):
    """Numbers of a finished job.

    Attributes:
        rows: rows with an output.
        skipped: bad rows.
        new: rows of both kinds that this run has done, and not an earlier one.
        seconds: the time of this run.
    """

    rows: int
    skipped: int
    new: int
    seconds: float


def write_shards(out: Path, plan: Plan, job: Job, runner: Runner) -> Totals:
    """Write the output of each shard into a folder.

    A shard is written as a whole, under a name that follows from the input, and is then noted in `PROGRESS`. A later
    run does the shards that are not noted. `SUCCESS` comes last.

    Args:
        out: the folder.
        plan: the shards.
        job: what to do with each.
        runner: where to do it.

    Raises:
        MissingInput, InputError: if the folder cannot be written, another process writes it, or a model or an input
            cannot be used.
        BadRow: if a row cannot be used, and the skip budget is spent.
        StalePart: if the folder was begun with other inputs or settings.
    """
    start = time.perf_counter()
    require_writable(out, folder=True)
    settings = json.loads(json.dumps(job.record() | {"shards": len(plan.shards), "inputs": plan.record}))
    with sole_writer(out):
        out.mkdir(exist_ok=True)
        progress = Progress(out, settings)
        done = {name for name in progress.shards if (out / f"{name}{job.suffix}").is_file()}
        counts = [progress.shards[name] for name in done]
        rows, skipped = (sum(count[place] for count in counts) for place in (0, 1))
        before = rows + skipped
        budget = SkipBudget(job.skip_bad_rows)
        budget.charge(skipped)
        missing = [shard for shard in plan.shards if shard.name not in done]
        if missing:
            (out / SUCCESS).unlink(missing_ok=True)
            for part in out.glob("*.part"):  # of a killed run
                part.unlink()
        for name, output in runner.outputs(job, missing) if missing else ():
            for error in output.skipped:
                budget.skip(BadRow(error))
            write_whole(out / f"{name}{job.suffix}", output.content)
            progress.note(name, output)
            rows, skipped = rows + output.rows, skipped + len(output.skipped)
        totals = {"rows": rows, "skipped": skipped, "shards": len(plan.shards)}
        write_whole(out / SUCCESS, json.dumps(totals) + "\n")
    return Totals(rows, skipped, rows + skipped - before, time.perf_counter() - start)


class Progress:
    """The record of a job: its settings, and the finished shards.

    Attributes:
        shards: numbers of rows and of skipped rows, by the name of the shard.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        """Read the record of an earlier run, or begin one.

        Raises:
            InputError: if the folder holds other files.
            StalePart: if the earlier run had other settings.
        """
        self.file = out / PROGRESS
        self.shards: dict[str, tuple[int, int]] = {}
        if not self.file.exists():
            if other := next((one.name for one in out.iterdir() if not one.name.endswith(".part")), None):
                raise InputError(f"{out}: holds {other}, which is no output; give a new or an empty folder")
            write_whole(self.file, json.dumps(settings) + "\n")
            return
        # A killed run may leave half a line at the end, which the next line would follow.
        first, *lines = self.file.read_text(encoding="utf-8").rpartition("\n")[0].split("\n")
        try:
            before = dict(json.loads(first))
            noted = [json.loads(line) for line in lines]
            self.shards = {str(one["shard"]): (int(one["rows"]), int(one["skipped"])) for one in noted}
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise StalePart(f"{self.file}: is damaged ({error}); delete {out} to start from the beginning") from error
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise StalePart(
                    f"{out}: was begun with {key}={before.get(key)!r}, now {key}={settings.get(key)!r}; run it with "
                    "the former settings, or delete it to start from the beginning"
                )
        write_whole(self.file, "\n".join([first, *lines]) + "\n")

    def note(self, name: str, output: Output) -> None:
        """Note a shard whose file is written."""
        line = {"shard": name, "rows": output.rows, "skipped": len(output.skipped)}
        with naming(self.file), open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
