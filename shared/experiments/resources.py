"""What the machine has, what one run takes of it, and hence how many runs go at a time."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.experiments.config import load_config
from shared.experiments.errors import UserError, unknown
from shared.experiments.paper import Paper


@dataclasses.dataclass
class Slurm:
    """What one run asks of SLURM; empty fields are left to the cluster's defaults."""

    minutes: int = 240
    """Time limit. A run that needs longer is queued again and goes on where it was."""
    gpus: int | None = None
    """GPUs per run; default: one per process. 0: none."""
    cpus: int = 8
    memory_gb: int = 32
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None


@dataclasses.dataclass
class Resources:
    """The `run:` section of configs/SCALE.yaml. It decides where and how fast a run goes, not what it computes: batch
    sizes in a config are those of all processes together."""

    processes: int = 1
    """Training processes per run, one per GPU; evaluation is one process that sees all of these GPUs."""
    accelerate: str | None = None
    """Name of the file in scripts/accelerate; default: ddp when there are several processes, else none."""
    threads: int | None = None
    """CPU threads per process; default: the cores shared out evenly."""
    slurm: Slurm = dataclasses.field(default_factory=Slurm)

    def __post_init__(self) -> None:
        for name in ("processes", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if self.processes > 1 and self.accelerate is None:
            self.accelerate = "ddp"


def load_resources(paper: Paper, scale: str, overrides: Sequence[str] = ()) -> Resources:
    """Reads the scale's `run:` section; `overrides` are `key=value` entries for it."""
    where = f"{paper.config_path(scale).relative_to(paper.root)}: run"
    values, _ = paper.layers(scale, next(iter(paper.arms)))
    resources = load_config(Resources, (where, values), overrides=overrides)
    if resources.accelerate is not None:
        names = sorted(path.stem for path in (paper.root / "scripts" / "accelerate").glob("*.yaml"))
        if resources.accelerate not in names:
            raise UserError(f"{where}: {unknown('accelerate config', resources.accelerate, names)}")
    return resources


def stage_command(paper: Paper, stage: str, resources: Resources, arguments: Sequence[str]) -> list[str]:
    """`python -m papers.NAME.STAGE ...`, for training under accelerate's launcher if the run says so."""
    command = ["-m", f"{paper.package}.{stage}", *arguments]
    if stage == "train" and resources.accelerate is not None:
        config = paper.root / "scripts" / "accelerate" / f"{resources.accelerate}.yaml"
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
        command = [*launch, "--num_processes", str(resources.processes), *command]
    return [sys.executable, *command]


def slots(resources: Resources, jobs: int | None, runs: int) -> list[dict[str, str]]:
    """The environment of each run that goes at the same time as others: its threads and its GPUs.

    Args:
        jobs: how many at a time; None: as many as there are GPUs (or, without any, cores) for.
        runs: how many there are to do.

    Raises:
        UserError: one run needs more GPUs than there are.
    """
    devices, cores, processes = visible_gpus(), cpu_count(), resources.processes
    if devices and processes > len(devices):
        raise UserError(
            f"a run takes {processes} GPUs and there are {len(devices)}: SET='run.processes={len(devices)}' takes fewer"
        )
    if jobs is None:
        jobs = len(devices) // processes if devices else cores // (processes * (resources.threads or 1))
    jobs = max(1, min(jobs, runs))
    threads = resources.threads or max(1, cores // (jobs * processes))
    environments = []
    for slot in range(jobs):
        environment = thread_environment(threads)
        if devices:
            mine = [devices[(slot * processes + rank) % len(devices)] for rank in range(processes)]
            environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(mine)}
        environments.append(environment)
    return environments


def thread_environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    # A fixed hash seed makes the order of sets of strings, and what a method draws in that order, repeatable.
    fixed = {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {name: str(threads) for name in names} | fixed


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def visible_gpus() -> list[str]:
    """The ids of the NVIDIA GPUs that CUDA_VISIBLE_DEVICES allows; no torch needed."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name.strip() for name in allowed.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    return [str(index) for index in range(len(gpu_names()))]


@functools.cache
def gpu_names() -> list[str]:
    """From `nvidia-smi -L`: lines like `GPU 0: NVIDIA H200 (UUID: GPU-...)`."""
    if not shutil.which("nvidia-smi"):
        return []
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return []  # a driver that does not answer offers nothing
    lines = [line for line in listing.splitlines() if line.startswith("GPU ")]
    return [line.split(": ", 1)[-1].split(" (UUID", 1)[0] for line in lines]


def cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"
