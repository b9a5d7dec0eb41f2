"""Our single tasks by name. A task is added when its module is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from narvl_plugin.tasks.base import BaseTask

TASKS: dict[str, type[BaseTask]] = {}
"""The source of every other list of tasks."""
