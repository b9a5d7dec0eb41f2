"""The student: OFA's encoder with a parallel decoder over learnable query tokens."""

import logging
from typing import Any

import torch
from fairseq.models import register_model
from torch import Tensor

from .config import NarvlConfig
from .ofa import OfaModel, register_sizes
from .query_decoder import QueryDecoder

logger = logging.getLogger(__name__)


@register_model("narvl", dataclass=NarvlConfig)
class NarvlModel(OfaModel):
    """Non-autoregressive vision-language model (https://arxiv.org/abs/2403.02249).

    Legend: B batch, N queries, V labels: the vocabulary, then the blank.
    """

    config_class = NarvlConfig
    decoder_class = QueryDecoder
    extra_labels = 1  # the blank

    @property
    def num_queries(self) -> int:
        """The number of queries N."""
        return self.decoder.query_embed.num_embeddings

    @property
    def blank(self) -> int:
        """The label of the blank, V - 1."""
        return self.encoder.embed_tokens.num_embeddings - 1

    def forward(  # type: ignore[override]  # a student never writes an image
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        prev_output_tokens: Tensor | None = None,
        patch_images: Tensor | None = None,
        patch_masks: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return logits (B, N, V) and a dictionary of inner results; `prev_output_tokens` is ignored."""
        return self.decoder(None, self.encoder(src_tokens, src_lengths, patch_images, patch_masks))

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Let a teacher's weights load: add the queries and the blank row, as this model has drawn them."""
        super().upgrade_state_dict_named(state_dict, name)
        if "decoder.query_embed.weight" in state_dict:
            return
        own = self.state_dict()
        state_dict["decoder.query_embed.weight"] = own["decoder.query_embed.weight"]
        added = ["decoder.query_embed.weight"]
        for key in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight"):
            if len(state_dict[key]) == self.blank:
                state_dict[key] = torch.cat([state_dict[key], own[key][self.blank :]])
                added.append(f"{key}[{self.blank}]")
        logger.info("weights of a teacher: these are new and keep their random values: %s", ", ".join(added))


register_sizes("narvl")
