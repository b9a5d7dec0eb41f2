"""The settings of a run in the spelling of the run scripts, KEY=value, and what each changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from narvl_plugin.errors import InputError


@dataclass(frozen=True)
class Key:
    """A setting of the run scripts.

    Attributes:
        name: its spelling there.
        target: the option of `narvl run` that it sets. Options of a training begin with `training.` (both trainings),
            `teacher.` or `student.`.
        about: its description.
        form: how the value is written in the option.
        number: whether the value must be a number.
        default: the value of a training that does not set the option.
        kept: whether a run that was begun with another value is refused.
        recipes: the recipes that have the setting; all if empty.
    """

    name: str
    target: str
    about: str
    form: str = "{}"
    number: bool = True
    default: str = ""
    kept: bool = True
    recipes: tuple[str, ...] = ()


KEYS = (
    Key("PRESET", "preset", "smoke, quick or full: sizes of the data and of the trainings (quick)", number=False),
    Key("SEED", "seed", "seed of the scenes and of training (1)"),
    Key("ARCH", "size", "narvl_SIZE, the student's size; the teacher has the same (nano)", number=False),
    Key("DATA", "data", "folder with {train,valid,test}.tsv, also with OFA's file names (embedded data)", number=False),
    Key("TEACHER", "teacher_checkpoint", "trained teacher: checkpoint or port of OFA (one is trained)", number=False),
    Key("TEACHERS", "teachers", "number of teachers, which differ in their seed alone and distil together (1)"),
    Key(
        "INIT", "init_checkpoint", "checkpoint or port of OFA to train the teacher from (random weights)", number=False
    ),
    Key(
        "BPE",
        "bpe_dir",
        "folder of the vocabulary: dict.txt, vocab.json or spm.model (a vocabulary is trained)",
        number=False,
    ),
    Key("TRAIN", "train", "number of rows of the embedded training data"),
    Key("VALID", "valid", "number of rows of the embedded validation data"),
    Key("TEST", "test", "number of rows of the embedded test data"),
    Key("NOUNS", "nouns", "number of kinds of things in scenes"),
    Key("OBJECTS", "objects", "largest number of things in a scene"),
    Key("VOCAB_SIZE", "vocab_size", "largest number of pieces of a trained vocabulary"),
    Key("PATCH_IMAGE_SIZE", "training.task.patch_image_size", "side of the square image in pixels"),
    Key("DISTIL", "distil", "1: the student learns the teacher's outputs. 0: it learns the targets of the data"),
    Key(
        "SELF_DISTIL",
        "self_distil",
        "best or mbr: a second student starts from the student, and learns its most probable captions, or those of the "
        "highest expected CIDEr (no second student)",
        number=False,
        recipes=("caption",),
    ),
    Key("EPOCHS", "epochs", "passes over the training file, instead of TEACHER_UPDATES and STUDENT_UPDATES"),
    Key("TEACHER_UPDATES", "teacher.optimization.max_update", "number of the teacher's updates"),
    Key("TEACHER_LR", "teacher.optimization.lr", "the teacher's learning rate", form="[{}]"),
    Key("LABEL_SMOOTHING", "teacher.criterion.label_smoothing", "share of other tokens in the teacher's targets"),
    Key("STUDENT_UPDATES", "student.optimization.max_update", "number of the student's updates"),
    Key("STUDENT_LR", "student.optimization.lr", "the student's learning rate", form="[{}]"),
    Key("BIGRAM_WEIGHT", "student.criterion.bigram_weight", "weight of the student's loss of bigrams", default="0"),
    Key("SCORE_WEIGHT", "student.criterion.score_weight", "weight of the student's loss of scores", default="0"),
    Key("BATCH", "training.dataset.batch_size", "rows in a batch, which the processes share"),
    Key("UPDATE_FREQ", "training.optimization.update_freq", "number of batches in an update", form="[{}]"),
    Key("DROPOUT", "dropout", "dropout of the teacher, and of the student if it has none of its own"),
    Key("STUDENT_DROPOUT", "student.model.dropout", "dropout of the student"),
    Key("WARMUP_RATIO", "training.lr_scheduler.warmup_ratio", "share of the updates in which the rate rises"),
    Key("EMA_DECAY", "ema_decay", "decay of averaged weights, which then replace the trained ones (no averaging)"),
    Key("ADAM_BETA2", "training.optimizer.adam_betas", "Adam's second decay", form="'(0.9, {})'"),
    Key("AMP", "amp", "1: train in mixed precision (1 for nano on processors that multiply in bfloat16, else 0)"),
    Key("QUERIES", "student.model.num_queries", "number of the student's queries"),
    Key("BEAM", "beam", "beam of the teacher in distillation"),
    Key("NBEST", "nbest", "number of the teacher's captions for each row in distillation"),
    Key(
        "REFERENCES",
        "student.task.max_references",
        "number of captions of a row that the student may learn, the first of them (all)",
        default="0",
        recipes=("caption",),
    ),
    Key("WORDS", "training.task.max_tgt_length", "number of a target's words that are kept"),
    Key("NUM_BINS", "training.task.num_bins", "number of bins of coordinates"),
    Key("TIMED", "timed", "number of images that latency is measured on"),
    Key("MAX_LEN", "max_len", "longest caption in tokens", recipes=("caption",)),
    Key("NO_REPEAT_NGRAM", "no_repeat_ngram", "length of sequences that no caption repeats", recipes=("caption",)),
    Key(
        "NGRAMS",
        "ngrams",
        "length of the longest word runs whose frequency in the training captions weighs a student's captions (4); 0: "
        "no runs",
        recipes=("caption",),
    ),
    Key("ADD_CAPTION", "add_caption", "1: the input has the caption (0 on scenes, else 1)", recipes=("snli_ve",)),
    Key("OUT", "out", "folder of the run (runs/RECIPE_PRESET_seedSEED)", number=False, kept=False),
    Key("SHARED", "shared", "folder of a run whose data, teacher and its outputs are taken", number=False, kept=False),
    Key("UNTIL", "until", "distil: end after the teacher's outputs and the distillation", number=False, kept=False),
    Key("CELL", "cell", "YAML file with further options, a line OPTION: VALUE each", number=False, kept=False),
    Key(
        "BASELINES",
        "baselines",
        "1: also train a student on the other targets, and one with cross entropy (0)",
        kept=False,
    ),
    Key(
        "PROCESSES",
        "processes",
        "processes that share a batch in training on CPU (2; 1 on one core or with a GPU)",
        kept=False,
    ),
    Key("THREADS", "threads", "number of torch's threads per process (1)", kept=False),
    Key("WORKERS", "workers", "workers per process that read images (1). Nano's features need none", kept=False),
    Key("SKIP_BAD_ROWS", "skip_bad_rows", "number of bad rows that may be skipped (0)", kept=False),
)
"""All settings of the run scripts, in the order in which a run keeps them."""

TRAININGS = ("training", "teacher", "student")
"""What the options of trainings begin with."""

_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--info", "-i"),
}
"""Flags of Hydra that a value follows."""


def keys_of(recipe: str) -> list[Key]:
    """Return the settings that a recipe has."""
    return [key for key in KEYS if not key.recipes or recipe in key.recipes]


def table() -> str:
    """Return the settings with their descriptions, a line each, with both spellings."""
    names = [f"{key.name}=" for key in KEYS]
    width = max(map(len, names))
    lines = [f"{name:{width}} {key.about}\n{'':{width}}   {key.target}" for name, key in zip(names, KEYS, strict=True)]
    return "\n".join(lines)


def translate(words: Sequence[str]) -> list[str]:
    """Return a command line of `narvl run` as Hydra reads it.

    Settings KEY=value become options; those without a value are left out. Options of trainings get Hydra's `++`.

    Raises:
        InputError: if a word is no setting.
    """
    return list(_translated(words))


def _translated(words: Sequence[str]) -> Iterator[str]:
    recipe = next((word.removeprefix("recipe=") for word in reversed(words) if word.startswith("recipe=")), "caption")
    known = {key.name: key for key in keys_of(recipe)}
    is_value = False
    for word in words:
        name, equals, value = word.partition("=")
        if is_value or word.startswith(("-", "+", "~")):
            is_value = word in _WITH_VALUE and not is_value
            yield word
        elif name.partition(".")[0] in TRAININGS:
            yield f"++{word}"
        elif equals and not re.fullmatch("[A-Z][A-Z0-9_]*", name):
            yield word
        elif not equals or name not in known:
            raise InputError(
                f"'{word}' is no setting. Settings are KEY=value with one of these keys: {' '.join(known)}"
            )
        elif value:
            yield _option(known[name], value)


def _option(key: Key, value: str) -> str:
    """Return a setting as Hydra reads it."""
    if key.name == "ARCH":
        size = value.removeprefix("narvl_")
        if size == value or not size:
            raise InputError(f"ARCH={value}: give a student's architecture, such as narvl_nano or narvl_base")
        return f"size={size}"
    if key.number:
        try:
            float(value)
        except ValueError:
            raise InputError(f"{key.name}={value}: give a number") from None
    quoted = key.form.format(value) if key.number else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"{'++' if key.target.partition('.')[0] in TRAININGS else ''}{key.target}={quoted}"
