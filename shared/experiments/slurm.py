"""LAUNCH=slurm: one SLURM job per run, submitted and requeued through submitit; the command only waits and watches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.experiments import files
from shared.experiments.errors import UserError
from shared.experiments.progress import Display
from shared.experiments.resources import Resources, thread_environment
from shared.experiments.scheduler import (
    DONE,
    QUEUED,
    RUNNING,
    Interrupted,
    Job,
    Stage,
    failure,
    signals_recorded,
    start,
    stop_processes,
)

POLL_SECONDS = 1.0

# A job that ran into its time limit goes on in the same place; this many times.
MAX_TIMEOUTS = 100

# SLURM's accounting may not know a job in the first moments after sbatch.
UNKNOWN_SECONDS = 300.0
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "PREEMPTED", "COMPLETING"}


class StagesOnNode:
    """What the SLURM job does: the stages that are not done, one after the other."""

    def __init__(self, stages: Sequence[Stage], environment: Mapping[str, str], root: Path):
        self.stages, self.environment, self.root = tuple(stages), dict(environment), root
        self.process = None

    def __call__(self) -> None:
        for stage in self.stages:
            if not stage.done():
                self.process = start(stage, self.environment, self.root)
                reason = failure(stage, self.process.wait())
                self.process = None
                if reason:
                    raise RuntimeError(reason)

    def checkpoint(self) -> Any:
        """Called by submitit on preemption and before the time limit: the stage goes on from its last saved state."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            stop_processes([self.process.pid])
        return DelayedSubmission(StagesOnNode(self.stages, self.environment, self.root))


def run_on_slurm(
    jobs: Sequence[Job], title: str, resources: Resources, display: Display, root: Path, cluster: str = "slurm"
) -> None:
    """Submits each unfinished job unless it is still in the queue from an earlier call, and waits for all.

    Args:
        title: first part of the jobs' names in the queue.
        cluster: which of submitit's executors; "local" needs no SLURM.

    Raises:
        UserError: SLURM is not there or does not take a job.
        Interrupted: on SIGINT, SIGTERM or SIGHUP. The SLURM jobs go on.
    """
    submitted: dict[int, Any] = {}
    with signals_recorded() as received:
        for index, job in enumerate(jobs):
            if job.next_stage() is None:
                job.state = DONE
                display.job_over(job)
            elif not received:
                submitted[index] = _adopt(job) or _submit(job, title, resources, root, cluster)
                job.state, job.stage, job.worked = QUEUED, job.next_stage(), True
        while submitted and not received:
            for index, handle in list(submitted.items()):
                _watch(jobs[index], handle, display)
                if jobs[index].state not in (QUEUED, RUNNING):
                    del submitted[index]
            display.tick()
            time.sleep(POLL_SECONDS)
        if received:
            ids = " ".join(handle.job_id for handle in submitted.values())
            raise Interrupted(received[0], f"the SLURM jobs go on; `scancel {ids}` ends them" if ids else "")


def active_jobs(jobs: Sequence[Job]) -> list[str]:
    """Ids of the SLURM jobs from earlier calls that still wait or run."""
    handles = [_recorded(job) for job in jobs]
    return [handle.job_id for handle in handles if handle is not None]


def _watch(job: Job, handle: Any, display: Display) -> None:
    """Brings `job` up to date with what its SLURM job has left on the shared disk."""
    over = handle.done()
    stage = job.next_stage()  # asked after `done`, so that its last result is not missed
    if stage is None:
        if job.state == RUNNING:
            display.stage_over(job)
        job.state, job.stage = DONE, None
        display.job_over(job)
    elif over:
        job.stage = stage
        job.fail(f"{stage.name} failed in SLURM job {handle.job_id} ({handle.state}, {handle.paths.stderr})")
        display.job_over(job)
    elif stage.out.exists() and (job.state == QUEUED or stage is not job.stage):
        if job.state == RUNNING:
            display.stage_over(job)
        job.state, job.stage = RUNNING, stage
        display.stage_started(job)


def _folder(job: Job) -> Path:
    return job.directory / "slurm"


def _recorded(job: Job) -> Any | None:
    """The SLURM job that an earlier call submitted for this run, if it is still active."""
    import submitit

    path = _folder(job) / "job.json"
    if not path.is_file():
        return None
    record = files.read_json(path)
    if record["cluster"] != "slurm":
        return None
    handle = submitit.SlurmJob(_folder(job), record["job_id"])
    state = (handle.get_info(mode="force").get("State") or "UNKNOWN").split()[0]  # e.g. `CANCELLED by 1000`
    young = state == "UNKNOWN" and time.time() - record["submitted"] < UNKNOWN_SECONDS
    return handle if state in ACTIVE or young else None


def _adopt(job: Job) -> Any | None:
    handle = _recorded(job)
    if handle is None:
        return None
    keys = [stage.key for stage in job.stages]
    if files.read_json(_folder(job) / "job.json")["keys"] != keys:
        raise UserError(
            f"{job.label}: SLURM job {handle.job_id} is still working with other code or config: wait for it, or "
            f"`scancel {handle.job_id}`"
        )
    return handle


def _submit(job: Job, title: str, resources: Resources, root: Path, cluster: str) -> Any:
    import submitit

    wanted = resources.slurm
    gpus = resources.processes if wanted.gpus is None else wanted.gpus
    named = {"partition": wanted.partition, "account": wanted.account, "qos": wanted.qos}
    named |= {"constraint": wanted.constraint, "gpus_per_node": gpus or None}
    threads = resources.threads or max(1, wanted.cpus // resources.processes)
    work = StagesOnNode(job.stages, thread_environment(threads), root)
    for stage in job.stages:
        if not stage.done():
            stage.out.unlink(missing_ok=True)  # once it is there again, the stage has started
    try:
        executor = submitit.AutoExecutor(_folder(job), cluster=cluster, slurm_max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(
            name=f"{title} {job.label}".replace(" ", "-"),
            nodes=1,
            tasks_per_node=1,
            timeout_min=wanted.minutes,
            cpus_per_task=wanted.cpus,
            mem_gb=wanted.memory_gb,
            **{f"slurm_{name}": value for name, value in named.items() if value is not None},
        )
        handle = executor.submit(work)
    except (RuntimeError, OSError) as error:  # no srun; sbatch said no
        raise UserError(f"LAUNCH=slurm: {error}") from error
    keys = [stage.key for stage in job.stages]
    record = {"job_id": handle.job_id, "cluster": cluster, "keys": keys, "submitted": time.time()}
    files.write_json(_folder(job) / "job.json", record)
    return handle
