"""The published teacher at tiny size with recorded weights, and a criterion that computes nothing."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.logging import metrics

from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data.text import TextCodec
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.models.registered import build


@pytest.fixture(scope="session")
def teacher(bpe_dir: Path, gpt2_codec: TextCodec) -> OfaModel:
    """Give the model whose losses and hypotheses are recorded, in evaluation mode; tests leave it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(bpe_dir.parent / "parity")
        recipe = importlib.import_module("recipe")
    model = build("ofa_tiny", vocab_size=len(gpt2_codec.dictionary)).eval()
    recipe.fill(model)
    return model


class Criterion:
    """Logs what fairseq expects of a criterion."""

    def __call__(self, model: torch.nn.Module, sample: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
        return 0.0, 1, {"ntokens": 1, "nsentences": len(sample["id"])}

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        metrics.log_scalar("loss", 0.0)


@pytest.fixture
def fairseqs_programs(
    run_train: Callable[..., None],
    run_generate: Callable[..., None],
    vocabulary: Path,
    write_tsv: Callable[..., Path],
    tmp_path: Path,
) -> Callable[..., str]:
    """Give a function that trains on rows for an epoch, resumes, generates, and returns the line of the scores."""

    def run(
        rows: list[list[str]],
        *task: object,
        training: list[object],
        metric: str,
        generation: list[object],
        vocabulary: Path = vocabulary,
    ) -> str:
        train_tsv, valid_tsv = write_tsv("train.tsv", rows), write_tsv("valid.tsv", rows)
        options = [*task, "--bpe-dir", vocabulary, "--patch-image-size", 32, "--cpu", "--batch-size", 2]
        training = [
            *(f"{train_tsv},{valid_tsv}", *options, *training, "--optimizer", "adam", "--lr", 1e-4),
            *("--best-checkpoint-metric", metric, "--maximize-best-checkpoint-metric", "--no-progress-bar"),
            *("--save-dir", tmp_path / "checkpoints", "--num-workers", 0),
        ]
        run_train(*training, "--max-epoch", 1)
        run_train(*training, "--max-epoch", 2)  # resumes
        state = read_checkpoint(tmp_path / "checkpoints" / "checkpoint_best.pt")
        assert 0 <= state["extra_state"]["best"] <= 1
        run_generate(
            *(valid_tsv, *options, "--path", tmp_path / "checkpoints" / "checkpoint_best.pt"),
            *("--results-path", tmp_path, *generation),
        )
        lines = (tmp_path / "generate-test.txt").read_text().splitlines()
        assert sum(line.startswith("D-") for line in lines) >= len(rows)
        return lines[-1]

    return run


@pytest.fixture
def criterion() -> Criterion:
    """Give a criterion that computes nothing."""
    return Criterion()


@pytest.fixture
def validated(criterion: Criterion) -> Callable[..., dict[str, float]]:
    """Give a function that validates a task, with a generator that says given texts, and returns what is logged."""

    def validate(task: Any, said: list[str], batch_size: int = 2) -> dict[str, float]:
        task.load_dataset("valid")
        remaining = iter(said)

        class Generator:
            def generate(self, models: object, sample: dict[str, Any], **options: object) -> list[Any]:
                tokens = [task.codec.encode(next(remaining)) for _ in sample["id"]]
                return [[{"tokens": ids, "positional_scores": torch.zeros(len(ids))}] for ids in tokens]

        task.generator = Generator()
        iterator = task.get_batch_iterator(task.dataset("valid"), max_sentences=batch_size)
        with metrics.aggregate(new_root=True) as aggregator:
            for batch in iterator.next_epoch_itr(shuffle=False):
                _, _, logged = task.valid_step(batch, torch.nn.Module(), criterion)
                task.reduce_metrics([logged], criterion)
        return aggregator.get_smoothed_values()

    return validate
