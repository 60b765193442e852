"""`small_paper` and `small_runs`: finished runs, for verdicts and reports. `repo`: a repository to run stages in."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.experiments.paper import validate

ACCURACY = {"ours": {0: 9, 1: 8, 2: 9}, "base": {0: 2, 1: 3, 2: 1}}  # right answers out of ten, by arm and seed


@pytest.fixture
def small_paper(tmp_path):
    """A paper of two arms and three claims: one true in `small_runs`, one false, one not testable."""
    ours, base = ({"arm": arm, "metric": "accuracy"} for arm in ACCURACY)
    claims = [
        {
            "tests": [{"a": ours, "b": base, "direction": "greater", "margin": 0.1}],
            "paper": {"ours": 97.0, "base": 77.5},
        },
        {"tests": [{"a": {"arm": "ours", "metric": "seconds"}, "constant": 1.0, "direction": "less"}]},
        {
            "scales": ["gpu", "paper"],
            "not_testable": {"tiny": "needs <the> GPU"},
            "tests": [{"a": ours, "b": base, "direction": "less"}],
        },
    ]
    common = {"where": "Table 1", "scales": ["tiny", "gpu", "paper"]}
    values = {
        "name": "small",
        "title": "A Small & Simple Paper",
        "arxiv": "2412.00001",
        "summary": "Ours is better than the base.",
        "seeds": {"tiny": [0, 1, 2], "gpu": [0], "paper": [0]},
        "arms": {"ours": {"title": "Ours"}, "base": {"title": "Baseline"}},
        "figures": [
            {"file": "accuracy", "shows": "Accuracy by arm", "paper": "Figure 3"},
            {"file": "curves", "shows": "Loss", "scales": ["tiny"]},
        ],
        "claims": [
            {**common, "id": f"C{n}", "text": f"Claim number {n}.", **claim} for n, claim in enumerate(claims, start=1)
        ],
    }
    directory = tmp_path / "papers" / "small"
    directory.mkdir(parents=True)
    return validate(values, directory / "paper.yaml")


@pytest.fixture
def small_runs(tmp_path):
    """runs/small/tiny as three seeds of two arms leave it."""
    directory = tmp_path / "runs" / "small" / "tiny"
    for arm, right in ACCURACY.items():
        for seed, count in right.items():
            write_run(directory / arm / str(seed), arm, seed, count)
    (directory / "figures").mkdir()
    (directory / "figures" / "accuracy.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    return directory


def write_run(directory: Path, arm: str, seed: int, right: int) -> None:
    directory.mkdir(parents=True)
    metrics = {"train": {"loss": 0.5}, "eval": {"accuracy": right / 10, "seconds": 2.0 + 0.1 * seed}}
    for stage in ("train", "eval"):
        record = {
            "key": f"{stage}-{arm}-{seed}",
            "metrics": metrics[stage],
            "config": {"lr": 0.1},
            "seconds": 12.5,
            "cpu_seconds": 12.0,
            "peak_memory_mb": 300.0,
            "peak_gpu_memory_mb": None,
            "device": "CPU (x86_64)",
            "finished": f"2026-01-02T03:04:0{seed}Z",
        }
        (directory / f"{stage}.json").write_text(json.dumps(record))
    rows = [{"item": i, "scores": {"accuracy": int(i < right)}, "output": "..."} for i in range(10)]
    (directory / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = [{"stage": "train", "step": s, "total": 30, "time": 0.0, "loss": 1 / (s + 1 + seed)} for s in range(30)]
    (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


@pytest.fixture
def run_info():
    return {
        "command": "make reproduce PAPER=small",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "hardware": {"cpu": "Some CPU", "cores": 2, "memory_gb": 7.6, "gpus": []},
        "wall_seconds": 192.4,
        "failed": {},
    }


# ---- a repository with one paper, `toy`, whose training is a deterministic loop of a few milliseconds ---------------

SOURCE = Path(__file__).parents[3]

PAPER = """\
name: toy
title: Toy
arxiv: "0000.00000"
summary: A quadratic.
seeds: {tiny: [0, 1, 2], gpu: [0], paper: [0]}
arms:
  fast: {title: Fast, config: {lr: 0.4}}
  slow: {title: Slow, config: {lr: 0.02}}
figures:
  - {file: loss, shows: The loss.}
claims:
  - id: faster
    text: Fast is more accurate than slow.
    where: Table 1
    tests: [{a: {arm: fast, metric: accuracy}, b: {arm: slow, metric: accuracy}, direction: greater, margin: 0.1}]
    scales: [tiny]
    not_testable: {gpu: toy, paper: toy}
"""

CONFIG = """\
from dataclasses import dataclass

from shared.experiments import capped


@dataclass
class Config:
    lr: float = 0.1
    steps: int = capped(20, 3)
    kill_at: int = -1  # a fresh training kills itself here
    pause: float = 0.0  # seconds per step
    fail: bool = False
    processes: int = 1  # that training expects
"""

METHOD = """\
def gradient(w, noise):
    return w - 1.0 + 0.01 * noise
"""

TRAIN = """\
import os
import random
import signal
import time

import numpy as np

from papers.toy.config import Config
from papers.toy.method import gradient
from shared.experiments import Run, UserError, stage_main


def train(config: Config, run: Run) -> dict:
    if config.fail:
        raise UserError("told to fail")
    if config.processes > 1:
        from accelerate import PartialState

        assert PartialState(cpu=True).num_processes == config.processes
    state = run.load_state()
    step, w = (state["step"], state["w"]) if state else (0, np.zeros(8))
    while step < config.steps:
        if step == config.kill_at and state is None:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = np.random.randn(8) + random.random()
        w = w - config.lr * gradient(w, noise)
        step += 1
        time.sleep(config.pause)
        run.log(step, config.steps, loss=float(((w - 1) ** 2).mean()))
        if step % 7 == 0:
            run.save_state({"step": step, "w": w})
    if run.is_main_process:
        run.checkpoint.mkdir(exist_ok=True)
        np.save(run.checkpoint / "w.npy", w)
    return {"w": float(w.sum())}


if __name__ == "__main__":
    stage_main("train", Config, train)
"""

EVAL = """\
import numpy as np

from papers.toy.config import Config
from shared.experiments import Run, stage_main


def evaluate(config: Config, run: Run) -> dict:
    w = np.load(run.checkpoint / "w.npy")
    right = (np.abs(w - 1) < 0.2).astype(float)
    run.write_predictions({"item": str(i), "scores": {"accuracy": x}} for i, x in enumerate(right))
    run.log(8, 8)
    return {"accuracy": right.mean()}


if __name__ == "__main__":
    stage_main("eval", Config, evaluate)
"""

PLOT = """\
from pathlib import Path

from shared.experiments import files, finished_runs, plot_main


def draw(runs: Path, out: Path) -> None:
    for arm, seeds in finished_runs(runs).items():
        print(arm, *(files.read_json(directory / "eval.json")["metrics"]["accuracy"] for directory in seeds.values()))
    for suffix in ("png", "pdf"):
        (out / f"loss.{suffix}").write_bytes(b"")


if __name__ == "__main__":
    plot_main(draw)
"""


@dataclass
class Repo:
    """A repository root, and how to call it the way a person does."""

    root: Path

    @property
    def toy(self) -> Path:
        return self.root / "papers" / "toy"

    def run_dir(self, arm: str, seed: int = 0, scale: str = "tiny") -> Path:
        return self.root / "runs" / "toy" / scale / arm / str(seed)

    def environment(self, **variables: str) -> dict[str, str]:
        path = f"{self.root}:{SOURCE}"
        return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": "", **variables}

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen:
        """`python ARGUMENTS` from the root, with these environment variables beside the usual ones."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """Exit status and output of `start`."""
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def reproduce(self, *arguments: str, **variables: str) -> tuple[int, str]:
        return self.call("scripts/reproduce.py", *arguments, **variables)


def build(root: Path) -> Repo:
    toy = root / "papers" / "toy"
    (toy / "configs").mkdir(parents=True)
    (root / "papers" / "__init__.py").touch()
    texts = {"config.py": CONFIG, "method.py": METHOD, "train.py": TRAIN, "eval.py": EVAL, "plot.py": PLOT}
    texts |= {"paper.yaml": PAPER, "__init__.py": "", "configs/tiny.yaml": "steps: 20\n"}
    for name, text in texts.items():
        (toy / name).write_text(text)
    shutil.copytree(SOURCE / "scripts" / "accelerate", root / "scripts" / "accelerate")
    shutil.copy(SOURCE / "scripts" / "reproduce.py", root / "scripts")
    return Repo(root)


@pytest.fixture(scope="session")
def build_repo():
    return build


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return build(tmp_path / "repo")
