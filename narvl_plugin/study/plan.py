"""The file of a study: parts, each with options for all runs and axes whose values are crossed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narvl_plugin.errors import InputError
from narvl_plugin.pipeline.options import read_yaml
from narvl_plugin.study.cells import Cell, check_options, is_option

SEED = "seed"
"""The axis over which means are taken."""

Options = Mapping[str, Any]
"""Values by option of `narvl run`, such as student.model.num_queries."""


@dataclass(frozen=True)
class Part:
    """A part of a study, which has a table of its own.

    Attributes:
        name: its name.
        run: the options of all its runs.
        axes: for each axis, the options by label.
        compare: the axis that the rows of the table differ in; None if there is no axis but the seeds.
        reference: the label that the others are compared with; None without an axis.
    """

    name: str
    run: Options
    axes: Mapping[str, Mapping[str, Options]]
    compare: str | None
    reference: str | None

    def cells(self) -> Iterator[tuple[dict[str, str], Cell]]:
        """Yield a run for each combination of the axes' labels, with its labels by axis."""
        for labels in itertools.product(*self.axes.values()):
            chosen = dict(zip(self.axes, labels, strict=True))
            options = dict(self.run)
            for axis, label in chosen.items():
                options |= self.axes[axis][label]
            yield chosen, Cell.of(options)


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        question: what it is to answer.
        parts: its parts.
    """

    question: str
    parts: tuple[Part, ...]

    def cells(self) -> dict[str, Cell]:
        """Return all runs by name. Runs of several parts with equal options are one."""
        return {cell.name: cell for part in self.parts for _, cell in part.cells()}


def read_study(file: Path) -> Study:
    """Read the file of a study.

    Raises:
        InputError: if it is not one, with the place of what is wrong.
    """
    content = _mapping(read_yaml(file), str(file), required=("parts",), known=("question", "parts"))
    question = content.get("question") or ""
    if not isinstance(question, str):
        raise InputError(f"{file}: question: is no text")
    parts = _mapping(content["parts"], f"{file}: parts")
    if not parts:
        raise InputError(f"{file}: parts: holds no part")
    return Study(question, tuple(_part(name, content, f"{file}: parts.{name}") for name, content in parts.items()))


def _part(name: str, content: Any, where: str) -> Part:
    content = _mapping(content, where, required=("run", "axes"), known=("run", "axes", "compare", "reference"))
    run = _mapping(content["run"], f"{where}.run")
    check_options(run, f"{where}.run")
    axes = {
        axis: _axis(axis, values, f"{where}.axes.{axis}")
        for axis, values in _mapping(content["axes"], f"{where}.axes").items()
    }
    if not axes:
        raise InputError(f"{where}.axes: holds no axis; give at least seed: [1]")
    owners: dict[str, str] = {}
    for axis, labels in axes.items():
        for option in {option for options in labels.values() for option in options}:
            if owners.setdefault(option, axis) != axis:
                raise InputError(f"{where}.axes.{axis}: {option} is set by the axis {owners[option]}, too")
    others = [axis for axis in axes if axis != SEED]
    compare = content.get("compare", others[0] if others else None)
    if compare is None and "reference" not in content:
        return Part(name, run, axes, None, None)
    if compare not in others:
        raise InputError(f"{where}.compare: {compare}: choose one of the axes {', '.join(others)}")
    choices = list(axes[compare])
    reference = str(content.get("reference", choices[0]))
    if reference not in choices:
        raise InputError(f"{where}.reference: {reference}: choose one of {', '.join(choices)}")
    return Part(name, run, axes, compare, reference)


def _axis(name: str, values: Any, where: str) -> dict[str, Options]:
    """Return the options of an axis by label. A list holds values of the option that the axis is named after."""
    if isinstance(values, list):
        if not is_option(name):
            raise InputError(f"{where}: is no option of narvl run; give its values as LABEL: {{OPTION: VALUE}}")
        pairs: list[tuple[Any, Any]] = [(_label(value), {name: value}) for value in values]
    elif isinstance(values, dict):
        pairs = list(values.items())
    else:
        raise InputError(f"{where}: is neither a list of values nor a mapping of labels to options")
    if not pairs:
        raise InputError(f"{where}: holds no value")
    labels: dict[str, Options] = {}
    for key, options in pairs:
        label = str(key)
        if label in labels:
            raise InputError(f"{where}: {label}: is there twice")
        labels[label] = _mapping({} if options is None else options, f"{where}.{label}")
        check_options(labels[label], f"{where}.{label}")
    return labels


def _label(value: Any) -> str:
    """Return a value in words."""
    if isinstance(value, list):
        return ", ".join(map(_label, value))
    return "default" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _mapping(
    value: Any, where: str, required: tuple[str, ...] = (), known: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Return a mapping with text as keys, after a check of its keys."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: is no mapping of keys to values")
    mapping = {str(key): each for key, each in value.items()}
    if len(mapping) < len(value):
        raise InputError(f"{where}: a key is there twice, as a number and as text")
    for key in mapping:
        if known is not None and key not in known:
            raise InputError(f"{where}: {key}: is no key here; those are {', '.join(known)}")
    for key in required:
        if key not in mapping:
            raise InputError(f"{where}: {key}: is missing")
    return mapping
