"""The builder of a teacher or a student by the name of its architecture, without a fairseq task."""

from collections.abc import Mapping
from typing import Any

from .config import SIZES, NarvlConfig, OfaConfig
from .narvl import NarvlModel
from .ofa import OfaModel

FAMILIES: dict[str, tuple[type[OfaConfig], type[OfaModel]]] = {
    "ofa": (OfaConfig, OfaModel),
    "narvl": (NarvlConfig, NarvlModel),
}
"""Configuration and model of each family of architectures."""


def build(
    arch: str,
    *,
    vocab_size: int,
    num_queries: int | None = None,
    families: Mapping[str, tuple[type[OfaConfig], type[OfaModel]]] = FAMILIES,
    **overrides: Any,
) -> OfaModel:
    """Build a model with random weights.

    Args:
        arch: `ofa_nano` … `ofa_huge`, `narvl_nano` … `narvl_huge`.
        vocab_size: V, the number of labels. For a student it includes the blank, which comes last.
        num_queries: N of a student.
        families: configuration and model of each family.
        **overrides: other fields of the configuration.

    Raises:
        ValueError: if the architecture or a field is unknown.
    """
    family, _, size = arch.partition("_")
    if family not in FAMILIES or size not in SIZES:
        known = ", ".join(f"{f}_{s}" for f in FAMILIES for s in SIZES)
        raise ValueError(f"unknown arch '{arch}'; there are {known}")
    values = {**SIZES[size], **overrides}
    if num_queries is not None:
        values["num_queries"] = num_queries
    config_class, model_class = families[family]
    unknown = values.keys() - config_class.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"{arch} has no option {', '.join(sorted(unknown))}")
    return model_class(config_class(**values), vocab_size)
