"""The student: OFA's encoder with a parallel decoder over learnable query tokens."""

from typing import Any

from fairseq.models import register_model
from torch import Tensor

from narvl_plugin.errors import InputError

from .config import NarvlConfig
from .ofa import OfaModel, register_sizes
from .query_decoder import ALL, QueryDecoder


@register_model("narvl", dataclass=NarvlConfig)
class NarvlModel(OfaModel):
    """Non-autoregressive vision-language model (https://arxiv.org/abs/2403.02249).

    Legend: B batch, N queries, V labels: the vocabulary, then the blank.
    """

    config_class = NarvlConfig
    decoder_class = QueryDecoder
    extra_labels = 1  # the blank

    def __init__(self, cfg: NarvlConfig, vocab_size: int):
        """Build the model with random weights; `vocab_size` counts the blank."""
        super().__init__(cfg, vocab_size)
        self.members = query_rows(cfg)
        self.member: str | None = None
        """Whose queries answer a batch that does not say it; see `answer_as`."""
        if self.decoder.blank_row is not None:
            self.decoder.blank_row.data.copy_(self.encoder.embed_tokens.weight[self.blank])

    @property
    def num_queries(self) -> int:
        """The number of queries N: those of the member that the model answers as, or all."""
        if self.member is not None:
            return self.members[self.member].stop - self.members[self.member].start
        return self.decoder.query_embed.num_embeddings

    @property
    def blank(self) -> int:
        """The label of the blank, V - 1."""
        return self.encoder.embed_tokens.num_embeddings - 1

    def answer_as(self, member: str | None) -> None:
        """Answer batches that do not say otherwise with the queries of one member of the mixture trained on.

        Raises InputError if there is no such member.
        """
        self._rows(member)
        self.member = member

    def _rows(self, member: str | None) -> slice:
        """Return the rows of a member's queries."""
        if not self.members and member is None:
            return ALL
        if member not in self.members:
            members = ", ".join(self.members)
            raise InputError(
                f"the student was trained on {members}, and has no queries of {member!r}; choose by --member"
                if members
                else f"--member {member}: the student was trained on one task alone"
            )
        return self.members[member]

    def forward(  # type: ignore[override]  # a student never writes an image
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        prev_output_tokens: Tensor | None = None,
        patch_images: Tensor | None = None,
        patch_masks: Tensor | None = None,
        queries: str | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return logits (B, N, V) and a dictionary of inner results; `prev_output_tokens` is ignored.

        `queries` names the member of a mixture of tasks whose queries answer the batch; without it they are those of
        the member that `answer_as` chose, or all of a student of one task.
        """
        rows = self._rows(self.member if queries is None else queries)
        return self.decoder(None, self.encoder(src_tokens, src_lengths, patch_images, patch_masks), rows)


def query_rows(cfg: NarvlConfig) -> dict[str, slice]:
    """Return the rows of each member's queries by its name, none for a student of one task.

    Raises InputError unless the numbers sum up to that of all queries.
    """
    rows, start = {}, 0
    for part in filter(None, cfg.member_queries.split(",")):
        name, _, number = part.partition(":")
        rows[name] = slice(start, start + int(number))
        start = rows[name].stop
    if rows and start != cfg.num_queries:
        raise InputError(f"--member-queries {cfg.member_queries}: are {start}, and --num-queries is {cfg.num_queries}")
    return rows


register_sizes("narvl")
