"""A language model as the judge, through any `Sampler`: a server's, vLLM's or a local model's."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from string import Formatter
from typing import Generic, TypeVar

from shared.generation import Completion, Prompt, Sampler, SamplingParams
from shared.generation.openai_backend import OpenAISampler, ServerError
from shared.rewards.contract import Completions, checked, column, conversation, log_shares, texts

T = TypeVar("T")


class Judge(Generic[T]):
    """Asks a language model questions and reads its answers.

    sampler: answers the questions; greedily by default.
    read: from the text of a reply to the verdict; None if there is none in it.
    counts: so far, "rows" (questions), "unparsable" (replies without a verdict), "truncated" (those of them that
        reached the limit of tokens), "failed" (the server refused the question, or gave no answer in spite of the
        sampler's retries; a warning says why).
    """

    def __init__(
        self,
        sampler: Sampler,
        read: Callable[[str], T | None],
        params: SamplingParams = SamplingParams(max_new_tokens=1024, temperature=0),  # noqa: B008 - it is frozen
    ):
        self.sampler, self.read, self.params = sampler, read, params
        self.counts: Counter[str] = Counter(unparsable=0, truncated=0, failed=0)

    def ask(self, questions: Sequence[Prompt]) -> list[T | None]:
        """The verdict on each question; None, and counted, where there is none.

        Raises ServerError if the server is dead (see `OpenAISampler.sample_each`): it must not look like a judge
        without an opinion.
        """
        verdicts = []
        self.counts["rows"] += len(questions)
        for reply in self._replies(questions):
            verdict = None if reply is None else self.read(reply.text)
            if reply is None:
                self.counts["failed"] += 1
            elif verdict is None:
                self.counts["unparsable"] += 1
                self.counts["truncated"] += reply.finish_reason == "length"
            verdicts.append(verdict)
        return verdicts

    def _replies(self, questions: Sequence[Prompt]) -> list[Completion | None]:
        if not isinstance(self.sampler, OpenAISampler):
            return [replies[0] for replies in self.sampler.sample(questions, params=self.params)]
        found: list[Completion | None] = []
        for replies in self.sampler.sample_each(questions, params=self.params):
            if isinstance(replies, ServerError):
                warnings.warn(f"the judge did not answer: {replies}", stacklevel=4)
            found.append(None if isinstance(replies, ServerError) else replies[0])
        return found


class JudgeReward:
    """The judge's verdict on each completion as a number; None where it gave none.

    template: the question, with the fields {prompt} and {completion}, and others that are columns of the dataset.
        It must say how to give the verdict so that the judge's `read` finds it.
    counts: those of the judge.
    """

    __name__ = "judge"

    def __init__(self, judge: Judge[float], template: str):
        if "{completion}" not in template:
            raise ValueError(f"the judge's template has no field {{completion}}: {template!r}")
        self.judge, self.template = judge, template

    @property
    def counts(self) -> Counter[str]:
        return self.judge.counts

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        found = texts(completions)
        before = Counter(self.counts)
        rewards = checked(self.judge.ask(self._questions(prompts, found, columns)), len(found), self.__name__)
        happened = Counter({key: value - before[key] for key, value in self.counts.items()})
        log_shares(happened, columns, self.__name__)
        return rewards

    def _questions(self, prompts: Sequence, found: Sequence[str], columns: dict) -> list[Prompt]:
        fields = {name for _, name, _, _ in Formatter().parse(self.template) if name} - {"prompt", "completion"}
        given = {name: column(name, columns, len(found), self.__name__) for name in fields}
        return [
            [{"role": "user", "content": self.template.format(prompt=conversation(prompt), completion=text, **more)}]
            for prompt, text, more in zip(prompts, found, _rows(given, len(found)), strict=True)
        ]


def _rows(columns: dict[str, Sequence], n: int) -> list[dict]:
    return [{name: values[row] for name, values in columns.items()} for row in range(n)]


def bracketed(reply: str) -> str | None:
    """What the reply's last `[[...]]` holds, in lower case: the verdict, after whatever reasoning comes before."""
    found = re.findall(r"\[\[([^\[\]]*)\]\]", reply)
    return found[-1].strip().lower() if found else None


def read_score(low: float, high: float) -> Callable[[str], float | None]:
    """Reads a score such as `[[7.5]]`; None if the reply has none between `low` and `high`."""

    def read(reply: str) -> float | None:
        try:
            score = float(bracketed(reply) or "")
        except ValueError:
            return None
        return score if math.isfinite(score) and low <= score <= high else None

    return read


def read_yes_no(reply: str) -> bool | None:
    """True for `[[yes]]`, False for `[[no]]`, else None."""
    return {"yes": True, "no": False}.get(bracketed(reply))
