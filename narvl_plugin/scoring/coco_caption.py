"""Caption metrics of the COCO tools: BLEU, ROUGE-L, CIDEr, METEOR; and the fairseq scorer `coco_caption`."""

import logging
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, cast

from narvl_plugin.data.text import REFERENCE_SEPARATOR, split_references
from narvl_plugin.errors import InputError
from narvl_plugin.scoring.base import Scorer, ScorerConfig
from narvl_plugin.scoring.java import JavaError, java
from narvl_plugin.scoring.tokenization import (
    TokenizerChoice,
    java_available,
    tokenize_captions,
)

logger = logging.getLogger(__name__)

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")

# METEOR takes seconds for 1,000 captions of five references each.
_METEOR_BASE_SECONDS = 120.0
_METEOR_SECONDS_PER_CAPTION = 0.1
_METEOR_SEPARATOR = " ||| "

MOST_WORDS = 500
"""Maximum number of words of a caption: ROUGE-L compares each word of a caption with each word of a reference."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one system's captions over a test set.

    Attributes:
        values: the score by metric name (``METRICS``), on the tools' own scale (BLEU 0 to 1, CIDEr 0 to 10).
        cider_each: the CIDEr of each caption by its id.
        tokenizer: ``"ptb"`` or ``"plain"``; scores of different tokenisers are not comparable.
        missing: the reason for each metric without a value, by metric name.
    """

    values: dict[str, float]
    cider_each: dict[str, float]
    tokenizer: Literal["ptb", "plain"]
    missing: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Format all scores in one line, with the tokeniser and the missing metrics."""
        parts = [f"{name} {self.values[name]:.4f}" for name in METRICS if name in self.values]
        parts += [f"{name} missing ({reason})" for name, reason in self.missing.items()]
        return f"{', '.join(parts)} ({len(self.cider_each)} captions, {self.tokenizer} tokenizer)"


def score_captions(
    hypotheses: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: TokenizerChoice = "auto",
) -> CaptionScores:
    """Score one system's captions; see `score_systems`."""
    return score_systems({"": hypotheses}, references, tokenizer)[""]


def score_systems(
    systems: Mapping[str, Mapping[str, str]],
    references: Mapping[str, Sequence[str]],
    tokenizer: TokenizerChoice = "auto",
) -> dict[str, CaptionScores]:
    """Score each system's captions, one an image, against the references with pycocoevalcap's scorers.

    CIDEr takes its document frequencies from ``references``. METEOR needs Java; ``missing`` gives the reason if it has
    no value. Each Java program starts once for all systems.

    Args:
        systems: captions by image id, by system name; an empty caption scores zero.
        references: references by image id, with the same ids.
        tokenizer: see `tokenize_captions`.

    Returns:
        The scores by system name.

    Raises:
        ValueError: if there are no captions, the ids differ, or an image has no reference.
        JavaError: if ``tokenizer="ptb"`` cannot be run.
        InputError: if a Java program returns a wrong number of lines, or a text has more than ``MOST_WORDS``.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    for hypotheses in systems.values():
        _check_ids(hypotheses, references)
    together = {
        key: [*(hypotheses[key] for hypotheses in systems.values()), *texts] for key, texts in references.items()
    }
    words, used = tokenize_captions(together, tokenizer)
    for key, texts in words.items():
        longest = max(text.count(" ") + 1 for text in texts)
        if longest > MOST_WORDS:
            raise InputError(f"image {key} has a caption or reference of {longest:,} words; at most {MOST_WORDS} count")
    targets = {key: texts[len(systems) :] for key, texts in words.items()}
    candidates = {name: {key: [texts[place]] for key, texts in words.items()} for place, name in enumerate(systems)}
    meteors, missing = {}, {}
    try:
        if tokenizer == "auto" and used == "plain" and java_available():
            raise JavaError("METEOR needs Java, which failed to split words")
        meteors = _meteor(targets, candidates)
    except JavaError as error:
        missing["METEOR"] = str(error)
        logger.warning("no METEOR: %s", error)

    scores = {}
    for name, captions in candidates.items():
        bleu, _ = Bleu(4).compute_score(targets, captions, verbose=0)
        rouge, _ = Rouge().compute_score(targets, captions)
        cider, cider_each = Cider().compute_score(targets, captions)
        values = {f"BLEU-{order}": float(score) for order, score in enumerate(bleu, start=1)}
        values |= {"ROUGE-L": float(rouge), "CIDEr": float(cider)}
        if name in meteors:
            values["METEOR"] = meteors[name]
        each = {key: float(score) for key, score in zip(targets, cider_each, strict=True)}
        scores[name] = CaptionScores(values, each, used, missing)
    return scores


def _check_ids(hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for no captions, for different ids, and for images without a reference."""
    if not hypotheses:
        raise ValueError("no captions to score")
    if hypotheses.keys() != references.keys():
        differing = sorted(hypotheses.keys() ^ references.keys(), key=str)
        raise ValueError(
            f"{len(hypotheses)} captions and references for {len(references)} images do not have the same "
            f"ids: {len(differing)} are on one side only, such as {', '.join(map(str, differing[:3]))}"
        )
    for key, texts in references.items():
        if not any(text.strip() for text in texts):
            raise ValueError(f"image {key} has no reference: join one or more by {REFERENCE_SEPARATOR}")


def _meteor(targets: dict[str, list[str]], systems: dict[str, dict[str, list[str]]]) -> dict[str, float]:
    """Score every system with one run of the METEOR program.

    Raises:
        JavaError: with the reason, if it cannot be run, fails, or takes too long.
        InputError: if it returns more lines than requested.
    """
    if not java_available():
        raise JavaError("METEOR needs Java, which is not installed")
    from pycocoevalcap.meteor import meteor

    jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    limit = _METEOR_BASE_SECONDS + _METEOR_SECONDS_PER_CAPTION * len(targets) * len(systems)
    command = ("-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm")
    with java("the METEOR program", command, limit) as program:
        assert program.stdin and program.stdout  # `java` opens both
        scores = {}
        for name, captions in systems.items():
            statistics = [_ask(program, "SCORE", *targets[key], caption) for key, (caption,) in captions.items()]
            _ask(program, "EVAL", *statistics)  # the answer is the score of the first caption
            *_, whole = (float(program.stdout.readline()) for _ in statistics)
            scores[name] = whole
        program.stdin.close()
        surplus = program.stdout.read()
    if surplus:
        raise InputError("the METEOR program gave more lines than it was asked for; check `java -version`")
    return scores


def _ask(program: subprocess.Popen[bytes], *parts: str) -> str:
    """Return METEOR's answer to a line of several parts.

    Raises:
        EOFError: if there is no answer.
    """
    assert program.stdin and program.stdout  # `java` opens both
    cleaned = (part.replace(_METEOR_SEPARATOR.strip(), " ") for part in parts)
    program.stdin.write(f"{_METEOR_SEPARATOR.join(cleaned)}\n".encode())
    program.stdin.flush()
    answer = program.stdout.readline().decode().strip()
    if not answer:
        raise EOFError("it gave no answer")
    return answer


CaptionTokenizer = StrEnum("CaptionTokenizer", ["auto", "ptb", "plain"])


@dataclass
class CocoCaptionConfig(ScorerConfig):
    """Settings of the scorer ``coco_caption``."""

    caption_tokenizer: CaptionTokenizer = field(
        default=CaptionTokenizer("auto"),
        metadata={"help": "tokeniser of caption scores: ptb needs Java; auto uses ptb if it runs"},
    )


class CocoCaptionScorer(Scorer[CocoCaptionConfig]):
    """fairseq scorer; the reference string holds an image's references joined by ``&&``."""

    def __init__(self, cfg: CocoCaptionConfig) -> None:
        super().__init__(cfg)
        self._scores: CaptionScores | None = None

    def add_string(self, ref: str, pred: str) -> None:
        """Add one image's joined references and its caption."""
        super().add_string(ref, pred)
        self._scores = None

    def caption_scores(self) -> CaptionScores:
        """Score everything added so far; the result is cached until more is added."""
        if self._scores is None:
            self._scores = score_captions(
                {str(row): text for row, text in enumerate(self.pred)},
                {str(row): split_references(text) for row, text in enumerate(self.ref)},
                tokenizer=cast(TokenizerChoice, str(self.cfg.caption_tokenizer)),
            )
        return self._scores

    def score(self) -> float:
        """Return CIDEr, the main metric of captioning."""
        return self.caption_scores().values["CIDEr"]

    def result_string(self) -> str:
        """Format all scores and the tokeniser in one line."""
        return self.caption_scores().summary()
