"""Captions in the report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from narvl_plugin.data.scenes.nouns import NOUNS
from narvl_plugin.data.scenes.truth import mean_truth, scenes_beside
from narvl_plugin.data.text import REFERENCE_SEPARATOR, split_references
from narvl_plugin.errors import BadRow
from narvl_plugin.report.subjects.base import BEAM_5, Outputs, Row, Scores, Table, TaskReport, and_teacher, percent
from narvl_plugin.scoring.coco_caption import score_systems
from narvl_plugin.scoring.objects import object_recall
from narvl_plugin.scoring.tokenization import why_plain
from narvl_plugin.scoring.wording import RUN, KnownWording, captions_of, scene_kinds
from narvl_plugin.tasks.base import BaseTask

NOUNS_ONLY = "nouns_only"
METRICS = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
_OF_SCENES = ("sentences", "true")
_OF_OTHERS = ("new_runs",)
"""The measures of wording that stand in the table: of scenes, whose grammar is known, and of other images."""
_WORDING = {"new_runs": "new runs", "doubled": "doubled", "cut": "cut", "novel": "novel"}


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
    perplexity_rows = 500

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
        known = self._known_wording(rows)
        common: dict[str, Any] = {} if known is None else _of_references(known, rows)
        scores = {}
        for name, result in scored.items():
            recall = object_recall(texts[name], objects) if any(objects.values()) else None
            cells: dict[str, float | str | None] = {metric: result.values.get(metric) for metric in METRICS}
            wording = self._truth(rows, systems[name])
            if known is not None:
                wording |= known.mean(list(texts[name].values()))._asdict()
            if self._scenes is None:
                cells["object recall"] = recall
            shown = _OF_OTHERS if self._scenes is None else _OF_SCENES
            cells |= {key.replace("_", " "): percent(wording[key]) for key in shown if key in wording}
            scores[name] = Scores(
                values=result.values,
                cells=cells,
                each={int(key): cider for key, cider in result.cider_each.items()},
                details={
                    "missing_scores": asdict(result)["missing"],
                    "tokenizer": result.tokenizer,
                    "object_recall": recall,
                    **wording,
                    **common,
                },
            )
        return scores

    def _truth(self, rows: Sequence[CaptionRow], said: Outputs) -> dict[str, float]:
        """Return the shares of `CaptionTruth` of a system's captions; empty if the content of images is not known."""
        if self._scenes is None:
            return {}
        return mean_truth({row.ids[0]: said[row.number] for row in rows}, self._scenes)._asdict()

    def _known_wording(self, rows: Sequence[CaptionRow]) -> KnownWording | None:
        """Return the wording of the training captions; None without a training file beside the test file.

        In captions of embedded scenes, a kind stands for each noun and colour.
        """
        if not self._training_file.is_file():
            return None
        nouns = {noun for row in rows for noun in row.objects}
        return KnownWording(captions_of(self._training_file), scene_kinds() if nouns and nouns <= set(NOUNS) else {})

    def notes(self, rows: Sequence[CaptionRow], scores: Mapping[str, Scores]) -> list[str]:
        """Return the number of images and the tokeniser."""
        ptb = next(iter(scores.values())).details["tokenizer"] == "ptb"
        tokenizer = "the Penn Treebank tokeniser" if ptb else f"the plain tokeniser ({why_plain()})"
        return [f"{len(rows):,} test images; words split by {tokenizer}."]

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Return the definitions of the measures of objects and wording, and the reason for a missing metric."""
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
        reasons = dict.fromkeys(
            reason for result in scores.values() for reason in result.details["missing_scores"].values()
        )
        return sentences + [f"No METEOR: {reason}." for reason in reasons]

    def tables(self, scores: Mapping[str, tuple[str, Scores]]) -> list[Table]:
        """Return the table of signs of broken sentences, which need no grammar; none without a training file."""
        details = next(iter(scores.values()))[1].details
        if "references_new_runs" not in details:
            return []
        kinds = " (nouns count as one word, and so do colours)" if details["abstracted"] else ""
        title = (
            f"Signs of broken sentences. New runs: captions with {RUN} words in a row that no training caption holds; "
            f"the start and the end of a caption count as words{kinds}. Doubled: with one or two words twice in a row. "
            "Cut: their last word ends no training caption. Novel: no training caption has the same words, which is no "
            "fault. Perplexity: of their tokens, under the teacher."
        )
        rows = [
            (label, *(percent(each.details[name]) for name in _WORDING), _perplexity(each.details.get("perplexity")))
            for label, each in scores.values()
        ]
        of_people = (percent(details[f"references_{name}"]) for name in _WORDING)
        return [Table(title, ("system", *_WORDING.values(), "perplexity"), [*rows, ("References", *of_people, "–")])]

    def headlines(self, student: Scores, teacher: Scores | None) -> list[tuple[str, str]]:
        """Return the share of true captions, or of those with new runs, and the object recall, if known."""
        named = {
            "true": "of the student's captions are true sentences",
            "new_runs": f"of the student's captions have {RUN} words in a row that no training caption has",
            "object_recall": "of the objects are named by the student",
        }
        return [
            (percent(student.details[key]), words + and_teacher(teacher.details[key] if teacher else None))
            for key, words in named.items()
            if student.details.get(key) is not None and not (key == "new_runs" and self._scenes is not None)
        ]

    def verdict(self, score: float) -> tuple[str, str]:
        """Return the CIDEr of a caption, which is neither correct nor wrong."""
        return f"CIDEr {score:.2f}", ""


def _perplexity(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _of_references(known: KnownWording, rows: Sequence[CaptionRow]) -> dict[str, Any]:
    """Return the `Wording` of the references, and whether kinds stand for words."""
    shares = known.mean([text for row in rows for text in row.references])._asdict()
    return {f"references_{name}": share for name, share in shares.items()} | {"abstracted": bool(known.kinds)}
