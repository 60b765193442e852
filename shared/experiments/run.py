"""One stage of one run: train.py or eval.py of a paper, for one arm and one seed.

runs/PAPER/SCALE/ARM/SEED/
    config.yaml         the config as resolved
    log.jsonl           one row per logged step: {"stage", "step", "total", "time", ...}
    state.pt            where training stands, for resuming; gone once training is done
    checkpoint/         an ordinary Hugging Face checkpoint
    train.json          {"key", "metrics", "seconds", "peak_memory_mb", ...}: present only when training is complete
    predictions.jsonl   {"item", "scores": {...}, ...} per test item: what was asked, what came back, how it scored
    eval.json           like train.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shared.experiments import files
from shared.experiments.config import load_config
from shared.experiments.errors import UserError
from shared.experiments.keys import stage_key
from shared.experiments.paper import ROOT, SCALES, Paper, load_paper

RUNS = ROOT / "runs"
EXIT_USER_ERROR = 2


@dataclasses.dataclass
class Run:
    """What a stage gets to work with: its directory, its log, its resumable state."""

    dir: Path
    paper: str
    scale: str
    arm: str
    seed: int
    stage: str  # "train" or "eval"
    key: str

    @property
    def checkpoint(self) -> Path:
        return self.dir / "checkpoint"

    @property
    def is_main_process(self) -> bool:
        """Under accelerate or torchrun only rank 0 writes."""
        return int(os.environ.get("RANK", "0")) == 0

    def log(self, step: int, total: int, **values: float | str) -> None:
        """Appends a row to log.jsonl; the progress display reads it.

        Args:
            step, total: how far the stage is, in its own unit.
            values: what to record, e.g. loss=0.3, curriculum_stage=2.
        """
        if self.is_main_process:
            row = {"stage": self.stage, "step": step, "total": total, "time": round(time.time(), 3), **values}
            with open(self.dir / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drops this stage's rows after `step`, which a resumed stage is about to write again."""
        path = self.dir / "log.jsonl"
        if self.is_main_process and path.exists():
            rows = files.read_jsonl(path)
            files.write_jsonl(path, (r for r in rows if r["stage"] != self.stage or r["step"] <= step))

    def save_state(self, state: dict[str, Any]) -> None:
        """Atomically stores what training needs to go on from here: anything torch.save takes."""
        import torch

        if self.is_main_process:
            value = {"key": self.key, "state": state}
            files.write_atomic(self.dir / "state.pt", lambda file: torch.save(value, file), binary=True)

    def load_state(self) -> dict[str, Any] | None:
        """The last saved state of this very stage; None at a fresh start or when config or code have changed since."""
        import torch

        path = self.dir / "state.pt"
        if not path.exists():
            return None
        saved = torch.load(path, map_location="cpu", weights_only=False)
        return saved["state"] if saved["key"] == self.key else None

    def write_predictions(self, rows: Iterable[dict]) -> None:
        """Writes predictions.jsonl. Each row has `item` (the same name in every arm that is asked the same thing) and
        `scores` (numbers by metric), beside whatever lets a person audit them (prompt, output, expected)."""
        if self.is_main_process:
            files.write_jsonl(self.dir / "predictions.jsonl", rows)


def stage_main(stage: str, config_class: type, work: Callable[[Any, Run], dict], argv: list[str] | None = None) -> None:
    """The `main` of every train.py and eval.py: reads arguments and config, seeds, runs `work`, writes STAGE.json.

    `work(config, run)` returns the stage's metrics, a flat dict of numbers. The paper is the package that
    `config_class` stands in. A person's mistakes end in one line on stderr and exit status 2.
    """
    try:
        _stage_main(stage, config_class, work, argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from error


def _stage_main(stage: str, config_class: type, work: Callable[[Any, Run], dict], argv: list[str] | None) -> None:
    script = Path(sys.modules[work.__module__].__file__).resolve()
    paper = load_paper(script.parent.name, script.parents[1])
    args = _parse(stage, paper, argv)
    config = resolve_config(paper, config_class, args.scale, args.arm, args.overrides)
    directory = Path(args.out or RUNS / paper.name / args.scale / args.arm / str(args.seed))
    directory.mkdir(parents=True, exist_ok=True)
    key = run_key(paper, stage, config, args.arm, args.seed, directory)
    run = Run(directory, paper.name, args.scale, args.arm, args.seed, stage, key)

    _seed(args.seed)
    _write_config(directory, config)
    started = time.time()
    with _explained_failures(directory):
        metrics = work(config, run)
    if run.is_main_process:
        files.write_json(directory / f"{stage}.json", _record(run, config, metrics, time.time() - started))
        if stage == "train":
            (directory / "state.pt").unlink(missing_ok=True)


def _parse(stage: str, paper: Paper, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"{stage} one arm of {paper.title!r} with one seed")
    parser.add_argument("--scale", default="tiny", choices=SCALES)
    parser.add_argument("--arm", required=True, choices=list(paper.arms), metavar="ARM", help=", ".join(paper.arms))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="run directory; default: runs/PAPER/SCALE/ARM/SEED")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    return parser.parse_args(argv)


def resolve_config(paper: Paper, config_class: type, scale: str, arm: str, overrides: list[str]) -> Any:
    _, layers = paper.layers(scale, arm)
    return load_config(config_class, *layers, overrides=overrides, smoke=scale == "smoke")


def run_key(paper: Paper, stage: str, config: Any, arm: str, seed: int, directory: Path) -> str:
    """The stage's content address; evaluation also depends on the training it evaluates."""
    inputs = [stage, arm, str(seed)]
    if stage == "eval":
        trained = directory / "train.json"
        if not trained.exists():
            raise UserError(f"{directory}: nothing trained here yet; run {paper.package}.train with the same arguments")
        inputs.append(files.read_json(trained)["key"])
    root = paper.directory.parents[1]
    return stage_key(paper.directory / f"{stage}.py", dataclasses.asdict(config), inputs, root)


def _seed(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


def _write_config(directory: Path, config: Any) -> None:
    import yaml

    files.write_text(directory / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def _record(run: Run, config: Any, metrics: dict, seconds: float) -> dict:
    return {
        "key": run.key,
        "paper": run.paper,
        "scale": run.scale,
        "arm": run.arm,
        "seed": run.seed,
        "metrics": metrics,
        "config": dataclasses.asdict(config),
        "seconds": round(seconds, 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "peak_gpu_memory_mb": _peak_gpu_memory(),
        "device": _device(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def _peak_gpu_memory() -> float | None:
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**20, 1) if torch.cuda.is_available() else None


@contextlib.contextmanager
def _explained_failures(directory: Path):
    """Turns the failures of machines into sentences that say what to do."""
    import errno

    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory ({error}); lower batch_size (SET='batch_size=...')") from error
    except MemoryError as error:
        raise UserError("out of memory; lower batch_size (SET='batch_size=...') or JOBS") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"disk full while writing under {directory}: free some space and run again") from error
        raise
