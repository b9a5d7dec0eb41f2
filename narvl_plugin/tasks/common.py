"""What single tasks and a mixture of several share: dictionary, whole batches, averaged weights, precision."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from fairseq.criterions import CRITERION_REGISTRY, FairseqCriterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary, FairseqDataset
from fairseq.data.iterators import EpochBatchIterator
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.logging import metrics
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.optim import FairseqOptimizer
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import FairseqTask
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from narvl_plugin.data.dataset import STAND_IN, check_limits
from narvl_plugin.data.survey import Survey, refuse_what_will_fail
from narvl_plugin.data.text import TextCodec, load_codec
from narvl_plugin.errors import InputError, SkipBudget
from narvl_plugin.models.interop import Use
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.tasks.target_texts import TargetTexts

STOCK_CRITERIONS = ("cross_entropy", "label_smoothed_cross_entropy")
"""fairseq's criterions that a teacher may be trained with."""
TEACHER_CRITERIONS = (CrossEntropyCriterion, LabelSmoothedCrossEntropyCriterion)
"""Their classes. Those that are derived from them are for teachers, too."""

REQUIRED = {
    "data": ("the data argument", "the files to read"),
    "bpe_dir": ("--bpe-dir", "the folder of the vocabulary"),
}
"""Options without a default: how an error names them, and what to give."""

Step = tuple[torch.Tensor, Any, dict[str, Any]]
"""Loss, sample size and what to log of a batch."""


@dataclass
class CommonConfig(FairseqDataclass):
    """Options of every task, also of a mixture of several."""

    bpe_dir: str = field(
        default=MISSING,
        metadata={"help": "folder with spm.model, or with dict.txt of the published checkpoints (GPT-2 BPE)"},
    )
    num_bins: int = field(default=1000, metadata={"help": "number of <bin_k> symbols, for coordinates"})
    matmul_precision: ChoiceEnum(["highest", "high", "medium"]) = field(  # type: ignore[valid-type]
        default="highest",
        metadata={
            "help": "precision of float32 matrix products in training, as in "
            "torch.set_float32_matmul_precision; medium multiplies in bfloat16, on processors that have it"
        },
    )
    ema_eval: bool = field(
        default=False,
        metadata={
            "help": "generate with the averaged weights of a training with --store-ema (which validates with them)"
        },
    )
    skip_bad_rows: int = field(
        default=0,
        metadata={"help": "how many different bad rows are skipped, with a warning, before one is an error"},
    )
    allow_transfer: bool = field(
        default=False,
        metadata={
            "help": "start training (--finetune-from-model, --restore-file) from a checkpoint of another task or with "
            "another vocabulary, whose first labels are kept by their numbers"
        },
    )


class CommonTask(FairseqTask):
    """What a task on TSV files and a mixture of several share: dictionary, whole batches, precision.

    `skip_budget` counts bad rows; criterions draw on it too. `codec` is text to tokens and back.
    """

    uses_ema = True  # has fairseq's trainer hand over the averaged model of --store-ema
    cfg: CommonConfig

    def __init__(
        self, cfg: CommonConfig, *, codec: TextCodec | None = None, skip_budget: SkipBudget | None = None, **kwargs: Any
    ) -> None:
        super().__init__(cfg)
        for name, (shown, what) in REQUIRED.items():
            missing = OmegaConf.is_missing(cfg, name) if isinstance(cfg, DictConfig) else getattr(cfg, name) == MISSING
            if missing or not getattr(cfg, name):
                raise InputError(f"{shown} is not given (task.{name} in a configuration); give {what}")
        self.codec: TextCodec = codec or load_codec(cfg.bpe_dir, cfg.num_bins)
        self.skip_budget = skip_budget or SkipBudget(cfg.skip_bad_rows)
        self.skip_budget.number_files(str(cfg.data).split(","))
        self.target_texts: TargetTexts | None = None  # of fairseq-generate alone
        self.keeps_eos = False
        """Whether the criterion has a student say `</s>`, too, which takes a query."""
        self.last_epoch: float = math.inf  # the compatibility layer notes --max-epoch
        self._surveyed = False
        self._last_built = ""

    @classmethod
    def build_dictionary(cls, *args: Any, **kwargs: Any) -> Dictionary:
        """Raise InputError: fairseq-preprocess, which asks for it, makes files that no task of ours reads."""
        raise InputError(
            "fairseq-preprocess does not serve our tasks, which read TSV files as they are; narvl vocab makes a "
            "vocabulary of one"
        )

    @property
    def source_dictionary(self) -> Dictionary:
        """Return the dictionary; sources and targets share it, and it holds no blank."""
        return self.codec.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        """Return the dictionary; sources and targets share it, and it holds no blank."""
        return self.codec.dictionary

    def build_bpe(self, args: object) -> TargetTexts:
        """Return what fairseq-generate makes text with, from the codec of --bpe-dir; --bpe is not needed."""
        self.target_texts = TargetTexts(self.codec)
        return self.target_texts

    @property
    def task_names(self) -> tuple[str, ...]:
        """Return the names of the tasks that a model of this task answers."""
        return (str(self.cfg._name),)

    def build_model(self, cfg: FairseqDataclass, from_checkpoint: bool = False) -> torch.nn.Module:
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
            model = super().build_model(cfg, from_checkpoint)
        except InputError:
            raise
        except Exception as error:  # a checkpoint may ask for anything
            if not from_checkpoint:
                raise
            raise InputError(f"the checkpoint's model cannot be built ({type(error).__name__}: {error})") from error
        self._last_built, self._built_student = str(name), hasattr(model, "blank")
        model.use = Use(self.task_names, self.codec.checksum, not from_checkpoint, self.cfg.allow_transfer)
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
        self._check_family(name, known)
        criterion = super().build_criterion(cfg, from_checkpoint)
        self.keeps_eos = getattr(criterion, "keep_eos", False)
        return criterion

    def _check_family(self, name: str, criterion: type[FairseqCriterion]) -> None:
        """Raise InputError unless a criterion is for the kind of model that was built last, where one was."""
        from criterions.query_criterion import QueryCriterion  # which imports this package

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

    def get_batch_iterator(
        self,
        dataset: FairseqDataset,
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
        iterator = super().get_batch_iterator(dataset, max_tokens, max_sentences, *args, **kwargs)
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

    def output_scores(
        self, outputs: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, target_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return the score, in training and in confidence, of M outputs of each sample, by K targets, of which any do.

        Shapes: (B, M, T), (B, M), (B, K, S), (B, K) -> (B, M), from 0 to 1; lengths of -1 are no targets. Raises
        InputError where a task has no such score.
        """
        raise InputError(f"--score-weight: the task {self.cfg._name} has no score of outputs")

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
        step = super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad or is_stand_in)
        return counting_nothing(step) if is_stand_in else step

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: FairseqCriterion) -> None:
        """Log the criterion's metrics, of batches that count."""
        if logging_outputs and not any(any(log.values()) for log in logging_outputs):
            metrics.log_scalar("loss", 0.0, weight=0)  # stand-ins only: there is nothing to divide by
            return
        super().reduce_metrics(logging_outputs, criterion)


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
