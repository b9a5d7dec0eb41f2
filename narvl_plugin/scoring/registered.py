"""Importing this module registers the scorers with fairseq (`--scoring coco_caption`)."""

from narvl_plugin.scoring import coco_caption, entailment, gqa, grounding, vqa

__all__ = ["coco_caption", "entailment", "gqa", "grounding", "vqa"]
