"""The tasks: rows of TSV files in, captions, boxes and answers out.

`registered.py` tells fairseq of them.
"""

# Tasks are listed in this order.
# isort: off
from narvl_plugin.tasks import caption, vqa_gen, refcoco, snli_ve
from narvl_plugin.tasks.registry import TASKS

__all__ = ["TASKS", "caption", "refcoco", "snli_ve", "vqa_gen"]
