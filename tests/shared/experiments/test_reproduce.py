"""`make reproduce` from outside: real processes on the toy paper."""

import json
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from shared.experiments import files, reproduce
from shared.experiments.reproduce import main
from shared.experiments.run import EXIT_DISK_FULL


@pytest.fixture(scope="module")
def finished(tmp_path_factory, build_repo):
    """A repository where both arms have run with seed 0, and what was printed."""
    repo = build_repo(tmp_path_factory.mktemp("finished"))
    status, output = repo.reproduce("--paper", "toy", "--seeds", "0")
    assert status == 0, output
    return repo, output


@pytest.fixture
def again(finished, tmp_path, build_repo):
    """A copy of the finished repository, to be changed."""
    shutil.copytree(finished[0].root, tmp_path / "again")
    return type(finished[0])(tmp_path / "again")


PENDING = """
import sys
from pathlib import Path
from shared.experiments import reproduce
root = Path.cwd()
sys.path.insert(0, str(root))
jobs = reproduce.plan(reproduce.read_request(reproduce._parse(None), root))
print(*(f"{job.arm}{job.seed}:{stage.name}" for job in jobs for stage in job.stages if not stage.done()))
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""


def pending(repo, seeds="0", **variables):
    """The stages that `make reproduce` would run."""
    status, output = repo.call("-c", PENDING, PAPER="toy", SEEDS=seeds, **variables)
    assert status == 0, output
    return output.split()


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    time.sleep(0.01)  # the clock of the file system must see it
    path.write_text(text.replace(old, new))


def test_everything_is_made_and_reported(finished):
    repo, output = finished
    directory = repo.run_dir("fast")
    for name in ("config.yaml", "log.jsonl", "checkpoint/w.npy", "train.json", "predictions.jsonl", "eval.json"):
        assert (directory / name).is_file(), name
    assert not (directory / "state.pt").exists()
    results = files.read_json(repo.root / "runs" / "toy" / "tiny" / "results.json")
    assert [claim["verdict"] for claim in results["claims"]] == ["reproduced"]
    info = results["info"]
    assert info["command"] == "make reproduce PAPER=toy SEEDS=0"
    assert (info["stages"], info["stages_reused"], info["failed"]) == (4, 0, {})
    assert info["stage_seconds"] > 0
    assert info["peak_memory_mb"] > 10
    assert "faster: Fast is more accurate than slow" in output
    assert "reproduced" in output
    assert "1 [1, 1]" in output
    assert "report: runs/toy/tiny/report.html" in output
    assert (repo.root / "runs" / "toy" / "tiny" / "figures" / "loss.pdf").is_file()


def test_a_second_call_has_nothing_to_do(again):
    runs = again.root / "runs" / "toy" / "tiny"
    watched = [*runs.glob("*/*/*.json"), runs / "figures" / "loss.png"]
    before = {path: path.stat().st_mtime_ns for path in watched}
    status, output = again.reproduce(PAPER="toy", SEEDS="0")
    assert status == 0
    assert [line for line in output.splitlines() if "already done" in line] == [
        "fast seed 0: already done",
        "slow seed 0: already done",
        "figures: already done",
    ]
    assert {path: path.stat().st_mtime_ns for path in watched} == before
    assert files.read_json(runs / "results.json")["info"]["stages_reused"] == 4


def test_what_changed_is_pending_and_nothing_else(again):
    assert pending(again) == []
    assert pending(again, seeds="0,1", ARMS="slow") == ["slow1:train", "slow1:eval"]
    assert pending(again, ARMS="fast", SET="lr=0.3") == ["fast0:train", "fast0:eval"]
    assert pending(again, SET="run.threads=1") == []
    (again.toy / "README.md").write_text("words")
    edit(again.toy / "plot.py", "print(", "print(1, ")
    assert pending(again) == []
    edit(again.toy / "eval.py", "0.2", "0.3")
    assert pending(again) == ["fast0:eval", "slow0:eval"]
    edit(again.toy / "paper.yaml", "lr: 0.02", "lr: 0.03")
    assert pending(again) == ["fast0:eval", "slow0:train", "slow0:eval"]
    edit(again.toy / "method.py", "0.01", "0.02")
    assert pending(again) == ["fast0:train", "fast0:eval", "slow0:train", "slow0:eval"]


def test_force_runs_again_what_is_done(again):
    directory = again.run_dir("fast")
    before = {name: (directory / name).stat().st_mtime_ns for name in ("train.json", "eval.json")}
    metrics = [files.read_json(directory / name)["metrics"] for name in before]
    status, output = again.reproduce(PAPER="toy", SEEDS="0", ARMS="fast", FORCE="1")
    assert status == 0, output
    assert all((directory / name).stat().st_mtime_ns > time for name, time in before.items())
    assert [files.read_json(directory / name)["metrics"] for name in before] == metrics
    assert "no results for slow" in output  # the claim says what it lacks
    results = files.read_json(again.root / "runs" / "toy" / "tiny" / "results.json")
    assert results["info"]["command"] == "make reproduce PAPER=toy ARMS=fast SEEDS=0 FORCE=1"
    assert list(results["arms"]) == ["fast"]
    assert (again.root / "runs" / "toy" / "tiny" / "figures" / "plot.out").read_text() == "fast 1.0\n"


def test_a_failing_arm_does_not_stop_the_others(again):
    (again.toy / "configs" / "tiny.yaml").write_text("steps: 20\narms: {slow: {fail: true}}\n")
    status, output = again.reproduce(PAPER="toy", SEEDS="0")
    assert status == 1
    assert "error: told to fail" in output
    assert str(again.run_dir("slow") / "train.out") in output
    assert "failed: slow seed 0: train ended with status 2" in output
    assert "Traceback" not in output
    results = files.read_json(again.root / "runs" / "toy" / "tiny" / "results.json")
    assert [(row["arm"], row["seed"]) for row in results["missing"]] == [("slow", 0)]
    assert list(results["arms"]["fast"]["runs"]) == ["0"]


def test_a_killed_training_goes_on_and_ends_with_the_same_numbers(repo, finished):
    killed = ["--paper", "toy", "--seeds", "0", "--arms", "fast", "--set", "kill_at=17"]
    status, output = repo.reproduce(*killed)
    assert status == 1
    assert "train was killed by SIGKILL" in output
    directory = repo.run_dir("fast")
    assert (directory / "state.pt").exists()
    assert not (directory / "train.json").exists()
    status, output = repo.reproduce(*killed)
    assert status == 0, output
    whole = finished[0].run_dir("fast")
    for stage in ("train", "eval"):
        assert (
            files.read_json(directory / f"{stage}.json")["metrics"]
            == (files.read_json(whole / f"{stage}.json")["metrics"])
        )
    losses = [[(row["step"], row.get("loss")) for row in files.read_jsonl(d / "log.jsonl")] for d in (directory, whole)]
    assert losses[0] == losses[1]
    assert (directory / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()


@pytest.mark.parametrize(("scale", "warned"), [("gpu", True), ("tiny", False)])
def test_a_scale_for_gpus_without_one_is_remarked(here, repo, monkeypatch, capsys, scale, warned):
    shutil.copy(repo.toy / "configs" / "tiny.yaml", repo.toy / "configs" / "gpu.yaml")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(reproduce, "plan", lambda request: [])  # another `papers` may have been imported here
    assert here("--paper", "toy", "--scale", scale) == 1  # nothing was done
    assert (f"no NVIDIA GPU here: scale {scale} goes on" in capsys.readouterr().out) == warned


# `python -c LIMITED ...` is `python ...` where no file can grow beyond 1000 bytes.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_without_space_a_run_says_so_and_later_goes_on(repo, finished):
    status, output = repo.call("-c", LIMITED, "scripts/reproduce.py", PAPER="toy", SEEDS="0", ARMS="fast")
    assert status == 1
    assert "train: disk full" in output
    assert "limit on file sizes (ulimit -f) reached while writing" in output
    assert "Traceback" not in output
    assert not list(repo.run_dir("fast").glob("*.json"))
    status, output = repo.reproduce(PAPER="toy", SEEDS="0", ARMS="fast")
    assert status == 0, output
    ours, whole = (files.read_json(r.run_dir("fast") / "eval.json") for r in (repo, finished[0]))
    assert ours["metrics"] == whole["metrics"]


def test_a_stage_that_cannot_even_say_so_tells_by_its_status(repo):
    command = [sys.executable, "-c", LIMITED, "-m", "papers.toy.train", "--arm", "fast"]
    with open("/dev/full", "wb") as full:
        run = subprocess.run(command, cwd=repo.root, env=repo.environment(), stdout=full, stderr=full)
    assert run.returncode == EXIT_DISK_FULL


def test_ctrl_c_stops_everything_and_meanwhile_the_run_is_locked(repo):
    process = repo.start("scripts/reproduce.py", PAPER="toy", SEEDS="0", SET="pause=1000", JOBS="2")
    locks = [repo.run_dir(arm) / ".lock" for arm in ("fast", "slow")]
    stages: list[psutil.Process] = []
    deadline = time.monotonic() + 300
    while len(stages) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
        holders = [lock.read_text().split()[1] for lock in locks if lock.exists() and lock.read_text()]
        stages = [c for c in psutil.Process(process.pid).children(recursive=True) if str(c.pid) in holders]
    status, output = repo.call("-m", "papers.toy.train", "--scale", "tiny", "--arm", "slow")
    assert status == 2
    assert f"{repo.run_dir('slow')} is in use by {locks[1].read_text()}: wait" in output
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "stopped (SIGINT); the same command goes on from here" in output
    assert "Traceback" not in output
    assert not any(stage.is_running() for stage in stages)


def test_one_command_at_a_time_on_a_paper_and_scale(repo):
    """What one of them would write, the other would overwrite: runs.json, figures, results."""
    process = repo.start("scripts/reproduce.py", PAPER="toy", ARMS="fast", SEEDS="0", SET="pause=1000")
    runs = repo.root / "runs" / "toy" / "tiny"
    deadline = time.monotonic() + 300
    while not (repo.run_dir("fast") / ".lock").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    other = {"PAPER": "toy", "ARMS": "slow", "SEEDS": "0"}
    status, output = repo.reproduce(**other)
    assert status == 2
    assert f"{runs} is in use by process {process.pid} on " in output
    assert not repo.run_dir("slow").exists()
    status, output = repo.reproduce(**other, SCALE="smoke")
    assert status == 0, output
    process.kill()  # it cannot tidy up
    process.communicate(timeout=300)
    status, output = repo.reproduce(**other)
    assert status == 0, output
    assert json.loads((runs / "runs.json").read_text()) == [["slow", 0]]


@pytest.mark.slow
def test_training_in_two_processes_under_accelerate(repo, finished):
    (repo.toy / "configs" / "tiny.yaml").write_text("steps: 20\nprocesses: 2\nrun: {processes: 2, threads: 1}\n")
    status, output = repo.reproduce(PAPER="toy", SEEDS="0", ARMS="fast")
    assert status == 0, output
    log = files.read_jsonl(repo.run_dir("fast") / "log.jsonl")
    assert [row["step"] for row in log if row["stage"] == "train"] == list(range(1, 21))
    ours, alone = (files.read_json(r.run_dir("fast") / "train.json") for r in (repo, finished[0]))
    assert ours["metrics"] == alone["metrics"]


def test_smoke_runs_every_paper_with_small_sizes_and_one_seed(repo):
    (repo.root / "papers" / "broken").mkdir()
    (repo.root / "papers" / "broken" / "paper.yaml").write_text("name: broken\n")
    status, output = repo.reproduce("--smoke", ARMS="fast")
    assert status == 1
    rows = {line.split()[1]: line.split()[3] for line in output.splitlines() if line.startswith("│")}
    assert rows == {"broken": "FAIL", "toy": "pass"}
    assert "broken/paper.yaml: title: Field required" in output
    assert files.read_json(repo.run_dir("fast", scale="smoke") / "train.json")["config"]["steps"] == 3
    assert not repo.run_dir("fast", seed=1, scale="smoke").exists()


def test_ctrl_c_stops_smoke_too(repo):
    edit(repo.toy / "configs" / "tiny.yaml", "steps: 20", "steps: 20\npause: 1000")
    process = repo.start("scripts/reproduce.py", "--smoke", ARMS="fast")
    deadline = time.monotonic() + 300
    while not (repo.run_dir("fast", scale="smoke") / "config.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "stopped (SIGINT)" in output
    assert "Traceback" not in output


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(repo, monkeypatch):
    """main() on the toy repository in this process; for requests that get no further than the arguments."""
    for name in ("PAPER", "SCALE", "ARMS", "SEEDS", "JOBS", "FORCE", "LAUNCH", "SET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *argv: main(argv, repo.root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which paper? make reproduce PAPER=NAME with one of: toy"),
        (["--paper", "toi"], "unknown paper 'toi' (did you mean 'toy'?); valid: toy"),
        (["--paper", "toy", "--scale", "tny"], "unknown scale 'tny' (did you mean 'tiny'?); valid: smoke, tiny"),
        (["--paper", "toy", "--scale", "gpu"], "unknown scale 'gpu'; valid: smoke, tiny"),
        (["--paper", "toy", "--arms", "fast,slw"], "unknown arm at scale tiny 'slw' (did you mean 'slow'?)"),
        (["--paper", "toy", "--seeds", "0,x"], "SEEDS=0,x: give different whole numbers"),
        (["--paper", "toy", "--seeds", "-1"], "SEEDS=-1: give different whole numbers"),
        (["--paper", "toy", "--seeds", "1,1"], "SEEDS=1,1: give different whole numbers"),
        (["--paper", "toy", "--seeds", "0,00"], "SEEDS=0,00: give different whole numbers"),
        (["--paper", "toy", "--seeds", ","], "SEEDS=,: give different whole numbers"),
        (["--paper", "toy", "--seeds", "4294967296"], "give different whole numbers"),
        (["--paper", "toy", "--arms", ","], "ARMS=,: give names or shell patterns"),
        (["--paper", "toy", "--force", "no"], "FORCE=no: 1, or leave it out"),
        (["--paper", "toy", "--jobs", "0"], "JOBS=0: give a whole number from 1 on"),
        (["--paper", "toy", "--jobs", "two"], "JOBS=two: give a whole number from 1 on"),
        (
            ["--paper", "toy", "--launch", "slrm"],
            "unknown launcher 'slrm' (did you mean 'slurm'?); valid: local, slurm",
        ),
        (["--paper", "toy", "--set", "run.thread=1"], "unknown config key 'thread' (did you mean 'threads'?)"),
        (["--paper", "toy", "--set", "run.threads=0"], "threads must be at least 1, found 0"),
        (["--paper", "toy", "--set", "a='b"], "SET=a='b: No closing quotation"),
    ],
)
def test_a_wrong_request_is_explained(here, capsys, arguments, message):
    assert here(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("{colour: 1}", "configs/tiny.yaml: run: unknown config key 'colour'"),
        ("{slurm: {gpu: 1}}", "unknown config key 'slurm.gpu' (did you mean 'slurm.gpus'?)"),
        ("{accelerate: dpp}", "unknown accelerate config 'dpp' (did you mean 'ddp'?); valid: ddp, fsdp2, zero3"),
        ("{processes: two}", "configs/tiny.yaml: run: processes:"),
    ],
)
def test_a_wrong_run_section_is_explained(here, repo, capsys, run, message):
    (repo.toy / "configs" / "tiny.yaml").write_text(f"run: {run}\n")
    assert here("--paper", "toy") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SET": "stps=1"}, "error: command line: unknown config key 'stps' (did you mean 'steps'?); valid: lr, steps"),
        ({"SET": "steps=many"}, "error: command line: steps:"),
    ],
)
def test_a_wrong_override_is_explained(repo, variables, message):
    status, output = repo.reproduce(PAPER="toy", **variables)
    assert status == 2
    assert output.startswith(message)
    assert "Traceback" not in output


def test_a_paper_without_a_config_class_is_explained(repo):
    (repo.toy / "config.py").write_text("x = 1\n")
    status, output = repo.reproduce(PAPER="toy")
    assert status == 2
    assert "config.py: has to define a dataclass `Config`" in output


def test_a_stage_by_hand_explains_mistakes(repo):
    status, output = repo.call("-m", "papers.toy.eval", "--arm", "fast")
    assert status == 2
    assert output.startswith(f"error: {repo.run_dir('fast')}: nothing trained here yet; run papers.toy.train")
    status, output = repo.call("-m", "papers.toy.train", "--arm", "fst")
    assert status == 2
    assert "invalid choice: 'fst'" in output
    assert "Traceback" not in output


# ---- list ---------------------------------------------------------------------------------------------------------


def test_list_shows_the_committed_verdicts(repo, here, capsys):
    verdicts = ["reproduced", "weak", "reproduced", "not testable here"]
    path = repo.toy / "results" / "tiny" / "results.json"
    path.parent.mkdir(parents=True)
    (repo.toy / "configs" / "gpu.yaml").touch()
    path.write_text(json.dumps({"schema_version": 1, "claims": [{"verdict": v} for v in verdicts]}))
    assert here("--list") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "toy" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["toy", "Toy", "0000.00000", "2 reproduced, 1 weak, 1 not testable here", "-", "no config"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("title: Toy", "titel: Toy", "broken/paper.yaml: titel: unknown key"),
        ("arms:", "arms: [", "broken/paper.yaml: not valid YAML"),
        ("name: broken", "name: other", "broken/paper.yaml: name: 'other' must be the directory's name"),
    ],
)
def test_a_broken_paper_is_named_and_the_others_are_there(repo, here, capsys, old, new, reason):
    shutil.copytree(repo.toy, repo.root / "papers" / "broken")
    path = repo.root / "papers" / "broken" / "paper.yaml"
    path.write_text(path.read_text().replace("name: toy", "name: broken").replace(old, new))
    assert here("--list") == 2
    printed = capsys.readouterr()
    assert [line.split()[1] for line in printed.out.splitlines() if "0000.00000" in line] == ["toy"]
    assert reason in printed.err
    assert here("--paper", "toy", "--arms", "none") == 2  # another paper's own mistakes are still what is reported
    assert "unknown arm" in capsys.readouterr().err


def test_nothing_heavy_is_imported_before_a_stage_runs(repo):
    code = "import sys, shared.experiments.reproduce as r; r.main(['--list']); "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
