"""The tasks for fairseq (`--task caption`). Importing this module registers them.

Each class combines a plain task with the methods that fairseq's programs need. It keeps the plain task's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from narvl_plugin.importing import leaving_logging_alone
from narvl_plugin.tasks import caption, multitask, refcoco, regions, scene_graph, scene_tree, snli_ve, vqa_gen
from narvl_plugin.tasks.trained import TrainedSingleTask

with leaving_logging_alone():
    from fairseq.dataclass import FairseqDataclass
    from fairseq.tasks import FairseqTask, register_task


@dataclass
class CaptionConfig(caption.CaptionConfig, FairseqDataclass):
    """Options of `--task caption`."""


@register_task("caption", dataclass=CaptionConfig)
class CaptionTask(TrainedSingleTask, caption.CaptionTask, FairseqTask):
    """Captioning, for fairseq."""

    config_class = CaptionConfig  # type: ignore[assignment]  # with fairseq's methods


@dataclass
class RefcocoConfig(refcoco.RefcocoConfig, FairseqDataclass):
    """Options of `--task refcoco`."""


@register_task("refcoco", dataclass=RefcocoConfig)
class RefcocoTask(TrainedSingleTask, refcoco.RefcocoTask, FairseqTask):
    """Grounding, for fairseq."""

    config_class = RefcocoConfig  # type: ignore[assignment]


@dataclass
class RegionsConfig(regions.RegionsConfig, FairseqDataclass):
    """Options of `--task regions`."""


@register_task("regions", dataclass=RegionsConfig)
class RegionsTask(TrainedSingleTask, regions.RegionsTask, FairseqTask):
    """Sets of regions, for fairseq."""

    config_class = RegionsConfig  # type: ignore[assignment]


@dataclass
class SceneGraphConfig(scene_graph.SceneGraphConfig, FairseqDataclass):
    """Options of `--task scene_graph`."""


@register_task("scene_graph", dataclass=SceneGraphConfig)
class SceneGraphTask(TrainedSingleTask, scene_graph.SceneGraphTask, FairseqTask):
    """Scene graphs, for fairseq."""

    config_class = SceneGraphConfig  # type: ignore[assignment]


@dataclass
class SceneTreeConfig(scene_tree.SceneTreeConfig, FairseqDataclass):
    """Options of `--task scene_tree`."""


@register_task("scene_tree", dataclass=SceneTreeConfig)
class SceneTreeTask(TrainedSingleTask, scene_tree.SceneTreeTask, FairseqTask):
    """Scene trees, for fairseq."""

    config_class = SceneTreeConfig  # type: ignore[assignment]


@dataclass
class SnliVeConfig(snli_ve.SnliVeConfig, FairseqDataclass):
    """Options of `--task snli_ve`."""


@register_task("snli_ve", dataclass=SnliVeConfig)
class SnliVeTask(TrainedSingleTask, snli_ve.SnliVeTask, FairseqTask):
    """Visual entailment, for fairseq."""

    config_class = SnliVeConfig  # type: ignore[assignment]


@dataclass
class VqaGenConfig(vqa_gen.VqaGenConfig, FairseqDataclass):
    """Options of `--task vqa_gen`."""


@register_task("vqa_gen", dataclass=VqaGenConfig)
class VqaGenTask(TrainedSingleTask, vqa_gen.VqaGenTask, FairseqTask):
    """Visual question answering, for fairseq."""

    config_class = VqaGenConfig  # type: ignore[assignment]


@dataclass
class MultitaskConfig(multitask.MultitaskConfig, FairseqDataclass):
    """Options of `--task multitask`."""


@register_task("multitask", dataclass=MultitaskConfig)
class MultitaskTask(multitask.MultitaskTask, FairseqTask):
    """A mixture of tasks, for fairseq."""
