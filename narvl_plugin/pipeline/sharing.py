"""What a run may take from another run: data, vocabulary, features, and a teacher with its outputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.pipeline.keys import KEYS
from narvl_plugin.pipeline.settings import SETTINGS_FILE, Settings

OWN = {key.name for key in KEYS if key.target.startswith("student.")} | {
    *("TIMED", "DISTIL", "SELF_DISTIL", "NGRAMS"),
}
"""Settings in which a run may differ from the run that it takes its teacher from, besides options of the student.

Whether the teacher's outputs for the training rows are there is checked by their file.
"""


def outputs(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield what a run has once it needs nothing but its student: each file, and the folder of it that is shared.

    Both are relative to the run's folder.
    """
    config, recipe = settings.config, settings.recipe
    if not config.data:
        for file in settings.splits.values():
            yield str(file.relative_to(settings.out)), "data"
    if not config.bpe_dir:
        yield "vocab/spm.model", "vocab"
    if settings.nano:
        for split in ("train", "valid"):
            yield f"features/{split}.tsv", "features"
    for teacher in settings.teachers:
        yield f"{teacher}/{'checkpoint_last.pt' if config.teacher_checkpoint else 'train.jsonl'}", teacher
    if settings.distil or config.baselines:
        yield "distilled/train.tsv", "distilled"
    folder = settings.splits["test"].parent
    if not config.data and config.shared:
        folder = Path(config.shared) / folder.relative_to(settings.out)
    has_answers = bool(recipe["answers"]) and (folder / recipe["answers"]).exists()
    for name in recipe["teacher_options"]:
        if name != "teacher_allcand" or has_answers or not recipe["answers"]:
            yield f"generate/{name}/generate-test.txt", f"generate/{name}"


def missing(settings: Settings, folder: Path) -> list[str]:
    """Return the files that a folder lacks of what a run needs before its student."""
    return [file for file, _ in outputs(settings) if not (folder / file).exists()]


def check_shared(settings: Settings) -> None:
    """Check that a run can take its teacher from the run that its option `shared` names.

    Raises:
        InputError: if it cannot.
    """
    shared = Path(settings.config.shared)
    if shared == settings.out:
        raise InputError(f"SHARED={shared}: is this run's own folder")
    if not (shared / SETTINGS_FILE).is_file():
        raise MissingInput(f"SHARED={shared}: is no run's folder, since it holds no {SETTINGS_FILE}")
    different = [
        each
        for each in settings.differences(shared / SETTINGS_FILE)
        if (name := each.split(" ", 1)[0]) not in OWN and not name.startswith("student.")
    ]
    if different:
        raise InputError(
            f"SHARED={shared}: was begun with other settings: {', '.join(different)}. Only options of the student may "
            "differ"
        )
    if lacks := missing(settings, shared):
        raise MissingInput(
            f"SHARED={shared}: lacks {', '.join(lacks)}; finish that run first, by its command, as far as UNTIL=distil"
        )
    for name in _folders(settings):
        here = settings.out / name
        if here.exists() and not os.path.samefile(here, shared / name):
            raise InputError(f"{here}: is there already, and not from SHARED={shared}; choose another OUT")


def link_shared(settings: Settings) -> None:
    """Link what a run takes from another run. Links are relative: the folders may be moved together."""
    shared = Path(settings.config.shared)
    for name in _folders(settings):
        here = settings.out / name
        if not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            here.unlink(missing_ok=True)
            here.symlink_to(os.path.relpath(shared / name, here.parent))


def _folders(settings: Settings) -> list[str]:
    return list(dict.fromkeys(folder for _, folder in outputs(settings)))
