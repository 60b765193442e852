"""Left-to-right arithmetic modulo m, and a writer with fixed wrong beliefs about multiplication.

    prompt      7 + 5 * 3 - 2 * 4 =      (no precedence: the chain is folded from the left, modulo m after each step)
    solution    2 6 4 6 ANS 6            (m = 10)

A model that learns from `misconceived_solutions` adds and subtracts well, and holds each product with a probability of
its own: what reinforcement learning can bring up is there, but rare. Problems and their answers are always true.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shared.data.arith import OPERATIONS
from shared.data.splits import split_of, split_stream
from shared.experiments.errors import UserError
from shared.rewards.contract import Completions, column, texts

ANSWER = "ANS"


def vocabulary(modulus: int = 10) -> list[str]:
    """Every word of prompts and solutions."""
    return [*map(str, range(modulus)), *OPERATIONS, "=", ANSWER]


def fold_rows(
    n: int, split: str, seed: int = 0, *, n_ops: tuple[int, int] = (4, 4), modulus: int = 10
) -> list[dict[str, str]]:
    """`n` rows of prompt, solution and answer; the same arguments always give the same rows.

    The prompt alone decides a problem's split, so no seeds or sizes make train, dev and test overlap.

    Args:
        split: train, dev or test.
        n_ops: fewest and most operations of a chain (uniform): the difficulty.
        modulus: operands and results are 0..modulus-1.

    Raises:
        UserError: an argument out of range.
    """
    fewest, most = n_ops
    if not 2 <= fewest <= most:  # with one operation a split may have next to no problems
        raise UserError(f"fold: n_ops must be (fewest, most) with 2 <= fewest <= most, got {tuple(n_ops)}")
    if modulus < 2:
        raise UserError(f"fold: modulus must be at least 2, got {modulus}")
    rng = split_stream("fold", split, seed)
    rows: list[dict[str, str]] = []
    while len(rows) < n:
        count = rng.randint(fewest, most)
        operands = [rng.randrange(modulus) for _ in range(count + 1)]
        signs = rng.choices(list(OPERATIONS), k=count)
        prompt = " ".join([str(operands[0]), *(f"{s} {x}" for s, x in zip(signs, operands[1:], strict=True)), "="])
        if split_of(prompt) == split:
            results = _fold(operands, signs, modulus)
            rows.append({"prompt": prompt, "solution": written(results), "answer": str(results[-1])})
    return rows


def written(results: Sequence[int]) -> str:
    return " ".join([*map(str, results), ANSWER, str(results[-1])])


@dataclass(frozen=True)
class Misconceptions:
    """What a writer believes about products modulo m.

    Attributes:
        p_right: (a, b) -> how often the writer gets a * b right.
        wrong: (a, b) -> the one wrong digit written otherwise.
    """

    p_right: Mapping[tuple[int, int], float]
    wrong: Mapping[tuple[int, int], int]


def misconceptions(seed: int = 0, *, modulus: int = 10, p_right: tuple[float, float] = (0.1, 0.6)) -> Misconceptions:
    """One wrong digit, and a probability of the right one uniform in `p_right`, for every ordered pair of factors."""
    rng = random.Random(f"fold/misconceptions/{seed}/{modulus}")
    pairs = [(a, b) for a in range(modulus) for b in range(modulus)]
    wrong = {(a, b): (a * b + rng.randrange(1, modulus)) % modulus for a, b in pairs}
    return Misconceptions({pair: rng.uniform(*p_right) for pair in pairs}, wrong)


def misconceived_solutions(
    rows: Iterable[Mapping[str, str]], beliefs: Misconceptions, seed: int = 0, *, modulus: int = 10
) -> list[tuple[str, str]]:
    """(prompt, solution) as the writer writes it: each product is right or wrong by chance, what follows builds on what
    was written, additions and subtractions are right."""
    rng = random.Random(f"fold/solutions/{seed}")

    def product(a: int, b: int) -> int:
        return a * b if rng.random() < beliefs.p_right[a, b] else beliefs.wrong[a, b]

    found = []
    for row in rows:
        words = row["prompt"].split()[:-1]
        results = _fold([int(x) for x in words[::2]], words[1::2], modulus, {**OPERATIONS, "*": product})
        found.append((row["prompt"], written(results)))
    return found


def fold_reward(prompts: Sequence[str], completions: Completions, **columns) -> list[float]:
    """1 if the completion ends in `ANS` and the row's `answer`, after at most one result per operation, else 0.

    So where completions may have three tokens more than their chain has operations, one that was cut off, without an
    end-of-sequence token, gets 0.
    """
    answers = column("answer", columns, len(completions), "fold")
    rewards = []
    for prompt, text, answer in zip(prompts, texts(completions), answers, strict=True):
        words = text.split()
        n_ops = len(prompt.split()) // 2 - 1
        rewards.append(float(words[-2:] == [ANSWER, answer] and len(words) <= n_ops + 2))
    return rewards


def _fold(operands: Sequence[int], signs: Sequence[str], modulus: int, operations: Mapping = OPERATIONS) -> list[int]:
    """The result after each operation."""
    results = []
    value = operands[0]
    for sign, operand in zip(signs, operands[1:], strict=True):
        value = operations[sign](value, operand) % modulus
        results.append(value)
    return results
