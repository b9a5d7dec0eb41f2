"""The task `caption`: it describes an image in a sentence."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, cast

import torch

from narvl_plugin.ctc import LengthRange, NgramAutomaton, NgramConstraint
from narvl_plugin.data.caption import CaptionDataset
from narvl_plugin.data.ngram_files import read_ngrams
from narvl_plugin.data.scenes.scene import Scene
from narvl_plugin.data.scenes.truth import CaptionTruth, scene_of, scenes_beside, truth_of
from narvl_plugin.data.text import REFERENCE_SEPARATOR, TextCodec
from narvl_plugin.data.tsv import TsvFile, parse_columns
from narvl_plugin.errors import InputError
from narvl_plugin.scoring.reward import CaptionReward
from narvl_plugin.scoring.tokenization import plain_words
from narvl_plugin.scoring.wording import KnownWording, Wording, captions_of, scene_kinds
from narvl_plugin.tasks.base import ANY_NGRAM, BaseTask, BaseTaskConfig, Hypotheses, Search

if TYPE_CHECKING:
    from narvl_plugin.scoring.sentences import BatchwiseCider, Score

logger = logging.getLogger(__name__)

REPEATED = 3
"""Length of n-grams that should not repeat in a caption, in words."""
Agreement = StrEnum("Agreement", ["none", "bleu", "cider"])


@dataclass
class CaptionConfig(BaseTaskConfig):
    """Options of the task `caption`."""

    selected_cols: str = field(
        default="0,4,2", metadata={"help": "TSV columns (from 0) of id, image and caption, in this order"}
    )
    max_tgt_length: int = field(default=20, metadata={"help": "words of a training caption that are kept"})
    any_reference: bool = field(
        default=False,
        metadata={
            "help": "train a student to predict any one of a row's references (joined by &&), by summing over them in "
            "criterion qctc; without it, each epoch uses another reference"
        },
    )
    max_references: int = field(
        default=0,
        metadata={"help": "references of a row (joined by &&) that training uses, the first of them; 0 uses all"},
    )
    eval_cider: bool = field(
        default=False,
        metadata={
            "help": "generate in validation and log CIDEr as `cider` (for --best-checkpoint-metric); of embedded "
            "scenes, also the shares of captions that are `sentences`, `true` and `complete`; of other images, the "
            "shares with `new_runs`, which no training caption has, with `doubled` words, or `cut` at the end"
        },
    )
    mbr: Agreement = field(
        default=Agreement.none,
        metadata={
            "help": "choose the caption of a student's beam that agrees best with all captions of the beam, weighted "
            "by their probabilities, in BLEU or CIDEr (minimum-Bayes-risk decoding)"
        },
    )
    mbr_frequencies: Optional[str] = field(
        default=None,
        metadata={
            "help": "for --mbr cider: a TSV file with the same columns, such as the training file; its captions give "
            "the frequencies of n-grams"
        },
    )
    ngram_automaton: Optional[str] = field(
        default=None,
        metadata={
            "help": "file of narvl ngrams: a student's caption is then the best path whose pairs of tokens are all "
            "known, each n-gram weighted by its probability; for --beam 1"
        },
    )
    ngram_weight: float = field(
        default=0.2,
        metadata={"help": "factor of the n-grams' log-probabilities for --ngram-automaton; 0 only rules out"},
    )
    eval_args: str = field(
        default='{"beam": 5, "max_len_b": 16, "no_repeat_ngram_size": 3}',
        metadata={
            "help": "options of the generator in validation, as JSON; a student's are beam, min_len, max_len_b and "
            "no_repeat_ngram_size"
        },
    )


@lru_cache(maxsize=1)
def _ngrams(file: str, codec: TextCodec) -> NgramAutomaton:
    """Return the automaton of a file, which is read once, although each way to decode has a generator of its own."""
    return read_ngrams(Path(file), codec)


class CaptionTask(BaseTask):
    """Captioning; see CaptionDataset for the columns."""

    name = "caption"
    verb = "caption"
    config_class = CaptionConfig
    validation_metrics = ("cider", *CaptionTruth._fields, *Wording._fields)
    dataset_class = CaptionDataset
    target_place = 2
    holds_several_targets = True
    scores_outputs = True
    shows_confidence = False
    cfg: CaptionConfig
    _judged: CaptionDataset
    _cider: "BatchwiseCider | None" = None

    @property
    def generates_in_validation(self) -> bool:
        """Return whether validation generates captions (--eval-cider)."""
        return self.cfg.eval_cider

    def build_dataset(self, tsv: TsvFile, split: str) -> CaptionDataset:
        """Return the data set of a split's file."""
        return CaptionDataset(
            tsv,
            self.options,
            split,
            any_reference=self.cfg.any_reference,
            max_references=self.cfg.max_references,
        )

    def load_dataset(self, split: str, combine: bool = False, epoch: int = 1, **kwargs: Any) -> None:
        """Load a split. CIDEr counts n-grams in the last loaded split other than train."""
        super().load_dataset(split, combine, epoch, **kwargs)
        if split != "train":
            self._judged, self._cider = self.dataset(split), None
            for name in ("_scenes", "_wording"):
                vars(self).pop(name, None)

    @cached_property
    def _scenes(self) -> dict[str, Scene] | None:
        """The content of the evaluated split's scenes; None if it is not known."""
        return scenes_beside(Path(self._judged.tsv.path))

    @cached_property
    def _wording(self) -> KnownWording | None:
        """The wording of the training captions; None without a training file, and for scenes, whose grammar is known.

        It is read when captions are first judged, since that takes a while on large files.
        """
        *training, _ = self.cfg.data.split(",")
        return self._wording_of(Path(training[0])) if training and self._scenes is None else None

    def know_captions(self, file: Path) -> None:
        """Read the captions by whose wording others are judged, from a TSV file with the columns of the task."""
        self._wording = self._wording_of(file)

    def _wording_of(self, file: Path) -> KnownWording:
        captions = captions_of(file, parse_columns(self.cfg.selected_cols)[self.target_place])
        return KnownWording(captions, {} if self._scenes is None else scene_kinds())

    @cached_property
    def _reward(self) -> CaptionReward:
        """The score of captions in training, from the references of the training file that is loaded first.

        It is made when it is first needed, since most trainings do without.
        """
        if "train" not in self.datasets:
            raise InputError("--score-weight: scores captions by the training captions, which are not loaded")
        dataset = cast(CaptionDataset, self.dataset("train"))
        try:
            reward = CaptionReward(
                dataset.learned_references(), end=self.target_dictionary.eos(), one_each=not dataset.any_reference
            )
        except InputError as error:
            raise InputError(f"--score-weight: {dataset.tsv.path}: {error}") from error
        logger.info(
            "%s: the captions of %d rows score those of the student; a perfect one has a CIDEr of %.2f over tokens",
            *(dataset.tsv.path, reward.number, reward.perfect),
        )
        return reward

    def output_scores(
        self, outputs: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, target_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the `CaptionReward` of captions: (B, M, T), (B, M), (B, K, S), (B, K) -> (B, M), about 1 for perfect.

        Raises:
            InputError: if the training captions are not loaded, or cannot score others.
        """
        return self._reward(outputs, lengths, targets, target_lengths)

    @property
    def cider(self) -> "BatchwiseCider":
        """Return CIDEr with the n-gram frequencies of the evaluated split."""
        from narvl_plugin.scoring.sentences import BatchwiseCider  # imports libraries that take a second

        if self._cider is None:
            self._cider = BatchwiseCider(self._judged.all_references())
        return self._cider

    def path_options(self, args: Any) -> dict[str, Any]:
        """Return how to search for the most probable captions; see `search_options`."""
        options = super().path_options(args)
        if not self.cfg.ngram_automaton:
            return options
        lengths = options["constraint"]
        if options["beam_size"] > 1 or options["no_repeat_ngram"] or str(self.cfg.mbr) != "none":
            raise InputError(
                f"--ngram-automaton {self.cfg.ngram_automaton}: finds the one best caption; take --beam 1, "
                "--no-repeat-ngram-size 0 and no --mbr"
            )
        if not isinstance(lengths, LengthRange):
            raise InputError(f"--ngram-automaton {self.cfg.ngram_automaton}: takes no other constraint than lengths")
        if not 0 <= self.cfg.ngram_weight < math.inf:
            raise InputError(f"--ngram-weight {self.cfg.ngram_weight}: expected a number from 0")
        automaton = _ngrams(self.cfg.ngram_automaton, self.codec)
        return options | {"constraint": NgramConstraint(automaton, self.cfg.ngram_weight, lengths)}

    def choice_options(self, args: Any) -> dict[str, Any]:
        """Return how to choose among captions.

        Raises:
            InputError: if the captions for n-gram frequencies are missing.
        """
        if str(self.cfg.mbr) == "none":
            return {}
        from narvl_plugin.scoring.sentences import BatchwiseCider, sentence_bleu  # take a second to import

        if str(self.cfg.mbr) == "bleu":
            return {"agreement": partial(self._agreement, sentence_bleu)}
        if not self.cfg.mbr_frequencies:
            raise InputError("--mbr cider needs the frequencies of n-grams; give --mbr-frequencies TRAIN.tsv")
        captions = cast(CaptionDataset, self.open_file(self.cfg.mbr_frequencies, "valid"))
        return {"agreement": partial(self._agreement, BatchwiseCider(captions.all_references()))}

    def beam_searches(self, frequencies: Path | None) -> dict[str, Search]:
        """Return the decoding methods of students beside greedy search; see `ways_to_decode`."""
        wide = {"beam": 16, **ANY_NGRAM}
        ways = super().beam_searches(frequencies)
        ways["beam 5, no trigram twice"] = Search({"beam": 5, "no_repeat_ngram_size": REPEATED}, {})
        ways["beam 16, expected BLEU"] = Search(wide, {"mbr": "bleu"})
        if frequencies is not None:
            options = {"mbr": "cider", "mbr_frequencies": str(frequencies)}
            ways["beam 16, expected CIDEr"] = Search(wide, options)
        return ways

    def is_invalid(self, tokens: torch.Tensor) -> bool:
        """Return whether tokens (T,) are an empty caption or repeat a trigram."""
        words = self.codec.decode(tokens).split()
        ngrams = [tuple(words[place : place + REPEATED]) for place in range(len(words) - REPEATED + 1)]
        return not words or len(set(ngrams)) < len(ngrams)

    def _agreement(self, score: "Score", outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the scores of H captions (rows) against H captions as references (columns): (H, H)."""
        texts = [self.codec.decode(tokens) for tokens in outputs]
        captions = [text for text in texts for _ in texts]
        references = [[text] for _ in texts for text in texts]
        return torch.tensor(score(captions, references)).view(len(texts), len(texts))

    def correctness(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[float]:
        """Return 1 for each caption that equals a reference of its sample word by word, else 0."""
        captions = [plain_words(self.codec.decode(beam[0]["tokens"])) for beam in hypotheses]
        return [
            float(caption in [plain_words(text) for text in texts])
            for caption, texts in zip(captions, sample["references"], strict=True)
        ]

    def validation_scores(self, sample: dict[str, Any], hypotheses: Hypotheses) -> dict[str, list[float]]:
        """Return the CIDEr of each caption; its `CaptionTruth`, if the content of images is known; its `Wording`.

        The `Wording` needs known captions. In a training on scenes, whose grammar is known, it is left out.
        """
        captions = [self.codec.decode(beam[0]["tokens"]) for beam in hypotheses]
        scores = {"cider": self.cider(captions, sample["references"])}
        if self._scenes is not None:
            ids = [str(unique_id) for unique_id in sample["id"]]
            truth = [truth_of(text, scene_of(one, self._scenes)) for one, text in zip(ids, captions, strict=True)]
            scores |= {name: [getattr(each, name) for each in truth] for name in CaptionTruth._fields}
        if self._wording is not None:
            found = [self._wording.of(text) for text in captions]
            scores |= {name: [getattr(each, name) for each in found] for name in Wording._fields}
        return scores

    def written_targets(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[str | None]:
        """Return the distinct captions of each sample, joined by `&&`; see `BaseTask.written_targets`."""
        written = []
        for beam in hypotheses:
            texts = (" ".join(self.codec.decode(one["tokens"]).split()) for one in beam)
            written.append(REFERENCE_SEPARATOR.join(dict.fromkeys(text for text in texts if text)) or None)
        return written
