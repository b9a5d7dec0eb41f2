"""The task `snli_ve`: it predicts whether an image entails a hypothesis (yes, no or maybe)."""

from dataclasses import dataclass, field
from typing import Any

from narvl_plugin.data.answers import AnswerTrie
from narvl_plugin.data.snli_ve import SnliVeDataset
from narvl_plugin.data.text import ENTAILMENT_ANSWERS
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.tasks.answers import AnswerTask, AnswerTaskConfig
from narvl_plugin.tasks.base import Hypotheses


@dataclass
class SnliVeConfig(AnswerTaskConfig):
    """Options of the task `snli_ve`. Its validation score is the accuracy, `snli_score`."""

    selected_cols: str = field(
        default="0,2,3,4,5",
        metadata={"help": "TSV columns (from 0) of id, image, hypothesis, caption and label, in this order"},
    )
    add_caption: bool = field(default=False, metadata={"help": "read the caption, too, as the first of two texts"})


class SnliVeTask(AnswerTask):
    """Visual entailment; see SnliVeDataset for the columns. A student needs 3 queries."""

    name = "snli_ve"
    verb = "entails"
    text_column = "hypothesis"
    config_class = SnliVeConfig
    validation_metrics = ("snli_score",)
    dataset_class = SnliVeDataset
    target_place = 4
    trie: AnswerTrie
    cfg: SnliVeConfig

    def __init__(self, cfg: SnliVeConfig, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        self.trie = AnswerTrie(ENTAILMENT_ANSWERS.values(), self.codec)

    def build_dataset(self, tsv: TsvFile, split: str) -> SnliVeDataset:
        """Return the data set of a split's file."""
        return SnliVeDataset(
            tsv,
            self.options,
            split,
            prompt_type=str(self.cfg.prompt_type),
            trie=self.trie,
            answer_room=self.answer_room(split),
            add_caption=self.cfg.add_caption,
        )

    def written_targets(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[str | None]:
        """Return the label of each best answer; see `BaseTask.written_targets`."""
        labels = {answer: label for label, answer in ENTAILMENT_ANSWERS.items()}
        return [labels.get(self.codec.decode(beam[0]["tokens"])) for beam in hypotheses]
