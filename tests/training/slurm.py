"""A stand-in of Slurm with a single job: sbatch, srun, scontrol and sacct, on this machine and in the current folder.

    python slurm.py PROGRAM ARGUMENT...

Its state is in the folder `slurm`: `requeued` asks for another run of the job, `ended` holds the job's exit status.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

STATE = Path("slurm")
JOB = "7"


def sbatch(file: str) -> None:
    """Start a job, and start it again whenever it is put back into the queue."""
    script = Path(file).read_text()
    print(f"Submitted batch job {JOB}", flush=True)
    if os.fork():
        return
    os.setsid()
    STATE.mkdir()
    with open(os.devnull, "rb") as nothing, (STATE / "log").open("wb") as log:
        for number, stream in enumerate((nothing, log, log)):
            os.dup2(stream.fileno(), number)
    (STATE / "script").write_text(script)
    nodes, tasks = (int(re.search(rf"--{name}=(\d+)", script)[1]) for name in ("nodes", "ntasks-per-node"))
    environment = {**os.environ, "SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "localhost"}
    environment |= {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_NTASKS": str(nodes * tasks)}
    restarts = 0
    while True:
        (STATE / "requeued").unlink(missing_ok=True)
        environment["SLURM_RESTART_COUNT"] = str(restarts)
        status = subprocess.run(["bash", STATE / "script"], env=environment).returncode
        if not (STATE / "requeued").exists() or not re.search("^#SBATCH --requeue$", script, re.MULTILINE):
            break
        restarts += 1
    (STATE / "ended").write_text(str(status))


def srun(*words: str) -> None:
    """Run a command in each task of the job. If one fails, the others are ended, if SLURM_KILL_BAD_EXIT says so."""
    start = words.index("-u") - 1  # of python -u -m submitit.core._submit FOLDER
    options = dict(zip(words[:start], words[1:start], strict=False))
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        environment = os.environ | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0"}
        log = Path(options["--output"].replace("%j", JOB).replace("%t", str(rank)))
        log.parent.mkdir(parents=True, exist_ok=True)  # submitit makes it after sbatch has returned
        with log.open("ab") as output:
            tasks.append(subprocess.Popen(words[start:], env=environment, stdout=output, stderr=subprocess.STDOUT))
    failed = 0
    while tasks:
        pid, status = os.wait()
        tasks = [task for task in tasks if task.pid != pid]
        failed = failed or status
        if failed and os.environ.get("SLURM_KILL_BAD_EXIT") == "1":
            for task in tasks:
                os.kill(task.pid, 9)
    sys.exit(1 if failed else 0)


def scontrol(command: str, job: str) -> None:
    """Put the job back into the queue."""
    assert (command, job) == ("requeue", JOB)
    (STATE / "requeued").touch()


def sacct(*_: str) -> None:
    """Say whether the job runs."""
    state = "RUNNING"
    if (STATE / "ended").exists():
        state = "COMPLETED" if (STATE / "ended").read_text() == "0" else "FAILED"
    print(f"JobID|State|NodeList\n{JOB}|{state}|localhost")


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "sacct": sacct}[sys.argv[1]](*sys.argv[2:])
