"""The runs of a study: each is named by its options, and runs that differ in the student alone share a teacher."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import OmegaConf

from narvl_plugin.errors import InputError
from narvl_plugin.pipeline.keys import TRAININGS
from narvl_plugin.pipeline.options import NAMES, with_options
from narvl_plugin.pipeline.settings import RunConfig

OF_THE_STUDY = ("out", "shared", "until", "cell")
"""Options that a study sets itself."""
OF_THE_STUDENT = ("timed", "distil", "self_distil", "baselines", "ngrams")
"""Options that leave the data, the teacher and its outputs as they are, besides those that begin with `student.`."""
LONGEST_NAME = 90

_DEFAULTS = {field.name: field.default for field in fields(RunConfig) if field.name not in TRAININGS}
_FIRST = ("recipe", "size", "preset", "seed")
"""Options whose values stand first in a name, without their own names."""


@dataclass(frozen=True)
class Cell:
    """A run of a study.

    Attributes:
        name: its name, which follows from its options.
        options: its options that differ from the defaults of `narvl run`.
    """

    name: str
    options: Mapping[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Cell:
        """Return the run with some options."""
        own = {
            name: options[name] for name in sorted(options) if name not in _DEFAULTS or options[name] != _DEFAULTS[name]
        }
        return cls(_name(own), own)

    @property
    def shared(self) -> Cell:
        """The run, up to its teacher's outputs, that this one shares with all that differ in the student alone."""
        return Cell.of(
            {
                name: value
                for name, value in self.options.items()
                if name not in OF_THE_STUDENT and not name.startswith("student.")
            }
        )


def is_option(name: str) -> bool:
    """Return whether a name is that of an option of `narvl run`, with the group and the key in case of a training."""
    first, *rest = name.split(".")
    return first in NAMES and (len(rest) > 1 if first in TRAININGS else not rest)


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Check options and the types of their values.

    Raises:
        InputError: for what `narvl run` does not know, or what a study sets itself.
    """
    for name in options:
        if name in OF_THE_STUDY:
            raise InputError(f"{where}: {name}: is set by the study")
        if not is_option(name):
            raise InputError(f"{where}: {name}: is no option of narvl run")
    with_options(OmegaConf.structured(RunConfig), options, where)


def _name(options: Mapping[str, Any]) -> str:
    """Return a name for options: their values in short, and a hash of them all."""
    words = [str(options.get(name, _DEFAULTS[name])) for name in ("recipe", "preset")]
    if "size" in options:
        words.insert(1, str(options["size"]))
    words.append(f"seed{options.get('seed', _DEFAULTS['seed'])}")
    for name, value in options.items():
        if name not in _FIRST:
            short = name.rpartition(".")[2].strip("_")
            words.append(f"{short}-{value if isinstance(value, str) else json.dumps(value)}")
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", "_".join(words))[:LONGEST_NAME].strip("._-")
    canonical = json.dumps(dict(options), sort_keys=True, ensure_ascii=False)
    return f"{readable}_{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"
