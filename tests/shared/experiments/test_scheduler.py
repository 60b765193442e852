"""The scheduler with shell commands as stages: nothing here depends on how long something takes."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from shared.experiments import files
from shared.experiments.progress import Display
from shared.experiments.scheduler import DONE, FAILED, Job, Stage, run_jobs


@pytest.fixture
def job(tmp_path):
    """job("a", train="...", eval="..."): shell commands, run in tmp_path/a; $DONE there writes a stage's record."""

    def make(arm: str, seed: int = 0, **commands: str) -> Job:
        directory = tmp_path / arm / str(seed)
        stages = []
        for name, command in commands.items():
            record = directory / f"{name}.json"
            script = f"cd {directory}\n{command}".replace("$DONE", f'echo \'{{"key": "{name}-1"}}\' > {record}')
            stages.append(Stage(name, ("bash", "-c", script), f"{name}-1", record, directory / f"{name}.out"))
        return Job(arm, seed, directory, stages)

    return make


def run(jobs, slots=1):
    """What was printed."""
    text = io.StringIO()
    slots = [{"SLOT": str(slot)} for slot in range(slots)]
    with Display("test", jobs, Console(file=text, width=200)) as display:
        run_jobs(jobs, slots, display, Path.cwd())
    return text.getvalue()


def test_stages_go_in_order_and_done_ones_are_skipped(job, tmp_path):
    first = job("a", train="echo t >> order; $DONE", eval="echo e >> order; $DONE")
    assert "already done" not in run([first])
    assert first.state == DONE
    again = job("a", train="echo t >> order; $DONE", eval="echo e >> order; $DONE")
    assert run([again]) == "a seed 0: already done\n"
    assert again.state == DONE
    (tmp_path / "a" / "0" / "eval.json").write_text('{"key": "old"}')
    run([job("a", train="echo t >> order; $DONE", eval="echo e2 >> order; $DONE")])
    assert (tmp_path / "a" / "0" / "order").read_text().split() == ["t", "e", "e2"]


def test_a_damaged_record_does_not_count(job, tmp_path):
    first = job("a", train="$DONE")
    first.directory.mkdir(parents=True)
    (first.directory / "train.json").write_text('{"key": "tra')
    assert "train done" in run([first])
    assert files.read_json(first.directory / "train.json") == {"key": "train-1"}


def test_jobs_share_the_slots_and_each_runs_in_one(job, tmp_path):
    """Each of two jobs waits until the other runs too: only at the same time can they finish."""
    meet = "touch here; until [ -e ../../{}/0/here ]; do sleep 0.01; done; echo $SLOT > slot; $DONE"
    jobs = [job("a", train=meet.format("b")), job("b", train=meet.format("a"))]
    run(jobs, slots=2)
    assert [j.state for j in jobs] == [DONE, DONE]
    assert {(tmp_path / name / "0" / "slot").read_text().strip() for name in "ab"} == {"0", "1"}


def test_one_slot_runs_one_job_at_a_time(job, tmp_path):
    alone = "mkdir ../../busy && echo alone; sleep 0.05; rmdir ../../busy; $DONE"
    jobs = [job(name, train=alone, eval=alone) for name in "abc"]
    run(jobs)
    assert [j.state for j in jobs] == [DONE] * 3
    assert all((j.directory / f"{s}.out").read_text() == "alone\n" for j in jobs for s in ("train", "eval"))


def test_a_failure_is_shown_with_its_last_lines_and_the_others_go_on(job):
    noisy = "for i in $(seq 100); do echo line $i; done; echo '[no] markup' >&2; exit 3"
    jobs = [job("bad", train=noisy, eval="touch never"), job("good", train="$DONE")]
    text = run(jobs)
    assert [j.state for j in jobs] == [FAILED, DONE]
    assert "bad seed 0: FAILED: train ended with status 3" in text
    assert "line 100\n    [no] markup\n" in text
    assert "line 80\n" not in text
    assert str(jobs[0].directory / "train.out") in text
    assert not (jobs[0].directory / "never").exists()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("true", "train ended without writing train.json"),
        ('echo \'{"key": "other"}\' > train.json', "code, config or inputs of train changed while it ran"),
        ("kill -KILL $$", "train was killed by SIGKILL: out of memory?"),
        ("kill -TERM $$", "train was killed by SIGTERM"),
    ],
)
def test_reasons_of_failure(job, command, reason):
    failing = job("a", train=command)
    run([failing])
    assert failing.state == FAILED
    assert reason in failing.error


def test_what_a_stage_leaves_running_is_ended(job, tmp_path):
    run([job("a", train="sleep 1000 & echo $! > pid; $DONE")])
    assert_gone(int((tmp_path / "a" / "0" / "pid").read_text()))


def test_a_record_can_be_the_schedulers_to_write(tmp_path):
    record, out = tmp_path / "plot.json", tmp_path / "plot.out"
    stage = Stage("plot", ("true",), "k", record, out, writes_record=False)
    assert "plot done" in run([Job("figures", None, tmp_path, [stage])])
    assert files.read_json(record) == {"key": "k"}
    assert run([Job("figures", None, tmp_path, [stage])]) == "figures: already done\n"


RUNNER = """
import sys
from pathlib import Path
from rich.console import Console
from shared.experiments import scheduler
from shared.experiments.progress import Display
from shared.experiments.scheduler import Interrupted, Job, Stage, run_jobs

scheduler.GRACE_SECONDS = 600
directory = Path(sys.argv[1])
jobs = []
for name, command in zip("ab", sys.argv[2:]):
    stage = Stage("train", ("bash", "-c", command), "k", directory / f"{name}.json", directory / name)
    jobs.append(Job(name, 0, directory, [stage]))
try:
    with Display("test", jobs, Console()) as display:
        run_jobs(jobs, [{}, {}], display, directory)
except Interrupted as stop:
    sys.exit(128 + stop.signum)
"""

# Starts two more processes, one in a session of its own as torchrun's workers are, and says all three ids.
TREE = "sleep 1000 & one=$!; setsid sleep 1000 & two=$!; echo $$ $one $two; wait"
STUBBORN = "trap 'echo no > refused' TERM; echo $$; while true; do sleep 0.1; done"


def start_runner(directory, *commands):
    """The runner process and, once all its stages have started, the ids of all processes below it."""
    arguments = [sys.executable, "-c", textwrap.dedent(RUNNER), str(directory), *commands]
    runner = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    outputs = [directory / name for name, _ in zip("ab", commands, strict=False)]
    wait_for(lambda: all(path.is_file() and path.read_text().endswith("\n") for path in outputs))
    return runner, [int(pid) for path in outputs for pid in path.read_text().split()]


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(*pids):
    wait_for(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_runner_leaves_no_process(tmp_path, signum):
    runner, pids = start_runner(tmp_path, TREE, TREE)
    assert len(pids) == 6
    assert all(alive(pid) for pid in pids)
    runner.send_signal(signum)
    assert runner.wait(timeout=300) == 128 + signum
    assert not any(alive(pid) for pid in pids)  # at once: the runner has waited


def test_a_second_signal_does_not_wait_for_a_stubborn_stage(tmp_path):
    runner, pids = start_runner(tmp_path, STUBBORN)
    runner.send_signal(signal.SIGINT)
    wait_for((tmp_path / "refused").exists)
    assert alive(pids[0])
    runner.send_signal(signal.SIGINT)
    assert runner.wait(timeout=300) == 130  # much less than the grace period
    assert not alive(pids[0])


def test_a_killed_runner_takes_its_stages_along(tmp_path):
    runner, pids = start_runner(tmp_path, "echo $$; exec sleep 1000", "echo $$; exec sleep 1000")
    runner.kill()
    runner.wait()
    assert_gone(*pids)
    assert os.getpid() not in pids
