"""Train one arm: offline, semi-online or online DPO, GroupDPO, or GRPO (Section 3).

    python -m papers.semi_online.train --scale tiny --arm s10 --seed 0

An arm trains in one or two phases (kinds of prompts). Checkpoints of its last phase, every `save_every` optimizer
steps, are kept in snapshots/STEP for evaluation to choose from; the last one is the run's checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papers.semi_online.config import Config, Recipe
from papers.semi_online.worlds import Rewards, starting_points, train_rows
from shared.experiments import Run, UserError, files, stage_main
from shared.experiments.paper import load_paper
from shared.experiments.run import run_key

if TYPE_CHECKING:
    from transformers import Trainer

    from shared.training.pairs import Pairs, Pool


def train(config: Config, run: Run) -> dict[str, float]:
    """Trains, keeps a resumable state, and writes run.checkpoint. Returns means over the last tenth of the steps."""
    from shared.training.runs import copy_policy
    from shared.training.starting_policy import RECORD, measured

    policy, reward_model = starting_points(config, run)
    found = {}
    for name, path in (("policy", policy), ("reward_model", reward_model)):
        if isinstance(path, Path) and (path / RECORD).exists():
            found |= {f"{name}_{key}": value for key, value in measured(path).items()}
    if config.method == "none":
        copy_policy(policy, run)
        return found
    rewards = Rewards(config, reward_model)
    for number, phase in enumerate(config.phases[:-1]):
        if number == 0 and (same := arm_of_phase(config, phase, run)):
            policy = same
            continue
        # An earlier phase is a run of its own, in a directory of its own, so that each can resume.
        part = dataclasses.replace(run, dir=run.dir / f"phase{number + 1}")
        record = part.dir / "train.json"
        if not (record.exists() and files.read_json(record)["key"] == run.key):
            part.dir.mkdir(exist_ok=True)
            part.finish(train_phase(config, phase, part, policy, rewards, snapshots=False), config)
        policy = part.checkpoint
    return found | train_phase(config, config.phases[-1], run, policy, rewards, snapshots=True)


def arm_of_phase(config: Config, phase: str, run: Run) -> Path | None:
    """The checkpoint of a finished arm that is this first phase alone, with the same seed, config and code: what would
    be trained is the same to the last bit. (The paper's chat-then-math run starts from its chat run.)"""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or run.dir.parent.name != run.arm:
        return None  # processes might disagree whether it has finished; a run that was put elsewhere has no others
    alone = dataclasses.replace(config, phases=[phase])
    for record in sorted(run.dir.parents[1].glob(f"*/{run.seed}/train.json")):
        found = files.read_json(record)
        if found["config"] == dataclasses.asdict(alone):
            key = run_key(load_paper(run.paper), "train", alone, found["arm"], run.seed)
            if found["key"] == key and (checkpoint := record.with_name("checkpoint")).is_dir():
                return checkpoint
    return None


def train_phase(
    config: Config, phase: str, run: Run, policy: Path | str, rewards: Rewards, snapshots: bool
) -> dict[str, float]:
    """Trains `policy` on one kind of prompts; the result is run.checkpoint."""
    from shared.training.runs import fit, save_policy

    rows = train_rows(config, phase, run.seed)
    trainer, tokenizer = make_trainer(config, phase, run, policy, rewards, rows)
    if snapshots:
        trainer.add_callback(snapshot_callback(trainer, tokenizer, run, config.save_every))
    fit(trainer, run)
    save_policy(trainer, tokenizer, run)
    return last_tenth(trainer.state.log_history)


def make_trainer(
    config: Config, phase: str, run: Run, policy: Path | str, rewards: Rewards, rows: list[dict]
) -> tuple[Trainer, Any]:
    """(TRL's trainer of the arm's method, tokenizer)."""
    from shared.training.runs import load_policy

    # Weights in float32: steps of 1e-6 would be lost in bfloat16.
    model, tokenizer = load_policy(policy)
    recipe: Recipe = getattr(config, phase)
    if config.method == "grpo":
        from trl import GRPOConfig

        from shared.generation.text import context_length, engine_length
        from shared.training.grpo import GRPOTrainer, prompt_stream

        arguments = GRPOConfig(**grpo_options(config, recipe, run))
        if config.use_vllm:
            prompts = [row["prompt"] for row in rows]
            context = context_length(model.config)
            arguments.vllm_max_model_length = engine_length(prompts, tokenizer, recipe.max_new_tokens, context)
        kept = ("prompt", "task", "answer")  # columns of one type in all rows
        table = [{name: row[name] for name in kept if name in row} for row in rows]
        # The prompts of each step are those of the DPO arms.
        stream = prompt_stream(table, recipe.steps * recipe.prompts, run.seed)
        return GRPOTrainer(model, rewards, arguments, train_dataset=stream, processing_class=tokenizer), tokenizer

    from papers.semi_online.method import GroupDPOTrainer
    from shared.training.preference import PreferenceConfig, PreferenceTrainer

    arguments = PreferenceConfig(**dpo_options(config, recipe, run))
    kind, more = PreferenceTrainer, {}
    if config.method == "group_dpo":
        kind, more = GroupDPOTrainer, {"grpo_weight": config.grpo_weight}
    trainer = kind(model, arguments, rows=rows, reward=rewards, select=select, tokenizer=tokenizer, **more)
    return trainer, tokenizer


def select(pool: Pool) -> Pairs:
    """Pairs by the row's task (Section 3.4): right against wrong, or best against worst."""
    from shared.training.pairs import best_vs_worst, right_vs_wrong

    return right_vs_wrong(pool) if pool.row["task"] == "math" else best_vs_worst(pool)


def common_options(config: Config, recipe: Recipe, run: Run) -> dict[str, Any]:
    """AdamW with a constant learning rate; betas and schedule are the defaults of the authors' code."""
    from shared.training.runs import trainer_options

    return trainer_options(
        run,
        max_steps=recipe.steps,
        learning_rate=recipe.lr,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=recipe.adam_epsilon,
        max_grad_norm=recipe.clip,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        num_generations=config.num_generations,
        use_vllm=config.use_vllm,
        vllm_mode=config.vllm_mode,
        vllm_server_base_url=config.vllm_url,
        vllm_gpu_memory_utilization=config.vllm_memory,
    )


def passes(recipe: Recipe) -> tuple[int, int]:
    """(prompts of a backward pass in a process, backward passes of a step)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    mine = recipe.prompts // world
    size = min(recipe.micro_prompts or mine, mine)
    if not size or recipe.prompts % world or mine % size:
        raise UserError(f"{recipe.prompts} prompts cannot be shared by {world} processes in passes of {size}")
    return size, mine // size


def dpo_options(config: Config, recipe: Recipe, run: Run) -> dict[str, Any]:
    """For PreferenceConfig. The reference moves with the generator: the paper's s_ref = s."""
    size, accumulated = passes(recipe)
    options = {
        **common_options(config, recipe, run),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulated,
        "sync_steps": config.sync_steps,
        "entropy_weight": config.entropy_weight,
        "beta": recipe.beta,
        "max_new_tokens": recipe.max_new_tokens,
        "generation_batch_size": config.generation_batch_size,
    }
    if config.nll_weight:
        options |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, config.nll_weight]}
    if recipe.sync_reference and config.sync_steps is not None:
        options |= {
            "sync_ref_model": True,
            "ref_model_mixup_alpha": 1.0,
            "ref_model_sync_steps": config.sync_steps,
        }
    return options


def grpo_options(config: Config, recipe: Recipe, run: Run) -> dict[str, Any]:
    """For GRPOConfig: Eq. 1, on-policy unless s > 1.

    TRL's loss `dr_grpo` is the sum over tokens divided by B N and by the longest response, a constant that Eq. 1 does
    not have. AdamW does not see a constant factor if the clipping norm and epsilon are multiplied by it as well.
    """
    size, accumulated = passes(recipe)
    factor = 1 / recipe.max_new_tokens
    common = common_options(config, recipe, run)
    common["max_grad_norm"] *= factor
    common["adam_epsilon"] *= factor
    return {
        **common,
        "per_device_train_batch_size": size * config.num_generations,
        "gradient_accumulation_steps": accumulated,
        "steps_per_generation": accumulated * (config.sync_steps or recipe.steps),
        "num_iterations": 1,
        "shuffle_dataset": False,
        "max_completion_length": recipe.max_new_tokens,
        "loss_type": "dr_grpo",
        "scale_rewards": "group" if config.advantage_std else "none",
        "beta": recipe.kl,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "use_bias_correction_kl": False,
        "vllm_importance_sampling_correction": False,
    }


def snapshot_callback(trainer: Trainer, tokenizer, run: Run, every: int):
    """Keeps the policy of every `every`-th step but the last in snapshots/STEP, whole or not at all."""
    from transformers import TrainerCallback

    from shared.training.runs import save_policy

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step % every or state.global_step >= state.max_steps:
                return
            save_policy(trainer, tokenizer, run, snapshot(run, state.global_step))

    return Keep()


def snapshot(run: Run, step: int) -> Path:
    return run.dir / "snapshots" / str(step)


def last_tenth(history: list[dict]) -> dict[str, float]:
    """Means of what the trainer logged in the last tenth of its steps, under names that both trainers share."""
    import numpy as np

    rows = [row for row in history if "loss" in row]
    rows = rows[-max(1, len(rows) // 10) :]
    named = {
        "loss": ("loss",),
        "rollout_reward": ("rollout/reward", "reward"),
        "rollout_length": ("rollout/length", "completions/mean_length"),
        "rollout_entropy": ("rollout/entropy", "entropy"),
    }
    found = {}
    for name, keys in named.items():
        values = [next(row[key] for key in keys if key in row) for row in rows if set(keys) & set(row)]
        if values:
            found[name] = float(np.mean(values))
    return found


if __name__ == "__main__":
    stage_main("train", Config, train)
