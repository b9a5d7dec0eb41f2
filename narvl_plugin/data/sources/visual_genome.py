"""The relationships of Visual Genome as the TSV of scene graphs, see `narvl_plugin.data.triplets`.

Official files and their places (RAW and IMAGES may be the same folder)::

    RAW/image_data.json         from image_data.json.zip, https://homes.cs.washington.edu/~ranjay/visualgenome/api.html
    RAW/relationships.json      from relationships.json.zip of version 1.4, the same
    RAW/vg_splits.json          sg2im/data/vg_splits.json of https://github.com/google/sg2im
    IMAGES/VG_100K/2.jpg …      images.zip
    IMAGES/VG_100K_2/1.jpg …    images2.zip

`image_data.json` holds a list of images with `image_id`, `width` and `height`. `relationships.json` holds a list of
objects with `image_id` and `relationships`. A relationship has a `predicate`, a `subject` and an `object`. These two
have a box (`x`, `y`, `w`, `h` in pixels) and `names`, or one `name`. Visual Genome has no official split;
`vg_splits.json` holds the image ids of `train`, `val` and `test`. An image may lie in either folder.

The names are those that people typed, in lower case, and there are tens of thousands. A list of names restricts them,
such as that of VG150: VG-SGG-dicts.json of https://github.com/danfeiX/scene-graph-TF-release. It is an object with
`label_to_idx` for nouns and `predicate_to_idx` for relations. The boxes and the split of VG150 are others.

Source: Krishna et al., Visual Genome, https://arxiv.org/abs/1602.07332.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from narvl_plugin.data.boxes import is_box
from narvl_plugin.data.sources.instances import edges, inside
from narvl_plugin.data.sources.reading import Record, chosen_splits, need, not_as_published, pick, pick_all, read_json
from narvl_plugin.data.sources.writing import Columns, Dropped, ImageFolder, Notes, Outcome, write_split
from narvl_plugin.data.triplets import LONGEST_NAME, MOST_TRIPLETS, Instance, Triplet, clean_name, write_triplets

SPLITS = ("train", "val", "test")
FOLDERS = ("VG_100K", "VG_100K_2")
DOWNLOAD = (
    "unpack image_data.json.zip, relationships.json.zip, images.zip and images2.zip (visualgenome.org), and download "
    "sg2im/data/vg_splits.json (github.com/google/sg2im)"
)
IMAGE = {"image_id": int, "width": int, "height": int}
RELATED = {"image_id": int, "relationships": list}
RELATIONSHIP = {"predicate": str, "subject": dict, "object": dict}
BOX = ("x", "y", "w", "h")
READ = frozenset([*RELATED, *RELATIONSHIP, *BOX, "name", "names"])
"""The fields of `relationships.json` that are read. All fields would take gigabytes."""


class Names(NamedTuple):
    """The names that may occur.

    Attributes:
        nouns: those of objects.
        relations: those of relations.
    """

    nouns: frozenset[str]
    relations: frozenset[str]


class Graph(NamedTuple):
    """An image with its relationships as published.

    Attributes:
        image: `image_id`, `width` and `height`.
        triplets: names as people typed them, and boxes that may exceed the image.
    """

    image: Record
    triplets: list[Triplet]


def convert_visual_genome(
    raw: Path, out: Path, images: ImageFolder, *, splits: Sequence[str] | None = None, names: Path | None = None
) -> Iterator[Outcome]:
    """Write OUT/{train,val,test}.tsv and yield the outcome of each; a row is one image with its triplets.

    Boxes that exceed their image are clipped to it. A triplet is left out if one is then empty, or if a name is not
    listed. Images without triplets are dropped.

    Args:
        raw: the folder of the official files.
        out: the folder to write into.
        images: the images' folder, and their form in the rows.
        splits: the splits to write; all by default.
        names: the list of names; by default all names occur.

    Yields:
        The outcome of each file.

    Raises:
        MissingInput: if a file or folder does not exist; raised before anything is written.
        BadRow: if a record is not as published.
    """
    chosen = chosen_splits(splits, SPLITS)
    files = [raw / name for name in ("image_data.json", "relationships.json", "vg_splits.json")]
    folders = [images.folder / name for name in FOLDERS]
    # Many people keep all images in one of the two folders.
    need([*files, *([names] if names else [])], [] if any(map(Path.is_dir, folders)) else folders, DOWNLOAD)
    known = load_names(names) if names else None
    load = cache(partial(load_graphs, *files))
    for split in chosen:
        yield write_split(
            out / f"{split}.tsv",
            partial(in_split, load, split),
            partial(graph_row, images.folder, known),
            inputs=[*files, *([names] if names else [])],
            images=images,
        )


def load_graphs(image_data: Path, relationships: Path, splits: Path) -> dict[str, list[Graph]]:
    """Return the images of each split with their relationships."""
    images = {image["image_id"]: image for image in pick_all(read_json(image_data), IMAGE, str(image_data))}
    found: dict[int, list[Triplet]] = {}
    for index, related in enumerate(pick_all(read_json(relationships, without_unread), RELATED, str(relationships))):
        where = f"{relationships}[{index}]"
        if related["image_id"] in found:
            not_as_published(where, f"has the image_id {related['image_id']} again")
        found[related["image_id"]] = [
            triplet_of(one, f"{where}.relationships[{number}]") for number, one in enumerate(related["relationships"])
        ]
    graphs: dict[str, list[Graph]] = {}
    for split, keys in pick(read_json(splits), dict.fromkeys(SPLITS, list), str(splits)).items():
        for key in keys:
            if type(key) is not int or key not in images:
                not_as_published(f"{splits}:{split}", f"{key!r:.40} is not among the images of {image_data}")
        graphs[split] = [Graph(images[key], found.get(key, [])) for key in keys]
    return graphs


def without_unread(found: Record) -> Record:
    """Reduce an object to the fields that are read."""
    return {name: value for name, value in found.items() if name in READ}


def triplet_of(relationship: Any, where: str) -> Triplet:
    """Return a relationship as published.

    Raises:
        BadRow: if it is not.
    """
    fields = pick(relationship, RELATIONSHIP, where)
    subject, other = (instance_of(fields[side], f"{where}.{side}") for side in ("subject", "object"))
    return Triplet(subject, fields["predicate"], other)


def instance_of(record: Record, where: str) -> Instance:
    """Return an object with its first name, which may be empty."""
    bbox: list[Any] = [record.get(side) for side in BOX]
    if not is_box(bbox):
        not_as_published(where, f"has x, y, w, h {bbox!r:.60}, not 4 numbers of pixels")
    names = record["names"] if "names" in record else [record.get("name")]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        not_as_published(where, f"has names {names!r:.60}, not a list of texts")
    x0, y0, x1, y1 = edges(bbox)
    return Instance(names[0] if names else "", (x0, y0, x1, y1))


def load_names(file: Path) -> Names:
    """Return the names of a list.

    Raises:
        BadRow: if it is not as published.
    """
    found = pick(read_json(file), {"label_to_idx": dict, "predicate_to_idx": dict}, str(file))
    return Names(*(frozenset(map(tidy_name, found[key])) for key in ("label_to_idx", "predicate_to_idx")))


def tidy_name(text: str) -> str:
    """Return a name in lower case that a column of triplets can hold, or an empty text."""
    return clean_name(text.lower())


def in_split(load: Callable[[], dict[str, list[Graph]]], split: str) -> list[Graph]:
    """Return the images of a split."""
    return load()[split]


def graph_row(folder: Path, known: Names | None, graph: Graph, notes: Notes) -> Columns:
    """Return uniq-id, image-id, triplets, image."""
    key = graph.image["image_id"]
    paths = [Path(part, f"{key}.jpg") for part in FOLDERS]
    image = next((path for path in paths if (folder / path).is_file()), paths[0])
    return [str(key), str(key), write_triplets(triplets_in(graph, known, notes)), image]


def triplets_in(graph: Graph, known: Names | None, notes: Notes) -> list[Triplet]:
    """Return the triplets of an image as a column can hold them, each once.

    Args:
        graph: the image.
        known: the names that may occur; None for any.
        notes: counts of what is left out.

    Raises:
        Dropped: if there is none, or more than `MOST_TRIPLETS`.
    """
    triplets: dict[Triplet, None] = {}
    for subject, relation, other in graph.triplets:
        try:
            triplet = Triplet(
                _within(subject, graph.image, known, notes),
                _listed(relation, known and known.relations),
                _within(other, graph.image, known, notes),
            )
        except Dropped as reason:
            notes[f"triplets left out ({reason})"] += 1
            continue
        notes["repeated triplets left out"] += triplet in triplets
        triplets[triplet] = None
    if not triplets:
        raise Dropped("no triplet")
    if len(triplets) > MOST_TRIPLETS:
        raise Dropped(f"more than {MOST_TRIPLETS} triplets")
    return list(triplets)


def _within(instance: Instance, image: Record, known: Names | None, notes: Notes) -> Instance:
    noun = _listed(instance.noun, known and known.nouns)
    x0, y0, x1, y1 = inside(instance.box, image, notes)
    return Instance(noun, (x0, y0, x1, y1))


def _listed(name: str, names: frozenset[str] | None) -> str:
    tidied = tidy_name(name)
    if not tidied:
        raise Dropped("no name")
    if len(tidied) > LONGEST_NAME:
        raise Dropped(f"name of more than {LONGEST_NAME} characters")
    if names is not None and tidied not in names:
        raise Dropped("name not in the list")
    return tidied
