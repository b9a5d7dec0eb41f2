"""How many captions are sentences, are true, and name everything: exact, since the scenes' content is known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from narvl_plugin.data.scenes.reading import is_complete, is_true, read_caption
from narvl_plugin.data.scenes.scene import Scene, scene_of_json
from narvl_plugin.errors import InputError


class CaptionTruth(NamedTuple):
    """What holds of a caption, or, as shares from 0 to 1, of several captions.

    Attributes:
        sentences: the grammar of the scenes' captions can make it.
        true: it is a sentence of which every claim holds: objects, numbers, sizes, places, relations, background.
        complete: it names all objects of the image, whether it is a sentence or not.
    """

    sentences: float
    true: float
    complete: float


def truth_of(caption: str, scene: Scene) -> CaptionTruth:
    """Return what holds of a caption of a scene, each as 1 or 0."""
    reading = read_caption(caption)
    true = reading is not None and is_true(reading, scene)
    return CaptionTruth(float(reading is not None), float(true), float(is_complete(caption, scene)))


def mean_truth(captions: Mapping[str, str], scenes: Mapping[str, Scene]) -> CaptionTruth:
    """Return the shares of captions of which each holds.

    Args:
        captions: captions by the id of their image. At least one.
        scenes: the content of these images by id.

    Raises:
        InputError: if the content of an image is missing.
    """
    found = [truth_of(caption, scene_of(image_id, scenes)) for image_id, caption in captions.items()]
    return CaptionTruth(*(sum(values) / len(found) for values in zip(*found, strict=True)))


def scene_of(image_id: str, scenes: Mapping[str, Scene]) -> Scene:
    """Return the content of an image.

    Raises:
        InputError: if it is missing.
    """
    if image_id not in scenes:
        raise InputError(f"{image_id}: the file of scenes has no image of this id; write data and scenes together")
    return scenes[image_id]


def scenes_file(tsv: Path) -> Path:
    """Return the file beside a TSV file of captions that holds the content of its scenes."""
    return tsv.with_name(f"{tsv.stem}.scenes.jsonl")


def scenes_beside(tsv: Path) -> dict[str, Scene] | None:
    """Return the content of a TSV file's scenes by the id of their image; None without the file that holds it.

    Raises:
        InputError: see `read_scenes`.
    """
    return read_scenes(file) if (file := scenes_file(tsv)).is_file() else None


def read_scenes(file: Path) -> dict[str, Scene]:
    """Read the content of scenes by the id of their image.

    Raises:
        InputError: for a line that holds no scene; it names file and line.
    """
    scenes = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                values = json.loads(line)
                scenes[str(values["id"])] = scene_of_json(values)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise InputError(f"{file}: line {number} {error}; write the scenes again") from None
    return scenes
