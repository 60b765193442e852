"""A reward model that is trained, in place of ArmoRM, for the generated stories.

Readers compare two stories for a title: the first is preferred with probability sigmoid(8 (q_1 - q_2)), q the true
quality that nobody gets to see. A classifier that starts from the policy learns from their choices (Bradley-Terry). The
arms that train against it are evaluated by the true quality all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from papers.divpo.config import Config
from shared.data.story import N_KEYWORDS, StoryWorld
from shared.experiments import Run, UserError
from shared.generation import SamplingParams, load_sampler
from shared.rewards.contract import Completions
from shared.training.starting_policy import starting_policy

if TYPE_CHECKING:
    from shared.rewards.reward_model import RewardModel

SHARPNESS = 8.0
HELD_OUT = 500  # comparisons of development titles


class LearnedReward:
    """sigmoid(score): the probability that the story is preferred to one of score 0.

    Scores may be negative, and then the 0 for an answer without five keywords would be a prize. Prompt and words of a
    generated world are joined by a space.
    """

    __name__ = "learned_reward"

    def __init__(self, model: RewardModel):
        self.model = model

    def __call__(self, prompts: Sequence[str], completions: Completions, **columns) -> list[float | None]:
        scores = self.model([f"{prompt} " for prompt in prompts], completions, **columns)
        return [1 / (1 + math.exp(-score)) for score in scores]


def load_learned_reward(config: Config, run: Run, world: StoryWorld, start: Path) -> Path:
    """The checkpoint of the reward model, trained by the run of the seed that comes first."""

    def build(directory: Path) -> dict[str, float]:
        return build_reward_model(config, world, start, run.seed, directory)

    fields = {name: value for name, value in asdict(config).items() if name.startswith("reward_model_")}
    return starting_policy(run, {**fields, "policy": start.name}, build, seed=run.seed)


Comparison = tuple[str, str, str, bool]
"""Prompt, preferred story, other story, whether the preferred one is truly better."""


def compare(world: StoryWorld, rows: Sequence[dict], start: Path, n: int, seed: int) -> list[Comparison]:
    """Comparisons of the policy's samples for `n` random rows; fewer, as those without five keywords are left out (a
    rule gives them the reward 0)."""
    rng = np.random.default_rng([seed, 3])
    drawn = [rows[i] for i in rng.integers(len(rows), size=n)]
    with load_sampler("transformers", start, batch_size=1024) as sampler:
        groups = sampler.sample([row["prompt"] for row in drawn], 4, SamplingParams(N_KEYWORDS + 1, seed=seed))
    found = []
    for row, group in zip(drawn, groups, strict=True):
        texts = [c.text for c in group if len(c.text.split()) == N_KEYWORDS and c.finish_reason == "stop"]
        if len(texts) < 2 or texts[0] == texts[1]:
            continue
        margin = world.quality(row["topic"], texts[0]) - world.quality(row["topic"], texts[1])
        first = bool(rng.random() < 1 / (1 + np.exp(-SHARPNESS * margin)))
        found.append((row["prompt"], texts[not first], texts[first], (margin > 0) == first))
    return found


def build_reward_model(config: Config, world: StoryWorld, start: Path, seed: int, directory: Path) -> dict[str, float]:
    """Trains with TRL's RewardTrainer. Returns the share of held-out pairs that the model orders as the truth does."""
    import shutil

    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.trainer_callback import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    from shared.rewards.reward_model import RewardModel

    tokenizer = AutoTokenizer.from_pretrained(start)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32)
    compared = compare(world, world.rows("train"), start, config.reward_model_pairs, seed)
    ids = {
        name: tokenizer([f"{pair[0]} {pair[k]}" for pair in compared])["input_ids"]
        for k, name in ((1, "chosen_ids"), (2, "rejected_ids"))
    }
    options = RewardConfig(
        output_dir=str(directory / "trainer"),
        max_steps=config.reward_model_steps,
        per_device_train_batch_size=64,
        learning_rate=config.reward_model_lr,
        lr_scheduler_type="cosine",
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = RewardTrainer(model, options, train_dataset=Dataset.from_dict(ids), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(directory))
    tokenizer.save_pretrained(directory)
    shutil.rmtree(directory / "trainer", ignore_errors=True)

    reward = LearnedReward(RewardModel(directory, batch_size=1024))
    held_out = compare(world, world.rows("dev"), start, HELD_OUT, seed + 1)
    prompts = [prompt for prompt, *_ in held_out]
    scores = [reward(prompts, [pair[k] for pair in held_out]) for k in (1, 2)]
    right = [(a > b) == better for a, b, (*_, better) in zip(*scores, held_out, strict=True)]
    accuracy = float(np.mean(right))
    if accuracy < config.reward_model_accuracy:
        raise UserError(
            f"the reward model orders {accuracy:.0%} of the held-out pairs right, fewer than reward_model_accuracy = "
            f"{config.reward_model_accuracy:.0%}: raise reward_model_pairs or reward_model_steps"
        )
    return {"accuracy": accuracy, "pairs": len(compared)}
