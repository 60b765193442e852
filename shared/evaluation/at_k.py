"""pass@k and maj@k of n >= k samples per problem: exact expectations over all subsets of k samples.

Both are computed in integers and divided once, so the result is the exact value rounded to the nearest float.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def pass_at_k(correct: np.ndarray | Sequence[Sequence[float]], k: int) -> np.ndarray:
    """For each problem, the probability that at least one of k samples is correct.

        pass@k = 1 - C(n - c, k) / C(n, k)         for c correct of n samples

    Source: Chen et al. 2021 (arXiv 2107.03374), Eq. 1; DARLING (arXiv 2509.02534), Section 5.

    Args:
        correct: (problems, n), each entry 0 or 1 (or a bool).
        k: how many samples count, 1 <= k <= n.

    Returns: (problems,) in [0, 1].
    """
    correct_PN = np.asarray(correct, dtype=float)
    if correct_PN.ndim != 2:
        raise ValueError(f"correct must have the shape (problems, samples), not {correct_PN.shape}")
    if not np.isin(correct_PN, (0, 1)).all():
        problem = int(np.argwhere(~np.isin(correct_PN, (0, 1)))[0, 0])
        raise ValueError(f"problem {problem}: correct must be 0 or 1 for every sample, not {correct_PN[problem]}")
    n = correct_PN.shape[1]
    _check_k(k, n)
    subsets = math.comb(n, k)
    return np.array([(subsets - math.comb(n - int(c), k)) / subsets for c in correct_PN.sum(1)])


def majority_at_k(answers: Sequence[Hashable | None], gold: Hashable, k: int) -> float:
    """The probability that the most frequent answer among k of the n samples of one problem is `gold`.

    Source: self-consistency (Wang et al. 2022, arXiv 2203.11171), here in expectation over all subsets of k samples.
    Answers tied for the most votes win with equal probability.

    Args:
        answers: one per sample, already canonical (equal answers compare equal); None for a sample without an answer,
            which casts no vote. If no sample of a subset votes, the subset counts as wrong.
        gold: the right answer.
        k: how many samples vote, 1 <= k <= n.
    """
    _check_k(k, len(answers))
    if gold is None:
        raise ValueError("gold must be an answer, not None")
    votes = Counter(answers)
    silent = votes.pop(None, 0)
    right = votes.pop(gold, 0)
    wins = 0
    # The sum of 1 / (1 + ties) over subsets, in units of 1 / unit so that it stays an integer.
    unit = math.lcm(*range(1, k + 1))
    for top in range(1, min(right, k) + 1):
        for ties, subsets in _subsets_by_ties(list(votes.values()), silent, k - top, top).items():
            wins += math.comb(right, top) * subsets * (unit // (1 + ties))
    return wins / (math.comb(len(answers), k) * unit)


def _subsets_by_ties(counts: list[int], silent: int, size: int, top: int) -> Counter[int]:
    """How many ways there are to take `size` samples of the wrong answers and silent samples with no answer taken more
    than `top` times, by the number of answers taken exactly `top` times."""
    ways: Counter[tuple[int, int]] = Counter({(0, 0): 1})  # (samples taken, answers taken `top` times)
    for count in counts:
        grown: Counter[tuple[int, int]] = Counter()
        for (taken, ties), number in ways.items():
            for more in range(min(count, top, size - taken) + 1):
                grown[taken + more, ties + (more == top)] += number * math.comb(count, more)
        ways = grown
    by_ties: Counter[int] = Counter()
    for (taken, ties), number in ways.items():
        by_ties[ties] += number * math.comb(silent, size - taken)
    return by_ties


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} samples of each problem, not {k}")
