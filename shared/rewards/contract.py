"""What all rewards do with their input and output."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from shared.experiments.errors import UserError

Completions = Sequence[str | Sequence[Mapping]]

# What TRL passes to rewards beside the dataset's columns.
NOT_COLUMNS = {"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


def texts(completions: Completions) -> list[str]:
    """The text of each completion: a string as it is, of chat messages the content of the last (None counts as "").

    Raises TypeError naming the row for anything else.
    """
    found = []
    for row, completion in enumerate(completions):
        if not isinstance(completion, str):
            try:
                completion = completion[-1]["content"] or ""
            except (TypeError, IndexError, KeyError) as error:
                raise TypeError(
                    f"row {row}: a completion must be a string or a list of chat messages, not {completion!r}"
                ) from error
            if not isinstance(completion, str):
                raise TypeError(f"row {row}: the content of the last message must be text, not {completion!r}")
        found.append(completion)
    return found


def column(name: str, columns: Mapping, rows: int, reward: str) -> Sequence:
    """The dataset's column `name`, checked to have one entry per row."""
    if name not in columns:
        has = sorted(columns.keys() - NOT_COLUMNS)
        raise UserError(f"{reward} needs the dataset column {name!r}; the dataset has: {', '.join(has) or 'none'}")
    if len(columns[name]) != rows:
        raise ValueError(f"{reward}: column {name!r} has {len(columns[name])} rows for {rows} completions")
    return columns[name]


def checked(rewards: Sequence[float | None], rows: int, reward: str) -> list[float | None]:
    """`rewards` as Python floats, one per row, each finite or None.

    Raises ValueError naming the row with NaN, infinity or something that is not a number, or the wrong number of rows.
    """
    if not hasattr(rewards, "__len__"):
        raise ValueError(f"{reward} returned {rewards!r} for {rows} completions; it must return a list")
    if len(rewards) != rows:
        raise ValueError(f"{reward} returned {len(rewards)} rewards for {rows} completions")
    result = []
    for row, value in enumerate(rewards):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = repr(value)
        if isinstance(number, str) or (number is not None and not math.isfinite(number)):
            raise ValueError(f"{reward} returned {number} for row {row}; a reward must be a finite number or None")
        result.append(number)
    return result


def log_shares(happened: Counter[str], columns: Mapping, reward: str) -> None:
    """Where TRL passes `log_metric`, log the share of each kind of event among `happened["rows"]`."""
    log_metric = columns.get("log_metric")
    if log_metric and happened["rows"]:
        for kind in sorted(happened.keys() - {"rows"}):
            log_metric(f"{reward}/{kind}", happened[kind] / happened["rows"])


def conversation(prompt: str | Sequence[Mapping]) -> str:
    """A prompt as a text for a judge: as it is, or the messages with the names of their roles before them."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
