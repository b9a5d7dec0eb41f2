"""The student: OFA's encoder with a parallel decoder over learnable query tokens."""

from typing import Any

from fairseq.models import register_model
from torch import Tensor

from .config import NarvlConfig
from .ofa import OfaModel, register_sizes
from .query_decoder import QueryDecoder


@register_model("narvl", dataclass=NarvlConfig)
class NarvlModel(OfaModel):
    """Non-autoregressive vision-language model (https://arxiv.org/abs/2403.02249).

    Legend: B batch, N queries, V labels: the vocabulary, then the blank.
    """

    registered_name = "narvl"
    config_class = NarvlConfig
    decoder_class = QueryDecoder
    extra_labels = 1  # the blank

    def __init__(self, cfg: NarvlConfig, vocab_size: int):
        """Build the model with random weights; `vocab_size` counts the blank."""
        super().__init__(cfg, vocab_size)
        if self.decoder.blank_row is not None:
            self.decoder.blank_row.data.copy_(self.encoder.embed_tokens.weight[self.blank])

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


register_sizes(NarvlModel)
