"""The trainer of every arm but GRPO's: DPO on its own samples, with pairs that are selected for all prompts at once.
And, for GRPO, a reward that logs what this trainer logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from papers.divpo.config import Config
from papers.divpo.method import all_equal, rewards_of
from papers.divpo.tasks import rollout_diversity
from shared.rewards.contract import Completions, checked, texts
from shared.training.pairs import Pairs, Pool
from shared.training.preference import PreferenceTrainer, Reward


class DivPOTrainer(PreferenceTrainer):
    """Logged beside the rest, of each step: rollout/unique, the diversity of its samples (`rollout_diversity`), and
    rollout/equal, the share of its prompts whose samples all have the same reward. Where a judge selects:
    rollout/judge_unparsable and rollout/judge_failed, shares of its questions that got no choice, or no answer at all.

    Args:
        select_all: the pairs of each of many pools.
        others: of `PreferenceTrainer`, but for `select`.
    """

    def __init__(self, *args, config: Config, select_all: Callable[[Sequence[Pool]], list[Pairs]], **others):
        self.config, self.select_all = config, select_all
        super().__init__(*args, select=lambda pool: [], **others)

    def make_pools(self, indices: Sequence[int], seed: int) -> list[Pool]:
        pools = super().make_pools(indices, seed)
        before = Counter(getattr(self.select_all, "counts", {}))
        found = [replace(pool, pairs=pairs) for pool, pairs in zip(pools, self.select_all(pools), strict=True)]
        counts = getattr(self.select_all, "counts", {})
        if asked := counts.get("rows", 0) - before["rows"]:
            for name in ("unparsable", "failed"):
                self._metrics["train"][f"rollout/judge_{name}"].append((counts[name] - before[name]) / asked)
        return found

    def _log_rollouts(self, pools: Sequence[Pool]) -> None:
        super()._log_rollouts(pools)
        metrics = self._metrics["train"]
        metrics["rollout/equal"].append(float(np.mean(all_equal(rewards_of(pools)))))
        samples = [[c.text for c in pool.completions] for pool in pools]
        if (unique := rollout_diversity(self.config, samples)) is not None:
            metrics["rollout/unique"].append(unique)


class LoggedReward:
    """`reward` for `GRPOTrainer`, with rollout/reward, rollout/equal and rollout/unique logged as in `DivPOTrainer`.

    The `config.num_generations` completions of a prompt must stand next to each other.
    """

    __name__ = "logged_reward"

    def __init__(self, reward: Reward, config: Config):
        self.reward, self.config = reward, config

    def __call__(self, prompts: Sequence, completions: Completions, log_metric, **columns) -> list[float | None]:
        rewards = self.reward(prompts=prompts, completions=completions, log_metric=log_metric, **columns)
        rewards = checked(rewards, len(completions), getattr(self.reward, "__name__", "the reward"))
        n = self.config.num_generations
        rewards_PN = np.array(rewards, dtype=float).reshape(-1, n)  # None becomes NaN
        if not np.isnan(rewards_PN).all():
            log_metric("rollout/reward", float(np.nanmean(rewards_PN)))
        log_metric("rollout/equal", float(np.mean(all_equal(rewards_PN))))
        found = texts(completions)
        samples = [found[start : start + n] for start in range(0, len(found), n)]
        if (unique := rollout_diversity(self.config, samples)) is not None:
            log_metric("rollout/unique", unique)
        return rewards
