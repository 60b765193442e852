import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from papers.divpo.config import Config
from papers.divpo.eval import evaluate
from papers.divpo.method import DivPO, all_equal, by_measure, improbability, rewards_of
from papers.divpo.tasks import build_policy, load_reward, load_rows
from papers.divpo.train import train, trainer_config
from shared.experiments import UserError, files
from shared.experiments.paper import ROOT
from shared.training.pairs import best_vs_worst
from tests.papers.divpo.conftest import SMALL, at_scale


def make_trainer(config: Config, run, start, select_all=None):
    from papers.divpo.trainer import DivPOTrainer
    from shared.training.runs import load_policy

    model, tokenizer = load_policy(start)
    return DivPOTrainer(
        model,
        args=trainer_config(config, run),
        config=config,
        rows=load_rows(config, "train"),
        reward=load_reward(config),
        select_all=select_all or (lambda pools: [best_vs_worst(pool) for pool in pools]),
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """By task, a small starting policy."""
    found = {}
    for task in ("persona", "keywords"):
        found[task] = tmp_path_factory.mktemp(task)
        build_policy(Config(**{**SMALL, "task": task}), 0, found[task])
    return found


def log_probability(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """ln pi(y|x), summed over the tokens of y."""
    logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + t - 1, token] for t, token in enumerate(completion))


@pytest.mark.parametrize("task", ["persona", "keywords"])
def test_the_loss_is_dpos_on_the_selected_pairs(task, small, policies, make_run):
    """Eq. 1 in float64, for a policy that has moved away from its reference; void prompts count in the mean."""
    config = small(task=task, prompts_per_step=8, beta=0.3)
    trainer = make_trainer(config, make_run(), policies[task], DivPO(by_measure(improbability), 0.3))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    pools = trainer.make_pools(trainer.rows_at(0), seed=1)
    # One pool of equal rewards: it gives no pair.
    pools[3] = type(pools[3])(pools[3].row, pools[3].completions, [1.0] * config.num_generations, [])
    assert sum(len(pool.pairs) for pool in pools) >= 3
    loss = trainer._compute_loss(trainer.model, trainer.build_inputs(pools), return_outputs=False)

    policy, reference = trainer.model.double(), trainer.ref_model.double()
    expected = torch.zeros((), dtype=torch.float64)
    for pool in pools:
        prompt = trainer.processing_class(pool.row["prompt"])["input_ids"]
        for pair in pool.pairs:
            ratio = [
                log_probability(policy, prompt, pool.completions[i].token_ids)
                - log_probability(reference, prompt, pool.completions[i].token_ids)
                for i in pair
            ]
            expected = expected - torch.nn.functional.logsigmoid(0.3 * (ratio[0] - ratio[1])) / len(pools)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_divpo_without_its_criterion_trains_as_dpo(small, policies, make_run):
    from shared.training.runs import fit

    trained = []
    for name, select in (
        ("dpo", None),
        ("divpo", DivPO(by_measure(lambda pool: np.zeros(len(pool.completions))), 0.0)),
    ):
        run = make_run(name=name)
        torch.manual_seed(0)
        trainer = make_trainer(small(task="keywords"), run, policies["keywords"], select)
        fit(trainer, run)
        trained.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_pairs_are_selected_for_all_prompts_at_once(small, policies, make_run):
    seen = []

    def select_all(pools):
        seen.append(len(pools))
        return [best_vs_worst(pool) for pool in pools]

    config = small(prompts_per_step=6)
    trainer = make_trainer(config, make_run(), policies["persona"], select_all)
    pools = trainer.make_pools(trainer.rows_at(0), seed=1)
    assert seen == [6]
    assert [pool.pairs for pool in pools] == [best_vs_worst(pool) for pool in pools]
    # The measure is that of the sampler: log-probabilities come with the samples.
    assert all(np.isfinite(improbability(pool)).all() for pool in pools)


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("online", [True, False])
def test_online_means_sampling_from_the_policy_itself(online, small, policies, make_run):
    from shared.training.runs import fit

    run = make_run()
    trainer = make_trainer(small(task="keywords", online=online), run, policies["keywords"])
    start = weights(trainer.model)
    fit(trainer, run)
    assert not torch.equal(weights(trainer.model), start)
    sampled_from = weights(trainer.generator.sampler.model)
    assert torch.equal(sampled_from, weights(trainer.model) if online else start)
    rows = files.read_jsonl(run.dir / "log.jsonl")
    assert all("rollout/unique" in row and "rollout/equal" in row for row in rows)


def test_training_reports_what_became_of_the_samples(small, make_run):
    run = make_run(arm="persona_dpo")
    metrics = train(small(method="dpo"), run)
    rows = files.read_jsonl(run.dir / "log.jsonl")
    assert metrics["usable"] == pytest.approx(np.mean([row["rollout/usable"] for row in rows]))
    assert metrics["equal"] == pytest.approx(1 - metrics["usable"])  # the only reason for which DPO has no pair


def test_sft_minimizes_the_negative_log_likelihood_of_the_best_samples(small, policies, make_run):
    config = small(task="keywords", method="sft", online=False, prompts_per_step=8)
    trainer = make_trainer(config, make_run(), policies["keywords"])
    pools = trainer.make_pools(range(8), seed=1)
    inputs = trainer.build_inputs(pools)
    loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)

    total, tokens = 0.0, 0
    for pool in pools:
        best = max(range(len(pool.rewards)), key=pool.rewards.__getitem__)
        prompt = trainer.processing_class(pool.row["prompt"])["input_ids"]
        total -= log_probability(trainer.model, prompt, pool.completions[best].token_ids).item()
        tokens += len(pool.completions[best].token_ids)
    assert loss.item() == pytest.approx(total / tokens, abs=1e-5)


def test_base_is_the_starting_policy(small, make_run):
    from safetensors.torch import load_file

    config, run = small(method="base"), make_run(arm="persona_base")
    assert train(config, run) == {"steps": 0}
    (start,) = (run.dir.parents[1] / "starting_policies").glob("*/model.safetensors")
    first, second = load_file(start), load_file(run.checkpoint / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Another arm of the seed finds it there.
    train(small(steps=1), make_run(arm="persona_divpo"))
    assert len(list((run.dir.parents[1] / "starting_policies").glob("*/model.safetensors"))) == 1


def test_equal_rewards_are_counted(small, policies, make_run):
    trainer = make_trainer(small(prompts_per_step=6, num_generations=2), make_run(), policies["persona"])
    pools = trainer.make_pools(trainer.rows_at(0), seed=1)
    trainer._log_rollouts(pools)
    equal = trainer._metrics["train"]["rollout/equal"]
    assert equal == [np.mean(all_equal(rewards_of(pools)))]
    assert 0 < equal[0] < 1


# ---- GRPO ----


def make_grpo(config: Config, run, start):
    from papers.divpo.train import make_trainer as make
    from shared.training.runs import load_policy

    return make(config, run, *load_policy(start))


def test_trl_settings_of_grpo_are_dapo_with_the_groups_standard_deviation(small, make_run):
    """The loss is Eq. 6 of DARLING (tests/shared/training/test_grpo.py), with advantages as in its Eq. 3."""
    config = small(method="grpo", prompts_per_step=8, micro_batch_size=2, max_new_tokens=9, beta=0.7)
    found = trainer_config(config, make_run())
    assert (found.loss_type, found.scale_rewards, found.num_iterations) == ("dapo", "group", 1)
    assert found.beta == 0  # `beta` is DPO's
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (2 * 6, 4)
    assert found.generation_batch_size == 8 * 6  # all of a step is sampled from the policy before it
    assert (found.temperature, found.top_p, found.top_k, found.max_completion_length) == (1, 1, 0, 9)


@pytest.mark.parametrize("scale", ["tiny", "gpu", "paper"])
@pytest.mark.parametrize("task", ["persona", "keywords"])
def test_grpo_has_the_budget_and_learning_rate_of_online_dpo(scale, task):
    grpo, dpo = at_scale(scale, f"{task}_grpo"), at_scale(scale, f"{task}_dpo")
    same = ("lr", "steps", "prompts_per_step", "num_generations", "max_new_tokens", "online", "train_prompts", "model")
    for name in same:
        assert getattr(grpo, name) == getattr(dpo, name), name


def test_grpo_meets_the_prompts_of_dpo(small, policies, make_run):
    config = small(task="keywords", steps=12, prompts_per_step=4, micro_batch_size=2)
    rows = load_rows(config, "train")
    assert len(rows) < 12 * 4  # some a second time
    dpo = make_trainer(config, make_run(), policies["keywords"])
    expected = [rows[i]["item"] for step in range(config.steps) for i in dpo.rows_at(step)]
    grpo = make_grpo(small(**{**vars(config), "method": "grpo"}), make_run(name="grpo"), policies["keywords"])
    # TRL's loader repeats the batch of a step for each of its backward passes.
    batches = list(grpo.get_train_dataloader())[:: grpo.args.steps_per_generation]
    found = [row["item"] for batch in batches for row in batch]
    assert found[:: config.num_generations] == expected
    assert found == [item for item in expected for _ in range(config.num_generations)]


@pytest.mark.parametrize("task", ["persona", "keywords"])
def test_grpo_logs_and_returns_what_the_other_arms_do(task, small, make_run):
    run = make_run(arm=f"{task}_grpo")
    metrics = train(small(task=task, method="grpo", micro_batch_size=2), run)
    rows = files.read_jsonl(run.dir / "log.jsonl")
    assert len(rows) == metrics["steps"] == 3
    for row in rows:  # against TRL's own numbers
        assert row["rollout/reward"] == pytest.approx(row["reward"], abs=1e-5)
        assert row["rollout/equal"] == pytest.approx(row["frac_reward_zero_std"], abs=1e-5)
        assert row["rollout/unique"] > 0
    assert metrics["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]), abs=1e-5)
    assert metrics["truncated"] == pytest.approx(np.mean([row["completions/clipped_ratio"] for row in rows]), abs=1e-5)
    assert evaluate(small(task=task), make_run("eval", arm=f"{task}_grpo"))["valid"] > 0


def test_grpo_learns_nothing_where_all_samples_are_valid(small, policies, make_run):
    """1, like 0, is its group's mean exactly; of .3 the mean differs by rounding, and Adam takes steps of full size."""
    from shared.training.runs import fit

    run = make_run()
    trainer = make_grpo(small(method="grpo", steps=2), run, policies["persona"])
    trainer.reward_funcs[0].reward = lambda prompts, completions, **columns: [1.0] * len(completions)
    before = weights(trainer.model)
    fit(trainer, run)
    assert torch.equal(weights(trainer.model), before)


def test_the_logged_reward_is_the_reward(small):
    from papers.divpo.trainer import LoggedReward

    logged = {}
    values = [1.0, None, 3.0, 2.0, 2.0, None]
    reward = LoggedReward(lambda prompts, completions, **columns: values, small(task="keywords", num_generations=3))
    found = reward(["p"] * 6, ["a b", "b", "c", "d d", "d", "d"], log_metric=logged.__setitem__, topic=["t"] * 6)
    assert found == values
    assert logged == {"rollout/reward": 2.0, "rollout/equal": 0.5, "rollout/unique": 2.0}


def test_a_logged_reward_that_is_not_a_number_stops_training(small):
    from papers.divpo.trainer import LoggedReward

    reward = LoggedReward(lambda prompts, completions, **columns: [1.0, float("nan")], small(num_generations=2))
    with pytest.raises(ValueError, match="nan for row 1"):
        reward(["p"] * 2, ["a", "b"], log_metric=print)


# ---- bad input ----


def test_a_reward_that_is_not_a_number_stops_training(small, policies, make_run):
    trainer = make_trainer(small(), make_run(), policies["persona"])
    trainer.reward = lambda prompts, completions, **columns: [1.0] * 5 + [float("nan")] * (len(completions) - 5)
    with pytest.raises(ValueError, match="returned nan for row 5"):
        trainer.make_pools(trainer.rows_at(0), seed=1)


def test_a_reward_of_the_wrong_length_stops_training(small, policies, make_run):
    trainer = make_trainer(small(), make_run(), policies["persona"])
    trainer.reward = lambda prompts, completions, **columns: [1.0]
    with pytest.raises(ValueError, match="1 rewards for 24 completions"):
        trainer.make_pools(trainer.rows_at(0), seed=1)


def test_prompts_per_step_must_divide(small, make_run):
    with pytest.raises(UserError, match="prompts_per_step=4 is no multiple of micro_batch_size=3"):
        trainer_config(small(micro_batch_size=3), make_run())


def test_a_step_without_any_pair_changes_nothing(small, policies, make_run):
    from shared.training.runs import fit

    run = make_run()
    trainer = make_trainer(small(steps=2), run, policies["persona"], lambda pools: [[] for _ in pools])
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    fit(trainer, run)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert all(row["rollout/usable"] == 0 for row in files.read_jsonl(run.dir / "log.jsonl"))


# ---- every scale ----


@pytest.fixture
def small_paper(chat_models, armo_checkpoint, reward_checkpoint, wildchat):
    """configs/paper.yaml with other paths, sizes and backend, and nothing else."""

    def make(arm: str) -> Config:
        task = arm.split("_")[0]
        values = {
            "model": str(chat_models[task]),
            "reward_model": str(reward_checkpoint if task == "instruct" else armo_checkpoint),
            "prompts": str(wildchat),
            "sampler": "transformers",
            "steps": 2,
            "prompts_per_step": 2,
            "num_generations": 6,
            "max_new_tokens": 70,
            "train_prompts": 8,
            "test_prompts": 2,
            "n_samples": 12,
            "unique_first": 2,
            "samples_per_prompt": 3,
            "story_tokens": 8,
            "matched_unique": 0,
        }
        if arm == "keywords_divpo_judge":
            values |= {"judge_backend": "transformers", "judge_model": str(chat_models["instruct"])}
        return at_scale("paper", arm, **values)

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm",
    [
        "persona_divpo",
        "persona_sft",
        "persona_grpo",
        "keywords_divpo",
        "keywords_divpo_judge",
        "keywords_grpo",
        "instruct_divpo",
    ],
)
def test_the_papers_scale_runs_on_small_checkpoints(arm, small_paper, make_run):
    config = small_paper(arm)
    assert config.bf16
    assert config.gradient_checkpointing
    metrics = train(config, make_run(arm=arm, scale="paper"))
    assert metrics["steps"] == 2
    assert (metrics.get("judge_unparsable", 0) > 0) == (arm == "keywords_divpo_judge")  # a model that says nothing
    run = make_run("eval", arm=arm, scale="paper")
    found = evaluate(config, run)
    rows = files.read_jsonl(run.dir / "predictions.jsonl")
    if arm.startswith("persona"):
        assert 0 < found["valid"] < 1
        assert 1 / 2 <= found["unique"] <= 1
    else:
        assert [len(row["outputs"]) for row in rows] == [3, 3]
        assert found["unique"] > 0
        assert ("story_reward" in found) == (arm == "keywords_divpo")


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["persona_divpo_all_equal", "keywords_divpo_quantile", "keywords_grpo"])
def test_the_gpu_scale_runs_when_it_is_small(arm, make_run):
    config = at_scale("gpu", arm, **SMALL, matched_unique=0)
    train(config, make_run(arm=arm, scale="gpu"))
    assert evaluate(config, make_run("eval", arm=arm, scale="gpu"))["valid"] > 0


# ---- a kill ----

SCRIPT = """
import functools, pathlib, sys
import torch
from papers.divpo.train import train
from shared.experiments.run import Run
from shared.training import runs
from tests.papers.divpo.conftest import SMALL
from papers.divpo.config import Config

torch.set_num_threads(1)
torch.manual_seed(0)
runs.fit = functools.partial(runs.fit, save_every=0)  # as often as the time that saving takes allows
method = sys.argv[2]
run = Run(pathlib.Path(sys.argv[1]), "divpo", "tiny", f"persona_{method}", 0, "train", "key")
run.dir.mkdir(parents=True, exist_ok=True)
run.begin()
sizes = {"sft_steps": 60, "least_competence": 0.0, "steps": 30, "lr": 1e-3}
config = Config(**{**SMALL, **sizes, "method": method})
run.finish(train(config, run), config)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["divpo", "grpo"])
def test_killed_training_ends_as_if_nothing_had_happened(method, tmp_path):
    def start(directory):
        command = [sys.executable, "-c", SCRIPT, str(directory), method]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    through, killed = tmp_path / "through", tmp_path / "killed"
    process = start(killed)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not (killed / "state.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (killed / "state.pt").exists()
    assert not (killed / "train.json").exists()
    for directory in (killed, through):
        process = start(directory)
        assert process.wait() == 0, process.stderr.read()

    rows = [files.read_jsonl(directory / "log.jsonl") for directory in (through, killed)]
    names = ("step", "loss", "rollout/reward", "rollout/unique", "rollout/usable", "rollout/entropy", "entropy")
    logged = [[[row.get(name) for name in names] for row in of_run] for of_run in rows]
    assert logged[0] == logged[1]
    assert len(rows[0]) == 30
    first, second = (files.read_json(directory / "train.json")["metrics"] for directory in (through, killed))
    assert first == second
