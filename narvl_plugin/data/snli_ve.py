"""Visual entailment: from an image, a hypothesis and perhaps a caption to yes, no or maybe."""

from __future__ import annotations

import torch

from narvl_plugin.data.answers import AnswerDataset, AnswerTrie
from narvl_plugin.data.collate import Sample
from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.text import ENTAILMENT_ANSWERS, PROMPTS, clean_caption
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow


class SnliVeDataset(AnswerDataset):
    """Rows of (id, image, hypothesis, caption, label), selected in this order.

    Attributes:
        add_caption: whether the model also reads the caption.
    """

    column_names = ("id", "image", "hypothesis", "caption", "label")
    placeholders = {"hypothesis": "", "caption": "", "label": "entailment"}

    def __init__(
        self,
        tsv: TsvFile,
        options: DatasetOptions,
        split: str,
        *,
        trie: AnswerTrie,
        prompt_type: str = "none",
        add_caption: bool = False,
        answer_room: int = 0,
    ) -> None:
        super().__init__(tsv, options, split, prompt_type=prompt_type, trie=trie, answer_room=answer_room)
        self.add_caption = add_caption

    def make_sample(self, row: int, columns: list[str]) -> Sample:
        """Return the sample of one row.

        Raises:
            BadRow: if a text has no words, the label is unknown, or the image cannot be read.
        """
        unique_id, image, *_, label = columns
        answer = self._answer(row, label)
        return self.answer_sample(row, unique_id, image, self.source_tokens(row, columns), answer, {answer: 1.0})

    def source_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the question that the encoder reads, int64 (S,).

        Raises:
            BadRow: if a text has no words.
        """
        _, _, hypothesis, caption, _ = columns
        values = {"hypothesis": self._cleaned(row, "hypothesis", hypothesis)}
        if self.add_caption:
            values["caption"] = self._cleaned(row, "caption", caption)
        prompt = PROMPTS["snli_ve_caption" if self.add_caption else "snli_ve"]
        return self.with_specials(self.options.codec.encode(prompt.format(**values)))

    def target_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the tokens of the answer, int64 (T,).

        Raises:
            BadRow: if the label is unknown.
        """
        return self.options.codec.encode(f" {self._answer(row, columns[-1])}")

    def _answer(self, row: int, label: str) -> str:
        if label not in ENTAILMENT_ANSWERS:
            raise BadRow(
                f"{self.tsv.where(row)}: the label {label!r} is unknown; expected "
                f"{', '.join(ENTAILMENT_ANSWERS)} (check --selected-cols)"
            )
        return ENTAILMENT_ANSWERS[label]

    def _cleaned(self, row: int, name: str, text: str) -> str:
        cleaned = clean_caption(text, self.options.max_src_length)
        if not cleaned:
            raise BadRow(f"{self.tsv.where(row)}: the {name} {text!r} has no words{self.tsv.advice}")
        return cleaned
