"""Generation options of fairseq by name."""

from collections.abc import Mapping
from typing import Any

from fairseq.dataclass.configs import GenerationConfig

from narvl_plugin.errors import InputError


def generation_config(options: Mapping[str, Any]) -> GenerationConfig:
    """Return fairseq's generation options; raises InputError for a name that it does not have."""
    config = GenerationConfig()
    for name, value in options.items():
        if not hasattr(config, name):
            raise InputError(f"fairseq has no generation option {name}={value!r}; see fairseq-generate --help")
        setattr(config, name, value)
    return config
