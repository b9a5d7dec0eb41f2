"""The student: OFA's encoder with a parallel decoder over learnable query tokens."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from narvl_plugin.errors import InputError

from .config import LIMITS, NarvlConfig
from .exported import ExportedPass
from .interop import ORIGIN, QUERIES, Origin
from .memo import run_on_memos
from .ofa import OfaModel
from .query_decoder import ALL, QueryDecoder

logger = logging.getLogger(__name__)


class Calibration(NamedTuple):
    """What makes a student's confidence equal to its rate of correct answers; `narvl calibrate` fits it.

    Attributes:
        temperature: the divisor of logits.
        slope: the factor of the log-odds of a confidence.
        offset: the number added to the scaled log-odds.
    """

    temperature: float
    slope: float
    offset: float


class NarvlModel(OfaModel):
    """Non-autoregressive vision-language model.

    Source: https://arxiv.org/abs/2403.02249

    Legend: B batch, N queries, V labels: the vocabulary, then the blank.

    Attributes:
        members: the rows of each member's queries, for a mixture of tasks.
        member: name of the member whose queries answer a batch by default, see `answer_as`.
    """

    cfg: NarvlConfig
    decoder: QueryDecoder
    decoder_class = QueryDecoder
    is_student = True
    extra_labels = 1  # the blank

    def __init__(self, cfg: NarvlConfig, vocab_size: int):
        """Build the model with random weights.

        Args:
            cfg: the configuration.
            vocab_size: V, with the blank.

        Raises:
            InputError: if the members' queries do not sum up to all queries.
        """
        super().__init__(cfg, vocab_size)
        self.members = query_rows(cfg.member_queries)
        if self.members and sum(map(length, self.members.values())) != cfg.num_queries:
            raise InputError(
                f"--member-queries {cfg.member_queries}: do not sum up to the {cfg.num_queries} of --num-queries"
            )
        self.member: str | None = None
        self._calibrations = calibrations(cfg.member_calibration)
        if self.decoder.blank_row is not None:
            self.decoder.blank_row.data.copy_(self.encoder.embed_tokens.weight[self.blank])

    @property
    def num_queries(self) -> int:
        """The number of queries N: those of `member`, or all."""
        if self.member is not None:
            return length(self.members[self.member])
        return self.decoder.query_embed.num_embeddings

    @property
    def temperature(self) -> float:
        """The divisor of logits before the probability of an output is computed. `narvl calibrate` fits it."""
        return self._calibration.temperature

    @property
    def odds(self) -> tuple[float, float]:
        """The factor and the offset of the log-odds of a confidence. `narvl calibrate` fits them."""
        return self._calibration.slope, self._calibration.offset

    @property
    def _calibration(self) -> Calibration:
        """That of the member whose queries answer, or of the whole model."""
        cfg = self.cfg
        whole = Calibration(float(cfg.temperature), float(cfg.confidence_slope), float(cfg.confidence_offset))
        return whole if self.member is None else self._calibrations.get(self.member, whole)

    @property
    def blank(self) -> int:
        """The label of the blank, V - 1."""
        return self.encoder.embed_tokens.num_embeddings - 1

    def load_state_dict(  # type: ignore[override]  # whether tensors are assigned follows from the model
        self, state_dict: Mapping[str, Tensor], strict: bool = True
    ) -> _IncompatibleKeys:
        """Load the weights of a checkpoint, see `OfaModel.load_state_dict`. Queries are matched by the member's name.

        Args:
            state_dict: the weights, with their origin.
            strict: not used.

        Returns:
            The names of missing and unexpected weights, both empty.

        Raises:
            InputError: if the weights do not fit, or if they are for several tasks and the model for one.
        """
        state = dict(state_dict)
        mark = state.get(ORIGIN)
        layout = (mark is not None and Origin.read(mark).member_queries) or self.cfg.member_queries
        if QUERIES in state and layout != self.cfg.member_queries:
            state[QUERIES] = self._queries_by_name(state[QUERIES], layout)
        return super().load_state_dict(state, strict)

    def _queries_by_name(self, queries: Tensor, layout: str) -> Tensor:
        """Return the model's queries (N, D), with those of a checkpoint for the members that both have."""
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
        """Choose the member whose queries answer a batch by default.

        Args:
            member: its name, or None for a student of one task.

        Raises:
            InputError: if the student has no such member.
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

    def optimize_for_inference(self, checkpoint: Path | None = None) -> None:
        """Make the model faster, see `OfaModel.optimize_for_inference`.

        Args:
            checkpoint: the file that the model was read from. On a CPU, a graph that `narvl export` wrote beside it
                runs in the model's place.
        """
        if checkpoint is not None and not self.members:
            self.exported = ExportedPass.beside(checkpoint, self)
        super().optimize_for_inference()

    def fix_shapes(self, *, side: int, length: int, padded: bool) -> None:
        """Fix what follows from the weights alone to one shape, in place, for a static graph.

        Args:
            side: of the images, in pixels.
            length: tokens of a prompt, L.
            padded: whether prompts may end in padding.
        """
        with torch.no_grad():
            positions = self.encoder.fix_shapes(side=side, length=length, padded=padded)
            self.decoder.fix_shapes(self._rows(self.member), positions)

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
        """Return logits and intermediate results.

        Args:
            src_tokens: (B, L), right-padded.
            src_lengths: not used.
            prev_output_tokens: not used.
            patch_images: pixels (B, 3, height, width) or features of the backbone (B, C, rows, columns).
            patch_masks: (B,), False for samples whose image is ignored; or (B, P), see `OfaEncoder.forward`.
            queries: name of the member whose queries answer the batch. The default is `member`, or all queries of a
                student of one task.
            padded: (B,), see `OfaEncoder.forward`.

        Returns:
            Logits (B, N, V) and a dictionary, see `Decoder.run_layers`.
        """
        rows = self._rows(self.member if queries is None else queries)

        def run() -> tuple[Tensor, dict[str, Any]]:
            encoder_out = self.encoder(src_tokens, src_lengths, patch_images, patch_masks, padded)
            return self.decoder(None, encoder_out, rows)

        return run_on_memos(run)


def calibrations(layout: str) -> dict[str, Calibration]:
    """Return the calibration of each member by its name.

    Args:
        layout: `NarvlConfig.member_calibration`; empty where no member was calibrated.

    Raises:
        InputError: if the layout has another form, or a number is outside of its limits.
    """
    found = {}
    for part in filter(None, layout.split(",")):
        name, *numbers = part.split(":")
        try:
            calibration = Calibration(*map(float, numbers))
        except (TypeError, ValueError):
            raise InputError(f"member_calibration {layout!r:.80}: expected NAME:T:S:O,NAME:T:S:O") from None
        for option, value in zip(("temperature", "confidence_slope", "confidence_offset"), calibration, strict=True):
            least, most = LIMITS[option]
            if not least <= value <= most:
                raise InputError(f"member_calibration {layout!r:.80}: expected numbers from {least:g} to {most:g}")
        found[name] = calibration
    return found


def calibration_layout(found: Mapping[str, Calibration]) -> str:
    """Return calibrations in the form that `calibrations` reads."""
    return ",".join(f"{name}:{':'.join(map(repr, calibration))}" for name, calibration in found.items())


def query_rows(layout: str) -> dict[str, slice]:
    """Return the rows of each member's queries by the member's name.

    Args:
        layout: `NarvlConfig.member_queries`; empty for a student of one task.

    Raises:
        InputError: if the layout has another form.
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
    """Return the number of rows in a slice."""
    return int(rows.stop - rows.start)
