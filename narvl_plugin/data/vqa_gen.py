"""Visual question answering: from an image and a question to a short answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from narvl_plugin.data.answers import AnswerDataset, AnswerTrie
from narvl_plugin.data.collate import Batch, Sample
from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.text import CONFIDENCE_MARK, PROMPTS, REFERENCE_SEPARATOR, clean_question
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow

# Python's float also accepts underscores, digits of other scripts, nan and infinity.
_CONFIDENCE = re.compile(r" *([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]+)? *", re.ASCII | re.IGNORECASE)


class VqaGenDataset(AnswerDataset):
    """Rows of (id, image, question, `confidence|!+answer&&…`, objects), selected in this order.

    The target is the first answer of highest confidence. With a closed list of answers, training learns the best answer
    in the list. In the split "test", the target is the whole column, which scorers read.

    A batch also holds `conf` (B,), the confidence of each target, which weights its loss.

    Attributes:
        max_objects: largest number of names of objects that are added to the question. None adds no names.
        for_scorers: whether the target is the whole column.
    """

    column_names = ("id", "image", "question", "answers", "objects")
    placeholders = {"question": "", "answers": "1.0|!+yes", "objects": ""}
    source_length_options = "--max-src-length, or fewer objects with --max-object-length"

    def __init__(
        self,
        tsv: TsvFile,
        options: DatasetOptions,
        split: str,
        *,
        prompt_type: str = "none",
        trie: AnswerTrie | None = None,
        max_objects: int | None = None,
        answer_room: int = 0,
    ) -> None:
        super().__init__(tsv, options, split, prompt_type=prompt_type, trie=trie, answer_room=answer_room)
        self.max_objects = max_objects
        self.for_scorers = split == "test"

    def make_sample(self, row: int, columns: list[str]) -> Sample:
        """Return the sample of one row.

        Raises:
            BadRow: if the question, the answers or the image cannot be used.
        """
        unique_id, image, _, column, _ = columns
        where = self.tsv.where(row)
        source = self.source_tokens(row, columns)
        answers = parse_answers(column, where)
        best = self._best(answers, where)
        target = column if self.for_scorers else best
        sample = self.answer_sample(row, unique_id, image, source, target, answers)
        return sample | {"conf": torch.tensor([answers[best]])}

    def source_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the question that the encoder reads, int64 (S,), with names of objects.

        Raises:
            BadRow: if the question has no words.
        """
        _, _, question, _, objects = columns
        where = self.tsv.where(row)
        cleaned = clean_question(question, self.options.max_src_length).removesuffix("?")
        if not cleaned:
            raise BadRow(f"{where}: the question {question!r} has no words{self.tsv.advice}")
        source = PROMPTS["vqa_gen"].format(question=cleaned)
        if self.max_objects is not None:
            names = objects.strip().split(REFERENCE_SEPARATOR)[: self.max_objects]
            source += f" object: {' '.join(names)}"
        return self.with_specials(self.options.codec.encode(source))

    def target_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the tokens of the answer to learn, int64 (T,).

        Raises:
            BadRow: if the answers cannot be used.
        """
        where = self.tsv.where(row)
        return self.options.codec.encode(f" {self._best(parse_answers(columns[3], where), where)}")

    def make_batch(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of some samples, with the confidences of their answers."""
        return super().make_batch(samples) | {"conf": torch.cat([sample["conf"] for sample in samples])}

    def _best(self, answers: dict[str, float], where: str) -> str:
        choice = answers
        if self.training and self.trie is not None:
            choice = {answer: confidence for answer, confidence in answers.items() if answer in self.trie}
            if not choice:
                raise BadRow(
                    f"{where}: none of the answers {', '.join(answers)} is in --ans2label-file, and the model can "
                    "never predict them; add one to the list, or remove the row"
                )
        return max(choice, key=choice.__getitem__)


def parse_answers(column: str, where: str) -> dict[str, float]:
    """Return the confidence of each answer in a column, above 0 and at most 1.

    White space in an answer becomes one space. A repeated answer has its highest confidence. Each confidence already
    includes all people, and a sum would count them twice.

    Args:
        column: the column.
        where: FILE:ROW, for errors.

    Raises:
        BadRow: if the column has another form.
    """
    answers: dict[str, float] = {}
    for part in column.split(REFERENCE_SEPARATOR):
        number, _, text = part.partition(CONFIDENCE_MARK)
        answer = " ".join(text.split())
        confidence = float(number) if _CONFIDENCE.fullmatch(number) else 0.0
        if not 0 < confidence <= 1 or not answer or CONFIDENCE_MARK in answer:
            raise BadRow(
                f"{where}: the answers {column!r} cannot be read; expected CONFIDENCE{CONFIDENCE_MARK}ANSWER with a "
                f"confidence above 0 and at most 1, several joined by {REFERENCE_SEPARATOR} (check --selected-cols)"
            )
        answers[answer] = max(confidence, answers.get(answer, 0.0))
    return answers
