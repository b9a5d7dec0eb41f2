"""Sizes and training options of the models, one dataclass shared by teacher and student."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Optional, Self

from narvl_plugin.errors import InputError


@dataclass
class OfaConfig:
    """Architecture of the autoregressive teacher; the defaults are those of `ofa_base`.

    What the published checkpoints never vary is not an option: pre-norm, GELU, one shared embedding, scaled
    heads, norms after each attention and inside each feed-forward block, disentangled positions.
    """

    _name: Optional[str] = None
    """fairseq's name of the model, such as `ofa_base`."""

    encoder_embed_dim: int = field(default=768, metadata={"help": "width D of encoder and decoder"})
    encoder_ffn_embed_dim: int = field(default=3072, metadata={"help": "inner width of feed-forward blocks"})
    encoder_layers: int = field(default=6, metadata={"help": "number of encoder layers"})
    decoder_layers: int = field(default=6, metadata={"help": "number of decoder layers"})
    encoder_attention_heads: int = field(default=12, metadata={"help": "number of attention heads H"})

    vision_trunk: str = field(
        default="resnet101",
        metadata={"help": "name of a timm model; its features at stride 16 become the image tokens"},
    )
    vision_pretrained: bool = field(
        default=False,
        metadata={"help": "start the trunk from ImageNet weights of an installed package"},
    )
    freeze_resnet: bool = field(
        default=False, metadata={"help": "keep the trunk (weights and batch statistics) as it is"}
    )

    normalise_features: bool = field(
        default=False,
        metadata={"help": "bring each channel of the trunk's features to mean 0 and deviation 1 (batch norm)"},
    )

    init_std: float = field(default=0.02, metadata={"help": "deviation of the weights of linear layers at the start"})
    dropout: float = field(default=0.1, metadata={"help": "dropout of embeddings and sublayer outputs"})
    attention_dropout: float = field(default=0.0, metadata={"help": "dropout of attention weights"})
    activation_dropout: float = field(default=0.0, metadata={"help": "dropout after GELU"})
    encoder_drop_path_rate: float = field(default=0.0, metadata={"help": "drop-path of the last encoder layer"})
    decoder_drop_path_rate: float = field(default=0.0, metadata={"help": "drop-path of the last decoder layer"})
    resnet_drop_path_rate: float = field(
        default=0.0, metadata={"help": "drop-path of the last block of each trunk stage"}
    )

    checkpoint_activations: bool = field(
        default=False,
        metadata={
            "help": "keep only the inputs of each layer for the backward pass, and compute the rest again there: less "
            "memory, more time; also in a trunk that is trained, where timm's model can"
        },
    )

    max_positions: int = field(default=1024, metadata={"help": "longest text, in tokens"})
    token_bucket_size: int = field(default=256, metadata={"help": "relative-position buckets of text"})
    image_bucket_size: int = field(default=42, metadata={"help": "largest image grid, in patches a side"})
    attn_scale_factor: float = field(
        default=2.0, metadata={"help": "scores are scaled by (factor * head width) ** -0.5"}
    )
    interpolate_position: bool = field(
        default=False,
        metadata={"help": "resize the position embeddings of the original grid for larger images"},
    )
    orig_patch_image_size: int = field(
        default=256, metadata={"help": "image size, in pixels, whose grid --interpolate-position resizes"}
    )
    code_image_size: int = field(
        default=128, metadata={"help": "size, in pixels, of images given to the decoder as codes"}
    )
    freeze_embedding: bool = field(
        default=False, metadata={"help": "keep the embedding of all labels as it is, but for a student's blank"}
    )
    allow_mismatch: str = field(
        default="",
        metadata={
            "help": "names of tensors, or shell patterns joined by commas, that a checkpoint may lack, have beside "
            "the model's, or have in another shape"
        },
    )
    vocabulary: str = field(
        default="", metadata={"help": "checksum of the vocabulary that the labels are of; set by the task"}
    )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration of the options among `values`. Options that are missing there have their defaults.

        Raises InputError for a value of another type, or outside `LIMITS`: a checkpoint may claim any size.
        """
        given = {option.name: values[option.name] for option in fields(cls) if option.name in values}
        for option in fields(cls):
            if option.name in given and option.name != "_name":
                _check_value(option.name, given[option.name], option.type)
        return cls(**given)


@dataclass
class NarvlConfig(OfaConfig):
    """Architecture of the parallel student: the teacher's, and its query tokens."""

    num_queries: int = field(
        default=20,
        metadata={
            "help": "learnable query tokens N; at least the longest target plus its repeats: 20 for captions, 7 for "
            "boxes (four bins, and three repeats), 6 for answers of VQA, 3 for entailment"
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "what logits are divided by when a student answers, so that its confidence is how often it is "
            "right; narvl calibrate fits it"
        },
    )
    confidence_slope: float = field(
        default=1.0,
        metadata={"help": "what the log-odds of a confidence are multiplied by; narvl calibrate fits it of boxes"},
    )
    confidence_offset: float = field(
        default=0.0, metadata={"help": "what is then added to them; narvl calibrate fits it of boxes"}
    )
    member_queries: str = field(
        default="",
        metadata={
            "help": "whose the queries are, one member of a mixture of tasks after another, as NAME:N,NAME:N; set by "
            "--task multitask, and empty where all are for one task"
        },
    )


LIMITS: dict[str, tuple[float, float]] = {
    "encoder_embed_dim": (1, 16_384),
    "encoder_ffn_embed_dim": (1, 65_536),
    "encoder_layers": (1, 256),
    "decoder_layers": (1, 256),
    "encoder_attention_heads": (1, 256),
    "init_std": (0, 100),
    "dropout": (0, 1),
    "attention_dropout": (0, 1),
    "activation_dropout": (0, 1),
    "encoder_drop_path_rate": (0, 1),
    "decoder_drop_path_rate": (0, 1),
    "resnet_drop_path_rate": (0, 1),
    "max_positions": (1, 16_384),
    "token_bucket_size": (2, 16_384),
    "image_bucket_size": (1, 256),
    "attn_scale_factor": (1e-6, 1e6),
    "orig_patch_image_size": (16, 4_096),
    "code_image_size": (16, 4_096),
    "num_queries": (1, 16_384),
    "temperature": (1e-6, 1e6),
    "confidence_slope": (-1e6, 1e6),
    "confidence_offset": (-1e6, 1e6),
}
"""Smallest and largest value of each number. They are far beyond any published size, and none takes all memory."""


def _check_value(name: str, value: Any, kind: Any) -> None:
    """Raise InputError unless a value has the type of its option and lies within its limits."""
    accepted = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}[kind]
    if type(value) not in accepted:
        raise InputError(f"{name}={value!r:.80}: is a {type(value).__name__}; expected {kind.__name__}")
    if name in LIMITS:
        least, most = LIMITS[name]
        if not (math.isfinite(value) and least <= value <= most):
            raise InputError(f"{name}={value!r:.80}: expected a number from {least:g} to {most:g}")


_TINY: dict[str, Any] = {
    "encoder_embed_dim": 256,
    "encoder_ffn_embed_dim": 1024,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "vision_trunk": "resnet50",
}

PADDING_INDEX = 1
"""The id of `<pad>` in every vocabulary: the second of fairseq's special symbols."""

SIZES: dict[str, dict[str, Any]] = {
    # For CPUs and embedded data: a frozen ImageNet trunk, whose features may be computed once.
    "nano": {
        "encoder_embed_dim": 128,
        "encoder_ffn_embed_dim": 512,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "vision_trunk": "tf_efficientnet_lite0",
        "vision_pretrained": True,
        "freeze_resnet": True,
        # The channels of this trunk's linear last layer differ much in mean and scale, and nothing in a frozen
        # trunk can learn to change that: without it the nouns of a picture take many times as long to learn.
        "normalise_features": True,
        "init_std": 0.08,
    },
    "tiny": _TINY,
    "medium": {
        **_TINY,
        "encoder_embed_dim": 512,
        "encoder_ffn_embed_dim": 2048,
        "encoder_attention_heads": 8,
        "vision_trunk": "resnet101",
    },
    "base": {},
    "large": {
        "encoder_embed_dim": 1024,
        "encoder_ffn_embed_dim": 4096,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "vision_trunk": "resnet152",
    },
    "huge": {
        "encoder_embed_dim": 1280,
        "encoder_ffn_embed_dim": 5120,
        "encoder_layers": 24,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "vision_trunk": "resnet152",
    },
}
"""What each size changes of the defaults above (https://arxiv.org/abs/2202.03052, table of model sizes)."""


def of_size(config_class: type[OfaConfig], size: str, *bases: type) -> type[OfaConfig]:
    """Return a dataclass like this one, with more bases, whose defaults are those of a size."""
    changes = SIZES[size]
    changed = [
        (option.name, option.type, field(default=changes[option.name], metadata=option.metadata))
        for option in fields(config_class)
        if option.name in changes
    ]
    return make_dataclass(f"{size.capitalize()}{config_class.__name__}", changed, bases=(config_class, *bases))
