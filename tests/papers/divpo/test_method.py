import math
from itertools import product

import numpy as np
import pytest

from papers.divpo.method import (
    VOID,
    DivPO,
    LLMJudge,
    all_equal,
    by_measure,
    extreme,
    improbability,
    judge_question,
    least_overlap,
    quality_sets,
    rarity,
    select_pairs,
)
from shared.generation import Completion
from shared.training.pairs import Pool, best_vs_worst


def make_pool(texts, rewards, logprobs=None) -> Pool:
    logprobs = logprobs or [[-1.0]] * len(texts)
    completions = [Completion(t, list(range(len(lp))), list(lp), "stop") for t, lp in zip(texts, logprobs, strict=True)]
    return Pool({"prompt": "x"}, completions, list(rewards))


def algorithm_1(rewards, diversity, rho, mode, allow_all_equal):
    """One prompt, word by word; None for a missing reward."""
    scored = [i for i, r in enumerate(rewards) if r is not None]
    if not scored:
        return VOID, VOID
    values = [rewards[i] for i in scored]
    hi, lo = max(values), min(values)
    if hi == lo and not allow_all_equal:
        return VOID, VOID
    if mode == "range":
        good = [i for i in scored if rewards[i] >= hi - rho * (hi - lo)]
        bad = [i for i in scored if rewards[i] <= lo + rho * (hi - lo)]
    else:
        k = max(1, round(rho * len(scored)))
        good = [i for i in scored if rewards[i] >= sorted(values, reverse=True)[k - 1]]
        bad = [i for i in scored if rewards[i] <= sorted(values)[k - 1]]
    chosen = good[0]
    for i in good:
        if diversity[i] > diversity[chosen]:
            chosen = i
    rejected = bad[0]
    for i in bad:
        if diversity[i] < diversity[rejected]:
            rejected = i
    return (VOID, VOID) if chosen == rejected else (chosen, rejected)


@pytest.mark.parametrize(
    ("rho", "mode", "allow"),
    list(product((0.0, 0.1, 0.25, 0.3, 0.5), ("range", "quantile"), (False, True))),
)
def test_selection_is_algorithm_1(rho, mode, allow):
    rng = np.random.default_rng(int(100 * rho) + 7 * allow)
    P, N = 300, 6
    # Few different values: ties of rewards and of diversity, and whole pools of one reward, come up often.
    rewards_PN = rng.integers(0, 4, (P, N)) / rng.choice([1, 4], (P, 1))
    rewards_PN[:40] = rng.normal(size=(40, N))
    rewards_PN[rng.random((P, N)) < 0.1] = np.nan
    rewards_PN[-1], rewards_PN[-2, 1:] = np.nan, np.nan
    diversity_PN = rng.integers(0, 4, (P, N)).astype(float)

    def pick(allowed_PN, most):
        return extreme(diversity_PN, allowed_PN, most)

    chosen_P, rejected_P = select_pairs(rewards_PN, pick, rho, rho_mode=mode, allow_all_equal=allow)
    for p in range(P):
        rewards = [None if math.isnan(r) else r for r in rewards_PN[p]]
        expected = algorithm_1(rewards, diversity_PN[p], rho, mode, allow)
        assert (chosen_P[p], rejected_P[p]) == expected, (rewards, diversity_PN[p])
    assert np.any(chosen_P == VOID)
    assert np.any(chosen_P != VOID)


def test_rho_0_is_best_against_worst_with_ties_by_diversity():
    rewards = np.array([[0.0, 3.0, 3.0, 0.0, 1.0]])
    diversity = np.array([[5.0, 1.0, 2.0, 4.0, 9.0]])
    assert select_pairs(rewards, lambda a, most: extreme(diversity, a, most), 0.0) == ([2], [3])


def test_without_differences_of_diversity_rho_0_is_dpo():
    rng = np.random.default_rng(0)
    pools = [make_pool("abcdef", rng.integers(0, 2, 6).astype(float).tolist()) for _ in range(200)]
    divpo = DivPO(by_measure(lambda pool: np.zeros(len(pool.completions))), 0.0)
    assert divpo(pools) == [best_vs_worst(pool) for pool in pools]
    assert [] in divpo(pools)


def test_with_binary_rewards_every_rho_below_one_half_means_valid_and_invalid():
    rewards = np.array([[1.0, 0.0, 1.0, 0.0]])
    for rho in (0.0, 0.2, 0.49, 0.5):
        good, bad = quality_sets(rewards, rho)
        assert good.tolist() == [[True, False, True, False]]
        assert bad.tolist() == [[False, True, False, True]]


def test_at_one_half_every_sample_is_in_a_set_and_the_middle_in_both():
    good, bad = quality_sets(np.array([[0.0, 1.0, 2.0, 0.25]]), 0.5)
    assert (good | bad).all()
    assert (good & bad).tolist() == [[False, True, False, False]]


def test_the_range_is_inclusive_and_scale_free():
    rewards = np.array([[0.0, 0.25, 0.75, 1.0]])
    for scale, shift in ((1, 0), (8, -3)):
        good, bad = quality_sets(scale * rewards + shift, 0.25)
        assert good.tolist() == [[False, False, True, True]]
        assert bad.tolist() == [[True, True, False, False]]


def test_range_and_quantile_differ_for_heavy_tails():
    rewards = np.array([[0.0, 0.1, 0.2, 0.3, 100.0, 0.4, 0.5, 0.6, 0.7, 0.8]])
    assert quality_sets(rewards, 0.3)[0].sum() == 1
    assert quality_sets(rewards, 0.3, "quantile")[0].sum() == 3


def test_one_sample_that_is_both_is_no_pair():
    rewards = np.array([[0.0, 1.0, 0.5]])
    diversity = np.array([[9.0, -9.0, 0.0]])
    both = np.array([[0.5, 0.5, 0.5]])
    assert select_pairs(rewards, lambda a, most: np.array([2]), 0.5) == ([VOID], [VOID])
    assert select_pairs(both, lambda a, most: extreme(diversity, a, most), 0.3) == ([VOID], [VOID])
    pair = select_pairs(both, lambda a, most: extreme(diversity, a, most), 0.3, allow_all_equal=True)
    assert pair == ([0], [1])


def test_a_permutation_of_the_samples_permutes_the_pair():
    rng = np.random.default_rng(1)
    rewards, diversity = rng.normal(size=(50, 8)), rng.normal(size=(50, 8))
    order = rng.permutation(8)
    pairs = select_pairs(rewards, lambda a, most: extreme(diversity, a, most), 0.3)
    moved = select_pairs(rewards[:, order], lambda a, most: extreme(diversity[:, order], a, most), 0.3)
    for before, after in zip(pairs, moved, strict=True):
        assert np.array_equal(np.where(after == VOID, VOID, order[after]), before)


@pytest.mark.parametrize("rho", [-0.1, 0.51, math.nan])
def test_rho_out_of_range(rho):
    with pytest.raises(ValueError, match="rho must be in"):
        quality_sets(np.zeros((1, 2)), rho)


def test_unknown_mode():
    with pytest.raises(ValueError, match="range or quantile"):
        quality_sets(np.zeros((1, 2)), 0.1, "percent")


def test_all_equal_looks_only_at_rewards_that_exist():
    nan = math.nan
    rewards = np.array([[1.0, 1.0], [1.0, 2.0], [nan, 1.0], [nan, nan]])
    assert all_equal(rewards).tolist() == [True, False, True, True]


def test_pools_with_missing_rewards():
    divpo = DivPO(by_measure(lambda pool: np.arange(4.0)), 0.0)
    pools = [
        make_pool("abcd", [None, None, None, None]),
        make_pool("abcd", [None, 1.0, None, None]),
        make_pool("abcd", [None, 1.0, 0.0, None]),
    ]
    assert divpo(pools) == [[], [], [(1, 2)]]


# ---- criteria ----


def test_improbability_is_the_mean_per_token():
    pool = make_pool(["a", "b", "c", ""], [1, 1, 1, 1], [[-1.0], [-0.5] * 10, [-3.0, -1.0], []])
    assert improbability(pool).tolist() == [1.0, 0.5, 2.0, 0.0]  # by the sum, the second would be the most diverse


def test_rarity_counts_responses_that_contain_a_word():
    texts = ["red red fox", "red hen", "red cow cow", "blue cow"]
    expected = [
        -np.mean([3 / 4, 1 / 4]),
        -np.mean([3 / 4, 1 / 4]),
        -np.mean([3 / 4, 2 / 4]),
        -np.mean([1 / 4, 2 / 4]),
    ]
    assert rarity()(make_pool(texts, [1] * 4)) == pytest.approx(expected)


def test_rarity_of_personas_leaves_the_keys_out():
    texts = ['{ "first_name": "Ada" , "city": "Rome" }', '{ "first_name": "Bo" , "city": "Rome" }']
    assert rarity(("first_name", "city"))(make_pool(texts, [1, 1])) == pytest.approx([-0.75, -0.75])


def brute_overlap(texts, most):
    sets = [set(text.split()) for text in texts]
    means = []
    for i, a in enumerate(sets):
        others = [len(a & b) / len(a | b) if a | b else 1.0 for j, b in enumerate(sets) if j != i]
        means.append(np.mean(others) if others else 0.0)
    return int(np.argmin(means) if most else np.argmax(means))


@pytest.mark.parametrize("most", [True, False])
def test_the_counting_judge_compares_within_the_set_it_is_shown(most):
    rng = np.random.default_rng(2)
    pools = [make_pool([" ".join(rng.choice(list("abcdefg"), 3)) for _ in range(7)], [1] * 7) for _ in range(60)]
    allowed = rng.random((60, 7)) < 0.6
    allowed[0], allowed[1], allowed[1, 4] = False, False, True
    picks = least_overlap(pools, allowed, most)
    assert picks[0] == VOID
    assert picks[1] == 4
    for p in range(2, 60):
        members = np.flatnonzero(allowed[p])
        texts = [pools[p].completions[i].text for i in members]
        assert picks[p] == (members[brute_overlap(texts, most)] if len(members) else VOID)


def test_the_counting_judge_takes_empty_texts_for_equal():
    pool = make_pool(["", "", "a"], [1, 1, 1])
    assert least_overlap([pool], np.ones((1, 3), bool), True) == [2]
    assert least_overlap([pool], np.ones((1, 3), bool), False) == [0]


class FakeSampler:
    """Answers questions one after the other."""

    def __init__(self, replies):
        self.replies, self.asked, self.calls = list(replies), [], 0

    def sample(self, prompts, n=1, params=None):
        self.calls += 1
        self.asked += prompts
        return [[Completion(self.replies.pop(0), [], None, "stop")] for _ in prompts]


def test_llm_judge_is_asked_about_all_pools_at_once_and_its_choice_counts():
    pools = [make_pool(["a", "b", "c", "d"], [1, 1, 0, 0]), make_pool(["e", "f", "g", "h"], [1, 0, 0, 1])]
    sampler = FakeSampler(["I think [[2]]", "[[2]]", "[[1]]", "[[2]]"])
    assert DivPO(LLMJudge(sampler), 0.3)(pools) == [[(1, 2)], [(3, 2)]]
    assert sampler.calls == 2  # all the good ones, then all the bad ones
    first, second, third, _ = (messages[0]["content"] for messages in sampler.asked)
    assert "[1]\na\n\n[2]\nb\n" in first
    assert "most diverse" in first
    assert "[1]\ne\n\n[2]\nh\n" in second
    assert "[1]\nc\n\n[2]\nd\n" in third
    assert "least diverse" in third


def test_llm_judge_is_not_asked_where_there_is_no_choice_or_no_pair():
    sampler = FakeSampler(["[[1]]"])
    pools = [make_pool(["a", "b", "c"], [1, 0, 0]), make_pool(["d", "e", "f"], [1, 1, 1])]
    assert DivPO(LLMJudge(sampler), 0.3)(pools) == [[(0, 1)], []]
    assert len(sampler.asked) == 1


@pytest.mark.parametrize("reply", ["the second", "[[0]]", "[[3]]", "[[-1]]", "[[2.0]]", "[[one]]", ""])
def test_nonsense_from_the_judge_is_no_pair(reply):
    sampler = FakeSampler([reply, "[[1]]"])
    select = DivPO(LLMJudge(sampler), 0.0)
    assert select([make_pool(["a", "b", "c", "d"], [1, 1, 0, 0])]) == [[]]
    assert (select.counts["rows"], select.counts["unparsable"]) == (2, 1)


def test_judge_question_is_a_chat_message():
    (message,) = judge_question(["one {braces}", "two"], most=False)
    assert message["role"] == "user"
    assert "one {braces}" in message["content"]
    assert "2 responses" in message["content"]
