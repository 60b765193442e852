"""The tasks: prompts, rewards, and the policy that all arms of a seed start from.

    persona    one prompt, a JSON object wanted; reward 1 if it is one with all keys, else 0
    keywords   a title, five keywords wanted; reward of a model or, in a generated world, its rule; 0 if not five
    instruct   WildChat's first turns; reward of a model

With a pretrained `model` prompts are chat messages in plain English; without one they are words of a generated world.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from papers.divpo.config import Config
from papers.divpo.method import Criterion, LLMJudge, by_measure, improbability, least_overlap, rarity
from shared.data import persona, story
from shared.data.hub import load_prompts
from shared.evaluation.diversity import unique_share, unique_words, words
from shared.experiments import Run, UserError
from shared.generation import SamplingParams, load_sampler
from shared.rewards.contract import Completions, checked, texts
from shared.rewards.format import JSONReward, parse_attributes
from shared.training.starting_policy import measured, sft, starting_policy

if TYPE_CHECKING:
    from shared.training.preference import Reward

# What the starting policy depends on.
POLICY_FIELDS = (
    "task",
    "n_values",
    "n_topics",
    "n_words",
    "n_styles",
    "layers",
    "width",
    "heads",
    "sft_steps",
    "sft_batch_size",
    "sft_lr",
    "sft_examples",
    "least_competence",
    "max_new_tokens",
)


@cache
def story_world(n_topics: int, n_words: int, n_styles: int) -> story.StoryWorld:
    return story.StoryWorld(n_topics, n_words, n_styles)


def load_world(config: Config) -> persona.PersonaWorld | story.StoryWorld:
    if config.task == "persona":
        return persona.PersonaWorld(config.n_values)
    return story_world(config.n_topics, config.n_words, config.n_styles)


def load_rows(config: Config, split: str) -> list[dict]:
    """Prompts of `split` (train or test), in a random order that is always the same: `item`, `prompt` and columns."""
    if config.task == "persona":
        prompt = [{"role": "user", "content": persona.INSTRUCTION}] if config.model else persona.PROMPT
        return [{"item": "persona", "prompt": prompt}]
    limit = config.train_prompts if split == "train" else config.test_prompts
    if config.task == "instruct":
        return _wildchat(config, split)
    rows = load_world(config).rows(split)
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:limit]]
    if config.model:
        for row in rows:
            title = row["title"].title()
            row["prompt"] = [{"role": "user", "content": story.INSTRUCTION.format(title=title)}]
    return rows


def _wildchat(config: Config, split: str) -> list[dict]:
    """The prompts of a larger random subset that are not among those of a smaller one are held out."""
    n_train = config.train_prompts or 10_000
    load = partial(load_prompts, "wildchat", "train", source=config.prompts, keep=_english)
    train = load(limit=n_train)
    if split == "train":
        return train
    seen = {row["item"] for row in train}
    return [row for row in load(limit=n_train + config.test_prompts) if row["item"] not in seen]


def _english(row: dict) -> bool:
    return row.get("language") == "English" and not row.get("toxic")


# ---- rewards and criteria ----


class GatedReward:
    """`reward` where the completion has exactly `n` words, 0 where it has not (and `reward` is not asked)."""

    __name__ = "gated_reward"

    def __init__(self, reward: Reward, n: int):
        self.reward, self.n = reward, n

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        found = texts(completions)
        rows = [i for i, text in enumerate(found) if len(words(text)) == self.n]
        rewards: list[float | None] = [0.0] * len(found)
        if rows:
            kept = {name: [values[i] for i in rows] for name, values in columns.items() if isinstance(values, list)}
            scores = self.reward([prompts[i] for i in rows], [completions[i] for i in rows], **kept)
            for i, score in zip(rows, checked(scores, len(rows), "the reward"), strict=True):
                rewards[i] = score
        return rewards


def load_reward(config: Config) -> Reward:
    """What a sample is worth: what arms are evaluated by and, but for `reward_model_learned`, trained with."""
    if config.task == "persona":
        return JSONReward(persona.ATTRIBUTES)
    if config.task == "keywords" and not config.model:
        return story.StoryQuality(load_world(config))
    if config.reward_model_kind == "armo":
        from papers.divpo.armo import ArmoRM

        model = ArmoRM(config.reward_model)
    else:
        from transformers import AutoTokenizer

        from shared.rewards.reward_model import RewardModel

        # Athene-RM keeps its head under another name, and reads it at a CLS token after the conversation.
        ending = AutoTokenizer.from_pretrained(config.reward_model).cls_token or ""
        model = RewardModel(config.reward_model, ending=ending, key_mapping={r"^v_head\.": "score."})
    return GatedReward(model, story.N_KEYWORDS) if config.task == "keywords" else model


def load_trained_reward(config: Config, run: Run) -> tuple[Reward, float]:
    """The reward model of the run's seed, 0 where there are not five keywords; and its accuracy on held-out pairs."""
    from papers.divpo.learned import LearnedReward, load_learned_reward
    from shared.rewards.reward_model import RewardModel

    path = load_learned_reward(config, run, load_world(config), load_start(config, run))
    reward = GatedReward(LearnedReward(RewardModel(path, batch_size=1024)), story.N_KEYWORDS)
    return reward, measured(path)["accuracy"]


def load_criterion(config: Config) -> Criterion:
    match config.criterion:
        case "probability":
            return by_measure(improbability)
        case "frequency":
            return by_measure(rarity(persona.ATTRIBUTES if config.task == "persona" else ()))
        case "overlap":
            return least_overlap
        case "llm":
            options = {"base_url": config.judge_url} if config.judge_backend == "openai" else {}
            return LLMJudge(load_sampler(config.judge_backend, config.judge_model, **options))
    raise ValueError(config.criterion)


# ---- diversity ----


def attributes_of(completions: Sequence[str]) -> list[dict[str, str]]:
    """The personas among the completions."""
    found = (parse_attributes(text, persona.ATTRIBUTES) for text in completions)
    return [values for values in found if values is not None]


def unique_attributes(valid: Sequence[dict[str, str]], first: int) -> dict[str, float]:
    """Share of unique values among `first` personas, of each attribute and their mean ("unique"): the mean over as many
    disjoint lots of `first` as there are. Raises ValueError if there is none."""
    lots = [valid[start : start + first] for start in range(0, len(valid) - first + 1, first)] or [valid]
    shares = {
        f"unique_{name}": float(np.mean([unique_share([v[name] for v in lot], first) for lot in lots]))
        for name in persona.ATTRIBUTES
    }
    return {"unique": float(np.mean(list(shares.values()))), **shares}


def rollout_diversity(config: Config, samples: Sequence[Sequence[str]]) -> float | None:
    """Diversity of a training step's samples, a list for each prompt: for persona the mean share of unique values among
    the first valid ones (None if there are too few), otherwise the mean number of unique words of a prompt."""
    if config.task != "persona":
        return float(np.mean([unique_words(of_prompt) for of_prompt in samples]))
    valid = attributes_of([text for of_prompt in samples for text in of_prompt])
    if len(valid) < config.unique_first:
        return None
    return unique_attributes(valid[: config.unique_first], config.unique_first)["unique"]


# ---- the starting policy ----


def load_start(config: Config, run: Run) -> Path | str:
    """The checkpoint that training starts from."""
    if config.model:
        return config.model

    def build(directory: Path) -> dict[str, float]:
        return build_policy(config, run.seed, directory)

    return starting_policy(run, {name: getattr(config, name) for name in POLICY_FIELDS}, build, seed=run.seed)


def build_policy(config: Config, seed: int, directory: Path) -> dict[str, float]:
    """Trains a Llama from scratch to write as the world's author does, which is often right and has favourites."""
    from shared.models import llama_from_scratch, word_tokenizer

    world = load_world(config)
    tokenizer = word_tokenizer(world.vocabulary())
    rng = np.random.default_rng([seed, 2])
    if config.task == "persona":
        examples = [(persona.PROMPT, text) for text in world.personas(config.sft_examples, seed)]
        prompts = [persona.PROMPT]
    else:
        rows = world.rows("train")
        drawn = [rows[i] for i in rng.integers(len(rows), size=config.sft_examples)]
        examples = [(row["prompt"], text) for row, text in zip(drawn, world.stories(drawn, seed), strict=True)]
        prompts = [row["prompt"] for row in world.rows("dev")]
    positions = max(len(prompt.split()) for prompt, _ in examples) + config.max_new_tokens
    model = llama_from_scratch(
        tokenizer, layers=config.layers, width=config.width, heads=config.heads, positions=positions, seed=seed
    )
    loss = sft(
        model,
        tokenizer,
        examples,
        directory=directory,
        steps=config.sft_steps,
        batch_size=config.sft_batch_size,
        lr=config.sft_lr,
        seed=seed,
    )
    params = SamplingParams(config.max_new_tokens, seed=seed)
    with load_sampler("transformers", model, tokenizer=tokenizer, batch_size=config.generation_batch_size) as sampler:
        samples = [c.text for group in sampler.sample(prompts, -(-500 // len(prompts)), params) for c in group]
    valid = len(attributes_of(samples)) if config.task == "persona" else sum(len(s.split()) == 5 for s in samples)
    competence = valid / len(samples)
    if competence < config.least_competence:
        raise UserError(
            f"the starting policy answers validly in {competence:.0%} of the cases, fewer than least_competence = "
            f"{config.least_competence:.0%}: raise sft_steps or change sft_lr"
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {"valid": competence, "loss": loss}
