"""The tasks: they read rows of TSV files and predict captions, boxes and answers.

`registered.py` registers them with fairseq.
"""

# Tasks are listed in this order.
# isort: off
from narvl_plugin.tasks import caption, vqa_gen, refcoco, snli_ve, regions, scene_graph, scene_tree
from narvl_plugin.tasks.registry import TASKS

__all__ = ["TASKS", "caption", "refcoco", "regions", "scene_graph", "scene_tree", "snli_ve", "vqa_gen"]
