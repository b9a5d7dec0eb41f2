"""The task `vqa_gen`: it predicts a short answer to a question about an image."""

from dataclasses import dataclass, field
from typing import Any, Optional

from narvl_plugin.data.answers import AnswerTrie, read_answers
from narvl_plugin.data.text import CONFIDENCE_MARK, REFERENCE_SEPARATOR
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.data.vqa_gen import VqaGenDataset
from narvl_plugin.tasks.answers import AnswerTask, AnswerTaskConfig
from narvl_plugin.tasks.base import Hypotheses


@dataclass
class VqaGenConfig(AnswerTaskConfig):
    """Options of the task `vqa_gen`. Its validation score is the soft accuracy, `vqa_score`."""

    selected_cols: str = field(
        default="0,5,2,3,4",
        metadata={"help": "TSV columns (from 0) of id, image, question, answers and objects, in this order"},
    )
    add_object: bool = field(default=False, metadata={"help": "name the objects in the image after the question"})
    max_object_length: int = field(default=30, metadata={"help": "maximum number of objects to name"})
    ans2label_file: Optional[str] = field(
        default=None,
        metadata={
            "help": "pickled dict whose keys are all answers, if they are a closed list (trainval_ans2label.pkl)"
        },
    )


class VqaGenTask(AnswerTask):
    """Visual question answering; see VqaGenDataset for the columns. A student needs 6 queries."""

    name = "vqa_gen"
    verb = "answer"
    text_column = "question"
    config_class = VqaGenConfig
    validation_metrics = ("vqa_score",)
    dataset_class = VqaGenDataset
    target_place = 3
    cfg: VqaGenConfig

    def __init__(self, cfg: VqaGenConfig, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        file = cfg.ans2label_file
        self.trie = AnswerTrie(read_answers(file), self.codec) if file else None

    def build_dataset(self, tsv: TsvFile, split: str) -> VqaGenDataset:
        """Return the data set of a split's file."""
        return VqaGenDataset(
            tsv,
            self.options,
            split,
            prompt_type=str(self.cfg.prompt_type),
            trie=self.trie,
            answer_room=self.answer_room(split),
            max_objects=self.cfg.max_object_length if self.cfg.add_object else None,
        )

    def written_targets(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[str | None]:
        """Return the best answer to each question with confidence 1, so that all rows have the same weight."""
        marks = (REFERENCE_SEPARATOR, CONFIDENCE_MARK)
        answers = [" ".join(self.codec.decode(beam[0]["tokens"]).split()) for beam in hypotheses]
        return [
            f"1.0{CONFIDENCE_MARK}{answer}" if answer and not any(mark in answer for mark in marks) else None
            for answer in answers
        ]
