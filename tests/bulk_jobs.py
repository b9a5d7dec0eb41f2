"""Jobs of bulk inference that tests share, and a way to kill them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from narvl_plugin.bulk.answers import Predicting
from narvl_plugin.bulk.folder import SUCCESS


def job(**options: Any) -> Predicting:
    """Captions by the model in the box."""
    return Predicting(**{"verb": "caption", "suffix": ".tsv", "device": "cpu", "batch_size": 4} | options)


def joined(out: Path, suffix: str = ".tsv") -> str:
    """Return the shards one after the other."""
    return "".join(file.read_text(encoding="utf-8") for file in sorted(out.glob(f"*{suffix}")))


KILLED = """
import sys
from pathlib import Path
from narvl_plugin.bulk.answers import Predicting
from narvl_plugin.bulk.commands import predict_shards
from narvl_plugin.bulk.engines import Runner

if __name__ == "__main__":
    given, out, engine = sys.argv[1:]
    job = Predicting(verb="caption", suffix=".tsv", device="cpu", batch_size=4)
    predict_shards([given], Path(out), job, Runner(engine), rows_of_shard=1)
"""


def kill_half_way(given: Path, out: Path, engine: str, shards: int) -> None:
    """Kill a job when some of its shards, but not all, are written."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", KILLED, given, out, engine], env=environment) as process:
        while len(list(out.glob("*.tsv"))) < shards:
            assert process.poll() is None, "it should be killed before its end"
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert not (out / SUCCESS).exists()
