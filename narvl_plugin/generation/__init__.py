"""Sequence generators that plug into fairseq's `task.build_generator`."""

from narvl_plugin.generation.answers import CandidateGenerator, TrieSequenceGenerator
from narvl_plugin.generation.options import generation_config
from narvl_plugin.generation.parallel_generator import Agreement, ParallelGenerator
from narvl_plugin.generation.rescoring import TeacherRescorer

__all__ = [
    "Agreement",
    "CandidateGenerator",
    "ParallelGenerator",
    "TeacherRescorer",
    "TrieSequenceGenerator",
    "generation_config",
]
