"""Sequence-level distillation: a teacher's outputs replace the targets in a TSV file.

Source: Kim and Rush, EMNLP 2016 (https://arxiv.org/abs/1606.07947), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
    generation = {"beam": beam, "nbest": nbest, "max_len_b": max_len_b, "no_repeat_ngram_size": no_repeat_ngram_size}
    first, *others = [teacher] if isinstance(teacher, Path) else teacher
    rows = whole_rows(data)
    writer = ResumableWriter(
        out,
        {
            "teacher": checkpoint_fingerprint(first),
            "data": fingerprint(data),
            "batch_size": batch_size,
            "keep_references": keep_references,
            "val_inference_type": val_inference_type,
            "ans2label_file": ans2label_file and fingerprint(ans2label_file),
            **generation,
            # Only if given: unfinished runs of older versions lack these.
            **({"member": member} if member else {}),
            **({"mbr": mbr} if mbr else {}),
            **({"others": [checkpoint_fingerprint(one) for one in others]} if others else {}),
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
            **({"mbr": mbr, "mbr_frequencies": str(data)} if mbr else {}),  # which other tasks lack
        }
        model = Predictor.load(
            [first, *others],
            data,
            task_overrides=overrides,
            generation=generation,
            optimised=False,
            device=choose_device(device),
        )
        task = model.task
        if mbr and not model.model.is_student:
            raise InputError(f"--mbr {mbr}: is for students, and {first} is a teacher")
        if nbest > 1 and not task.holds_several_targets:
            raise InputError(f"--nbest {nbest}: {first} was trained for {task.name}, whose rows have one target each")
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
