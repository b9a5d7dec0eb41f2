"""Several outputs of each sample, best first.

Legend: B batch, N queries, V labels, W outputs of a sample, S tokens of the longest.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from narvl_plugin.ctc.collapse import Collapsed
from narvl_plugin.ctc.lattice import Lattice, build_lattice, state_emissions


class Scored(NamedTuple):
    """An output and its log-probability.

    Attributes:
        tokens: (T,).
        score: the log-probability, summed over the paths to the output; a scalar in nats.
    """

    tokens: Tensor
    score: Tensor


class Outputs(NamedTuple):
    """Some outputs of each sample, best first.

    Attributes:
        tokens: (B, W, S), padded with the blank.
        lengths: (B, W).
        scores: (B, W) log-probabilities, in nats; -inf for an entry that is no output.
        emissions: (B, W, N, 2 S + 1), the log-probabilities of the lattice states of each output; None if unknown.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    emissions: Tensor | None = None

    def with_scores(self, scores: Tensor) -> "Outputs":
        """Return the outputs with other scores (B, W), best first."""
        return self._replace(scores=scores).take(scores.argsort(dim=1, descending=True, stable=True))

    def first(self, number: int) -> "Outputs":
        """Return the best `number` outputs of each sample, or all if there are fewer."""
        emissions = None if self.emissions is None else self.emissions[:, :number]
        return Outputs(self.tokens[:, :number], self.lengths[:, :number], self.scores[:, :number], emissions)

    def take(self, places: Tensor) -> "Outputs":
        """Return the outputs at positions (B, W') of each sample, in that order."""
        tokens = self.tokens.gather(1, places[..., None].expand(-1, -1, self.tokens.size(2)))
        emissions = self.emissions
        if emissions is not None:
            emissions = emissions[torch.arange(len(places), device=places.device)[:, None], places]
        return Outputs(tokens, self.lengths.gather(1, places), self.scores.gather(1, places), emissions)

    def are(self, collapsed: Collapsed) -> bool:
        """Return whether the outputs (B, 1) are those of collapsed paths (B, T), all on the CPU."""
        width = min(self.tokens.size(2), collapsed.tokens.size(1))
        same_lengths = torch.equal(self.lengths[:, 0], collapsed.lengths)
        return same_lengths and torch.equal(self.tokens[:, 0, :width], collapsed.tokens[:, :width])

    def lattice(self, *, blank: int) -> Lattice:
        """Return the lattices of all outputs, (B W, 2 S + 1)."""
        return build_lattice(self.tokens.flatten(0, 1), self.lengths.flatten(), blank=blank)

    def explained_by(self, log_probs: Tensor, *, blank: int) -> "Outputs":
        """Return the outputs with their emissions from log-probabilities (B, N, V), which may be on another device."""
        lattice = self.lattice(blank=blank)
        labels = lattice.labels.to(log_probs.device, non_blocking=True)
        emissions = state_emissions(log_probs, lattice._replace(labels=labels)).to(self.tokens.device)
        return self._replace(emissions=emissions.unflatten(0, self.lengths.shape))

    def lists(self) -> list[list[Scored]]:
        """Return the outputs of each sample as a list."""
        number = (self.scores > -torch.inf).sum(1).tolist()
        lengths = self.lengths.tolist()
        return [
            [Scored(tokens[place, : lengths[row][place]], scores[place]) for place in range(number[row])]
            for row, (tokens, scores) in enumerate(zip(self.tokens, self.scores, strict=True))
        ]
