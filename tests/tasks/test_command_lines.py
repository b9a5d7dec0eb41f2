"""Command lines of fairseq's programs that lack an option, or ask a program for what it does not do."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fairseq import options
from fairseq_cli import interactive, validate

from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.tasks import registry

TASKS = (*registry.TASKS, "multitask")
TRAIN, GENERATE = options.get_training_parser, options.get_generation_parser
VALIDATE, EVAL_LM = options.get_validation_parser, options.get_eval_lm_parser
INTERACTIVE = options.get_interactive_generation_parser
HOW = "--arch narvl --optimizer adam --batch-size 2"


def parse(parser: Callable[[], ArgumentParser], words: str) -> object:
    """Parse a command line as fairseq's programs do."""
    return options.parse_args_and_arch(parser(), words.split())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("program", "parser"), [("fairseq-interactive", INTERACTIVE), ("fairseq-eval-lm", EVAL_LM)])
def test_a_program_that_has_no_use_for_a_task_names_the_one_that_has(
    program: str, parser: Callable[[], ArgumentParser], task: str
) -> None:
    served = "TASK" if task == "multitask" else task
    with pytest.raises(InputError) as refused:
        parse(parser, f"test.tsv --task {task} --path gone.pt")
    message = str(refused.value)
    assert message.startswith(f"{program} does not support --task {task}, ")
    assert f"take fairseq-generate FILE.tsv --task {served} --path CHECKPOINT" in message
    assert ("narvl caption IMAGES --checkpoint CHECKPOINT" in message) == (task == "caption")


def test_fairseq_interactive_ends_before_it_loads_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fairseq-interactive", "test.tsv", "--task", "vqa_gen", "--path", "gone.pt"])
    with pytest.raises(InputError, match="^fairseq-interactive does not support --task vqa_gen"):
        interactive.cli_main()


@pytest.mark.parametrize(
    ("parser", "words", "message"),
    [
        (TRAIN, "a.tsv,b.tsv --task caption --optimizer adam --batch-size 2", "--arch is not given; take narvl_SIZE"),
        (TRAIN, f"a.tsv,b.tsv {HOW}", "--task is not given, and a.tsv,b.tsv names TSV files; take caption, vqa_gen"),
        (GENERATE, "a.tsv --path a.pt", "--task is not given, and a.tsv names TSV files; take caption, vqa_gen"),
        (GENERATE, "a.tsv.gz --path a.pt", "--task is not given, and a.tsv.gz names TSV files; take caption, vqa_gen"),
        (GENERATE, "a.tsv --task refcoco", "--path is not given; give the checkpoint"),
        (VALIDATE, "a.tsv --path a.pt --batch-size 2", "--task is not given; take caption, vqa_gen"),
        (VALIDATE, "a.tsv --task snli_ve --batch-size 2", "--path is not given; give the checkpoint"),
        (INTERACTIVE, "a.tsv --path a.pt", "--task is not given, and a.tsv names TSV files"),
    ],
)
def test_a_missing_option_is_named(parser: Callable[[], ArgumentParser], words: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse(parser, words)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"--task caption {HOW}", "the following arguments are required: data"),
        (f"a.tsv,b.tsv --task caption {HOW} --colour red", "unrecognized arguments: --colour red"),
        (f"a.tsv,b.tsv --task caption {HOW} --max-update many", "argument --max-update: invalid int value: 'many'"),
    ],
)
def test_what_a_parser_refuses_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(TRAIN, words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message} (")
    assert line.endswith(" --help lists all options)")


@pytest.mark.parametrize(
    ("parser", "words"),
    [
        (TRAIN, f"a.tsv,b.tsv --task caption {HOW}"),
        (TRAIN, "a.tsv,b.tsv --task caption --arch ofa --optimizer adam --max-tokens 9000"),
        (TRAIN, "folder --arch transformer --optimizer adam --batch-size 2"),
        (GENERATE, "folder --path a.pt"),
        (VALIDATE, "a.tsv --task caption --path a.pt --max-tokens 9000"),
    ],
)
def test_what_lacks_nothing_is_parsed(parser: Callable[[], ArgumentParser], words: str) -> None:
    parse(parser, words)


@pytest.mark.parametrize("limit", ["--max-tokens 9000", "--batch-size 2"])
def test_fairseq_validate_parses_what_is_given_once_more_without_defaults(limit: str) -> None:
    words = f"a.tsv --task caption --path a.pt {limit}".split()
    given = options.parse_args_and_arch(VALIDATE(), words, suppress_defaults=True)
    assert ("max_tokens" in given, "batch_size" in given) == ("tokens" in limit, "batch" in limit)


@pytest.mark.integration
def test_fairseq_validate_takes_the_criterion_that_is_asked_for(
    write_checkpoint: Callable[..., Path],
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
    tmp_path: Path,
    quiet: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of a student that was made of a teacher, whose configuration still names the teacher's."""
    options = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
    state = read_checkpoint(write_checkpoint("student.pt", "narvl", "caption", **options))
    state["cfg"]["optimization"] = {"sentence_avg": False}
    student = tmp_path / "made_of_a_teacher.pt"
    torch.save(state, student)
    command = [str(write_tsv("valid.tsv", caption_rows)), "--task", "caption", "--path", str(student), "--cpu"]
    command += ["--batch-size", "6", "--no-progress-bar", "--num-workers", "0"]
    monkeypatch.setattr("sys.argv", ["fairseq-validate", *command])
    with pytest.raises(InputError, match="^--criterion label_smoothed_cross_entropy: .* take --criterion qctc"):
        validate.cli_main()
    monkeypatch.setattr("sys.argv", ["fairseq-validate", *command, "--criterion", "qctc"])
    validate.cli_main()
