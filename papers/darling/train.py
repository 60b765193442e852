"""Train one arm of DARLING: GRPO on quality, diversity, or both.

    python -m papers.darling.train --scale tiny --arm ops_darling --seed 0

All arms of a seed start from one policy and take as many rollouts and updates.
"""

from __future__ import annotations

import os

import numpy as np

from papers.darling.config import Config
from papers.darling.method import make_reward
from shared.experiments import Run, UserError, stage_main


def train(config: Config, run: Run) -> dict[str, float]:
    """Writes run.checkpoint; returns what the seed's parts scored and the means of the last tenth of training."""
    from papers.darling.start import prepare
    from papers.darling.tasks import make_task
    from shared.training.grpo import GRPOTrainer, fitting_rows, prompt_stream
    from shared.training.runs import copy_policy, fit, load_policy, save_policy

    start = prepare(config, run)
    if config.steps == 0:
        copy_policy(start.policy, run)
        return start.measured

    task = make_task(config, run.seed)
    model, tokenizer = load_policy(start.policy, **({"dtype": "bfloat16"} if config.bf16 else {}))
    rows = task.rows("train", config.n_train)
    try:
        kept = fitting_rows(rows, tokenizer, config.max_prompt_tokens)
    except ValueError as error:
        raise UserError(f"{error}; raise max_prompt_tokens") from error
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=make_reward(config, task.reward(quality_model(config, start)), same_meaning(config, start, task)),
        args=grpo_config(config, run),
        train_dataset=prompt_stream(kept, config.steps * config.prompts_per_step, run.seed),
        processing_class=tokenizer,
    )
    fit(trainer, run)
    save_policy(trainer, tokenizer, run)
    last = [row for row in trainer.state.log_history if "reward" in row]
    last = last[-max(1, len(last) // 10) :]
    metrics = {name: float(np.mean([row[name] for row in last])) for name in ("reward", "entropy", "quality")}
    return {
        **start.measured,
        **metrics,
        "prompts_too_long": len(rows) - len(kept),
        "updates": trainer.state.global_step,
    }


def grpo_config(config: Config, run: Run):
    """TRL's settings. Eq. 6, a mean over all tokens of the batch, is its loss "dapo"."""
    from trl import GRPOConfig

    from shared.training.runs import trainer_options

    world = int(os.environ.get("WORLD_SIZE", "1"))
    rollouts = config.prompts_per_step * config.num_generations
    if rollouts % (world * config.updates_per_step):
        raise UserError(
            f"prompts_per_step x num_generations = {rollouts} cannot be divided among {world} processes and "
            f"updates_per_step = {config.updates_per_step}"
        )
    update = rollouts // (world * config.updates_per_step)  # completions per process and update
    micro = config.micro_batch_size or update
    if update % micro:
        raise UserError(f"micro_batch_size = {micro} does not divide the {update} completions per process and update")
    accumulation = update // micro
    vllm = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": config.vllm_memory,
        "vllm_max_model_length": config.max_prompt_tokens + config.max_new_tokens,
        "vllm_importance_sampling_correction": False,
    }
    options = trainer_options(
        run,
        max_steps=config.steps * config.updates_per_step,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * config.updates_per_step,
        num_generations=config.num_generations,
        shuffle_dataset=False,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        learning_rate=config.lr,
        lr_scheduler_type="constant",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        loss_type="dapo",
        scale_rewards=config.scale_rewards,
        beta=config.beta,
        epsilon=config.clip,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        **(vllm if config.vllm else {}),
    )
    return GRPOConfig(**options)


def quality_model(config: Config, start):
    """The reward model, for the tasks that have one."""
    if start.reward_model is None:
        return None
    from shared.rewards.reward_model import RewardModel

    model = RewardModel(start.reward_model, batch_size=8)
    if config.reward_at_cls:
        model.ending = model.tokenizer.cls_token
    return model


def same_meaning(config: Config, start, task):
    """What decides whether two rollouts are equivalent: the classifier, or the generated world itself."""
    if config.diversity == "true_classes":
        return lambda pairs: [task.meaning(a) == task.meaning(b) for a, b in pairs]
    if config.diversity != "classes":
        return None
    from papers.darling.classifier import PairClassifier

    return PairClassifier(
        start.classifier,
        same_label=config.same_label,
        threshold=config.threshold,
        max_tokens=config.classifier_max_tokens,
        short_answer_words=config.short_answer_words,
    )


if __name__ == "__main__":
    stage_main("train", Config, train)
