"""Stands in for a program of ours: writes down how it was called, and makes the files that a run script waits for.

    python recorder.py PROGRAM ARGUMENT...

The environment's RECORD names the file of calls, a JSON list a line, and PLUGIN what `narvl path` prints.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Take the place of the program."""
    program, words = sys.argv[1], sys.argv[2:]
    if words == ["path"]:
        print(os.environ["PLUGIN"])
        return
    with open(os.environ["RECORD"], "a", encoding="utf-8") as record:
        record.write(json.dumps([program, *words]) + "\n")
    for file in outputs(program, words):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    if program == "fairseq-hydra-train":
        print('time | INFO | train | {"epoch": 1}')


def outputs(program: str, words: list[str]) -> list[Path]:
    """Return the files that the program would write, as far as a script needs them."""
    given = {option: Path(value) for option, value in zip(words, words[1:], strict=False) if option.startswith("--")}
    match program, *words:
        case "fairseq-train", *_:
            return [given["--save-dir"] / "checkpoint_last.pt"]
        case "fairseq-hydra-train", *_:
            return [given["--config-dir"] / "checkpoint_last.pt"]  # where a run writes a training's configuration
        case "fairseq-generate", *_:
            return [given["--results-path"] / "generate-test.txt"]
        case "narvl", "vocab", *_:
            return [given["--out"] / "spm.model"]
        case "narvl", "data", "scenes", *_:
            folder = given["--out"] / given["--tasks"]
            answers = [folder / "trainval_ans2label.pkl"] if folder.name == "vqa_gen" else []
            return [folder / "train.tsv", folder / "valid.tsv", folder / "test.tsv", *answers]
        case "narvl", "data", *_:
            files = ("train.tsv", "val.tsv", "test.tsv", "trainval_ans2label.pkl")
            return [given["--out"] / file for file in files]
        case "narvl", "features" | "convert", _, out, *_:
            return [Path(out)]
        case "narvl", "report", out, *_:
            return [Path(out) / "report.html"]
        case "narvl", *_:
            return [given["--out"]]
    return []


if __name__ == "__main__":
    main()
