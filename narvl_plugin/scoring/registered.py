"""The scorers as fairseq knows them (`--scoring coco_caption`). Importing this module registers them."""

from dataclasses import make_dataclass

from narvl_plugin.importing import leaving_logging_alone
from narvl_plugin.scoring.base import AnyScorer, ScorerConfig
from narvl_plugin.scoring.coco_caption import CocoCaptionConfig, CocoCaptionScorer
from narvl_plugin.scoring.entailment import EntailmentConfig, EntailmentScorer
from narvl_plugin.scoring.gqa import GqaConfig, GqaScorer
from narvl_plugin.scoring.grounding import GroundingConfig, GroundingScorer
from narvl_plugin.scoring.regions import RegionsConfig, RegionsScorer
from narvl_plugin.scoring.scene_graph import SceneGraphConfig, SceneGraphScorer
from narvl_plugin.scoring.scene_tree import SceneTreeConfig, SceneTreeScorer
from narvl_plugin.scoring.vqa import VqaConfig, VqaScorer

with leaving_logging_alone():
    from fairseq.dataclass import FairseqDataclass
    from fairseq.scoring import register_scorer

SCORERS: dict[str, tuple[type[AnyScorer], type[ScorerConfig]]] = {
    "coco_caption": (CocoCaptionScorer, CocoCaptionConfig),
    "entailment": (EntailmentScorer, EntailmentConfig),
    "gqa": (GqaScorer, GqaConfig),
    "grounding": (GroundingScorer, GroundingConfig),
    "regions": (RegionsScorer, RegionsConfig),
    "scene_graph": (SceneGraphScorer, SceneGraphConfig),
    "scene_tree": (SceneTreeScorer, SceneTreeConfig),
    "vqa": (VqaScorer, VqaConfig),
}
"""Scorer and settings by name."""

for name, (scorer, config) in SCORERS.items():
    register_scorer(name, dataclass=make_dataclass(config.__name__, [], bases=(config, FairseqDataclass)))(scorer)
