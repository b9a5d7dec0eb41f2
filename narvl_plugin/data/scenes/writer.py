"""Writer of the scenes of all splits as TSV files, one folder for each task."""

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from narvl_plugin.data.scenes.art import load_art
from narvl_plugin.data.scenes.backgrounds import COLORS, PATTERNS
from narvl_plugin.data.scenes.compose import MAX_OBJECTS, Composer, HeldOutPairs
from narvl_plugin.data.scenes.nouns import NOUNS
from narvl_plugin.data.scenes.rows import GRAPH_RELATIONS, ROWS, TREE_REGIONS, Example
from narvl_plugin.data.scenes.scene import scene_as_json
from narvl_plugin.data.scenes.truth import scenes_file
from narvl_plugin.data.scenes.words import SIZES
from narvl_plugin.data.sources.writing import ANSWER_LIST, write_answers
from narvl_plugin.data.trees import LEVELS
from narvl_plugin.data.vqa_gen import parse_answers
from narvl_plugin.whole_files import naming, sole_writer, write_whole

TASKS = tuple(ROWS)
_JPEG_QUALITY = 90
_MIN_SIDE = 32
_IMAGES_PER_PROCESS = 500  # for fewer, the start of another process takes longer than it saves
NAMES_LIST = "names.json"
"""The file of the names of scene graphs or scene trees, beside their rows."""
ANSWERS = 3  # the column of the answers in the rows of vqa_gen


class SceneSettingError(ValueError):
    """A setting of the embedded scenes is out of range."""


def write_scenes(
    out: Path,
    *,
    train: int,
    valid: int,
    test: int,
    size: int = 128,
    seed: int = 1,
    art: Path | None = None,
    nouns: int = 100,
    max_objects: int = 4,
    tasks: Sequence[str] = ("caption",),
) -> None:
    """Compose scenes and write `out`/TASK/{train,valid,test}.tsv; the same arguments give the same bytes.

    The folder of questions also gets trainval_ans2label.pkl, the list of all answers in train and valid. The folder of
    captions gets the content of each scene, SPLIT.scenes.jsonl. Those of scene graphs and scene trees get names.json,
    their names.

    A scene depends on the seed, its split and its number alone, so a longer run begins with the same scenes. A pair of
    nouns held out by the seed never shares an image of train or valid. Every test image of several nouns has such a
    pair.

    Args:
        out: the folder to write into, created if it is missing.
        train: the number of training images.
        valid: the number of validation images.
        test: the number of test images.
        size: the side of the square images in pixels.
        seed: the seed of all random choices.
        art: a folder of PNG files that replace the package's art.
        nouns: the number of nouns to use, the easiest first.
        max_objects: the largest number of objects in an image, with copies.
        tasks: the tasks to write rows for, of `TASKS`.

    Raises:
        SceneSettingError: for a setting out of range.
        ArtError: for art that is missing or unreadable.
        InputError: if another process is writing one of the files.
    """
    counts = {"train": train, "valid": valid, "test": test}
    _check_settings(counts, size, nouns, max_objects, tasks)
    chosen = NOUNS[:nouns]
    tasks = tuple(dict.fromkeys(tasks))
    composer = Composer(load_art(chosen, art), HeldOutPairs(chosen, seed), size, max_objects)
    with ExitStack() as locks:
        for task, split in product(tasks, counts):
            locks.enter_context(sole_writer(Path(out) / task / f"{split}.tsv"))
        for split, count in counts.items():
            _write_split(Path(out), _Rows(split, count, composer, seed, tasks))
        if "vqa_gen" in tasks:
            folder = Path(out) / "vqa_gen"
            (folder / ANSWER_LIST).unlink(missing_ok=True)
            write_answers(folder, partial(_answers, folder))
        for task, names in (("scene_graph", _graph_names(chosen)), ("scene_tree", _tree_names(chosen))):
            if task in tasks:
                write_whole(Path(out) / task / NAMES_LIST, f"{json.dumps(names, indent=1)}\n".encode())


def _graph_names(nouns: Sequence[str]) -> dict[str, Any]:
    """Return the names of scene graphs, in the form of VG-SGG-dicts.json."""
    numbered = [{name: place for place, name in enumerate(names, 1)} for names in (nouns, GRAPH_RELATIONS.values())]
    return dict(zip(("label_to_idx", "predicate_to_idx"), numbered, strict=True))


def _tree_names(nouns: Sequence[str]) -> dict[str, Any]:
    """Return the words of scene trees by level, see `narvl_plugin.data.scene_tree.TreeNames`."""
    labels = [[list(COLORS), list(PATTERNS)], [list(TREE_REGIONS)], [["", *SIZES], list(nouns)]]
    return dict(zip(LEVELS, labels, strict=True))


def _answers(folder: Path) -> list[str]:
    """Return all answers in train and valid, the most frequent first."""
    counts = Counter[str]()
    for split in ("train", "valid"):
        for line in (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines():
            counts.update(list(parse_answers(line.split("\t")[ANSWERS], split)))
    return [answer for answer, _ in counts.most_common()]


def _check_settings(counts: dict[str, int], size: int, nouns: int, max_objects: int, tasks: Sequence[str]) -> None:
    """Raise SceneSettingError for settings out of range, with the value and the range."""
    for split, count in counts.items():
        if count < 0:
            raise SceneSettingError(f"{split}={count}: the number of images cannot be negative")
    if size < _MIN_SIDE:
        raise SceneSettingError(f"size={size}: images need at least {_MIN_SIDE} pixels a side")
    if not 1 <= max_objects <= MAX_OBJECTS:
        raise SceneSettingError(f"max_objects={max_objects}: choose 1 to {MAX_OBJECTS}")
    # With fewer nouns, every set of max_objects nouns contains a held-out pair.
    least = 2 * max_objects
    if not least <= nouns <= len(NOUNS):
        raise SceneSettingError(
            f"nouns={nouns}: with max_objects={max_objects} choose {least} to {len(NOUNS)} (all nouns)"
        )
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise SceneSettingError(f"tasks={', '.join(tasks) or '(none)'}: choose from {', '.join(TASKS)}")


@dataclass(frozen=True)
class _Rows(Dataset[tuple[list[str], str]]):
    """The scenes of a split by their number: a row for each task."""

    split: str
    count: int
    composer: Composer
    seed: int
    tasks: Sequence[str]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[list[str], str]:
        """Return a row for each task, and the scene's content as a line of JSON."""
        name = f"{self.seed}/{self.split}/{index}"
        scene, image = self.composer.compose(Random(f"{name}/scene"), unseen_pairs=self.split == "test")
        image_id, nouns = f"{self.split}-{index:06d}", tuple(self.composer.glyphs)
        example = Example(image_id, scene, _encode(image), self.composer.side, nouns)
        rows = ["\t".join(ROWS[task](example, Random(f"{name}/{task}"))) for task in self.tasks]
        return rows, json.dumps({"id": image_id, **scene_as_json(scene)})


def _write_split(out: Path, rows: _Rows) -> None:
    """Write one split of every task, and its scenes, under temporary names until the files are complete.

    Raises:
        InputError: if the disk is full.
    """
    paths = [out / task / f"{rows.split}.tsv" for task in rows.tasks]
    if "caption" in rows.tasks:
        paths.append(scenes_file(paths[rows.tasks.index("caption")]))
    parts = [path.with_name(f"{path.name}.part") for path in paths]
    workers = min(os.cpu_count() or 1, len(rows) // _IMAGES_PER_PROCESS)
    drawn = DataLoader(rows, batch_size=None, num_workers=workers)  # in order
    with ExitStack() as stack:
        stack.enter_context(naming(paths[0]))
        files = [stack.enter_context(part.open("w", encoding="utf-8", newline="\n")) for part in parts]
        for lines, content in tqdm(drawn, desc=f"scenes {rows.split}", unit="image"):
            for file, line in zip(files, [*lines, content], strict=False):  # without captions, no content
                file.write(line + "\n")
    for part, path in zip(parts, paths, strict=True):
        part.replace(path)


def _encode(image: Image.Image) -> str:
    """Return an image as base64 of its JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
