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
from shared.training.reward_model import Comparison
from shared.training.starting_policy import starting_policy

if TYPE_CHECKING:
    from shared.rewards.reward_model import RewardModel

SHARPNESS = 8.0
TEMPERATURES = (1.0, 1.5)  # a reward model that only saw the policy's favourites takes rare words for good
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
        return [0.5 * (1 + math.tanh(score / 2)) for score in scores]  # no overflow


def load_learned_reward(config: Config, run: Run, world: StoryWorld, start: Path) -> Path:
    """The checkpoint of the reward model, trained by the run of the seed that comes first."""

    def build(directory: Path) -> dict[str, float]:
        return build_reward_model(config, world, start, run.seed, directory)

    fields = {name: value for name, value in asdict(config).items() if name.startswith("reward_model_")}
    return starting_policy(run, {**fields, "policy": start.name}, build, seed=run.seed)


def compare(
    world: StoryWorld, rows: Sequence[dict], start: Path, n: int, seed: int, sharpness: float = SHARPNESS
) -> list[Comparison]:
    """`n` comparisons of the policy's samples for random rows: (prompt and a space, preferred story, other story); the
    same number at each of `TEMPERATURES`.

    Fewer, as samples without five keywords (a rule gives them the reward 0) and pairs of equal quality are left out.

    Args:
        sharpness: of the readers' judgement; infinite for the true order.
    """
    rng = np.random.default_rng([seed, 3])
    each = -(-n // (2 * len(TEMPERATURES)))  # groups of four samples, two pairs
    drawn = [rows[i] for i in rng.integers(len(rows), size=each * len(TEMPERATURES))]
    groups = []
    with load_sampler("transformers", start, batch_size=1024) as sampler:
        for k, temperature in enumerate(TEMPERATURES):
            prompts = [row["prompt"] for row in drawn[k * each : (k + 1) * each]]
            groups += sampler.sample(prompts, 4, SamplingParams(N_KEYWORDS + 1, temperature, seed=seed))
    found = []
    for row, group in zip(drawn, groups, strict=True):
        texts = [c.text for c in group if len(c.text.split()) == N_KEYWORDS and c.finish_reason == "stop"]
        for a, b in zip(texts[::2], texts[1::2], strict=False):
            margin = world.quality(row["topic"], a) - world.quality(row["topic"], b)
            if margin:
                a_wins = rng.random() < 1 / (1 + np.exp(-sharpness * margin))
                found.append((f"{row['prompt']} ", *((a, b) if a_wins else (b, a))))
    return found


def build_reward_model(config: Config, world: StoryWorld, start: Path, seed: int, directory: Path) -> dict[str, float]:
    """Trains it. Returns the share of held-out pairs that it orders as the truth does."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from shared.rewards.reward_model import RewardModel
    from shared.training.reward_model import pair_accuracy, train_reward_model

    tokenizer = AutoTokenizer.from_pretrained(start)
    compared = compare(world, world.rows("train"), start, config.reward_model_pairs, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of the new head
        model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32)
    train_reward_model(
        model,
        tokenizer,
        compared,
        directory=directory,
        steps=config.reward_model_steps,
        lr=config.reward_model_lr,
        seed=seed,
    )
    held_out = compare(world, world.rows("dev"), start, HELD_OUT, seed + 1, sharpness=math.inf)
    accuracy = pair_accuracy(RewardModel(directory, batch_size=1024), held_out)
    if accuracy < config.reward_model_accuracy:
        raise UserError(
            f"the reward model orders {accuracy:.0%} of the held-out pairs right, fewer than reward_model_accuracy = "
            f"{config.reward_model_accuracy:.0%}: raise reward_model_pairs or reward_model_steps"
        )
    return {"accuracy": accuracy, "pairs": len(compared)}
