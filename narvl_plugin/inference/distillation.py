"""Sequence-level distillation: a teacher's outputs replace the targets in a TSV file.

Source: Kim and Rush, EMNLP 2016 (https://arxiv.org/abs/1606.07947), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narvl_plugin.checkpoints.reading import checkpoint_fingerprint
from narvl_plugin.data.resumable import SKIPPED, ResumableWriter, fingerprint
from narvl_plugin.data.rewrite import moved_image, whole_rows
from narvl_plugin.data.tsv import parse_columns
from narvl_plugin.devices import choose_device
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.inference.predictor import Predictor

IMAGE_PLACE = 1  # of the image among the columns that a task selects


def distill(
    *,
    teacher: Path | Sequence[Path],
    data: Path,
    out: Path,
    beam: int = 5,
    nbest: int = 1,
    batch_size: int = 32,
    keep_references: bool = False,
    max_len_b: int | None = None,
    no_repeat_ngram_size: int | None = None,
    skip_bad_rows: int = 0,
    val_inference_type: str | None = None,
    bpe_dir: Path | None = None,
    ans2label_file: Path | None = None,
    member: str | None = None,
    mbr: str | None = None,
    device: str | None = None,
) -> bool:
    r"""Copy `data` to `out` with the teacher's best hypotheses as targets, in the form of the task.

    A target is a caption, an answer with confidence 1 (whatever the teacher's confidence), boxes in pixels, or a label.
    The teacher generates with the options of its --eval-args, replaced by those given here. It may be a student, too,
    from whose outputs another student learns (self-distillation).

    A stopped run resumes at its last whole batch. It then writes the same bytes as a run without a stop, see
    `ResumableWriter`. All other columns of a row stay as they are, byte by byte. Line ends become `\n`.

    Args:
        teacher: the teacher's checkpoint. Several form an ensemble, whose probabilities are averaged.
        data: TSV file with the columns of the teacher's task. The images may be precomputed features.
        out: TSV file to write, with the same columns and order.
        nbest: the number of captions of a row, joined by `&&`; a student can learn any of them (--any-reference).
        beam: the width of fairseq's beam search.
        max_len_b: the length of the longest output, in tokens; by default that of --eval-args.
        no_repeat_ngram_size: the size of n-grams that an output may not repeat; by default that of --eval-args.
        batch_size: the number of rows in a batch.
        keep_references: whether to write the original row, too, after each distilled one.
        skip_bad_rows: how many bad rows may be skipped, in all parts of a stopped run together.
        val_inference_type: how to find answers, `allcand` or `beamsearch`; by default as the checkpoint says.
        bpe_dir: the vocabulary's folder; by default the one that the checkpoint names.
        ans2label_file: the list of answers; by default the one that the checkpoint names.
        member: the member whose outputs to write, for a teacher that was trained on a mixture of tasks.
        mbr: `bleu` or `cider`: from a student's beam, write the captions that agree best with all captions of the beam,
            instead of the most probable ones. CIDEr takes the frequencies of n-grams from the captions in `data`.
        device: torch's name of the device; by default a GPU if there is one.

    Returns:
        False if `out` existed already, so nothing was done; else True.

    Raises:
        MissingInput, InputError: if a checkpoint, the vocabulary or the data cannot be used, a row of the task cannot
            hold several hypotheses, `mbr` is given for a teacher, or another process writes `out`.
        BadRow: if a row cannot be used, or the teacher's output is not a valid target, and the skip budget is spent.
        StalePart: if an unfinished `out` was begun with other inputs or settings.
    """
    how = Distillation(
        teachers=(teacher,) if isinstance(teacher, Path) else tuple(teacher),
        data=data,
        beam=beam,
        nbest=nbest,
        batch_size=batch_size,
        keep_references=keep_references,
        max_len_b=max_len_b,
        no_repeat_ngram_size=no_repeat_ngram_size,
        skip_bad_rows=skip_bad_rows,
        val_inference_type=val_inference_type,
        bpe_dir=bpe_dir,
        ans2label_file=ans2label_file,
        member=member,
        mbr=mbr,
        device=device,
    )
    num_rows = len(whole_rows(data))
    writer = ResumableWriter(out, how.record())
    with writer:
        if writer.finished:
            return False
        loaded = Teacher(how, out)
        budget = loaded.budget
        budget.charge(writer.counts[SKIPPED])
        for batch in writer.batches(num_rows, batch_size, "distil"):
            lines = loaded.lines(batch)
            writer.append(lines, rows=len(batch), counts={SKIPPED: budget.count - writer.counts[SKIPPED]})
        writer.finish()
    return True


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How to distil a file; see `distill` for the options."""

    teachers: tuple[Path, ...]
    data: Path
    beam: int = 5
    nbest: int = 1
    batch_size: int = 32
    keep_references: bool = False
    max_len_b: int | None = None
    no_repeat_ngram_size: int | None = None
    skip_bad_rows: int = 0
    val_inference_type: str | None = None
    bpe_dir: Path | None = None
    ans2label_file: Path | None = None
    member: str | None = None
    mbr: str | None = None
    device: str | None = None

    @property
    def generation(self) -> dict[str, int | None]:
        """The options of the search."""
        names = ("beam", "nbest", "max_len_b", "no_repeat_ngram_size")
        return {name: getattr(self, name) for name in names}

    def record(self) -> dict[str, Any]:
        """Return all that the written rows depend on."""
        first, *others = self.teachers
        return {
            "teacher": checkpoint_fingerprint(first),
            "data": fingerprint(self.data),
            "batch_size": self.batch_size,
            "keep_references": self.keep_references,
            "val_inference_type": self.val_inference_type,
            "ans2label_file": self.ans2label_file and fingerprint(self.ans2label_file),
            **self.generation,
            # Only if given: unfinished runs of older versions lack these.
            **({"member": self.member} if self.member else {}),
            **({"mbr": self.mbr} if self.mbr else {}),
            **({"others": [checkpoint_fingerprint(one) for one in others]} if others else {}),
        }


class Teacher:
    """A loaded teacher, or an ensemble, that rewrites the rows of a file.

    Attributes:
        budget: counts the bad rows that are skipped.
    """

    def __init__(self, how: Distillation, out: Path) -> None:
        """Load the teacher.

        Args:
            how: the options.
            out: the file to write; only paths of images depend on it.

        Raises:
            MissingInput, InputError: see `distill`.
        """
        self.how, self.out = how, out
        overrides = {
            "skip_bad_rows": how.skip_bad_rows,
            "val_inference_type": how.val_inference_type,
            "bpe_dir": how.bpe_dir and str(how.bpe_dir),
            "ans2label_file": how.ans2label_file and str(how.ans2label_file),
            "member": how.member,
            **({"mbr": how.mbr, "mbr_frequencies": str(how.data)} if how.mbr else {}),  # which other tasks lack
        }
        self._model = Predictor.load(
            how.teachers,
            how.data,
            task_overrides=overrides,
            generation=how.generation,
            optimised=False,
            device=choose_device(how.device),
        )
        first, task = how.teachers[0], self._model.task
        if how.mbr and not self._model.model.is_student:
            raise InputError(f"--mbr {how.mbr}: is for students, and {first} is a teacher")
        if how.nbest > 1 and not task.holds_several_targets:
            raise InputError(
                f"--nbest {how.nbest}: {first} was trained for {task.name}, whose rows have one target each"
            )
        self.budget = task.skip_budget
        self._rows = whole_rows(how.data)
        self._image_column, self._target_column = (
            parse_columns(task.cfg.selected_cols)[place] for place in (IMAGE_PLACE, task.target_place)
        )

    def lines(self, rows: Sequence[int]) -> list[str]:
        """Return the lines for a batch of rows (from 0).

        Raises:
            BadRow: see `written_targets`.
        """
        lines = []
        for row, target in written_targets(self._model, rows, self.how.nbest).items():
            columns = self._rows[row]
            columns[self._image_column] = moved_image(columns[self._image_column], self.how.data, self.out)
            original = "\t".join(columns)
            columns[self._target_column] = target
            lines += ["\t".join(columns), original] if self.how.keep_references else ["\t".join(columns)]
        return lines


def written_targets(teacher: Predictor, rows: Sequence[int], nbest: int) -> dict[int, str]:
    """Return a teacher's best hypotheses for some rows as targets, by row, without skipped rows.

    Raises:
        BadRow: if a row cannot be used, or the teacher's output is not a valid target, and the skip budget is spent.
    """
    samples, task = teacher.samples(rows), teacher.task
    if not samples:
        return {}
    batch = teacher.collate(samples.values())
    hypotheses = [beam[:nbest] for beam in teacher.search(batch)]
    written = {}
    for row, target, beam in zip(samples, task.written_targets(batch, hypotheses), hypotheses, strict=True):
        if target is not None:
            written[row] = target
            continue
        problem = f"the teacher predicts {teacher.text(beam)!r}, which is not a target"
        task.skip_budget.skip(BadRow(f"{teacher.dataset.where(row)}: {problem} of {task.name}"))
    return written
