"""The whole pipelines of run_scripts with their smoke presets, what they refuse, and how they stop and go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from narvl_plugin.checkpoints.finding import existing
from narvl_plugin.pipeline.training import Log, records_of

ROOT = Path(__file__).parents[1]
REAL = f"{sys.executable} {ROOT / 'narvl.py'}"
RUN_FOR_REAL = f'[ "$1" != run ] || exec {REAL} "$@"'
"""Beginning of a stand-in of narvl: the engine of the run scripts is no stand-in."""
STAGES = [
    "data",
    "vocab",
    "features train",
    "features valid",
    "teacher",
    "distil",
    "student",
    "generate teacher_beam5",
    "generate teacher_greedy",
    "calibrate",
    "ngrams",
    "generate student",
    "latency",
    "report",
]


@pytest.fixture(scope="module")
def root(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts and, in its .venv, the programs."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(ROOT / "run_scripts", folder / "run_scripts")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(programs)
    return folder


@pytest.fixture
def root_without_programs(tmp_path: Path) -> Path:
    """A folder with the scripts, for runs that are refused before the first program."""
    shutil.copytree(ROOT / "run_scripts", tmp_path / "run_scripts")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    write_program(tmp_path / ".venv" / "bin" / "narvl", f"{RUN_FOR_REAL}\nexit 1")
    return tmp_path


def write_program(file: Path, lines: str) -> None:
    """Write a stand-in of a program."""
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)


def pipeline(root: Path, name: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """Run a task's script."""
    command = ["bash", str(root / "run_scripts" / f"{name}.sh"), *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.integration
def test_the_pipeline_of_captions(root: Path, tmp_path: Path) -> None:
    """Every stage leaves its output; a finished run does nothing again, and is not gone on with otherwise."""
    run, began = tmp_path / "run", datetime.now(UTC).replace(microsecond=0)
    done = pipeline(root, "caption", "PRESET=smoke", f"OUT={run}", "DISTIL=1")
    assert done.returncode == 0, done.stdout + done.stderr
    timed = [line.split("\t") for line in (run / "stages.tsv").read_text().splitlines()]
    assert sorted(name for name, *_ in timed) == sorted(STAGES)
    assert all(float(seconds) > 0 for _, seconds, _ in timed)
    ends = [datetime.fromisoformat(end) for *_, end in timed]
    assert began <= ends[0] and ends[-1] <= datetime.now(UTC)
    for name in ("data/caption/test.tsv", "vocab/spm.model", "results.json", "table.md", "report.html"):
        assert (run / name).stat().st_size > 0
    assert not list(run.rglob("*.part*"))

    human, distilled = ((run / name / "train.tsv").read_text().splitlines() for name in ("features", "distilled"))
    assert len(human) == len(distilled) == 32
    assert [row.split("\t")[4] for row in human] == [row.split("\t")[4] for row in distilled]

    for model in ("teacher", "student"):
        records = [json.loads(line) for line in (run / model / "train.jsonl").read_text().splitlines()]
        assert {record["num_updates"] for record in records if "num_updates" in record} >= {"1", "4"}
        assert any("valid_loss" in record and "valid_cider" in record for record in records)
    assert "new: decoder.query_embed.weight[0:24], queries" in (run / "student" / "train.log").read_text()

    results = json.loads((run / "results.json").read_text())
    assert {"teacher_beam5", "teacher_greedy", "student"} <= results["systems"].keys()
    assert results["settings"]["PRESET"] == "smoke"
    generated = (run / "generate" / "student" / "generate-test.txt").read_text()
    assert sum(line.startswith("D-") for line in generated.splitlines()) == 8
    assert (run / "captions.ngrams").stat().st_size > 0

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    done = pipeline(root, "caption", "PRESET=smoke", f"OUT={run}", "DISTIL=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is done: ") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    done = pipeline(root, "caption", "PRESET=smoke", f"OUT={run}", "DISTIL=1", "QUERIES=7")
    assert done.returncode == 1
    assert "QUERIES (was '24', now '7')" in done.stderr


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "teachers", "settings"),
    [
        ("refcoco", ["teacher_beam5", "teacher_greedy"], []),
        ("regions", ["teacher_beam5", "teacher_greedy"], ["teacher.task.element_order=random"]),
        ("scene_graph", ["teacher_beam5", "teacher_greedy"], []),
        ("scene_tree", ["teacher_beam5", "teacher_greedy"], []),
        ("snli_ve", ["teacher_allcand", "teacher_beam5"], ["EMA_DECAY=0.9"]),
        ("vqa", ["teacher_allcand", "teacher_beam5"], ["EPOCHS=2"]),
        ("gqa", ["teacher_allcand", "teacher_beam5"], ["DISTIL=1"]),
    ],
)
def test_other_tasks_take_the_same_pipeline(
    root: Path, tmp_path: Path, name: str, teachers: list[str], settings: list[str]
) -> None:
    out = tmp_path / "run"
    done = pipeline(root, name, "PRESET=smoke", f"OUT={out}", "PROCESSES=1", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert {*teachers, "student"} <= results["systems"].keys()
    assert (out / "distilled" / "train.tsv").exists() == ("DISTIL=1" in settings)
    for file in ("table.md", "report.html"):
        assert (out / file).stat().st_size > 0


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("QUERY=7", "'QUERY=7' is no setting. Settings are KEY=value with one of these keys: PRESET SEED"),
        ("smoke", "'smoke' is no setting"),
        ("PRESET=huge", "PRESET=huge: choose smoke, quick or full"),
        ("ARCH=ofa_nano", "ARCH=ofa_nano: give a student's architecture"),
        ("ARCH=narvl_base", "ARCH=narvl_base: give BPE=FOLDER"),
        ("BATCH=33", "BATCH=33: is not divisible by PROCESSES=2"),
        ("DATA=.", "holds none of train stage1_train"),
        ("DATA=gone", "DATA=gone: no such file or folder"),
        ("TEACHERS=0", "TEACHERS=0: choose 1 or more"),
        ("NGRAMS=9", "NGRAMS=9: choose a length from 2 to 8, or 0"),
        ("NO_REPEAT_NGRAM=3", "NGRAMS=4: needs NO_REPEAT_NGRAM=0, and it is 3"),
        ("SELF_DISTIL=good", "SELF_DISTIL=good: choose best or mbr"),
        (
            "TEACHER=run_scripts/box.sh",
            "run_scripts/box.sh: give the vocabulary it was trained with, too: BPE=FOLDER",
        ),
        ("INIT=run_scripts", "run_scripts: is a folder; give the checkpoint in it"),
        ("TEACHER=hf://owner", "hf://owner: is no name of a model on the Hugging Face hub"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    root_without_programs: Path, tmp_path: Path, setting: str, complaint: str
) -> None:
    done = pipeline(root_without_programs, "caption", f"OUT={tmp_path / 'run'}", "PROCESSES=2", setting)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_under_torchrun_is_refused(
    root_without_programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = pipeline(root_without_programs, "caption", f"OUT={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "error: a run is one process, which starts its own; start it without torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 or shutil.which("nvidia-smi") is not None, reason="needs two cores and no GPU"
)
def test_two_processes_share_a_batch_however_many_threads_each_has(
    root_without_programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = pipeline(root_without_programs, "caption", "PRESET=smoke", f"OUT={tmp_path / 'run'}", "BATCH=33")
    assert "BATCH=33: is not divisible by PROCESSES=2" in done.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("caption", {"PATCH_IMAGE_SIZE": "480", "STUDENT_LR": "1e-05", "EPOCHS": "5", "QUERIES": "20"}),
        ("refcoco", {"PATCH_IMAGE_SIZE": "512", "STUDENT_LR": "5e-05", "EPOCHS": "10", "QUERIES": "7"}),
        ("regions", {"PATCH_IMAGE_SIZE": "512", "STUDENT_LR": "5e-05", "EPOCHS": "10", "QUERIES": "40"}),
        ("scene_graph", {"PATCH_IMAGE_SIZE": "512", "STUDENT_LR": "5e-05", "EPOCHS": "10", "QUERIES": "84"}),
        ("scene_tree", {"PATCH_IMAGE_SIZE": "512", "STUDENT_LR": "5e-05", "EPOCHS": "10", "QUERIES": "40"}),
        ("snli_ve", {"PATCH_IMAGE_SIZE": "480", "STUDENT_LR": "5e-05", "EPOCHS": "5", "QUERIES": "3"}),
        ("vqa", {"PATCH_IMAGE_SIZE": "480", "STUDENT_LR": "5e-05", "EPOCHS": "10", "QUERIES": "6"}),
        ("gqa", {"PATCH_IMAGE_SIZE": "480", "STUDENT_LR": "5e-05", "EPOCHS": "10", "QUERIES": "6"}),
    ],
)
def test_larger_models_are_trained_as_published(tmp_path: Path, name: str, expected: dict[str, str]) -> None:
    """Their recipe is settled before anything runs, and here training fails at once."""
    shutil.copytree(ROOT / "run_scripts", tmp_path / "run_scripts")
    write_program(tmp_path / "narvl", RUN_FOR_REAL)
    (tmp_path / "fairseq-hydra-train").symlink_to("/bin/false")
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.tsv").touch()
    command = ["bash", str(tmp_path / "run_scripts" / f"{name}.sh"), "ARCH=narvl_base", f"DATA={tmp_path}"]
    subprocess.run(
        [*command, f"BPE={tmp_path}", f"OUT={tmp_path / 'run'}"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    lines = (tmp_path / "run" / "settings.txt").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines)
    shared = {"BATCH": "16", "UPDATE_FREQ": "8", "LABEL_SMOOTHING": "0.1", "DROPOUT": "0.1", "ADAM_BETA2": "0.999"}
    expected = {**shared, "NUM_BINS": "1000", "BIGRAM_WEIGHT": "0", **expected}
    assert {key: settings[key] for key in expected} == expected


def wait_for(path: Path) -> None:
    """Wait until a file is there, for a minute at most."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.01)


def test_of_two_runs_in_one_folder_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the first has ended. If it is killed, its program ends with it, and the next run goes on."""
    started = tmp_path / "started"
    lines = f"echo $$ >{started}.part\nmv {started}.part {started}\nexec sleep 60"
    write_program(tmp_path / "narvl", f"{RUN_FOR_REAL}\n{lines}")
    shutil.copytree(ROOT / "run_scripts", tmp_path / "run_scripts")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["bash", str(tmp_path / "run_scripts" / "caption.sh"), f"OUT={tmp_path / 'run'}", "PROCESSES=1"]

    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(started)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1
    assert re.fullmatch(r"error: OUT=.*/run: another run, .* is writing there\. .*\n", second.stderr)
    assert second.stdout == ""
    os.kill(int(started.read_text()), signal.SIGKILL)
    assert "another run" not in str(first.communicate()[1])

    for _ in range(2):
        started.unlink()
        killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(started)
        program = int(started.read_text())
        killed.kill()
        killed.communicate()
        deadline = time.monotonic() + 20
        while lives(program):
            assert time.monotonic() < deadline, "the program has outlived its run"
            time.sleep(0.01)


def test_a_stopped_run_goes_on_with_another_skip_budget_and_with_nothing_else(tmp_path: Path) -> None:
    write_program(tmp_path / "narvl", f"{RUN_FOR_REAL}\nexit 1")
    shutil.copytree(ROOT / "run_scripts", tmp_path / "run_scripts")
    command = ["bash", str(tmp_path / "run_scripts" / "caption.sh"), f"OUT={tmp_path / 'run'}", "PROCESSES=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def said(*settings: str) -> str:
        return subprocess.run([*command, *settings], env=environment, capture_output=True, text=True).stderr

    assert "other settings" not in said()
    with open(tmp_path / "run" / "settings.txt", "a") as file:
        file.write("SKIP_BAD_ROWS=0\n")  # as earlier versions kept it
    assert "other settings" not in said("SKIP_BAD_ROWS=3")
    assert "other settings: SEED (was '1', now '2')." in said("SKIP_BAD_ROWS=3", "SEED=2")


def lives(number: int) -> bool:
    """Say whether there is a process of this number that has not ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def is_asked_to_end(folder: Path, stage: str, number: signal.Signals, to_group: bool, ending: str, status: int) -> None:
    """Run a script in a folder, twice, and ask it to end when one of its programs waits for a process of its own."""
    programs, started, run = folder / "programs", folder / "started", folder / "run"
    programs.mkdir(parents=True)
    wait = f"sleep 61 & echo $! >{started}.part; echo $$ >>{started}.part; mv {started}.part {started}; wait"
    make = 'for word; do case $word in */*) mkdir -p "$(dirname "$word")"; touch "$word";; esac; done'
    does = {"narvl": make, "fairseq-hydra-train": "true", "fairseq-generate": wait}
    does |= {"narvl" if stage == "data" else "fairseq-hydra-train": wait} if stage != "generate" else {}
    for name, lines in does.items():
        write_program(programs / name, f"{RUN_FOR_REAL}\n{lines}" if name == "narvl" else lines)
    shutil.copytree(ROOT / "run_scripts", folder / "run_scripts")
    for done in ("data/caption/train.tsv", "data/caption/valid.tsv", "data/caption/test.tsv")[: 3 * (stage != "data")]:
        (run / done).parent.mkdir(parents=True, exist_ok=True)
        (run / done).touch()
    if stage != "data":
        (run / "vocab").mkdir()
        (run / "vocab" / "spm.model").touch()
        (run / "features").mkdir()
        for split in ("train", "valid"):
            (run / "features" / f"{split}.tsv").touch()
    if stage == "generate":
        (run / "teacher").mkdir()
        (run / "teacher" / "train.jsonl").touch()
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    command = ["bash", str(folder / "run_scripts" / "caption.sh"), f"OUT={run}", "PROCESSES=1", "DISTIL=0"]
    for _ in range(2):  # the second run is refused by nothing that the first has left behind
        script = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait_for(started)
        numbers = [int(line) for line in started.read_text().split()]
        (os.killpg if to_group else os.kill)(script.pid, number)
        _, errors = script.communicate(timeout=60)
        assert (script.returncode, errors) == (status, f"{ending}; start the same command again to go on\n"), folder
        assert not [left for left in numbers if lives(left)], folder
        started.unlink()  # which a second program may have written anew


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_run_that_is_asked_to_end_takes_its_programs_along(tmp_path: Path) -> None:
    """In each stage, one of whose programs has a process of its own, and then goes on.

    All cases run at once, because each waits for two seconds, twice, before processes that do not end are killed.
    """
    signals = [(signal.SIGINT, True, "interrupted", 130), (signal.SIGTERM, False, "terminated", 143)]
    with ThreadPoolExecutor(6) as pool:
        cases = [
            pool.submit(is_asked_to_end, tmp_path / ending / stage, stage, number, to_group, ending, status)
            for stage in ("data", "teacher", "generate")
            for number, to_group, ending, status in signals
        ]
    for case in cases:
        case.result()


def test_a_run_that_was_killed_with_its_programs_refuses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    write_program(tmp_path / "narvl", f"{RUN_FOR_REAL}\ntouch {started}\nexec sleep 61")
    shutil.copytree(ROOT / "run_scripts", tmp_path / "run_scripts")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["bash", str(tmp_path / "run_scripts" / "caption.sh"), f"OUT={tmp_path / 'run'}", "PROCESSES=1"]
    for _ in range(3):
        script = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait_for(started)
        os.killpg(script.pid, signal.SIGKILL)
        assert script.communicate(timeout=60)[1] == ""
        started.unlink()


# --- The engine, with stand-ins of the programs ----------------------------------------------------------------------

RECORDER = ROOT / "tests" / "documents" / "recorder.py"
TRAINING = f"""{sys.executable} -SE {RECORDER} fairseq-hydra-train "$@"
echo 'time | INFO | fairseq.trainer | No existing checkpoint found x'
echo 'time | INFO | fairseq_cli.train | {{"epoch": 1, "update": 0.5, "loss": "3.5", "num_updates": "4"}}'
"""


def stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put stand-ins of all programs, which make the files of the real ones, into PATH."""
    folder.mkdir()
    for program in ("narvl", "fairseq-generate"):
        first = f"{RUN_FOR_REAL}\n" if program == "narvl" else ""
        write_program(folder / program, f'{first}exec {sys.executable} -SE {RECORDER} {program} "$@"')
    write_program(folder / "fairseq-hydra-train", TRAINING)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("RECORD", str(folder / "record"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def narvl_run(folder: Path, *words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Type narvl run in a folder."""
    command = ["bash", "-c", f'{before} exec narvl run "$@"', "bash", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.integration
@pytest.mark.parametrize("key", ["TEACHER", "INIT"])
def test_a_port_of_ofa_brings_its_vocabulary(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path / "programs", monkeypatch)
    for folder, names in (
        ("coco", ["train.tsv", "val.tsv", "test.tsv"]),
        ("port", ["config.json", "vocab.json", "merges.txt", "pytorch_model.bin"]),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    words = ["ARCH=narvl_tiny", "DATA=coco", f"{key}=port", "PROCESSES=1", "OUT=run"]
    done = narvl_run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    port, teacher = tmp_path / "port", tmp_path / "run" / "teacher" / "checkpoint_last.pt"
    student = OmegaConf.load(tmp_path / "run" / "student" / "train.yaml")
    assert (student.task.bpe_dir, student.checkpoint.finetune_from_model) == (str(port), str(teacher))
    if key == "TEACHER":
        assert existing(teacher) == teacher / "pytorch_model.bin" and teacher.resolve() == port
    else:
        first = OmegaConf.load(tmp_path / "run" / "teacher" / "train.yaml")
        assert (first.task.bpe_dir, first.checkpoint.finetune_from_model) == (str(port), str(port))
    assert f"BPE={port}\n" in (tmp_path / "run" / "settings.txt").read_text()
    assert narvl_run(tmp_path, *words).returncode == 0  # it is the same run
    (port / "vocab.json").unlink()
    done = narvl_run(tmp_path, *words[:-1], "OUT=other")
    assert "give BPE=FOLDER" in done.stderr


@pytest.mark.integration
def test_options_of_hydra_and_of_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep does one run after another, and each folder says how its trainings are repeated."""
    stand_ins(tmp_path / "programs", monkeypatch)
    words = ["preset=smoke", "processes=1", "student.model.num_queries=9", "training.dataset.batch_size=4"]
    done = narvl_run(tmp_path, "--multirun", "recipe=caption,refcoco", *words, "--log-file", "logs/run")
    assert done.returncode == 0, done.stderr
    for recipe, (teacher, own) in {"caption": (24, 16), "refcoco": (7, 64)}.items():
        run = tmp_path / "runs" / f"{recipe}_smoke_seed1"
        cfg = {role: OmegaConf.load(run / role / "train.yaml") for role in ("teacher", "student")}
        assert teacher != 9 != cfg["teacher"].model.get("num_queries")
        assert cfg["student"].model.num_queries == 9
        assert [one.dataset.batch_size for one in cfg.values()] == [4, 4] != [own, own]
        assert cfg["student"].checkpoint.finetune_from_model == str(run / "teacher" / "checkpoint_last.pt")
        assert (run / "report.html").exists()
    log = (tmp_path / "logs" / "run").read_text()
    assert log.count("[report] took") == 2 and "  update 4: loss 3.5" in log

    for change, complaint in (
        ("student.model.num_queries=8", "QUERIES (was '9', now '8')"),
        ("student.model.encoder_layers=1", "student.model.encoder_layers (was '', now '1')"),
    ):
        done = narvl_run(tmp_path, "recipe=caption", *words, change)
        assert done.returncode == 1 and complaint in done.stderr
    for word, complaint in (
        ("trian=5", "Could not override 'trian'"),
        ("recipe=coco", "recipe=coco: choose one of caption gqa"),
        ("TEACHER_LR=fast", "TEACHER_LR=fast: give a number"),
        ("ADD_CAPTION=1", "'ADD_CAPTION=1' is no setting"),
    ):
        done = narvl_run(tmp_path, word)
        assert done.returncode == 1 and complaint in done.stderr
    done = narvl_run(tmp_path, "--config-dir", str(tmp_path))
    assert "holds no recipes (train.yaml); give the folder run_scripts/config of a clone" in done.stderr


@pytest.mark.integration
def test_three_teachers_distil_together_and_a_student_teaches_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teachers differ in their seed, and the first is that of a run with one. A killed run goes on."""
    stand_ins(tmp_path / "programs", monkeypatch)
    run, words = tmp_path / "run", ["preset=smoke", "processes=1", "seed=7"]
    assert narvl_run(tmp_path, *words, f"out={tmp_path / 'one'}").returncode == 0
    words += ["teachers=3", "distil=true", "self_distil=mbr"]
    record = tmp_path / "programs" / "record"
    record.unlink()
    done = narvl_run(tmp_path, *words, f"out={run}")
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    trained = [Path(call[2]).name for call in calls if call[0] == "fairseq-hydra-train"]
    assert trained == ["teacher", "teacher_2", "teacher_3", "first_student", "student"]
    cfg = {name: OmegaConf.load(run / name / "train.yaml") for name in trained}
    teachers = [str(run / name / "checkpoint_last.pt") for name in trained[:3]]
    assert [cfg[name].common.seed for name in trained] == [7, 1007, 2007, 7, 7]
    for name, places in {"teacher_2": ("common", "checkpoint"), "student": ("task", "checkpoint")}.items():
        for part in places:
            cfg[name].pop(part)
    assert cfg["teacher_2"] == {part: cfg["teacher"][part] for part in cfg["teacher_2"]}
    assert cfg["student"] == {part: cfg["first_student"][part] for part in cfg["student"]}
    starts = [OmegaConf.load(run / name / "train.yaml").checkpoint.finetune_from_model for name in trained[3:]]
    first = str(run / "first_student" / "checkpoint_last.pt")
    assert starts == [teachers[0], first]
    data = [OmegaConf.load(run / name / "train.yaml").task.data.split(",")[0] for name in trained[3:]]
    assert data == [str(run / name / "train.tsv") for name in ("distilled", "self_distilled")]
    one = (tmp_path / "one" / "teacher" / "train.yaml").read_text()
    assert (run / "teacher" / "train.yaml").read_text() == one.replace(str(tmp_path / "one"), str(run))

    distilled = [call for call in calls if call[:2] == ["narvl", "distill"]]
    given = [[word for word, flag in zip(call[1:], call, strict=False) if flag == "--teacher"] for call in distilled]
    assert given == [teachers, [first]]
    assert ["--mbr" in call for call in distilled] == [False, True]
    paths = [call[call.index("--path") + 1] for call in calls if call[0] == "fairseq-generate"]
    assert paths == [":".join(teachers)] * 2 + [str(run / "student" / "checkpoint_last.pt")]

    for lost in ("teacher_3/train.jsonl", "teacher_3/checkpoint_last.pt", "self_distilled/train.tsv"):
        (run / lost).unlink()
    record.unlink()
    assert narvl_run(tmp_path, *words, f"out={run}").returncode == 0
    again = [json.loads(line) for line in record.read_text().splitlines()]
    assert [call[:2] for call in again if call[0] == "fairseq-hydra-train"] == [["fairseq-hydra-train", "--config-dir"]]
    assert [call[:2] for call in again if call[0] == "narvl"][:1] == [["narvl", "distill"]]

    shared = [f"shared={run}", f"out={tmp_path / 'sharing'}"]
    done = narvl_run(tmp_path, *words, "self_distil=best", *shared)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sharing" / "teacher_3").resolve() == run / "teacher_3"
    assert not (tmp_path / "sharing" / "first_student").is_symlink()
    done = narvl_run(tmp_path, *words, "teachers=2", f"shared={run}", f"out={tmp_path / 'refused'}")
    assert "TEACHERS (was '3', now '2')" in done.stderr


@pytest.mark.integration
def test_a_run_goes_on_after_a_full_disk_and_after_a_program_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(tmp_path / "programs", monkeypatch)
    words = ["PRESET=smoke", "PROCESSES=1", "EMA_DECAY=0.9", f"OUT={tmp_path / 'run'}"]
    train = tmp_path / "programs" / "fairseq-hydra-train"
    write_program(train, f"{TRAINING}head -c 100000 /dev/zero")
    done = narvl_run(tmp_path, *words, before="ulimit -f 60;")  # files of 60 KiB at most
    assert done.returncode == 1
    error = f"error: {tmp_path / 'run' / 'teacher' / 'train.log'}: File too large; make room, and start the same"
    assert done.stderr.splitlines()[-1].startswith(error)

    write_program(train, "echo 'error: bad row'\nexit 3")
    done = narvl_run(tmp_path, *words)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: bad row")

    write_program(train, TRAINING)
    convert, narvl = tmp_path / "programs" / "convert", tmp_path / "programs" / "narvl"
    first = f"{RUN_FOR_REAL}\n"
    narvl.write_text(narvl.read_text().replace(first, f"{first}[ $1 != convert -o -e {convert} ] || exit 4\n"))
    assert narvl_run(tmp_path, *words).returncode == 4
    convert.touch()
    (tmp_path / "programs" / "record").unlink()
    done = narvl_run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (tmp_path / "programs" / "record").read_text().splitlines()]
    trained = [call[2] for call in calls if call[0] == "fairseq-hydra-train"]
    assert trained == [str(tmp_path / "run" / "student")]  # the teacher is averaged, and not trained again
    assert len([call for call in calls if call[:2] == ["narvl", "convert"]]) == 2
    assert len((tmp_path / "run" / "teacher" / "train.jsonl").read_text().splitlines()) == 1
    assert not list((tmp_path / "run").rglob("trained.pt"))


def test_numbers_of_updates_that_a_stopped_training_repeats_count_once(tmp_path: Path) -> None:
    def line(updates: int, loss: float) -> str:
        return f'now | INFO | train_inner | {{"loss": "{loss}", "num_updates": "{updates}"}}'

    validated = 'now | INFO | valid | {"valid_loss": "2", "valid_num_updates": "10"}'
    file = tmp_path / "train.log"
    file.write_text("\n".join([line(5, 1), line(10, 2), validated, line(15, 3), line(20, 4)[:50]]))
    log = Log(file)
    log.add(b"now | INFO | fairseq.trainer | Loaded checkpoint x/checkpoint_last.pt (epoch 3 @ 10 updates)\n")
    assert log.add(f"{line(15, 5)}\n{line(20, 6)[:9]}".encode()) == [line(15, 5)]
    assert log.add(f"{line(20, 6)[9:]}\n".encode()) == [line(20, 6)]
    losses = [record.get("loss", record.get("valid_loss")) for record in records_of(file.read_text().split("\n"))]
    assert losses == ["1", "2", "2", "5", "6"]
