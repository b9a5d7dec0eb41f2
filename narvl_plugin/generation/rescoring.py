"""Scores of a student's outputs by a teacher, for all outputs of a batch in one parallel pass.

Legend: B batch, H outputs of all samples, T tokens of the longest, V labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from narvl_plugin.ctc import to_host
from narvl_plugin.data.collate import pad_tokens
from narvl_plugin.data.vocabulary import Vocabulary
from narvl_plugin.errors import BadRow
from narvl_plugin.models.memo import believing
from narvl_plugin.models.ofa import OfaModel

OUTPUTS_AT_A_TIME = 256


class TeacherRescorer:
    """Scores an output by `weight` times a teacher's log-probability, in nats. The teacher starts from `<s>`."""

    def __init__(self, teacher: OfaModel, dictionary: Vocabulary, weight: float) -> None:
        self.teacher = teacher.eval()
        self.bos, self.eos, self.pad = dictionary.bos(), dictionary.eos(), dictionary.pad()
        self.weight = weight

    def follow(self, weights: Iterator[Tensor]) -> None:
        """Move the teacher to the device and type of a student's weights. These may change after loading."""
        like = next(weights, None)
        own = next(self.teacher.parameters())
        if like is not None and (own.device, own.dtype) != (like.device, like.dtype):
            self.teacher.to(like.device, like.dtype)

    @torch.no_grad()
    def __call__(self, sample: dict[str, Any], outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Score the outputs of a batch. This synchronises with a GPU once.

        Args:
            sample: the batch of B samples.
            outputs: the outputs of each sample, (T,) each, on the CPU.

        Returns:
            The scores of each sample's outputs, one tensor for each sample, on the CPU.

        Raises:
            BadRow: if a text or an output has more tokens than the teacher reads. A student may read more.
        """
        spoken = [tokens[tokens != self.eos] for beam in outputs for tokens in beam]
        if not spoken:
            return [torch.empty(0) for _ in outputs]
        net_input = sample["net_input"]
        source = {
            name: net_input[name]
            for name in ("src_tokens", "src_lengths", "patch_images", "patch_masks", "padded")
            if name in net_input
        }
        own = next(self.teacher.parameters())
        source["patch_images"] = source["patch_images"].to(own.dtype)
        counts = [len(beam) for beam in outputs]
        samples = torch.arange(len(outputs)).repeat_interleave(torch.tensor(counts))
        rows = [torch.cat([one.new_tensor([self.bos]), one, one.new_tensor([self.eos])]) for one in spoken]
        tokens = pad_tokens(rows, self.pad).to(own.device, non_blocking=True)  # (H, T + 2)
        for name, read, most, owners in (
            ("text", net_input["src_tokens"], self.teacher.encoder.max_positions(), range(len(outputs))),
            ("output", tokens[:, :-1], self.teacher.decoder.max_positions(), samples.tolist()),
        ):
            if read.size(1) > most:
                length, longest = read.ne(self.pad).sum(1).max(0)
                where = sample["where"][owners[int(longest)]]
                raise BadRow(
                    f"{where}: the {name} has {int(length):,} tokens, and the teacher of "
                    f"--rescore-with reads at most {most:,}; leave the row out, or take another teacher"
                )
        with believing() as doubts:
            encoded = self.teacher.encoder(**source)
            scores = [
                self._score(encoded, *part)
                for part in zip(tokens.split(OUTPUTS_AT_A_TIME), samples.split(OUTPUTS_AT_A_TIME), strict=True)
            ]
        total, flags = to_host((self.weight * torch.cat(scores), doubts.flags))
        if not doubts.settled(flags):
            return self(sample, outputs)
        return list(total.split(counts))

    def _score(self, encoded: Any, tokens: Tensor, samples: Tensor) -> Tensor:
        """Return the log-probabilities (H,) of outputs (H, T + 2), from `<s>` to `</s>`, for these samples (H,)."""
        memory = self.teacher.encoder.reorder_encoder_out(encoded, samples)
        logits, _ = self.teacher.decoder(tokens[:, :-1], memory)
        said = tokens[:, 1:]
        log_probs = logits.float().log_softmax(2).gather(2, said[..., None])[..., 0]
        return (log_probs * said.ne(self.pad)).sum(1)
