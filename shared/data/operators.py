"""Guess the operators: which two of + - * lead from three digits to the target? A verifiable world with several
solutions per problem, all of them easy to write down and hard to find in one pass.

    prompt      3 4 5 7            digits a b c and the target, modulo 10
    completion  so 3 * 4 = 2 then 2 + 5 = 7 .

A completion opens each of its two equations with a word out of `CONNECTIVES` and may add remarks after the full stop;
neither means anything. What it means is its operators and intermediate values (`meaning`). It is right if both
equations hold modulo 10, use the problem's digits from left to right, and end in the target (`is_right`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from shared.data.arith import OPERATIONS
from shared.data.splits import split_of, split_stream
from shared.experiments.errors import UserError

CONNECTIVES = ("so", "then", "first", "next", "now", "try")
_REMARKS = (
    "indeed well perhaps clearly anyway really quite surely maybe honestly certainly obviously hopefully luckily "
    "naturally apparently evidently frankly truly simply nearly almost rather fairly plainly finally basically "
    "roughly likely somehow"
)
REMARKS = tuple(_REMARKS.split())
VOCABULARY = (*"0123456789", *OPERATIONS, "=", ".", *CONNECTIVES, *REMARKS)
SILENT = frozenset(CONNECTIVES + REMARKS)

PRIOR = {"+": 0.7, "-": 0.2, "*": 0.1}
LONGEST_REMARK = 5


@dataclass(frozen=True)
class Attempt:
    """What a well-formed completion says.

    operators: the two operators.
    holds: whether both equations hold modulo 10 and the second begins with the first one's result.
    digits: the three operands.
    result: what the second equation ends in.
    remarks: words after the full stop.
    """

    operators: tuple[str, str]
    holds: bool
    digits: tuple[int, int, int]
    result: int
    remarks: int


def operator_rows(n: int | None, split: str, seed: int = 0) -> list[dict]:
    """`n` different problems (all of them if None) as rows of prompt, question, digits and answer.

    A problem's own text decides its split, so train, dev and test cannot overlap; `seed` decides the order.

    Raises UserError if the split has fewer than `n` problems (there are 5 757 in all).
    """
    rng = split_stream("operators", split, seed)
    rows = [row for row in _problems() if split_of(row["prompt"]) == split]
    if n is not None and n > len(rows):
        raise UserError(f"operators: the {split} split has {len(rows)} problems, {n} were asked for")
    rng.shuffle(rows)
    return rows[:n]


def operator_traces(n: int, seed: int = 0, *, solving: float = 0.3, remarks: float = 0.1) -> list[tuple[str, str]]:
    """`n` (prompt, completion) examples over training problems for a policy that is competent at arithmetic and only
    partly at the task.

    Args:
        solving: share of completions with a uniformly drawn pair of operators that reaches the target. The others are
            attempts: operators from `PRIOR`, whatever the target, with right arithmetic.
        remarks: share of completions with a remark of 2 to 5 words.
    """
    rng = split_stream("operators/traces", "train", seed)
    rows = operator_rows(None, "train", seed)
    examples = []
    for _ in range(n):
        row = rng.choice(rows)
        if rng.random() < solving:
            operators = rng.choice(solutions(row["digits"], int(row["answer"])))
        else:
            operators = tuple(rng.choices(list(PRIOR), weights=list(PRIOR.values()), k=2))
        remark = rng.choices(REMARKS, k=rng.randint(2, LONGEST_REMARK)) if rng.random() < remarks else []
        examples.append((row["prompt"], write(row["digits"], operators, rng.choices(CONNECTIVES, k=2), remark)))
    return examples


def solutions(digits: tuple[int, int, int] | list[int], target: int) -> list[tuple[str, str]]:
    """The pairs of operators that reach the target."""
    a, b, c = digits
    return [(p, q) for p, q in product(OPERATIONS, repeat=2) if _apply(q, _apply(p, a, b), c) == target]


def write(digits, operators, connectives=("so", "then"), remark=()) -> str:
    """A completion with right arithmetic."""
    a, b, c = digits
    p, q = operators
    between = _apply(p, a, b)
    result = _apply(q, between, c)
    equations = f"{connectives[0]} {a} {p} {b} = {between} {connectives[1]} {between} {q} {c} = {result} ."
    return " ".join([equations, *remark])


def parse(completion: str) -> Attempt | None:
    """What the completion says; None if it has not the form of two equations, full stop and remarks."""
    body, stop, remark = completion.partition(" .")
    words = body.split()
    extra = remark.split()
    if not stop or len(words) != 12 or not set(extra) <= SILENT or not {words[0], words[6]} <= set(CONNECTIVES):
        return None
    (a, p, b, equals, u), (v, q, c, equals_too, w) = words[1:6], words[7:12]
    if not {p, q} <= set(OPERATIONS) or {equals, equals_too} != {"="}:
        return None
    if not all(len(digit) == 1 and digit.isdecimal() and digit.isascii() for digit in (a, b, u, v, c, w)):
        return None
    holds = u == v and _apply(p, int(a), int(b)) == int(u) and _apply(q, int(v), int(c)) == int(w)
    return Attempt((p, q), holds, (int(a), int(b), int(c)), int(w), len(extra))


def is_right(completion: str, digits, answer: str | int) -> bool:
    """Whether the completion solves the problem."""
    found = parse(completion)
    return found is not None and found.holds and found.digits == tuple(digits) and found.result == int(answer)


def meaning(completion: str) -> tuple[str, ...]:
    """What the completion means: its words without connectives and remarks. For well-formed completions that is the
    operands, the operators and the intermediate values."""
    return tuple(word for word in completion.split() if word not in SILENT)


def remark_words(completion: str) -> int:
    """Number of meaningless words beyond the connectives that open the two equations."""
    return max(0, sum(word in SILENT for word in completion.split()) - 2)


def _problems() -> list[dict]:
    rows = []
    for digits in product(range(10), repeat=3):
        for target in range(10):
            if solutions(digits, target):
                prompt = " ".join(map(str, (*digits, target)))
                rows.append({"prompt": prompt, "question": prompt, "digits": list(digits), "answer": str(target)})
    return rows


def _apply(operator: str, left: int, right: int) -> int:
    return OPERATIONS[operator](left, right) % 10
