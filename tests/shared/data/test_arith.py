import re

import pytest

from shared.data.arith import arith_rows, vocabulary
from shared.data.splits import SPLITS, split_of
from shared.experiments.errors import UserError


def left_to_right(question: str) -> int:
    """Python's own value of the chain, with the brackets that left-to-right means."""
    chain, _, modulus = question.partition(" mod ")
    first, *rest = re.findall(r"[-+*]?\d+", chain)
    expression = first
    for term in rest:
        expression = f"({expression}{term})" + (f"%{modulus}" if modulus else "")
    return eval(expression)


@pytest.mark.parametrize("modulus", [None, 11])
def test_answers_and_steps_are_those_of_python(modulus):
    for row in arith_rows(300, "train", n_ops=(1, 6), modulus=modulus):
        assert int(row["answer"]) == left_to_right(row["question"])
        signs_and_operands = re.findall(r"([-+*])(\d+)", row["question"])
        assert len(row["steps"]) == len(signs_and_operands)
        value = re.match(r"\d+", row["question"]).group()
        for step, (sign, operand) in zip(row["steps"], signs_and_operands, strict=True):
            left, _, result = step.removeprefix("<<").removesuffix(">>").partition("=")
            assert left == f"{value}{sign}{operand}"
            expected = eval(left)
            assert int(result) == (expected if modulus is None else expected % modulus)
            value = result
        assert value == row["answer"]


def test_literal_form():
    row = arith_rows(1, "train", seed=3, n_ops=(2, 2), operators="-", max_operand=1)[0]
    assert row == {"question": "1-1-1", "steps": ["<<1-1=0>>", "<<0-1=-1>>"], "answer": "-1"}


def test_arguments_bound_the_problems():
    rows = arith_rows(400, "train", n_ops=(2, 4), operators="+*", max_operand=5)
    assert {len(row["steps"]) for row in rows} == {2, 3, 4}
    assert set(re.findall(r"\d", " ".join(row["question"] for row in rows))) == set("12345")
    assert set(re.findall(r"[^\d]", "".join(row["question"] for row in rows))) == set("+*")


@pytest.mark.parametrize(("modulus", "max_operand"), [(10, 9), (4, 9), (23, 9)])
def test_the_vocabulary_holds_every_word(modulus, max_operand):
    rows = arith_rows(3000, "train", n_ops=(1, 4), modulus=modulus, max_operand=max_operand)
    texts = [text for row in rows for text in (row["question"], *row["steps"], row["answer"])]
    written = {word for text in texts for word in re.findall(r"\d+|[a-z]+|<<|>>|\S", text)}
    words = vocabulary(modulus, max_operand)
    assert len(set(words)) == len(words)
    assert written <= set(words)
    assert {word for word in set(words) - written if not word.isdecimal()} == set()


def test_same_arguments_same_rows():
    assert arith_rows(20, "dev", seed=1) == arith_rows(20, "dev", seed=1)
    assert arith_rows(20, "dev", seed=1) != arith_rows(20, "dev", seed=2)


def test_splits_share_no_problem_even_when_they_exhaust_the_space():
    # 243 different problems, far fewer than are drawn: any leak would show.
    problems = {
        split: {row["question"] for seed in range(3) for row in arith_rows(800, split, seed, n_ops=(1, 1))}
        for split in SPLITS
    }
    assert sum(map(len, problems.values())) == len(set.union(*problems.values())) == 3 * 9 * 9


def test_split_sizes():
    counts = {split: sum(split_of(str(i)) == split for i in range(10_000)) for split in SPLITS}
    # five standard deviations of a binomial count
    assert abs(counts["train"] - 8000) < 200
    assert abs(counts["dev"] - 1000) < 150
    assert abs(counts["test"] - 1000) < 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "unknown split 'valid'; valid: train, dev, test"),
        ({"n_ops": (0, 2)}, r"n_ops must be .* got \(0, 2\)"),
        ({"n_ops": (3, 2)}, r"n_ops must be"),
        ({"operators": "+/"}, r"operators must be some of \+-\*, got '\+/'"),
        ({"operators": ""}, "operators must be"),
        ({"max_operand": 0}, "max_operand must be at least 1, got 0"),
        ({"modulus": 1}, "modulus must be at least 2, got 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        arith_rows(**{"n": 1, "split": "train", **arguments})


def test_a_split_without_problems_is_an_error():
    # One problem in all, `1+1`: it is in one split, the two others are empty.
    home = split_of("1+1")
    for split in set(SPLITS) - {home}:
        with pytest.raises(UserError, match=f"the {split} split has next to no problems"):
            arith_rows(1, split, n_ops=(1, 1), operators="+", max_operand=1)
