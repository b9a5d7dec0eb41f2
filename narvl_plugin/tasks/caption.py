"""The task `caption`: a picture to a sentence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairseq.tasks import register_task
from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs

from narvl_plugin.data.caption import CaptionDataset
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.scoring.tokenization import plain_words
from narvl_plugin.tasks.base import BaseTask, BaseTaskConfig, Hypotheses


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
            "help": "train a student to say any one of a row's references (joined by &&), which criterion qctc sums "
            "over; without it each epoch teaches another one"
        },
    )
    eval_cider: bool = field(
        default=False,
        metadata={"help": "generate in validation and log CIDEr as `cider` (for --best-checkpoint-metric)"},
    )
    eval_args: str = field(
        default='{"beam": 5, "max_len_b": 16, "no_repeat_ngram_size": 3}',
        metadata={
            "help": "options of the generator in validation, as JSON; a student's are beam, min_len, max_len_b and "
            "no_repeat_ngram_size"
        },
    )


@register_task("caption", dataclass=CaptionConfig)
class CaptionTask(BaseTask):
    """Captioning; see CaptionDataset for the columns."""

    validation_metrics = ("cider",)
    target_place = 2
    holds_several_targets = True
    cfg: CaptionConfig

    @property
    def generates_in_validation(self) -> bool:
        """Say whether validation generates captions (--eval-cider)."""
        return self.cfg.eval_cider

    def build_dataset(self, tsv: TsvFile, split: str) -> CaptionDataset:
        """Return the data set of a split's file."""
        return CaptionDataset(tsv, self.options, split, any_reference=self.cfg.any_reference)

    def load_dataset(self, split: str, combine: bool = False, epoch: int = 1, **kwargs: Any) -> None:
        """Load a split; that of validation with its n-gram frequencies where CIDEr is asked for."""
        super().load_dataset(split, combine, epoch, **kwargs)
        if split == "valid" and self.cfg.eval_cider:
            self.cider = BatchwiseCider(self.datasets[split].all_references())

    def validation_scores(self, sample: dict[str, Any], hypotheses: Hypotheses) -> dict[str, list[float]]:
        """Return the CIDEr of each caption."""
        captions = [self.codec.decode(beam[0]["tokens"]) for beam in hypotheses]
        return {"cider": self.cider(captions, sample["references"])}

    def written_targets(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[str]:
        """Return the different captions of each sample, joined by `&&`."""
        written = []
        for beam in hypotheses:
            texts = (" ".join(self.codec.decode(one["tokens"]).split()) for one in beam)
            written.append(REFERENCE_SEPARATOR.join(dict.fromkeys(text for text in texts if text)))
        return written


class BatchwiseCider:
    """CIDEr with the n-gram frequencies of a whole validation set, taken batch by batch.

    The mean over all captions, in whatever batches and processes, is the CIDEr of the set; a batch's own
    frequencies would give another number. Words are split plainly, as Java per batch would be slow.
    """

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        whole = CiderScorer()
        whole.crefs = [cook_refs([plain_words(text) for text in texts]) for texts in references]
        whole.compute_doc_freq()
        self._frequencies = whole.document_frequency
        self._pictures = len(whole.crefs)

    def __call__(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return the CIDEr (0 to 10) of each of B captions against its references."""
        batch = CiderScorer()
        for caption, texts in zip(captions, references, strict=True):
            batch += (plain_words(caption), [plain_words(text) for text in texts])
        batch.document_frequency = self._frequencies
        # The scorer counts pictures by its list of references, and walks along its list of captions.
        batch.crefs += [[]] * (self._pictures - len(batch.crefs))
        return [float(score) for score in batch.compute_cider()]
