"""Fixes for command lines of fairseq's programs: clear errors, and options from checkpoints."""

import functools
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from fairseq import options
from fairseq.tasks import TASK_DATACLASS_REGISTRY

from narvl_plugin.checkpoints.finding import local_paths
from narvl_plugin.compat.programs import end_when_terminated
from narvl_plugin.errors import check_arguments
from narvl_plugin.tasks import TASKS, command_lines
from narvl_plugin.tasks.options import take_up_options


def check_command_lines() -> None:
    """Report errors of a command line in one line, and take a trained model's options from its checkpoint.

    Fixes `fairseq-train` without --arch and `fairseq-validate` without --task. They raise RuntimeError() and
    KeyError(None). Also fixes `fairseq-interactive --task caption`, which fails after it has loaded the model.

    Fixes `fairseq-generate test.tsv --task refcoco --path student.pt`. It uses the defaults of --patch-image-size,
    --num-bins and all other options of the task. Without an error, the model then reads images and predicts bins of
    other sizes than in its training. Options on the command line stay.

    --path may name models of the Hugging Face hub, `hf://OWNER/NAME`, although fairseq splits it at colons.
    """
    parse = options.parse_args_and_arch

    @functools.wraps(parse)
    def parse_args_and_arch(
        parser: ArgumentParser,
        input_args: list[str] | None = None,
        parse_known: bool = False,
        suppress_defaults: bool = False,
        modify_parser: Any = None,
    ) -> Any:
        end_when_terminated()
        check_arguments(sys.argv[1:] if input_args is None else map(str, input_args))
        command_lines.refuse_at_length(parser)
        try:
            parsed = parse(parser, input_args, parse_known, suppress_defaults, modify_parser)
        except (RuntimeError, KeyError) as error:
            command_lines.explain_failure(parser, input_args, error)
            raise
        if suppress_defaults:
            return parsed
        arguments = parsed[0] if parse_known else parsed
        command_lines.check_arguments(arguments, lambda: given_arguments(parser, input_args, arguments))
        if getattr(arguments, "path", None):
            arguments.path = local_paths(arguments.path)
        if hasattr(arguments, "nbest") and getattr(arguments, "path", None) and arguments.task in TASKS:
            kind = TASK_DATACLASS_REGISTRY[arguments.task]
            take_up_options(arguments, given_arguments(parser, input_args, arguments), kind)
        return parsed

    options.parse_args_and_arch = parse_args_and_arch


def given_arguments(parser: ArgumentParser, words: list[str] | None, parsed: Namespace) -> set[str]:
    """Return the names of the arguments that are on the command line, without those that have their defaults."""
    bare = ArgumentParser(add_help=False, allow_abbrev=False, parents=[parser], conflict_handler="resolve")
    bare.set_defaults(**dict.fromkeys(vars(parsed)))
    return {name for name, value in vars(bare.parse_known_args(words)[0]).items() if value is not None}
