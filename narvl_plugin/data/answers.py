"""Questions with short answers: what the decoder starts from, lists of answers, which symbol may come next."""

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
"""Characters; what a list of answers takes grows with the square of its longest one."""
PROMPT_TYPES = ("none", "src", "prev_output")


class AnswerTrie:
    """A closed list of answers, by their tokens.

    `answers` are the different texts, white space in them as one space. `tokens` are the token ids of each, int64 (T,),
    closed by `</s>`. Raises InputError for answers that the vocabulary spells the same, as it does when their letters
    are unknown to it.
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
                    "the column of answers, too (narvl vocab --column)"
                )
        lacking = [answer for tokens, answer in spelled.items() if codec.dictionary.unk() in tokens]
        if lacking:
            logger.warning(
                "--bpe-dir: the vocabulary lacks characters of %d answers, such as %r. They are written with <unk> and "
                "count as wrong; train it on the column of answers, too (narvl vocab --column)",
                *(len(lacking), lacking[0]),
            )

    def __contains__(self, answer: str) -> bool:
        return answer in self._known

    def allowed(self, prefix: Iterable[int]) -> list[int]:
        """Return the tokens that may follow those of `prefix`; none if no answer begins so."""
        node = self._root
        for token in prefix:
            node = node.get(token, {})
        return list(node)

    def branches(self) -> dict[tuple[int, ...], list[int]]:
        """Return the tokens that may come next after each beginning of an answer that more than one may follow."""
        beginnings = {
            tuple(tokens[:place]) for tokens in map(Tensor.tolist, self.tokens) for place in range(len(tokens))
        }
        allowed = {beginning: self.allowed(beginning) for beginning in sorted(beginnings)}
        return {beginning: tokens for beginning, tokens in allowed.items() if len(tokens) > 1}

    def mask(self, tokens: Sequence[int], num_labels: int) -> Tensor:
        """Return which of V labels may stand at the place of each of T tokens, given those before: bool (T, V)."""
        mask = torch.zeros(len(tokens), num_labels, dtype=torch.bool)
        for place in range(len(tokens)):
            mask[place, self.allowed(tokens[:place])] = True
        return mask


def read_answers(file: str | Path) -> list[str]:
    """Return the answers of a pickle of OFA's (trainval_ans2label.pkl), a dict from answer to number.

    Raises MissingInput or InputError (see `read_pickle`), the latter also if it holds anything else.
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

    A teacher's decoder starts from a prompt, by `prompt_type`: `none` is `<s>`, `src` the source, and
    `prev_output` the source without `</s>`; the target is padding up to the prompt's last token, where the answer
    begins. A batch also holds `ref_dict` (each sample's answers with their confidences), `target_texts` (list of str),
    which are the targets as text, `decoder_prompts` (list of (P,)), `prefix_tokens` (B, P - 1), the prompts without
    `<s>`, padded, and, where answers are a closed list and a loss may be taken, `constraint_masks` (B, T, V), which
    labels may stand at each place of the target. `answer_room` is how many tokens a teacher's decoder reads after the
    prompt where it answers.
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
        self.constrained = trie is not None and split != "test"  # on which nobody takes a loss

    def decoder_prompt(self, source: torch.Tensor) -> torch.Tensor:
        """Return what a teacher's decoder reads before the answer, int64 (P,), of a source (S,)."""
        return {"none": source[:1], "src": source, "prev_output": source[:-1]}[self.prompt_type]

    def _check_lengths(self, row: int, source: Tensor, targets: Sequence[Tensor]) -> None:
        """Raise BadRow for texts that have more tokens than the model has places, as a prompt and an answer may."""
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
        """Return the sample of a question (as the encoder reads it) and the answer to learn; raises BadRow."""
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
        if self.constrained:
            mask = self.trie.mask(said["target"].tolist(), len(dictionary))
            # An answer that is not in the list, which only evaluation may ask for, is not constrained.
            mask |= ~mask.gather(1, said["target"][:, None]).all()
            sample["constraint_mask"] = F.pad(mask, (0, 0, len(prompt) - 1, 0))
        return sample

    def make_batch(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of some samples, with answers and prompts as the class describes."""
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
