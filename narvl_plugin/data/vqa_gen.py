"""Visual question answering: a picture and a question about it, to a short answer."""

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

# Python's float also takes underscores, the digits of other scripts, nan and infinity.
_CONFIDENCE = re.compile(r" *([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]+)? *", re.ASCII | re.IGNORECASE)


class VqaGenDataset(AnswerDataset):
    """Rows of (id, image, question, `confidence|!+answer&&…`, objects), selected in this order.

    The target is the answer of highest confidence, of several such the first; a batch's `conf` (B,) weights the loss
    of each sample by it. In the split "test", which nobody learns from, the target is the whole column, for scorers to
    read. With a closed list of answers training learns the best answer that is in it. `max_objects` names of objects,
    joined by `&&`, are added to the question; None adds nothing.
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
        """Return the sample of one row; raises BadRow for a question, answers or an image that cannot be used."""
        unique_id, image, _, column, _ = columns
        where = self.tsv.where(row)
        source = self.source_tokens(row, columns)
        answers = parse_answers(column, where)
        best = self._best(answers, where)
        target = column if self.for_scorers else best
        sample = self.answer_sample(row, unique_id, image, source, target, answers)
        return sample | {"conf": torch.tensor([answers[best]])}

    def source_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the question that the encoder reads, int64 (S,), with its objects; raises BadRow for missing words."""
        _, _, question, _, objects = columns
        where = self.tsv.where(row)
        cleaned = clean_question(question, self.options.max_src_length).removesuffix("?")
        if not cleaned:
            raise BadRow(f"{where}: the question {question!r} has no words; check --selected-cols")
        source = PROMPTS["vqa_gen"].format(question=cleaned)
        if self.max_objects is not None:
            names = objects.strip().split(REFERENCE_SEPARATOR)[: self.max_objects]
            source += f" object: {' '.join(names)}"
        return self.with_specials(self.options.codec.encode(source))

    def target_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the tokens of the answer to learn, int64 (T,); raises BadRow."""
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
                    f"{where}: none of the answers {', '.join(answers)} is in --ans2label-file, so that the model "
                    "could never say them; add one, or leave the row out"
                )
        return max(choice, key=choice.__getitem__)


def parse_answers(column: str, where: str) -> dict[str, float]:
    """Return confidence (above 0, at most 1) by answer of a column; raises BadRow if it is of another form.

    White space within an answer is one space. An answer that stands there several times has its highest confidence:
    each is what all people together make of the answer, so that their sum would count people twice.
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
