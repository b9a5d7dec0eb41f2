"""Options of `narvl run` from files, in the form OPTION: VALUE, where OPTION has dots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from narvl_plugin.errors import InputError
from narvl_plugin.pipeline.keys import TRAININGS
from narvl_plugin.pipeline.settings import RunConfig

NAMES = {field.name for field in fields(RunConfig)}
"""Options that a run has, besides those of its trainings."""


def read_yaml(file: Path) -> Any:
    """Read a YAML file.

    Raises:
        InputError: if it is not readable, or a key occurs twice.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{file}: is not YAML: {' '.join(str(error).split())}") from error


def read_options(file: Path) -> dict[str, Any]:
    """Read options from a file.

    Raises:
        InputError: if the file holds anything else.
    """
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no options, a line OPTION: VALUE each")
    return {str(name): value for name, value in content.items()}


def with_options(config: DictConfig, options: Mapping[str, Any], where: str) -> DictConfig:
    """Return a run's configuration with further options, which override its own.

    Args:
        config: the configuration, a `RunConfig`.
        options: values by option, such as student.model.num_queries.
        where: what the options come from, for errors.

    Raises:
        InputError: for an option that no run has, or a value of another type.
    """
    merged = config.copy()
    for name, value in options.items():
        first, *rest = name.split(".")
        if first not in NAMES or bool(rest) != (first in TRAININGS):
            groups = ", ".join(f"{part}.GROUP.KEY" for part in TRAININGS)
            raise InputError(f"{where}: {name}: is no option of narvl run. Those of trainings are {groups}")
        try:
            with open_dict(merged):
                OmegaConf.update(merged, name, value, merge=False, force_add=True)
        except OmegaConfBaseException as error:
            raise InputError(f"{where}: {name}: {str(error).splitlines()[0]}") from error
    return merged
