"""The models for fairseq: `--arch ofa_SIZE` and `--arch narvl_SIZE`. Importing this module registers them."""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from narvl_plugin.importing import leaving_logging_alone

from . import factory
from .ar_decoder import AutoregressiveDecoder
from .config import SIZES, NarvlConfig, OfaConfig, of_size
from .encoder import OfaEncoder
from .inference import layer_time
from .narvl import NarvlModel
from .ofa import OfaModel
from .query_decoder import QueryDecoder

with leaving_logging_alone():
    from fairseq.dataclass import FairseqDataclass
    from fairseq.dataclass.utils import gen_parser_from_dataclass
    from fairseq.models import (
        BaseFairseqModel,
        FairseqEncoder,
        FairseqEncoderDecoderModel,
        FairseqIncrementalDecoder,
        register_model,
    )
    from fairseq.tasks import FairseqTask
    from fairseq.utils import split_paths

logger = logging.getLogger(__name__)


class EncoderBase(FairseqEncoder):
    """fairseq's encoder without a dictionary."""

    def __init__(self) -> None:
        super().__init__(None)


class DecoderBase(FairseqIncrementalDecoder):
    """fairseq's decoder without a dictionary."""

    def __init__(self) -> None:
        super().__init__(None)


class ModelBase(FairseqEncoderDecoderModel):
    """fairseq's model whose parts the subclass builds."""

    def __init__(self) -> None:
        BaseFairseqModel.__init__(self)


class Encoder(OfaEncoder, EncoderBase):
    """The encoder, for fairseq."""


class TeacherDecoder(AutoregressiveDecoder, DecoderBase):
    """The teacher's decoder, for fairseq's beam search."""


class StudentDecoder(QueryDecoder, DecoderBase):
    """The student's decoder, for fairseq."""


@dataclass
class RegisteredOfaConfig(OfaConfig, FairseqDataclass):
    """Options of `--arch ofa`."""


@dataclass
class RegisteredNarvlConfig(NarvlConfig, FairseqDataclass):
    """Options of `--arch narvl`."""


class Registered(OfaModel):
    """The methods that fairseq's programs need beside a model's computation.

    Attributes:
        config_class: the dataclass of the model's options.
    """

    config_class: ClassVar[type[OfaConfig]]

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add the options of all sizes.

        fairseq inverts the flag of an option that is on by default. Defaults are left out here: a flag then means the
        same for all sizes.

        Args:
            parser: the parser of a fairseq program.
        """
        gen_parser_from_dataclass(parser, cls.config_class(), delete_default=True)

    @classmethod
    def build_model(cls, cfg: DictConfig, task: FairseqTask) -> Registered:
        """Build the model for the vocabulary of a fairseq task."""
        return cls(cls.config_class.of(cfg), len(task.target_dictionary) + cls.extra_labels)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, model_cfg: Any = None, args: Any = None
    ) -> _IncompatibleKeys:
        """Load the weights of a checkpoint, see `OfaModel.load_state_dict`; the last two arguments are fairseq's."""
        return super().load_state_dict(state_dict, strict)

    def prepare_for_inference_(self, cfg: DictConfig) -> None:
        """Optimise the model for inference. fairseq-generate calls this.

        With --amp, matrix products are in bfloat16 if an encoder layer is then faster than in float32.

        Args:
            cfg: the configuration of the program.
        """
        paths = split_paths(cfg.common_eval.path) if cfg.common_eval.path else []
        self.optimize_for_inference(Path(paths[0]) if len(paths) == 1 else None)
        if cfg.common.amp:
            device, layer = self.encoder.embed_tokens.weight.device, self.encoder.layers[0]
            times = [layer_time(layer, self.cfg.encoder_embed_dim, dtype) for dtype in (torch.bfloat16, torch.float32)]
            half, single = times
            if half < single:
                self.multiply_in_bfloat16()
            else:
                logger.warning("--amp: %s is %.1f times as fast in float32, which is used", device, half / single)
        super().prepare_for_inference_(cfg)  # type: ignore[misc]  # of fairseq's class, which comes after ours


@register_model("ofa", dataclass=RegisteredOfaConfig)
class RegisteredOfaModel(Registered, ModelBase):
    """The teacher, for fairseq."""

    config_class = RegisteredOfaConfig
    encoder_class = Encoder
    decoder_class = TeacherDecoder


@register_model("narvl", dataclass=RegisteredNarvlConfig)
class RegisteredNarvlModel(Registered, NarvlModel, ModelBase):
    """The student, for fairseq."""

    config_class = RegisteredNarvlConfig
    encoder_class = Encoder
    decoder_class = StudentDecoder


def register_sizes(family: str, model_class: type[Registered], config_class: type[OfaConfig]) -> None:
    """Register each size of a family as a model of its own, `FAMILY_SIZE`.

    fairseq takes the defaults of options from a registered model's dataclass, for the command line, for hydra's
    configurations and for checkpoints. A function that sets an architecture's defaults would only serve the first.

    Args:
        family: its name.
        model_class: its model.
        config_class: its configuration.
    """
    for size in SIZES:
        options = of_size(config_class, size, FairseqDataclass)
        register_model(f"{family}_{size}", dataclass=options)(type(model_class.__name__, (model_class,), {}))


register_sizes("ofa", RegisteredOfaModel, OfaConfig)
register_sizes("narvl", RegisteredNarvlModel, NarvlConfig)

FAMILIES: dict[str, tuple[type[OfaConfig], type[OfaModel]]] = {
    "ofa": (RegisteredOfaConfig, RegisteredOfaModel),
    "narvl": (RegisteredNarvlConfig, RegisteredNarvlModel),
}
"""Configuration and model of each family, for fairseq."""

build = partial(factory.build, families=FAMILIES)
"""Builds a model that fairseq can train; see `factory.build`."""
