import re

import numpy as np
import pytest

from shared.experiments.errors import UserError
from shared.rewards.contract import checked, column


def test_only_finite_numbers_and_none_leave_a_reward():
    assert checked([1, None, 0.5], 3, "r") == [1.0, None, 0.5]
    for bad in (float("nan"), float("inf"), -float("inf"), "a", [1.0], {}):
        with pytest.raises(ValueError, match=re.escape(f"r returned {bad!r} for row 1; a reward must be")):
            checked([0.0, bad], 2, "r")
    with pytest.raises(ValueError, match="r returned nan for row 0"):
        checked(np.array([np.nan], dtype=np.float32), 1, "r")
    for bad in (None, 0.5, (0.5 for _ in range(2))):
        with pytest.raises(ValueError, match=r"r returned .* for 2 completions; it must return a list"):
            checked(bad, 2, "r")
    with pytest.raises(ValueError, match="2 rewards for 3 completions"):
        checked([0.0, 1.0], 3, "r")


def test_a_missing_column_is_told_from_what_trl_passes():
    passed = {"question": ["?"], "completion_ids": [[1]], "trainer_state": None, "log_metric": print}
    with pytest.raises(UserError, match=r"r needs the dataset column 'answer'; the dataset has: question$"):
        column("answer", passed, 1, "r")
    with pytest.raises(UserError, match=r"the dataset has: none$"):
        column("answer", {"log_extra": print}, 1, "r")
