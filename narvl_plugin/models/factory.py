"""Build a teacher or a student by the name of its architecture, without a fairseq task."""

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
    """Build the model `arch` (`ofa_nano` … `ofa_huge`, `narvl_nano` … `narvl_huge`) with random weights.

    `vocab_size` is V, the number of labels the model tells apart: for a student it counts the blank, its last.
    `num_queries` is a student's N. `families` are the classes to build. Other fields of the configuration go by name.

    Raises ValueError for an unknown architecture or field.
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
