"""Train one arm of DivPO: sample, score, select a pair of each pool, take a DPO step.

    python -m papers.divpo.train --scale tiny --arm persona_divpo --seed 0

Every arm but GRPO's is the same trainer, TRL's DPO on samples of its own. Arms differ in the pairs that it is given,
and in where the samples come from: from the policy itself (online) or from the policy that training started from
(offline). GRPO, TRL's as well, meets the same prompts in the same order and samples each as often.
"""

from __future__ import annotations

import os

from papers.divpo.config import Config
from shared.experiments import Run, UserError, files, stage_main


def train(config: Config, run: Run) -> dict[str, float]:
    """Writes run.checkpoint. Returns means over the steps of what was logged about the samples."""
    from papers.divpo.tasks import load_start
    from shared.training.runs import copy_policy, fit, load_policy, save_policy

    start = load_start(config, run)
    if config.method == "base":
        copy_policy(start, run)
        return {"steps": 0}
    model, tokenizer = load_policy(start)
    trainer = make_trainer(config, run, model, tokenizer)
    fit(trainer, run)
    save_policy(trainer, tokenizer, run)
    rows = [row for row in files.read_jsonl(run.dir / "log.jsonl") if row["stage"] == "train"]
    means, grpo_names = {}, {"truncated": "completions/clipped_ratio"}
    for name in ("reward", "usable", "equal", "truncated", "empty", "unscored", "judge_unparsable", "judge_failed"):
        keys = (f"rollout/{name}", grpo_names.get(name))
        if values := [row[key] for row in rows for key in keys if key in row]:
            means[name] = sum(values) / len(values)
    return {"steps": config.steps, **means}


def make_trainer(config: Config, run: Run, model, tokenizer):
    """TRL's trainer of the arm's method."""
    from papers.divpo.tasks import load_criterion, load_reward, load_rows, load_trained_reward

    arguments = trainer_config(config, run)
    rows = load_rows(config, "train")
    reward = load_trained_reward(config, run)[0] if config.reward_model_learned else load_reward(config)
    if config.method == "grpo":
        from papers.divpo.trainer import LoggedReward
        from shared.generation.text import context_length, engine_length
        from shared.training.grpo import GRPOTrainer, prompt_stream

        if arguments.use_vllm:
            prompts = [row["prompt"] for row in rows]
            context = context_length(model.config)
            arguments.vllm_max_model_length = engine_length(prompts, tokenizer, config.max_new_tokens, context)
        stream = prompt_stream(rows, config.steps * config.prompts_per_step, run.seed)
        watched = LoggedReward(reward, config)
        return GRPOTrainer(model, watched, arguments, train_dataset=stream, processing_class=tokenizer)

    from papers.divpo.method import DivPO
    from papers.divpo.trainer import DivPOTrainer
    from shared.training.pairs import best_vs_worst

    def best_vs_worst_of_all(pools):
        return [best_vs_worst(pool) for pool in pools]

    if config.method == "divpo":
        options = {"rho_mode": config.rho_mode, "allow_all_equal": config.allow_all_equal}
        select_all = DivPO(load_criterion(config), config.rho, **options)
    else:
        select_all = best_vs_worst_of_all
    return DivPOTrainer(
        model, arguments, config=config, rows=rows, reward=reward, select_all=select_all, tokenizer=tokenizer
    )


def trainer_config(config: Config, run: Run):
    """TRL's options of this arm: of GRPO or of DPO."""
    from shared.training.runs import trainer_options

    world = int(os.environ.get("WORLD_SIZE", "1"))
    size = config.micro_batch_size or max(1, config.prompts_per_step // world)
    if config.prompts_per_step % (size * world):
        raise UserError(
            f"prompts_per_step={config.prompts_per_step} is no multiple of micro_batch_size={size} x {world} processes"
        )
    cosine = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}}
    common = trainer_options(
        run,
        max_steps=config.steps,
        gradient_accumulation_steps=config.prompts_per_step // (size * world),
        learning_rate=config.lr,
        warmup_steps=config.warmup_steps,
        adam_beta2=config.beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        num_generations=config.num_generations,
        use_vllm=config.sampler == "vllm",
        **(cosine if config.lr_schedule == "cosine" else {"lr_scheduler_type": "constant_with_warmup"}),
    )
    if config.method == "grpo":
        from trl import GRPOConfig

        return GRPOConfig(
            **common,
            per_device_train_batch_size=size * config.num_generations,
            shuffle_dataset=False,
            max_completion_length=config.max_new_tokens,
            loss_type="dapo",
            scale_rewards="group",
            beta=0.0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            vllm_importance_sampling_correction=False,
        )

    from shared.training.preference import PreferenceConfig

    losses = {"sigmoid": 1.0} if config.method != "sft" else {"sft": 1.0}
    if config.nll_weight:
        losses["sft"] = config.nll_weight
    return PreferenceConfig(
        **common,
        per_device_train_batch_size=size,
        beta=config.beta,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        sync_steps=1 if config.online else None,
        max_new_tokens=config.max_new_tokens,
        generation_batch_size=config.generation_batch_size,
    )


if __name__ == "__main__":
    stage_main("train", Config, train)
