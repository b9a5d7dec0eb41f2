"""Scores of predictions against the official annotations, as in the benchmarks' own evaluations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from narvl_plugin.data.boxes import GOOD_IOU, NO_BOX, overlaps
from narvl_plugin.data.sources import coco, gqa, grefcoco, refcoco, snli_ve, visual_genome, vqav2
from narvl_plugin.data.sources.instances import edges
from narvl_plugin.data.sources.reading import not_as_published, pick, pick_all, read_json
from narvl_plugin.data.sources.writing import Dropped
from narvl_plugin.data.triplets import Instance, Triplet
from narvl_plugin.data.vqa_answers import official_accuracy
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.evaluation.predictions import form_of, read_predictions
from narvl_plugin.scoring.coco_caption import METRICS, score_captions
from narvl_plugin.scoring.entailment import OTHER
from narvl_plugin.scoring.gqa import same_answer
from narvl_plugin.scoring.regions import score_regions
from narvl_plugin.scoring.tokenization import why_plain
from narvl_plugin.scoring.triplets import score_triplets

ALL = "all"

GREEDY = (
    f"Boxes are paired so that as many pairs as possible have an IoU of {GOOD_IOU}. GREC's own program pairs them "
    "greedily by the generalized IoU, and may find fewer pairs."
)
SEVERAL_RELATIONS = (
    "R@K and mR@K count all relations of the list. If it has several for one pair of boxes, compare with published "
    "figures without graph constraint (ng-R@K)."
)

Truth = dict[str, dict[Any, Any]]
"""The annotation by split, then by official id; a file without splits has one, named `all`."""

Pairs = dict[str, dict[Any, tuple[Any, Any]]]
"""The prediction and the annotation, by split, then by official id."""

Table = dict[str, dict[str, float]]
"""A number by row, then by column; counts are integers."""


@dataclass
class Scores:
    """The scores of a file of predictions.

    Attributes:
        tables: the tables by title.
        notes: sentences that a reader needs to compare the scores.
    """

    tables: dict[str, Table]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Benchmark:
    """The evaluation of a task's predictions.

    Attributes:
        files: the names of the official files, in the order of `truth`'s arguments.
        truth: reads the files.
        scores: scores the predictions of one or more splits.
        optional: the names of further files that may be missing.
    """

    files: tuple[str, ...]
    truth: Callable[..., Truth]
    scores: Callable[[Pairs], Scores]
    optional: tuple[str, ...] = ()

    def takes(self, files: Sequence[Path]) -> bool:
        """Return whether files have the number and the suffixes of the official ones."""
        names = [*self.files, *self.optional][: max(len(files), len(self.files))]
        return [file.suffix for file in files] == [Path(name).suffix for name in names]

    def __str__(self) -> str:
        """Return the names of the official files."""
        return ", ".join(self.files) + "".join(f" and, if you like, {name}" for name in self.optional)


def evaluate(predictions: Path, annotations: Sequence[Path], task: str) -> Scores:
    """Score a file of predictions; annotations of several splits are reduced to the splits with predictions.

    Args:
        predictions: the file of predictions.
        annotations: the official files.
        task: one of `BENCHMARKS`.

    Returns:
        The scores.

    Raises:
        InputError: for an unknown task, for files of another task, and for a missing or surplus prediction.
        MissingInput: if a file does not exist.
        BadRow: if an annotation is not as published.
    """
    form_of(task)
    benchmark = BENCHMARKS[task]
    if not benchmark.takes(annotations):
        given = ", ".join(map(str, annotations))
        raise InputError(f"--task {task}: is scored against {benchmark}, in this order; given: {given}")
    for file in annotations:
        if not file.is_file():
            raise MissingInput(f"{file}: no such file of annotations")
    return benchmark.scores(paired(read_predictions(predictions, task), benchmark.truth(*annotations), predictions))


def paired(said: Mapping[Any, Any], truth: Truth, file: Path) -> Pairs:
    """Return predictions beside annotations, for the splits that have any prediction.

    Args:
        said: the predictions by official id.
        truth: the annotations.
        file: the file of predictions, for errors.

    Returns:
        The pairs.

    Raises:
        InputError: if the ids of these splits differ from those of the predictions.
    """
    splits = {split: annotated for split, annotated in truth.items() if not said.keys().isdisjoint(annotated)}
    complete = {split: annotated for split, annotated in splits.items() if annotated.keys() <= said.keys()}
    if said.keys() == {key for annotated in complete.values() for key in annotated}:
        splits = complete  # other splits may share ids with these
    wanted = {key for annotated in (splits or truth).values() for key in annotated}
    missing = [key for key in wanted if key not in said]
    surplus = [key for key in said if key not in wanted]
    if missing or surplus:
        complaints = [
            f"{len(keys)} predictions are {what}, such as that of {min(keys)}"
            for keys, what in ((missing, "missing"), (surplus, "of no annotated id"))
            if keys
        ]
        names = "" if ALL in truth else f" ({', '.join(splits or truth)})"
        raise InputError(
            f"{file}: {' and '.join(complaints)}: it has {len(said)}, and the annotations{names} {len(wanted)}; score "
            "complete predictions of the same split"
        )
    if not said:
        raise InputError(f"{file}: holds no predictions")
    return {split: {key: (said[key], found) for key, found in annotated.items()} for split, annotated in splits.items()}


def by_id(items: Iterable[tuple[Any, Any]], where: str) -> dict[Any, Any]:
    """Return annotations by id.

    Raises:
        BadRow: for two annotations of one id.
    """
    found: dict[Any, Any] = {}
    for key, item in items:
        if key in found:
            not_as_published(where, f"has the id {key} twice")
        found[key] = item
    return found


def caption_truth(file: Path) -> Truth:
    """Return the references of captions_val2014.json, or by split those of Karpathy's dataset_coco.json."""
    content = read_json(file)
    if not (isinstance(content, dict) and "annotations" in content):
        images = coco.images_in(content, file)
        return {
            split: by_id(
                (
                    (image["cocoid"], [sentence["raw"] for sentence in image["sentences"]])
                    for image in images
                    if image["split"] in names
                ),
                f"{file}:images",
            )
            for split, names in coco.SPLITS.items()
        }
    references: dict[int, list[str]] = defaultdict(list)
    for found in pick_all(content["annotations"], {"image_id": int, "caption": str}, f"{file}:annotations"):
        references[found["image_id"]].append(found["caption"])
    return {ALL: dict(references)}


def caption_scores(pairs: Pairs) -> Scores:
    """Score captions by BLEU, METEOR, ROUGE-L and CIDEr."""
    result = Scores({"captions": {}})
    for split, captions in pairs.items():
        scores = score_captions(
            {str(key): caption for key, (caption, _) in captions.items()},
            {str(key): references for key, (_, references) in captions.items()},
        )
        values = {name: scores.values[name] for name in METRICS if name in scores.values}
        result.tables["captions"][split] = values | {"pictures": len(captions)}
        words = "by the Penn Treebank tokeniser" if scores.tokenizer == "ptb" else f"plainly ({why_plain()})"
        result.notes = [f"Words are split {words}.", *(f"No {name}: {why}." for name, why in scores.missing.items())]
    return result


def vqa_truth(file: Path) -> Truth:
    """Return the annotations of v2_mscoco_val2014_annotations.json."""
    fields = {"question_id": int, "answers": list, "answer_type": str, "question_type": str}
    annotations = vqav2.load_annotations(file, fields)
    for annotation in annotations:
        if not annotation["answers"]:
            not_as_published(f"{file}:annotations", f"question_id {annotation['question_id']} has no answers")
    return {ALL: by_id(((found["question_id"], found) for found in annotations), f"{file}:annotations")}


def vqa_scores(pairs: Pairs) -> Scores:
    """Score answers by VQA's accuracy, overall and by type of answer and of question."""
    by_type: dict[str, list[tuple[str, float]]] = {"answer type": [], "question type": []}
    for said, question in pairs[ALL].values():
        accuracy = official_accuracy(said, question["answers"])
        by_type["answer type"] += [(ALL, accuracy), (question["answer_type"], accuracy)]
        by_type["question type"].append((question["question_type"], accuracy))
    return Scores({title: accuracies(scores, "questions") for title, scores in by_type.items()})


def gqa_truth(file: Path) -> Truth:
    """Return the questions of a file such as testdev_balanced_questions.json, with their `types`."""
    fields = {"imageId": str, "answer": str, "types": dict}
    questions = gqa.load(file, fields)
    for key, question in questions:
        question["types"] = pick(question["types"], {"structural": str, "semantic": str}, f"{file}:{key}.types")
    return {ALL: dict(questions)}


def gqa_scores(pairs: Pairs) -> Scores:
    """Score answers by GQA's accuracy: overall, for binary and open questions, and by type.

    As in the official evaluation, a question is open if its structural type is `query`, else binary. The answer to a
    binary question is yes, no or one of two named options.
    """
    by_type: dict[str, list[tuple[str, float]]] = {"questions": [], "structural type": [], "semantic type": []}
    for said, question in pairs[ALL].values():
        right, types = float(same_answer(said, question["answer"])), question["types"]
        kind = "open" if types["structural"] == "query" else "binary"
        by_type["questions"] += [(ALL, right), (kind, right)]
        by_type["structural type"].append((types["structural"], right))
        by_type["semantic type"].append((types["semantic"], right))
    return Scores({title: accuracies(scores, "questions") for title, scores in by_type.items()})


def refcoco_truth(references: Path, instances: Path) -> Truth:
    """Return the boxes x0, y0, x1, y1 of refs(….).p and instances.json by split and sentence."""
    regions = refcoco.load_regions(references, instances)
    return {
        split: by_id(((region.sentence["sent_id"], edges(region.bbox)) for region in found), str(references))
        for split, found in regions.items()
    }


def refcoco_scores(pairs: Pairs) -> Scores:
    """Score the boxes of each split by the share with an IoU of at least 0.5, and by their mean IoU."""
    right = f"accuracy at IoU {GOOD_IOU}"
    table: Table = {}
    for split, boxes in pairs.items():
        said, true = zip(*boxes.values(), strict=True)
        scores = overlaps(said, true)
        table[split] = {
            right: sum(score >= GOOD_IOU for score in scores) / len(scores),
            "mean IoU": sum(scores) / len(scores),
            "no box": sum(box is None for box in said),
            "sentences": len(scores),
        }
    return Scores({"boxes": table})


def grefcoco_truth(references: Path, instances: Path) -> Truth:
    """Return the boxes x0, y0, x1, y1 of grefs(….).json and instances.json by split and sentence."""
    return {
        split: by_id(((expression.key, expression.boxes) for expression in found), str(references))
        for split, found in grefcoco.load_expressions(references, instances).items()
    }


def grefcoco_scores(pairs: Pairs) -> Scores:
    """Score the sets of boxes of each split as GREC does; a prediction that is not boxes counts as one wrong box."""
    table: Table = {}
    for split, boxes in pairs.items():
        scores = score_regions(
            [_stacked([NO_BOX] if said is None else said) for said, _ in boxes.values()],
            [_stacked(true) for _, true in boxes.values()],
        )
        values = {
            f"Precision@(F1=1, IoU>={GOOD_IOU})": scores.precision,
            "mean F1": scores.mean_f1,
            "N-acc": scores.n_acc,
            "T-acc": scores.t_acc,
        }
        table[split] = {name: value for name, value in values.items() if value is not None} | {
            "no boxes": sum(prediction is None for prediction, _ in boxes.values()),
            "sentences": len(boxes),
        }
    return Scores({"sets of boxes": table}, [GREEDY])


def _stacked(boxes: Sequence[Sequence[float]]) -> torch.Tensor:
    """Return boxes as a tensor, float64 (N, 4)."""
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)


def snli_ve_truth(file: Path) -> Truth:
    """Return the gold labels of snli_ve_….jsonl without the pairs that annotators disagreed on."""
    pairs = ((pair["pairID"], pair["gold_label"]) for pair in snli_ve.load(file))
    return {ALL: by_id(((key, label) for key, label in pairs if label != snli_ve.UNDECIDED), str(file))}


def snli_ve_scores(pairs: Pairs) -> Scores:
    """Score labels by accuracy, overall and by gold label, with a confusion matrix."""
    scores = []
    taken: dict[str, Counter[str]] = defaultdict(Counter)
    for said, gold in pairs[ALL].values():
        scores += [(ALL, float(said == gold)), (gold, float(said == gold))]
        taken[gold][said if said in snli_ve.LABELS else OTHER] += 1
    confusion: Table = {gold: {said: taken[gold][said] for said in (*snli_ve.LABELS, OTHER)} for gold in sorted(taken)}
    return Scores({"gold label": accuracies(scores, "pairs"), "gold label, predicted as": confusion})


def visual_genome_truth(image_data: Path, relationships: Path, splits: Path, names: Path | None = None) -> Truth:
    """Return the triplets of the official files by split and image, for images with triplets.

    They are those that `narvl data visual-genome` writes: with clipped boxes and, if a list of names is given, with
    these alone.
    """
    known = visual_genome.load_names(names) if names else None
    found = visual_genome.load_graphs(image_data, relationships, splits)
    return {split: by_id(_with_triplets(graphs, known), f"{splits}:{split}") for split, graphs in found.items()}


def _with_triplets(
    graphs: Iterable[visual_genome.Graph], known: visual_genome.Names | None
) -> Iterator[tuple[int, list[Triplet]]]:
    for graph in graphs:
        with suppress(Dropped):
            yield graph.image["image_id"], visual_genome.triplets_in(graph, known, Counter())


def visual_genome_scores(pairs: Pairs) -> Scores:
    """Score the triplets of each split by recall, mean recall over relations, and exact graphs."""
    table: Table = {}
    for split, graphs in pairs.items():
        said, true = zip(*graphs.values(), strict=True)
        scores = score_triplets([list(map(_triplet, one)) for one in said], true)
        table[split] = (
            {f"R@{rank}": value for rank, value in scores.recall.items()}
            | {f"mR@{rank}": value for rank, value in scores.mean_recall.items()}
            | {"exact graph": scores.exact, "images": len(graphs)}
        )
    return Scores({"triplets": table}, [SEVERAL_RELATIONS])


def _triplet(said: Mapping[str, Any]) -> Triplet:
    subject, other = (
        Instance(visual_genome.tidy_name(said[side]), tuple(said[f"{side}_box"])) for side in ("subject", "object")
    )
    return Triplet(subject, visual_genome.tidy_name(said["relation"]), other)


def accuracies(scores: Iterable[tuple[str, float]], counted: str) -> Table:
    """Return the mean and the number of the scores of each kind; `all` is first."""
    groups: dict[str, list[float]] = defaultdict(list)
    for kind, score in scores:
        groups[kind].append(score)
    return {
        kind: {"accuracy": sum(groups[kind]) / len(groups[kind]), counted: len(groups[kind])}
        for kind in sorted(groups, key=lambda kind: (kind != ALL, kind))
    }


BENCHMARKS = {
    "caption": Benchmark(("captions_val2014.json or dataset_coco.json",), caption_truth, caption_scores),
    "vqa": Benchmark(("v2_mscoco_val2014_annotations.json",), vqa_truth, vqa_scores),
    "gqa": Benchmark(("testdev_balanced_questions.json",), gqa_truth, gqa_scores),
    "refcoco": Benchmark(("refs(unc).p", "instances.json"), refcoco_truth, refcoco_scores),
    "grefcoco": Benchmark(("grefs(unc).json", "instances.json"), grefcoco_truth, grefcoco_scores),
    "snli_ve": Benchmark(("snli_ve_test.jsonl",), snli_ve_truth, snli_ve_scores),
    "visual_genome": Benchmark(
        ("image_data.json", "relationships.json", "vg_splits.json"),
        visual_genome_truth,
        visual_genome_scores,
        optional=("VG-SGG-dicts.json",),
    ),
}
