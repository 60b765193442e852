"""LAUNCH=slurm: with submitit's local executor, and with stand-ins for SLURM's commands."""

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from shared.experiments.progress import Display
from shared.experiments.resources import Resources, Slurm
from shared.experiments.scheduler import DONE, FAILED, Job, Stage
from shared.experiments.slurm import run_on_slurm


@pytest.fixture
def run(tmp_path):
    """run(train="...", eval="..."): one job of shell commands through submitit's local executor; $DONE as it says."""

    def run_job(**commands):
        directory = tmp_path / "a" / "0"
        stages = []
        for name, command in commands.items():
            record = directory / f"{name}.json"
            script = f"cd {directory}\n{command}".replace("$DONE", f'echo \'{{"key": "{name}-1"}}\' > {record}')
            stages.append(Stage(name, ("bash", "-c", script), f"{name}-1", record, directory / f"{name}.out"))
        job, text = Job("a", 0, directory, stages), io.StringIO()
        resources = Resources(threads=3, slurm=Slurm(minutes=30, gpus=0))
        with Display("test", [job], Console(file=text, width=300)) as display:
            run_on_slurm([job], "test", resources, display, tmp_path, cluster="local")
        return job, text.getvalue()

    return run_job


def test_stages_run_in_one_job_and_done_ones_are_skipped(run, tmp_path):
    job, _ = run(train="echo t $OMP_NUM_THREADS >> order; $DONE", eval="echo e >> order; $DONE")
    assert job.state == DONE
    assert (tmp_path / "a" / "0" / "order").read_text() == "t 3\ne\n"
    job, text = run(train="echo t >> order; $DONE", eval="echo e >> order; $DONE")
    assert (job.state, text) == (DONE, "a seed 0: already done\n")
    assert (tmp_path / "a" / "0" / "order").read_text() == "t 3\ne\n"


def test_a_failure_shows_the_stages_last_lines(run):
    job, text = run(train="echo what went wrong; exit 3", eval="touch never")
    assert job.state == FAILED
    assert "train failed in SLURM job" in job.error
    assert "    what went wrong\n" in text
    assert not (job.directory / "never").exists()


def test_a_preempted_job_is_queued_again_and_goes_on(run, tmp_path):
    """The first time, the stage tells its job what SLURM would: that it must go."""
    preempted = "echo $$ >> started; if [ $(wc -l < started) = 1 ]; then kill -USR2 $PPID; sleep 1000; fi; $DONE"
    job, _ = run(train=preempted, eval="$DONE")
    assert job.state == DONE
    first, second = (int(pid) for pid in (tmp_path / "a" / "0" / "started").read_text().split())
    assert first != second
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


@pytest.fixture
def cluster(repo, tmp_path):
    """Environment variables that put the stand-ins on the PATH; FAKE_SLURM is their directory."""
    commands, home = tmp_path / "bin", tmp_path / "slurm"
    commands.mkdir()
    home.mkdir()
    script = Path(__file__).with_name("fake_slurm.py")
    for name in ("sbatch", "srun", "sacct", "scontrol", "scancel"):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {script} {name} "$@"\n')
        (commands / name).chmod(0o755)
    path = f"{commands}:{os.environ['PATH']}"
    yield {"PATH": path, "FAKE_SLURM": str(home), "PAPER": "toy", "ARMS": "fast", "SEEDS": "0", "LAUNCH": "slurm"}
    for pid in home.glob("*.pid"):
        if (home / f"{pid.stem}.state").read_text() in ("PENDING", "RUNNING", "REQUEUED"):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def test_a_restarted_command_finds_its_jobs_in_the_queue(repo, cluster):
    home = Path(cluster["FAKE_SLURM"])
    (home / "hold").touch()
    (repo.toy / "configs" / "tiny.yaml").write_text("run: {slurm: {gpus: 0, cpus: 3, partition: long, minutes: 90}}\n")
    process = repo.start("scripts/reproduce.py", **cluster)
    record = repo.run_dir("fast") / "slurm" / "job.json"
    deadline = time.monotonic() + 300
    while not record.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "the SLURM jobs go on; `scancel 1` ends them" in output
    assert "Traceback" not in output
    batch = (repo.run_dir("fast") / "slurm" / "1_submission.sh").read_text()
    for option in ("--partition=long", "--time=90", "--cpus-per-task=3", "--job-name=toy-tiny-fast-seed-0"):
        assert f"#SBATCH {option}\n" in batch

    status, output = repo.reproduce(**cluster, SET="lr=0.3")
    assert status == 2
    assert "fast seed 0: SLURM job 1 is still working with other code or config" in output
    status, output = repo.reproduce(**cluster, FORCE="1")
    assert status == 2
    assert "FORCE=1: SLURM jobs from before are still working on these runs: `scancel 1` first" in output

    process = repo.start("scripts/reproduce.py", **cluster)
    (home / "hold").unlink()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert [path.name for path in home.glob("*.state")] == ["1.state"]  # nothing was submitted again
    assert json.loads((repo.run_dir("fast") / "eval.json").read_text())["metrics"] == {"accuracy": 1.0}
    assert "report: runs/toy/tiny/report.html" in output


def test_without_slurm_the_error_says_so(repo):
    status, output = repo.reproduce(PAPER="toy", ARMS="fast", LAUNCH="slurm", PATH="/usr/bin:/bin")
    assert status == 2
    assert output.startswith("error: LAUNCH=slurm: Could not detect")
