"""DARLING's reward, quality times diversity (Section 3), and those that it is compared with.

A reward is a callable with TRL's signature over groups of `group_size` rollouts of one prompt that follow each other.
The loss (Eq. 6) is TRL's: `GRPOTrainer` with `loss_type="dapo"` (mean over all tokens of the batch) and
`scale_rewards="none"` (advantages without the standard deviation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

from papers.darling.config import Config
from shared.rewards.contract import Completions, checked, column
from shared.rewards.diversity import NGramDiversityReward, SemanticDiversityReward

Reward = Callable[..., list[float | None]]


class DiversityAwareReward:
    """r_darling(x, y_i) = r(x, y_i) * Norm(Div(y_i | y_1, ..., y_n)) (Eq. 5).

    Norm is the identity for diversities in [0, 1], as all of ours are.

    Args:
        quality: r; None for a rollout that it does not apply to, which then gets None.
        diversity: Div, or None for quality alone.
        combine: "product", or "sum" of both after z-scores within the group (the paper's "additive").
        shape: what happens to r before: see `shaped`.
    """

    __name__ = "darling"

    def __init__(
        self,
        quality: Reward,
        diversity: Reward | None,
        *,
        group_size: int,
        combine: str = "product",
        shape: str = "raw",
    ):
        self.quality, self.diversity = quality, diversity
        self.group_size, self.combine, self.shape = group_size, combine, shape
        self.needs_logprobs = getattr(diversity, "needs_logprobs", False)

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        rows = len(completions)
        if rows % self.group_size:
            raise ValueError(f"{rows} completions are not groups of {self.group_size}")
        quality_GN = self._groups(checked(self.quality(prompts, completions, **columns), rows, "quality"))
        reward_GN = shaped(quality_GN, self.shape)
        logged = {"quality": quality_GN, "shaped_quality": reward_GN}
        if self.diversity is not None:
            diversity_GN = self._groups(checked(self.diversity(prompts, completions, **columns), rows, "diversity"))
            logged["diversity"] = diversity_GN
            if self.combine == "product":
                reward_GN = reward_GN * diversity_GN
            else:
                reward_GN = z_scores(reward_GN) + z_scores(diversity_GN)
        if log_metric := columns.get("log_metric"):
            for name, values in logged.items():
                if not np.isnan(values).all():
                    log_metric(name, float(np.nanmean(values)))
        return [None if np.isnan(value) else float(value) for value in reward_GN.reshape(-1)]

    def _groups(self, values: list[float | None]) -> np.ndarray:
        """(groups, group_size), NaN for None."""
        return np.array([np.nan if v is None else v for v in values], dtype=float).reshape(-1, self.group_size)


def shaped(quality_GN: np.ndarray, shape: str) -> np.ndarray:
    """The quality reward as it enters the product: "raw"; "sigmoid", in (0, 1) whatever its sign; "min_shift", less the
    group's minimum (`add_bias` in the authors' code, off in their scripts).

    Where r < 0, r * Div grows as Div falls: raw scores of a reward model turn the method around.
    """
    if shape == "sigmoid":
        return 0.5 * (1 + np.tanh(quality_GN / 2))  # no overflow
    if shape == "min_shift":
        known_GN = np.where(np.isnan(quality_GN), np.inf, quality_GN)
        return quality_GN - known_GN.min(1, keepdims=True)
    return quality_GN


def z_scores(values_GN: np.ndarray) -> np.ndarray:
    """Less the mean, over the standard deviation of each group (unbiased, as in verl); 0 where all are equal."""
    known_GN = ~np.isnan(values_GN)
    n_G1 = known_GN.sum(1, keepdims=True)
    mean_G1 = np.where(known_GN, values_GN, 0).sum(1, keepdims=True) / np.maximum(n_G1, 1)
    centred_GN = values_GN - mean_G1
    std_G1 = np.sqrt(np.where(known_GN, centred_GN, 0).__pow__(2).sum(1, keepdims=True) / np.maximum(n_G1 - 1, 1))
    return centred_GN / (std_G1 + 1e-6)


class UnlikelinessReward:
    """How unlikely a rollout is within its group, by the mean log-probability l of its tokens (GRPO-Unlikeliness).

        1 - weight (n - rank) / n       He et al., whom the paper cites: rank 0 is the likeliest of the n rollouts
        1 - (l - min) / (max - min)     min_max, what the authors' code has instead; 1 if all are equal

    He et al.'s form and their weight, 1/4, are from memory. Equals share the mean of their ranks.

    Needs the column `logprobs`, per token, which `shared.training.grpo.GRPOTrainer` adds.
    """

    __name__ = "unlikeliness"
    needs_logprobs = True

    def __init__(self, group_size: int, *, min_max: bool = False, weight: float = 0.25):
        self.group_size, self.min_max, self.weight = group_size, min_max, weight

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        logprobs = column("logprobs", columns, len(completions), self.__name__)
        mean_GN = np.array([np.mean(row) if len(row) else 0.0 for row in logprobs]).reshape(-1, self.group_size)
        if self.min_max:
            low_G1, high_G1 = mean_GN.min(1, keepdims=True), mean_GN.max(1, keepdims=True)
            unlikely_GN = 1 - (mean_GN - low_G1) / np.maximum(high_G1 - low_G1, 1e-12)
        else:
            rank_GN = rankdata(-mean_GN, axis=1) - 1
            unlikely_GN = 1 - self.weight * (self.group_size - rank_GN) / self.group_size
        return checked(unlikely_GN.reshape(-1).tolist(), len(completions), self.__name__)


def make_reward(config: Config, quality: Reward, same: Callable | None) -> DiversityAwareReward:
    """The reward of an arm. `same` says which pairs of texts are equivalent (for the diversities by classes)."""
    n = config.num_generations
    diversity = {
        "none": lambda: None,
        "classes": lambda: SemanticDiversityReward(n, same),
        "true_classes": lambda: SemanticDiversityReward(n, same),
        "ngram": lambda: NGramDiversityReward(n, n=4),
        "unlikeliness": lambda: UnlikelinessReward(n),
        "unlikeliness_min_max": lambda: UnlikelinessReward(n, min_max=True),
    }[config.diversity]()
    return DiversityAwareReward(quality, diversity, group_size=n, combine=config.combine, shape=config.shape)
