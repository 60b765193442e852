"""A cluster of one node: sbatch, srun, sacct, scontrol and scancel as far as submitit uses them.

Called under each of these names. State is in the directory FAKE_SLURM: N.state for job N; nothing starts while `hold`
is there.
"""

import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])


def sbatch(script):
    job = str(len(list(HOME.glob("*.state"))) + 1)
    (HOME / f"{job}.state").write_text("PENDING")
    subprocess.Popen([sys.executable, __file__, "job", job, script], start_new_session=True, **QUIET)
    print(f"Submitted batch job {job}")


def job(job, script):
    """What slurmctld does with one job, requeues included."""
    state = HOME / f"{job}.state"
    (HOME / f"{job}.pid").write_text(str(os.getpid()))
    while state.read_text() in ("PENDING", "REQUEUED"):
        if (HOME / "hold").exists():
            time.sleep(0.05)
            continue
        state.write_text("RUNNING")
        environment = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        status = subprocess.call(["bash", script], env={**os.environ, **environment}, **QUIET)
        if state.read_text() != "REQUEUED":
            state.write_text("FAILED" if status else "COMPLETED")


def srun(*arguments):
    command = list(arguments)
    while command[0].startswith("-"):
        option = command.pop(0)
        if option in ("--output", "--error"):
            target = os.open(re.sub("%[jAt0-9]+", "x", command.pop(0)), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1 if option == "--output" else 2)
    os.execvp(command[0], command)


def sacct(*arguments):
    jobs = [after for before, after in pairwise(arguments) if before == "-j"]
    print("JobID|State|NodeList")
    for job in jobs:
        print(f"{job}|{(HOME / f'{job}.state').read_text()}|node1")


def scontrol(verb, job):
    assert verb == "requeue"
    (HOME / f"{job}.state").write_text("REQUEUED")


def scancel(*jobs):
    for job in jobs:
        os.killpg(int((HOME / f"{job}.pid").read_text()), signal.SIGKILL)
        (HOME / f"{job}.state").write_text("CANCELLED by 0")


QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    globals()[name](*arguments)
