"""The common parts of all single tasks: options, files by split and epoch, generators, validation."""

import json
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Optional, Self, cast

import torch
from omegaconf import MISSING

from narvl_plugin.checkpoints.record import Checkpoint
from narvl_plugin.ctc import LengthRange, OutputConstraint
from narvl_plugin.data.columns import check_columns
from narvl_plugin.data.dataset import DatasetOptions, TsvDataset
from narvl_plugin.data.tsv import TsvFile, no_file
from narvl_plugin.errors import InputError
from narvl_plugin.generation.parallel_generator import ParallelGenerator, Student
from narvl_plugin.generation.rescoring import TeacherRescorer
from narvl_plugin.models.narvl import NarvlModel
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.tasks.common import CommonConfig, CommonTask
from narvl_plugin.tasks.options import options_of_all
from narvl_plugin.tasks.registry import TASKS

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")

LIMITS = {
    "num_bins": (0, 100_000),
    "patch_image_size": (1, 4_096),
    "max_image_size": (1, 65_535),
    "max_src_length": (1, 100_000),
    "max_tgt_length": (1, 100_000),
    "max_object_length": (0, 100_000),
    "max_references": (0, 100_000),
    "valid_batch_size": (1, 1_000_000),
}
"""Smallest and largest value of sizes. A checkpoint may claim any size; the largest allowed takes at most 1 GB."""

Hypotheses = list[list[dict[str, Any]]]
"""The hypotheses of each of B samples, best first, in the form of fairseq's generators."""


ANY_NGRAM = {"no_repeat_ngram_size": 0}
RESCORING_WEIGHTS = (0.5, 1.0, 4.0)
"""The teacher's weights that `BaseTask.ways_to_decode` tries."""


class Search(NamedTuple):
    """A decoding method: options of generation and of the task."""

    generation: dict[str, Any]
    task_options: dict[str, Any]


class Bins(NamedTuple):
    """The labels of box coordinates.

    Attributes:
        first: the label of `<bin_0>`.
        number: the number of bins.
        max_image_size: the side that the bins cover, in pixels.
    """

    first: int
    number: int
    max_image_size: int


@dataclass
class BaseTaskConfig(CommonConfig):
    """Options of every single task, with OFA's names."""

    data: str = field(
        default=MISSING,
        metadata={
            "help": "TSV files, joined by commas: TRAIN1,...,TRAINK,VALID for training, where epoch e reads "
            "TRAIN number (e - 1) mod K + 1; to generate, the last one is read"
        },
    )
    selected_cols: str = field(
        default=MISSING,
        metadata={"help": "numbers (from 0) of the TSV columns, in the order in which the task reads them"},
    )
    patch_image_size: int = field(default=480, metadata={"help": "side of the square image, in pixels"})
    max_src_length: int = field(default=128, metadata={"help": "words of an input text that are kept"})
    max_tgt_length: int = field(default=30, metadata={"help": "words of a target that are kept"})
    imagenet_default_mean_and_std: bool = field(
        default=False, metadata={"help": "normalise images by ImageNet's mean and deviation, not by 0.5"}
    )
    eval_args: str = field(
        default="{}",
        metadata={"help": 'options of the generator in validation, as JSON: {"beam": 5, "max_len_b": 16}'},
    )
    rescore_with: Optional[str] = field(
        default=None,
        metadata={"help": "checkpoint of a teacher that rescores the outputs of a student's beam (--beam above 1)"},
    )
    rescore_weight: float = field(
        default=1.0, metadata={"help": "factor of the teacher's log-probabilities for --rescore-with"}
    )
    abstain_below: float = field(
        default=0.0,
        metadata={
            "help": "confidence (0 to 1) below which a student's output is left empty; see narvl calibrate. Of sets of "
            "boxes and graphs, it is the probability of the most probable element"
        },
    )
    member: Optional[str] = field(
        default=None,
        metadata={
            "help": "for a student trained with --task multitask: name of the member whose queries to use, by default "
            "that of the task"
        },
    )


def training_paths(data: str) -> list[str]:
    """Return the training files of a data argument: all files but the last, or the only file."""
    paths = data.split(",")
    return paths[:-1] or paths


class BaseTask(CommonTask):
    """A vision-language task on TSV files. Subclasses build their datasets and score hypotheses in validation.

    Attributes:
        name: fairseq's name of the task.
        verb: what a model of the task does with an image, such as `caption`; by default the task's name.
        text_column: the column with the text that is read beside an image, None where there is none.
        constraint: the allowed outputs of students, where they are not the task's own.
        config_class: the dataclass of its options.
        validation_metrics: names of the scores of hypotheses, the main one first.
        dataset_class: the class that reads the rows.
        target_place: position of the target among the selected columns.
        holds_several_targets: whether the target column may hold several targets. A student may learn to predict any
            of them.
        searching: the task options that select a search over outputs instead of scoring all answers.
        predicts_sets: whether outputs are sets of elements, each with a confidence of its own.
        shows_confidence: whether confidence is shown beside outputs even without a calibration.
        options: options of the data sets.
    """

    name: ClassVar[str]
    verb: ClassVar[str]
    text_column: ClassVar[str | None] = None
    constraint: OutputConstraint | None = None
    config_class: ClassVar[type[BaseTaskConfig]]
    validation_metrics: ClassVar[tuple[str, ...]]
    dataset_class: ClassVar[type[TsvDataset]]
    target_place: ClassVar[int]
    holds_several_targets: ClassVar[bool] = False
    searching: ClassVar[dict[str, Any]] = {}
    predicts_sets: ClassVar[bool] = False
    shows_confidence: ClassVar[bool] = True
    datasets: dict[str, TsvDataset]
    cfg: BaseTaskConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            TASKS[cls.name] = cls
            if "verb" not in vars(cls):
                cls.verb = cls.name

    def __init__(self, cfg: BaseTaskConfig, **kwargs: Any) -> None:
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(cfg, name, least) <= most:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {getattr(cfg, name)}: expected a number from {least} to {most}")
        super().__init__(cfg, **kwargs)
        self.options = DatasetOptions(
            codec=self.codec,
            patch_image_size=cfg.patch_image_size,
            max_src_length=cfg.max_src_length,
            max_tgt_length=cfg.max_tgt_length,
            imagenet_normalisation=cfg.imagenet_default_mean_and_std,
            skip_budget=self.skip_budget,
        )
        logger.info("dictionary: %d symbols from %s", len(self.codec.dictionary), cfg.bpe_dir)

    @classmethod
    def from_checkpoints(
        cls,
        checkpoints: Sequence[Checkpoint],
        given: Mapping[str, Any],
        *,
        role: Literal["teacher", "student"] | None = None,
        device: str | torch.device = "cpu",
    ) -> tuple[Self, list[OfaModel]]:
        """Return the task, with the training options of the first checkpoint, and the models of all checkpoints.

        Args:
            checkpoints: one checkpoint, or several for an ensemble.
            given: task options that replace those of the training; None counts as not given.
            role: the kind of model that the caller needs; None accepts both.
            device: the device of the models.

        Raises:
            MissingInput, InputError: if a checkpoint cannot be used for this task.
        """
        for checkpoint in checkpoints:
            checkpoint.require(role)
        task = cls.with_options_of(checkpoints, given)
        return task, [task.model_of(checkpoint).to(device) for checkpoint in checkpoints]

    @classmethod
    def with_options_of(cls, checkpoints: Sequence[Checkpoint], given: Mapping[str, Any], **kwargs: Any) -> Self:
        """Return the task with the options of the training of the first checkpoint.

        Args:
            checkpoints: one, or several as an ensemble.
            given: options of the task that differ; those that are None count as not given.
            **kwargs: arguments of the task, such as a codec.

        Raises:
            InputError: the options cannot be used.
        """
        own = {name: value for name, value in given.items() if value is not None}
        return cls(cast(BaseTaskConfig, options_of_all(checkpoints, cls.name, cls.config_class, own)), **kwargs)

    def model_of(self, checkpoint: Checkpoint) -> OfaModel:
        """Return a checkpoint's model, which answers as the task.

        Raises:
            InputError: the checkpoint cannot be used for this task.
        """
        model = checkpoint.build_model(self.use_of(training=False), len(self.codec.dictionary))
        try:
            self.choose_member(model)
            self.check_model(model)
        except InputError as error:
            raise InputError(f"{checkpoint.file}: {error}") from error
        return model

    @property
    def training_paths(self) -> list[str]:
        """Return the training files."""
        return training_paths(self.cfg.data)

    def split_path(self, split: str, epoch: int) -> str:
        """Return the file of a split in an epoch (from 1).

        Raises:
            InputError: if the split is unknown, or if training and validation would read the same file.
            MissingInput: if a file of the split does not exist, even one of a later epoch.
        """
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
        paths = self.training_paths if split == "train" else self.cfg.data.split(",")[-1:]
        if split == "train" and "valid" in self.datasets and paths[0] == self.datasets["valid"].tsv.path:
            raise InputError(
                f"{self.cfg.data}: names one file for training and validation; give TRAIN.tsv,VALID.tsv, or "
                "--disable-validation"
            )
        # Files of later epochs are checked now, before the training starts.
        for path in paths:
            if not Path(path).is_file():
                raise no_file(path, f" (split {split!r} of the data argument {self.cfg.data})")
        return paths[(epoch - 1) % len(paths)]

    def load_dataset(self, split: str, combine: bool = False, epoch: int = 1, **kwargs: Any) -> None:
        """Load a split: the file of this epoch for train, the last file for valid and test."""
        dataset = self.open_file(self.split_path(split, epoch), split)
        self.datasets[split] = dataset
        logger.info("%s: %d rows for split %r", dataset.tsv.path, len(dataset), split)

    def open_file(self, path: str, split: str) -> TsvDataset:
        """Return the data set of a TSV file.

        Raises:
            InputError: if a column holds another kind of data, see `check_columns`.
        """
        tsv = TsvFile(path, self.cfg.selected_cols)
        dataset = self.build_dataset(tsv, split)
        check_columns(tsv, dataset.column_names)
        return dataset

    def build_dataset(self, tsv: TsvFile, split: str) -> TsvDataset:
        """Return the data set of a split's file, with the task's options."""
        raise NotImplementedError

    @property
    def generates_in_validation(self) -> bool:
        """Return whether validation generates hypotheses, with the options of --eval-args."""
        raise NotImplementedError

    def validation_scores(self, sample: dict[str, Any], hypotheses: Hypotheses) -> dict[str, list[float]]:
        """Return the scores of the best hypotheses of the B samples, by name, see `validation_metrics`.

        The main score is of all samples. Others may be of some of them.
        """
        raise NotImplementedError

    def written_targets(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[str | None]:
        """Return the hypotheses of the B samples as targets in the form of the TSV column.

        If the column may hold several targets, all hypotheses are written, else the best one. It is None if the column
        cannot hold the hypothesis.
        """
        raise NotImplementedError

    def choose_member(self, model: OfaModel) -> None:
        """Let a student of several tasks answer as the member that --member names, by default as this task."""
        if isinstance(model, NarvlModel) and (model.members or self.cfg.member):
            model.answer_as(self.cfg.member or str(self.cfg._name))

    def check_model(self, model: OfaModel) -> None:
        """Store the limits of text lengths of a model.

        Raises:
            InputError: if the options exclude the model.
        """
        self.options = replace(
            self.options,
            source_positions=model.encoder.max_positions(),
            target_positions=None if model.is_student else model.decoder.max_positions(),
        )

    def search_options(self, args: Any) -> dict[str, Any]:
        """Return the options of ParallelGenerator for a student's search.

        Args:
            args: fairseq's options of generation; it uses --beam, --min-len, --max-len-b and --no-repeat-ngram-size.

        Raises:
            InputError: if no output can have such lengths, or if an option of the task needs another one.
        """
        return self.path_options(args) | self.choice_options(args)

    def path_options(self, args: Any) -> dict[str, Any]:
        """Return how to search for the most probable outputs; see `search_options`."""
        shortest, longest = getattr(args, "min_len", 1), getattr(args, "max_len_b", 200)
        slope = getattr(args, "max_len_a", 0)
        if slope or not 0 <= shortest <= longest or longest == 0:
            raise InputError(
                f"--min-len {shortest} --max-len-a {slope} --max-len-b {longest}: a student's outputs have from "
                "--min-len to --max-len-b tokens, whatever the length of the source"
            )
        return {
            "beam_size": getattr(args, "beam", 1),
            "constraint": self.constraint or LengthRange(shortest, longest),
            "no_repeat_ngram": getattr(args, "no_repeat_ngram_size", 0),
        }

    def choice_options(self, args: Any) -> dict[str, Any]:
        """Return how to choose among the most probable outputs, and how to score their confidence."""
        return {}

    def with_answers(self, answers: Sequence[str]) -> Self:
        """Return the task with a closed list of outputs.

        Raises:
            InputError: the task's outputs are no answers, or the vocabulary spells two answers alike.
        """
        raise InputError(f"the task {self.name} has no list of answers")

    @property
    def scores_a_list(self) -> bool:
        """Whether the probabilities of all outputs of a closed list are computed."""
        return False

    @property
    def bins(self) -> Bins | None:
        """The labels of box coordinates; None if the outputs are not boxes."""
        return None

    def boxes(
        self, tokens: torch.Tensor, width_ratio: torch.Tensor, height_ratio: torch.Tensor
    ) -> list[list[float]] | None:
        """Return the boxes that tokens spell, for tasks whose outputs are boxes; see `BoxTask.boxes`."""
        return None

    def teacher_searches(self) -> dict[str, Search]:
        """Return the decoding methods of the task's teachers by name of the system, the usual one first."""
        return {
            "teacher_beam5": Search({"beam": 5}, self.searching),
            "teacher_greedy": Search({"beam": 1}, self.searching),
        }

    def student_searches(self) -> dict[str, Search]:
        """Return the decoding methods of the task's students by name of the system."""
        return {
            "student_greedy": Search({"beam": 1}, self.searching),
            "student_beam5": Search({"beam": 5}, self.searching),
        }

    def ways_to_decode(
        self, teacher: Path | None, frequencies: Path | None, ngrams: Sequence[Path] = ()
    ) -> dict[str, Search]:
        """Return the decoding methods of the task's students by name, greedy first.

        Args:
            teacher: a teacher's checkpoint for rescoring; None for no rescoring.
            frequencies: a TSV file of captions for the expected CIDEr; None for no expected CIDEr.
            ngrams: files of `narvl ngrams`.

        Raises:
            InputError: if the task has no n-grams.
        """
        if ngrams and not hasattr(self.cfg, "ngram_automaton"):
            raise InputError(f"--ngram-automaton {ngrams[0]}: is for captions; the student was trained for {self.name}")
        ways = {"greedy": Search({"beam": 1, **ANY_NGRAM}, self.searching), **self.beam_searches(frequencies)}
        if teacher is not None:
            for weight in RESCORING_WEIGHTS:
                options = {**self.searching, "rescore_with": str(teacher), "rescore_weight": weight}
                ways[f"beam 5 and {weight:g} of the teacher"] = Search({"beam": 5, **ANY_NGRAM}, options)
        for file in ngrams:
            for name, given in ((f"{file.name}, ruled out", {"ngram_weight": 0.0}), (f"{file.name}, weighted", {})):
                ways[name] = Search({"beam": 1, **ANY_NGRAM}, {"ngram_automaton": str(file), **given})
        return ways

    def beam_searches(self, frequencies: Path | None) -> dict[str, Search]:
        """Return the decoding methods of the task's students beside greedy search; see `ways_to_decode`."""
        return {f"beam {width}": Search({"beam": width, **ANY_NGRAM}, {}) for width in (5, 16)}

    def is_invalid(self, tokens: torch.Tensor) -> bool:
        """Return whether tokens (T,) are an invalid output of the task."""
        raise NotImplementedError

    def build_generator(
        self,
        models: Sequence[torch.nn.Module],
        args: Any,
        seq_gen_cls: type | None = None,
        extra_gen_cls_kwargs: dict[str, Any] | None = None,
        prefix_allowed_tokens_fn: Any = None,
    ) -> Any:
        """Return the parallel generator for students, and fairseq's search for teachers.

        Raises:
            InputError: if the ensemble has both kinds, or if an option does not apply to teachers.
        """
        students = [model.is_student for model in models]
        if all(students):
            return ParallelGenerator(
                cast(Sequence[Student], models),
                self.target_dictionary,
                print_alignment=getattr(args, "print_alignment", None),
                nbest=getattr(args, "nbest", 1),
                rescorer=self.load_rescorer(next(models[0].parameters())) if self.cfg.rescore_with else None,
                abstain_below=self.cfg.abstain_below,
                **self.search_options(args),
            )
        if any(students):
            raise InputError("--path names teachers and students; an ensemble must be of one kind")
        for name in ("rescore_with", "abstain_below", "ngram_automaton"):
            if getattr(self.cfg, name, None):
                raise InputError(f"--{name.replace('_', '-')} is for students; --path names a teacher")
        from narvl_plugin.generation.teacher import build_search  # imports fairseq

        return build_search(self, models, args, seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn)

    def load_rescorer(self, like: torch.Tensor) -> TeacherRescorer:
        """Return the rescorer with the teacher of --rescore-with, on the device and in the type of `like`.

        If `like` has no values yet (device meta), the teacher is not moved. The generator moves it later with the
        student.

        Raises:
            InputError: if the checkpoint is a student, or if its decoder starts from a prompt. A student's batch has no
                prompts.
        """
        file = str(self.cfg.rescore_with)
        shared = ("data", "bpe_dir", "num_bins", "patch_image_size", "ans2label_file")
        given = {name: getattr(self.cfg, name, None) for name in shared}
        task, (teacher,) = type(self).from_checkpoints([Checkpoint.read(file)], given, role="teacher")
        prompt = str(getattr(task.cfg, "prompt_type", "none"))
        if prompt != "none":
            raise InputError(f"--rescore-with {file}: was trained with --prompt-type {prompt}; it must be none")
        moved = teacher if like.is_meta else teacher.to(like)
        return TeacherRescorer(moved, self.target_dictionary, self.cfg.rescore_weight)

    def correctness(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[float]:
        """Return the correctness (0 to 1) of the best hypothesis of each of B samples; confidence should match it."""
        return self.validation_scores(sample, hypotheses)[self.validation_metrics[0]]

    def confidence(self, beam: list[dict[str, Any]]) -> float:
        """Return the model's probability that the best of a sample's hypotheses is correct.

        For a teacher, it is the probability of the hypothesis.
        """
        best = beam[0]
        if "confidence" in best:
            return float(best["confidence"])
        return float(best["positional_scores"].sum().exp())

    def element_confidences(self, beam: list[dict[str, Any]]) -> list[float]:
        """Return the model's probability that each element of the best of a sample's hypotheses is correct.

        It is empty for tasks whose outputs are no sets; see `predicts_sets`.
        """
        return []

    def tree(self, beam: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the best of a sample's hypotheses as a tree of plain values, for tasks whose outputs are trees.

        A node has a `label`, a `probability` and `children`. None for other tasks, and for an empty output.
        """
        return None

    def inference_step(
        self,
        generator: Any,
        models: Sequence[torch.nn.Module],
        sample: dict[str, Any],
        prefix_tokens: torch.Tensor | None = None,
        constraints: torch.Tensor | None = None,
    ) -> Hypotheses:
        """Return the hypotheses of each of the B samples, best first, in the form of fairseq's generators.

        Teachers start from `<s>`, as in training. fairseq's default start is `</s>`.
        """
        start = {} if isinstance(generator, ParallelGenerator) else {"bos_token": self.target_dictionary.bos()}
        with torch.no_grad():
            return generator.generate(models, sample, prefix_tokens=prefix_tokens, constraints=constraints, **start)

    def generator_options(self) -> Namespace:
        """Return the options of the generator in validation.

        Raises:
            InputError: if --eval-args is not a JSON object.
        """
        try:
            options = json.loads(self.cfg.eval_args)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"--eval-args {self.cfg.eval_args:.80}: is not JSON ({error})") from error
        if not isinstance(options, dict):
            raise InputError(f'--eval-args {self.cfg.eval_args:.80}: expected a JSON object such as {{"beam": 5}}')
        return Namespace(**options)
