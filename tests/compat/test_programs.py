"""Repairs of how fairseq's programs begin and end, each against the call that fails without it."""

import contextlib
import errno
import io
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq.data import data_utils, iterators
from fairseq.dataclass.configs import CheckpointConfig, CommonConfig, CommonEvalConfig, DistributedTrainingConfig
from fairseq.distributed import utils as distributed_utils
from fairseq_cli import train, validate
from filelock import FileLock

from narvl import plugin_folder
from narvl_plugin import compat, program
from narvl_plugin.data.text import train_sentencepiece
from narvl_plugin.errors import BadRow, InputError


def distributed_config(**training: object) -> SimpleNamespace:
    values = {"distributed_world_size": 1, "tpu": False} | training
    return SimpleNamespace(distributed_training=DistributedTrainingConfig(**values), common=CommonConfig())


def training_config(save_dir: Path, **options: object) -> SimpleNamespace:
    """Return the configuration of a training into a folder."""
    config = distributed_config(**{key: value for key, value in options.items() if key.startswith("distributed")})
    config.checkpoint = CheckpointConfig(save_dir=str(save_dir), no_save=bool(options.get("no_save")))
    config.common_eval = CommonEvalConfig(path=options.get("path"))
    return config


def train_in_another_process(save_dir: Path, ready: Any) -> None:
    """Train for a minute."""
    distributed_utils.call_main(training_config(save_dir), lambda cfg: (ready.set(), time.sleep(60)))


class TestTwoTrainingsInOneFolder:
    def test_the_second_is_refused_until_the_first_is_killed(self, tmp_path: Path) -> None:
        fork = multiprocessing.get_context("fork")
        ready, ran = fork.Event(), []
        first = fork.Process(target=train_in_another_process, args=(tmp_path / "out", ready))
        first.start()
        assert ready.wait(60)
        with pytest.raises(InputError, match=rf"^--save-dir .*/out: is in use by another training .*{first.pid} on"):
            distributed_utils.call_main(training_config(tmp_path / "out"), ran.append)
        for other in (
            training_config(tmp_path / "out", distributed_rank=1),
            training_config(tmp_path / "out", no_save=True),
            training_config(tmp_path / "out", path="out/checkpoint_last.pt"),
            training_config(tmp_path / "other"),
        ):
            distributed_utils.call_main(other, ran.append)
        assert len(ran) == 4
        first.kill()
        first.join()
        distributed_utils.call_main(training_config(tmp_path / "out"), ran.append)
        distributed_utils.call_main(training_config(tmp_path / "out"), ran.append)
        assert len(ran) == 6
        assert not list(tmp_path.glob("*.lock"))

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOLCK])
    def test_where_no_lock_can_be_had_training_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
    ) -> None:
        def refuse(self: FileLock) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(FileLock, "_acquire", refuse)
        ran: list[object] = []
        distributed_utils.call_main(training_config(tmp_path / "out"), ran.append)
        assert len(ran) == 1
        assert "start no second" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU fairseq's spawn starts processes")
class TestSpawnWithoutGpu:
    def test_is_refused(self) -> None:
        config = distributed_config(
            distributed_world_size=2, distributed_init_method="tcp://localhost:29500", distributed_rank=0
        )
        with pytest.raises(InputError, match="--distributed-world-size 2 without a GPU.*torchrun --nproc-per-node 2"):
            distributed_utils.call_main(config, lambda cfg: None)

    def test_one_process_runs(self) -> None:
        called = []
        distributed_utils.call_main(distributed_config(), called.append)
        assert len(called) == 1


@pytest.mark.parametrize("failure", [None, KeyError("batch")])
def test_reading_ahead_ends_with_training(failure: Exception | None) -> None:
    batches = iterators.BufferedIterator(2, range(1000))

    def train(cfg: object) -> None:
        assert next(batches) == 0
        assert batches._consumer.is_alive()
        if failure:
            raise failure

    with pytest.raises(KeyError) if failure else contextlib.nullcontext():
        distributed_utils.call_main(distributed_config(distributed_world_size=1), train)
    assert not batches._consumer.is_alive()
    assert batches._consumer.count < 10


class TestInputErrors:
    @pytest.mark.parametrize(
        "message",
        [
            "a.tsv:3: has 3 columns",
            # as torch hands on a data worker's error
            "Caught BadRow in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "  File …\nnarvl_plugin.errors.BadRow: a.tsv:3: has 3 columns\n",
            "a.tsv:3: has\n    3 columns",
        ],
    )
    def test_end_in_one_line(self, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        sys.excepthook(BadRow, BadRow(message), None)
        assert capsys.readouterr().err == "error: a.tsv:3: has 3 columns\n"

    def test_hidden_behind_an_error_of_fairseqs_are_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        error = Exception("Cannot load a.pt.")
        error.__context__ = InputError("the checkpoint and the model differ")
        sys.excepthook(Exception, error, None)
        assert capsys.readouterr().err == "error: Cannot load a.pt. the checkpoint and the model differ\n"

    def test_others_keep_their_traceback(self, capsys: pytest.CaptureFixture[str]) -> None:
        sys.excepthook(KeyError, KeyError("x"), None)
        assert "KeyError" in capsys.readouterr().err


def test_repairs_are_made_once() -> None:
    before = (sys.excepthook, distributed_utils.call_main, data_utils._find_extra_valid_paths)
    compat.apply()
    assert before == (sys.excepthook, distributed_utils.call_main, data_utils._find_extra_valid_paths)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (distributed_utils, "call_main"),
        (options, "parse_args_and_arch"),
        (checkpoint_utils, "load_checkpoint"),
        (checkpoint_utils, "load_model_ensemble_and_task"),
    ],
)
def test_one_repair_stands_around_each_function(module: ModuleType, name: str) -> None:
    repaired = getattr(module, name)
    assert repaired.__module__ == module.__name__  # as functools.wraps has it
    assert not hasattr(repaired.__wrapped__, "__wrapped__")


def test_a_terminal_without_utf_8_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, written in {"ascii": b"caf\\xe9 \\u2603\n", "utf-8": "café ☃\n".encode()}.items():
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding, write_through=True))
        program.write_to_any_terminal()
        print("café ☃")
        assert buffer.getvalue() == written


@pytest.mark.integration
def test_fairseq_generate_writes_letters_that_the_locale_lacks(
    write_tsv: Callable[..., Path], tmp_path: Path, save_checkpoint: Callable[..., Path], caption_rows: list[list[str]]
) -> None:
    (tmp_path / "texts.tsv").write_text("café ☃ rouge\n", encoding="utf-8")
    train_sentencepiece(tmp_path / "texts.tsv", [0], tmp_path, 300)
    options = {"bpe_dir": str(tmp_path), "num_bins": 10, "patch_image_size": 32}
    model = save_checkpoint(tmp_path / "a.pt", "narvl", "caption", **options)
    data = write_tsv("a.tsv", [[*row[:2], "café ☃", *row[3:]] for row in caption_rows[:1]])
    words = [sys.executable, "-m", "fairseq_cli.generate", data, "--task", "caption", "--path", model, "--cpu"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(
        [*map(str, words), "--user-dir", str(plugin_folder())],
        env=os.environ | locale | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode(errors="replace")[-2000:]
    assert b"T-0\tcaf\\xe9 \\u2603\n" in run.stdout


@pytest.mark.parametrize("program", [train, validate])
def test_the_size_of_batches_is_asked_for_in_a_line(program: ModuleType) -> None:
    dataset = SimpleNamespace(max_tokens=None, batch_size=None)
    with pytest.raises(InputError, match="the size of batches is missing; give the number of rows by --batch-size"):
        distributed_utils.call_main(SimpleNamespace(dataset=dataset, optimizer="adam"), program.main)


def test_the_optimizer_is_asked_for_in_a_line() -> None:
    with pytest.raises(InputError, match="--optimizer is not given; take --optimizer adam, and --lr RATE"):
        distributed_utils.call_main(SimpleNamespace(optimizer=None), train.main)
