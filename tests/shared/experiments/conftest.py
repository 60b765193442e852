import json
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
            "peak_memory_mb": 300.0,
            "peak_gpu_memory_mb": None,
            "device": "CPU (x86_64)",
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
        "hardware": "2 CPU cores",
        "wall_seconds": 192.4,
        "finished": "2026-01-02T03:04:05Z",
    }
