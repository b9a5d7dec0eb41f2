"""What a page tells about its run: settings in plain words, sizes of the models, times, and the machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from narvl_plugin.models.interop import BACKBONE

RUN, DATA, MODEL, TRAINING, DECODING, MACHINE = "Run", "Data", "Models", "Training", "Decoding", "Machine"
OTHER = "Other"
_YES_NO = {"0": "no", "1": "yes"}


@dataclass(frozen=True)
class Setting:
    """A setting of the run scripts.

    Attributes:
        group: the group in which it is shown.
        words: its meaning.
        important: whether it is shown without unfolding, if it has a value other than 0.
        values: values in words, by value; such a value is shown even if it is 0.
    """

    group: str
    words: str
    important: bool = False
    values: Mapping[str, str] | None = None


SETTINGS = {
    "PRESET": Setting(RUN, "preset", important=True),
    "SEED": Setting(RUN, "seed of the scenes and of training", important=True),
    "DATA": Setting(DATA, "data", important=True, values={"": "embedded, made by narvl data"}),
    "TRAIN": Setting(DATA, "rows to train on", important=True),
    "VALID": Setting(DATA, "rows for validation", important=True),
    "TEST": Setting(DATA, "rows to test on", important=True),
    "NOUNS": Setting(DATA, "kinds of objects", important=True),
    "OBJECTS": Setting(DATA, "objects in an image, at most", important=True),
    "PATCH_IMAGE_SIZE": Setting(DATA, "side of the images, in pixels", important=True),
    "ADD_CAPTION": Setting(DATA, "caption is part of the input", values=_YES_NO),
    "WORDS": Setting(DATA, "words of a target that are kept"),
    "ARCH": Setting(MODEL, "student", important=True),
    "TEACHER": Setting(MODEL, "checkpoint of the teacher", important=True),
    "TEACHERS": Setting(MODEL, "teachers, which teach together"),
    "INIT": Setting(MODEL, "checkpoint from which the teacher starts", important=True),
    "QUERIES": Setting(MODEL, "queries of the student", important=True),
    "BPE": Setting(MODEL, "folder of the vocabulary"),
    "VOCAB_SIZE": Setting(MODEL, "size of the vocabulary, at most"),
    "NUM_BINS": Setting(MODEL, "bins of box coordinates", important=True),
    "DISTIL": Setting(
        TRAINING,
        "student learns",
        important=True,
        values={"0": "the outputs of the data", "1": "the teacher's outputs"},
    ),
    "SELF_DISTIL": Setting(TRAINING, "outputs of itself that the student learns last"),
    "REFERENCES": Setting(TRAINING, "captions of a row that the student may learn (0: all)"),
    "NBEST": Setting(TRAINING, "outputs that the teacher writes for a row"),
    "EPOCHS": Setting(TRAINING, "passes over the training file", important=True),
    "TEACHER_UPDATES": Setting(TRAINING, "updates of the teacher", important=True),
    "STUDENT_UPDATES": Setting(TRAINING, "updates of the student", important=True),
    "BATCH": Setting(TRAINING, "rows in a batch", important=True),
    "UPDATE_FREQ": Setting(TRAINING, "batches in an update"),
    "TEACHER_LR": Setting(TRAINING, "learning rate of the teacher"),
    "STUDENT_LR": Setting(TRAINING, "learning rate of the student"),
    "BIGRAM_WEIGHT": Setting(TRAINING, "weight of the bigram loss", important=True),
    "SCORE_WEIGHT": Setting(TRAINING, "weight of the score loss", important=True),
    "DROPOUT": Setting(TRAINING, "dropout of the teacher"),
    "STUDENT_DROPOUT": Setting(TRAINING, "dropout of the student"),
    "LABEL_SMOOTHING": Setting(TRAINING, "label smoothing of the teacher"),
    "WARMUP_RATIO": Setting(TRAINING, "share of updates in which the learning rate rises"),
    "EMA_DECAY": Setting(TRAINING, "decay of averaged weights"),
    "ADAM_BETA2": Setting(TRAINING, "beta2 of Adam"),
    "AMP": Setting(TRAINING, "mixed precision", values=_YES_NO),
    "BEAM": Setting(DECODING, "beam of the teacher when it teaches", important=True),
    "MAX_LEN": Setting(DECODING, "tokens of an output, at most", important=True),
    "NO_REPEAT_NGRAM": Setting(DECODING, "length of word runs that may not repeat"),
    "NGRAMS": Setting(DECODING, "longest word runs that weigh the student's captions", important=True),
    "TIMED": Setting(MACHINE, "images whose latency was measured", important=True),
}
"""The settings of `run_scripts` by name, in the order in which they are shown."""


@dataclass(frozen=True)
class Fact:
    """One line: the meaning in words, the value, and the setting's name if it is one."""

    words: str
    value: str
    name: str = ""


@dataclass(frozen=True)
class Stage:
    """A finished stage of a run script.

    Attributes:
        name: its name.
        seconds: how long it took.
        ended: when it ended, such as 2025-01-31T12:00:00Z; empty if that is unknown.
    """

    name: str
    seconds: float
    ended: str


@dataclass(frozen=True)
class About:
    """Everything that a page tells about its run.

    Attributes:
        groups: the most important facts, by group.
        rest: all other settings, as facts with the group in front.
        stages: the stages.
    """

    groups: dict[str, list[Fact]]
    rest: list[tuple[str, Fact]]
    stages: list[Fact]


def read_stages(path: Path) -> list[Stage]:
    """Read the stages that a run script has timed; lines of another form are ignored, and the file may be missing."""
    stages = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        name, seconds, *ended = [*line.split("\t"), ""][:3]
        try:
            stages.append(Stage(name, float(seconds), "".join(ended)))
        except ValueError:
            continue
    return stages


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count the numbers in a model's weights: of the backbone that reads the image, and of all else."""
    sizes = {"backbone": 0, "others": 0}
    for name, weights in model.named_parameters():  # shared weights come once
        sizes["backbone" if name.startswith(BACKBONE) else "others"] += weights.numel()
    return sizes


def about(
    settings: Mapping[str, str],
    parameters: Mapping[str, Mapping[str, int]],
    machine: Mapping[str, object],
    stages: Sequence[Stage],
) -> About:
    """Collect what is known about a run.

    Args:
        settings: the settings of the run script.
        parameters: the results of `count_parameters`, by model.
        machine: the machine of the latency measurement.
        stages: the stages of the run script.

    Returns:
        The facts; groups without any are left out.
    """
    groups: dict[str, list[Fact]] = {group: [] for group in (RUN, DATA, MODEL, TRAINING, DECODING, MACHINE)}
    rest = []
    for name in [
        *(name for name in SETTINGS if name in settings),
        *(name for name in settings if name not in SETTINGS),
    ]:
        setting, value = SETTINGS.get(name, Setting(OTHER, "")), settings[name]
        in_words = (setting.values or {}).get(value)
        fact = Fact(setting.words, in_words or value or "–", name)
        if setting.important and (in_words or value not in ("", "0")):
            groups[setting.group].append(fact)
        else:
            rest.append((setting.group, fact))
    groups[MODEL] += [
        Fact(f"parameters of the {name}", _millions(sizes["others"])) for name, sizes in parameters.items()
    ]
    backbone = max((sizes["backbone"] for sizes in parameters.values()), default=0)
    groups[MODEL] += [Fact("parameters of the vision backbone", _millions(backbone))] if backbone else []
    groups[RUN] += _times(stages)
    groups[MACHINE] += [Fact(str(key), str(value)) for key, value in machine.items()]
    lines = [Fact(stage.name, duration(stage.seconds), _moment(stage.ended)) for stage in stages]
    return About({group: facts for group, facts in groups.items() if facts}, rest, lines)


def _times(stages: Sequence[Stage]) -> list[Fact]:
    """Return when the run ended, and how long its longest parts took."""
    if not stages:
        return []
    facts = [Fact("last stage ended", _moment(stages[-1].ended))] if stages[-1].ended else []
    for name in ("teacher", "student"):
        seconds = [stage.seconds for stage in stages if stage.name == name]
        facts += [Fact(f"training of the {name}", duration(sum(seconds)))] if seconds else []
    return [*facts, Fact("all stages, added up", duration(sum(stage.seconds for stage in stages)))]


def _moment(ended: str) -> str:
    """Format a moment in UTC for readers."""
    return ended.replace("T", " ").removesuffix("Z") + " UTC" if ended.endswith("Z") else ended


def duration(seconds: float) -> str:
    """Format a duration: `4.4 s`, `1 min 34 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def _millions(number: int) -> str:
    """Format a number in millions."""
    return f"{number / 1e6:.2f} million"
