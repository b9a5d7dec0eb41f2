"""The perplexity of captions under a teacher: how unlikely a model finds the words that another one chose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from narvl_plugin.generation.rescoring import TeacherRescorer
from narvl_plugin.inference.predictor import Predictor

BATCH = 32
"""Number of rows in a batch."""


def perplexities(teacher: Predictor, systems: Mapping[str, Mapping[int, str]], rows: Sequence[int]) -> dict[str, float]:
    """Return the perplexity of each system's texts under a teacher that sees the image.

    It is exp(-log p / T), where log p is the sum over all texts of their log-probability, and T the number of their
    tokens, each text's `</s>` included. Each image is encoded once.

    Args:
        teacher: the teacher, with the rows' file.
        systems: each system's texts by row.
        rows: the rows, from 0. Bad rows that the task skips are left out. At least one must be left.

    Returns:
        The perplexities by name of the system.
    """
    scorer = TeacherRescorer(teacher.model, teacher.task.target_dictionary, weight=1.0)
    totals, counts = dict.fromkeys(systems, 0.0), dict.fromkeys(systems, 0)
    starts = range(0, len(rows), BATCH)
    for start in tqdm(starts, desc="perplexity", unit="batch", disable=None, leave=False):
        samples = teacher.samples(rows[start : start + BATCH])
        if not samples:
            continue
        said = [[teacher.task.codec.encode(f" {texts[row]}") for texts in systems.values()] for row in samples]
        with torch.inference_mode():
            scores = scorer(teacher.collate(samples.values()), said)
        for texts, found in zip(said, scores, strict=True):
            for name, tokens, score in zip(systems, texts, found.tolist(), strict=True):
                totals[name] += score
                counts[name] += len(tokens) + 1
    return {name: math.exp(-total / counts[name]) for name, total in totals.items()}
