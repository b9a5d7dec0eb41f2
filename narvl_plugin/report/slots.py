"""What each query of a parallel student says about a picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from narvl_plugin.bench import Predictor
from narvl_plugin.ctc import collapse, viterbi


@dataclass(frozen=True)
class Slot:
    """One query's label on the path that a student says.

    Attributes:
        text: the label as text; empty for the blank.
        probability: of that label, 0 to 1.
        kind: ``token`` adds to the output, ``repeat`` merges with the same label before, ``blank`` is silent.
    """

    text: str
    probability: float
    kind: str


def slot_kinds(labels: torch.Tensor, blank: int) -> list[str]:
    """Say of each label of a path (N,) whether it is a ``token``, a ``repeat``, or a ``blank``."""
    speaking = set(collapse(labels[None], blank=blank).queries[0].tolist())
    return [
        "blank" if label == blank else "token" if query in speaking else "repeat"
        for query, label in enumerate(labels.tolist())
    ]


@torch.inference_mode()
def query_slots(student: Predictor, rows: Sequence[int]) -> list[list[Slot]]:
    """Run a student on some rows of its test file and read its N queries, slot by slot.

    They are read on the most probable path to what the student answers, less a `</s>`.

    Raises:
        ValueError: when the model has no queries (a teacher).
    """
    if not hasattr(student.model, "blank"):
        raise ValueError(f"{type(student.model).__name__} has no queries; give a student's checkpoint")
    slots = []
    for row in rows:
        batch = student.batch(row)
        answer = student.answer(batch)[None, :-1]
        log_probs = student.model(**batch["net_input"])[0].float().log_softmax(dim=-1)  # (1, N, V)
        length = torch.tensor([answer.size(1)], device=answer.device)
        path = viterbi(log_probs, answer, length, blank=student.model.blank).labels
        labels = path[0]  # (N,)
        probabilities = log_probs[0].gather(1, labels[:, None])[:, 0].exp()  # (N,)
        kinds = slot_kinds(labels, student.model.blank)
        slots.append(
            [
                Slot("" if kind == "blank" else student.label_text(label), probability, kind)
                for label, probability, kind in zip(labels.tolist(), probabilities.tolist(), kinds, strict=True)
            ]
        )
    return slots
