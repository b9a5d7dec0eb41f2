"""The members of a mixture of tasks, as a YAML file describes them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from narvl_plugin.data.mistaken_files import mistaken, read_head
from narvl_plugin.data.tsv import parse_columns
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.tasks.base import training_paths
from narvl_plugin.tasks.common import CommonConfig
from narvl_plugin.tasks.registry import TASKS

COMMON = [field.name for field in fields(CommonConfig) if field.name != "_name"]
"""Options that all members share with the mixture."""
NO_TEXT = ("id", "image", "box", "boxes")
"""Columns without text for models to read or predict."""


@dataclass(frozen=True)
class Member:
    """One member of a mixture.

    Attributes:
        name: its name in the YAML file.
        weight: passes over its training file in an epoch.
        num_queries: the number of its own queries.
        options: the options of its task; `_name` is the task's name.
    """

    name: str
    weight: float
    num_queries: int
    options: DictConfig


def read_members(file: str, common: CommonConfig) -> list[Member]:
    """Return the members of a YAML file, in its order, with the options that they share.

    The file maps each member's name to a task's options, `num_queries` and, optionally, `task` and `weight`.

    Raises:
        MissingInput: if the file does not exist.
        InputError: if the file has another content; the error names the file and the member.
    """
    if not Path(file).is_file():
        raise MissingInput(f"{file}: no such file; --task multitask reads a YAML file of its members")
    if what := mistaken(read_head(file)):
        raise InputError(f"{file}: {what}; a YAML file of members is expected")
    try:
        described = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: is not a YAML file of members ({error})".replace("\n", " ")) from error
    if not isinstance(described, dict) or not described:
        raise InputError(f"{file}: has no members; expected NAME: and below it the options of its task")
    shared = {name: getattr(common, name) for name in COMMON}
    named = {str(name): options for name, options in described.items()}
    return [_member(f"{file}: member {name}", name, options, shared) for name, options in named.items()]


def texts_of_members(file: str) -> list[tuple[str, list[int]]]:
    """Return the training files of all members, each with the columns of texts that models read or predict.

    Raises:
        MissingInput: as `read_members`.
        InputError: as `read_members`, and if a member's selected columns do not fit its task.
    """
    files = []
    for member in read_members(file, CommonConfig()):
        columns = _text_columns(f"{file}: member {member.name}", member.options)
        files += [(path, columns) for path in training_paths(member.options.data)]
    return files


def _text_columns(where: str, options: DictConfig) -> list[int]:
    """Return the text columns among a task's selected columns; raise InputError that begins with `where`."""
    try:
        columns = TASKS[options._name].dataset_class.columns_by_name(parse_columns(options.selected_cols))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    unread = NO_TEXT if options.get("add_object") else (*NO_TEXT, "objects")
    return [column for name, column in columns.items() if name not in unread]


def _member(where: str, name: str, described: Any, shared: dict[str, Any]) -> Member:
    """Return one member; raise InputError that begins with `where`."""
    if not re.fullmatch(r"[\w-]+", name):
        raise InputError(f"{where}: a name is made of letters, digits, - and _")
    if not isinstance(described, dict):
        raise InputError(f"{where}: expected the options of its task, and found {described!r}")
    given = {str(key): value for key, value in described.items()}
    task, weight, num_queries = given.pop("task", name), given.pop("weight", 1), given.pop("num_queries", None)

    if task not in TASKS:
        raise InputError(f"{where}: there is no task {task!r}; set task to one of {', '.join(sorted(TASKS))}")
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise InputError(
            f"{where}: weight {weight!r} is not a number above 0 (passes over its training file in an epoch)"
        )
    if type(num_queries) is not int or num_queries < 1:
        raise InputError(f"{where}: num_queries {num_queries!r} is not a whole number above 0 (its own queries)")

    known = TASKS[task].config_class
    own = sorted({field.name for field in fields(known)} - {"_name", "member", *COMMON})
    for option in given:
        if option in COMMON:
            raise InputError(f"{where}: {option} is shared by all members; give it beside --task multitask")
        if option not in own:
            raise InputError(f"{where}: the task {task} has no option {option!r}; it has {', '.join(own)}")
    if not given.get("data"):
        raise InputError(f"{where}: lacks its files; add data: TRAIN1,…,TRAINK,VALID")
    try:
        options = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(known(_name=task)), shared, given))
    except OmegaConfBaseException as error:
        raise InputError(f"{where}: {str(error).splitlines()[0]} ({error.key})") from error
    return Member(name, float(weight), num_queries, options)
