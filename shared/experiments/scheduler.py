"""Runs stages as subprocesses, several at a time, and leaves none behind, however it ends."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from shared.experiments import files
from shared.experiments.errors import UserError
from shared.experiments.progress import Display
from shared.experiments.run import EXIT_DISK_FULL, die_with_parent
from shared.experiments.warm import Fork, WarmProcess

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0

WAITING, QUEUED, RUNNING, DONE, FAILED = "waiting", "queued", "running", "done", "failed"


class Interrupted(BaseException):
    """The person or the system asked us to stop, and what runs here has stopped."""

    def __init__(self, signum: int, note: str = ""):
        super().__init__(": ".join(part for part in (signal.Signals(signum).name, note) if part))
        self.signum = signum


@dataclasses.dataclass(frozen=True)
class Stage:
    """One subprocess and the file that says it is done."""

    name: str
    command: tuple[str, ...]
    key: str
    record: Path  # a JSON file whose "key" is `key` once the stage is done
    out: Path  # what it prints
    writes_record: bool = True  # else the scheduler does, when the command succeeds
    warm: tuple[
        str, ...
    ] = ()  # modules to start from a process that has imported them; the same in all stages of a run

    def done(self) -> bool:
        try:
            return files.read_json(self.record)["key"] == self.key
        except (FileNotFoundError, UserError, KeyError):  # damaged is as good as absent
            return False


@dataclasses.dataclass
class Job:
    """Stages that go one after the other; for a run: train, eval."""

    arm: str
    seed: int | None
    directory: Path
    stages: Sequence[Stage]
    state: str = WAITING
    stage: Stage | None = None  # the one running, or the one that failed
    error: str = ""
    worked: bool = False  # some stage was not just found done

    @property
    def label(self) -> str:
        return self.arm if self.seed is None else f"{self.arm} seed {self.seed}"

    def next_stage(self) -> Stage | None:
        return next((stage for stage in self.stages if not stage.done()), None)

    def fail(self, reason: str) -> None:
        self.state, self.error = FAILED, reason


def run_jobs(jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], display: Display, root: Path) -> None:
    """Runs all jobs, `len(slots)` at a time, each with its slot's environment; failures end up in the jobs.

    Raises:
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after every child has ended.
    """
    waiting = collections.deque(jobs)
    free = collections.deque(slots)
    running: dict[subprocess.Popen | Fork, tuple[Job, Mapping[str, str]]] = {}
    starter = Starter(slots, root)
    with signals_recorded() as received:
        try:
            while (waiting or running) and not received:
                while waiting and free:
                    job = waiting.popleft()
                    if process := _advance(job, free[0], display, starter):
                        running[process] = (job, free.popleft())
                for process in [p for p in running if p.poll() is not None]:
                    job, slot = running.pop(process)
                    _close(job, process, display)
                    following = _advance(job, slot, display, starter) if job.state == RUNNING else None
                    if following:
                        running[following] = (job, slot)
                    else:
                        free.append(slot)
                display.tick()
                time.sleep(POLL_SECONDS)
        finally:
            stop_processes([process.pid for process in running], lambda: len(received) > 1)
            starter.close()
        if received:
            raise Interrupted(received[0])


class Starter:
    """Starts stages, those that name modules from one process per slot that has imported them."""

    def __init__(self, slots: Sequence[Mapping[str, str]], root: Path):
        self.slots, self.root = slots, root
        self._warm: dict[int, WarmProcess] = {}  # by slot: equal slots have one each

    def start(self, stage: Stage, slot: Mapping[str, str]) -> subprocess.Popen | Fork:
        if not stage.warm:
            return start(stage, slot, self.root)
        if not self._warm:  # all at once: they import at the same time
            self._warm = {id(slot): WarmProcess(stage.warm, slot, self.root) for slot in self.slots}
        stage.out.parent.mkdir(parents=True, exist_ok=True)
        return self._warm[id(slot)].start(stage.command, stage.out) or start(stage, slot, self.root)

    def close(self) -> None:
        for process in self._warm.values():
            process.close()


def _advance(job: Job, slot: Mapping[str, str], display: Display, starter: Starter) -> subprocess.Popen | Fork | None:
    """Starts the job's next stage; None when the job is over."""
    try:
        stage = job.next_stage()
        if stage is None:
            job.state, job.stage = DONE, None
            display.job_over(job)
            return None
        job.state, job.stage, job.worked = RUNNING, stage, True
        process = starter.start(stage, slot)
    except (UserError, OSError) as error:
        job.fail(str(error))
        display.job_over(job)
        return None
    display.stage_started(job)
    return process


def _close(job: Job, process: subprocess.Popen | Fork, display: Display) -> None:
    """Judges the stage that has just ended."""
    stage = job.stage
    _signal_group(process.pid, signal.SIGKILL)  # helpers that the stage left running
    reason = failure(stage, process.returncode)
    if reason:
        job.fail(reason)
        display.job_over(job)
    else:
        display.stage_over(job)


def start(stage: Stage, environment: Mapping[str, str], root: Path) -> subprocess.Popen:
    """Starts a stage in a process group of its own, which does not outlive us.

    Call it from the main thread: the kernel takes the end of the thread that starts a process for the parent's end.
    """
    stage.out.parent.mkdir(parents=True, exist_ok=True)
    with open(stage.out, "wb") as out:
        return subprocess.Popen(
            stage.command,
            cwd=root,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def failure(stage: Stage, status: int) -> str:
    """Why the stage that ended with `status` failed; "" if it is done."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = ": out of memory? A lower JOBS or batch size helps" if -status == signal.SIGKILL else ""
        return f"{stage.name} was killed by {name}{hint}"
    if status == EXIT_DISK_FULL:
        return f"{stage.name}: disk full: free some space and run the same command again"
    if status:
        return f"{stage.name} ended with status {status}"
    if not stage.writes_record:
        files.write_json(stage.record, {"key": stage.key})
    if not stage.record.is_file():
        return f"{stage.name} ended without writing {stage.record.name}"
    if not stage.done():
        return f"code, config or inputs of {stage.name} changed while it ran: run the same command again"
    return ""


def stop_processes(pids: Sequence[int], hurry: Callable[[], bool] = lambda: False) -> None:
    """Ends our children `pids`, their groups and all their descendants: asks first, kills after GRACE_SECONDS or on
    `hurry`. Takes no Popen: a signal handler may call this while the interrupted Popen.wait holds its lock."""
    import psutil

    everyone: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            child = psutil.Process(pid)
            everyone += [child, *child.children(recursive=True)]  # launchers put workers into groups of their own
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while everyone and time.monotonic() < deadline and not hurry():
        _, everyone = psutil.wait_procs(everyone, timeout=POLL_SECONDS)
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for pid in pids:
        _signal_group(pid, signal.SIGKILL)
    psutil.wait_procs(everyone)


def _signal_group(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signum)


@contextlib.contextmanager
def signals_recorded() -> Iterator[list[int]]:
    """Collects the signals that ask us to stop, so that none arrives between starting a child and knowing of it."""
    received: list[int] = []
    previous = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # e.g. SIGHUP under nohup
            previous[signum] = signal.signal(signum, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
