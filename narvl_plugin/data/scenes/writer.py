"""Writes the scenes of all splits as TSV files, one folder a task."""

import base64
import io
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from random import Random

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from narvl_plugin.data.scenes.art import load_art
from narvl_plugin.data.scenes.compose import MAX_OBJECTS, Composer, HeldOutPairs
from narvl_plugin.data.scenes.nouns import NOUNS
from narvl_plugin.data.scenes.rows import ROWS, Example
from narvl_plugin.data.sources.writing import ANSWER_LIST, write_answers
from narvl_plugin.data.vqa_gen import parse_answers
from narvl_plugin.whole_files import naming, sole_writer

TASKS = tuple(ROWS)
_JPEG_QUALITY = 90
_MIN_SIDE = 32
_PICTURES_PER_PROCESS = 500  # for fewer, another process is not worth its start
ANSWERS = 3  # their column among those of vqa_gen


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

    Beside questions goes trainval_ans2label.pkl, the list of all answers in train and valid.

    A scene depends on the seed, its split and its number alone, so a longer run begins with the same scenes.
    A pair of nouns held out by the seed never shares a picture of train or valid; every test picture of
    several nouns has such a pair.

    :param out: folder to write into, made if it is missing
    :param train, valid, test: numbers of pictures
    :param size: side of the square pictures in pixels
    :param art: folder of PNG files to draw with in place of the package's
    :param nouns: how many nouns to use, the easiest first
    :param max_objects: the most objects in a picture, copies counted
    :param tasks: which of `TASKS` to write rows for

    Raises SceneSettingError for a setting out of range, ArtError for art that is missing or unreadable, InputError
    where another process writes one of the files.
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


def _answers(folder: Path) -> list[str]:
    """All answers in train and valid, the most frequent first."""
    counts = Counter[str]()
    for split in ("train", "valid"):
        for line in (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines():
            counts.update(list(parse_answers(line.split("\t")[ANSWERS], split)))
    return [answer for answer, _ in counts.most_common()]


def _check_settings(counts: dict[str, int], size: int, nouns: int, max_objects: int, tasks: Sequence[str]) -> None:
    """Refuse settings that cannot work, naming the value and the range."""
    for split, count in counts.items():
        if count < 0:
            raise SceneSettingError(f"{split}={count}: the number of pictures cannot be negative")
    if size < _MIN_SIDE:
        raise SceneSettingError(f"size={size}: pictures need at least {_MIN_SIDE} pixels a side")
    if not 1 <= max_objects <= MAX_OBJECTS:
        raise SceneSettingError(f"max_objects={max_objects}: choose 1 to {MAX_OBJECTS}")
    # With fewer, no set of max_objects nouns is free of held-out pairs.
    least = 2 * max_objects
    if not least <= nouns <= len(NOUNS):
        raise SceneSettingError(
            f"nouns={nouns}: with max_objects={max_objects} choose {least} to {len(NOUNS)} (all there are)"
        )
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise SceneSettingError(f"tasks={', '.join(tasks) or '(none)'}: choose from {', '.join(TASKS)}")


@dataclass(frozen=True)
class _Rows(Dataset[list[str]]):
    """The scenes of a split by their number: a row for each task."""

    split: str
    count: int
    composer: Composer
    seed: int
    tasks: Sequence[str]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[str]:
        name = f"{self.seed}/{self.split}/{index}"
        scene, picture = self.composer.compose(Random(f"{name}/scene"), unseen_pairs=self.split == "test")
        image_id, nouns = f"{self.split}-{index:06d}", tuple(self.composer.glyphs)
        example = Example(image_id, scene, _encode(picture), self.composer.side, nouns)
        return ["\t".join(ROWS[task](example, Random(f"{name}/{task}"))) for task in self.tasks]


def _write_split(out: Path, rows: _Rows) -> None:
    """Write one split of every task, first under temporary names so that a finished file is a whole one.

    Raises InputError where the disk is full.
    """
    paths = [out / task / f"{rows.split}.tsv" for task in rows.tasks]
    parts = [path.with_name(f"{path.name}.part") for path in paths]
    workers = min(os.cpu_count() or 1, len(rows) // _PICTURES_PER_PROCESS)
    drawn = DataLoader(rows, batch_size=None, num_workers=workers)  # in order
    with ExitStack() as stack:
        stack.enter_context(naming(paths[0]))
        files = [stack.enter_context(part.open("w", encoding="utf-8", newline="\n")) for part in parts]
        for lines in tqdm(drawn, desc=f"scenes {rows.split}", unit="picture"):
            for file, line in zip(files, lines, strict=True):
                file.write(line + "\n")
    for part, path in zip(parts, paths, strict=True):
        part.replace(path)


def _encode(picture: Image.Image) -> str:
    """A picture as base64 of its JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
