"""Programs that are interrupted or terminated: one line, the exit status of shells, and no process left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENDINGS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
SIGNALS = [(signal.SIGINT, True), (signal.SIGTERM, False)]
"""As a terminal sends it, to the whole group of processes, and as `kill` does, to one."""


@contextmanager
def started(*command: object, mark: str) -> Iterator[subprocess.Popen[str]]:
    """Start a program in a group of processes of its own, and kill what is left of it; `mark` tells its processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NARVL_TEST": mark}
    program = subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        yield program
    finally:
        for number in processes(mark):
            os.kill(number, signal.SIGKILL)
        program.communicate()


def processes(mark: str) -> list[int]:
    """Return the numbers of the processes that were started with a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"NARVL_TEST={mark}\0" in (folder / "environ").read_text(errors="replace"):
                found.append(int(folder.name))
        except OSError:
            continue  # has ended
    return found


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, for a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def send(program: subprocess.Popen[str], number: signal.Signals, to_group: bool) -> tuple[int, str]:
    """Send a signal; return the exit status and what was written to stderr."""
    (os.killpg if to_group else os.kill)(program.pid, number)
    _, errors = program.communicate(timeout=60)
    return program.returncode, errors


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize(("number", "to_group"), SIGNALS)
def test_a_training_with_data_workers_ends_in_one_line(
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
    tmp_path: Path,
    number: signal.Signals,
    to_group: bool,
) -> None:
    data = f"{write_tsv('train.tsv', 50 * caption_rows)},{write_tsv('valid.tsv', caption_rows)}"
    small = [
        *("--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2),
        *("--encoder-layers", 1, "--decoder-layers", 1, "--vision-trunk", "test_resnet", "--freeze-resnet"),
    ]
    command = [
        *(sys.executable, "-m", "fairseq_cli.train", data, "--user-dir", ROOT / "narvl_plugin", "--task", "caption"),
        *("--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--arch", "narvl", *small),
        *("--criterion", "qctc", "--optimizer", "adam", "--lr", 1e-3, "--batch-size", 2, "--cpu"),
        *("--save-dir", tmp_path / "out", "--num-workers", 2, "--max-update", 1_000_000, "--no-progress-bar"),
        *("--save-interval-updates", 2, "--keep-interval-updates", 1),
    ]
    with started(*command, mark=str(tmp_path)) as program:
        wait_until(lambda: (tmp_path / "out" / "checkpoint_last.pt").exists() and len(processes(str(tmp_path))) == 3)
        status, errors = send(program, number, to_group)
        ending, expected = ENDINGS[number]
        assert status == expected
        assert errors.splitlines()[-1] == f"{ending}; start the same command again to go on"
        assert "Traceback" not in errors
        assert not processes(str(tmp_path))
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".pt"]


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize(("number", "to_group"), SIGNALS)
def test_narvl_with_worker_processes_ends_in_one_line(tmp_path: Path, number: signal.Signals, to_group: bool) -> None:
    command = ["data", "scenes", "--out", tmp_path / "data", "--train", 100_000, "--nouns", 8, "--size", 32]
    with started(sys.executable, ROOT / "narvl.py", *command, mark=str(tmp_path)) as program:
        wait_until(lambda: len(processes(str(tmp_path))) > 1)
        status, errors = send(program, number, to_group)
        ending, expected = ENDINGS[number]
        assert status == expected
        assert errors.splitlines()[-1] == f"{ending}; start the same command again to go on"
        assert "Traceback" not in errors
        assert not processes(str(tmp_path))


@pytest.mark.parametrize(("number", "to_group"), SIGNALS)
def test_narvl_that_has_not_yet_begun_ends_in_one_line(tmp_path: Path, number: signal.Signals, to_group: bool) -> None:
    """While it imports what takes seconds."""
    began, package = tmp_path / "began", tmp_path / "narvl_plugin"
    (package / "cli").mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copyfile(ROOT / "narvl_plugin" / "program.py", package / "program.py")
    (package / "cli" / "__init__.py").write_text(f"open({str(began)!r}, 'w'); import time; time.sleep(60)\n")
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import narvl; narvl.main()"
    with started(sys.executable, "-c", program, "report", mark=str(tmp_path)) as narvl:
        wait_until(began.exists)
        ending, expected = ENDINGS[number]
        assert send(narvl, number, to_group) == (expected, f"{ending}; start the same command again to go on\n")


def test_a_program_of_a_run_script_leaves_the_line_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARVL_RUN", "1")
    program = (
        "import os, signal; from narvl_plugin import program; program.explain_interrupts();"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    with started(sys.executable, "-c", program, mark=str(tmp_path)) as interrupted:
        assert interrupted.communicate()[1] == ""
    assert interrupted.returncode == 130


def test_an_interrupt_that_nothing_handles_ends_in_one_line(tmp_path: Path) -> None:
    program = (
        "import os, signal; from narvl_plugin import program; program.explain_interrupts();"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    with started(sys.executable, "-c", program, mark=str(tmp_path)) as interrupted:
        assert re.fullmatch("interrupted; start the same .*\n", interrupted.communicate()[1])
    assert interrupted.returncode == 130


STARTING = """
import os, signal, torch.utils.data
from multiprocessing import util
from narvl_plugin import program
program.end_on_signals()
program.end_workers_briefly()

def interrupt_and_count():
    os.killpg(0, signal.SIGINT)
    yield from range(100)

util._finalizer_counter = interrupt_and_count()
list(torch.utils.data.DataLoader(range(100), num_workers=2))
"""


@pytest.mark.integration
def test_an_interrupt_while_workers_start_waits_for_them(tmp_path: Path) -> None:
    """What is made for them is made whole: multiprocessing cannot close the half of it."""
    with started(sys.executable, "-c", STARTING, mark=str(tmp_path)) as interrupted:
        assert interrupted.communicate()[1] == "interrupted; start the same command again to go on\n"
        assert not processes(str(tmp_path))
    assert interrupted.returncode == 130
