"""Each repair against the call that fails without it."""

import argparse
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

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils, iterators
from fairseq.dataclass.configs import CheckpointConfig, CommonConfig, CommonEvalConfig, DistributedTrainingConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq_cli import train, validate
from filelock import FileLock

from narvl import plugin_folder
from narvl_plugin import compat
from narvl_plugin.compat import programs
from narvl_plugin.data.text import train_sentencepiece
from narvl_plugin.errors import BadRow, InputError, MissingInput


class Attack:
    """Unpickled, it would raise what it was told to."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit",)


class TestCheckpointTypes:
    @pytest.mark.parametrize(
        "value",
        [
            argparse.Namespace(arch="ofa_base", sizes=[1, 2]),
            np.float64(0.5),
            np.float32(0.5),
            np.int64(3),
            np.bool_(True),
            np.arange(3.0),
        ],
        ids=repr,
    )
    def test_are_read(self, tmp_path: Path, value: object) -> None:
        history = [{"optimizer_name": "Adam", "lr_scheduler_state": {}, "num_updates": 1}]
        extra = {"best": value, "train_iterator": {"epoch": 1}}
        state = {"cfg": None, "args": None, "model": {}, "optimizer_history": history, "extra_state": extra}
        torch.save(state, tmp_path / "checkpoint.pt")
        read = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint.pt"))["extra_state"]["best"]
        assert type(read) is type(value)
        assert np.all(read == value)

    def test_weights_of_another_tool_say_no_options(self, tmp_path: Path) -> None:
        torch.save({"model": {"weight": torch.zeros(1)}, "optimizer": {}}, tmp_path / "other.pt")
        with pytest.raises(InputError, match=r"other\.pt: is no checkpoint of fairseq: it holds no options"):
            checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "other.pt"))

    def test_others_are_still_refused(self, tmp_path: Path) -> None:
        torch.save({"model": Attack()}, tmp_path / "checkpoint.pt")
        with pytest.raises(InputError, match="asks for exec"):
            checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint.pt"))

    def test_a_missing_one_to_start_from_is_an_error_of_the_user(self, tmp_path: Path) -> None:
        cfg = CheckpointConfig(save_dir=str(tmp_path), finetune_from_model=str(tmp_path / "gone.pt"))
        with pytest.raises(MissingInput, match=r"--finetune-from-model .*gone\.pt does not exist; give the checkpoint"):
            checkpoint_utils.load_checkpoint(cfg, SimpleNamespace(checkpoint_suffix=""))

    def test_are_refused_by_torch_alone(self, tmp_path: Path) -> None:
        torch.save({"cfg": {"model": argparse.Namespace()}}, tmp_path / "checkpoint.pt")
        script = f"import torch; torch.load({str(tmp_path / 'checkpoint.pt')!r})"
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "Unsupported global: GLOBAL argparse.Namespace" in run.stderr


class TestCopies:
    def test_appear_at_once(self, tmp_path: Path) -> None:
        new, last = tmp_path / "checkpoint1.pt", tmp_path / "checkpoint_last.pt"
        new.write_bytes(b"new")
        last.write_bytes(b"old")
        with last.open("rb") as opened:
            PathManager.copy(str(new), str(last), overwrite=True)
            assert opened.read() == b"old"
        assert last.read_bytes() == b"new"
        assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, last.name]


class TestDataArgument:
    def test_may_name_files(self, tmp_path: Path) -> None:
        config = SimpleNamespace(
            dataset=SimpleNamespace(
                ignore_unused_valid_subsets=False,
                combine_valid_subsets=None,
                disable_validation=False,
                valid_subset="valid",
            ),
            task=SimpleNamespace(data=f"{tmp_path / 'train.tsv'},{tmp_path / 'valid.tsv'}"),
        )
        data_utils.raise_if_valid_subsets_unintentionally_ignored(config)

    def test_may_still_name_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "valid1.bin").touch()
        assert data_utils._find_extra_valid_paths(str(tmp_path)) == {"valid1"}


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
        with pytest.raises(InputError, match="--distributed-world-size 2 without a GPU.*--distributed-no-spawn"):
            distributed_utils.call_main(config, lambda cfg: None)

    def test_is_refused_under_torchrun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(InputError, match="--distributed-no-spawn"):
            distributed_utils.call_main(distributed_config(), lambda cfg: None)

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


class TestRepeatedNgrams:
    def blocked(self, size: int, said: list[int]) -> list[int]:
        """Return the tokens (of six) that fairseq forbids after those said, in a buffer twelve long."""
        tokens = torch.ones(1, 12, dtype=torch.int64)
        tokens[0, : len(said)] = torch.tensor(said)
        log_probs = NGramRepeatBlock(size)(tokens, torch.zeros(1, 6), 1, 1, len(said) - 1)
        return log_probs[0].isinf().nonzero().flatten().tolist()

    @pytest.mark.parametrize(
        ("size", "said", "forbidden"),
        [
            (2, [0, 3, 4, 3], [4]),
            (2, [0, 3, 4, 3, 5, 3], [4, 5]),
            (3, [0, 3, 4, 5, 3, 4], [5]),
            (3, [0, 3, 4, 5, 4, 3], []),
        ],
    )
    def test_are_blocked(self, size: int, said: list[int], forbidden: list[int]) -> None:
        assert self.blocked(size, said) == forbidden


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


@pytest.mark.parametrize("limit", [("--max-tokens-valid", 999), ("--batch-size-valid", 0)])
def test_limits_of_validation_are_checked_before_training(
    limit: tuple[str, int],
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
    tmp_path: Path,
    run_train: Callable[..., None],
) -> None:
    data = f"{write_tsv('train.tsv', caption_rows)},{write_tsv('valid.tsv', caption_rows)}"
    options = ["--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"]
    options += ["--arch", "narvl_tiny", "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16]
    options += ["--encoder-attention-heads", 2, "--vision-trunk", "test_resnet", "--freeze-resnet"]
    options += ["--criterion", "qctc", "--batch-size", 2, "--optimizer", "adam"]
    with pytest.raises(InputError, match=f"{limit[0]} {limit[1]}: .*(each row counts 1000|needs 1 row)"):
        run_train(data, *options, *limit, "--save-dir", tmp_path / "run")
    assert not list(tmp_path.glob("run/*.pt"))


def test_a_terminal_without_utf_8_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, written in {"ascii": b"caf\\xe9 \\u2603\n", "utf-8": "café ☃\n".encode()}.items():
        buffer = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding, write_through=True))
        programs.write_to_any_terminal()
        print("café ☃")
        assert buffer.getvalue() == written


def test_programs_of_fairseq_refuse_arguments_that_are_not_utf_8(run_generate: Callable[..., None]) -> None:
    with pytest.raises(InputError, match="the argument .* cannot be read as UTF-8; rename it"):
        run_generate("a.tsv", "--task", "caption", "--path", "x\udcff/checkpoint_best.pt")


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
        env=os.environ | locale | {"PYTHONPATH": str(Path(__file__).parents[1])},
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restore_file": "gone.pt"}, r"^gone\.pt: no such checkpoint"),
        ({"restore_file": "there.pt/"}, r"^there\.pt/: is a file; leave out the slash at the end$"),
        ({"restore_file": "there.pt", "finetune_from_model": "there.pt"}, r"can not be specified together; leave one"),
        (
            {"reset_optimizer": True, "finetune_from_model": "there.pt"},
            r"can not be set together .*; leave one of them",
        ),
    ],
)
def test_a_training_does_not_start_anew_where_its_checkpoint_is_missing_or_named_twice(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.pt").write_bytes(b"")
    trainer = SimpleNamespace(checkpoint_suffix="", load_checkpoint=None)
    with pytest.raises(InputError, match=message):
        checkpoint_utils.load_checkpoint(CheckpointConfig(save_dir=str(tmp_path), **options), trainer)


def test_a_training_that_wrote_no_checkpoint_may_begin_under_the_name_of_its_last(tmp_path: Path) -> None:
    asked = []

    def load(name: str, *_: object, **__: object) -> None:
        asked.append(name)
        raise KeyboardInterrupt

    trainer = SimpleNamespace(checkpoint_suffix="", load_checkpoint=load)
    cfg = CheckpointConfig(restore_file=str(tmp_path / "checkpoint_last.pt"))
    with pytest.raises(KeyboardInterrupt):
        checkpoint_utils.load_checkpoint(cfg, trainer)
    assert asked == [cfg.restore_file]


def test_a_model_is_not_named_like_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(MissingInput, match=r"a\.pt/: is a file; leave out the slash"):
        checkpoint_utils.load_model_ensemble_and_task([f"{tmp_path}/a.pt/"], task=object())


@pytest.mark.parametrize("option", ["--restore-file", "--finetune-from-model"])
def test_training_does_not_start_anew_from_a_folder(
    option: str,
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
    tmp_path: Path,
    run_train: Callable[..., None],
) -> None:
    data = f"{write_tsv('train.tsv', caption_rows)},{write_tsv('valid.tsv', caption_rows)}"
    options = ["--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"]
    options += ["--arch", "narvl_tiny", "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16]
    options += ["--encoder-attention-heads", 2, "--vision-trunk", "test_resnet", "--freeze-resnet"]
    options += ["--criterion", "qctc", "--batch-size", 2, "--optimizer", "adam", "--save-dir", tmp_path / "run"]
    (tmp_path / "student.pt").mkdir()
    with pytest.raises(Exception, match="is a folder; give the checkpoint in it") as error:
        run_train(data, *options, option, tmp_path / "student.pt")
    assert isinstance(error.value, InputError)
