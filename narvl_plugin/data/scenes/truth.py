"""How many captions are sentences, are true, and name everything: exact, since the scenes' content is known."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from narvl_plugin.data.scenes.reading import is_complete, is_true, read_caption
from narvl_plugin.data.scenes.scene import Scene, scene_of_json
from narvl_plugin.errors import InputError


@dataclass(frozen=True)
class CaptionTruth:
    """Shares of captions, from 0 to 1.

    Attributes:
        sentences: those that the grammar of the scenes' captions can make.
        true: sentences of which every claim holds: objects, numbers, sizes, places, relations, background.
        complete: those that name all objects, sentences or not.
    """

    sentences: float
    true: float
    complete: float


def measure_truth(captions: Mapping[str, str], scenes: Mapping[str, Scene]) -> CaptionTruth:
    """Measure captions against the scenes that they describe.

    Args:
        captions: captions by the id of their image. At least one.
        scenes: the content of these images by id.

    Returns:
        The shares.

    Raises:
        InputError: if the content of an image is missing.
    """
    sentences = true = complete = 0
    for image_id, caption in captions.items():
        if image_id not in scenes:
            raise InputError(f"{image_id}: the file of scenes has no image of this id; write data and scenes together")
        scene, reading = scenes[image_id], read_caption(caption)
        sentences += reading is not None
        true += reading is not None and is_true(reading, scene)
        complete += is_complete(caption, scene)
    count = len(captions)
    return CaptionTruth(sentences / count, true / count, complete / count)


def scenes_file(tsv: Path) -> Path:
    """Return the file beside a TSV file of captions that holds the content of its scenes."""
    return tsv.with_name(f"{tsv.stem}.scenes.jsonl")


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
