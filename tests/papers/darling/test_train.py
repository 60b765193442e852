"""Whole stages: every scale's config through train and eval, a kill and a resume, bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from papers.darling.config import Config
from shared.experiments import UserError
from shared.experiments.paper import ROOT

STAGE = """
import sys
from shared.experiments import stage_main
from shared.experiments.run import Run
from papers.darling import {stage}
if {often}:
    Run.due = lambda self, every=20.0: True  # save after every step, so that a kill finds something to resume from
stage_main("{stage}", {stage}.Config, {stage}.{work}, sys.argv[1:])
"""
WORK = {"train": "train", "eval": "evaluate"}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def stage(name, directory, *arguments, wait=True, often=False):
    code = STAGE.format(stage=name, work=WORK[name], often=often)
    command = [sys.executable, "-c", code, "--out", str(directory), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    if wait:
        _, errors = process.communicate()
        return process.returncode, errors
    return process


def result(directory, name):
    return json.loads((directory / f"{name}.json").read_text())["metrics"]


def run_here(name, directory, *arguments):
    """A stage in this process: no second import of torch."""
    import importlib

    from shared.experiments import stage_main

    module = importlib.import_module(f"papers.darling.{name}")
    stage_main(name, Config, getattr(module, WORK[name]), ["--out", str(directory), *arguments])
    return result(directory, name)


@pytest.mark.slow
def test_killed_training_ends_as_if_nothing_had_happened(tmp_path):
    """Also over the end of an epoch: 394 prompts, 60 of them per step."""
    arguments = ("--scale", "tiny", "--arm", "ideas_darling", "--seed", "5", "steps=10", "prompts_per_step=60")
    arguments += ("num_generations=4", "sft_steps=3", "n_traces=200", "classifier_steps=3", "classifier_groups=10")
    through, killed = tmp_path / "through" / "ideas_darling" / "5", tmp_path / "killed" / "ideas_darling" / "5"
    code, errors = stage("train", through, *arguments)
    assert code == 0, errors

    process = stage("train", killed, *arguments, wait=False, often=True)
    log = killed / "log.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "train.json").exists()
    assert (killed / "state.pt").exists()

    code, errors = stage("train", killed, *arguments, often=True)
    assert code == 0, errors
    assert result(killed, "train") == result(through, "train")
    rows = [[json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()] for d in (through, killed)]
    kept = [[{k: v for k, v in row.items() if k not in ("time", "step_time")} for row in of_run] for of_run in rows]
    assert kept[0] == kept[1]
    assert not (killed / "trainer").exists()
    weights = [(d / "checkpoint" / "model.safetensors").read_bytes() for d in (through, killed)]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs of one seed share their parts."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm", ["ops_base", "ops_darling", "ops_x4gram", "ideas_base", "ideas_additive", "ideas_unlikeliness"]
)
def test_arms_of_the_generated_worlds(home, arm):
    directory = home / arm / "7"
    trained = run_here("train", directory, "--scale", "smoke", "--arm", arm, "--seed", "7")
    found = run_here("eval", directory, "--scale", "smoke", "--arm", arm, "--seed", "7")
    rows = [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == (4 if arm.startswith("ops") else 38)  # all prompts of ideas
    assert all(len(row["outputs"]) == 10 for row in rows)
    assert found["classifier_pairs"] == trained["classifier_pairs"] > 0
    assert 1 <= found["distinct"] <= 10
    assert 0 <= found["front_area"] <= 1
    assert ("pass@8" in found) == arm.startswith("ops")
    assert {"distinct_t0.5", "distinct_t1.4"} <= found.keys()
    if arm.startswith("ideas"):
        assert {"quality_tight", "quality_wide"} <= found.keys()
    if not arm.endswith("_base"):
        assert trained["updates"] == 2
        assert trained["prompts_too_long"] == 0
    parts = list((home / "starting_policies").glob("*/starting_policy.json"))
    assert len(parts) <= 4  # a policy and a classifier for each world, whatever the number of arms


@pytest.mark.slow
def test_an_arm_with_the_extra_switched_off_is_grpo(home):
    """DARLING where everything differs (Div = 1) and GRPO without the standard deviation: the same training."""
    base = ("--scale", "smoke", "--seed", "7", "num_generations=4", "n_samples=10")
    # No pair counts as equivalent above a threshold of 1; equal texts would, but the policy is close to random.
    run_here("train", home / "ops_darling" / "7", "--arm", "ops_darling", *base, "threshold=1.0", "sft_steps=1")
    run_here("train", home / "ops_grpo_no_std" / "7", "--arm", "ops_grpo_no_std", *base, "sft_steps=1")
    logs = []
    for arm in ("ops_darling", "ops_grpo_no_std"):
        rows = [json.loads(line) for line in (home / arm / "7" / "log.jsonl").read_text().splitlines()]
        logs.append([row for row in rows if row["stage"] == "train"])
    assert [row["diversity"] for row in logs[0]] == [1.0, 1.0]
    assert [(r["loss"], r["reward"], r["grad_norm"]) for r in logs[0]] == [
        (r["loss"], r["reward"], r["grad_norm"]) for r in logs[1]
    ]


SMALL = (
    "steps=2",
    "prompts_per_step=2",
    "num_generations=4",
    "n_train=4",
    "n_test=2",
    "n_samples=10",
    "max_prompt_tokens=500",
    "max_new_tokens=24",
    "eval_max_new_tokens=24",
    "micro_batch_size=2",
    "classifier_max_tokens=200",
    "bf16=false",
    "gradient_checkpointing=false",
    "vllm=false",
)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["math4b_darling", "math4b_base", "math14b_grpo"])
def test_the_papers_maths(tmp_path, qwen_chat, pair_checkpoint, arm):
    problems = [{"problem": f"What is {i} + {i % 2}?", "answer": str(1 + i % 2)} for i in range(6)]
    train = jsonl(tmp_path / "deepscaler.jsonl", [{**row, "solution": ""} for row in problems])
    tests = {
        "aime25": [{**row, "problem_idx": i} for i, row in enumerate(problems[:3])],
        "olympiadbench": [{"question": row["problem"], "final_answer": [row["answer"]]} for row in problems],
    }
    sources = [jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in tests.items()]
    directory = tmp_path / arm / "0"
    arguments = ["--scale", "paper", "--arm", arm, *SMALL, f"model={qwen_chat}", f"classifier={pair_checkpoint}"]
    arguments += [
        f"train_source={train}",
        "test_sets=[aime25,olympiadbench]",
        f"test_sources={json.dumps(list(map(str, sources)))}",
    ]
    arguments += ["updates_per_step=2", "ks=[1,8]"] + (["steps=0"] if arm.endswith("base") else [])
    trained = run_here("train", directory, *arguments)
    found = run_here("eval", directory, *arguments)
    assert 0 < found["pass@1"] < 1  # the tiny model answers 1, 2, or nothing
    assert found["pass@8"] > found["pass@1"]
    assert {"pass@1_aime25", "pass@1_olympiadbench"} <= found.keys()
    if not arm.endswith("base"):
        assert trained["updates"] == 4
    rows = [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]
    assert [row["test_set"] for row in rows] == ["aime25"] * 2 + ["olympiadbench"] * 2
    assert len({row["item"] for row in rows}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["chat8b_darling", "chat8b_base", "chat8b_unlikeliness"])
def test_the_papers_chat(tmp_path, llama_chat, pair_checkpoint, reward_checkpoint, arm):
    turns = [{"role": "user", "content": f"Tell me joke {i}", "language": "English", "toxic": False} for i in range(6)]
    train = jsonl(
        tmp_path / "wildchat.jsonl",
        [{"conversation": [turn], "conversation_hash": str(i)} for i, turn in enumerate(turns)],
    )
    test = jsonl(tmp_path / "novelty.jsonl", [{"id": f"curated-{i}", "prompt": f"Name city {i}."} for i in range(3)])
    pairs = [{"prompt": "p", "generation_0": f"a {i}", "generation_1": "b", "similar": i % 2} for i in range(4)]
    directory = tmp_path / arm / "0"
    arguments = ["--scale", "paper", "--arm", arm, *SMALL, f"model={llama_chat}", f"classifier={pair_checkpoint}"]
    arguments += [
        f"reward_model={reward_checkpoint}",
        f"eval_reward_model={reward_checkpoint}",
        f"eval_classifier={pair_checkpoint}",
    ]
    arguments += [
        f"train_source={train}",
        "test_sets=['noveltybench:curated']",
        f"test_sources=['{test}']",
        "sweep=[0.6]",
    ]
    if arm.endswith("base"):
        arguments += ["steps=0", f"pairs_source={jsonl(tmp_path / 'validation.jsonl', pairs)}"]
    trained = run_here("train", directory, *arguments)
    found = run_here("eval", directory, *arguments)
    assert {"quality", "distinct", "quality_t0.6", "distinct_t0.6", "front_area"} <= found.keys()
    if arm.endswith("base"):
        assert 0 <= found["classifier_accuracy"] <= 1
    else:
        assert trained["updates"] == 2
        log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        assert all("kl" in row and 0 <= row["shaped_quality"] <= 1 for row in log if row["stage"] == "train")


def test_bad_input_is_explained(home, tmp_path):
    run = ["--scale", "smoke", "--arm", "ops_grpo", "--seed", "7"]
    with pytest.raises(SystemExit):
        run_here("eval", tmp_path / "nothing", *run)
    from papers.darling.train import grpo_config
    from shared.experiments.run import Run

    run = Run(tmp_path, "darling", "tiny", "ops_grpo", 0, "train", "key")
    with pytest.raises(UserError, match="cannot be divided among 1 processes and updates_per_step = 3"):
        grpo_config(Config(updates_per_step=3), run)
    with pytest.raises(UserError, match="micro_batch_size = 7 does not divide the 128 completions"):
        grpo_config(Config(micro_batch_size=7), run)


def test_trl_settings_are_equation_6(tmp_path):
    from papers.darling.train import grpo_config
    from shared.experiments.run import Run

    run = Run(tmp_path, "darling", "tiny", "ops_darling", 0, "train", "key")
    found = grpo_config(
        Config(prompts_per_step=8, num_generations=4, updates_per_step=2, micro_batch_size=4, steps=5), run
    )
    assert (found.loss_type, found.scale_rewards, found.beta, found.epsilon) == ("dapo", "none", 0.0, 0.2)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps, found.steps_per_generation) == (
        4,
        4,
        8,
    )
    assert (found.generation_batch_size, found.max_steps) == (32, 10)
    assert grpo_config(Config(scale_rewards="group"), run).scale_rewards == "group"


def test_every_prompt_too_long(tmp_path, home, capsys):
    arguments = ["--scale", "smoke", "--arm", "ops_grpo", "--seed", "7", "max_prompt_tokens=3"]
    with pytest.raises(SystemExit):
        run_here("train", tmp_path / "long" / "ops_grpo" / "7", *arguments)
    assert "prompts has more than 3 tokens; the shortest: 4; raise max_prompt_tokens" in capsys.readouterr().err
