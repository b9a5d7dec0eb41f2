"""A training of a run: its configuration, its processes, and the numbers of its log."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from narvl_plugin.errors import InputError
from narvl_plugin.pipeline.programs import ProgramFailed, Programs, last_lines
from narvl_plugin.pipeline.stages import Reporter, Work
from narvl_plugin.whole_files import naming, write_whole

CONFIG = "train"
"""Name of the file, without .yaml, from which `fairseq-hydra-train` repeats a training."""

_RECORD = re.compile(r"^[^{]* \| INFO \| [a-z_.]* \| (\{.*)")
"""A line of fairseq's log that holds numbers."""
_RESUMED = re.compile(r"Loaded checkpoint .* \(epoch \d+ @ (\d+) updates\)|No existing checkpoint found ")
"""The line of fairseq's log that says after how many updates a training goes on, or that it begins."""

HYDRA = {
    "run": {"dir": "."},
    "output_subdir": None,
    "job": {"chdir": False},
    "callbacks": {"narvl": {"_target_": "narvl_plugin.hydra_start.ImportPlugin"}},
}
"""What Hydra itself is told: nothing but the log is written beside the checkpoints."""


def configuration(
    base: Mapping[str, Any],
    *,
    folder: Path,
    data: str,
    bpe_dir: Path,
    start: Path | None,
    processes: int,
    workers: int,
) -> dict[str, Any]:
    """Return the complete configuration of a training.

    A stopped training resumes from its last checkpoint and repeats at most a fifth of the updates.

    Args:
        base: the configuration of the recipe.
        folder: folder of the checkpoints.
        data: TRAIN.tsv,VALID.tsv.
        bpe_dir: folder of the vocabulary.
        start: checkpoint whose weights it starts from, or None for that of the recipe.
        processes: number of processes on CPU that share a batch.
        workers: number of workers per process that read images.
    """
    cfg = copy.deepcopy(dict(base))
    cfg["task"] |= {"data": data, "bpe_dir": str(bpe_dir)}
    cfg["common"] |= {"log_format": "json", "reset_logging": True, "cpu": processes > 1}
    cfg["checkpoint"]["save_dir"] = str(folder)
    if start is not None:
        cfg["checkpoint"]["finetune_from_model"] = str(start)
    cfg["checkpoint"]["keep_interval_updates"] = 1
    cfg["dataset"] |= {"num_workers": workers, "batch_size": cfg["dataset"]["batch_size"] // processes}
    updates = cfg["optimization"]["max_update"]
    if cfg["optimization"]["max_epoch"]:
        cfg["checkpoint"] |= {"save_interval": 1, "save_interval_updates": 2000}
        cfg["dataset"] |= {"validate_interval": 1, "validate_interval_updates": 0}
        cfg["common"]["log_interval"] = 50
    else:
        every = updates // 5 + 1
        cfg["checkpoint"] |= {"save_interval": 1000000, "save_interval_updates": every}
        cfg["dataset"] |= {"validate_interval": 1000000, "validate_interval_updates": every}
        cfg["common"]["log_interval"] = updates // 40 + 1
    if processes > 1:
        cfg["distributed_training"] = {
            **cfg.get("distributed_training", {}),
            "distributed_backend": "gloo",
            "ddp_backend": "legacy_ddp",
            "distributed_no_spawn": True,
            "distributed_world_size": processes,
            "distributed_init_method": f"file://{folder / 'rendezvous'}",
        }
    return cfg


def write_configuration(cfg: Mapping[str, Any], folder: Path) -> None:
    """Write a training's configuration into its folder, as `fairseq-hydra-train` reads it."""
    whole = {"defaults": ["_self_", {"override hydra/job_logging": "none"}], "hydra": HYDRA, **cfg}
    head = f"# A training of a run. To repeat it: fairseq-hydra-train --config-dir {folder} --config-name {CONFIG}\n"
    if cfg["common"]["cpu"]:
        head += "# in each of its processes, with distributed_training.distributed_rank=0, =1 and so on.\n"
    write_whole(folder / f"{CONFIG}.yaml", head + OmegaConf.to_yaml(OmegaConf.create(whole)))


class Log:
    """The log of a training, which grows with each line that the training prints."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rest = b""
        if file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n"):
            self.add(b"\n")  # a killed run has left half a line

    def add(self, output: bytes) -> list[str]:
        """Add what the training has printed, and return the lines that are complete."""
        with naming(self.file), open(self.file, "ab") as file:
            file.write(output)
        *lines, self._rest = (self._rest + output).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]


def records_of(lines: list[str]) -> list[dict[str, Any]]:
    """Return the numbers in a log. Those of updates that a resumed training has repeated are left out."""
    records: list[dict[str, Any]] = []
    for line in lines:
        if resumed := _RESUMED.search(line):
            records = [record for record in records if _updates_of(record) <= int(resumed[1] or -1)]
        elif found := _RECORD.match(line):
            try:
                records.append(json.loads(found[1]))
            except ValueError:
                continue  # half a line, of a run that was killed
    return records


def _updates_of(record: Mapping[str, Any]) -> int:
    """Return the number of updates at which a record was written."""
    return max(int(float(record.get(f"{part}num_updates", 0))) for part in ("", "train_", "valid_"))


def train(
    folder: Path, cfg: Mapping[str, Any], *, title: str, programs: Programs, env: Mapping[str, str], reporter: Reporter
) -> Work:
    """Train a model and write the numbers of fairseq's log to FOLDER/train.jsonl.

    On CPU fairseq is started once for each process that shares the batch.

    Args:
        folder: folder of the checkpoints.
        cfg: the configuration, as `configuration` returns it.
        title: name of the training, for the progress bar.
        programs: starts programs.
        env: their environment.
        reporter: prints the losses and the progress.

    Raises:
        ProgramFailed: if a process fails.
    """
    last, trained = folder / "checkpoint_last.pt", folder / "trained.pt"
    averaged = bool(cfg.get("ema", {}).get("store_ema"))
    if not trained.exists():  # if it does, a run was stopped while it wrote the averaged weights
        write_configuration(cfg, folder)
        if not _is_trained(last, cfg["optimization"]["max_update"]):
            yield from _fit(folder, cfg, title, programs, env, reporter)
        for name in ("checkpoint_[0-9]*.pt", "checkpoint_best.pt", "train.[0-9]*.log", "rendezvous"):
            for file in folder.glob(name):
                file.unlink()
        if averaged:
            last.replace(trained)
    if averaged and not last.exists():
        words = ["narvl", "convert", str(trained), str(last), "--ema"]
        yield from wait_for(words, programs.start(words, env, stdout=reporter.log, stderr=reporter.log), programs)
    lines = (folder / "train.log").read_text(encoding="utf-8", errors="replace").split("\n")
    write_whole(folder / "train.jsonl", "".join(f"{json.dumps(record)}\n" for record in records_of(lines)))
    trained.unlink(missing_ok=True)


def wait_for(words: list[str], program: subprocess.Popen[bytes], programs: Programs) -> Work:
    """Wait for a program.

    Raises:
        ProgramFailed: if it fails.
    """
    while not programs.finished(program):
        yield
    if program.returncode:
        command = " ".join(words[:2] if words[0] == "narvl" else words[:1])
        raise ProgramFailed(f"{command} ended with status {program.returncode}", program.returncode)


def _is_trained(checkpoint: Path, max_update: int) -> bool:
    """Return whether a training is at its last update already. fairseq would do another one."""
    if not max_update or not checkpoint.exists():
        return False
    from narvl_plugin.checkpoints.reading import read_checkpoint  # imports torch, which only this needs

    try:
        history = read_checkpoint(checkpoint).get("optimizer_history") or [{}]
    except InputError:  # fairseq says what is wrong with it
        return False
    return int(history[-1].get("num_updates", 0)) >= max_update


def _fit(
    folder: Path, cfg: Mapping[str, Any], title: str, programs: Programs, env: Mapping[str, str], reporter: Reporter
) -> Work:
    """Run the processes of a training, and show what the first of them logs."""
    (folder / "rendezvous").unlink(missing_ok=True)
    words = ["fairseq-hydra-train", "--config-dir", str(folder), "--config-name", CONFIG]
    several = cfg.get("distributed_training", {}).get("distributed_world_size", 1)
    logs, others = [folder / "train.log"], []
    for rank in range(1, several if cfg["common"]["cpu"] else 1):
        logs.append(folder / f"train.{rank}.log")
        with naming(logs[-1]), open(logs[-1], "wb") as file:
            ranked = [*words, f"distributed_training.distributed_rank={rank}"]
            others.append(programs.start(ranked, env, stdout=file, stderr=subprocess.STDOUT))
    first = [*words, "distributed_training.distributed_rank=0"] if others else words
    log = Log(logs[0])
    main = programs.start(first, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert main.stdout is not None
    os.set_blocking(main.stdout.fileno(), False)
    epochs = cfg["optimization"]["max_epoch"]
    total = epochs or cfg["optimization"]["max_update"]
    with reporter.bar(title, total, "epoch" if epochs else "update") as bar:
        ended = False
        while not ended:
            ended = programs.finished(main)
            output = main.stdout.read()
            for line in log.add(output) if output else ():
                _show(line, bar, epochs, reporter)
            _raise_if_failed(zip((main, *others), logs, strict=True), programs)  # the others would wait for it
            if not ended:
                yield
    while not all([programs.finished(program) for program in others]):
        yield
    _raise_if_failed(zip(others, logs[1:], strict=True), programs)


def _raise_if_failed(processes: Iterable[tuple[subprocess.Popen[bytes], Path]], programs: Programs) -> None:
    """Raise an error with the reason of the first process that has failed, which its log names."""
    for program, log in processes:
        if programs.finished(program) and program.returncode:
            raise ProgramFailed(last_lines([log]), program.returncode)


def _show(line: str, bar: Any, epochs: int, reporter: Reporter) -> None:
    """Show the loss that a line of the log reports."""
    found = _RECORD.match(line)
    if not found:
        return
    try:
        record = json.loads(found[1])
    except ValueError:
        return
    if "loss" in record and "num_updates" in record:
        bar.n = min(float(record.get("update", 0)) if epochs else int(record["num_updates"]), bar.total)
        bar.set_postfix_str(f" loss {record['loss']}")
        reporter.detail(f"  update {record['num_updates']}: loss {record['loss']}")
    elif "valid_loss" in record and "valid_num_updates" in record:
        reporter.detail(f"  update {record['valid_num_updates']}: validation loss {record['valid_loss']}")
