"""Rewards for form: valid JSON, length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from shared.rewards.contract import Completions, checked, column, texts


class JSONReward:
    """1 if the completion is exactly one JSON object in which each of `keys` is a non-empty string, else 0.

    DivPO's persona reward (arXiv 2501.18101: valid JSON with all keys); that values must be non-empty strings, and
    that keys must not occur twice, is ours. Text around the object, a code fence for instance, makes it invalid.
    """

    __name__ = "json"

    def __init__(self, keys: Sequence[str]):
        if isinstance(keys, str) or not keys:
            raise ValueError(f"keys must be a list of at least one key, not {keys!r}")
        self.keys = tuple(keys)

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        rewards = [float(parse_attributes(text, self.keys) is not None) for text in texts(completions)]
        return checked(rewards, len(completions), self.__name__)


def parse_attributes(text: str, keys: Sequence[str]) -> dict[str, str] | None:
    """The values of `keys` if `text` is valid in the sense of `JSONReward`, else None."""
    try:
        record = json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    found = {key: record.get(key) for key in keys}
    return found if all(isinstance(value, str) and value.strip() for value in found.values()) else None


def _without_repetition(pairs: list[tuple]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key occurs twice")
    return record


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")  # Python reads NaN and Infinity, JSON does not have them


class LengthReward:
    """1 if the completion has at least `least` and at most `most` words or tokens, else 0.

    DivPO's keyword stories want exactly 5 words: `LengthReward(5, 5)`.

    unit: "words" (split at white space) or "tokens" (of the trainer's tokenizer: its `completion_ids`).
    """

    __name__ = "length"

    def __init__(self, least: int, most: int, unit: Literal["words", "tokens"] = "words"):
        if not 0 <= least <= most:
            raise ValueError(f"need 0 <= least <= most, not least={least}, most={most}")
        if unit not in ("words", "tokens"):
            raise ValueError(f"unit must be words or tokens, not {unit!r}")
        self.least, self.most, self.unit = least, most, unit

    def __call__(self, prompts: Sequence, completions: Completions, **columns) -> list[float | None]:
        if self.unit == "tokens":
            lengths = [len(ids) for ids in column("completion_ids", columns, len(completions), self.__name__)]
        else:
            lengths = [len(text.split()) for text in texts(completions)]
        rewards = [float(self.least <= length <= self.most) for length in lengths]
        return checked(rewards, len(completions), self.__name__)
