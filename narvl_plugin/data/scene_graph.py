"""Scene graphs: from an image to the set of triplets of subject, relation and object, each object with its box."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch

from narvl_plugin.data.boxes import format_box
from narvl_plugin.data.collate import Batch, Sample
from narvl_plugin.data.grounding import GroundingDataset
from narvl_plugin.data.sources.visual_genome import load_names
from narvl_plugin.data.text import PROMPTS, TextCodec
from narvl_plugin.data.triplets import Triplet, read_triplets
from narvl_plugin.errors import BadRow, InputError

logger = logging.getLogger(__name__)

MOST_TRIPLETS = 6
"""Largest number of triplets of a row."""
LARGEST_PAIRS = 100_000
"""Largest number of pairs of a relation and a noun. VG150 has 7,500."""
QUESTION = "what are the relations in the image"
"""The question of all rows. It is no prompt of its own, so that vocabularies stay as they are."""

_BOX = r"\s*((?:<bin_[0-9]{1,9}>\s*){4})"
_ELEMENT = re.compile(rf"\s*(.+?){_BOX}(\S+) (.+?){_BOX}")
_BIN = re.compile(r"<bin_([0-9]{1,9})>")

Box = tuple[int, ...]


class SpelledTriplet(NamedTuple):
    """A triplet with boxes in bins.

    Attributes:
        subject: the noun of the subject.
        subject_box: the bins of its edges.
        relation: the relation.
        object: the noun of the object.
        object_box: the bins of its edges.
    """

    subject: str
    subject_box: Box
    relation: str
    object: str
    object_box: Box


def triplets_in(text: str) -> list[SpelledTriplet] | None:
    """Return the triplets of a text that a model predicts, None for a text of another form.

    A triplet is a noun, four `<bin_k>`, a relation as one word with `_` for spaces, a noun, four `<bin_k>`.
    """
    found, place = [], 0
    while text[place:].strip():
        match = _ELEMENT.match(text, place)
        if match is None:
            return None
        subject, box, relation, other, other_box = match.groups()
        bins = [tuple(map(int, _BIN.findall(one))) for one in (box, other_box)]
        found.append(SpelledTriplet(subject.strip(), bins[0], relation.replace("_", " "), other.strip(), bins[1]))
        place = match.end()
    return found


class GraphNames:
    """The nouns and relations that may occur, and their tokens.

    Args:
        nouns: the nouns.
        relations: the relations.
        codec: spells the names.

    Attributes:
        nouns: the tokens of each noun.
        relations: the tokens of each relation.
        sides: the tokens of all names of a subject, and of a relation with its object.
        following: for both, the tokens that may follow the beginning of a name.

    Raises:
        InputError: if there are none that the vocabulary can spell, or too many, or if a relation has a `_`.
    """

    def __init__(self, nouns: Iterable[str], relations: Iterable[str], codec: TextCodec) -> None:
        relations = list(relations)
        for relation in relations:
            if "_" in relation:
                raise InputError(f"--names-file: the relation {relation!r:.100} has a `_`; write a space in its place")
        self.nouns = spelled({noun: noun for noun in sorted(nouns)}, codec)
        self.relations = spelled({relation: relation.replace(" ", "_") for relation in sorted(relations)}, codec)
        number = len(self.nouns) * len(self.relations)
        if not 0 < number <= LARGEST_PAIRS:
            raise InputError(
                f"--names-file: {len(self.nouns)} nouns and {len(self.relations)} relations can be spelled, which are "
                f"{number:,} pairs; give 1 to {LARGEST_PAIRS:,}"
            )
        pairs = [relation + noun for relation in self.relations.values() for noun in self.nouns.values()]
        self.sides = [list(self.nouns.values()), pairs]
        self.following: list[dict[tuple[int, ...], set[int]]] = []
        for names in self.sides:
            following: dict[tuple[int, ...], set[int]] = {name: set() for name in names}
            for name in names:
                for place, token in enumerate(name):
                    following.setdefault(name[:place], set()).add(token)
            self.following.append(following)
        self._whole = [frozenset(names) for names in self.sides]

    def is_name(self, side: int, tokens: tuple[int, ...]) -> bool:
        """Return whether tokens are a whole name of a side."""
        return tokens in self._whole[side]

    @classmethod
    def of_file(cls, file: str | Path, codec: TextCodec) -> GraphNames:
        """Return the names of a file in the form of VG-SGG-dicts.json.

        Raises:
            InputError: if the file cannot be used.
        """
        if not Path(file).is_file():
            raise InputError(f"--names-file {file}: no such file; give a list of names, such as VG-SGG-dicts.json")
        nouns, relations = load_names(Path(file))
        return cls(nouns, relations, codec)


def spelled(texts: Mapping[str, str], codec: TextCodec) -> dict[str, tuple[int, ...]]:
    """Return the tokens of each name's text. Names that the vocabulary cannot spell are left out with a warning."""
    tokens_of = {name: tuple(codec.encode(f" {text}").tolist()) for name, text in texts.items()}
    lacking = [name for name, tokens in tokens_of.items() if codec.decode(tokens) != texts[name]]
    if lacking:
        logger.warning(
            "--bpe-dir: the vocabulary cannot spell %d names of --names-file, such as %r, so they are never predicted; "
            "train it on the column of targets (narvl vocab --column)",
            *(len(lacking), lacking[0][:100]),
        )
    return {name: tokens for name, tokens in tokens_of.items() if name not in lacking}


class SceneGraphDataset(GroundingDataset):
    """Rows of (id, image, triplets), selected in this order.

    The column of triplets is that of `narvl_plugin.data.triplets`, with at most `MOST_TRIPLETS`. It is empty for an
    image without any; the target is then `</s>` alone. The target of a triplet is the subject's noun, four `<bin_k>`,
    the relation, the object's noun, and four `<bin_k>`. Triplets with equal targets are one.

    The target has the triplets in the reading order of the upper left corners of their subjects, then of their
    objects. With `random_order`, each epoch of a training learns another order of each row.

    A batch also holds `graphs`, the columns of its B rows.

    Attributes:
        names: the names that may occur.
        random_order: whether a training learns the triplets in random orders.
    """

    column_names = ("id", "image", "triplets")
    placeholders = {"triplets": ""}
    prompt = "vqa_gen"

    def __init__(self, *args: Any, names: GraphNames, random_order: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names = names
        self.random_order = random_order

    def parse(self, column: str, where: str, parse_one: Callable[[str, str], torch.Tensor]) -> torch.Tensor:
        """Return the boxes of subjects and objects, float32 (2 K, 4), see `GroundingDataset.parse`."""
        triplets = read_triplets(column, where)
        if len(triplets) > MOST_TRIPLETS:
            raise BadRow(
                f"{where}: has {len(triplets)} triplets, and this task reads at most {MOST_TRIPLETS}; delete some"
            )
        boxes = [parse_one(format_box(one.box), where) for subject, _, other in triplets for one in (subject, other)]
        return torch.stack(boxes) if boxes else torch.empty(0, 4)

    def join(self, boxes: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the boxes (2 K, 4) of B rows as they are."""
        return boxes

    def source_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the question that the encoder reads, int64 (S,); it is the same for all rows."""
        return self.with_specials(self.options.codec.encode(PROMPTS[self.prompt].format(question=QUESTION)))

    def make_sample(self, row: int, columns: list[str]) -> Sample:
        """Return the sample of one row; see `GroundingDataset.make_sample`."""
        return super().make_sample(row, columns) | {"graph": columns[-1]}

    def make_batch(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of some samples, with the graphs."""
        return super().make_batch(samples) | {"graphs": [sample["graph"] for sample in samples]}

    def spell(self, row: int, column: str, resized_boxes: torch.Tensor) -> torch.Tensor:
        """Return the target of a row, see `GroundingDataset.spell`."""
        where = self.tsv.where(row)
        triplets = read_triplets(column, where)
        bins = self.bins_of(resized_boxes).reshape(-1, 2, 4).tolist()
        elements = {}
        for triplet, boxes in zip(triplets, bins, strict=True):
            (x, y, *_), (other_x, other_y, *_) = boxes
            tokens = self._element(triplet, boxes, where)
            elements[tokens] = (y, x, other_y, other_x, tokens)
        ordered = sorted(elements, key=elements.__getitem__)
        if self.random_order and self.training:
            ordered = Random(f"{self.epoch}/{row}").sample(ordered, len(ordered))
        return torch.tensor([token for element in ordered for token in element], dtype=torch.int64)

    def _element(self, triplet: Triplet, boxes: Sequence[Sequence[int]], where: str) -> tuple[int, ...]:
        """Return the tokens of a triplet."""
        subject, relation, other = triplet
        try:
            nouns = [self.names.nouns[one.noun] for one in (subject, other)]
            between = self.names.relations[relation]
        except KeyError as error:
            raise BadRow(
                f"{where}: the name {error} is not in --names-file, or cannot be spelled; delete the triplet"
            ) from None
        first, second = ([self.first_bin + edge for edge in box] for box in boxes)
        return (*nouns[0], *first, *between, *nouns[1], *second)
