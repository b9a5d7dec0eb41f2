"""Errors for wrong command lines of fairseq's programs: the missing option, or the program to use instead."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import NoReturn

from narvl_plugin.errors import InputError
from narvl_plugin.importing import leaving_logging_alone
from narvl_plugin.tasks.common import CommonTask
from narvl_plugin.tasks.registry import TASKS

with leaving_logging_alone():
    from fairseq.tasks import TASK_REGISTRY

OUR_TASKS = f"{', '.join(TASKS)} or multitask"
TSV_SUFFIX = ".tsv"
PROGRAM_OPTIONS = {"fairseq-interactive": "buffer_size", "fairseq-eval-lm": "context_window"}
"""Programs that cannot run our tasks, each with an option that only this program has."""


def is_our_task(name: object) -> bool:
    """Return whether a task is one of this plugin, including the mixture of tasks."""
    known = TASK_REGISTRY.get(name)
    return known is not None and issubclass(known, CommonTask)


def refuse_at_length(parser: ArgumentParser) -> None:
    """Let a parser report an error in one line, without the list of some hundred options before it."""

    def error(message: str) -> NoReturn:
        parser.exit(2, f"error: {' '.join(message.split())} ({parser.prog} --help lists all options)\n")

    parser.error = error  # type: ignore[method-assign]


def explain_failure(parser: ArgumentParser, words: list[str] | None, error: Exception) -> None:
    """Raise InputError if fairseq's parsing failed because --arch or --task is missing; else do nothing."""
    found = parser.parse_known_args(words)[0]
    if isinstance(error, RuntimeError) and getattr(found, "arch", "") is None:
        raise InputError("--arch is not given; take narvl_SIZE for a student, ofa_SIZE for a teacher") from error
    if isinstance(error, KeyError) and getattr(found, "task", "") is None:
        raise InputError(f"--task is not given; take {OUR_TASKS}") from error


def check_arguments(arguments: Namespace, given: Callable[[], set[str]]) -> None:
    """Check the arguments of a program of fairseq.

    Args:
        arguments: the parsed arguments.
        given: returns the names of the arguments that are on the command line.

    Raises:
        InputError: if an option is missing, or if the program cannot run the task.
    """
    data = str(getattr(arguments, "data", ""))
    if not is_our_task(arguments.task):
        if TSV_SUFFIX in data and "task" not in given():
            raise InputError(f"--task is not given, and {data} names TSV files; take {OUR_TASKS}")
        return
    for program, option in PROGRAM_OPTIONS.items():
        if hasattr(arguments, option):
            refuse_program(program, str(arguments.task))
    if not hasattr(arguments, "max_update") and not getattr(arguments, "path", None):
        raise InputError("--path is not given; give the checkpoint of the model to use")


def refuse_program(program: str, task: str) -> NoReturn:
    """Raise an InputError that says which programs to use for a task in place of this one."""
    generate = f"fairseq-generate FILE.tsv --task {'TASK' if task == 'multitask' else task} --path CHECKPOINT"
    files = ", for image files narvl caption IMAGES --checkpoint CHECKPOINT" if task == "caption" else ""
    raise InputError(f"{program} does not support --task {task}, whose rows hold images; take {generate}{files}")
