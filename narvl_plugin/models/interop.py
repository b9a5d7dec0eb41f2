"""Conversion of checkpoints of OFA and of the authors' parallel model to our models, and back.

Legend: V labels of the vocabulary, N queries, D width.
"""

import json
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from narvl_plugin.errors import InputError

from .config import SIZES, NarvlConfig, OfaConfig
from .positions import code_position_ids, image_buckets, token_buckets
from .unsupported import unsupported_part
from .vision import STRIDE, frozen_weights

RECOMPUTED_TABLES = ("token_rp_bucket", "image_rp_bucket", "image_position_idx")
"""Integer tables that OFA stores in its checkpoints. They follow from the configuration."""

CODE_POSITIONS = "decoder.image_position_idx"
"""The table of the positions of an image that the decoder predicts as codes."""

FIXED_FLAGS = {
    "scale_attn": True,
    "scale_fc": True,
    "scale_heads": True,
    "scale_resids": False,
    "entangle_position_embedding": False,
}
"""Flags of OFA that all published checkpoints share. They are not options here."""

FOREIGN_ARCHS = ("ofa_", "na_ofa_", "narvl_")
"""Prefixes of the known architectures in foreign checkpoints."""

LARGEST_TABLES = {"max_positions": 4_096, "image_bucket_size": 64}
"""Sizes up to which OFA's tables take at most a gigabyte. OFA's own are 1,024 and 42."""

EMBEDDING = "encoder.embed_tokens.weight"
"""Name of the embedding of all labels (V, D), which has other names, too (see below)."""
EMBEDDING_ALIASES = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
QUERIES = "decoder.query_embed.weight"
"""Name of the queries (N, D). A checkpoint that has them is a student's. Its last label is the blank."""

ORIGIN = "decoder.origin"
"""Name under which weights carry their `Origin` while they are read, as JSON in bytes."""
BACKBONE = "encoder.embed_images."
"""Beginning of the names of the backbone's weights."""
FAMILY_NAMES = re.compile(r"(ofa|narvl)(_\w+)?")
"""Names of our models and of their sizes in a configuration."""


@dataclass(frozen=True)
class Origin:
    """Training of some weights, as far as their checkpoint records it. An empty attribute is unknown.

    Attributes:
        tasks: names of the tasks that the weights were trained for.
        vocabulary: checksum of the vocabulary.
        member_queries: number of queries of each member, see `NarvlConfig`.
    """

    tasks: tuple[str, ...] = ()
    vocabulary: str = ""
    member_queries: str = ""

    @classmethod
    def read(cls, mark: Tensor) -> "Origin":
        """Return the origin that `mark_origin` stored beside weights."""
        tasks, vocabulary, member_queries = json.loads(bytes(mark.tolist()))
        return cls(tuple(tasks), vocabulary, member_queries)


@dataclass(frozen=True)
class Use:
    """Intended use of a model. The origin of its weights must agree with it.

    Attributes:
        tasks: names of the tasks.
        vocabulary: checksum of the vocabulary.
        training: whether the model is trained further. Only then may its vocabulary grow.
        transfer: whether other tasks and another vocabulary are intended.
        known_tasks: names of the tasks whose weights are not meant for another task. OFA uses the same names.
    """

    tasks: tuple[str, ...]
    vocabulary: str
    training: bool
    transfer: bool = False
    known_tasks: frozenset[str] = frozenset()

    def check(self, origin: Origin) -> None:
        """Check that weights of an origin may be used.

        Raises:
            InputError: if they were trained for other tasks or with another vocabulary.
        """
        if self.training and self.transfer:
            return
        remedy = "; if that is meant, add --allow-transfer" if self.training else ""
        trained = [task for task in origin.tasks if task in self.known_tasks]
        if trained and not set(trained) & set(self.tasks):
            raise InputError(
                f"the checkpoint was trained for {', '.join(trained)}, not for {', '.join(self.tasks)}; take "
                f"--task {trained[0]} or another checkpoint{remedy}"
            )
        if origin.vocabulary and origin.vocabulary != self.vocabulary:
            raise InputError(
                f"the checkpoint was trained with another vocabulary: its checksum is {origin.vocabulary}, that of "
                f"--bpe-dir and --num-bins is {self.vocabulary}; give the vocabulary of the training{remedy}"
            )


def mark_origin(state: dict[str, Any]) -> None:
    """Store the origin of one of our models beside its weights.

    Args:
        state: the whole checkpoint, updated in place.
    """
    options = own_options(state)
    if options is None:
        return
    task = state["cfg"].get("task")
    name = task.get("_name") if isinstance(task, dict) else None
    task_state = state.get("task_state")
    members = task_state.get("members") if isinstance(task_state, dict) else None
    of_members = members.values() if isinstance(members, dict) else ()
    known = [member.get("_name") for member in of_members if isinstance(member, dict)] or [name]
    tasks = sorted({task for task in known if isinstance(task, str)})
    origin = [tasks, str(options.get("vocabulary", "")), str(options.get("member_queries", ""))]
    state["model"][ORIGIN] = torch.tensor(list(json.dumps(origin).encode()), dtype=torch.uint8)


def own_options(state: dict[str, Any]) -> dict[str, Any] | None:
    """Return the options of the model in a whole checkpoint, or None if the model is not one of ours."""
    cfg = state.get("cfg")
    options = cfg.get("model") if isinstance(cfg, dict) else None
    if isinstance(options, dict) and FAMILY_NAMES.fullmatch(str(options.get("_name"))) and EMBEDDING in state["model"]:
        return options
    return None


def adopt(state: dict[str, Any], file: str) -> None:
    """Replace the flags of a foreign checkpoint by our configuration. Other checkpoints stay as they are.

    Args:
        state: the whole checkpoint, updated in place.
        file: its file, for error messages.

    Raises:
        InputError: if a flag is not supported, see `config_from_flags`.
    """
    flags = (state.get("cfg") or {}).get("model")
    if not isinstance(flags, Namespace) or not str(getattr(flags, "arch", None)).startswith(FOREIGN_ARCHS):
        return
    family, config_class = ("narvl", NarvlConfig) if QUERIES in state["model"] else ("ofa", OfaConfig)
    try:
        config = config_from_flags(flags, config_class)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if isinstance(config, NarvlConfig):
        config.num_queries = len(state["model"][QUERIES])
    state["cfg"]["model"] = asdict(config) | {"_name": family}


def averaged_weights(state: Mapping[str, Any], file: object) -> dict[str, Tensor]:
    """Return the averaged weights of a checkpoint.

    Args:
        state: the whole checkpoint.
        file: its file, for error messages.

    Raises:
        InputError: if the checkpoint has no averaged weights.
    """
    weights: dict[str, Tensor] | None = (state.get("extra_state") or {}).get("ema")
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise InputError(f"{file}: holds no averaged weights (extra_state.ema); only trainings with --store-ema do")
    return weights


def config_from_flags(flags: Namespace, config_class: type[OfaConfig]) -> OfaConfig:
    """Return the configuration for the flags of a foreign checkpoint.

    Missing flags are those of the size in its architecture's name, or else our defaults.

    Args:
        flags: the flags.
        config_class: the class of the configuration.

    Raises:
        InputError: if a flag of `FIXED_FLAGS` has another value.
    """
    for name, expected in FIXED_FLAGS.items():
        value = getattr(flags, name, expected)
        if bool(value) != expected:
            raise InputError(f"the checkpoint was trained with {name}={value}; only {name}={expected} is supported")
    given = {field.name: getattr(flags, field.name, None) for field in fields(config_class) if field.name != "_name"}
    given["vision_trunk"] = getattr(flags, "resnet_type", None) or given["vision_trunk"]
    size = SIZES.get(str(getattr(flags, "arch", None)).rpartition("_")[2], {})
    return config_class(**size | {name: value for name, value in given.items() if value is not None})


def with_frozen_backbone(found: Mapping[str, Tensor], config: OfaConfig) -> dict[str, Tensor]:
    """Return weights with those of the backbone, which a checkpoint may leave out where they are ImageNet's.

    Args:
        found: the checkpoint's weights by name.
        config: the configuration of the model.

    Raises:
        ValueError: if no installed package has the weights.
    """
    if not (config.vision_pretrained and config.freeze_resnet) or any(name.startswith(BACKBONE) for name in found):
        return dict(found)
    return {**found, **{BACKBONE + name: tensor for name, tensor in frozen_weights(config.vision_trunk).items()}}


def fit_state(
    found: Mapping[str, Tensor], own: Mapping[str, Tensor], *, allow: Sequence[str] = (), grow: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit the weights of a checkpoint to a model: a teacher's to a student, fewer labels or queries to more.

    New rows are drawn at random: queries from N(0, 0.02), rows of the embedding from N(0, D^-0.5). They follow from
    torch's initial seed, so all processes of a training draw the same.

    Args:
        found: the checkpoint's weights by name. Tables that our models compute are ignored.
        own: the model's weights by name. Where `allow` permits a difference, they are used.
        allow: names or shell patterns of weights that may be missing, unused or of another shape.
        grow: whether the model's vocabulary may have more labels than the checkpoint's.

    Returns:
        The weights by the model's names, and a line for each weight that is new, unused or reshaped.

    Raises:
        InputError: if anything else differs. The message names all differences.
    """
    found = {name: tensor for name, tensor in found.items() if not name.endswith(RECOMPUTED_TABLES)}
    notes: list[str] = []
    generator = torch.Generator().manual_seed(torch.initial_seed())
    if EMBEDDING in found:
        _tie(found)
        _fit_embedding(found, own, generator, notes, grow)
    if QUERIES in own:
        _fit_queries(found, own, generator, notes)

    differences, lacking = [], None
    for name in [*own, *(name for name in found if name not in own)]:
        if name not in found:
            difference, replacement = f"new: {name} {_shape(own[name])}", own.get(name)
        elif name not in own:
            difference, replacement = f"unused: {name} {_shape(found[name])}", None
        elif found[name].shape != own[name].shape:
            difference = f"reshaped: {name} {_shape(found[name])}, the model's is {_shape(own[name])}"
            replacement = own[name]
        else:
            continue
        if not any(fnmatchcase(name, pattern) for pattern in allow):
            differences.append(difference)
            if lacking is None and (part := unsupported_part(name, found, own)):
                lacking = f"{name} belongs to {part}, which our models lack; only a model without it can be read"
        notes.append(difference)
        found.pop(name, None)
        if replacement is not None:
            found[name] = replacement
    if differences:
        more = "" if len(differences) <= 8 else f"; and {len(differences) - 8} more"
        advice = (
            "choose the --arch and sizes that it was trained with, or name tensors that may differ by --allow-mismatch"
        )
        raise InputError(
            f"the checkpoint and the model differ in {len(differences)} tensors ({'; '.join(differences[:8])}{more}); "
            f"{lacking or advice}"
        )
    return {name: found[name].to(tensor.dtype) for name, tensor in own.items()}, notes


def flags_of(config: OfaConfig) -> Namespace:
    """Return a teacher's configuration as the flags of OFA's checkpoints.

    Raises:
        InputError: if OFA has no model of this size, or its tables would be too large.
    """
    values = {field.name: getattr(config, field.name) for field in fields(OfaConfig) if field.name != "_name"}
    for size, changes in SIZES.items():
        defaults = asdict(OfaConfig(**changes))
        if size != "nano" and all(values[name] == defaults[name] for name in SIZES["tiny"]):
            break
    else:
        raise InputError("OFA's layout is for its own sizes, ofa_tiny to ofa_huge; this model has another one")
    check_tables(config)
    for name in (
        "vision_pretrained",
        "normalise_features",
        "init_std",
        "allow_mismatch",
        "vocabulary",
    ):  # OFA has no such flags
        del values[name]
    values["resnet_type"] = values.pop("vision_trunk")
    return Namespace(arch=f"ofa_{size}", **values, **FIXED_FLAGS)


def check_tables(config: OfaConfig) -> None:
    """Raise InputError if OFA's tables of a teacher would be too large."""
    for name, largest in LARGEST_TABLES.items():
        value = getattr(config, name)
        if value > largest:
            raise InputError(f"OFA's layout has a table of all pairs of positions; {name}={value} is too large")


def tables_of(config: OfaConfig) -> dict[str, Tensor]:
    """Return the integer tables that OFA stores in the checkpoint of a teacher of this configuration."""
    text = token_buckets(config.max_positions, bucket_size=config.token_bucket_size, max_positions=config.max_positions)
    image = image_buckets(torch.arange(config.image_bucket_size**2 + 1), bucket_size=config.image_bucket_size)
    tables = {}
    for part in ("encoder", "decoder"):
        tables[f"{part}.token_rp_bucket"] = text
        tables[f"{part}.image_rp_bucket"] = image
    grid = config.code_image_size * 2 // STRIDE
    tables[CODE_POSITIONS] = code_position_ids(grid, 1026, bucket_size=config.image_bucket_size)
    return tables


def _tie(found: dict[str, Tensor]) -> None:
    """Let all names of the embedding share one tensor.

    Raises:
        InputError: if they hold different weights.
    """
    embedding = found[EMBEDDING]
    for alias in EMBEDDING_ALIASES:
        copy = found.get(alias, embedding)
        if copy.data_ptr() != embedding.data_ptr() and not torch.equal(copy, embedding):
            raise InputError(f"{alias} differs from {EMBEDDING} in the checkpoint; our models share one embedding")
        found[alias] = embedding


def _fit_embedding(
    found: dict[str, Tensor],
    own: Mapping[str, Tensor],
    generator: torch.Generator,
    notes: list[str],
    grow: bool,
) -> None:
    """Add rows for new labels and for the blank, which comes last; `found` and `notes` are updated in place.

    Raises:
        InputError: if the checkpoint is a student's and the model a teacher, or if the labels do not fit.
    """
    embedding, wanted = found[EMBEDDING], own[EMBEDDING]
    if embedding.shape[1:] != wanted.shape[1:]:
        return
    has_blank, wants_blank = QUERIES in found, QUERIES in own
    if has_blank and not wants_blank:
        raise InputError("the checkpoint is a student's (it has queries and a blank); give a teacher's for a teacher")
    labels, wanted_labels = len(embedding) - has_blank, len(wanted) - wants_blank
    if labels > wanted_labels or (labels < wanted_labels and not grow):
        raise InputError(
            f"the checkpoint has {labels} labels and the model's dictionary {wanted_labels}; give the vocabulary of "
            "its training (--bpe-dir, --num-bins)"
        )
    if len(embedding) == len(wanted):
        return
    width = embedding.shape[1]
    added = torch.randn(len(wanted) - len(embedding), width, generator=generator) * width**-0.5
    grown = torch.cat([embedding[:labels], added.to(embedding.dtype), embedding[labels:]])
    for name in (EMBEDDING, *EMBEDDING_ALIASES):
        found[name] = grown
    if labels < wanted_labels:
        notes.append(f"new: {EMBEDDING}[{labels}:{wanted_labels}], labels added to the vocabulary")
    if wants_blank and not has_blank:
        notes.append(f"new: {EMBEDDING}[{wanted_labels}], the blank")


def _fit_queries(
    found: dict[str, Tensor], own: Mapping[str, Tensor], generator: torch.Generator, notes: list[str]
) -> None:
    """Keep the first queries, and add some if the model has more; `found` and `notes` are updated in place."""
    wanted = own[QUERIES]
    queries = found.get(QUERIES, wanted.new_empty(0, wanted.shape[1], device="cpu"))
    if queries.shape == wanted.shape or queries.shape[1:] != wanted.shape[1:]:
        return
    if len(queries) > len(wanted):
        notes.append(f"reshaped: {QUERIES}, the first {len(wanted)} of {len(queries)} queries are kept")
        found[QUERIES] = queries[: len(wanted)]
        return
    notes.append(f"new: {QUERIES}[{len(queries)}:{len(wanted)}], queries")
    added = torch.randn(len(wanted) - len(queries), wanted.shape[1], generator=generator) * 0.02
    found[QUERIES] = torch.cat([queries, added.to(queries.dtype)])


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
