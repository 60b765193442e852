from itertools import product

import pytest

from shared.data import operators as world
from shared.data.splits import SPLITS, split_of
from shared.experiments.errors import UserError


def pythons_value(a, p, b, q, c) -> int:
    return eval(f"(({a}{p}{b}) {q} {c}) % 10")  # reducing in between changes nothing modulo 10


def test_solutions_are_all_pairs_that_reach_the_target():
    for digits, target in [((3, 4, 5), 7), ((0, 0, 0), 0), ((9, 9, 1), 8), ((2, 2, 2), 4)]:
        expected = [(p, q) for p, q in product("+-*", repeat=2) if pythons_value(*_mix(digits, p, q)) == target]
        assert sorted(world.solutions(digits, target)) == sorted(expected)


def _mix(digits, p, q):
    a, b, c = digits
    return a, p, b, q, c


def test_every_problem_has_a_solution_and_stands_in_one_split():
    rows = {split: world.operator_rows(None, split) for split in SPLITS}
    prompts = [row["prompt"] for found in rows.values() for row in found]
    reachable = {
        f"{a} {b} {c} {pythons_value(a, p, b, q, c)}"
        for a, b, c in product(range(10), repeat=3)
        for p, q in product("+-*", repeat=2)
    }
    assert len(prompts) == len(set(prompts)) == 5757
    assert set(prompts) == reachable
    assert all(split_of(row["prompt"]) == split for split, found in rows.items() for row in found)


def test_rows_are_a_function_of_their_arguments():
    assert world.operator_rows(20, "test", 1) == world.operator_rows(20, "test", 1)
    assert world.operator_rows(20, "test", 1) != world.operator_rows(20, "test", 2)
    row = world.operator_rows(1, "dev")[0]
    assert row["prompt"].split() == [*map(str, row["digits"]), row["answer"]]


def test_too_many_rows_or_an_unknown_split():
    with pytest.raises(UserError, match=r"the dev split has \d+ problems, 9999 were asked for"):
        world.operator_rows(9999, "dev")
    with pytest.raises(UserError, match="split"):
        world.operator_rows(1, "validation")


def test_written_completions_hold_and_are_right_exactly_for_their_solutions():
    for row in world.operator_rows(50, "train"):
        for operators in product("+-*", repeat=2):
            text = world.write(row["digits"], operators, ("now", "try"), ("indeed", "well"))
            attempt = world.parse(text)
            assert attempt.holds
            assert attempt.operators == operators
            assert attempt.remarks == 2
            expected = pythons_value(*_mix(row["digits"], *operators))
            assert attempt.result == expected
            assert world.is_right(text, row["digits"], row["answer"]) == (expected == int(row["answer"]))


RIGHT = "so 3 * 4 = 2 then 2 + 5 = 7 ."


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (RIGHT, True),
        (RIGHT + " indeed so", True),
        ("so 3 * 4 = 3 then 3 + 4 = 7 .", False),  # the first equation is wrong
        ("so 3 * 4 = 2 then 3 + 4 = 7 .", False),  # the second does not go on from the first
        ("so 3 + 4 = 7 then 7 * 1 = 7 .", False),  # not the problem's digits
        ("so 3 * 4 = 2 then 2 * 5 = 0 .", False),  # another target
        (RIGHT.removesuffix(" ."), False),  # cut off
        ("3 * 4 = 2 then 2 + 5 = 7 .", False),
        (RIGHT + " 7", False),
        ("so 3 * ４ = 2 then 2 + 5 = 7 .", False),  # a digit, but not ours
        ("so 3 / 4 = 2 then 2 + 5 = 7 .", False),
        ("", False),
        (".", False),
    ],
)
def test_is_right(text, right):
    assert world.is_right(text, (3, 4, 5), "7") is right


def test_meaning_ignores_connectives_and_remarks_alone():
    same = "try 3 * 4 = 2 now 2 + 5 = 7 . clearly so"
    assert world.meaning(RIGHT) == world.meaning(same)
    assert world.meaning(RIGHT) != world.meaning(RIGHT.replace("*", "+"))
    assert world.meaning(RIGHT) != world.meaning(RIGHT.replace("2", "3"))
    assert world.meaning("") == ()
    assert (world.remark_words(RIGHT), world.remark_words(same), world.remark_words("")) == (0, 2, 0)


def test_traces_are_competent_at_arithmetic_and_skewed():
    examples = world.operator_traces(4000, seed=1)
    attempts = [world.parse(text) for _, text in examples]
    assert all(attempt is not None and attempt.holds for attempt in attempts)
    assert {split_of(prompt) for prompt, _ in examples} == {"train"}
    by_first = [sum(a.operators[0] == sign for a in attempts) / len(attempts) for sign in "+-*"]
    assert by_first[0] > 0.5 > by_first[1]
    assert by_first[0] > by_first[2] > 0.1
    remarks = sum(a.remarks > 0 for a in attempts) / len(attempts)
    assert abs(remarks - 0.1) < 0.025
    right = [world.is_right(text, [int(d) for d in prompt.split()[:3]], prompt.split()[3]) for prompt, text in examples]
    assert 0.3 < sum(right) / len(right) < 0.55
    assert world.operator_traces(5, seed=1) == examples[:5]


def test_vocabulary_covers_prompts_and_completions():
    words = {word for prompt, text in world.operator_traces(2000) for word in f"{prompt} {text}".split()}
    assert words <= set(world.VOCABULARY)
    assert len(set(world.VOCABULARY)) == len(world.VOCABULARY)
