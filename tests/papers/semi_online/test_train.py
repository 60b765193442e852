import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from papers.semi_online import train
from papers.semi_online.config import Config, Recipe
from papers.semi_online.eval import evaluate
from papers.semi_online.plot import draw
from shared.experiments import UserError, files
from shared.experiments.paper import ROOT, load_paper
from shared.experiments.run import Run, resolve_config, run_key
from tests.papers.semi_online.conftest import small_config


def vector(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# ---- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "ppo"}, "method: 'ppo' is not one of none, dpo"),
        ({"phases": []}, "must be some of math, chat, both"),
        ({"phases": ["code"]}, "must be some of math, chat, both"),
        ({"method": "grpo", "phases": ["both"]}, "trains on one kind of prompts at a time"),
        ({"method": "group_dpo", "phases": ["chat"]}, "needs rewards of 0 and 1"),
        ({"method": "grpo", "entropy_weight": 0.1}, "a term of the loss of method dpo, not of grpo"),
        ({"sync_steps": 0}, "at least 1, or null for never"),
        ({"num_generations": 1}, "at least 2"),
        ({"world": "moon"}, "world: 'moon' is not one of"),
        ({"chat": Recipe(n_train=None)}, "chat.n_train: give the number of prompts"),
    ],
)
def test_bad_configs(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)
    with pytest.raises(ValueError, match="steps must be at least 1, found 0"):
        Recipe(steps=0)


def test_only_arms_with_one_task_choose_among_checkpoints():
    assert Config().selects
    assert Config(phases=["chat"]).selects
    assert not Config(phases=["both"]).selects
    assert not Config(phases=["chat", "math"]).selects
    assert not Config(method="none").selects
    assert Config(phases=["both"]).trained_tasks == Config(phases=["chat", "math"]).trained_tasks == ["math", "chat"]


def test_prompts_are_shared_out(monkeypatch):
    assert train.passes(Recipe(prompts=16)) == (16, 1)
    assert train.passes(Recipe(prompts=16, micro_prompts=4)) == (4, 4)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert train.passes(Recipe(prompts=64, micro_prompts=1)) == (1, 8)
    with pytest.raises(UserError, match="10 prompts cannot be shared by 8 processes"):
        train.passes(Recipe(prompts=10))


def test_the_arms_are_what_their_names_say(make_run):
    paper = load_paper("semi_online")

    def options(scale, arm):
        config = resolve_config(paper, Config, scale, arm, [])
        return train.dpo_options(config, getattr(config, config.phases[0]), make_run())

    for scale, rare in (("tiny", 25), ("gpu", 100), ("paper", 100)):
        for arm, s in (("offline", None), ("rare", rare), ("s10", 10), ("s1", 1), ("chat_s10", 10), ("mixed", 1)):
            found = options(scale, arm)
            assert found["sync_steps"] == s
            # The reference moves with the generator in semi-online and online training on math alone.
            moves = arm in ("rare", "s10", "s1")
            assert found.get("sync_ref_model", False) == moves
            assert found.get("ref_model_sync_steps") == (s if moves else None)
            assert found.get("ref_model_mixup_alpha", 1.0) == 1.0
    assert "sync_ref_model" not in options("tiny", "s1_frozen")
    nll = options("tiny", "s10_nll")
    assert (nll["loss_type"], nll["loss_weights"]) == (["sigmoid", "sft"], [1.0, 1.0])
    assert options("tiny", "s10")["entropy_weight"] == 0
    weights = {"s10_entropy": 1e-4, "s10_entropy_2": 2e-4, "s10_entropy_3": 3e-4, "s10_entropy_strong": 5e-4}
    weights |= {f"rare_entropy_{k}": k * 1e-4 for k in (1, 2, 3, 5)}
    for arm, weight in weights.items():
        found = options("paper", arm)
        assert (found["entropy_weight"], found["sync_steps"]) == (pytest.approx(weight), 100 if "rare" in arm else 10)


def test_the_papers_hyperparameters():
    """Tables of the paper's appendix, as our notes have them."""
    paper = load_paper("semi_online")
    config = resolve_config(paper, Config, "paper", "s10", [])
    math_, chat, both = config.math, config.chat, config.both
    assert (math_.prompts, math_.max_new_tokens, math_.beta, math_.lr) == (64, 2048, 0.1, 1e-6)
    assert (chat.prompts, chat.max_new_tokens, chat.beta, chat.lr) == (32, 1024, 0.01, 1e-6)
    assert (both.prompts, both.max_new_tokens, both.beta, both.lr) == (32, 1024, 0.01, 1e-6)
    assert [recipe.adam_epsilon for recipe in (math_, chat, both)] == [1e-4, 1e-8, 1e-8]
    assert [recipe.clip for recipe in (math_, chat, both)] == [0.1] * 3
    assert (chat.steps, chat.n_train, both.n_train, math_.kl, chat.kl) == (1500, 1000, 150_000, 1e-3, 1e-3)
    assert (config.num_generations, config.test_samples) == (8, 50)
    assert (config.eval_temperature, config.eval_top_p) == (0.6, 0.9)


# ---- training --------------------------------------------------------------------------------------------------------


def test_online_the_loss_is_log_2_for_every_usable_prompt(make_trainer):
    """s = 1 with a moving reference: at every step policy and reference are equal."""
    trainer, _ = make_trainer(small_config())
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 6
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(2) * row["rollout/usable"], abs=1e-4)
    assert any(row["rollout/usable"] > 0 for row in rows)


def test_with_a_fixed_reference_it_is_not(make_trainer):
    fixed = {"sync_reference": False, "lr": 1e-2}
    trainer, _ = make_trainer(small_config(phases=["chat"], recipe=fixed), "chat")
    reference = vector(trainer.ref_model)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert abs(rows[-1]["loss"] - math.log(2) * rows[-1]["rollout/usable"]) > 1e-3
    assert torch.equal(vector(trainer.ref_model), reference)


def test_offline_samples_and_reference_are_the_starting_policys(make_trainer):
    trainer, _ = make_trainer(small_config(sync_steps=None, phases=["chat"]), "chat")
    start = vector(trainer.policy)
    trainer.train()
    assert torch.equal(vector(trainer.generator.model), start)
    assert torch.equal(vector(trainer.ref_model), start)
    assert not torch.equal(vector(trainer.policy), start)


def test_every_arm_samples_as_many_prompts(make_trainer):
    """Same prompts and responses per step for DPO and GRPO, the whole interval at once for s > 1."""
    for s in (1, 3, None):
        trainer, _ = make_trainer(small_config(sync_steps=s, phases=["chat"]), "chat")
        trainer.train()
        spent = trainer._spent
        assert spent["calls"] == {1: 6, 3: 2, None: 1}[s]
        lengths = [row["rollout/length"] for row in trainer.state.log_history if "loss" in row]
        assert spent["tokens"] == pytest.approx(sum(lengths) * 4 * 6)
    grpo, _ = make_trainer(small_config(method="grpo", phases=["chat"]), "chat")
    assert grpo.args.per_device_train_batch_size * grpo.args.gradient_accumulation_steps == 4 * 6
    assert grpo.args.generation_batch_size == 4 * 6


ARMS = {
    "base": {"method": "none"},
    "offline": {"sync_steps": None},
    "s10": {"sync_steps": 3},
    "s1": {},
    "grpo": {"method": "grpo"},
    "group_dpo": {"method": "group_dpo", "sync_steps": 3},
    "group_dpo_grpo": {"method": "group_dpo", "sync_steps": 3, "grpo_weight": 0.01},
    "s10_nll": {"sync_steps": 3, "nll_weight": 1.0},
    "s10_entropy": {"sync_steps": 3, "entropy_weight": 0.1},
    "s1_frozen": {"recipe": {"sync_reference": False}},
    "chat_offline": {"phases": ["chat"], "sync_steps": None},
    "chat_s1": {"phases": ["chat"]},
    "chat_grpo": {"phases": ["chat"], "method": "grpo"},
    "mixed": {"phases": ["both"]},
    "chat_then_math": {"phases": ["chat", "math"]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of every kind of arm, trained and evaluated: runs/semi_online/tiny."""
    home = tmp_path_factory.mktemp("all") / "tiny"
    for arm, options in ARMS.items():
        for seed in (0, 1) if arm in ("base", "s1") else (0,):
            directory = home / arm / str(seed)
            directory.mkdir(parents=True)
            for stage, work in (("train", train.train), ("eval", evaluate)):
                run = Run(directory, "semi_online", "tiny", arm, seed, stage, f"{stage}-key")
                run.begin()
                torch.manual_seed(seed)
                run.finish(work(small_config(**options), run), small_config(**options))
    files.write_json(home / "runs.json", [[arm, 0] for arm in ARMS])
    return home


def test_every_kind_of_arm_trains_and_is_evaluated(runs):
    for arm, options in ARMS.items():
        config = small_config(**options)
        metrics = files.read_json(runs / arm / "0" / "eval.json")["metrics"]
        assert {"accuracy_last", "win_rate_last", "gold_last", "policy_entropy_ratio"} <= metrics.keys()
        assert ("accuracy" in metrics) == (arm == "base" or config.phases == ["math"])
        assert ("win_rate" in metrics) == (arm == "base" or config.phases == ["chat"])
        assert ("best_step" in metrics) == config.selects
        items = [row["item"] for row in files.read_jsonl(runs / arm / "0" / "predictions.jsonl")]
        assert items == [f"math/{i}" for i in range(6)] + [f"chat/{i}" for i in range(6)]
    base = files.read_json(runs / "base" / "0" / "eval.json")["metrics"]
    assert base["win_rate"] == base["win_rate_last"] == 0.5
    assert base["policy_entropy_ratio"] == 1.0
    two = files.read_jsonl(runs / "chat_then_math" / "0" / "phase1" / "log.jsonl")
    assert len(two) == 6


def test_arms_of_a_seed_start_from_the_same_policy_and_move_away(runs):
    from transformers import AutoModelForCausalLM

    def weights(path):
        return vector(AutoModelForCausalLM.from_pretrained(path))

    start = weights(runs / "base" / "0" / "checkpoint")
    for arm in ARMS:
        if arm != "base":
            assert not torch.equal(weights(runs / arm / "0" / "checkpoint"), start), arm
    assert not torch.equal(start, weights(runs / "base" / "1" / "checkpoint"))
    snapshots = sorted(int(path.name) for path in (runs / "s1" / "0" / "snapshots").iterdir())
    assert snapshots == [2, 4]


def test_figures_are_drawn_from_the_runs(runs, tmp_path):
    draw(runs, tmp_path)
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {figure.file for figure in load_paper("semi_online").figures if "tiny" in figure.scales}


def test_curves_have_gaps_where_steps_have_no_value():
    from papers.semi_online.plot import SMOOTH, Arms

    arms = Arms.__new__(Arms)
    values = [[float(i * i % 7) for i in range(3 * SMOOTH)] for _ in range(2)]
    values[0][1] = None
    values[1][SMOOTH : 2 * SMOOTH] = [None] * SMOOTH
    rows = [[{"stage": "train", "loss": 0.0} | ({} if v is None else {"x": v}) for v in of] for of in values]
    arms.logs = {"a": dict(enumerate(rows)), "never": {0: [{"stage": "train", "loss": 0.0}]}}
    steps_X, y_SX = arms.rollouts("a", "x")
    assert steps_X[0] == (SMOOTH + 1) / 2
    for y_X, of in zip(y_SX, values, strict=True):
        windows = [[v for v in of[i : i + SMOOTH] if v is not None] for i in range(2 * SMOOTH + 1)]
        np.testing.assert_allclose(y_X, [np.mean(w) if w else np.nan for w in windows])
    assert np.isnan(y_SX[1]).sum() == 1
    assert arms.rollouts("never", "x") is None


def test_figures_without_their_arms_are_left_out(runs, tmp_path):
    files.write_json(runs / "runs.json", [["base", 0], ["chat_s1", 0]])
    try:
        draw(runs, tmp_path)
    finally:
        files.write_json(runs / "runs.json", [[arm, 0] for arm in ARMS])
    assert {path.stem for path in tmp_path.glob("*.png")} == {"accuracy", "chat"}


def test_a_first_phase_that_another_arm_has_trained_is_taken_from_it(tmp_path):
    """It is what would have been trained; with other config or code it would not."""
    alone, both = small_config(phases=["chat"]), small_config(phases=["chat", "math"])

    def trained(arm: str, config: Config) -> Run:
        key = run_key(load_paper("semi_online"), "train", config, arm, 0)
        run = Run(tmp_path / arm / "0", "semi_online", "tiny", arm, 0, "train", key)
        run.dir.mkdir(parents=True)
        run.begin()
        run.finish(train.train(config, run), config)
        return run

    before, chat, after = trained("before", both), trained("chat", alone), trained("after", both)
    assert (before.dir / "phase1").exists()
    assert not (after.dir / "phase1").exists()
    weights = [(run.checkpoint / "model.safetensors").read_bytes() for run in (before, after, chat)]
    assert weights[0] == weights[1] != weights[2]
    assert train.arm_of_phase(both, "chat", after) == chat.checkpoint
    assert train.arm_of_phase(small_config(phases=["chat", "math"], sync_steps=2), "chat", after) is None
    record = files.read_json(chat.dir / "train.json")
    files.write_json(chat.dir / "train.json", {**record, "key": "of other code"})
    assert train.arm_of_phase(both, "chat", after) is None


# ---- resuming --------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from papers.semi_online import train
from shared.experiments.run import Run, stage_main

Run.due = lambda self, every=20.0: True  # save after every step, so that a kill finds something to resume from
stage_main("train", train.Config, train.train, sys.argv[1:])
"""
TINY = [
    *(
        f"generated.{key}"
        for key in (
            "n_ops=[2,2]",
            "modulus=5",
            "layers=1",
            "width=16",
            "heads=2",
            "mlp_width=32",
            "gated=false",
            "reward_pairs=64",
        )
    ),
    *(f"generated.{key}" for key in ("sft_steps=100", "sft_lr=0.01", "sft_batch_size=16", "reward_steps=3")),
    *("n_dev=6", "n_test=6", "save_every=5", "math.steps=16", "chat.steps=8", "math.prompts=4", "chat.prompts=4"),
]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_killed_training_ends_as_if_nothing_had_happened(tmp_path):
    """In the second phase, in the middle of an interval between two copies to the generator."""
    arguments = ["--scale", "tiny", "--arm", "chat_then_math", "--seed", "5", "sync_steps=5", *TINY]
    through, killed = tmp_path / "through", tmp_path / "killed"

    def start(directory) -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, "--out", str(directory), *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    process = start(through)
    output, _ = process.communicate()
    assert process.returncode == 0, output

    process = start(killed)
    log = killed / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 12):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "train.json").exists()
    assert (killed / "state.pt").exists()
    process = start(killed)
    output, _ = process.communicate()
    assert process.returncode == 0, output

    found = [json.loads((directory / "train.json").read_text())["metrics"] for directory in (through, killed)]
    assert found[0] == found[1]
    changing = ("time", "rollout/calls", "rollout/tokens", "rollout/seconds", "num_tokens")
    logs = [[{k: v for k, v in row.items() if k not in changing} for row in files.read_jsonl(d / "log.jsonl")]
            for d in (through, killed)]  # fmt: skip
    assert len(logs[0]) == 16
    assert logs[0] == logs[1]
    assert any(row["rollout/usable"] > 0 for row in logs[0])
    for step in (5, 10, 15):
        weights = [(d / "snapshots" / str(step) / "model.safetensors").read_bytes() for d in (through, killed)]
        assert weights[0] == weights[1]


# ---- scale paper -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["base", "rare", "group_dpo_grpo", "grpo", "chat_s10", "chat_grpo", "mixed"])
def test_the_paper_config_runs_with_a_small_model(arm, llama_chat, reward_checkpoint, sources, make_run):
    """Llama's chat template, math-verify, a reward model read at its CLS token; vLLM replaced by transformers."""
    small = [f"hub.model={llama_chat}", f"hub.reward_model={reward_checkpoint}", "use_vllm=false"]
    small += ["n_dev=3", "n_test=2", "test_samples=2", "save_every=1", "num_generations=4"]
    small += ["chat.n_train=8", "both.n_train=9"]
    for phase in ("math", "chat", "both"):
        small += [f"{phase}.{key}" for key in ("steps=2", "prompts=2", "max_new_tokens=12")]
    small += [f"hub.sources.{name}={path}" for name, path in sources.items()]
    config = resolve_config(load_paper("semi_online"), Config, "paper", arm, small)
    run = make_run(arm)
    found = train.train(config, run)
    assert all(math.isfinite(value) for value in found.values())
    metrics = evaluate(config, make_run(arm, stage="eval"))
    assert {"accuracy_last", "accuracy_numinamath_last", "accuracy_amc23_last", "win_rate_last"} <= metrics.keys()
    assert "gold_last" not in metrics
    if arm == "base":
        assert metrics["win_rate_last"] == 0.5
        return
    rows = [row for row in files.read_jsonl(run.dir / "log.jsonl") if row["stage"] == "train"]
    assert len(rows) == 2
    assert np.isfinite([row["loss"] for row in rows]).all()
    if arm == "chat_s10":
        assert all(row["rollout/usable"] > 0 for row in rows)
