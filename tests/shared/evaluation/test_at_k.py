from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from shared.evaluation.at_k import majority_at_k, pass_at_k


def majority_by_enumeration(answers, gold, k) -> Fraction:
    total, subsets = Fraction(0), 0
    for subset in combinations(answers, k):
        subsets += 1
        votes = Counter(a for a in subset if a is not None)
        winners = [a for a, count in votes.items() if count == max(votes.values())]
        total += Fraction(gold in winners, max(1, len(winners)))
    return total / subsets


@pytest.mark.parametrize("k", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(k):
    correct = np.tril(np.ones((8, 7)), -1)  # 0 .. 7 of 7 correct
    expected = [Fraction(sum(any(s) for s in combinations(row, k)), comb(7, k)) for row in correct]
    assert pass_at_k(correct, k).tolist() == [float(f) for f in expected]


def test_pass_at_k_is_exact_where_the_product_formula_loses_digits():
    correct = np.zeros((1, 4096), dtype=bool)
    correct[0, 17] = True
    assert pass_at_k(correct, 1).tolist() == [1 / 4096]
    assert pass_at_k(correct, 2048).tolist() == [0.5]  # one correct sample is in half of the subsets of half the size
    assert pass_at_k(~correct, 2).tolist() == [1.0]


def test_pass_at_k_refuses_what_is_not_a_table_of_correctness():
    with pytest.raises(ValueError, match="between 1 and the 3 samples"):
        pass_at_k(np.ones((2, 3)), 4)
    with pytest.raises(ValueError, match="between 1"):
        pass_at_k(np.ones((2, 3)), 0)
    with pytest.raises(ValueError, match="problem 1"):
        pass_at_k([[1, 0], [0.5, 0]], 1)
    with pytest.raises(ValueError, match="problem 0"):
        pass_at_k([[1, float("nan")]], 1)
    with pytest.raises(ValueError, match="shape"):
        pass_at_k(np.ones(3), 1)


@pytest.mark.parametrize("seed", range(6))
def test_majority_at_k_is_the_mean_over_all_subsets(seed):
    rng = np.random.default_rng(seed)
    answers = [[None, "a", "b", "c", "d"][i] for i in rng.integers(0, 5, size=9)]
    for k in range(1, 10):
        for gold in ("a", "d", "unseen"):
            assert majority_at_k(answers, gold, k) == float(majority_by_enumeration(answers, gold, k))


def test_majority_at_k_limits():
    assert majority_at_k(["1"] * 5, "1", 3) == 1
    assert majority_at_k([None] * 5, "1", 3) == 0
    assert majority_at_k(["1", "2"], "1", 2) == 0.5  # a tie
    assert majority_at_k(["1", "2", "2", "3"], "2", 1) == 0.5  # one vote: the share of right answers
    with pytest.raises(ValueError, match="between 1 and the 2 samples"):
        majority_at_k(["1", "2"], "1", 3)
    with pytest.raises(ValueError, match="gold"):
        majority_at_k(["1", None], None, 1)


def test_majority_at_k_is_fast_at_evaluation_size():
    """128 samples with 40 different answers, by Monte Carlo."""
    rng = np.random.default_rng(0)
    answers = np.concatenate([np.zeros(24), rng.integers(1, 40, size=104)]).astype(int)
    draws = np.stack([rng.permutation(answers)[:8] for _ in range(4000)])
    wins = []
    for draw in draws:
        counts = np.bincount(draw, minlength=40)
        wins.append((counts[0] == counts.max()) / np.sum(counts == counts.max()) if counts[0] else 0.0)
    assert majority_at_k(answers.tolist(), 0, 8) == pytest.approx(np.mean(wins), abs=5 * np.std(wins) / 4000**0.5)
