"""The runs of a study: what they share is made once, then each runs in a folder of its own, one after another."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from narvl_plugin.errors import InputError
from narvl_plugin.pipeline.options import with_options
from narvl_plugin.pipeline.programs import Programs, environment, last_lines
from narvl_plugin.pipeline.settings import SETTINGS_FILE, RunConfig, Settings
from narvl_plugin.pipeline.sharing import missing
from narvl_plugin.pipeline.stages import Reporter, Work, sole_run, together
from narvl_plugin.study.cells import Cell
from narvl_plugin.study.plan import Study
from narvl_plugin.whole_files import naming, write_whole

STUDY_FILE = "study.yaml"
"""Name of the copy of the study's file in its folder."""
OPTIONS_FILE = "cell.yaml"
"""Name of the file with the options of a run in its folder."""
LOG = "log.txt"
"""Name of the file in a run's folder with all that the run has printed."""
PATIENCE = 6.0
"""Seconds that a run has to end, with its programs."""


@dataclass
class Job:
    """A run to start.

    Attributes:
        name: its name.
        folder: its folder.
        options: its options, with those of the study.
        after: the job whose results it needs.
        failed: why it failed; empty if it did not.
    """

    name: str
    folder: Path
    options: dict[str, Any]
    after: Job | None = None
    failed: str = field(default="", compare=False)

    def is_done(self, tree: Path) -> bool:
        """Return whether its results are there."""
        if "until" not in self.options:
            return is_finished(self.folder)
        return (self.folder / SETTINGS_FILE).exists() and not missing(settings_of(self.options, tree), self.folder)


def is_finished(folder: Path) -> bool:
    """Return whether the run in a folder has ended: its report is its last output."""
    return (folder / "report.html").exists()


def cell_folder(out: Path, name: str) -> Path:
    """Return the folder of a run in that of its study."""
    return out / "cells" / name


def settings_of(options: Mapping[str, Any], tree: Path) -> Settings:
    """Return the settings of a run with some options.

    Raises:
        InputError: if there is no such run.
    """
    return Settings(with_options(OmegaConf.structured(RunConfig), options, "the study"), tree)


def jobs_of(cells: Mapping[str, Cell], out: Path, tree: Path) -> tuple[list[Job], list[Job]]:
    """Return what runs share, once each, and the runs.

    Raises:
        InputError: for a run that cannot be.
    """
    shared: dict[str, Job] = {}
    jobs = []
    for name, cell in cells.items():
        base = cell.shared
        folder = out / "shared" / base.name
        try:
            settings = settings_of({**cell.options, "out": str(cell_folder(out, name))}, tree)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        job = shared.setdefault(
            base.name, Job(base.name, folder, {**base.options, "out": str(folder), "until": "distil"})
        )
        if (settings.distil or settings.config.baselines) and not settings_of(job.options, tree).distil:
            job.options["baselines"] = True  # by which the teacher's outputs are made, and which no run keeps
        options = {**cell.options, "out": str(cell_folder(out, name)), "shared": str(folder)}
        jobs.append(Job(name, cell_folder(out, name), options, after=job))
    return list(shared.values()), jobs


class Runner:
    """Starts the runs of a study.

    Args:
        out: the study's folder.
        tree: folder of the recipes.
        programs: starts programs.
        reporter: prints what it does.
        launcher: name of the launcher of Hydra that starts all runs; by default they run one after another.
    """

    def __init__(self, out: Path, tree: Path, programs: Programs, reporter: Reporter, launcher: str | None) -> None:
        self.out = out
        self.tree = tree
        self.programs = programs
        self.reporter = reporter
        self.launcher = launcher

    def __call__(self, jobs: Sequence[Job], kind: str) -> None:
        """Start all jobs that are not done, and note those that fail.

        Args:
            jobs: the jobs.
            kind: what they are called.
        """
        numbers = {job.name: number for number, job in enumerate(jobs, 1)}
        todo = [job for job in jobs if not job.is_done(self.tree)]
        if len(todo) < len(jobs):
            self.reporter.say(f"{len(jobs) - len(todo)} of {len(jobs)} {kind}s are done")
        for job in list(todo):
            if job.after is not None and job.after.failed:
                job.failed = f"failed, since its teacher failed (full log: {job.after.folder / LOG})"
                todo.remove(job)
        for job in todo:
            _write_options(job)
        if self.launcher and todo:
            self.reporter.say(f"{len(todo)} {kind}s by the launcher {self.launcher}")
            together(self._launch(todo))
        elif todo:
            for job in todo:
                self.reporter.say(f"{kind} {numbers[job.name]} of {len(jobs)}: {job.name}")
                start = time.monotonic()
                together(self._run(job))
                took = f"took {time.monotonic() - start:.1f} s"
                self.reporter.say(f"{kind} {numbers[job.name]} of {len(jobs)} {job.failed or took}")

    def _run(self, job: Job) -> Work:
        """Run a job."""
        words = [*self._words(), f"cell={_quoted(job.folder / OPTIONS_FILE)}"]
        log = job.folder / LOG
        with naming(log), open(log, "ab") as file:
            program = self.programs.start(words, environment(1), stdout=file, stderr=subprocess.STDOUT)
        while not self.programs.finished(program):
            yield
        if program.returncode or not job.is_done(self.tree):
            job.failed = f"failed: {last_lines([log])}"

    def _launch(self, jobs: Sequence[Job]) -> Work:
        """Hand jobs to a launcher of Hydra."""
        words = [*self._words(), "--multirun", f"hydra/launcher={self.launcher}"]
        words.append(f"hydra.sweep.dir={_quoted(self.out / 'launcher')}")
        words.append("cell=" + ",".join(_quoted(job.folder / OPTIONS_FILE) for job in jobs))
        log = self.out / LOG
        with naming(log), open(log, "ab") as file:
            program = self.programs.start(words, environment(1), stdout=file, stderr=subprocess.STDOUT)
        while not self.programs.finished(program):
            yield
        for job in jobs:
            if not job.is_done(self.tree):
                job.failed = f"failed: {last_lines([log])}"

    def _words(self) -> list[str]:
        return ["narvl", "run", "--config-dir", str(self.tree)]


def run_study(
    study: Study, file: Path, out: Path, *, tree: Path, launcher: str | None = None, log_file: Path | None = None
) -> list[Job]:
    """Run what is left of a study.

    Args:
        study: the study.
        file: the file that it was read from.
        out: its folder.
        tree: folder of the recipes.
        launcher: see `Runner`.
        log_file: file to append messages to, or None.

    Returns:
        The runs that failed.

    Raises:
        InputError: for a run that cannot be, or if the study is running already.
        Stopped: if a signal asks it to end.
    """
    shared, jobs = jobs_of(study.cells(), out, tree)
    reporter = Reporter(log_file)
    with sole_run(out) as lock:
        if file.resolve() != (out / STUDY_FILE).resolve():
            write_whole(out / STUDY_FILE, file.read_bytes())
        programs = Programs(lock)
        signal.signal(signal.SIGTSTP, lambda *_: programs.pause(signal.SIGTSTP))
        try:
            runner = Runner(out, tree, programs, reporter, launcher)
            waiting = {job.after.name for job in jobs if job.after and not job.is_done(tree)}
            runner([job for job in shared if job.name in waiting], "teacher")
            runner(jobs, "cell")
        finally:
            programs.end(PATIENCE)
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    return [job for job in jobs if job.failed]


def _write_options(job: Job) -> None:
    """Write the options of a job into its folder."""
    with naming(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    lines = (f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in job.options.items())
    write_whole(job.folder / OPTIONS_FILE, "".join(lines))


def _quoted(path: Path) -> str:
    """Return a path as Hydra reads it."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
