"""Sequence generators that plug into fairseq's `task.build_generator`."""

from narvl_plugin.generation.answers import CandidateGenerator, TrieSequenceGenerator
from narvl_plugin.generation.options import generation_config
from narvl_plugin.generation.parallel_generator import ParallelGenerator

__all__ = ["CandidateGenerator", "ParallelGenerator", "TrieSequenceGenerator", "generation_config"]
