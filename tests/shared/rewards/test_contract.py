import pytest

from shared.rewards.contract import checked


def test_only_finite_numbers_and_none_leave_a_reward():
    assert checked([1, None, 0.5], 3, "r") == [1.0, None, 0.5]
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"r returned {bad} for row 1"):
            checked([0.0, bad], 2, "r")
    with pytest.raises(ValueError, match="2 rewards for 3 completions"):
        checked([0.0, 1.0], 3, "r")
