"""A teacher's answers from a closed list, with the exact score of every answer.

Legend: B batch, V labels, C children of a place in the trie, A answers, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from narvl_plugin.ctc import to_host
from narvl_plugin.data.answers import AnswerTrie
from narvl_plugin.data.collate import pad_tokens
from narvl_plugin.data.vocabulary import Vocabulary
from narvl_plugin.models.memo import believing
from narvl_plugin.models.ofa import OfaModel


class CandidateGenerator:
    """Scores every answer of a closed list, in place of fairseq's `SequenceGenerator`.

    An answer's score is the sum of the log-probabilities of its tokens. They are normalised over the tokens that the
    trie allows. The decoder runs only at places where the trie branches; elsewhere the probability is 1.

    Args:
        models: teachers; several form an ensemble, whose probabilities are averaged.
        dictionary: the task's vocabulary.
        trie: the answers.
        nbest: the number of answers to return for each sample.
        batch_size: the number of places of the trie in one pass, for each sample.
    """

    def __init__(
        self, models: Sequence[OfaModel], dictionary: Vocabulary, trie: AnswerTrie, *, nbest: int, batch_size: int
    ) -> None:
        self.trie = trie
        self.pad = dictionary.pad()
        self.symbols_to_strip_from_output = {dictionary.eos()}
        self.nbest = min(nbest, len(trie.answers))
        self.batch_size = batch_size
        self._places = trie.branches()
        # Index of each token of each answer in the log-probabilities of all children of all branches. The last entry
        # of these, a zero, is for tokens at places without a branch.
        index: dict[tuple[int, ...], int] = {}
        for prefix, children in self._places.items():
            for child in children:
                index[*prefix, child] = len(index)
        rows = [
            torch.tensor([index.get(tuple(tokens[: place + 1]), len(index)) for place in range(len(tokens))])
            for tokens in (tokens.tolist() for tokens in trie.tokens)
        ]
        self._index = pad_tokens(rows, len(index))  # (A, T)
        for model in models:
            model.eval()

    @torch.no_grad()
    def generate(self, models: Sequence[OfaModel], sample: dict[str, Any], **_: Any) -> list[list[dict[str, Any]]]:
        """Return the best answers to each of the B samples, best first, in fairseq's form. Other options are ignored.

        `score` is the sum of the tokens' `positional_scores` (T,), in nats.
        """
        source = {name: value for name, value in sample["net_input"].items() if name != "prev_output_tokens"}
        prompts = sample["decoder_prompts"]
        places = list(self._places.items())
        with believing() as doubts:
            encoded = [(model, model.encode(source)) for model in models]
            weights = [
                self._children(encoded, prompts, places[start : start + self.batch_size])
                for start in range(0, len(places), self.batch_size)
            ]
        weights, flags = to_host((weights, doubts.flags))
        if not doubts.settled(flags):
            return self.generate(models, sample)
        nought = torch.zeros(len(prompts), 1)
        of_places = torch.cat([*weights, nought], dim=1).split([*(len(children) for _, children in places), 1], dim=1)
        log_probs = [part.log_softmax(1) for part in of_places]  # the last part has one entry: 0
        positional = torch.cat(log_probs, dim=1)[:, self._index]  # (B, A, T)
        scores, best = positional.sum(2).topk(self.nbest, dim=1)
        return [
            [
                {
                    "tokens": self.trie.tokens[answer],
                    "score": score,
                    "attention": torch.empty(0),
                    "alignment": torch.empty(0),
                    "positional_scores": parts[answer][: len(self.trie.tokens[answer])],
                }
                for score, answer in zip(row_scores, row_best.tolist(), strict=True)
            ]
            for row_scores, row_best, parts in zip(scores, best, positional, strict=True)
        ]

    def _children(
        self,
        encoded: Sequence[tuple[OfaModel, Any]],
        prompts: Sequence[Tensor],
        places: Sequence[tuple[tuple[int, ...], list[int]]],
    ) -> Tensor:
        """Return the weights of the children of some places of the trie, one place after another: (B, sum C).

        Weights are logs of unnormalised probabilities. They are on the device, without a synchronisation.
        """
        device = prompts[0].device
        prefixes = [prefix for prefix, _ in places]
        starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]  # (B, 1)
        lengths = torch.tensor([len(prefix) for prefix in prefixes])
        longest = int(lengths.max())
        # The tokens of each place, (places, longest), follow the prompt of each sample.
        added = pad_tokens([torch.tensor(prefix, dtype=torch.int64) for prefix in prefixes], self.pad)
        after = (starts + torch.arange(longest))[:, None].expand(-1, len(places), -1)
        padding = torch.full((len(prompts), longest), self.pad)
        added, after, padding, last = (
            part.to(device, non_blocking=True) for part in (added, after, padding, (starts + lengths - 1).flatten())
        )
        tokens = torch.cat([pad_tokens(prompts, self.pad), padding], 1)[:, None].repeat(1, len(places), 1)
        tokens = tokens.scatter(2, after, added.expand(len(prompts), -1, -1)).flatten(0, 1)
        samples = torch.arange(len(prompts)).repeat_interleave(len(places))
        row = torch.arange(len(tokens), device=device)
        log_probs = []
        for model, encoder_out in encoded:
            logits, _ = model.decoder(tokens, model.encoder.reorder_encoder_out(encoder_out, samples))
            log_probs.append(logits[row, last].float().log_softmax(1))
        mean = torch.stack(log_probs).logsumexp(0).unflatten(0, (len(prompts), len(places)))
        which = torch.tensor([number for number, (_, children) in enumerate(places) for _ in children])
        children = torch.tensor([child for _, children in places for child in children])
        return mean[:, which.to(device, non_blocking=True), children.to(device, non_blocking=True)]
