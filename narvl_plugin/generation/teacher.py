"""A teacher's search, by fairseq: over all outputs, or over the answers of a closed list.

Legend: B batch, V labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from narvl_plugin.data.answers import AnswerTrie
from narvl_plugin.data.vocabulary import Vocabulary
from narvl_plugin.importing import leaving_logging_alone

with leaving_logging_alone():
    from fairseq.ngram_repeat_block import NGramRepeatBlock
    from fairseq.search import BeamSearch
    from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
    from fairseq.tasks import FairseqTask


def build_search(
    task: Any,
    models: Sequence[nn.Module],
    args: Any,
    seq_gen_cls: type | None = None,
    extra_gen_cls_kwargs: dict[str, Any] | None = None,
    prefix_allowed_tokens_fn: Callable[..., Any] | None = None,
) -> Any:
    """Return fairseq's search for teachers, with fairseq's options of generation; see `FairseqTask.build_generator`."""
    generator = FairseqTask.build_generator(
        task, ensemble_of(models), args, seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn
    )
    if getattr(generator, "repeat_ngram_blocker", None) is not None:
        generator.repeat_ngram_blocker = NGramBlock(generator.repeat_ngram_blocker.no_repeat_ngram_size)
    return generator


def ensemble_of(models: Any) -> Any:
    """Return teachers in the form that fairseq's search needs, even if they are not of fairseq's classes."""
    return models if isinstance(models, EnsembleModel) else TeacherEnsemble(models)


class TeacherEnsemble(EnsembleModel):
    """An ensemble for fairseq's search. Its teachers need not be of fairseq's classes, and use their CUDA graphs."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__(models)
        self.has_incremental = True

    def forward_encoder(self, net_input: dict[str, Any]) -> list[Any]:
        """Return the output of each teacher's encoder for a batch."""
        source = {name: value for name, value in net_input.items() if name != "prev_output_tokens"}
        return [model.encode(source) for model in self.models]

    def max_decoder_positions(self) -> int:
        """Return the length of the longest output that all teachers support, in tokens."""
        return min(int(model.decoder.max_positions()) for model in self.models)


_look_back = NGramRepeatBlock._no_repeat_ngram


def banned_ngrams(
    block: NGramRepeatBlock, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int
) -> Tensor:
    """Exclude tokens that would repeat an n-gram of the tokens so far, in place; see fairseq's `NGramRepeatBlock`.

    fairseq compares the output with the end of the token buffer, which is still padding. So it never finds a
    repetition (fairseq issues 4709 and 5206).
    """
    banned: Tensor = _look_back(block, tokens[:, : step + 1], lprobs, bsz, beam_size, step)
    return banned


class NGramBlock(NGramRepeatBlock):
    """fairseq's ban on repeated n-grams, with `banned_ngrams`."""

    _no_repeat_ngram = banned_ngrams


class AllowedBeamSearch(BeamSearch):
    """fairseq's beam search over the allowed tokens. Their probabilities are normalised to sum to 1.

    fairseq's own search of this kind keeps only as many candidates as the beam is wide, `</s>` among them, so some
    outputs go on after `</s>`.

    Args:
        dictionary: the dictionary.
        allowed: returns the tokens that may follow some tokens; none if nothing valid begins with these.
    """

    def __init__(self, dictionary: Vocabulary, allowed: Callable[[list[int]], list[int]]) -> None:
        super().__init__(dictionary)
        self.allowed = allowed
        self.prompt_lengths: list[int] = []
        """Number of tokens before the output, including `<s>`, for each sample of the batch."""

    def step(
        self,
        step: int,
        lprobs: Tensor,
        scores: Tensor | None,
        prev_output_tokens: Tensor,
        original_batch_idxs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the best continuations, as fairseq's search does, from lprobs (B, beam, V)."""
        renormalised = lprobs.flatten(0, 1)
        samples = original_batch_idxs.repeat_interleave(lprobs.size(1)).tolist()
        for row, (sample, tokens) in enumerate(zip(samples, prev_output_tokens.tolist(), strict=True)):
            begin = self.prompt_lengths[sample]
            if len(tokens) < begin:
                continue  # still reading the prompt
            allowed = self.allowed(tokens[begin:])
            chosen = renormalised[row, allowed].log_softmax(0)
            renormalised[row] = float("-inf")
            renormalised[row, allowed] = chosen
        return super().step(step, renormalised.view_as(lprobs), scores, prev_output_tokens, original_batch_idxs)


class AllowedSequenceGenerator(SequenceGenerator):
    """fairseq's generator for teachers, with hypotheses of allowed tokens; see `AllowedBeamSearch`."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        tgt_dict: Vocabulary,
        *,
        allowed: Callable[[list[int]], list[int]],
        **options: Any,
    ) -> None:
        search = AllowedBeamSearch(tgt_dict, allowed)
        super().__init__(ensemble_of(models), tgt_dict, **options | {"search_strategy": search})

    def generate(self, models: Sequence[nn.Module], sample: dict[str, Any], **options: Any) -> Any:
        """Return the hypotheses of each sample, best first, including their prompts."""
        prompts = sample.get("decoder_prompts")
        self.search.prompt_lengths = [1] * len(sample["id"]) if prompts is None else list(map(len, prompts))
        return super().generate(models, sample, **options)


class TrieSequenceGenerator(AllowedSequenceGenerator):
    """fairseq's generator for teachers, with hypotheses from a closed list of answers.

    The beam is at most as wide as the list, so that it can always be filled. The trie ends answers; the options of
    lengths do not.
    """

    def __init__(
        self, models: Sequence[nn.Module], tgt_dict: Vocabulary, *, trie: AnswerTrie, beam_size: int, **options: Any
    ) -> None:
        beam_size = min(beam_size, len(trie.answers))
        super().__init__(models, tgt_dict, allowed=trie.allowed, beam_size=beam_size, **options)
        self.max_len_b = self.max_len
