"""Stages that fork from a process with warm imports behave as those that start cold."""

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
from shared.experiments.keys import imported_modules
from shared.experiments.paper import ROOT
from shared.experiments.progress import Display
from shared.experiments.scheduler import DONE, FAILED, Job, Stage, run_jobs
from shared.experiments.warm import heavy_modules

# What a stage sees at its start, before it imports anything of its own.
STAGE = """
import sys
warm = "this_module_is_heavy" in sys.modules
import json, os
seen = {"warm": warm, "argv": sys.argv[1:], "name": __name__, "slot": os.environ["SLOT"], "file": __file__}
seen |= {"pid": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0), "stdin": sys.stdin.read()}
json.dump(seen, open(sys.argv[1] + ".seen", "w"))
print("to the log")
print("errors too", file=sys.stderr)
exec(sys.argv[2])
json.dump({"key": "k"}, open(sys.argv[1], "w"))
"""


@pytest.fixture
def job(tmp_path):
    """job("a", "python code", ...): one stage per code, in the repository tmp_path."""
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "this_module_is_heavy.py").write_text("")

    def make(arm: str, *codes: str, warm: tuple[str, ...] = ("this_module_is_heavy",)) -> Job:
        stages = []
        for i, code in enumerate(codes):
            record = tmp_path / arm / f"{i}.json"
            command = (sys.executable, "-m", "stage", str(record), code)
            stages.append(Stage(f"stage{i}", command, "k", record, record.with_suffix(".out"), warm=warm))
        return Job(arm, 0, tmp_path / arm, stages)

    return make


def run(root: Path, *jobs: Job, slots: int = 1) -> str:
    text = io.StringIO()
    environments = [{"SLOT": str(i), "PYTHONPATH": str(ROOT)} for i in range(slots)]
    with Display("test", jobs, Console(file=text, width=200)) as display:
        run_jobs(jobs, environments, display, root)
    return text.getvalue()


def seen(job: Job, stage: int) -> dict:
    return files.read_json(job.directory / f"{stage}.json.seen")


def test_a_stage_is_what_a_cold_one_is_but_for_its_imports(job, tmp_path):
    warm, cold = job("warm", "", ""), job("cold", "", warm=())
    run(tmp_path, warm, cold)
    assert [j.state for j in (warm, cold)] == [DONE, DONE]
    first, second, third = seen(warm, 0), seen(warm, 1), seen(cold, 0)
    assert first["warm"]
    assert not third["warm"]
    assert first["argv"] == [str(warm.stages[0].record), ""]
    for key in ("name", "slot", "file", "stdin"):
        assert first[key] == second[key] == third[key]
    assert (first["name"], first["stdin"]) == ("__main__", "")
    for one in (first, second, third):
        assert one["pid"] == one["group"]
    assert first["parent"] == second["parent"] != os.getpid()  # one server for both
    assert first["pid"] != second["pid"]
    for one in (warm, cold):
        assert one.stages[0].out.read_text() in ("to the log\nerrors too\n", "errors too\nto the log\n")
    assert not psutil.pid_exists(first["parent"])


def test_each_slot_has_its_own_process(job, tmp_path):
    """Each of two jobs waits until the other runs too."""
    meet = "import time\nwhile not os.path.exists({!r}): time.sleep(0.01)"
    jobs = [
        job("a", meet.format(str(tmp_path / "b/0.json.seen"))),
        job("b", meet.format(str(tmp_path / "a/0.json.seen"))),
    ]
    run(tmp_path, *jobs, slots=2)
    assert {seen(j, 0)["slot"] for j in jobs} == {"0", "1"}
    assert seen(jobs[0], 0)["parent"] != seen(jobs[1], 0)["parent"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit(3)", "stage0 ended with status 3"),
        ("sys.exit('what went wrong')", "stage0 ended with status 1"),
        ("raise RuntimeError('what went wrong')", "stage0 ended with status 1"),
        ("os.kill(os.getpid(), 9)", "stage0 was killed by SIGKILL: out of memory?"),
        ("os.kill(os.getpid(), 15)", "stage0 was killed by SIGTERM"),
        ("os.kill(os.getppid(), 9); import time; time.sleep(1000)", "stage0 was killed by SIGKILL"),
        ("sys.argv[1] = os.devnull", "stage0 ended without writing 0.json"),
    ],
)
def test_reasons_of_failure(job, tmp_path, code, reason):
    failing, other = job("a", code), job("b", "")
    run(tmp_path, failing, other)
    assert failing.state == FAILED
    assert reason in failing.error
    if "what went wrong" in code:
        said = failing.stages[0].out.read_text()
        assert "what went wrong" in said
        assert ("RuntimeError" in said) == ("RuntimeError" in code)
    assert other.state == DONE  # whatever happened to the process it would have been forked from


def test_the_end_of_a_stage_is_that_of_an_interpreter(job, tmp_path):
    """Threads have finished, what is registered to be done at the end is done, and what was printed is there."""
    code = """
import atexit, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
directory = tempfile.TemporaryDirectory(dir=os.path.dirname(sys.argv[1]))
atexit.register(lambda: print("at the end"))
threading.Thread(target=lambda: (time.sleep(0.2), print("the thread"))).start()
ThreadPoolExecutor().submit(lambda: (time.sleep(0.2), print("the pool")))
"""
    warm, cold = job("warm", code), job("cold", code, warm=())
    run(tmp_path, warm, cold)
    for one in (warm, cold):
        assert one.state == DONE
        lines = one.stages[0].out.read_text().splitlines()
        assert sorted(lines) == ["at the end", "errors too", "the pool", "the thread", "to the log"]
        assert lines[-1] == "at the end"
        assert not [path for path in one.directory.iterdir() if path.is_dir()]
    assert seen(warm, 0)["warm"]


def test_without_the_warm_process_stages_start_cold(job, tmp_path):
    (tmp_path / "broken.py").write_text("import os\nos._exit(1)\n")
    one = job("a", "", "", warm=("broken",))
    run(tmp_path, one)
    assert one.state == DONE
    assert not seen(one, 0)["warm"]


def test_what_a_stage_leaves_running_is_ended(job, tmp_path):
    code = "import subprocess; open('left', 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))"
    run(tmp_path, job("a", code))
    wait_for(lambda: not alive(int((tmp_path / "left").read_text())))


RUNNER = """
import sys
from pathlib import Path
from rich.console import Console
from shared.experiments.progress import Display
from shared.experiments.scheduler import Interrupted, Job, Stage, run_jobs

root = Path(sys.argv[1])
command = (sys.executable, "-m", "stage", str(root / "a.json"), "import time; time.sleep(1000)")
jobs = [Job("a", 0, root, [Stage("train", command, "k", root / "a.json", root / "a.out", warm=("json",))])]
try:
    with Display("test", jobs, Console()) as display:
        run_jobs(jobs, [{"SLOT": "0"}], display, root)
except Interrupted as stop:
    sys.exit(128 + stop.signum)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_runner_leaves_no_process(job, tmp_path, signum):
    command = [sys.executable, "-c", textwrap.dedent(RUNNER), str(tmp_path)]
    runner = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    path = tmp_path / "a.json.seen"
    wait_for(lambda: path.is_file() and path.read_text().endswith("}"))
    stage = files.read_json(path)
    assert alive(stage["pid"])
    assert alive(stage["parent"])
    runner.send_signal(signum)
    assert runner.wait(timeout=300) == (130 if signum == signal.SIGINT else -signal.SIGKILL)
    wait_for(lambda: not alive(stage["pid"]) and not alive(stage["parent"]))


def test_numbers_are_those_of_a_cold_start(job, tmp_path):
    code = """
import random, numpy, torch
torch.manual_seed(5)
layer = torch.nn.Linear(300, 300)
loss = layer(torch.randn(500, 300)).square().mean()
loss.backward()
open(sys.argv[1] + ".number", "w").write(repr((loss.item(), layer.weight.grad.sum().item(), torch.get_num_threads())))
"""
    warm, cold = job("warm", code, warm=("torch",)), job("cold", code, warm=())
    run(tmp_path, warm, cold)
    assert (tmp_path / "warm/0.json.number").read_text() == (tmp_path / "cold/0.json.number").read_text()


def test_what_is_heavy():
    names = ["json", "torch", "torch.nn", "torchvision", "transformers.GPT2Config", "papers.torch", "numpy"]
    assert heavy_modules(names) == ["torch", "torch.nn", "transformers.GPT2Config"]
    found = imported_modules(ROOT / "papers" / "coconut" / "train.py")
    assert {
        "torch",
        "transformers.GPT2LMHeadModel",
        "accelerate.Accelerator",
        "json",
    } <= found  # also in what it imports


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
