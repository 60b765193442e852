import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from shared.experiments import progress
from shared.experiments.progress import Display, LogTail, duration, last_lines
from shared.experiments.scheduler import Job, Stage


def append(path, *steps, stage="train", total=100, **values):
    with open(path, "a") as file:
        for step in steps:
            file.write(json.dumps({"stage": stage, "step": step, "total": total, "time": 10.0 * step, **values}) + "\n")


def test_a_log_is_read_once_and_half_lines_wait(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    append(path, 1)  # from before we watch
    tail = LogTail(path)
    tail.read("train")
    assert tail.last is None
    append(path, 2, 3)
    with open(path, "a") as file:
        file.write('{"stage": "train", "step": 4, ')
    tail.read("train")
    assert (tail.first["step"], tail.last["step"]) == (2, 3)
    with open(path, "a") as file:
        file.write('"total": 100, "time": 40.0}\n')
    tail.read("train")
    assert tail.last["step"] == 4
    assert tail.offset == path.stat().st_size
    monkeypatch.setattr("builtins.open", None)
    tail.read("train")  # nothing new: not even opened


def test_a_log_that_is_cut_by_a_resume_is_followed_on(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, *range(10))
    tail = LogTail(path)
    path.write_text("")
    append(path, 1)
    tail.read("train")  # may be from before the cut: not taken for new
    append(path, 2)
    tail.read("train")
    assert tail.last["step"] == 2


def test_rows_of_other_stages_do_not_count(tmp_path):
    path = tmp_path / "log.jsonl"
    tail = LogTail(path)
    append(path, 1)
    append(path, 5, stage="eval")
    tail.read("eval")
    assert tail.first == tail.last
    assert tail.last["step"] == 5


def test_time_to_go_is_the_pace_times_the_rest(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    tail = LogTail(path)
    assert tail.eta() is None
    append(path, 10, 20, total=50)  # 10 s per step
    tail.read("train")
    monkeypatch.setattr(time, "time", lambda: 205.0)  # 5 s after the last row
    assert tail.eta() == pytest.approx(30 * 10 - 5)


@pytest.fixture
def jobs(tmp_path):
    stage = Stage("train", (), "k", tmp_path / "train.json", tmp_path / "train.out")
    made = [Job("fast", 0, tmp_path, [stage]), Job("slow", 1, tmp_path / "slow", [stage])]
    made[0].state, made[0].stage = "running", stage
    return made


def test_plain_lines_come_at_starts_and_ends_and_every_half_minute(jobs, tmp_path, monkeypatch):
    text, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Display("toy, tiny", jobs, Console(file=text, width=200)) as display:
        display.stage_started(jobs[0])
        append(tmp_path / "log.jsonl", 1, 20, loss=0.25, stage_number=3)
        now[0] += 29
        display.tick()
        assert text.getvalue() == "fast seed 0: train started\n"
        now[0] += 1
        display.tick()
        lines = text.getvalue().splitlines()[1:]
        assert lines[0].startswith("fast seed 0  train  20/100  loss 0.25, stage_number 3")
        assert lines[1] == "toy, tiny: 0 of 2 runs done, 1 running, 30 s so far"
        display.tick()
        assert len(text.getvalue().splitlines()) == 3
        now[0] += 40
        display.stage_over(jobs[0])
        assert text.getvalue().splitlines()[-1] == "fast seed 0: train done in 1 min 10 s"


def test_a_terminal_gets_a_live_table(jobs, tmp_path, monkeypatch):
    text, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(file=text, width=120, height=30, force_terminal=True, _environ={"TERM": "xterm"})
    jobs[1].state = "queued"
    with Display("toy, tiny", jobs, console) as display:
        display.stage_started(jobs[0])
        append(tmp_path / "log.jsonl", 1, 20, loss=0.25)
        now[0] += 1
        display.tick()
        shown = text.getvalue()
        assert "started" not in shown  # the table says it
        for part in ("fast seed 0", "20/100", "loss 0.25", "slow seed 1", "queued", "0 of 2 runs done"):
            assert part in shown


def test_a_long_queue_hides_neither_what_runs_nor_the_summary(jobs, tmp_path, monkeypatch):
    text, now = io.StringIO(), [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(file=text, width=120, height=10, force_terminal=True, _environ={"TERM": "xterm"})
    queued = [Job("slow", seed, tmp_path / "slow", jobs[1].stages, state="queued") for seed in range(50)]
    with Display("toy, tiny", [*queued, jobs[0]], console) as display:
        display.stage_started(jobs[0])
        now[0] += 1
        display.tick()
        shown = text.getvalue()
    assert "fast seed 0" in shown
    assert "0 of 51 runs done, 1 running, 50 queued, 1 s so far" in shown
    assert shown.count("slow seed") == 7


def test_a_log_without_totals_or_with_rubbish_does_no_harm(tmp_path):
    path = tmp_path / "log.jsonl"
    tail = LogTail(path)
    Path(path).write_text('not json\n[1]\n{"stage": "eval"}\n')
    tail.read("train")
    assert tail.last is None


def test_the_last_lines_begin_with_the_error_when_a_stage_says_one(tmp_path):
    path = tmp_path / "train.out"
    assert last_lines(path) == []
    path.write_text("".join(f"line {i}\n" for i in range(10_000)))
    assert last_lines(path, 2) == ["line 9998", "line 9999"]
    path.write_text("warning\nerror: no data\nuse data=DIR\nlauncher: a child failed\n" + "more\n" * 50)
    assert last_lines(path, 3) == ["error: no data", "use data=DIR", "launcher: a child failed"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
