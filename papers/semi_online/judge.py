"""Win rates by a language model that compares two responses, as AlpacaEval and Arena-Hard have them judged."""

from __future__ import annotations

from collections.abc import Sequence

from shared.generation import Prompt
from shared.rewards.contract import conversation
from shared.rewards.judge import Judge, bracketed

QUESTION = """Two assistants answered a user. Say which answer serves the user better: is it correct, complete, to the \
point? Do not be swayed by the order of the answers or by their length.

[User]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Explain your choice in a few sentences, then end with [[A]], [[B]] or, if neither is better, [[tie]]."""


def read_choice(reply: str) -> float | None:
    """1 if the reply prefers answer A, 0 for B, 1/2 for a tie; None if it does not say."""
    return {"a": 1.0, "b": 0.0, "tie": 0.5}.get(bracketed(reply))


def judged_wins(
    judge: Judge[float], prompts: Sequence[Prompt], responses: Sequence[str], baseline: Sequence[str]
) -> list[float | None]:
    """For each prompt 1 if the judge prefers the response to the baseline's, 0 if not, 1/2 for a tie.

    Judges favour one of the two places, so each pair is asked about in both orders and the mean counts; None if the
    judge gave no verdict on one of them (`judge.counts` says why). Equal texts are a tie that nobody is asked about.
    """
    asked = [i for i, pair in enumerate(zip(responses, baseline, strict=True)) if pair[0] != pair[1]]
    questions = [
        [{"role": "user", "content": QUESTION.format(prompt=conversation(prompts[i]), first=first, second=second)}]
        for i in asked
        for first, second in ((responses[i], baseline[i]), (baseline[i], responses[i]))
    ]
    verdicts = judge.ask(questions) if questions else []
    wins: list[float | None] = [0.5] * len(prompts)
    for i, ours_first, theirs_first in zip(asked, verdicts[::2], verdicts[1::2], strict=True):
        known = ours_first is not None and theirs_first is not None
        wins[i] = (ours_first + 1 - theirs_first) / 2 if known else None
    return wins
