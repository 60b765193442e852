"""What a stage does with its directory; whole stages are in test_reproduce.py."""

import dataclasses
import errno
import math
import random

import numpy as np
import pytest
import torch

from shared.experiments import files
from shared.experiments.errors import UserError
from shared.experiments.run import Run, _explained_failures


@dataclasses.dataclass
class Config:
    steps: int = 1


@pytest.fixture
def run(tmp_path):
    return make(tmp_path)


def make(directory, stage="train", key="k1"):
    return Run(directory, "toy", "tiny", "fast", 0, stage, key)


def steps(directory):
    return [(row["stage"], row["step"]) for row in files.read_jsonl(directory / "log.jsonl")]


def test_state_log_and_random_generators_come_back_as_saved(run, tmp_path):
    for step in (1, 2):
        run.log(step, 4)
    run.save_state({"w": torch.arange(3)})
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002
    run.log(3, 4)
    resumed = make(tmp_path)
    resumed.begin()
    state = resumed.load_state()
    assert state["w"].tolist() == [0, 1, 2]
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == expected  # noqa: NPY002
    assert steps(tmp_path) == [("train", 1), ("train", 2)]


def test_a_state_of_another_key_is_ignored_and_the_log_starts_again(run, tmp_path):
    run.log(1, 4)
    run.save_state({})
    other = make(tmp_path, key="k2")
    other.begin()
    assert other.load_state() is None
    assert steps(tmp_path) == []


def test_a_damaged_state_means_a_fresh_start_and_a_message(run, tmp_path, capsys):
    run.save_state({})
    content = (tmp_path / "state.pt").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"garbage"):
        (tmp_path / "state.pt").write_bytes(damaged)
        assert run.load_state() is None
        assert f"{tmp_path / 'state.pt'} is damaged" in capsys.readouterr().err


def test_time_spent_adds_up_over_resumes(run, tmp_path):
    run._earlier = {"seconds": 100.0, "cpu_seconds": 50.0, "peak_memory_mb": 1e6}
    run.save_state({})
    resumed = make(tmp_path)
    resumed.load_state()
    spent = resumed.spent()
    assert 100 <= spent["seconds"] < 130
    assert spent["cpu_seconds"] > 50
    assert spent["peak_memory_mb"] == 1e6


def test_saving_is_due_by_the_clock_and_less_often_when_slow(run, monkeypatch):
    run._saved = now = 1000.0  # whole numbers: (t + 20) - t can be less than 20
    monkeypatch.setattr("shared.experiments.run.time.monotonic", lambda: now)
    assert not run.due(every=20)
    now += 20
    assert run.due(every=20)
    run.save_state({})
    assert not run.due(every=20)
    run._save_took = 5.0
    now += 99
    assert not run.due(every=20)
    now += 1
    assert run.due(every=20)


def test_a_new_training_removes_what_stood_for_the_old_one(run, tmp_path):
    for name in ("train.json", "eval.json", "predictions.jsonl", ".train.json.x.tmp"):
        (tmp_path / name).write_text("{}")
    run.log(1, 1)
    make(tmp_path, "eval").log(1, 1)
    run.begin()
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert steps(tmp_path) == []


def test_a_new_evaluation_leaves_the_training_alone(run, tmp_path):
    run.log(1, 1)
    for name in ("train.json", "eval.json"):
        (tmp_path / name).write_text("{}")
    evaluation = make(tmp_path, "eval")
    evaluation.log(1, 1)
    evaluation.begin()
    assert (tmp_path / "train.json").exists()
    assert not (tmp_path / "eval.json").exists()
    assert steps(tmp_path) == [("train", 1)]


def test_only_rank_0_writes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run.begin()
    run.log(1, 1)
    run.save_state({})
    run.write_predictions([{"item": "1", "scores": {}}])
    run.finish({"loss": 1.0}, Config())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5", None])
def test_a_metric_that_is_no_number_is_an_error(run, tmp_path, value):
    with pytest.raises(UserError, match=r"train: metric 'loss' is .*, expected a finite number"):
        run.finish({"loss": value}, Config())
    assert not list(tmp_path.iterdir())


def test_the_record_says_what_was_done(run, tmp_path):
    run.save_state({})
    run.finish({"loss": np.float32(0.5), "n": 3}, Config())
    record = files.read_json(tmp_path / "train.json")
    assert record["metrics"] == {"loss": 0.5, "n": 3}
    assert record["config"] == {"steps": 1}
    assert (record["key"], record["arm"], record["seed"]) == ("k1", "fast", 0)
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), "disk full while writing .*: free some space"),
        (MemoryError(), "out of memory: lower the batch size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: lower the batch size"),
        (torch.cuda.OutOfMemoryError("2 GiB"), "out of GPU memory: lower the batch size"),
        (OSError("We couldn't connect to 'https://huggingface.co' to load"), "hf download NAME"),
        (ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub"), "hf download NAME"),
    ],
)
def test_failures_of_machines_are_explained(tmp_path, failure, message):
    with pytest.raises(UserError, match=message), _explained_failures(tmp_path):
        raise failure


@pytest.mark.parametrize("failure", [RuntimeError("shape mismatch"), FileNotFoundError(errno.ENOENT, "x")])
def test_failures_of_programs_keep_their_traceback(tmp_path, failure):
    with pytest.raises(type(failure)) as caught, _explained_failures(tmp_path):
        raise failure
    assert caught.value is failure


@pytest.mark.parametrize("order", ["lr=1 --arm coconut clip=2 --seed 3", "--arm coconut --seed 3 lr=1 clip=2"])
def test_overrides_may_stand_anywhere_on_the_command_line(order):
    from shared.experiments.paper import load_paper
    from shared.experiments.run import _parse

    args = _parse("train", load_paper("coconut"), order.split())
    assert (args.arm, args.seed, args.overrides) == ("coconut", 3, ["lr=1", "clip=2"])
