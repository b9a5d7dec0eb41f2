"""Stands in for `narvl run`: makes the files that a study reads, in no time.

The environment's RECORD names the file of calls, a JSON list a line. HANG and FAIL name a run, as QUERIES SEED, that
does so; a teacher has 0 queries.
"""

import json
import os
import pathlib
import sys
import time

words = sys.argv[1:]
assert words[0] == "run", words
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps(words) + "\n")
multirun = "--multirun" in words
cells = next(word for word in words if word.startswith("cell=")).removeprefix("cell=")
for cell in cells.split(","):
    lines = (json.loads("{" + line + "}") for line in pathlib.Path(cell.strip("'")).read_text().splitlines())
    options = {name: value for line in lines for name, value in line.items()}
    out = pathlib.Path(options["out"])
    number, seed = options.get("student.model.num_queries", 0), options.get("seed", 1)
    if os.environ.get("HANG") == f"{number} {seed}":
        pathlib.Path(os.environ["RECORD"] + ".hangs").touch()
        time.sleep(60)
    if os.environ.get("FAIL") == f"{number} {seed}":
        print("error: broken")
        sys.exit(1)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.txt").touch()
    if "until" in options:
        for name in (
            "data/caption/train.tsv",
            "data/caption/valid.tsv",
            "data/caption/test.tsv",
            "vocab/spm.model",
            "features/train.tsv",
            "features/valid.tsv",
            "teacher/train.jsonl",
            "distilled/train.tsv",
            "generate/teacher_beam5/generate-test.txt",
            "generate/teacher_greedy/generate-test.txt",
        ):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).touch()
        continue
    rows = [(row * number * seed) % 7 / 7 for row in range(20)]
    mean = sum(rows) / 20
    (out / "scores.json").write_text(
        json.dumps(
            {
                "task": "caption",
                "main": "CIDEr",
                "base": "teacher_beam5",
                "curve": ["valid_cider", "CIDEr"],
                "test": str(seed),
                "systems": {"student": rows, "teacher_beam5": rows},
            }
        )
    )
    (out / "results.json").write_text(
        json.dumps(
            {
                "systems": {
                    "student": {
                        "scores": {"CIDEr": mean},
                        "cider_ratio_to_teacher_beam5": 1.0,
                        "true": 0.5,
                        "by_count": {"0": {"rows": 5, "CIDEr": mean}, "2": {"rows": 15, "CIDEr": 0.25}},
                        "latency": {"p50_ms": 2.0, "batched_ms": 0.5},
                        "latency_ratio_to_teacher_beam5": 0.25,
                    },
                    "teacher_beam5": {
                        "scores": {"CIDEr": 3.0},
                        "sentences": 1.0,
                        "true": 0.75,
                        "by_count": {"0": {"rows": 5, "CIDEr": 3.0}, "2": {"rows": 15, "CIDEr": 2.0}},
                        "latency": None,
                    },
                }
            }
        )
    )
    (out / "student").mkdir(exist_ok=True)
    shares = {"valid_blank_share": 0.5, "valid_repeat_share": 0.1}
    records = [{"valid_num_updates": number, "valid_cider": number / 10, **shares} for number in (2, 4)]
    (out / "student" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (out / "report.html").touch()
