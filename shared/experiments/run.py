"""One stage of one run: train.py or eval.py of a paper, for one arm and one seed.

runs/PAPER/SCALE/ARM/SEED/
    config.yaml         the config as resolved
    log.jsonl           one row per logged step: {"stage", "step", "total", "time", ...}
    state.pt            where the stage stands, for resuming; gone once it is done
    checkpoint/         an ordinary Hugging Face checkpoint
    train.json          {"key", "metrics", "seconds", "peak_memory_mb", ...}: present only when training is complete
    predictions.jsonl   {"item", "scores": {...}, ...} per test item: what was asked, what came back, how it scored
    eval.json           like train.json
    train.out eval.out  what the stage printed, when the runner started it
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import numbers
import os
import platform
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shared.experiments import files
from shared.experiments.config import load_config
from shared.experiments.errors import UserError
from shared.experiments.keys import stage_key
from shared.experiments.paper import SCALES, Paper, load_paper

EXIT_USER_ERROR = 2
EXIT_DISK_FULL = 74  # says it where the message cannot be written: the stage's output is on the full disk too

# Saving a stage's state takes at most a twentieth of its time.
SAVE_SHARE = 20


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

    def __post_init__(self) -> None:
        self._earlier = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_memory_mb": 0.0}  # spent before the last resume
        self._started = self._saved = time.monotonic()
        self._save_took = 0.0

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
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def due(self, every: float = 20.0) -> bool:
        """Whether it is time to call `save_state`: `every` seconds have passed since the last call (more if saving is
        slow). What a stage computes must not depend on the answer."""
        return time.monotonic() - self._saved >= max(every, SAVE_SHARE * self._save_took)

    def save_state(self, state: dict[str, Any]) -> None:
        """Atomically stores what the stage needs to go on from here: anything torch.save takes.

        The global random generators (random, numpy, torch) are stored with it. Only rank 0 writes, so `state` must not
        need the other ranks to put together.
        """
        import torch

        if not self.is_main_process:
            return
        begun = time.monotonic()
        value = {
            "key": self.key,
            "state": state,
            "random": _random_state(),
            "spent": self.spent(),
            "log_bytes": self._log.stat().st_size if self._log.exists() else 0,
        }
        files.write_atomic(self._state, lambda file: torch.save(value, file), binary=True)
        self._saved = time.monotonic()
        self._save_took = self._saved - begun

    def load_state(self) -> dict[str, Any] | None:
        """The last saved state of this very stage; None at a fresh start or when config or code have changed since.

        Puts the random generators and the log back to where they were, so call it last before the loop starts.
        """
        import torch

        saved = None
        if self._state.exists():
            try:
                saved = torch.load(self._state, map_location="cpu", weights_only=False)
                saved = saved if saved["key"] == self.key else None
            except Exception as error:  # unpickling a damaged file can raise nearly anything
                saved = None
                print(f"{self._state} is damaged ({error!r}): starting from the beginning", file=sys.stderr)
        if saved is None:
            self._forget_log()
            return None
        _set_random_state(saved["random"])
        self._earlier = saved["spent"]
        if self.is_main_process and self._log.exists():
            os.truncate(self._log, min(saved["log_bytes"], self._log.stat().st_size))
        return saved["state"]

    def write_predictions(self, rows: Iterable[dict]) -> None:
        """Writes predictions.jsonl. Each row has `item` (the same name in every arm that is asked the same thing) and
        `scores` (numbers by metric), beside whatever lets a person audit them (prompt, output, expected)."""
        if self.is_main_process:
            files.write_jsonl(self.dir / "predictions.jsonl", rows)

    def spent(self) -> dict[str, float]:
        """Wall and CPU seconds of this stage over all its resumes (without what a kill made vain), and its peak of
        resident memory in MiB; of this process and its finished children (memory: of the largest)."""
        mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime
        peak_kb = max(mine.ru_maxrss, children.ru_maxrss)
        return {
            "seconds": round(self._earlier["seconds"] + time.monotonic() - self._started, 2),
            "cpu_seconds": round(self._earlier["cpu_seconds"] + cpu, 2),
            "peak_memory_mb": round(max(self._earlier["peak_memory_mb"], peak_kb / 1024), 1),
        }

    @property
    def _log(self) -> Path:
        return self.dir / "log.jsonl"

    @property
    def _state(self) -> Path:
        return self.dir / "state.pt"

    def _forget_log(self) -> None:
        """Drops this stage's rows, and those of later stages."""
        if self.is_main_process and self._log.exists():
            earlier = ("train",) if self.stage == "eval" else ()
            rows = [row for row in files.read_jsonl(self._log) if row["stage"] in earlier]
            files.write_jsonl(self._log, rows)

    def begin(self) -> None:
        """Removes results that this stage is about to replace, so that none outlives the files it stands for."""
        if self.is_main_process:
            stale = ("train.json", "eval.json", "predictions.jsonl") if self.stage == "train" else ("eval.json",)
            for name in stale:
                (self.dir / name).unlink(missing_ok=True)
            files.remove_leftovers(self.dir)
            if not self._state.exists():
                self._forget_log()

    def finish(self, metrics: dict[str, float], config: Any) -> None:
        """Writes STAGE.json: from here on the stage counts as done."""
        if self.is_main_process:
            record = {
                "key": self.key,
                "paper": self.paper,
                "scale": self.scale,
                "arm": self.arm,
                "seed": self.seed,
                "metrics": _checked(metrics, self.stage),
                "config": dataclasses.asdict(config),
                **self.spent(),
                "peak_gpu_memory_mb": _peak_gpu_memory(),
                "device": _device(),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            files.write_json(self.dir / f"{self.stage}.json", record)
            self._state.unlink(missing_ok=True)


def stage_main(stage: str, config_class: type, work: Callable[[Any, Run], dict], argv: list[str] | None = None) -> None:
    """The `main` of every train.py and eval.py: reads arguments and config, seeds, runs `work`, writes STAGE.json.

    `work(config, run)` returns the stage's metrics, a flat dict of numbers. The paper is the package that `work` stands
    in. A person's mistakes end in one line on stderr and exit status 2.
    """
    try:
        _stage_main(stage, config_class, work, argv)
    except UserError as error:
        raise _exit(error) from error


def _exit(error: UserError) -> SystemExit:
    """Says what is wrong, and returns what to raise."""
    with contextlib.suppress(OSError):
        print(f"error: {error}", file=sys.stderr)
    return SystemExit(EXIT_DISK_FULL if isinstance(error, files.DiskFull) else EXIT_USER_ERROR)


def _stage_main(stage: str, config_class: type, work: Callable[[Any, Run], dict], argv: list[str] | None) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a launcher that is killed outright cannot stop its workers
        die_with_parent()
    script = Path(sys.modules[work.__module__].__file__).resolve()
    paper = load_paper(script.parent.name, script.parents[1])
    args = _parse(stage, paper, argv)
    config = resolve_config(paper, config_class, args.scale, args.arm, args.overrides)
    directory = Path(args.out or paper.runs(args.scale) / args.arm / str(args.seed)).resolve()
    key = _stage_key_here(paper, stage, config, args.arm, args.seed, directory)
    run = Run(directory, paper.name, args.scale, args.arm, args.seed, stage, key)
    with _explained_failures(directory), files.lock(directory) if run.is_main_process else contextlib.nullcontext():
        run.begin()
        _seed(args.seed)
        if run.is_main_process:
            _write_config(directory, config)
        run.finish(work(config, run), config)


def plot_main(draw: Callable[[Path, Path], None], argv: list[str] | None = None) -> None:
    """The `main` of every plot.py: calls `draw(runs, out)` with runs/PAPER/SCALE and the figures' directory."""
    parser = argparse.ArgumentParser(description="draw the figures from finished runs")
    parser.add_argument("--runs", type=Path, required=True, help="runs/PAPER/SCALE")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go")
    args = parser.parse_args(argv)
    try:
        with files.disk_full_explained(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
            draw(args.runs, args.out)
    except UserError as error:
        raise _exit(error) from error


def finished_runs(runs: Path) -> dict[str, dict[int, Path]]:
    """arm -> seed -> directory of the finished runs that the last `make reproduce` asked for, in its order.

    Runs that are left in runs/PAPER/SCALE from other commands, maybe with other code or config, are not among them.
    """
    found: dict[str, dict[int, Path]] = {}
    for arm, seed in files.read_json(runs / "runs.json"):
        found.setdefault(arm, {})[seed] = runs / arm / str(seed)
    return found


def _parse(stage: str, paper: Paper, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"{stage} one arm of {paper.title!r} with one seed")
    parser.add_argument("--scale", default="tiny", choices=SCALES)
    parser.add_argument("--arm", required=True, choices=list(paper.arms), metavar="ARM", help=", ".join(paper.arms))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="run directory; default: runs/PAPER/SCALE/ARM/SEED")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    return parser.parse_intermixed_args(argv)  # overrides may stand between the options


def resolve_config(paper: Paper, config_class: type, scale: str, arm: str, overrides: list[str]) -> Any:
    _, layers = paper.layers(scale, arm)
    return load_config(config_class, *layers, overrides=overrides, smoke=scale == "smoke")


def run_key(paper: Paper, stage: str, config: Any, arm: str, seed: int, trained: str = "") -> str:
    """The stage's content address; that of an evaluation contains the address of the training (`trained`)."""
    inputs = [stage, arm, str(seed), trained]
    return stage_key(paper.directory / f"{stage}.py", dataclasses.asdict(config), inputs, paper.root)


def _stage_key_here(paper: Paper, stage: str, config: Any, arm: str, seed: int, directory: Path) -> str:
    if stage == "train":
        return run_key(paper, stage, config, arm, seed)
    record = directory / "train.json"
    if not record.exists():
        raise UserError(f"{directory}: nothing trained here yet; run {paper.package}.train with the same arguments")
    return run_key(paper, stage, config, arm, seed, files.read_json(record)["key"])


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _seed(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


def _random_state() -> dict[str, Any]:
    import numpy
    import torch

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numbers = numpy.random.get_state()  # noqa: NPY002
    return {"random": random.getstate(), "numpy": numbers, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    import numpy
    import torch

    random.setstate(state["random"])
    numpy.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value, device)


def _write_config(directory: Path, config: Any) -> None:
    import yaml

    files.write_text(directory / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def _checked(metrics: dict[str, float], stage: str) -> dict[str, float]:
    """The metrics as plain numbers."""
    for name, value in metrics.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"{stage}: metric {name!r} is {value!r}, expected a finite number")
    return {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def _peak_gpu_memory() -> float | None:
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**20, 1) if torch.cuda.is_available() else None


@contextlib.contextmanager
def _explained_failures(directory: Path) -> Iterator[None]:
    """Turns the failures of machines into sentences that say what to do."""
    import torch

    smaller = "lower the batch size (SET='batch_size=...' if the config calls it that)"
    try:
        with files.disk_full_explained(directory):
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory: {smaller}\n{error}") from error
    except MemoryError as error:
        raise UserError(f"out of memory: {smaller} or JOBS") from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # what torch's CPU allocator says
            raise UserError(f"out of memory: {smaller} or JOBS\n{error}") from error
        raise
    except OSError as error:
        if "huggingface.co" in str(error) or isinstance(error, ConnectionError):
            raise UserError(
                f"a model or dataset cannot be fetched: {error}\nWhere there is a network: `hf download NAME "
                "--local-dir DIR` (accept a gated model's terms on its page and `hf auth login` first), then name DIR "
                "in the config (SET='key=DIR')"
            ) from error
        raise
