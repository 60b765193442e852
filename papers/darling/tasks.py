"""What the policy is trained and tested on: prompts, how a response scores and, in the generated worlds, what it says.

The training reward of `operators` and `math` is correctness, that of `wildchat` a reward model's score, that of `ideas`
a noisy score in the place of one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from papers.darling.config import Config
from papers.darling.method import Reward
from shared.data import ideas, operators
from shared.experiments import UserError

# Qwen's usual sentence; the paper does not give its own.
MATH_TEMPLATE = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."


class OperatorsTask:
    """Which two operators lead from three digits to the target (shared/data/operators.py)?"""

    vocabulary = operators.VOCABULARY
    verifiable = True
    meaning: Callable[[str], Hashable] = staticmethod(operators.meaning)

    def __init__(self, config: Config, seed: int):
        self.seed = seed

    def rows(self, split: str, n: int | None = None) -> list[dict]:
        return operators.operator_rows(n, split, self.seed if split == "train" else 0)

    def traces(self, n: int) -> list[tuple[str, str]]:
        return operators.operator_traces(n, self.seed)

    def score(self, row: dict, texts: Sequence[str]) -> dict[str, list[float]]:
        """Per response: `correct`, and `remarks`, its words that say nothing."""
        return {
            "correct": [float(operators.is_right(text, row["digits"], row["answer"])) for text in texts],
            "remarks": [float(operators.remark_words(text)) for text in texts],
        }

    def reward(self, reward_model: Reward | None) -> Reward:
        def correct(prompts, completions, *, digits, answer, **columns):
            rows = zip(completions, digits, answer, strict=True)
            return [float(operators.is_right(text, d, a)) for text, d, a in rows]

        return correct


class IdeasTask:
    """One-line story ideas (shared/data/ideas.py). The world, that is which ideas are good, belongs to the seed."""

    vocabulary = ideas.VOCABULARY
    verifiable = False
    meaning: Callable[[str], Hashable] = staticmethod(ideas.meaning)

    def __init__(self, config: Config, seed: int):
        self.seed = seed
        self.world = ideas.IdeasWorld(seed, rare=config.rare)

    def rows(self, split: str, n: int | None = None) -> list[dict]:
        rows = ideas.idea_rows(None, split, self.seed if split == "train" else 0)
        return rows[:n]

    def traces(self, n: int) -> list[tuple[str, str]]:
        return self.world.traces(n, self.seed)

    def score(self, row: dict, texts: Sequence[str]) -> dict[str, list[float]]:
        """Per response: the true `quality`, `coherent`, and `remarks`, its words that say nothing."""
        return {
            "quality": [self.world.quality(row["prompt"], text) for text in texts],
            "coherent": [float(ideas.idea_of(text) is not None) for text in texts],
            "remarks": [float(ideas.remark_words(text)) for text in texts],
        }

    def reward(self, reward_model: Reward | None) -> Reward:
        def score(prompts, completions, **columns):
            return [self.world.score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

        return score


class MathTask:
    """DeepScaleR for training, competition problems for the test; the answer is checked by math-verify."""

    verifiable = True
    meaning = None

    def __init__(self, config: Config, seed: int):
        self.config, self.seed = config, seed

    def rows(self, split: str, n: int | None = None) -> list[dict]:
        return hub_rows(self.config, split, n, self.seed, train="deepscaler", template=MATH_TEMPLATE)

    def score(self, row: dict, texts: Sequence[str]) -> dict[str, list[float]]:
        from shared.rewards.verifiable import MathReward

        found = MathReward()([row["prompt"]] * len(texts), texts, answer=[row["answer"]] * len(texts))
        if found[0] is None:
            raise UserError(f"{row['item']}: its answer {row['answer']!r} cannot be parsed")
        return {"correct": found}

    def reward(self, reward_model: Reward | None) -> Reward:
        from shared.rewards.verifiable import MathReward

        return MathReward()


class WildChatTask:
    """WildChat prompts for training, NoveltyBench for the test; a reward model scores both."""

    verifiable = False
    meaning = None

    def __init__(self, config: Config, seed: int):
        self.config, self.seed = config, seed

    def rows(self, split: str, n: int | None = None) -> list[dict]:
        return hub_rows(self.config, split, n, self.seed, train="wildchat")

    def score(self, row: dict, texts: Sequence[str]) -> dict[str, list[float]]:
        return {}

    def reward(self, reward_model: Reward) -> Reward:
        return reward_model


TASKS = {"operators": OperatorsTask, "ideas": IdeasTask, "math": MathTask, "wildchat": WildChatTask}


def make_task(config: Config, seed: int):
    return TASKS[config.task](config, seed)


def hub_rows(
    config: Config, split: str, n: int | None, seed: int, *, train: str, template: str = "{prompt}"
) -> list[dict]:
    """Training prompts, or the test sets one after the other with `n` rows of each at most."""
    from shared.data.hub import load_prompts

    if split == "train":
        return load_prompts(train, "train", source=config.train_source, limit=n, seed=seed, template=template)
    sources = config.test_sources or [None] * len(config.test_sets)
    rows = []
    for entry, source in zip(config.test_sets, sources, strict=True):
        name, _, part = entry.partition(":")  # noveltybench:curated
        found = load_prompts(name, part or "test", source=source, limit=n, seed=0, template=template)
        rows += [{**row, "item": f"{entry}/{row['item']}", "test_set": name} for row in found]
    return rows
