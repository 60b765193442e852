"""Scored samples of a prompt, and which of them become preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.generation import Completion

Pairs = list[tuple[int, int]]
"""(chosen, rejected) indices of completions; empty if the prompt gives no pair."""


@dataclass(frozen=True)
class Pool:
    """The samples of one prompt.

    row: the prompt's row of the dataset.
    completions: as sampled, with `logprobs`.
    rewards: one per completion; None where the reward does not apply or could not be found out.
    pairs: what `select` made of it.
    """

    row: Mapping[str, Any]
    completions: list[Completion]
    rewards: list[float | None]
    pairs: Pairs = field(default_factory=list)

    def scored(self) -> list[int]:
        """Indices of the completions that have a reward."""
        return [i for i, reward in enumerate(self.rewards) if reward is not None]


Select = Callable[[Pool], Pairs]


def best_vs_worst(pool: Pool) -> Pairs:
    """The completion of the highest reward against that of the lowest; ties go to the first. No pair if all are equal.

    Source: semi-online DPO (arXiv 2506.21495), Section 3, for scalar rewards.
    """
    scored = pool.scored()
    if not scored:
        return []
    best, worst = max(scored, key=pool.rewards.__getitem__), min(scored, key=pool.rewards.__getitem__)
    return [(best, worst)] if pool.rewards[best] > pool.rewards[worst] else []


def right_vs_wrong(pool: Pool) -> Pairs:
    """The first right completion (reward 1) against the first wrong one (reward 0); no pair without one of each.

    Source: semi-online DPO (arXiv 2506.21495), Section 3, for binary rewards. It draws one of each at random: as
    completions are independent samples, the first of each kind is such a draw.
    """
    right, wrong = split_binary(pool)
    return [(right[0], wrong[0])] if right and wrong else []


def split_binary(pool: Pool) -> tuple[list[int], list[int]]:
    """Indices of the right (reward 1) and of the wrong (reward 0) completions; ValueError for any other reward."""
    for i in pool.scored():
        if pool.rewards[i] not in (0, 1):
            raise ValueError(f"completion {i}: a verifier's reward must be 0 or 1, not {pool.rewards[i]}")
    right = [i for i in pool.scored() if pool.rewards[i] == 1]
    return right, [i for i in pool.scored() if pool.rewards[i] == 0]
