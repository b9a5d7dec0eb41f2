"""Our tasks as fairseq trains and validates them: what is added to the tasks that answer.

The classes here are mixed into those of `tasks/`, before them, and fairseq's own task comes last; see `registered.py`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import torch
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from criterions.query_criterion import QueryCriterion
from narvl_plugin.data.dataset import STAND_IN, Rows, check_limits
from narvl_plugin.data.for_fairseq import FairseqRows, fairseq_dictionary
from narvl_plugin.data.survey import Survey, refuse_what_will_fail, survey
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import InputError, SkipBudget
from narvl_plugin.importing import leaving_logging_alone
from narvl_plugin.models.meta import without_weights
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.tasks.base import BaseTask, Hypotheses
from narvl_plugin.tasks.common import CommonConfig, CommonTask
from narvl_plugin.tasks.target_texts import TargetTexts

with leaving_logging_alone():
    from fairseq.criterions import CRITERION_REGISTRY, FairseqCriterion
    from fairseq.criterions.cross_entropy import CrossEntropyCriterion
    from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
    from fairseq.data import Dictionary
    from fairseq.data.iterators import EpochBatchIterator
    from fairseq.dataclass import FairseqDataclass
    from fairseq.logging import metrics
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
    from fairseq.optim import FairseqOptimizer
    from fairseq.optim.amp_optimizer import AMPOptimizer
    from fairseq.tasks import FairseqTask

STOCK_CRITERIONS = ("cross_entropy", "label_smoothed_cross_entropy")
"""fairseq's criterions that a teacher may be trained with."""
TEACHER_CRITERIONS = (CrossEntropyCriterion, LabelSmoothedCrossEntropyCriterion)
"""Their classes. Those that are derived from them are for teachers, too."""

Step = tuple[torch.Tensor, Any, dict[str, Any]]
"""Loss, sample size and what to log of a batch."""


class TrainedTask(CommonTask):
    """What fairseq's programs ask of every task: whole batches, precision, models and criterions of ours.

    Attributes:
        keeps_eos: whether the criterion has a student predict `</s>`, too, which takes a query.
        last_epoch: of the training, from 1; the trainer notes --max-epoch.
    """

    uses_ema = True  # has fairseq's trainer hand over the averaged model of --store-ema

    def __init__(
        self, cfg: CommonConfig, *, codec: TextCodec | None = None, skip_budget: SkipBudget | None = None, **_: Any
    ) -> None:
        FairseqTask.__init__(self, cfg)
        super().__init__(cfg, codec=codec, skip_budget=skip_budget)
        self.target_texts: TargetTexts | None = None  # of fairseq-generate alone
        self.keeps_eos = False
        self.last_epoch: float = math.inf
        self._surveyed = False
        self._last_built = ""
        self._iterated: list[FairseqRows] = []

    @cached_property
    def dictionary(self) -> Dictionary:
        """The vocabulary as fairseq knows it."""
        return fairseq_dictionary(self.codec.dictionary)

    @property
    def source_dictionary(self) -> Dictionary:
        """Return the dictionary; sources and targets share it, and it holds no blank."""
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """Return the dictionary; sources and targets share it, and it holds no blank."""
        return self.dictionary

    @classmethod
    def build_dictionary(cls, *args: Any, **kwargs: Any) -> Dictionary:
        """Raise InputError: fairseq-preprocess, which asks for it, makes files that no task of ours reads."""
        raise InputError(
            "fairseq-preprocess does not serve our tasks, which read TSV files as they are; narvl vocab makes a "
            "vocabulary of one"
        )

    def build_bpe(self, args: object) -> TargetTexts:
        """Return what fairseq-generate makes text with, from the codec of --bpe-dir; --bpe is not needed."""
        self.target_texts = TargetTexts(self.codec)
        return self.target_texts

    def build_model(self, cfg: FairseqDataclass, from_checkpoint: bool = False) -> OfaModel:
        """Return the model that the configuration describes, for this task's dictionary.

        Raises InputError for a model of another family than ours: fairseq's own would evaluate strings of a checkpoint.
        """
        name = _model_name(cfg)
        model_class = MODEL_REGISTRY.get(name) or ARCH_MODEL_REGISTRY.get(name)
        if model_class is None or not issubclass(model_class, OfaModel):
            raise InputError(
                f"the model {name!r:.80} is none of ours; --task {self.cfg._name} is for ofa_SIZE and narvl_SIZE"
            )
        if not from_checkpoint:
            cfg.vocabulary = self.codec.checksum  # in place, so that the checkpoints' configuration says it
        try:
            model: OfaModel = cast(Any, super()).build_model(cfg, from_checkpoint)
        except InputError:
            raise
        except Exception as error:  # a checkpoint may ask for anything
            if not from_checkpoint:
                raise
            raise InputError(f"the checkpoint's model cannot be built ({type(error).__name__}: {error})") from error
        self._last_built, self._built_student = str(name), model.is_student
        model.use = self.use_of(training=not from_checkpoint)
        return model

    def build_criterion(self, cfg: DictConfig, from_checkpoint: bool = False) -> FairseqCriterion:
        """Return the criterion for the model that was built last.

        Raises InputError for a student's criterion where that model is a teacher, for a teacher's where it is a
        student, and for one of fairseq's that is not for tokens. fairseq-validate takes it from the checkpoint, and
        some of fairseq's evaluate strings of their options.
        """
        name = _model_name(cfg)
        known = CRITERION_REGISTRY.get(name)
        if known is None or (known.__module__.startswith("fairseq.") and name not in STOCK_CRITERIONS):
            raise InputError(
                f"--criterion {name!r:.80}: is not for --task {self.cfg._name}; take qctc for a student, "
                "label_smoothed_cross_entropy for a teacher"
            )
        self._check_family(str(name), known)
        criterion = cast(Any, super()).build_criterion(cfg, from_checkpoint)
        self.keeps_eos = getattr(criterion, "keep_eos", False)
        return criterion

    def _check_family(self, name: str, criterion: type[FairseqCriterion]) -> None:
        """Raise InputError unless a criterion is for the kind of model that was built last, where one was."""
        if not self._last_built:
            return
        if self._built_student and issubclass(criterion, TEACHER_CRITERIONS):
            raise InputError(
                f"--criterion {name}: is for teachers (ofa_SIZE), and the model {self._last_built} is a student; take "
                "--criterion qctc"
            )
        if not self._built_student and issubclass(criterion, QueryCriterion):
            raise InputError(
                f"--criterion {name}: is for students (narvl_SIZE), and the model {self._last_built} is a teacher; "
                "take --criterion label_smoothed_cross_entropy, or adjust_label_smoothed_cross_entropy for answers"
            )

    def _iterable(self, dataset: Rows) -> FairseqRows:
        """Return a data set for fairseq, a loaded one always as the same object, by which fairseq keeps its batches."""
        self._iterated = [one for one in self._iterated if any(one.rows is rows for rows in self.datasets.values())]
        if not any(one.rows is dataset for one in self._iterated):
            self._iterated.append(FairseqRows(dataset))
        return next(one for one in self._iterated if one.rows is dataset)

    def get_batch_iterator(
        self,
        dataset: Rows,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> EpochBatchIterator:
        """Return fairseq's iterator over the batches of a dataset, none of its rows left out.

        fairseq makes batches a multiple of 8 by default and drops what is left over, from test sets too. Raises
        InputError where the limits leave no room for a row.
        """
        check_limits(max_tokens, max_sentences)
        kwargs |= {"required_batch_size_multiple": 1}
        iterator = cast(Any, super()).get_batch_iterator(
            self._iterable(dataset), max_tokens, max_sentences, *args, **kwargs
        )
        # Workers end with their epoch. Persistent ones would outlive an iterator that only the garbage
        # collector frees, and it closes their queues before they are told to stop: each costs five seconds.
        iterator.persistent_workers = False
        # Rows are shuffled already. With their batches left in that order, an update takes the same rows whether they
        # come as one batch, as several of --update-freq, or as one of each process.
        iterator.disable_shuffling = True
        return iterator

    def begin_epoch(self, epoch: int, model: torch.nn.Module) -> None:
        """Set the precision of matrix products, and once look at the rows of all files that are read from here on.

        Only fairseq's trainer calls this, so generation is left as it is. Raises InputError where more rows cannot be
        used than --skip-bad-rows forgives.
        """
        torch.set_float32_matmul_precision(str(self.cfg.matmul_precision))
        if not self._surveyed:
            self._surveyed = True
            refuse_what_will_fail(self.survey_files(model, epoch), self.skip_budget)

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """Return what fairseq adds to a checkpoint's extra_state: the bad rows that were skipped so far."""
        return {type(self).__name__: {"skipped_rows": self.skip_budget.skipped}}

    def set_checkpoint_dict(self, kept: dict[str, Any]) -> None:
        """Take over what a checkpoint kept; fairseq calls it where a training goes on, not where one starts anew."""
        self.skip_budget.restore(kept.get("skipped_rows", []))

    def survey_files(self, model: torch.nn.Module, epoch: int) -> list[Survey]:
        """Look at the rows of all files that the training reads from an epoch on, up to `last_epoch`."""
        raise NotImplementedError

    def train_step(
        self,
        sample: dict[str, Any],
        model: torch.nn.Module,
        criterion: FairseqCriterion,
        optimizer: FairseqOptimizer,
        update_num: int,
        ignore_grad: bool = False,
        ema_model: torch.nn.Module | None = None,
    ) -> Step:
        """Take the gradient of a batch's loss, and return loss, sample size and what to log; a stand-in counts 0.

        With --amp a CPU computes in bfloat16 what a GPU would in half precision; fairseq has only the latter.
        """
        if isinstance(optimizer, AMPOptimizer) and next(model.parameters()).device.type == "cpu":
            criterion = partial(_in_bfloat16, criterion)
        is_stand_in = bool(sample.get(STAND_IN))
        step = cast(Any, super()).train_step(
            sample, model, criterion, optimizer, update_num, ignore_grad or is_stand_in
        )
        return counting_nothing(step) if is_stand_in else step

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: FairseqCriterion) -> None:
        """Log the criterion's metrics, of batches that count."""
        if logging_outputs and not any(any(log.values()) for log in logging_outputs):
            metrics.log_scalar("loss", 0.0, weight=0)  # stand-ins only: there is nothing to divide by
            return
        cast(Any, super()).reduce_metrics(logging_outputs, criterion)


class TrainedSingleTask(TrainedTask, BaseTask):
    """What fairseq's programs ask of a single task.

    Attributes:
        score_prefix: what the names of validation's scores begin with; empty but in a mixture of tasks.
    """

    dataset_class: ClassVar[Any]

    def __init__(self, cfg: Any, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        self.score_prefix = ""
        self._averaged_model: torch.nn.Module | None = None

    def has_sharded_data(self, split: str) -> bool:
        """Say whether epochs read different files, which has fairseq load the dataset for every epoch."""
        return split == "train" and len(self.training_paths) > 1

    def rows_in_epoch(self, epoch: int) -> int:
        """Return how many rows the training file of an epoch has."""
        return len(TsvFile(self.split_path("train", epoch), self.cfg.selected_cols))

    def training_paths_of(self, first: int, last: float) -> list[str]:
        """Return the files, each once, that the epochs from `first` to `last`, which may be infinite, train on."""
        paths = self.training_paths
        epochs = range(first, int(min(last, first + len(paths) - 1)) + 1)
        return list(dict.fromkeys(paths[(epoch - 1) % len(paths)] for epoch in epochs))

    def survey_files(self, model: torch.nn.Module, epoch: int) -> list[Survey]:
        """Look at the rows of all files that the training reads from an epoch on, up to `last_epoch`."""
        paths = self.training_paths_of(epoch, self.last_epoch)
        return list(self.surveys(getattr(model, "num_queries", None), self.keeps_eos, paths))

    def surveys(self, num_queries: int | None, keeps_eos: bool, paths: Sequence[str]) -> Iterator[Survey]:
        """Look at these training files, then at those of validation; num_queries: those of a student."""
        loaded = self.datasets["train"]
        for path in paths:
            dataset = loaded if path == loaded.tsv.path else self.open_file(path, "train")
            yield survey(dataset, num_queries, keeps_eos=keeps_eos)
        for split, dataset in self.datasets.items():
            if split != "train":
                yield survey(dataset, num_queries, keeps_eos=keeps_eos)

    def build_model(self, cfg: FairseqDataclass, from_checkpoint: bool = False) -> OfaModel:
        """Return the model that the configuration describes, for this task's dictionary.

        With `from_checkpoint` it has no weights yet (they are on the meta device) and takes those of the checkpoint.
        """
        weightless = from_checkpoint and not getattr(cfg, "allow_mismatch", "")
        with without_weights() if weightless else nullcontext():
            model = cast(Any, super()).build_model(cfg, from_checkpoint)
        self.choose_member(model)
        self.prepare_validation(model)
        return model

    def prepare_validation(self, model: OfaModel) -> None:
        """Note how long texts may be for a model, and make the generator of validation, if it generates.

        Raises InputError for a model that options rule out.
        """
        self.check_model(model)
        if self.generates_in_validation:
            self.generator = self.build_generator([model], self.generator_options())

    def inference_step(
        self,
        generator: Any,
        models: Sequence[torch.nn.Module],
        sample: dict[str, Any],
        prefix_tokens: torch.Tensor | None = None,
        constraints: torch.Tensor | None = None,
    ) -> Hypotheses:
        """Return the hypotheses of each of the B samples, best first, as fairseq's generators give them.

        In fairseq-generate the targets' texts are remembered, which it asks for next.
        """
        if self.target_texts is not None:
            self.target_texts.remember(sample)
        return super().inference_step(generator, models, sample, prefix_tokens, constraints)

    def valid_step(
        self,
        sample: dict[str, Any],
        model: torch.nn.Module,
        criterion: FairseqCriterion,
        ema_model: torch.nn.Module | None = None,
    ) -> Step:
        """Return loss, sample size and what to log, with scores of generated hypotheses where they are asked for.

        They are those of the averaged model where there is one. With several references the loss is on the first one.
        """
        if ema_model is not None:
            model = ema_model
            if self.generates_in_validation and self._averaged_model is not ema_model:
                # fairseq's search keeps the model that it was built for.
                self._averaged_model = ema_model
                self.generator = self.build_generator([ema_model], self.generator_options())
        judged = sample
        if "first_reference" in sample:
            judged = with_first_reference(sample)
        loss, sample_size, logging_output = cast(Any, super()).valid_step(judged, model, criterion)
        if self.generates_in_validation:
            hypotheses = self.inference_step(self.generator, [model], sample)
            for name, scores in self.validation_scores(sample, hypotheses).items():
                logging_output[f"_{self.score_prefix}{name}_sum"] = sum(scores)
                logging_output[f"_{self.score_prefix}{name}_count"] = len(scores)
        step = loss, sample_size, logging_output
        return counting_nothing(step) if sample.get(STAND_IN) else step

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: FairseqCriterion) -> None:
        """Log the criterion's metrics and the mean of each score of the hypotheses seen."""
        cast(Any, super()).reduce_metrics(logging_outputs, criterion)
        self.log_scores(logging_outputs)

    def log_scores(self, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the mean of each score of the hypotheses seen."""
        for name in (f"{self.score_prefix}{metric}" for metric in self.validation_metrics):
            count = sum(log.get(f"_{name}_count", 0) for log in logging_outputs)
            if count > 0:
                total = sum(log[f"_{name}_sum"] for log in logging_outputs)
                metrics.log_scalar(name, float(total / count), weight=count, round=4)


def _model_name(cfg: Any) -> str | None:
    """Return the name that fairseq would build by, None where there is none."""
    try:
        name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
    except OmegaConfBaseException:
        return None
    return name if isinstance(name, str) else None


def counting_nothing(step: Step) -> Step:
    """Return a step whose loss, sample size and logged sums are all 0."""
    loss, _, logging_output = step
    zeros = {key: value * 0 if torch.is_tensor(value) else 0 for key, value in logging_output.items()}
    return loss * 0, 0, zeros


def _in_bfloat16(criterion: FairseqCriterion, model: torch.nn.Module, sample: dict[str, Any]) -> Step:
    """Return what the criterion does, with the products of matrices in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return criterion(model, sample)


def with_first_reference(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with the first reference as its target in place of all of them joined."""
    first = dict(sample["first_reference"])
    previous = first.pop("prev_output_tokens")
    return sample | first | {"net_input": sample["net_input"] | {"prev_output_tokens": previous}}
