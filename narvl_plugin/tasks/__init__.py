"""The tasks: rows of TSV files in, captions, boxes and answers out.

`registered.py` tells fairseq of them.
"""

from narvl_plugin.tasks.base import BaseTask
from narvl_plugin.tasks.caption import CaptionTask
from narvl_plugin.tasks.refcoco import RefcocoTask
from narvl_plugin.tasks.snli_ve import SnliVeTask
from narvl_plugin.tasks.vqa_gen import VqaGenTask

TASKS: dict[str, type[BaseTask]] = {task.name: task for task in (CaptionTask, RefcocoTask, SnliVeTask, VqaGenTask)}
"""Our single tasks by their names."""

__all__ = ["TASKS"]
