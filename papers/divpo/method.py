"""Pair selection of Diverse Preference Optimization (Algorithm 1): DPO's loss stays, the pair it is given changes.

Of N samples of a prompt, chosen is the most diverse of those that are good enough, rejected the least diverse of those
that are bad. Good and bad are ends of the range of rewards, `rho` of it wide; what is diverse, a criterion says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from shared.evaluation.diversity import words
from shared.generation import Sampler, SamplingParams
from shared.rewards.diversity import word_rarity
from shared.rewards.judge import Judge, bracketed
from shared.training.pairs import Pairs, Pool

VOID = -1  # in place of an index: none

Criterion = Callable[[Sequence[Pool], np.ndarray, bool], np.ndarray]
"""criterion(pools, allowed_PN, most): for each of P pools the index [P] of the most (or least) diverse sample of those
allowed; VOID where none is allowed or the criterion has no opinion."""


# ---- Algorithm 1 ----


def quality_sets(rewards_PN: np.ndarray, rho: float, rho_mode: str = "range") -> tuple[np.ndarray, np.ndarray]:
    """Which of the N samples of P prompts are good enough and which are bad: two masks [P, N] (Algorithm 1, step 3).

        range      s_i >= hi - rho (hi - lo)    and    s_i <= lo + rho (hi - lo)
        quantile   s_i at least the k-th highest, at most the k-th lowest reward; k = rho N, rounded, at least 1

    Args:
        rewards_PN: NaN where a sample has no reward: it is in neither set.
        rho: from 0 (the best and the worst, with their equals) to 1/2 (every sample is in a set).
        rho_mode: `range` is the rule of the first author's code, `quantile` another group's reading of the paper.
    """
    if not 0 <= rho <= 0.5:
        raise ValueError(f"rho must be in [0, 0.5], not {rho}")
    rewards_PN = np.asarray(rewards_PN, dtype=float)
    scored_PN = ~np.isnan(rewards_PN)
    high_PN = np.where(scored_PN, rewards_PN, -np.inf)
    low_PN = np.where(scored_PN, rewards_PN, np.inf)
    if rho_mode == "range":
        hi_P1, lo_P1 = high_PN.max(1, keepdims=True), low_PN.min(1, keepdims=True)
        off_P1 = rho * np.where(hi_P1 >= lo_P1, hi_P1 - lo_P1, 0.0)
        floor_P1, ceiling_P1 = hi_P1 - off_P1, lo_P1 + off_P1
    elif rho_mode == "quantile":
        k_P1 = np.maximum(1, np.rint(rho * scored_PN.sum(1, keepdims=True)).astype(int))
        floor_P1 = np.take_along_axis(-np.sort(-high_PN, axis=1), k_P1 - 1, axis=1)
        ceiling_P1 = np.take_along_axis(np.sort(low_PN, axis=1), k_P1 - 1, axis=1)
    else:
        raise ValueError(f"rho_mode must be range or quantile, not {rho_mode!r}")
    return scored_PN & (high_PN >= floor_P1), scored_PN & (low_PN <= ceiling_P1)


def all_equal(rewards_PN: np.ndarray) -> np.ndarray:
    """[P]: whether no two samples of the prompt have different rewards."""
    hi_P = np.max(np.nan_to_num(rewards_PN, nan=-np.inf), axis=1)
    return hi_P <= np.min(np.nan_to_num(rewards_PN, nan=np.inf), axis=1)


def select_pairs(
    rewards_PN: np.ndarray,
    pick: Callable[[np.ndarray, bool], np.ndarray],
    rho: float,
    *,
    rho_mode: str = "range",
    allow_all_equal: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices [P] of the chosen and of the rejected sample of each prompt; both VOID where it gives no pair.

    Args:
        pick: pick(allowed_PN, True) is the most, pick(allowed_PN, False) the least diverse of the samples allowed
            (step 4): with a measure D of diversity, `partial(extreme, D)`.
        rho, rho_mode: see `quality_sets`.
        allow_all_equal: whether samples with one and the same reward pair the rarest with the commonest, as in the
            first author's code, or give no pair.
    """
    good_PN, bad_PN = quality_sets(rewards_PN, rho, rho_mode)
    if not allow_all_equal:
        skipped_P1 = all_equal(rewards_PN)[:, None]
        good_PN, bad_PN = good_PN & ~skipped_P1, bad_PN & ~skipped_P1
    chosen_P, rejected_P = pick(good_PN, True), pick(bad_PN, False)
    void_P = (chosen_P == VOID) | (rejected_P == VOID) | (chosen_P == rejected_P)
    return np.where(void_P, VOID, chosen_P), np.where(void_P, VOID, rejected_P)


def extreme(diversity_PN: np.ndarray, allowed_PN: np.ndarray, most: bool) -> np.ndarray:
    """[P]: where D is largest (smallest) among the allowed samples, the first of equals; VOID where none is allowed."""
    signed_PN = np.where(allowed_PN, diversity_PN if most else -np.asarray(diversity_PN), -np.inf)
    return np.where(allowed_PN.any(1), signed_PN.argmax(1), VOID)


class DivPO:
    """Preference pairs of pools by Algorithm 1. It sees all pools at a time, so a judge is asked in one batch."""

    def __init__(self, criterion: Criterion, rho: float, *, rho_mode: str = "range", allow_all_equal: bool = False):
        self.criterion, self.rho, self.rho_mode, self.allow_all_equal = criterion, rho, rho_mode, allow_all_equal

    def __call__(self, pools: Sequence[Pool]) -> list[Pairs]:
        chosen_P, rejected_P = select_pairs(
            rewards_of(pools),
            lambda allowed_PN, most: self.criterion(pools, allowed_PN, most),
            self.rho,
            rho_mode=self.rho_mode,
            allow_all_equal=self.allow_all_equal,
        )
        return [[] if c == VOID else [(int(c), int(r))] for c, r in zip(chosen_P, rejected_P, strict=True)]

    @property
    def counts(self) -> Counter[str]:
        """Of the judge (`shared.rewards.judge.Judge`); empty for a criterion that asks none."""
        return self.criterion.judge.counts if isinstance(self.criterion, LLMJudge) else Counter()


def rewards_of(pools: Sequence[Pool]) -> np.ndarray:
    """[P, N], NaN where a sample has no reward."""
    return np.array([[np.nan if r is None else r for r in pool.rewards] for pool in pools], dtype=float)


# ---- criteria ----


def by_measure(measure: Callable[[Pool], np.ndarray]) -> Criterion:
    """The criterion that follows a measure D [N] of the samples of a pool."""

    def criterion(pools: Sequence[Pool], allowed_PN: np.ndarray, most: bool) -> np.ndarray:
        return extreme(np.array([measure(pool) for pool in pools]), allowed_PN, most)

    return criterion


def improbability(pool: Pool) -> np.ndarray:
    """D(y) = -(1/|y|) sum_t ln pi(y_t | x, y_<t), under the policy that sampled y, at temperature 1.

    The mean over tokens, as in the first author's code; a sum would call long responses diverse. 0 without any token.
    """
    return np.array([-np.mean(c.logprobs) if c.logprobs else 0.0 for c in pool.completions])


def rarity(ignore: Collection[str] = ()) -> Callable[[Pool], np.ndarray]:
    """D(y) = -(mean share of the pool's samples that contain a word of y): `shared.rewards.diversity.word_rarity`.

    ignore: text whose words do not count, such as the keys of a JSON object.
    """
    ignored = {word for text in ignore for word in words(text)}
    return lambda pool: word_rarity([completion.text for completion in pool.completions], ignored)


def least_overlap(pools: Sequence[Pool], allowed_PN: np.ndarray, most: bool) -> np.ndarray:
    """A judge that counts words: the most diverse sample shares least with the others *it is shown with*.

    D(y) = -mean over the other allowed samples z of |words(y) & words(z)| / |words(y) | words(z)|. It stands in for a
    language model where none is at hand: like that one, and unlike `rarity`, it sees only the set it has to pick from.
    """
    picks = np.full(len(pools), VOID)
    for p in np.flatnonzero(allowed_PN.any(1)):
        members = np.flatnonzero(allowed_PN[p])
        found = [set(words(pools[p].completions[i].text)) for i in members]
        columns = {word: k for k, word in enumerate(sorted(set().union(*found)))}
        has_MW = np.zeros((len(members), len(columns)))
        for m, each in enumerate(found):
            has_MW[m, [columns[word] for word in each]] = 1
        shared_MM = has_MW @ has_MW.T
        sizes_M = has_MW.sum(1)
        union_MM = sizes_M[:, None] + sizes_M - shared_MM
        overlap_MM = np.where(union_MM > 0, shared_MM / np.maximum(union_MM, 1), 1.0)  # two empty texts are equal
        np.fill_diagonal(overlap_MM, 0)
        overlap_M = overlap_MM.sum(1)
        picks[p] = members[overlap_M.argmin() if most else overlap_M.argmax()]
    return picks


JUDGE_QUESTION = """Below are {count} responses to one and the same request, with numbers before them.

{responses}

Which of them is the {degree} diverse: the one whose words, their rarity and whose phrasing are {contrast} the other \
responses? Reply with the number of one response in double square brackets, like [[1]], and nothing else."""


class LLMJudge:
    """A language model picks the most (least) diverse sample among those that it is shown, all pools in one batch.

    Its question asks for the criteria of the paper: unique words, rarity, structure of phrases (the wording is ours).
    judge: `judge.counts` says how many replies held no number, or one that stands for no response: they are void.
    """

    def __init__(self, sampler: Sampler, max_new_tokens: int = 256):
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0)
        self.judge: Judge[int] = Judge(sampler, read_number, params)

    def __call__(self, pools: Sequence[Pool], allowed_PN: np.ndarray, most: bool) -> np.ndarray:
        picks = np.where(allowed_PN.sum(1) == 1, allowed_PN.argmax(1), VOID)  # nothing to ask
        asked = np.flatnonzero(allowed_PN.sum(1) > 1)
        members = [np.flatnonzero(allowed_PN[p]) for p in asked]
        questions = [
            judge_question([pools[p].completions[i].text for i in shown], most)
            for p, shown in zip(asked, members, strict=True)
        ]
        for p, shown, number in zip(asked, members, self.judge.ask(questions), strict=True):
            if number is not None and 1 <= number <= len(shown):
                picks[p] = shown[number - 1]
            elif number is not None:
                self.judge.counts["unparsable"] += 1
        return picks


def judge_question(responses: Sequence[str], most: bool) -> list[dict]:
    """The judge's prompt: chat messages."""
    numbered = "\n\n".join(f"[{k}]\n{text}" for k, text in enumerate(responses, start=1))
    degree, contrast = ("most", "least like those of") if most else ("least", "most like those of")
    content = JUDGE_QUESTION.format(count=len(responses), responses=numbered, degree=degree, contrast=contrast)
    return [{"role": "user", "content": content}]


def read_number(reply: str) -> int | None:
    found = bracketed(reply)
    return int(found) if found and found.isdecimal() else None
