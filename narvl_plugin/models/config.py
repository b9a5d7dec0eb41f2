"""Sizes and training options of teacher and student."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Optional, Self

from narvl_plugin.errors import InputError


@dataclass
class OfaConfig:
    """Architecture of the autoregressive teacher. The defaults are those of `ofa_base`.

    All published checkpoints share the following, which are therefore no options: pre-norm, GELU, one shared
    embedding, scaled heads, norms after each attention and inside each feed-forward block, disentangled positions.

    Attributes:
        _name: fairseq's name of the model, such as `ofa_base`. The metadata of each other attribute describes it.
    """

    _name: Optional[str] = None

    encoder_embed_dim: int = field(default=768, metadata={"help": "width D of encoder and decoder"})
    encoder_ffn_embed_dim: int = field(default=3072, metadata={"help": "inner width of feed-forward blocks"})
    encoder_layers: int = field(default=6, metadata={"help": "number of encoder layers"})
    decoder_layers: int = field(default=6, metadata={"help": "number of decoder layers"})
    encoder_attention_heads: int = field(default=12, metadata={"help": "number of attention heads H"})

    vision_trunk: str = field(
        default="resnet101",
        metadata={"help": "backbone: name of a timm model, whose features at stride 16 become the image tokens"},
    )
    vision_pretrained: bool = field(
        default=False,
        metadata={"help": "start the backbone from ImageNet weights of an installed package"},
    )
    freeze_resnet: bool = field(
        default=False, metadata={"help": "freeze the backbone, both weights and batch statistics"}
    )

    normalise_features: bool = field(
        default=False,
        metadata={"help": "normalise each channel of the backbone's features to mean 0 and deviation 1 (batch norm)"},
    )

    init_std: float = field(default=0.02, metadata={"help": "standard deviation of the initial linear weights"})
    dropout: float = field(default=0.1, metadata={"help": "dropout of embeddings and sublayer outputs"})
    attention_dropout: float = field(default=0.0, metadata={"help": "dropout of attention weights"})
    activation_dropout: float = field(default=0.0, metadata={"help": "dropout after GELU"})
    encoder_drop_path_rate: float = field(default=0.0, metadata={"help": "drop-path of the last encoder layer"})
    decoder_drop_path_rate: float = field(default=0.0, metadata={"help": "drop-path of the last decoder layer"})
    resnet_drop_path_rate: float = field(
        default=0.0, metadata={"help": "drop-path of the last block of each stage of the backbone"}
    )

    checkpoint_activations: bool = field(
        default=False,
        metadata={
            "help": "keep only the inputs of each layer for the backward pass and recompute the rest, which saves "
            "memory and takes time; applies to a trained backbone, too, if timm's model supports it"
        },
    )

    max_positions: int = field(default=1024, metadata={"help": "longest text, in tokens"})
    token_bucket_size: int = field(default=256, metadata={"help": "relative-position buckets of text"})
    image_bucket_size: int = field(default=42, metadata={"help": "side of the largest image grid, in patches"})
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
        default=False, metadata={"help": "freeze the embedding of all labels except a student's blank"}
    )
    allow_mismatch: str = field(
        default="",
        metadata={
            "help": "names or shell patterns of tensors, joined by commas, that may be missing from a checkpoint, "
            "unused, or of another shape"
        },
    )
    vocabulary: str = field(default="", metadata={"help": "checksum of the vocabulary of the labels; set by the task"})

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration with the options in `values`; the rest have their defaults.

        Args:
            values: options by name. Other names are ignored.

        Raises:
            InputError: if a value has another type than its option, or is outside `LIMITS`.
        """
        given = {option.name: values[option.name] for option in fields(cls) if option.name in values}
        for option in fields(cls):
            if option.name in given and option.name != "_name":
                check_value(option.name, given[option.name], option.type)
        return cls(**given)


@dataclass
class NarvlConfig(OfaConfig):
    """Architecture of the parallel student: the teacher's, with query tokens."""

    num_queries: int = field(
        default=20,
        metadata={
            "help": "number of learnable query tokens N, at least the longest target plus its repeats: 20 for "
            "captions, 7 for boxes (four bins and three repeats), 6 for answers of VQA, 3 for entailment"
        },
    )
    query_input: str = field(
        default="learned",
        metadata={
            "help": "input of the decoder: `learned` embeddings of the queries, as in the paper; or, for comparison, "
            "the embeddings of their `positions` alone; or a uniform copy of the `source`, the encoder's states, as "
            "plain CTC takes it"
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "divisor of the logits in inference, which makes confidence equal the rate of correct answers; "
            "fitted by narvl calibrate"
        },
    )
    confidence_slope: float = field(
        default=1.0,
        metadata={"help": "factor of the log-odds of a confidence; fitted by narvl calibrate for boxes"},
    )
    confidence_offset: float = field(
        default=0.0, metadata={"help": "number added to the scaled log-odds; fitted by narvl calibrate for boxes"}
    )
    member_queries: str = field(
        default="",
        metadata={
            "help": "number of queries of each member of a mixture of tasks, in order, as NAME:N,NAME:N; set by "
            "--task multitask, and empty for a single task"
        },
    )
    member_calibration: str = field(
        default="",
        metadata={
            "help": "temperature, slope and offset of each member of a mixture of tasks that narvl calibrate has "
            "fitted, as NAME:T:S:O,NAME:T:S:O"
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
"""Smallest and largest value of each number: beyond any published size, but small enough for memory."""


CHOICES = {"query_input": ("learned", "positions", "source")}
"""The values of each option that takes only these."""


def check_value(name: str, value: Any, kind: Any) -> None:
    """Check that a value has the type of its option and lies within its limits.

    Raises:
        InputError: if it does not.
    """
    accepted = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}[kind]
    if type(value) not in accepted:
        raise InputError(f"{name}={value!r:.80}: is a {type(value).__name__}; expected {kind.__name__}")
    if name in CHOICES and value not in CHOICES[name]:
        raise InputError(f"{name}={value!r:.80}: choose one of {', '.join(CHOICES[name])}")
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
"""Index of `<pad>` in every vocabulary: the second of fairseq's special symbols."""

SIZES: dict[str, dict[str, Any]] = {
    # For CPUs and embedded data: a frozen ImageNet backbone, whose features may be computed once.
    "nano": {
        "encoder_embed_dim": 128,
        "encoder_ffn_embed_dim": 512,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "vision_trunk": "tf_efficientnet_lite0",
        "vision_pretrained": True,
        "freeze_resnet": True,
        # The channels of this backbone's linear last layer differ much in mean and scale, and a frozen backbone cannot
        # learn to change them. Without normalisation the nouns of an image take many times as long to learn.
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
"""Options of each size that differ from the defaults above.

Source: https://arxiv.org/abs/2202.03052, table of model sizes.
"""


def of_size(config_class: type[OfaConfig], size: str, *bases: type) -> type[OfaConfig]:
    """Return a subclass of a configuration whose defaults are those of a size.

    Args:
        config_class: the configuration.
        size: a key of `SIZES`.
        *bases: further base classes.
    """
    changes = SIZES[size]
    changed = [
        (option.name, option.type, field(default=changes[option.name], metadata=option.metadata))
        for option in fields(config_class)
        if option.name in changes
    ]
    return make_dataclass(f"{size.capitalize()}{config_class.__name__}", changed, bases=(config_class, *bases))
