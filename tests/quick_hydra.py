"""Hydra without what it does anew whenever it composes a configuration: more than half of the time that this takes.

It copies all registered configurations, of which it copies those it needs once again, it parses the three hundred
overrides that fairseq makes of a command line, and it looks up the source of each function that is running.
"""

import copy
import functools
import inspect
import sys
from types import FrameType, SimpleNamespace
from typing import Any

from hydra._internal import utils
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

parse_rule = OverridesParser.parse_rule


def copy_of_store(self: ConfigStore, memo: dict[int, Any]) -> ConfigStore:
    """Return the one store there is."""
    return self


@functools.cache
def parsed(text: str, rule_name: str) -> Any:
    """Parse a text; an error is not kept."""
    return parse_rule(OverridesParser.create(), text, rule_name)


def copy_of_parsed(self: OverridesParser, text: str, rule_name: str) -> Any:
    """Return a copy of what a text is parsed to."""
    return copy.deepcopy(parsed(text, rule_name))


def stack() -> list[inspect.FrameInfo]:
    """Return what `inspect.stack` returns of a stack, without lines of source."""
    frame: FrameType | None = sys._getframe(1)
    found = []
    while frame is not None:
        code = frame.f_code
        found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return found


ConfigStore.__deepcopy__ = copy_of_store  # type: ignore[attr-defined]
OverridesParser.parse_rule = copy_of_parsed  # type: ignore[method-assign]
utils.inspect = SimpleNamespace(**{**vars(inspect), "stack": stack})  # type: ignore[attr-defined]
