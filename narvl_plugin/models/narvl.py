"""The student: OFA's encoder with a parallel decoder over learnable query tokens."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from narvl_plugin.errors import InputError

from .config import NarvlConfig
from .inference import on_kept_values
from .interop import ORIGIN, QUERIES, Origin
from .ofa import OfaModel
from .query_decoder import ALL, QueryDecoder

logger = logging.getLogger(__name__)


class NarvlModel(OfaModel):
    """Non-autoregressive vision-language model (https://arxiv.org/abs/2403.02249).

    Legend: B batch, N queries, V labels: the vocabulary, then the blank.
    """

    decoder_class = QueryDecoder
    is_student = True
    extra_labels = 1  # the blank

    def __init__(self, cfg: NarvlConfig, vocab_size: int):
        """Build the model with random weights; `vocab_size` counts the blank."""
        super().__init__(cfg, vocab_size)
        self.members = query_rows(cfg.member_queries)
        if self.members and sum(map(length, self.members.values())) != cfg.num_queries:
            raise InputError(
                f"--member-queries {cfg.member_queries}: do not sum up to the {cfg.num_queries} of --num-queries"
            )
        self.member: str | None = None
        """Whose queries answer a batch that does not say it; see `answer_as`."""
        if self.decoder.blank_row is not None:
            self.decoder.blank_row.data.copy_(self.encoder.embed_tokens.weight[self.blank])

    @property
    def num_queries(self) -> int:
        """The number of queries N: those of the member that the model answers as, or all."""
        if self.member is not None:
            return length(self.members[self.member])
        return self.decoder.query_embed.num_embeddings

    @property
    def temperature(self) -> float:
        """What logits are divided by where probabilities of outputs count; `narvl calibrate` fits it."""
        return float(self.cfg.temperature)

    @property
    def odds(self) -> tuple[float, float]:
        """What the log-odds of a confidence are multiplied by, and what is added to them; see `temperature`."""
        return float(self.cfg.confidence_slope), float(self.cfg.confidence_offset)

    @property
    def blank(self) -> int:
        """The label of the blank, V - 1."""
        return self.encoder.embed_tokens.num_embeddings - 1

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> _IncompatibleKeys:
        """Load the weights of a checkpoint as teachers do, each member's queries by the member's name.

        Raises InputError, also for a student of several tasks where this one is of one.
        """
        state = dict(state_dict)
        mark = state.get(ORIGIN)
        layout = (mark is not None and Origin.read(mark).member_queries) or self.cfg.member_queries
        if QUERIES in state and layout != self.cfg.member_queries:
            state[QUERIES] = self._queries_by_name(state[QUERIES], layout)
        return super().load_state_dict(state, strict)

    def _queries_by_name(self, queries: Tensor, layout: str) -> Tensor:
        """Return the model's own queries (N, D) with those of the members that a checkpoint's layout has, too."""
        if not self.members:
            raise InputError(
                f"the checkpoint's queries are for several tasks ({layout}); make a student of one of them first: "
                "narvl convert CHECKPOINT OUT --member NAME"
            )
        own = self.decoder.query_embed.weight.detach().clone()
        found = query_rows(layout)
        for name, rows in self.members.items():
            kept = min(length(rows), length(found[name])) if name in found else 0
            if kept:
                own[rows][:kept] = queries[found[name]][:kept]
            logger.info("%s: %d of its %d queries are the checkpoint's", name, kept, length(rows))
        return own

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
        padded: NDArray[np.bool_] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return logits (B, N, V) and a dictionary of inner results; `prev_output_tokens` is ignored.

        `queries` names the member of a mixture of tasks whose queries answer the batch; without it they are those of
        the member that `answer_as` chose, or all of a student of one task. `padded` is that of `OfaEncoder.forward`.
        """
        rows = self._rows(self.member if queries is None else queries)

        def run() -> tuple[Tensor, dict[str, Any]]:
            return self.decoder(None, self.encoder(src_tokens, src_lengths, patch_images, patch_masks, padded), rows)

        return on_kept_values(run)


def query_rows(layout: str) -> dict[str, slice]:
    """Return the rows of each member's queries by its name, of `member_queries`; none for a student of one task.

    Raises InputError for a layout of another form.
    """
    rows, start = {}, 0
    for part in filter(None, layout.split(",")):
        name, _, number = part.partition(":")
        if not re.fullmatch("[0-9]{1,6}", number):
            raise InputError(f"--member-queries {layout:.80}: expected NAME:N,NAME:N")
        rows[name] = slice(start, start + int(number))
        start = rows[name].stop
    return rows


def length(rows: slice) -> int:
    """Return how many rows these are."""
    return int(rows.stop - rows.start)
