"""Captions in the report."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from narvl_plugin.data.scenes.nouns import NOUNS
from narvl_plugin.data.scenes.truth import mean_truth, scenes_beside
from narvl_plugin.data.text import REFERENCE_SEPARATOR, split_references
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow
from narvl_plugin.report.subjects.base import BEAM_5, Outputs, Row, Scores, TaskReport, and_teacher, percent
from narvl_plugin.scoring.broken import RUN, Run, broken_share, known_runs, scene_kinds
from narvl_plugin.scoring.coco_caption import score_systems
from narvl_plugin.scoring.objects import object_recall
from narvl_plugin.scoring.tokenization import why_plain
from narvl_plugin.tasks.base import BaseTask

NOUNS_ONLY = "nouns_only"
METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
_IN_TABLE = ("sentences", "true", "broken")
"""The measures of wording that stand in the table, where they are known."""


@dataclass(frozen=True)
class CaptionRow(Row):
    """An image with its captions; `objects` are the nouns in it, empty if the file names none."""

    objects: list[str]


class CaptionReport(TaskReport[CaptionRow]):
    """Captions; the baseline lists the correct nouns and forms no sentence."""

    task = "caption"
    columns = (0, 1, 2, 3)  # uniq-id, image-id, caption, objects
    image_column = 4
    unit = "pictures"
    main = "CIDEr"
    teachers = BEAM_5
    curve = ("valid_cider", "CIDEr")
    baselines = {NOUNS_ONLY: "Correct nouns, no model"}
    title = "Captions in one pass"
    lead = (
        "A teacher predicts its caption token by token. Its student predicts all tokens at once with a fixed set of "
        "queries, trained by Query-CTC. This page compares their quality and speed on images that neither has seen."
    )
    beside = "its CIDEr"
    # A caption would be correct only if it equals a reference word by word. That is rare for any system, and says
    # little about the quality of other captions. `results.json` has the numbers.
    confidence = ""

    def __init__(self, task: BaseTask | None, test_tsv: Path) -> None:
        self._training_file = test_tsv.with_name("train.tsv")
        self._scenes = scenes_beside(test_tsv)

    def read(self, number: int, columns: Sequence[str], where: str) -> CaptionRow:
        """Return the row; see `TaskReport.read`. A caption without words raises BadRow."""
        unique_id, image_id, caption, objects = columns
        references = split_references(caption)
        if not references:
            raise BadRow(f"{where}: the caption has no words")
        nouns = [noun.strip() for noun in objects.split(REFERENCE_SEPARATOR) if noun.strip()]
        return CaptionRow(number, (unique_id, image_id), "", references, nouns)

    def say_baselines(self, rows: Sequence[CaptionRow]) -> dict[str, Outputs]:
        """Return captions that only list the objects, if the test file names any."""
        if not any(row.objects for row in rows):
            return {}
        return {NOUNS_ONLY: {row.number: " ".join(row.objects) for row in rows}}

    def score(self, systems: Mapping[str, Outputs], rows: Sequence[CaptionRow]) -> dict[str, Scores]:
        """Score captions with the COCO tools and, if the test file names objects, by object recall."""
        objects = {str(row.number): row.objects for row in rows}
        texts = {name: {str(row.number): said[row.number] for row in rows} for name, said in systems.items()}
        scored = score_systems(texts, {str(row.number): row.references for row in rows})
        known = self._known_runs(rows) if self._scenes is None else set()
        scores = {}
        for name, result in scored.items():
            recall = object_recall(texts[name], objects) if any(objects.values()) else None
            cells: dict[str, float | str | None] = {metric: result.values.get(metric) for metric in METRICS}
            wording = self._truth(rows, systems[name]) or _broken(rows, list(texts[name].values()), known)
            if self._scenes is None:
                cells["object recall"] = recall
            cells |= {column: percent(wording[column]) for column in _IN_TABLE if column in wording}
            scores[name] = Scores(
                values=result.values,
                cells=cells,
                each={int(key): cider for key, cider in result.cider_each.items()},
                details={
                    "missing_scores": asdict(result)["missing"],
                    "tokenizer": result.tokenizer,
                    "object_recall": recall,
                    **wording,
                },
            )
        return scores

    def _truth(self, rows: Sequence[CaptionRow], said: Outputs) -> dict[str, float]:
        """Return the shares of `CaptionTruth` of a system's captions; empty if the content of images is not known."""
        if self._scenes is None:
            return {}
        return mean_truth({row.ids[0]: said[row.number] for row in rows}, self._scenes)._asdict()

    def _known_runs(self, rows: Sequence[CaptionRow]) -> set[Run]:
        """Return the runs of words of the training captions; empty for images that are not embedded scenes.

        Other captions have an open vocabulary. Most of their runs are new, and not for that reason broken.
        """
        nouns = {noun for row in rows for noun in row.objects}
        if not nouns or not nouns <= set(NOUNS) or not self._training_file.is_file():
            return set()
        tsv = TsvFile(self._training_file, [2])
        captions: list[str] = []
        for row in range(len(tsv)):
            with suppress(BadRow):
                captions += split_references(tsv[row][0])
        return known_runs(captions, scene_kinds())

    def notes(self, rows: Sequence[CaptionRow], scores: Mapping[str, Scores]) -> list[str]:
        """Return the number of images and the tokeniser."""
        ptb = next(iter(scores.values())).details["tokenizer"] == "ptb"
        tokenizer = "the Penn Treebank tokeniser" if ptb else f"the plain tokeniser ({why_plain()})"
        return [f"{len(rows):,} test images; words split by {tokenizer}."]

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Return the definitions of object recall and of broken captions, and the reason for a missing metric."""
        sentences = []
        if NOUNS_ONLY in scores and self._scenes is None:
            nouns = scores[NOUNS_ONLY].values
            sentences.append(
                "Object recall: share of the nouns in the images that the captions name. No single score suffices. A "
                "list of the correct nouns is no sentence, but it has recall 1 and "
                f"CIDEr {nouns['CIDEr']:.2f}; its BLEU-4 is {nouns['BLEU-4']:.2f}."
            )
        if self._scenes is not None:
            sentences.append(
                "Sentences: share of captions that the grammar of the scenes can make. True: share that are sentences "
                "and whose every claim holds in the image: objects, numbers, sizes, places, relations, background. "
                "CIDEr notices neither."
            )
        if "broken_references" in (details := next(iter(scores.values())).details):
            sentences.append(
                f"Broken: share of captions that hold {RUN} words in a row that no training caption holds. All nouns "
                "count as one word, and so do all colours; the start and the end of a caption count as words. Of the "
                f"references, {percent(details['broken_references'])} are broken."
            )
        reasons = dict.fromkeys(
            reason for result in scores.values() for reason in result.details["missing_scores"].values()
        )
        return sentences + [f"No METEOR: {reason}." for reason in reasons]

    def headlines(self, student: Scores, teacher: Scores | None) -> list[tuple[str, str]]:
        """Return the shares of true and of broken captions and the object recall, if they were measured."""
        named = {
            "true": "of the student's captions are true sentences",
            "broken": "of the student's captions are broken sentences",
            "object_recall": "of the objects are named by the student",
        }
        return [
            (percent(student.details[key]), words + and_teacher(teacher.details[key] if teacher else None))
            for key, words in named.items()
            if student.details.get(key) is not None
        ]

    def verdict(self, score: float) -> tuple[str, str]:
        """Return the CIDEr of a caption, which is neither correct nor wrong."""
        return f"CIDEr {score:.2f}", ""


def _broken(rows: Sequence[CaptionRow], captions: Sequence[str], known: set[Run]) -> dict[str, float]:
    """Return the shares of captions and references that hold an unknown run of words; empty if no run is known."""
    if not known:
        return {}
    kinds = scene_kinds()
    return {
        "broken": broken_share(captions, known, kinds),
        "broken_references": broken_share([text for row in rows for text in row.references], known, kinds),
    }
