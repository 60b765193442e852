"""Prompts, rewards and starting policies: of the generated world, or the paper's from the hub.

Every row has `item`, `task` (math or chat), `prompt` and what its reward needs: `answer`, or nothing.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from papers.semi_online.config import Config
from shared.data import fold, writing
from shared.data.fold import fold_reward, fold_rows, misconceived_solutions, misconceptions
from shared.data.writing import (
    MAX_WORDS,
    gold_score,
    prefer,
    scribbles,
    weak_responses,
    writing_rows,
)
from shared.experiments import Run, UserError
from shared.rewards.contract import checked, texts
from shared.training.reward_model import Comparison

# Section 3.7 of our notes on the paper: reason, then announce the answer in a box (Minerva's wording is the paper's).
MATH_TEMPLATE = (
    "Reason about the following problem and give its final answer.\n\n{prompt}\n\nEnd your response with: The final "
    "answer is $\\boxed{answer}$. I hope it is correct."
)

BELIEFS_SEED = 0  # of the misconceptions: one world for all seeds
ROUNDS = 3  # of training, at most, until the policy is competent or the reward model accurate
INIT_STD = 0.4  # of the weights, times the square root of the width; with Llama's 0.02 a small model learns no tables


# ---- rows ------------------------------------------------------------------------------------------------------------


def train_rows(config: Config, phase: str, seed: int) -> list[dict]:
    """The training prompts of a phase; `both` mixes the tasks in the proportion 1 : 1 (hub: 2 : 1, as in the paper)."""
    n = getattr(config, phase).n_train
    if phase != "both":
        return task_rows(config, phase, "train", n, seed)
    n_chat = _n_chat(config)
    return [*task_rows(config, "math", "train", n - n_chat, seed), *task_rows(config, "chat", "train", n_chat, seed)]


def _n_chat(config: Config) -> int:
    """Chat prompts in mixed training."""
    return config.both.n_train // (2 if config.world == "generated" else 3)


def task_rows(config: Config, task: str, split: str, n: int | None, seed: int = 0) -> list[dict]:
    """`n` rows of one task (None: all, of the hub); of dev and test the same for every seed."""
    if config.world == "generated":
        if task == "math":
            world = config.generated
            rows = fold_rows(n, split, seed, n_ops=tuple(world.n_ops), modulus=world.modulus)
        else:
            rows = writing_rows(n, split, seed)
            if split != "train":  # each prompt once
                rows = list({row["prompt"]: row for row in rows}.values())
        return [{"item": str(i), "task": task, **row} for i, row in enumerate(rows)]
    return [{**row, "task": task} for row in _hub_rows(config, task, split, n, seed)]


def _hub_rows(config: Config, task: str, split: str, n: int, seed: int) -> list[dict]:
    from shared.data.hub import load_prompts

    def load(name: str, split: str, limit: int | None, **options) -> list[dict]:
        return load_prompts(name, split, source=config.hub.sources.get(name), limit=limit, **options)

    if task == "math":
        if split == "test":
            first = config.hub.math_tests[0]
            return [
                {**row, "metric": "accuracy" if name == first else f"accuracy_{name}"}
                for name in config.hub.math_tests
                for row in load(name, "test", None, template=MATH_TEMPLATE)[:n]
            ]
        named = {"train": "train", "dev": "validation"}[split]
        return load("numinamath", named, n, seed=seed if split == "train" else 0, template=MATH_TEMPLATE)
    if split == "test":
        return [row for name in config.hub.chat_tests for row in load(name, "test", None)[:n]]
    # Prompts for choosing checkpoints are held out: no training subset of the same seed reaches them.
    largest = max(config.chat.n_train, _n_chat(config))
    if split == "train":
        return load("wildchat", "train", n)
    kept = {row["item"] for row in load("wildchat", "train", largest)}
    return [row for row in load("wildchat", "train", largest + n) if row["item"] not in kept]


# ---- rewards ---------------------------------------------------------------------------------------------------------


class Rewards:
    """Each completion's reward by its row's `task`: a verifier's for math, the reward model's raw score for chat.

    The reward model is loaded when it is first needed.
    """

    __name__ = "verifier or reward model"

    def __init__(self, config: Config, reward_model: Path | str):
        self.config, self.reward_model = config, reward_model
        self._by_task: dict[str, Any] = {}

    def __call__(self, prompts: Sequence, completions: Sequence, **columns) -> list[float | None]:
        tasks = columns.get("task")
        if tasks is None or len(tasks) != len(completions):
            raise UserError("the rewards need the column 'task', math or chat, with an entry for each completion")
        rewards: list[float | None] = [None] * len(completions)
        for task in dict.fromkeys(tasks):
            mine = [i for i, other in enumerate(tasks) if other == task]
            part = {
                name: [values[i] for i in mine] if isinstance(values, list) and len(values) == len(tasks) else values
                for name, values in columns.items()
            }
            found = self._of(task)([prompts[i] for i in mine], [completions[i] for i in mine], **part)
            for i, reward in zip(mine, checked(found, len(mine), f"the reward of {task}"), strict=True):
                rewards[i] = reward
        return rewards

    def _of(self, task: str):
        if task not in self._by_task:
            if task not in ("math", "chat"):
                raise UserError(f"a row's task must be math or chat, not {task!r}")
            self._by_task[task] = self._math() if task == "math" else self._chat()
        return self._by_task[task]

    def _math(self):
        if self.config.world == "generated":
            return fold_reward
        from shared.rewards.verifiable import MathReward

        return MathReward()

    def _chat(self):
        from shared.rewards.reward_model import RewardModel

        if self.config.world == "generated":
            return WordReward(RewardModel(self.reward_model, batch_size=512))
        # Athene-RM: the score is read at the CLS token, which comes after the rendered conversation.
        model = RewardModel(
            self.reward_model,
            batch_size=self.config.hub.reward_batch_size,
            key_mapping={r"^v_head\.": "score."},
        )
        model.ending = model.tokenizer.cls_token or ""
        return model


class WordReward:
    """A reward model of space-separated words: prompt and completion are joined by a space."""

    __name__ = "reward model"

    def __init__(self, model):
        self.model = model

    def __call__(self, prompts: Sequence[str], completions: Sequence, **columns) -> list[float | None]:
        return self.model([f"{prompt} " for prompt in prompts], completions)


def gold_scores(rows: Sequence[Mapping], completions: Sequence[str]) -> list[float]:
    """What the hidden reader of the generated world thinks; never used in training."""
    return [gold_score(row["keywords"], text) for row, text in zip(rows, texts(completions), strict=True)]


# ---- what training starts from ---------------------------------------------------------------------------------------


def starting_points(config: Config, run: Run) -> tuple[Path | str, Path | str]:
    """(starting policy, reward model): of the hub, or made once per seed."""
    if config.world == "hub":
        return config.hub.model, config.hub.reward_model
    from shared.training.starting_policy import starting_policy

    gated = config.generated.gated and run.scale != "smoke"
    settings = {**dataclasses.asdict(config.generated), "gated": gated}

    def policy(directory: Path) -> dict[str, float]:
        return build_policy(config, run.seed, gated, directory)

    def reward_model(directory: Path) -> dict[str, float]:
        return build_reward_model(config, run.seed, gated, policy_directory, directory)

    policy_directory = starting_policy(run, {"what": "policy", **settings}, policy, seed=run.seed)
    return policy_directory, starting_policy(run, {"what": "reward model", **settings}, reward_model, seed=run.seed)


def build_policy(config: Config, seed: int, gated: bool, directory: Path) -> dict[str, float]:
    """A Llama from scratch that learns arithmetic from a writer with misconceptions, and writing from a weak writer."""
    from shared.models import llama_from_scratch, word_tokenizer
    from shared.training.starting_policy import sft

    world = config.generated
    tokenizer = word_tokenizer([*fold.vocabulary(world.modulus), *writing.VOCABULARY])
    longest = max(2 * world.n_ops[1] + 2 + world.n_ops[1] + 3, 3 + MAX_WORDS + 1)
    model = llama_from_scratch(
        tokenizer,
        layers=world.layers,
        width=world.width,
        heads=world.heads,
        mlp_width=world.mlp_width,
        positions=longest + 8,
        init_std=INIT_STD / world.width**0.5,
        seed=seed,
    )
    for round_ in range(ROUNDS):
        sft(
            model,
            tokenizer,
            _sft_examples(config, seed=100 * seed + round_),
            directory=directory,
            steps=world.sft_steps,
            batch_size=world.sft_batch_size,
            lr=world.sft_lr,
            warmup_steps=30,
            seed=seed,
        )
        measured = {**competence(config, model, tokenizer), "rounds": round_ + 1}
        lowest, highest = world.competence
        competent = lowest <= measured["accuracy"] <= highest and measured["sums_right"] >= world.competence_sums
        if competent or not gated:
            break
    else:
        raise UserError(
            f"the starting policy of seed {seed} gets {measured['accuracy']:.0%} of the problems and "
            f"{measured['sums_right']:.1%} of the additions and subtractions right; {lowest:.0%} to {highest:.0%} and "
            f"{world.competence_sums:.0%} are needed: change generated.sft_steps or generated.competence"
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return measured


def _sft_examples(config: Config, seed: int) -> list[tuple[str, str]]:
    world = config.generated
    n = world.sft_steps * world.sft_batch_size
    beliefs = misconceptions(BELIEFS_SEED, modulus=world.modulus)
    problems = fold_rows(n - n // 3, "train", 10_000 + seed, n_ops=tuple(world.n_ops), modulus=world.modulus)
    examples = misconceived_solutions(problems, beliefs, seed, modulus=world.modulus)
    examples += weak_responses(writing_rows(n // 3, "train", 10_000 + seed), seed)
    random.Random(seed).shuffle(examples)
    return examples


def competence(config: Config, model, tokenizer, n: int = 400) -> dict[str, float]:
    """Of samples (temperature 1) on held-out problems: right answers, and right results of additions and
    subtractions, given what was written before them."""
    from shared.generation import SamplingParams, load_sampler

    world = config.generated
    rows = task_rows(config, "math", "dev", n, seed=1)
    sampler = load_sampler("transformers", model, tokenizer=tokenizer, batch_size=512)
    params = SamplingParams(max_new_tokens=world.n_ops[1] + 4)
    written = [found[0].text for found in sampler.sample([row["prompt"] for row in rows], params=params)]
    right = fold_reward([row["prompt"] for row in rows], written, answer=[row["answer"] for row in rows])
    sums = [ok for row, text in zip(rows, written, strict=True) for ok in _sums(row["prompt"], text, world.modulus)]
    return {"accuracy": float(np.mean(right)), "sums_right": float(np.mean(sums)) if sums else 0.0}


def _sums(prompt: str, text: str, modulus: int) -> list[bool]:
    """For each addition and subtraction: is its result right, given the result before it?"""
    first, *rest = prompt.split()[:-1]
    value, found = first, []
    for sign, operand, result in zip(rest[::2], rest[1::2], text.split(), strict=False):
        if not result.isdigit():
            break
        if sign != "*":
            found.append(int(result) == (int(value) + (1 if sign == "+" else -1) * int(operand)) % modulus)
        value = result
    return found


def build_reward_model(config: Config, seed: int, gated: bool, policy: Path, directory: Path) -> dict[str, float]:
    """A small bidirectional encoder with the mean of its states as input of the score, trained on comparisons that the
    hidden reader has decided (Bradley-Terry, TRL's RewardTrainer) until it is accurate enough on held-out ones.

    Returns its accuracy on comparisons that decided nothing: of all kinds, and of the policy's samples alone.
    """
    from transformers import AutoTokenizer

    from shared.models import encoder_from_scratch
    from shared.rewards.reward_model import RewardModel
    from shared.training.reward_model import pair_accuracy, train_reward_model

    world = config.generated
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = encoder_from_scratch(tokenizer, layers=1, width=64, heads=4, positions=64, outputs=1, seed=seed)

    def accuracy(split: str, **options) -> float:
        return pair_accuracy(RewardModel(directory, batch_size=512), comparisons(policy, split, 1500, seed, **options))

    for round_ in range(ROUNDS):
        train_reward_model(
            model,
            tokenizer,
            comparisons(policy, "train", world.reward_pairs, 100 * seed + round_),
            directory=directory,
            steps=world.reward_steps,
            lr=world.reward_lr,
            warmup_steps=30,
            seed=100 * seed + round_,
        )
        if (found := accuracy("dev")) >= world.reward_accuracy or not gated:
            break
    else:
        raise UserError(
            f"the reward model of seed {seed} gets {found:.1%} of the held-out comparisons right, fewer than "
            f"{world.reward_accuracy:.0%}: raise generated.reward_steps or generated.reward_pairs"
        )
    return {
        "accuracy": accuracy("test"),
        "accuracy_on_samples": accuracy("test", only_policy=True),
        "rounds": round_ + 1,
    }


def comparisons(policy: Path, split: str, n: int, seed: int, only_policy: bool = False) -> list[Comparison]:
    """Comparisons for `n` prompts, fewer those of twice the same response: for a third of the prompts the responses
    are samples of the policy at temperature 1.2, for the others scribbles; an annotator decides (`prefer`)."""
    from shared.generation import SamplingParams, load_sampler

    rows = writing_rows(n, split, 20_000 + seed)
    n_policy = n if only_policy else n // 3
    params = SamplingParams(max_new_tokens=MAX_WORDS, temperature=1.2, seed=seed)
    with load_sampler("transformers", policy, batch_size=512) as sampler:
        sampled = sampler.sample([row["prompt"] for row in rows[:n_policy]], n=2, params=params)
    pairs = [(a.text, b.text) for a, b in sampled]
    pairs += list(zip(*(scribbles(rows[n_policy:], 2 * seed + k) for k in (0, 1)), strict=True))
    return [
        (f"{row['prompt']} ", *prefer(row["keywords"], *pair))
        for row, pair in zip(rows, pairs, strict=True)
        if pair[0] != pair[1]
    ]
