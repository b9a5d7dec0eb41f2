"""The help of every command holds all that its docstring and its options say; flags and defaults stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from narvl_plugin.cli.app import app

FLAGS = Path(__file__).with_name("flags.txt")
"""A line for each argument and flag of each command: `COMMAND NAME[ required | = DEFAULT]`."""


def commands(command: click.Command, name: str = "narvl") -> Iterator[tuple[str, click.Command]]:
    """Yield a command and all below it by their names."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {word}")


NARVL = dict(commands(typer.main.get_command(app)))


def help_of(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `NAME --help` prints on a terminal of 80 columns, with its lines joined."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        app([*name.split()[1:], "--help"], prog_name="narvl")
    assert ended.value.code == 0
    return joined(capsys.readouterr().out)


def joined(text: str) -> str:
    """Join the lines of a text, also where it was broken after a hyphen."""
    return re.sub(r"(?<=\w-)\s+", "", " ".join(text.split()))


@pytest.mark.parametrize("name", NARVL)
def test_help_holds_all_words_of_the_docstring_also_those_in_brackets(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = NARVL[name].help
    assert text is not None
    printed = help_of(name, monkeypatch, capsys)
    for bracketed in re.findall(r"\[[^]]*\]", text):
        assert bracketed in printed
    assert joined(text) in printed


@pytest.mark.parametrize("name", NARVL)
def test_help_holds_each_option_with_all_of_its_text(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = help_of(name, monkeypatch, capsys)
    for parameter in NARVL[name].params:
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert flag.lower() in printed.lower()
        text = getattr(parameter, "help", None)
        assert text, f"{name} {parameter.name} has no help"
        assert joined(text) in printed


@pytest.mark.parametrize("group", [name for name, command in NARVL.items() if hasattr(command, "commands")])
def test_lists_of_commands_hold_each_first_line_whole(
    group: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = help_of(group, monkeypatch, capsys)
    for name, command in NARVL.items():
        if name.rpartition(" ")[0] == group and command.help is not None:
            first = command.help.splitlines()[0].rstrip(".")
            assert f"{name.rpartition(' ')[2]} {first}" in printed


def test_flags_and_defaults_are_those_that_users_know() -> None:
    lines = []
    for name, command in NARVL.items():
        for parameter in command.params:
            flags = "/".join((*parameter.opts, *parameter.secondary_opts))
            lines.append(f"{name} {flags} " + ("required" if parameter.required else f"= {parameter.default}"))
    assert "\n".join(lines) + "\n" == FLAGS.read_text(encoding="utf-8")
