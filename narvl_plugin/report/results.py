"""All systems scored on one test set: as a dictionary for ``results.json`` and as a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from narvl_plugin.report.outputs import TestPicture
from narvl_plugin.scoring.coco_caption import CaptionScores, score_systems
from narvl_plugin.scoring.objects import object_recall

LABELS = {
    "teacher_beam5": "Teacher, beam 5",
    "teacher_greedy": "Teacher, greedy",
    "student": "Student",
    "student_nodistill": "Student, no distillation",
    "student_ce": "Student, cross entropy",
    "nouns_only": "Right nouns, no model",
}
BASELINE = "teacher_beam5"
NOUNS_ONLY = "nouns_only"

COLUMNS = (
    "system",
    "BLEU-4",
    "METEOR",
    "ROUGE-L",
    "CIDEr",
    "object recall",
    "p50 ms",
    "ratio",
    "CIDEr/teacher",
)
_METRIC_COLUMNS = COLUMNS[1:5]
_MISSING = "–"


@dataclass(frozen=True)
class SystemResult:
    """One system's captions (by row of the test file) and what they are worth.

    Attributes:
        latency: percentiles in ms as in ``latency.json``, None where it was not measured.
        latency_ratio: p50 latency over that of the teacher with beam 5.
        cider_ratio: CIDEr over that of the teacher with beam 5.
    """

    name: str
    label: str
    captions: dict[int, str]
    scores: CaptionScores
    object_recall: float | None
    latency: dict[str, float] | None
    latency_ratio: float | None
    cider_ratio: float | None

    def cells(self) -> list[str]:
        """Write the values in the order of ``COLUMNS``."""
        metrics = [_number(self.scores.values.get(name), 3) for name in _METRIC_COLUMNS]
        p50 = self.latency["p50_ms"] if self.latency else None
        return [
            self.label,
            *metrics,
            _number(self.object_recall, 3),
            _number(p50, 1),
            _number(self.latency_ratio, 3),
            _number(self.cider_ratio, 3),
        ]

    def as_json(self) -> dict[str, Any]:
        """Give everything but the captions as JSON values."""
        scores = asdict(self.scores)
        del scores["cider_each"]
        return {
            "label": self.label,
            "scores": scores["values"],
            "missing_scores": scores["missing"],
            "tokenizer": scores["tokenizer"],
            "object_recall": self.object_recall,
            "latency": self.latency,
            "latency_ratio_to_teacher_beam5": self.latency_ratio,
            "cider_ratio_to_teacher_beam5": self.cider_ratio,
        }


def _number(value: float | None, digits: int) -> str:
    """Write a value, or a dash where there is none."""
    return _MISSING if value is None else f"{value:.{digits}f}"


def evaluate(
    captions: Mapping[str, dict[int, str]],
    pictures: list[TestPicture],
    latencies: Mapping[str, dict[str, float]],
) -> list[SystemResult]:
    """Score every system and, where the test file names objects, a caption that only lists them.

    Args:
        captions: by system name, then by row; systems come in the order of ``LABELS``, others after them.
        pictures: the rows of the test file.
        latencies: entries of ``latency.json`` by system name.
    """
    references = {str(picture.row): picture.references for picture in pictures}
    objects = {str(picture.row): picture.objects for picture in pictures}
    captions = dict(captions)
    has_objects = any(objects.values())
    if has_objects:
        captions[NOUNS_ONLY] = {picture.row: " ".join(picture.objects) for picture in pictures}
    order = [name for name in LABELS if name in captions]
    order += sorted(captions.keys() - set(order))

    texts = {name: {str(row): text for row, text in captions[name].items()} for name in order}
    scores = score_systems(texts, references)

    teacher_cider = scores[BASELINE].values["CIDEr"] if BASELINE in scores else None
    teacher_p50 = latencies[BASELINE]["p50_ms"] if BASELINE in latencies else None
    results = []
    for name in order:
        latency = latencies.get(name)
        results.append(
            SystemResult(
                name=name,
                label=LABELS.get(name, name),
                captions=captions[name],
                scores=scores[name],
                object_recall=object_recall(texts[name], objects) if has_objects else None,
                latency=latency,
                latency_ratio=latency["p50_ms"] / teacher_p50 if latency and teacher_p50 else None,
                cider_ratio=scores[name].values["CIDEr"] / teacher_cider if teacher_cider else None,
            )
        )
    return results


def notes(results: list[SystemResult], machine: Mapping[str, Any], left_out: int) -> list[str]:
    """Say in sentences what a reader must know to compare the numbers with others.

    ``machine`` is that of ``latency.json``, ``left_out`` the number of test pictures that were not scored.
    """
    scores = results[0].scores
    sentences = [
        f"{len(results[0].captions):,} test pictures; words split by the "
        + ("Penn Treebank tokeniser." if scores.tokenizer == "ptb" else "plain tokeniser (no Java).")
    ]
    if left_out:
        sentences.append(f"{left_out:,} test pictures are left out, since not every system captioned them.")
    if any(result.latency for result in results):
        latency = next(result.latency for result in results if result.latency)
        sentences.append(
            "p50 ms: median time from a row's bytes to text, one picture at a time "
            f"({latency['n']:.0f} measurements a system, taken in turns); ratio: to the teacher with beam 5."
        )
    if machine:
        sentences.append(f"Machine: {', '.join(f'{key} {value}' for key, value in machine.items())}.")
    nouns = next((result.scores.values for result in results if result.name == NOUNS_ONLY), None)
    if nouns:
        sentences.append(
            "Object recall: share of the nouns in the pictures that the captions name. No single score "
            f"suffices: a bare list of the right nouns, which is no sentence, has recall 1 and "
            f"CIDEr {nouns['CIDEr']:.2f}, but BLEU-4 {nouns['BLEU-4']:.2f}."
        )
    reasons = dict.fromkeys(reason for result in results for reason in result.scores.missing.values())
    sentences += [f"No METEOR: {reason}." for reason in reasons]
    return sentences


def markdown_table(results: list[SystemResult], sentences: list[str]) -> str:
    """Write the table and the notes below it as Markdown."""
    rows = [COLUMNS, ("---",) + ("---:",) * (len(COLUMNS) - 1), *(result.cells() for result in results)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in sentences), ""])
