"""Questions with short answers: prompts of the decoder, lists of answers, and masks of allowed labels."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from narvl_plugin.data.collate import Batch, Sample, pad_tokens
from narvl_plugin.data.dataset import DatasetOptions, TsvDataset
from narvl_plugin.data.plain_pickles import read_pickle
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError

logger = logging.getLogger(__name__)

LONGEST_ANSWER = 1_000
"""Largest length of an answer, in characters. The cost of a list of answers is quadratic in it."""
PROMPT_TYPES = ("none", "src", "prev_output")
"""Prompts of a teacher's decoder, see `AnswerDataset`."""


class AnswerTrie:
    """A closed list of answers as a trie of their tokens.

    Legend: T tokens, V labels.

    Args:
        answers: the answers as texts.
        codec: spells the answers.

    Attributes:
        answers: the different texts, with single spaces.
        tokens: the token ids of each answer with `</s>`, int64 (T,).

    Raises:
        InputError: if the vocabulary spells two answers alike, for example because it lacks their letters.
    """

    def __init__(self, answers: Iterable[str], codec: TextCodec) -> None:
        self.answers = list(dict.fromkeys(" ".join(answer.split()) for answer in answers))
        self._known = frozenset(self.answers)
        eos = torch.tensor([codec.dictionary.eos()])
        self.tokens = [torch.cat([codec.encode(f" {answer}"), eos]) for answer in self.answers]
        self._root: dict[int, Any] = {}
        spelled: dict[tuple[int, ...], str] = {}
        for answer, tokens in zip(self.answers, self.tokens, strict=True):
            node = self._root
            for token in tokens.tolist():
                node = node.setdefault(token, {})
            other = spelled.setdefault(tuple(tokens.tolist()), answer)
            if other != answer:
                raise InputError(
                    f"--bpe-dir: the vocabulary does not tell the answers {other!r} and {answer!r} apart; train it on "
                    "the column of answers as well (narvl vocab --column)"
                )
        lacking = [answer for tokens, answer in spelled.items() if codec.dictionary.unk() in tokens]
        if lacking:
            logger.warning(
                "--bpe-dir: the vocabulary lacks characters of %d answers, such as %r. They are written with <unk> and "
                "count as wrong; train it on the column of answers as well (narvl vocab --column)",
                *(len(lacking), lacking[0]),
            )

    def __contains__(self, answer: str) -> bool:
        return answer in self._known

    def allowed(self, prefix: Iterable[int]) -> list[int]:
        """Return the tokens that may follow the tokens `prefix`. The list is empty if no answer begins with them."""
        node = self._root
        for token in prefix:
            node = node.get(token, {})
        return list(node)

    def branches(self) -> dict[tuple[int, ...], list[int]]:
        """Return the possible next tokens of each prefix of an answer that has more than one."""
        beginnings = {
            tuple(tokens[:place]) for tokens in map(Tensor.tolist, self.tokens) for place in range(len(tokens))
        }
        allowed = {beginning: self.allowed(beginning) for beginning in sorted(beginnings)}
        return {beginning: tokens for beginning, tokens in allowed.items() if len(tokens) > 1}

    def mask(self, tokens: Sequence[int], num_labels: int) -> Tensor:
        """Return the labels that are allowed at each place of an answer, given the tokens before it.

        Args:
            tokens: the T tokens of the answer.
            num_labels: V.

        Returns:
            bool (T, V).
        """
        mask = torch.zeros(len(tokens), num_labels, dtype=torch.bool)
        for place in range(len(tokens)):
            mask[place, self.allowed(tokens[:place])] = True
        return mask


def read_answers(file: str | Path) -> list[str]:
    """Return the answers in a pickle of OFA (trainval_ans2label.pkl), a dict from answer to number.

    Args:
        file: the pickle.

    Raises:
        MissingInput: if the file does not exist.
        InputError: if the file cannot be read (see `read_pickle`) or has other contents.
    """
    answers = read_pickle(file)
    if not isinstance(answers, dict) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"--ans2label-file {file}: expected a pickled dict from answer to number, with some answers")
    longest = max(map(len, answers))
    if longest > LONGEST_ANSWER:
        raise InputError(
            f"--ans2label-file {file}: has an answer of {longest:,} characters; at most {LONGEST_ANSWER:,} are read"
        )
    return list(answers)


class AnswerDataset(TsvDataset):
    """Rows with a question and its answers. Subclasses read the columns.

    Legend: B batch, P prompt, T target, V labels.

    A teacher's decoder starts from a prompt: with `prompt_type` "none" it is `<s>`, with "src" the source, with
    "prev_output" the source without `</s>`. The target is padding up to the prompt's last token, where the answer
    begins.

    A batch also holds the following:

    - `ref_dict`: each sample's answers with their confidences.
    - `target_texts`: the targets as text.
    - `decoder_prompts`: the prompts, each (P,).
    - `prefix_tokens`: (B, P - 1), the prompts without `<s>`, padded.
    - `constraint_masks`: bool (B, T, V), the labels allowed at each place. Only for a closed list of answers, in splits
      with a loss.

    Attributes:
        prompt_type: one of `PROMPT_TYPES`.
        trie: the closed list of answers, or None.
        answer_room: number of tokens that a teacher's decoder may read after the prompt.
        constrained: whether batches hold `constraint_masks`.
    """

    def __init__(
        self,
        tsv: TsvFile,
        options: DatasetOptions,
        split: str,
        *,
        prompt_type: str = "none",
        trie: AnswerTrie | None = None,
        answer_room: int = 0,
    ) -> None:
        super().__init__(tsv, options, split)
        self.answer_room = answer_room
        self.prompt_type = prompt_type
        self.trie = trie
        self.constrained = trie is not None and split != "test"  # which has no loss

    def decoder_prompt(self, source: torch.Tensor) -> torch.Tensor:
        """Return the prompt of a teacher's decoder, int64 (P,), for a source (S,)."""
        return {"none": source[:1], "src": source, "prev_output": source[:-1]}[self.prompt_type]

    def _check_lengths(self, row: int, source: Tensor, targets: Sequence[Tensor]) -> None:
        """Raise BadRow if a text, or the prompt with an answer, has more tokens than the model has positions."""
        super()._check_lengths(row, source, targets)
        prompt, places = len(self.decoder_prompt(source)), self.options.target_positions
        if places is not None and prompt + self.answer_room > places:
            raise BadRow(
                f"{self.where(row)}: the prompt has {prompt:,} tokens, an answer may have {self.answer_room:,}, and "
                f"the model reads at most {places:,}; shorten the text, or keep fewer words with --max-src-length"
            )

    def answer_sample(
        self, row: int, unique_id: str, image: str, source: torch.Tensor, answer: str, answers: Mapping[str, float]
    ) -> Sample:
        """Return the sample of a question and an answer.

        Args:
            row: number of the row.
            unique_id: id of the row.
            image: the image column.
            source: (S,), the question.
            answer: the answer to learn.
            answers: all answers with their confidences.

        Raises:
            BadRow: if the image cannot be used.
        """
        dictionary = self.options.codec.dictionary
        prompt = self.decoder_prompt(source)
        said = self.as_target(self.options.codec.encode(f" {answer}"))
        sample = self.as_input(row, unique_id, source, self.read_image(image, self.tsv.where(row)))
        sample |= {
            "target": F.pad(said["target"], (len(prompt) - 1, 0), value=dictionary.pad()),
            "prev_output_tokens": torch.cat([prompt, said["prev_output_tokens"][1:]]),
            "decoder_prompt": prompt,
            "ref_dict": dict(answers),
            "target_text": answer,
        }
        if self.constrained and self.trie is not None:
            mask = self.trie.mask(said["target"].tolist(), len(dictionary))
            # An answer outside the list, which can occur in evaluation only, is not constrained.
            mask |= ~mask.gather(1, said["target"][:, None]).all()
            sample["constraint_mask"] = F.pad(mask, (0, 0, len(prompt) - 1, 0))
        return sample

    def make_batch(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of some samples, with the answers and prompts that the class describes."""
        prompts = [sample["decoder_prompt"] for sample in samples]
        batch = super().make_batch(samples) | {
            "ref_dict": [sample["ref_dict"] for sample in samples],
            "target_texts": [sample["target_text"] for sample in samples],
            "decoder_prompts": prompts,
            "prefix_tokens": pad_tokens([prompt[1:] for prompt in prompts], self.options.codec.dictionary.pad()),
        }
        if self.constrained:
            masks = [sample["constraint_mask"] for sample in samples]
            batch["constraint_masks"] = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
        return batch
