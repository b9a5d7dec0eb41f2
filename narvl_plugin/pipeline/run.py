"""The run of a recipe: the order of its stages, and the program of each."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from narvl_plugin.pipeline.programs import ProgramFailed, Programs, environment, last_lines
from narvl_plugin.pipeline.settings import SEEDS_APART, Settings
from narvl_plugin.pipeline.stages import Reporter, Stages, Work, together
from narvl_plugin.pipeline.training import configuration, train, wait_for
from narvl_plugin.whole_files import naming


class Run:
    """A run of a recipe in its folder.

    Args:
        settings: its settings.
        programs: starts programs.
        reporter: prints what it does.
    """

    def __init__(self, settings: Settings, programs: Programs, reporter: Reporter) -> None:
        self.settings = settings
        self.programs = programs
        self.reporter = reporter
        self.out = settings.out
        self.stages = Stages(self.out, reporter)
        self.recipe = settings.recipe
        config = settings.config
        self.env = environment(config.threads)
        self.env_of_all_cores = environment(settings.processes * config.threads)
        self.vocab = Path(config.bpe_dir) if config.bpe_dir else self.out / "vocab"
        self.splits = dict(settings.splits)
        self.teachers = [self.out / name / "checkpoint_last.pt" for name in settings.teachers]
        self.teacher = self.teachers[0]

    def __call__(self) -> None:
        """Do all stages that are not done."""
        self._make_data()
        self._find_answers()
        self._compute_features()
        self._train_teachers()
        self._use_teachers()
        if self.settings.config.until == "distil":
            shutil.rmtree(self.out / "generate.part", ignore_errors=True)
            self.reporter.say(f"Ends after the teacher's outputs. To train a student from them: SHARED={self.out}")
            return
        students = self._train_students()
        self._evaluate(students)

    # --- Data --------------------------------------------------------------------------------------------------------

    def _make_data(self) -> None:
        """Make the embedded data, and the vocabulary."""
        config, recipe = self.settings.config, self.recipe
        if not config.data:
            make = self._easy_vqa if config.recipe == "vqa" else self._scenes
            self._stage("data", self.splits["test"], make)
        if not config.bpe_dir:
            words = ["narvl", "vocab", self.splits["train"], "--out", self.vocab]
            words += ["--vocab-size", recipe["vocab_size"], "--column", recipe["text_columns"]]
            self._stage("vocab", self.vocab / "spm.model", partial(self._program, words))

    def _scenes(self) -> Work:
        """Draw images with rows of the task."""
        recipe = self.recipe
        words = ["narvl", "data", "scenes", "--out", self.out / "data", "--tasks", self.settings.task]
        words += ["--seed", self.settings.config.seed, "--size", self._task("patch_image_size")]
        for split in ("train", "valid", "test"):
            words += [f"--{split}", recipe[split]]
        return self._program([*words, "--nouns", recipe["nouns"], "--max-objects", recipe["objects"]])

    def _easy_vqa(self) -> Work:
        """Take rows from the start of each split of easy-VQA."""
        source, folder = self.out / "easy_vqa", self.splits["test"].parent
        yield from self._program(["narvl", "data", "easy-vqa", "--out", source])
        folder.mkdir(parents=True, exist_ok=True)
        answers = folder / self.recipe["answers"]
        with naming(answers):
            shutil.copyfile(source / answers.name, answers)
        for split, name in (("train", "train"), ("valid", "val"), ("test", "test")):
            limit, part = self.recipe[split], folder / f"{split}.part"
            with naming(part), open(source / f"{name}.tsv", "rb") as rows, open(part, "wb") as file:
                for number, row in enumerate(rows):
                    if limit is not None and number >= limit:
                        break
                    file.write(row)
            part.replace(folder / f"{split}.tsv")

    def _find_answers(self) -> None:
        """Set the options of the task, some of which depend on closed lists of answers or names."""
        config, recipe = self.settings.config, self.recipe
        self.teacher_options = {name: shlex.split(words) for name, words in recipe["teacher_options"].items()}
        self.distil_options = shlex.split(recipe["distil_options"])
        self.latency_options = shlex.split(recipe["latency_options"])
        self.student_options = shlex.split(recipe["student_options"])
        self.report_options: list[str] = []
        self.options: list[Any] = ["--user-dir", self.settings.teacher["common"]["user_dir"]]
        self.options += ["--task", self.settings.task, "--bpe-dir", self.vocab]
        for name in ("max_tgt_length", "patch_image_size", "num_bins"):
            self.options += [f"--{name.replace('_', '-')}", self._task(name)]
        self.options += ["--seed", config.seed, "--num-workers", config.workers]
        self.options += ["--skip-bad-rows", config.skip_bad_rows, "--selected-cols", self._task("selected_cols")]
        for name in ("max_image_size", "eval_args"):
            if self._task(name) is not None:
                self.options += [f"--{name.replace('_', '-')}", self._task(name)]
        for name in ("eval_cider", "eval_acc", "add_caption"):
            self.options += [f"--{name.replace('_', '-')}"] if self._task(name) else []
        self.answers: dict[str, Any] = {}
        if recipe["answers"]:
            listed = self.splits["test"].parent / recipe["answers"]
            if listed.exists():
                words = ["--ans2label-file", str(listed)]
                self.options += words
                for options in (self.distil_options, self.latency_options, self.report_options):
                    options += words
                self.answers = {"ans2label_file": str(listed)}
            else:  # the teacher may output any text
                self.options += ["--val-inference-type", "beamsearch"]
                self.answers = {"ans2label_file": None, "val_inference_type": "beamsearch"}
                self.teacher_options.pop("teacher_allcand")
        if recipe["names"]:
            names = str(self.splits["test"].parent / recipe["names"])
            self.options += ["--names-file", names]
            self.answers |= {"names_file": names}

    def _compute_features(self) -> None:
        """Compute the features of nano's frozen backbone once. Training reads them instead of images."""
        if not self.settings.nano:
            return
        for split in ("train", "valid"):
            file = self.out / "features" / f"{split}.tsv"
            words = ["narvl", "features", self.splits[split], file, "--arch", "narvl_nano"]
            words += ["--image-column", self.recipe["image_column"]]
            words += ["--patch-image-size", self._task("patch_image_size")]
            words += ["--skip-bad-rows", self.settings.config.skip_bad_rows]
            self._stage(f"features {split}", file, partial(self._program, words, self.env_of_all_cores))
            self.splits[split] = file

    # --- Models ------------------------------------------------------------------------------------------------------

    def _train_teachers(self) -> None:
        """Train the teachers, or link the one that is given."""
        folder, given = self.teacher.parent, self.settings.config.teacher_checkpoint
        if self.settings.config.shared:  # its folder is a link to that run's
            return
        if not given:
            base = self.settings.teacher
            for number, teacher in enumerate(self.teachers):
                common = {**base["common"], "seed": base["common"]["seed"] + number * SEEDS_APART}
                own = {**base, "common": common}
                work = partial(self._train, teacher.parent, own, self.splits["train"], None)
                self._stage(teacher.parent.name, teacher.parent / "train.jsonl", work)
            return
        with naming(self.teacher):
            folder.mkdir(parents=True, exist_ok=True)
            link = folder / "checkpoint_last.pt.part"
            link.unlink(missing_ok=True)
            link.symlink_to(given)  # a port's folder is read like a file
            link.replace(self.teacher)

    def _use_teachers(self) -> None:
        """Generate with the teachers in all ways at once and, meanwhile, distil."""
        distils = self.settings.distil or self.settings.config.baselines
        works = [
            self._generation(name, self.teachers, words, shown=not distils)
            for name, words in self.teacher_options.items()
        ]
        if distils:
            out = self.out / "distilled" / "train.tsv"
            words = self._distillation(self.teachers, out, self.distil_options)
            works.append(self.stages.stage("distil", out, partial(self._program, words)))
        together(*works)

    def _distillation(self, models: list[Path], out: Path, options: list[str]) -> list[Any]:
        """Return the program that writes outputs of models in place of the targets of the training rows."""
        words = ["narvl", "distill", "--data", self.splits["train"], "--out", out]
        for model in models:
            words += ["--teacher", model]
        words += ["--batch-size", self.settings.answered, "--bpe-dir", self.vocab]
        return [*words, "--skip-bad-rows", self.settings.config.skip_bad_rows, *options]

    def _train_students(self) -> list[str]:
        """Train the student and, if asked for, two to compare it with. Return their names."""
        human, distilled = self.splits["train"], self.out / "distilled" / "train.tsv"
        settings = self.settings
        own, other = (distilled, human) if settings.distil else (human, distilled)
        own_start = "finetune_from_model" in (settings.config.student.get("checkpoint") or {})
        start = None if own_start else self.teacher
        plans = [("student", own, settings.student, start)]
        if settings.config.self_distil:
            first = self.out / "first_student" / "checkpoint_last.pt"
            work = partial(self._train, first.parent, settings.student, own, start)
            self._stage("first_student", first.parent / "train.jsonl", work)
            outputs = self.out / "self_distilled" / "train.tsv"
            options = shlex.split(self.recipe["self_distil_options"])
            options += ["--mbr", "cider"] if settings.config.self_distil == "mbr" else []
            words = self._distillation([first], outputs, options)
            self._stage("self-distil", outputs, partial(self._program, words, self.env_of_all_cores))
            plans = [("student", outputs, settings.student, first)]
        if settings.config.baselines:
            criterion = {"criterion": {"_name": "query_cross_entropy"}}
            plans.append(
                ("student_nodistill" if settings.distil else "student_distilled", other, settings.student, start)
            )
            plans.append(("student_ce", own, {**settings.student, **criterion}, start))
        for name, rows, base, origin in plans:
            folder = self.out / name
            work = partial(self._train, folder, base, rows, origin)
            self._stage(name, folder / "train.jsonl", work)
        return [name for name, *_ in plans]

    def _train(self, folder: Path, base: Mapping[str, Any], rows: Path, start: Path | None) -> Work:
        """Train a model in a folder, from the weights of a checkpoint or None."""
        settings = self.settings
        cfg = configuration(
            base,
            folder=folder,
            data=f"{rows},{self.splits['valid']}",
            bpe_dir=self.vocab,
            start=start,
            processes=settings.processes,
            workers=0 if settings.nano else settings.config.workers,
        )
        cfg["task"] |= self.answers
        return train(folder, cfg, title=folder.name, programs=self.programs, env=self.env, reporter=self.reporter)

    # --- Results -----------------------------------------------------------------------------------------------------

    def _evaluate(self, students: list[str]) -> None:
        """Calibrate the student, generate with all students, measure latency, and report."""
        out, test, recipe = self.out, self.splits["test"], self.recipe
        student = out / "student" / "checkpoint_last.pt"
        bpe = ["--bpe-dir", self.vocab]
        words = ["narvl", "calibrate", student, self.splits["valid"], "--test", test, "--teacher", self.teacher]
        words += ["--out", out / "calibration.json", "--batch-size", self.settings.answered, *bpe]
        work = partial(self._program, [*words, *self.latency_options], self.env_of_all_cores)
        self._stage("calibrate", out / "calibration.json", work)
        ngrams = self._count_ngrams()
        for name in students:
            models = [out / name / "checkpoint_last.pt"]
            options = [*self.student_options, *ngrams]
            together(self._generation(name, models, options, env=self.env_of_all_cores))
        words = ["narvl", "bench", "latency", "--teacher", self.teacher, "--student", student, "--data", test]
        words += ["--out", out / "latency.json", "--images", recipe["timed"], *bpe, *self.latency_options, *ngrams]
        self._stage("latency", out / "latency.json", partial(self._program, words))
        report = out / "report.html"
        if report.exists() and any(file.stat().st_mtime_ns > report.stat().st_mtime_ns for file in self._reported()):
            report.unlink()
        words = [
            "narvl",
            "report",
            out,
            "--data",
            test,
            "--task",
            self.settings.task,
            *bpe,
            *self.report_options,
            *ngrams,
        ]
        self._stage("report", report, partial(self._program, words))
        shutil.rmtree(out / "generate.part", ignore_errors=True)
        self.reporter.say(f"Table: {out / 'table.md'} · page: {report} · time of each stage: {out / 'stages.tsv'}")

    def _count_ngrams(self) -> list[Any]:
        """Count the n-grams of the training captions. Return the options that give them to a program."""
        if not self.recipe["ngrams"]:
            return []
        file = self.out / "captions.ngrams"
        words = ["narvl", "ngrams", self.splits["train"], "--out", file, "--bpe-dir", self.vocab]
        self._stage("ngrams", file, partial(self._program, [*words, "--order", self.recipe["ngrams"]]))
        return ["--ngram-automaton", file]

    def _reported(self) -> list[Path]:
        """Return the files that the report reads."""
        files = [self.out / "latency.json", self.out / "calibration.json"]
        return [*files, *(file for file in (self.out / "generate").rglob("*") if file.is_file())]

    def _generation(
        self,
        name: str,
        models: list[Path],
        options: list[str],
        env: Mapping[str, str] | None = None,
        shown: bool = True,
    ) -> Work:
        """Return the stage that writes the outputs of a model, or of an ensemble, on the test file."""
        output = self.out / "generate" / name / "generate-test.txt"
        work = partial(self._generate, name, models, options, env or self.env, shown)
        return self.stages.stage(f"generate {name}", output, work)

    def _generate(self, name: str, models: list[Path], options: list[str], env: Mapping[str, str], shown: bool) -> Work:
        """Write the outputs of a model, or of an ensemble, and print the scores."""
        part, test = self.out / "generate.part" / name, self.splits["test"]
        written, log = part / "generate-test.txt", part / "log"
        with naming(part):
            part.mkdir(parents=True, exist_ok=True)
        written.unlink(missing_ok=True)
        words = ["fairseq-generate", test, *self.options, "--path", os.pathsep.join(map(str, models))]
        words += ["--gen-subset", "test", "--batch-size", self.settings.answered, "--scoring", self.recipe["scoring"]]
        words += ["--results-path", part, "--no-progress-bar", *options]
        with naming(log), open(log, "wb") as file:
            program = self.programs.start(list(map(str, words)), env, stdout=file, stderr=subprocess.STDOUT)
        total = _count(test, b"") if self.reporter.on_terminal else 1
        with self.reporter.bar(name, total, "row", shown) as bar:
            looked = time.monotonic()
            while not self.programs.finished(program):
                if not bar.disable and time.monotonic() > looked + 1 and written.exists():
                    looked, bar.n = time.monotonic(), min(_count(written, b"D-"), total)
                    bar.refresh()
                yield
        if program.returncode:
            raise ProgramFailed(last_lines([log]), program.returncode)
        lines = written.read_text(encoding="utf-8").splitlines() if written.exists() else []
        for line in lines[-1:]:
            self.reporter.say(line)
        written.replace(self.out / "generate" / name / "generate-test.txt")

    # --- What stages share -------------------------------------------------------------------------------------------

    def _task(self, name: str) -> Any:
        """Return an option of the task."""
        return self.settings.teacher["task"].get(name)

    def _stage(self, name: str, output: Path, work: Any) -> None:
        """Do a stage on its own."""
        together(self.stages.stage(name, output, work))

    def _program(self, words: list[Any], env: Mapping[str, str] | None = None) -> Work:
        """Run a program, which prints its own progress."""
        log = self.reporter.log
        stderr = None if self.reporter.on_terminal else log
        texts = list(map(str, words))
        program = self.programs.start(texts, env or self.env, stdout=log, stderr=stderr)
        return wait_for(texts, program, self.programs)


def _count(file: Path, beginning: bytes) -> int:
    """Return how many lines of a file begin so."""
    with open(file, "rb") as stream:
        return sum(line.startswith(beginning) for line in stream)
