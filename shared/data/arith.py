"""Procedural arithmetic of graded difficulty: chains `a op b op c ...`, worked out from left to right.

A chain of n operations takes n sequentially dependent steps, written as in GSM8K-Aug:

    question  7+5*3-2 mod 11      (no precedence: ((7+5)*3)-2, reduced modulo 11 after each step)
    steps     <<7+5=1>>  <<1*3=3>>  <<3-2=1>>
    answer    1
"""

from __future__ import annotations

import operator

from shared.data.splits import split_of, split_stream
from shared.experiments.errors import UserError

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def vocabulary(modulus: int, max_operand: int = 9) -> list[str]:
    """Every word of `arith_rows`, where numbers, operators and the brackets of steps are words."""
    return ["<<", ">>", *OPERATIONS, "=", "mod", *map(str, range(max(modulus, max_operand) + 1))]


def arith_rows(
    n: int,
    split: str,
    seed: int = 0,
    *,
    n_ops: tuple[int, int] = (3, 5),
    operators: str = "+-*",
    max_operand: int = 9,
    modulus: int | None = None,
) -> list[dict]:
    """`n` rows of question, steps and answer; the same arguments always give the same rows.

    The question alone decides a problem's split, so no seeds or sizes make train, dev and test overlap. Within a
    split problems are drawn independently: where `n_ops` and `max_operand` allow few problems, some come up twice.

    Args:
        split: train, dev or test.
        n_ops: fewest and most operations of a chain (uniform): the difficulty.
        operators: those to draw from, each equally likely.
        max_operand: operands are uniform on 1..max_operand.
        modulus: reduce every intermediate result to 0..modulus-1; None for plain integers.

    Raises:
        UserError: an argument out of range, or a problem space so small that the split is empty.
    """
    fewest, most = n_ops
    if not 1 <= fewest <= most:
        raise UserError(f"arith: n_ops must be (fewest, most) with 1 <= fewest <= most, got {tuple(n_ops)}")
    if not operators or set(operators) - set(OPERATIONS):
        raise UserError(f"arith: operators must be some of {''.join(OPERATIONS)}, got {operators!r}")
    if max_operand < 1:
        raise UserError(f"arith: max_operand must be at least 1, got {max_operand}")
    if modulus is not None and modulus < 2:
        raise UserError(f"arith: modulus must be at least 2, got {modulus}")
    rng = split_stream("arith", split, seed)
    rows: list[dict] = []
    draws = 0
    while len(rows) < n:
        draws += 1
        # A split holds a tenth of all problems or more: hundreds of misses in a row mean that it holds none.
        if draws > 100 * n + 1000:
            raise UserError(
                f"arith: the {split} split has next to no problems with {fewest}-{most} operations of {operators!r} on "
                f"1..{max_operand}: raise n_ops or max_operand"
            )
        count = rng.randint(fewest, most)
        operands = [rng.randint(1, max_operand) for _ in range(count + 1)]
        row = _row(operands, rng.choices(operators, k=count), modulus)
        if split_of(row["question"]) == split:
            rows.append(row)
    return rows


def _row(operands: list[int], signs: list[str], modulus: int | None) -> dict:
    value = operands[0]
    question = str(value)
    steps = []
    for sign, operand in zip(signs, operands[1:], strict=True):
        before, value = value, OPERATIONS[sign](value, operand)
        if modulus is not None:
            value %= modulus
        question += f"{sign}{operand}"
        steps.append(f"<<{before}{sign}{operand}={value}>>")
    if modulus is not None:
        question += f" mod {modulus}"
    return {"question": question, "steps": steps, "answer": str(value)}
