"""What tasks whose outputs are sets share: how sets are chosen, and what teachers may output."""

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from enum import StrEnum
from functools import partial
from typing import Any, ClassVar, cast

import torch

from narvl_plugin.tasks.base import BaseTask

SETS_COMPARED = 16
"""Number of sets that compete for the highest probability of being right."""

ElementOrder = StrEnum("ElementOrder", ["reading", "random"])


class SetTask(BaseTask):
    """A task whose outputs are sets of elements, or trees of them.

    Attributes:
        empty_is_answer: whether an empty output says that there is no element. With --abstain-below, a student then
            says so if its most probable element is less probable. If not, an empty output is no answer, and the
            confidence is compared.
    """

    predicts_sets = True
    scores_outputs = True
    empty_is_answer: ClassVar[bool] = False

    @property
    @abstractmethod
    def longest_output(self) -> int:
        """The number of tokens of the longest output."""

    @abstractmethod
    def allowed_tokens(self, tokens: list[int]) -> list[int]:
        """Return the tokens that may follow the tokens of a teacher's output; none if no output begins so."""

    @abstractmethod
    def agreement(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return whether each two of H outputs say the same set: (H, H), 1 or 0."""

    @abstractmethod
    def output_scores(
        self, outputs: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, target_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return 1 for right sets and 0 for others: (B, M, T), (B, M), (B, K, S), (B, K) -> (B, M)."""

    @abstractmethod
    def element_scores(self, outputs: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the probability of each element of an output (S,), from drawn outputs (M, T), (M,): (K,)."""

    def choice_options(self, args: Any) -> dict[str, Any]:
        """Return how a student chooses its set: the one that is most probably right among the most probable ones.

        Outputs that say the same elements in another order, or nearly the same ones, support each other. With --beam 1,
        the set is that of the most probable path.
        """
        beam = getattr(args, "beam", 1)
        return {
            "beam_size": beam if beam == 1 else max(beam, SETS_COMPARED),
            "agreement": self.agreement,
            "output_scores": self.output_scores,
            "element_scores": self.element_scores,
            "abstain_by_element": self.empty_is_answer,
        }

    def build_generator(
        self,
        models: Any,
        args: Any,
        seq_gen_cls: type | None = None,
        extra_gen_cls_kwargs: dict[str, Any] | None = None,
        prefix_allowed_tokens_fn: Any = None,
    ) -> Any:
        """Return the generator, see `BaseTask.build_generator`; that of teachers is limited to valid sets."""
        if not any(model.is_student for model in models):
            from narvl_plugin.generation.teacher import AllowedSequenceGenerator  # imports fairseq

            args = copy(args)
            args.min_len, args.max_len_a, args.max_len_b = 0, 0, self.longest_output
            seq_gen_cls = cast(type, partial(AllowedSequenceGenerator, allowed=self.allowed_tokens))
        return super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn)

    def confidence(self, beam: list[dict[str, Any]]) -> float:
        """Return the probability that the best set is right: that of all sets in the beam that agree with it."""
        if "confidence" in beam[0]:
            return float(beam[0]["confidence"])
        return float(self.agreement([hypothesis["tokens"].cpu() for hypothesis in beam])[0] @ probabilities(beam))

    def element_confidences(self, beam: list[dict[str, Any]]) -> list[float]:
        """Return the probability of each element of the best set, see `element_scores`; of a teacher, over its beam."""
        if "element_confidences" in beam[0]:
            shares: list[float] = beam[0]["element_confidences"].tolist()
            return shares
        outputs = [hypothesis["tokens"].cpu() for hypothesis in beam]
        best = outputs[0][outputs[0] != self.target_dictionary.eos()]
        return self.element_shares(outputs, probabilities(beam), best)

    @abstractmethod
    def element_shares(
        self, outputs: Sequence[torch.Tensor], weights: torch.Tensor, tokens: torch.Tensor
    ) -> list[float]:
        """Return the weight of the sets with an element that agrees, for each element of an output.

        Args:
            outputs: H outputs, (T,) each.
            weights: (H,).
            tokens: (S,), the output, without `</s>`.
        """


def probabilities(beam: list[dict[str, Any]]) -> torch.Tensor:
    """Return the probabilities of a teacher's hypotheses, (H,)."""
    return torch.stack([hypothesis["positional_scores"].sum() for hypothesis in beam]).exp().cpu()
