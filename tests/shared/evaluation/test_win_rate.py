import numpy as np
import pytest

from shared.evaluation.win_rate import wins


def test_wins_ties_and_losses():
    assert wins([3, 1, 2, -1], [1, 3, 2, -2]).tolist() == [1, 0, 0.5, 1]


def test_the_win_rates_of_the_two_sides_sum_to_one():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 4, size=(2, 300))
    literal = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)) / 300
    assert wins(ours, theirs).mean() == pytest.approx(literal)
    assert wins(ours, theirs).mean() + wins(theirs, ours).mean() == pytest.approx(1)


def test_wins_refuses_items_that_cannot_be_compared():
    with pytest.raises(ValueError, match="item 1"):
        wins([1, float("nan")], [0, 0])
    with pytest.raises(ValueError, match="item 0"):
        wins([1, 1], [float("nan"), 0])
    with pytest.raises(ValueError, match="shapes"):
        wins([1, 2], [1])
