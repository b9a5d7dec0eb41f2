"""The common parts of tasks with short answers: decoder prompts, closed lists of answers, validation accuracy."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch

from narvl_plugin.ctc import one_of
from narvl_plugin.data.answers import AnswerTrie
from narvl_plugin.errors import InputError
from narvl_plugin.generation.candidates import CandidateGenerator
from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.tasks.base import BaseTask, BaseTaskConfig, Hypotheses, Search

PromptType = StrEnum("PromptType", ["none", "src", "prev_output"])
InferenceType = StrEnum("InferenceType", ["allcand", "beamsearch"])

ALL_CANDIDATES = Search({"beam": 1}, {"val_inference_type": "allcand"})
"""Scores all answers of the list."""


@dataclass
class AnswerTaskConfig(BaseTaskConfig):
    """Options of every task with short answers."""

    prompt_type: PromptType = field(
        default=PromptType.none,
        metadata={
            "help": "start of a teacher's decoder: none (<s>), src (the source), prev_output (the source without "
            "</s>); for students it must be none"
        },
    )
    eval_acc: bool = field(
        default=False,
        metadata={"help": "answer in validation and log the score, for --best-checkpoint-metric"},
    )
    eval_args: str = field(
        default='{"beam": 5, "unnormalized": true}',
        metadata={
            "help": "options of the generator in validation, as JSON; a student's are beam, min_len, max_len_b and "
            "no_repeat_ngram_size"
        },
    )
    val_inference_type: InferenceType = field(
        default=InferenceType.allcand,
        metadata={
            "help": "how models answer, in validation and in fairseq-generate: allcand scores all answers of the "
            "closed list, beamsearch searches among them (without a list, among all outputs)"
        },
    )
    valid_batch_size: int = field(
        default=20, metadata={"help": "number of answer prefixes that allcand scores at once for each sample"}
    )


class AnswerTask(BaseTask):
    """A task with short answers. Subclasses build the trie and name their metric.

    Attributes:
        trie: the closed list of answers; None if answers are free.
    """

    searching = {"val_inference_type": "beamsearch"}
    trie: AnswerTrie | None
    cfg: AnswerTaskConfig

    @property
    def generates_in_validation(self) -> bool:
        """Return whether validation generates answers (--eval-acc)."""
        return self.cfg.eval_acc

    def check_model(self, model: OfaModel) -> None:
        """Store the limits of text lengths.

        Raises:
            InputError: if a student has a prompt; a student starts from its queries.
        """
        if model.is_student and str(self.cfg.prompt_type) != "none":
            raise InputError(f"--prompt-type {self.cfg.prompt_type} is for teachers; a student's must be none")
        super().check_model(model)

    def answer_room(self, split: str) -> int:
        """Return how many answer tokens a teacher's decoder reads at most after the prompt, for a split.

        It is 0 if the rows of the split are not answered.
        """
        if self.trie is None or split == "train" or (split == "valid" and not self.generates_in_validation):
            return 0
        if str(self.cfg.val_inference_type) == "allcand":
            return max(map(len, self.trie.branches()), default=0)
        return max(map(len, self.trie.tokens)) - 1  # without </s>

    def path_options(self, args: Any) -> dict[str, Any]:
        """Return how a student answers: from a closed list by --val-inference-type, or else freely."""
        options = super().path_options(args)
        if self.trie is None or self.constraint is not None:
            return options
        answers = [tokens[:-1] for tokens in self.trie.tokens]
        if str(self.cfg.val_inference_type) == "allcand":
            return options | {"answers": answers}
        return options | {"constraint": one_of(answer.tolist() for answer in answers)}

    def with_answers(self, answers: Sequence[str]) -> Self:
        """Return the task with a closed list of answers, all of which are scored."""
        task = copy(self)
        task.cfg = copy(self.cfg)
        task.cfg.val_inference_type = InferenceType.allcand
        task.trie = AnswerTrie(answers, self.codec)
        return task

    @property
    def scores_a_list(self) -> bool:
        """Whether the probabilities of all answers of the list are computed."""
        return self.trie is not None and str(self.cfg.val_inference_type) == "allcand"

    def teacher_searches(self) -> dict[str, Search]:
        """Return how teachers answer, by name of the system. The first is usual; with a list, it scores all answers."""
        searches = {} if self.trie is None else {"teacher_allcand": ALL_CANDIDATES}
        if str(self.cfg.prompt_type) == "src":  # beam search cannot start from it
            return searches
        return searches | super().teacher_searches()

    def student_searches(self) -> dict[str, Search]:
        """Return how students answer, by name of the system."""
        return super().student_searches() | ({} if self.trie is None else {"student_allcand": ALL_CANDIDATES})

    def beam_searches(self, frequencies: Path | None) -> dict[str, Search]:
        """Return the decoding methods of students beside greedy search; see `ways_to_decode`."""
        if self.trie is None:
            return super().beam_searches(frequencies)
        return {
            "beam 5": Search({"beam": 5}, self.searching),
            "all answers": Search({"beam": 5}, {"val_inference_type": "allcand"}),
        }

    def is_invalid(self, tokens: torch.Tensor) -> bool:
        """Return whether tokens (T,) are not an answer of the list; without a list, whether they are empty."""
        text = self.codec.decode(tokens)
        return text not in self.trie if self.trie is not None else not text

    def build_generator(
        self,
        models: Sequence[torch.nn.Module],
        args: Any,
        seq_gen_cls: type | None = None,
        extra_gen_cls_kwargs: dict[str, Any] | None = None,
        prefix_allowed_tokens_fn: Any = None,
    ) -> Any:
        """Return the parallel generator for students, and the generator of --val-inference-type for teachers.

        Raises:
            InputError: if --val-inference-type conflicts with other options.
        """
        if not any(model.is_student for model in models):
            if str(self.cfg.val_inference_type) == "allcand":
                if self.trie is None:
                    raise InputError(
                        "--val-inference-type allcand needs a list of answers (--ans2label-file); without one take "
                        "--val-inference-type beamsearch"
                    )
                return CandidateGenerator(
                    cast(Sequence[OfaModel], models),
                    self.target_dictionary,
                    self.trie,
                    nbest=getattr(args, "beam", 1),
                    batch_size=self.cfg.valid_batch_size,
                )
            if str(self.cfg.prompt_type) == "src":
                raise InputError(
                    "--prompt-type src ends in </s>, at which a beam search would stop; take --val-inference-type "
                    "allcand"
                )
            if self.trie is not None:
                from narvl_plugin.generation.teacher import TrieSequenceGenerator  # imports fairseq

                seq_gen_cls = cast(type, partial(TrieSequenceGenerator, trie=self.trie))
        return super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn)

    def inference_step(
        self,
        generator: Any,
        models: Sequence[torch.nn.Module],
        sample: dict[str, Any],
        prefix_tokens: torch.Tensor | None = None,
        constraints: torch.Tensor | None = None,
    ) -> Hypotheses:
        """Return the answers to each of the B samples, best first, without the prompt of a beam search."""
        if isinstance(generator, (CandidateGenerator, ParallelGenerator)):
            return super().inference_step(generator, models, sample, prefix_tokens, constraints)
        hypotheses = super().inference_step(generator, models, sample, sample["prefix_tokens"], constraints)
        for beam, prompt in zip(hypotheses, sample["decoder_prompts"], strict=True):
            for hypothesis in beam:
                for key in ("tokens", "positional_scores"):
                    hypothesis[key] = hypothesis[key][len(prompt) - 1 :]
        return hypotheses

    def validation_scores(self, sample: dict[str, Any], hypotheses: Hypotheses) -> dict[str, list[float]]:
        """Return the confidence that the sample gives to each predicted answer, 0 if it does not list it."""
        answers = [self.codec.decode(beam[0]["tokens"]) for beam in hypotheses]
        scores = [known.get(answer, 0.0) for known, answer in zip(sample["ref_dict"], answers, strict=True)]
        return {self.validation_metrics[0]: scores}
