import re

import pytest

from shared.data import fold
from shared.data.fold import (
    fold_reward,
    fold_rows,
    misconceived_solutions,
    misconceptions,
    written,
)
from shared.data.splits import SPLITS
from shared.experiments.errors import UserError


def left_to_right(prompt: str, modulus: int) -> list[int]:
    """Python's own value after each operation, with the brackets that left-to-right means."""
    first, *rest = re.findall(r"[-+*]? ?\d+", prompt)
    expression, values = first, []
    for term in rest:
        expression = f"(({expression}){term}) % {modulus}"
        values.append(eval(expression))
    return values


@pytest.mark.parametrize(("n_ops", "modulus"), [((4, 4), 10), ((2, 8), 23)])
def test_solutions_are_those_of_python(n_ops, modulus):
    vocabulary = set(fold.vocabulary(modulus))
    for row in fold_rows(200, "train", n_ops=n_ops, modulus=modulus):
        values = left_to_right(row["prompt"], modulus)
        assert n_ops[0] <= len(values) <= n_ops[1]
        assert row["solution"].split() == [*map(str, values), "ANS", str(values[-1])]
        assert row["answer"] == str(values[-1])
        assert set(row["prompt"].split()) | set(row["solution"].split()) <= vocabulary


def test_literal_form():
    row = fold_rows(1, "dev", seed=5, n_ops=(2, 2), modulus=2)[0]
    assert re.fullmatch(r"[01] [-+*] [01] [-+*] [01] =", row["prompt"])
    assert written([4, 7]) == "4 7 ANS 7"


def test_same_arguments_same_rows():
    assert fold_rows(20, "dev", seed=1) == fold_rows(20, "dev", seed=1)
    assert fold_rows(20, "dev", seed=1) != fold_rows(20, "dev", seed=2)


def test_splits_share_no_problem_even_when_they_exhaust_the_space():
    problems = {
        split: {row["prompt"] for seed in range(2) for row in fold_rows(3000, split, seed, n_ops=(2, 2), modulus=3)}
        for split in SPLITS
    }
    assert sum(map(len, problems.values())) == len(set.union(*problems.values())) == 3**3 * 3**2


def test_misconceptions_are_about_every_product_and_always_wrong():
    beliefs = misconceptions(seed=3)
    assert len(beliefs.wrong) == len(beliefs.p_right) == 100
    assert all(beliefs.wrong[a, b] != a * b % 10 and 0 <= beliefs.wrong[a, b] < 10 for a, b in beliefs.wrong)
    assert all(0.1 <= p <= 0.6 for p in beliefs.p_right.values())
    assert beliefs == misconceptions(seed=3) != misconceptions(seed=4)


def test_a_writer_who_is_always_right_writes_the_truth():
    rows = fold_rows(50, "train")
    told = misconceived_solutions(rows, misconceptions(p_right=(1, 1)))
    assert told == [(row["prompt"], row["solution"]) for row in rows]


def test_errors_are_those_of_the_tables_and_propagate():
    beliefs = misconceptions(seed=1)
    rows = fold_rows(6000, "train", n_ops=(2, 5))
    seen: dict[tuple[int, int], list[bool]] = {}
    for prompt, solution in misconceived_solutions(rows, beliefs, seed=2):
        words = prompt.split()[:-1]
        *steps, mark, final = solution.split()
        assert mark == "ANS"
        assert final == steps[-1]
        value = int(words[0])
        for sign, operand, result in zip(words[1::2], map(int, words[2::2]), map(int, steps), strict=True):
            true = eval(f"({value} {sign} {operand}) % 10")
            if sign == "*":
                assert result in (true, beliefs.wrong[value, operand])
                seen.setdefault((value, operand), []).append(result == true)
            else:
                assert result == true
            value = result  # what follows builds on what was written
    for pair, outcomes in seen.items():
        if len(outcomes) > 50:
            p = beliefs.p_right[pair]
            assert abs(sum(outcomes) / len(outcomes) - p) < 5 * (p * (1 - p) / len(outcomes)) ** 0.5, pair


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("7 9 5 9 ANS 9", 1),
        ("0 0 0 0 ANS 9", 1),  # only the answer counts
        ("ANS 9", 1),  # and so does the short way
        ("7 9 5 9 ANS 8", 0),
        ("7 9 5 9 9", 0),
        ("7 9 5 9 ANS", 0),
        ("7 9 5 9 ANS 9 9", 0),
        ("7 9 5 9 3 ANS 9", 0),  # a result too many: may have been cut off
        ("", 0),
        ("+ = ANS", 0),
    ],
)
def test_reward(completion, reward):
    assert fold_reward(["1 + 6 - 8 * 5 - 6 ="], [completion], answer=["9"]) == [reward]


def test_reward_needs_its_column():
    with pytest.raises(UserError, match="fold needs the dataset column 'answer'; the dataset has: gold"):
        fold_reward(["1 + 1 + 1 ="], ["2 3 ANS 3"], gold=["3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "unknown split 'valid'; valid: train, dev, test"),
        ({"n_ops": (1, 2)}, r"n_ops must be .* got \(1, 2\)"),
        ({"n_ops": (3, 2)}, "n_ops must be"),
        ({"modulus": 1}, "modulus must be at least 2, got 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        fold_rows(**{"n": 1, "split": "train", **arguments})
