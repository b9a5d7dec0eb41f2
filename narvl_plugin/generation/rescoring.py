"""A teacher's opinion of what a student may say: all outputs of a batch in one parallel pass.

Legend: B batch, H outputs of all samples, T tokens of the longest, V labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from narvl_plugin.data.collate import pad_tokens

OUTPUTS_AT_A_TIME = 256


class TeacherRescorer:
    """Gives each output `weight` times its log-probability, in nats, with a teacher that starts from `<s>`."""

    def __init__(self, teacher: nn.Module, dictionary: Dictionary, weight: float) -> None:
        self.teacher = teacher.eval()
        self.bos, self.eos, self.pad = dictionary.bos(), dictionary.eos(), dictionary.pad()
        self.weight = weight

    @torch.no_grad()
    def __call__(self, sample: dict[str, Any], outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Score the outputs, (T,) each, of each of the B samples of a batch: one tensor a sample."""
        net_input = sample["net_input"]
        source = {name: net_input[name] for name in ("src_tokens", "src_lengths", "patch_images", "patch_masks")}
        encoded = self.teacher.encoder(**source)
        spoken = [tokens[tokens != self.eos] for beam in outputs for tokens in beam]
        rows = [torch.cat([one.new_tensor([self.bos]), one, one.new_tensor([self.eos])]) for one in spoken]
        if not rows:
            return [net_input["src_tokens"].new_zeros(0, dtype=torch.float32) for _ in outputs]
        counts = [len(beam) for beam in outputs]
        samples = torch.arange(len(outputs)).repeat_interleave(torch.tensor(counts)).to(rows[0].device)
        tokens = pad_tokens(rows, self.pad)  # (H, T + 2)
        scores = [
            self._score(encoded, *part)
            for part in zip(tokens.split(OUTPUTS_AT_A_TIME), samples.split(OUTPUTS_AT_A_TIME), strict=True)
        ]
        return list((self.weight * torch.cat(scores)).split(counts))

    def _score(self, encoded: Any, tokens: Tensor, samples: Tensor) -> Tensor:
        """Return the log-probability of some outputs, (H, T + 2) from `<s>` to `</s>`, of these samples: (H,)."""
        memory = self.teacher.encoder.reorder_encoder_out(encoded, samples)
        logits, _ = self.teacher.decoder(tokens[:, :-1], memory)
        said = tokens[:, 1:]
        log_probs = logits.float().log_softmax(2).gather(2, said[..., None])[..., 0]
        return (log_probs * said.ne(self.pad)).sum(1)
