"""What scorers share: they are given outputs with references, one by one, and score them all."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Optional, TypeVar


@dataclass
class ScorerConfig:
    """Settings of a scorer that has none."""

    _name: Optional[str] = None
    """fairseq's name of the scorer."""


ConfigT = TypeVar("ConfigT", bound=ScorerConfig)


class Scorer(ABC, Generic[ConfigT]):
    """Scores texts by their references; fairseq-generate calls its methods by these names.

    Attributes:
        cfg: the settings.
        ref: the references.
        pred: the outputs.
    """

    def __init__(self, cfg: ConfigT) -> None:
        self.cfg = cfg
        self.ref: list[str] = []
        self.pred: list[str] = []

    def add_string(self, ref: str, pred: str) -> None:
        """Add a reference and an output."""
        self.ref.append(ref)
        self.pred.append(pred)

    @abstractmethod
    def score(self) -> float:
        """Return the main score of all outputs."""

    @abstractmethod
    def result_string(self) -> str:
        """Format all scores in one line."""


AnyScorer = Scorer[Any]
