"""Distillation on the level of sequences: a teacher's outputs in place of the targets in a TSV file.

Source: Kim and Rush, EMNLP 2016 (https://arxiv.org/abs/1606.07947), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from narvl_plugin.checkpoints.reading import existing
from narvl_plugin.data.resumable import SKIPPED, ResumableWriter, fingerprint
from narvl_plugin.data.rewrite import moved_image, whole_rows
from narvl_plugin.data.tsv import parse_columns
from narvl_plugin.devices import choose_device
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.inference.predictor import Predictor

IMAGE_PLACE = 1  # of the image among the columns that a task selects


def distill(
    *,
    teacher: Path,
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
    device: str | None = None,
) -> bool:
    r"""Write `data` again as `out`, with the teacher's best hypotheses as each row's target, in its task's own form.

    That is a caption, an answer with confidence 1 (however sure the teacher is of it), a box in pixels or a label.
    The teacher generates as its --eval-args say, with which it was validated, and what is given here instead.

    A run that was stopped goes on at its last whole batch and ends in the same bytes as one that was not, see
    `ResumableWriter`. All other columns stay as they are, byte by byte, however many a row has; line ends become `\n`.

    Args:
        teacher: its checkpoint.
        data: TSV file in the columns of the teacher's task; its images may be precomputed features.
        out: TSV file to write, in the same columns and order.
        nbest: captions to write, joined by `&&`; a student may be asked for any of them (--any-reference).
        beam: width of fairseq's beam search.
        max_len_b: the longest output, in tokens, if not that of the checkpoint's --eval-args.
        no_repeat_ngram_size: the size of n-grams of which no output may have one twice, if not that of --eval-args.
        batch_size: rows decoded at a time.
        keep_references: write the original row, too, after each distilled one.
        skip_bad_rows: how many rows that cannot be used may be left out, in all parts of a stopped run together.
        val_inference_type: `allcand` or `beamsearch`, where answers are found otherwise than the checkpoint says.
        bpe_dir: the vocabulary's folder, where it is not the one that the checkpoint names.
        ans2label_file: the list of answers, where it is not the one that the checkpoint names.
        member: of a teacher that was trained on a mixture of tasks, the one whose outputs are asked for.
        device: torch's name of it; by default a GPU if there is one.

    Returns:
        False if `out` was there already and nothing was done.

    Raises:
        MissingInput, InputError: the checkpoint, the vocabulary or the data cannot be used, the task has no place
            for several hypotheses, or another process writes `out`.
        BadRow: a row cannot be used, or the teacher says no target for it, and the budget is spent.
        StalePart: an unfinished `out` was begun with other inputs or settings.
    """
    generation = {"beam": beam, "nbest": nbest, "max_len_b": max_len_b, "no_repeat_ngram_size": no_repeat_ngram_size}
    rows = whole_rows(data)
    writer = ResumableWriter(
        out,
        {
            "teacher": fingerprint(existing(teacher)),
            "data": fingerprint(data),
            "batch_size": batch_size,
            "keep_references": keep_references,
            "val_inference_type": val_inference_type,
            "ans2label_file": ans2label_file and fingerprint(ans2label_file),
            **generation,
            **({"member": member} if member else {}),  # which runs that were begun before it was asked for lack
        },
    )
    with writer:
        if writer.finished:
            return False
        overrides = {
            "skip_bad_rows": skip_bad_rows,
            "val_inference_type": val_inference_type,
            "bpe_dir": bpe_dir and str(bpe_dir),
            "ans2label_file": ans2label_file and str(ans2label_file),
            "member": member,
        }
        model = Predictor.load(
            teacher,
            data,
            task_overrides=overrides,
            generation=generation,
            role="teacher",
            optimised=False,
            device=choose_device(device),
        )
        task = model.task
        if nbest > 1 and not task.holds_several_targets:
            raise InputError(f"--nbest {nbest}: a row of {task.name}, which {teacher} was trained for, has one target")
        selected = parse_columns(task.cfg.selected_cols)
        image_column, target_column = selected[IMAGE_PLACE], selected[task.target_place]
        budget = task.skip_budget
        budget.charge(writer.counts[SKIPPED])
        for batch in writer.batches(len(rows), batch_size, "distil"):
            lines = []
            for row, target in written_targets(model, batch, nbest).items():
                columns = rows[row]
                columns[image_column] = moved_image(columns[image_column], data, out)
                original = "\t".join(columns)
                columns[target_column] = target
                lines += ["\t".join(columns), original] if keep_references else ["\t".join(columns)]
            writer.append(lines, rows=len(batch), counts={SKIPPED: budget.count - writer.counts[SKIPPED]})
        writer.finish()
    return True


def written_targets(teacher: Predictor, rows: Sequence[int], nbest: int) -> dict[int, str]:
    """Return a teacher's best hypotheses for some rows as targets, by row; rows that are skipped are left out.

    Raises:
        BadRow: a row cannot be used, or the teacher's output for it is no target, and the skip budget is spent.
    """
    samples, task = teacher.samples(rows), teacher.task
    if not samples:
        return {}
    batch = teacher.collate(samples.values())
    hypotheses = [beam[:nbest] for beam in teacher.search(batch)]
    written = {}
    for row, target, beam in zip(samples, task.written_targets(batch, hypotheses), hypotheses, strict=True):
        if target:
            written[row] = target
            continue
        problem = f"the teacher says {teacher.text(beam)!r}, which is no target"
        task.skip_budget.skip(BadRow(f"{teacher.dataset.where(row)}: {problem} of {task.name}"))
    return written
