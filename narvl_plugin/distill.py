"""Distillation on the level of sequences: a teacher's words in place of those in a TSV file.

Source: Kim and Rush, EMNLP 2016 (https://arxiv.org/abs/1606.07947), section 3.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.dataclass.configs import GenerationConfig

from narvl_plugin import checkpoints
from narvl_plugin.data.resumable import ResumableWriter, fingerprint
from narvl_plugin.data.rewrite import moved_image, whole_rows
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.data.tsv import parse_columns
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.safe_reading import existing

SPLIT = "test"
IMAGE_PLACE = 1
TARGET_PLACES = {"caption": 2}
"""Where the target stands among the columns that a task selects (the image is the second of all tasks)."""


def distill(
    *,
    teacher: Path,
    data: Path,
    out: Path,
    beam: int = 5,
    nbest: int = 1,
    batch_size: int = 32,
    keep_references: bool = False,
    max_len_b: int = 30,
    no_repeat_ngram_size: int = 3,
    skip_bad_rows: int = 0,
    bpe_dir: Path | None = None,
    device: str | None = None,
) -> bool:
    """Write `data` again as `out`, with the teacher's best hypotheses as each row's target.

    A run that was stopped goes on at its last whole batch and ends in the same bytes as one that was not, see
    `ResumableWriter`.

    Args:
        teacher: its checkpoint.
        data: TSV file in the columns of the teacher's task; its pictures may be precomputed features.
        out: TSV file to write, in the same columns and order.
        nbest: hypotheses to write, joined by `&&`; a student may be asked for any of them (--any-reference).
        beam, max_len_b, no_repeat_ngram_size: of fairseq's beam search; max_len_b is in tokens.
        batch_size: rows decoded at a time.
        keep_references: write the original row, too, after each distilled one.
        skip_bad_rows: how many rows that cannot be used may be left out.
        bpe_dir: the vocabulary's folder where it is not the one that the checkpoint names.
        device: torch's name of it; by default a GPU if there is one.

    Returns:
        False if `out` was there already and nothing was done.

    Raises:
        MissingInput, InputError: the checkpoint, the vocabulary or the data cannot be used.
        BadRow: a row cannot be used, or the teacher has no words for it, and the budget is spent.
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
            **generation,
        },
    )
    if writer.finished:
        return False
    with writer:
        overrides = {"data": str(data), "bpe_dir": bpe_dir and str(bpe_dir), "skip_bad_rows": skip_bad_rows}
        speaker = Speaker(teacher, overrides, generation, device)
        for batch in writer.batches(len(rows), batch_size, "distil"):
            lines = []
            for row, words in speaker(batch).items():
                columns = rows[row]
                columns[speaker.image_column] = moved_image(columns[speaker.image_column], data, out)
                original = "\t".join(columns)
                columns[speaker.target_column] = words
                lines += ["\t".join(columns), original] if keep_references else ["\t".join(columns)]
            writer.append(lines, rows=len(batch))
        writer.finish()
    return True


class Speaker:
    """A teacher that says its best hypotheses for rows of its data, (a batch of) rows in, words out.

    `image_column` and `target_column` are numbers of TSV columns.
    """

    def __init__(
        self, teacher: Path, overrides: dict[str, Any], generation: dict[str, int], device: str | None
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.models, self.task, cfg = checkpoints.load(teacher, task_overrides=overrides, device=self.device)
        name = self.task.cfg._name
        if name not in TARGET_PLACES:
            raise InputError(f"{teacher}: was trained for {name}; narvl distill knows {', '.join(TARGET_PLACES)}")
        columns = parse_columns(self.task.cfg.selected_cols)
        self.image_column, self.target_column = columns[IMAGE_PLACE], columns[TARGET_PLACES[name]]
        self.task.load_dataset(SPLIT)
        self.nbest = generation["nbest"]
        self.generator = self.task.build_generator(self.models, GenerationConfig(**generation))

    def __call__(self, rows: range) -> dict[int, str]:
        """Return the words by row; rows that the skip budget forgives are left out.

        Raises:
            BadRow: a row cannot be used, or the teacher says nothing about it.
        """
        dataset = self.task.dataset(SPLIT)
        samples = {row: sample for row in rows if (sample := dataset[row]) is not None}
        if not samples:
            return {}
        batch = dataset.collater(list(samples.values()))
        if self.device.type == "cuda":
            batch = utils.move_to_cuda(batch, self.device)
        hypotheses = self.task.inference_step(self.generator, self.models, batch)
        said = {}
        for row, best in zip(samples, hypotheses, strict=True):
            texts = (" ".join(self.task.codec.decode(one["tokens"]).split()) for one in best[: self.nbest])
            words = REFERENCE_SEPARATOR.join(dict.fromkeys(text for text in texts if text))
            if words:
                said[row] = words
            else:
                self.task.skip_budget.skip(BadRow(f"{dataset.tsv.where(row)}: the teacher says nothing about it"))
        return said
