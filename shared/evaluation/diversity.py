"""How different texts, attribute values and meanings are.

Every measure here is larger where there is more diversity, except `top_share`.
"""

from __future__ import annotations

import gzip
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

Same = Callable[[list[tuple[str, str]]], Sequence[bool]]
"""Whether the two texts of each pair mean the same: a trained classifier, a judge, or the truth where it is known."""


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation, split at white space; composed and decomposed letters are the same."""
    text = unicodedata.normalize("NFC", text).lower()
    kept = (c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return "".join(kept).split()


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The n-grams in order, with repetitions; none if there are fewer than n tokens."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def unique_words(texts: Sequence[str]) -> int:
    """Number of distinct words in all texts together (DivPO, arXiv 2501.18101: unique 1-grams of N responses).

    It grows with the number of texts: compare only equal numbers.
    """
    return len({word for text in texts for word in words(text)})


def distinct_n(text: str, n: int) -> float:
    """Share of a text's n-grams that are distinct; DARLING's Distinct-4 (arXiv 2509.02534) is its mean over responses.

    Tokens are split at white space. NaN for a text of fewer than n tokens, which has none: leave it out of the mean
    with `np.nanmean`, and report how many there were.
    """
    found = ngrams(text.split(), n)
    return len(set(found)) / len(found) if found else float("nan")


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of the texts, joined by spaces, after gzip over bytes before; larger is more diverse (DivPO).

    Shaib et al. 2024 (arXiv 2403.00553) use the reciprocal. Short texts can exceed 1: gzip has a header of 20 bytes.
    """
    raw = " ".join(texts).encode()
    if not raw:
        raise ValueError("no text to compress")
    return len(gzip.compress(raw, mtime=0)) / len(raw)


def sampled_entropy(logprobs: Sequence[Sequence[float]]) -> float:
    """Monte Carlo estimate of the entropy of a response in nats: the mean over responses of -sum_t ln p(y_t | y_<t).

    Args:
        logprobs: of the sampled tokens of each response, under the distribution that they were sampled from
            (`Completion.logprobs` if that was temperature 1 without top-k and top-p).
    """
    if len(logprobs) == 0:
        raise ValueError("no responses to estimate the entropy from")
    return float(-np.mean([np.sum(row) for row in logprobs]))


def sampled_entropy_per_token(logprobs: Sequence[Sequence[float]]) -> float:
    """As `sampled_entropy`, in nats per token: minus the mean over all tokens of all responses."""
    tokens = sum(len(row) for row in logprobs)
    if tokens == 0:
        raise ValueError("no tokens to estimate the entropy from")
    return sampled_entropy(logprobs) * len(logprobs) / tokens


def entropy(values: Sequence[Hashable]) -> float:
    """Entropy of the empirical distribution of the values, in nats (the plug-in estimate, low for few values)."""
    p = _shares(values)
    return float(-np.sum(p * np.log(p))) + 0.0  # + 0.0: no negative zero


def top_share(values: Sequence[Hashable]) -> float:
    """Share of the most frequent value; smaller is more diverse."""
    return float(_shares(values).max())


def unique_share(values: Sequence[Hashable], first: int) -> float:
    """Share of distinct values among the first `first` values (DivPO: unique attributes).

    The share falls as the number of values grows, so it is only comparable at a fixed number. Raises ValueError if
    there are fewer: sample more.
    """
    if not 1 <= first <= len(values):
        raise ValueError(f"need at least {first} values to compare arms at that number, got {len(values)}; sample more")
    return len(set(values[:first])) / first


def _shares(values: Sequence[Hashable]) -> np.ndarray:
    if len(values) == 0:
        raise ValueError("no values to measure")
    counts = np.array(sorted(Counter(values).values()), dtype=float)
    return counts / counts.sum()


def distinct_classes(texts: Sequence[str], same: Same) -> int:
    """Number of meanings among the texts, as NoveltyBench (arXiv 2504.05228) counts "Distinct": each text joins the
    first class whose first member means the same, or opens a class.

    DARLING's reward joins classes transitively instead (`shared.rewards.diversity.semantic_classes`); where `same` is
    not transitive the two disagree.
    """
    first_members: list[str] = []
    for text in texts:
        if text in first_members:
            continue
        pairs = [(member, text) for member in first_members]
        if not pairs or not any(call_same(same, pairs)):
            first_members.append(text)
    return len(first_members)


def call_same(same: Same, pairs: list[tuple[str, str]]) -> list[bool]:
    """`same(pairs)`, checked to answer each pair."""
    answers = list(same(pairs))
    if len(answers) != len(pairs):
        raise ValueError(f"{same!r} returned {len(answers)} answers for {len(pairs)} pairs")
    return [bool(answer) for answer in answers]
