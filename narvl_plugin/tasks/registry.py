"""Our single tasks by name: each is here as soon as its module is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from narvl_plugin.tasks.base import BaseTask

TASKS: dict[str, type[BaseTask]] = {}
"""Every list of tasks elsewhere comes from here."""
