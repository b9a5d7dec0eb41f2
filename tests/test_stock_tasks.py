"""A stock task of fairseq under the plugin: it trains, resumes and generates as without it."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest
import torch

import narvl_plugin
from narvl_plugin.checkpoints.reading import read_checkpoint

PROGRAM = """
import logging, sys
from fairseq_cli import generate, preprocess, train

folder, plugin, data = sys.argv[1:4]
more = ["--user-dir", plugin] if plugin else []

def run(program, *words):
    logging.root.handlers.clear()
    sys.argv = [program.__name__, *map(str, words)]
    program.cli_main()

if not plugin:  # once for both
    run(preprocess, "-s", "a", "-t", "b", "--trainpref", f"{folder}/train", "--testpref", f"{folder}/test",
        "--validpref", f"{folder}/valid", "--destdir", data, "--workers", 1)
small = [word for side in ("encoder", "decoder") for word in (f"--{side}-layers", 1, f"--{side}-embed-dim", 16,
         f"--{side}-ffn-embed-dim", 32, f"--{side}-attention-heads", 2)]
out = f"{folder}/{'with' if plugin else 'without'}"
training = [data, *more, "--task", "translation", "--arch", "transformer_iwslt_de_en", *small, "--save-dir", out,
            "--optimizer", "adam", "--lr", 1e-2, "--batch-size", 8, "--cpu", "--no-progress-bar",
            "--criterion", "label_smoothed_cross_entropy", "--no-epoch-checkpoints", "--num-workers", 0]
run(train, *training, "--max-epoch", 2)
run(train, *training, "--max-epoch", 4)
run(generate, data, *more, "--task", "translation", "--path", f"{out}/checkpoint_last.pt", "--cpu",
    "--results-path", out, "--no-progress-bar")
"""


def run(programs: Path, folder: Path, plugin: str) -> subprocess.Popen[str]:
    # fairseq alone cannot read its own checkpoints with torch 2.6 and later unless told so.
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "" if plugin else "1", "OMP_NUM_THREADS": "1"}
    words = [str(programs / "forked-python"), "-c", PROGRAM, str(folder), plugin, str(folder / "data")]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.integration
def test_translation_trains_resumes_and_generates_as_without_the_plugin(programs: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    for split, count in (("train", 32), ("valid", 8), ("test", 8)):
        lines = [[draw.choice("abcdefg") for _ in range(draw.randint(2, 5))] for _ in range(count)]
        (tmp_path / f"{split}.a").write_text("".join(" ".join(line) + "\n" for line in lines))
        (tmp_path / f"{split}.b").write_text("".join(" ".join(reversed(line)) + "\n" for line in lines))
    written, weights = [], []
    for plugin in ("", next(iter(narvl_plugin.__path__))):
        process = run(programs, tmp_path, plugin)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        folder = tmp_path / ("with" if plugin else "without")
        lines = (folder / "generate-test.txt").read_text().splitlines()
        written.append([line for line in lines if line[:2] in ("S-", "T-", "H-", "D-", "P-") or "BLEU" in line])
        state = read_checkpoint(folder / "checkpoint_last.pt")
        assert state["optimizer_history"][-1]["num_updates"] == 4 * 4
        weights.append(state["model"])
    assert written[0] == written[1]
    assert len(written[0]) == 8 * 5 + 1
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
