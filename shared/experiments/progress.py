"""What is going on: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from shared.experiments.scheduler import Job

LIVE_SECONDS = 0.5
PLAIN_SECONDS = 30.0
SHOWN_VALUES = 2
SHOWN_LINES = 15
NOT_VALUES = {"stage", "step", "total", "time", "loss"}


class LogTail:
    """Follows a growing log.jsonl, reading each byte once."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = path.stat().st_size if path.is_file() else 0
        self.first: dict | None = None  # of the stage in question, since we started to watch
        self.last: dict | None = None

    def read(self, stage: str) -> None:
        """Takes in the rows of `stage` that were appended since the last call."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        self.offset = min(self.offset, size)  # a resumed stage cuts the log
        if size == self.offset:
            return
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            complete, newline, _ = file.read(size - self.offset).rpartition(b"\n")
        self.offset += len(complete) + len(newline)
        for line in complete.splitlines():
            row = _row(line)
            if row.get("stage") == stage:
                if self.first is None or self.first["stage"] != stage:
                    self.first = row
                self.last = row

    def eta(self) -> float | None:
        """Seconds to go, at the pace since we started to watch."""
        if not self.first or not self.last or self.last["step"] <= self.first["step"]:
            return None
        pace = (self.last["time"] - self.first["time"]) / (self.last["step"] - self.first["step"])
        return max(0.0, pace * (self.last["total"] - self.last["step"]) - (time.time() - self.last["time"]))


class Display:
    """Shows jobs as they go. A context manager; `tick()` is cheap and may be called often."""

    def __init__(self, title: str, jobs: Sequence[Job], console: Console):
        self.title, self.jobs, self.console = title, jobs, console
        self.started = time.monotonic()
        self.stage_started_at: dict[int, float] = {}
        self.tails: dict[int, LogTail] = {}
        self.shown_at = self.started
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.stop()

    def stage_started(self, job: Job) -> None:
        self.stage_started_at[id(job)] = time.monotonic()
        self.tails[id(job)] = LogTail(job.directory / "log.jsonl")
        if not self.live:
            self._line(f"{job.label}: {job.stage.name} started")

    def stage_over(self, job: Job) -> None:
        seconds = time.monotonic() - self.stage_started_at.get(id(job), self.started)
        self._line(f"{job.label}: {job.stage.name} done in {duration(seconds)}")

    def job_over(self, job: Job) -> None:
        if job.error:
            self._line(f"{job.label}: FAILED: {job.error}", style="bold red")
            if job.stage:
                for line in last_lines(job.stage.out):
                    self._line(f"    {line}")
                self._line(f"    (all of it: {job.stage.out})")
        elif not job.worked:
            self._line(f"{job.label}: already done")

    def tick(self) -> None:
        now = time.monotonic()
        if now - self.shown_at < (LIVE_SECONDS if self.live else PLAIN_SECONDS):
            return
        self.shown_at = now
        watched = [job for job in self.jobs if job.state in ("running", "queued")]
        for job in watched:
            if id(job) in self.tails and job.stage:
                self.tails[id(job)].read(job.stage.name)
        if self.live:
            self.live.update(Group(self._table(watched), Text(self._summary(), style="bold")), refresh=True)
        else:
            for job in watched:
                self._line("  ".join([job.label, *(cell for cell in self._cells(job) if cell)]))
            self._line(self._summary())

    def _table(self, watched: Sequence[Job]) -> Table:
        table = Table.grid(padding=(0, 2))
        shown = sorted(watched, key=lambda job: job.state == "queued")[: max(1, self.console.height - 2)]
        for job in shown:  # as many as fit above the summary
            row = self._last(job)
            bar = ProgressBar(total=max(row["total"], 1), completed=row["step"], width=24) if row else ""
            table.add_row(job.label, bar, *self._cells(job))
        return table

    def _cells(self, job: Job) -> list[str]:
        """Stage, step/total, loss and other values, time to go; "" where not known."""
        if job.state == "queued":
            return ["queued", "", "", ""]
        row = self._last(job)
        if not row:
            return [job.stage.name, "", "", ""]
        names = [*(["loss"] if "loss" in row else []), *(name for name in row if name not in NOT_VALUES)]
        values = [f"{name} {row[name]:.4g}" for name in names if isinstance(row[name], int | float)]
        eta = self.tails[id(job)].eta()
        left = "" if eta is None else f"{duration(eta)} left"
        return [job.stage.name, f"{row['step']}/{row['total']}", ", ".join(values[:SHOWN_VALUES]), left]

    def _last(self, job: Job) -> dict | None:
        row = self.tails[id(job)].last if id(job) in self.tails else None
        return row if row and job.stage and row["stage"] == job.stage.name else None

    def _summary(self) -> str:
        counts = Counter(job.state for job in self.jobs)
        others = "".join(f", {counts[state]} {state}" for state in ("failed", "running", "queued") if counts[state])
        elapsed = duration(time.monotonic() - self.started)
        return f"{self.title}: {counts['done']} of {len(self.jobs)} runs done{others}, {elapsed} so far"

    def _line(self, text: str, style: str | None = None) -> None:
        self.console.print(escape(text), style=style, highlight=False, soft_wrap=True)


def last_lines(path: Path, count: int = SHOWN_LINES) -> list[str]:
    """The end of what a stage printed; from its `error: ` line on, if there is one (launchers print more after it)."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").splitlines()
    said = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
    return lines[-count:] if said is None else lines[said : said + count]


def duration(seconds: float) -> str:
    """5 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _row(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except ValueError:  # cut in the middle when the log was
        return {}
    return row if isinstance(row, dict) else {}
