"""The methods that fairseq's programs need in addition to those of the plain tasks, for training and validation.

The base classes of a task are: a class of this module, the plain task, fairseq's task; see `registered.py`.
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
"""fairseq's criterions for training a teacher."""
TEACHER_CRITERIONS = (CrossEntropyCriterion, LabelSmoothedCrossEntropyCriterion)
"""Their classes. Subclasses are for teachers, too."""

Step = tuple[torch.Tensor, Any, dict[str, Any]]
"""Loss, sample size and logged values of a batch."""


class TrainedTask(CommonTask):
    """The methods that fairseq's programs need of every task: whole batches, precision, our models and criterions.

    Attributes:
        keeps_eos: whether a student is trained to predict `</s>`, too, which takes a query.
        last_epoch: the last epoch of the training, from 1; the trainer sets it to --max-epoch.
    """

    uses_ema = True  # makes fairseq's trainer pass the averaged model of --store-ema

    def __init__(
        self, cfg: CommonConfig, *, codec: TextCodec | None = None, skip_budget: SkipBudget | None = None, **_: Any
    ) -> None:
        FairseqTask.__init__(self, cfg)
        super().__init__(cfg, codec=codec, skip_budget=skip_budget)
        self.target_texts: TargetTexts | None = None  # only for fairseq-generate
        self.keeps_eos = False
        self.last_epoch: float = math.inf
        self._surveyed = False
        self._last_built = ""
        self._iterated: list[FairseqRows] = []

    @cached_property
    def dictionary(self) -> Dictionary:
        """The vocabulary as a fairseq dictionary."""
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
        """Raise InputError: fairseq-preprocess calls this, but none of our tasks reads its files."""
        raise InputError(
            "fairseq-preprocess does not support our tasks, which read TSV files directly; narvl vocab makes a "
            "vocabulary from a TSV file"
        )

    def build_bpe(self, args: object) -> TargetTexts:
        """Return the text decoder of fairseq-generate, with the codec of --bpe-dir; --bpe is not needed."""
        self.target_texts = TargetTexts(self.codec)
        return self.target_texts

    def build_model(self, cfg: FairseqDataclass, from_checkpoint: bool = False) -> OfaModel:
        """Return the model that the configuration describes, for this task's dictionary.

        Raises:
            InputError: if the model is not one of ours. fairseq's own models would evaluate strings of a checkpoint.
        """
        name = _model_name(cfg)
        model_class = MODEL_REGISTRY.get(name) or ARCH_MODEL_REGISTRY.get(name)
        if model_class is None or not issubclass(model_class, OfaModel):
            raise InputError(
                f"the model {name!r:.80} is not supported; --task {self.cfg._name} needs ofa_SIZE or narvl_SIZE"
            )
        if not from_checkpoint:
            cfg.vocabulary = self.codec.checksum  # in place, so that checkpoints store it
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

        fairseq-validate takes the criterion's name from the checkpoint. Some of fairseq's criterions evaluate strings
        of their options, so only those for tokens are allowed.

        Raises:
            InputError: if the criterion is of fairseq but not for tokens, or does not fit the model (teacher or
                student).
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
        """Raise InputError if a criterion is not for the kind of model that was built last."""
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
        """Return a data set for fairseq. A loaded one is always the same object, the key of fairseq's batch cache."""
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
        """Return fairseq's iterator over the batches of a data set, with all of its rows.

        By default, fairseq makes batch sizes a multiple of 8 and drops the rest, even from test sets.

        Raises:
            InputError: if the limits of batches leave no room for a row.
        """
        check_limits(max_tokens, max_sentences)
        kwargs |= {"required_batch_size_multiple": 1}
        iterator = cast(Any, super()).get_batch_iterator(
            self._iterable(dataset), max_tokens, max_sentences, *args, **kwargs
        )
        # Workers end with their epoch. Persistent ones would outlive an iterator that only the garbage collector
        # frees. It closes their queues before they are told to stop, which costs five seconds for each worker.
        iterator.persistent_workers = False
        # Rows are shuffled already. In this order of batches, an update takes the same rows if they come as one batch,
        # as several of --update-freq, or as one batch of each process.
        iterator.disable_shuffling = True
        return iterator

    def begin_epoch(self, epoch: int, model: torch.nn.Module) -> None:
        """Set the precision of matrix products. At the first call, check the rows of all files that will be read.

        Only fairseq's trainer calls this, so generation is not affected.

        Raises:
            InputError: if there are more bad rows than --skip-bad-rows allows.
        """
        torch.set_float32_matmul_precision(str(self.cfg.matmul_precision))
        if not self._surveyed:
            self._surveyed = True
            refuse_what_will_fail(self.survey_files(model, epoch), self.skip_budget)

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """Return the values that fairseq adds to a checkpoint's extra_state: the bad rows skipped so far."""
        return {type(self).__name__: {"skipped_rows": self.skip_budget.skipped}}

    def set_checkpoint_dict(self, kept: dict[str, Any]) -> None:
        """Restore the values of a checkpoint. fairseq calls it if a training resumes, not if a new one starts."""
        self.skip_budget.restore(kept.get("skipped_rows", []))

    def survey_files(self, model: torch.nn.Module, epoch: int) -> list[Survey]:
        """Check the rows of all files that the training reads from an epoch up to `last_epoch`."""
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
        """Compute the gradient of a batch's loss; return loss, sample size and logged values, all 0 for a stand-in.

        With --amp, a CPU computes in bfloat16 and a GPU in half precision. fairseq itself supports only the GPU.
        """
        if isinstance(optimizer, AMPOptimizer) and next(model.parameters()).device.type == "cpu":
            criterion = partial(_in_bfloat16, criterion)
        is_stand_in = bool(sample.get(STAND_IN))
        step = cast(Any, super()).train_step(
            sample, model, criterion, optimizer, update_num, ignore_grad or is_stand_in
        )
        return counting_nothing(step) if is_stand_in else step

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: FairseqCriterion) -> None:
        """Log the criterion's metrics, without stand-in batches."""
        if logging_outputs and not any(any(log.values()) for log in logging_outputs):
            metrics.log_scalar("loss", 0.0, weight=0)  # only stand-ins: the criterion would divide by 0
            return
        cast(Any, super()).reduce_metrics(logging_outputs, criterion)


class TrainedSingleTask(TrainedTask, BaseTask):
    """The methods that fairseq's programs need of a single task.

    Attributes:
        score_prefix: the prefix of the names of validation scores; empty outside a mixture of tasks.
    """

    dataset_class: ClassVar[Any]

    def __init__(self, cfg: Any, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        self.score_prefix = ""
        self._averaged_model: torch.nn.Module | None = None
        self.generator: Any = None

    def has_sharded_data(self, split: str) -> bool:
        """Return whether epochs read different files. If so, fairseq loads the data set for every epoch."""
        return split == "train" and len(self.training_paths) > 1

    def rows_in_epoch(self, epoch: int) -> int:
        """Return the number of rows in the training file of an epoch."""
        return len(TsvFile(self.split_path("train", epoch), self.cfg.selected_cols))

    def training_paths_of(self, first: int, last: float) -> list[str]:
        """Return the training files of the epochs from `first` to `last` (which may be infinite), each file once."""
        paths = self.training_paths
        epochs = range(first, int(min(last, first + len(paths) - 1)) + 1)
        return list(dict.fromkeys(paths[(epoch - 1) % len(paths)] for epoch in epochs))

    def survey_files(self, model: torch.nn.Module, epoch: int) -> list[Survey]:
        """Check the rows of all files that the training reads from an epoch up to `last_epoch`."""
        paths = self.training_paths_of(epoch, self.last_epoch)
        return list(self.surveys(getattr(model, "num_queries", None), self.keeps_eos, paths))

    def surveys(self, num_queries: int | None, keeps_eos: bool, paths: Sequence[str]) -> Iterator[Survey]:
        """Check some training files, then those of validation.

        Args:
            num_queries: the number of a student's queries; None for a teacher.
            keeps_eos: whether `</s>` takes a query, too.
            paths: the training files.

        Yields:
            The results, file by file.
        """
        loaded = self.datasets["train"]
        for path in paths:
            dataset = loaded if path == loaded.tsv.path else self.open_file(path, "train")
            yield survey(dataset, num_queries, keeps_eos=keeps_eos)
        for split, dataset in self.datasets.items():
            if split != "train":
                yield survey(dataset, num_queries, keeps_eos=keeps_eos)

    def build_model(self, cfg: FairseqDataclass, from_checkpoint: bool = False) -> OfaModel:
        """Return the model that the configuration describes, for this task's dictionary.

        With `from_checkpoint`, its weights are on the meta device until it takes those of the checkpoint, and the
        options of validation are checked only when it is validated.
        """
        weightless = from_checkpoint and not getattr(cfg, "allow_mismatch", "")
        with without_weights() if weightless else nullcontext():
            model = cast(Any, super()).build_model(cfg, from_checkpoint)
        self.choose_member(model)
        if from_checkpoint:
            self.check_model(model)
        else:
            self.prepare_validation(model)
        return model

    def prepare_validation(self, model: OfaModel) -> None:
        """Store the limits of text lengths of a model, and build the generator if validation generates.

        Raises:
            InputError: if the options exclude the model.
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
        """Return the hypotheses of each of the B samples, best first, in the form of fairseq's generators.

        In fairseq-generate, the target texts are kept, because it decodes the targets next.
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
        """Return loss, sample size and logged values, with scores of hypotheses if validation generates.

        If there is an averaged model, it is validated. With several references, the loss is that of the first one.
        """
        if ema_model is not None:
            model = ema_model
            if self.generates_in_validation and self._averaged_model is not ema_model:
                # fairseq's search stores the model that it was built for.
                self._averaged_model = ema_model
                self.generator = self.build_generator([ema_model], self.generator_options())
        if self.generates_in_validation and self.generator is None:
            self.prepare_validation(cast(OfaModel, model))
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
        """Log the criterion's metrics and the mean of each score of the hypotheses."""
        cast(Any, super()).reduce_metrics(logging_outputs, criterion)
        self.log_scores(logging_outputs)

    def log_scores(self, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the mean of each score of the hypotheses."""
        for name in (f"{self.score_prefix}{metric}" for metric in self.validation_metrics):
            count = sum(log.get(f"_{name}_count", 0) for log in logging_outputs)
            if count > 0:
                total = sum(log[f"_{name}_sum"] for log in logging_outputs)
                metrics.log_scalar(name, float(total / count), weight=count, round=4)


def _model_name(cfg: Any) -> str | None:
    """Return the name by which fairseq would build a model or criterion; None if it has none."""
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
    """Return the criterion's result, with matrix products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return criterion(model, sample)


def with_first_reference(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with the first reference as its target, in place of all references joined."""
    first = dict(sample["first_reference"])
    previous = first.pop("prev_output_tokens")
    return sample | first | {"net_input": sample["net_input"] | {"prev_output_tokens": previous}}
