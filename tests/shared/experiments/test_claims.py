"""Oracles: Student's t, scipy's bootstrap, analysis of variance by hand, and the coverage of simulated experiments."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.experiments.claims import (
    NOT_REPRODUCED,
    NOT_TESTABLE,
    REPRODUCED,
    WEAK,
    RunScores,
    interval,
    judge,
    verdict,
)
from shared.experiments.errors import UserError
from shared.experiments.paper import Claim


def by_item(values_SU, prefix="", seed_prefix=False):
    """An array [seeds, items] as seed -> item -> score."""
    return {
        s: {f"{prefix}{s if seed_prefix else ''}-{i:04d}": float(v) for i, v in enumerate(row)}
        for s, row in enumerate(np.atleast_2d(values_SU))
    }


def scalars(values):
    return {s: float(v) for s, v in enumerate(values)}


# ---- intervals: limits that are known -------------------------------------------------------------------------


def test_numbers_per_seed_give_the_paired_t_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 0.2, 4), rng.normal(0.5, 0.2, 4)
    want = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    got = interval(scalars(a), scalars(b))
    assert (got.lo, got.hi) == pytest.approx((want.low, want.high), rel=1e-9)
    assert got.effect == pytest.approx((a - b).mean())
    assert (got.seeds, got.items) == (4, None)


def test_many_numbers_per_seed_agree_with_scipys_bootstrap():
    values = np.random.default_rng(1).exponential(1.0, 400)
    want = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=2).confidence_interval
    got = interval(scalars(values))
    width = want.high - want.low
    assert got.lo == pytest.approx(want.low, abs=0.04 * width)
    assert got.hi == pytest.approx(want.high, abs=0.04 * width)


def test_one_seed_agrees_with_scipys_bootstrap_over_items():
    rng = np.random.default_rng(3)
    a, b = rng.exponential(1.0, 80), rng.exponential(0.7, 80)

    def difference(x, y, axis=-1):
        return x.mean(axis) - y.mean(axis)

    want = scipy.stats.bootstrap((a, b), difference, method="percentile", paired=True, rng=4).confidence_interval
    got = interval(by_item(a), by_item(b))
    width = want.high - want.low
    assert got.lo == pytest.approx(want.low, abs=0.04 * width)
    assert got.hi == pytest.approx(want.high, abs=0.04 * width)
    assert "variance is not included" in got.note


def test_one_seed_with_different_items_agrees_with_scipys_unpaired_bootstrap():
    rng = np.random.default_rng(5)
    a, b = rng.normal(1.0, 1.0, 60), rng.normal(0.3, 0.5, 90)
    want = scipy.stats.bootstrap(
        (a, b), lambda x, y, axis=-1: x.mean(axis) - y.mean(axis), method="percentile", rng=6
    ).confidence_interval
    got = interval(by_item(a, "a"), by_item(b, "b"))
    width = want.high - want.low
    assert got.lo == pytest.approx(want.low, abs=0.05 * width)
    assert got.hi == pytest.approx(want.high, abs=0.05 * width)
    assert got.items == 150


def test_items_of_each_seeds_own_give_the_t_interval_of_seed_means():
    values = np.random.default_rng(7).normal(0.0, 1.0, (4, 50)) + np.array([[0.0], [1.0], [2.0], [0.5]])
    want = scipy.stats.ttest_1samp(values.mean(1), 0.0).confidence_interval(0.95)
    got = interval(by_item(values, seed_prefix=True))
    assert (got.lo, got.hi) == pytest.approx((want.low, want.high), rel=1e-9)
    assert got.items == 200


def test_seeds_that_agree_by_luck_do_not_hide_the_noise_of_items():
    # Three seeds with exactly equal accuracy: the t interval alone would have no width.
    values = np.array([[1.0, 0.0] * 50, [0.0, 1.0] * 50, [1.0, 1.0, 0.0, 0.0] * 25])
    own = interval(by_item(values, seed_prefix=True))
    assert own.hi - own.effect == pytest.approx(1.96 * math.sqrt(0.25 / 300), rel=0.1)
    shared = interval(by_item(values))
    assert shared.hi - shared.effect == pytest.approx(1.96 * values.mean(0).std() / math.sqrt(100), rel=0.1)


def test_pairing_removes_what_the_arms_share():
    rng = np.random.default_rng(8)
    difficulty, seeds = rng.normal(0, 1.0, (1, 300)), rng.normal(0, 0.5, (3, 1))
    a = difficulty + seeds + rng.normal(0, 0.05, (3, 300)) + 0.1
    b = difficulty + seeds + rng.normal(0, 0.05, (3, 300))
    paired = interval(by_item(a), by_item(b))
    other_items = interval(by_item(a), by_item(b, "other"))
    assert paired.lo > 0
    assert other_items.hi - other_items.lo > 5 * (paired.hi - paired.lo)


def test_variance_parts_add_up_for_large_crossed_data():
    # Balanced two-way random effects with enough seeds that t is nearly normal: the textbook standard error.
    rng = np.random.default_rng(9)
    n, items = 60, 150
    a = rng.normal(0, 0.3, (n, 1)) + rng.normal(0, 0.5, (1, items)) + rng.normal(0, 1.0, (n, items))
    seed_part = a.mean(1).var(ddof=1) / n
    item_part = a.mean(0).var(ddof=1) / items
    residual = a - a.mean(0) - a.mean(1, keepdims=True) + a.mean()
    both_part = (residual**2).sum() / ((n - 1) * (items - 1)) / (n * items)
    got = interval(by_item(a))
    assert got.hi - got.lo == pytest.approx(2 * 1.98 * math.sqrt(seed_part + item_part - both_part), rel=0.03)


def test_constant_data_has_an_interval_of_no_width():
    got = interval(by_item(np.ones((3, 20))), by_item(np.full((3, 20), 0.25)))
    assert (got.effect, got.lo, got.hi) == pytest.approx((0.75, 0.75, 0.75), abs=1e-12)


def test_arms_that_tie_everywhere_differ_by_exactly_nothing():
    values = np.random.default_rng(10).random((3, 40))
    got = interval(by_item(values), by_item(values))
    assert (got.effect, got.lo, got.hi) == (0.0, 0.0, 0.0)


def test_one_seed_without_items_has_no_interval():
    got = interval({0: 1.0}, {0: 0.5})
    assert (got.effect, got.lo, got.hi) == (0.5, None, None)
    assert "no interval" in got.note
    assert interval({0: {"only": 1.0}}).lo is None


def test_items_that_only_some_seeds_have_are_an_error():
    values = by_item(np.ones((2, 5)))
    del values[1]["-0003"]
    with pytest.raises(UserError, match="'-0003' is in some seeds only"):
        interval(values)


# ---- intervals: coverage --------------------------------------------------------------------------------------


def coverage(seeds, items, sd_seed, sd_item, sd_both, experiments=500):
    rng = np.random.default_rng(11)
    covered = 0
    for experiment in range(experiments):
        noise = rng.normal(0, sd_both, (seeds, items))
        values = rng.normal(0, sd_seed, (seeds, 1)) + rng.normal(0, sd_item, (1, items)) + noise
        found = interval(by_item(values), rng_seed=experiment, resamples=200)
        covered += found.lo < 0 < found.hi
    return covered / experiments


# 500 experiments know a coverage of 0.95 to a standard error of 0.010.
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("sd_seed", "sd_item", "sd_both", "at_most"),
    [
        (0.2, 0.3, 0.3, 0.98),  # seeds dominate
        (0.05, 0.3, 0.3, 0.99),  # all parts matter
        (0.0, 0.0, 0.5, 0.99),  # seeds do not matter
        (0.01, 0.5, 0.1, 0.98),  # items dominate
    ],
)
def test_95_percent_intervals_cover_at_least_about_95_percent(seeds, sd_seed, sd_item, sd_both, at_most):
    found = coverage(seeds, 60, sd_seed, sd_item, sd_both)
    assert 0.93 <= found <= at_most


# ---- intervals: invariances -----------------------------------------------------------------------------------

finite = st.floats(-5, 5, allow_subnormal=False)


@st.composite
def arms(draw):
    seeds, items = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    table = st.lists(st.lists(finite, min_size=items, max_size=items), min_size=seeds, max_size=seeds)
    prefix = draw(st.sampled_from(["", "other"]))
    return by_item(np.array(draw(table))), by_item(np.array(draw(table)), prefix)


def bounds(a, b):
    found = interval(a, b, resamples=200)
    return found.effect, found.lo, found.hi


@settings(max_examples=60, deadline=None)
@given(arms())
def test_swapping_the_arms_mirrors_the_interval(pair):
    effect, lo, hi = bounds(*pair)
    assert bounds(*reversed(pair)) == pytest.approx((-effect, -hi, -lo), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(arms(), st.floats(-3, 3))
def test_adding_a_constant_to_both_arms_changes_nothing(pair, constant):
    shifted = [{s: {i: v + constant for i, v in scores.items()} for s, scores in arm.items()} for arm in pair]
    # Where the variance vanishes, rounding decides which of two equal degenerate branches is taken.
    assume(bounds(*pair)[2] - bounds(*pair)[1] > 1e-6)
    assert bounds(*shifted) == pytest.approx(bounds(*pair), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(arms(), st.floats(0.5, 4))
def test_the_interval_has_the_metrics_unit(pair, factor):
    scaled = [{s: {i: v * factor for i, v in scores.items()} for s, scores in arm.items()} for arm in pair]
    assert bounds(*scaled) == pytest.approx([factor * v for v in bounds(*pair)], abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(arms())
def test_the_effect_lies_inside_and_the_order_of_items_is_irrelevant(pair):
    a, b = pair
    effect, lo, hi = bounds(a, b)
    assert lo - 1e-9 <= effect <= hi + 1e-9 or len(a) == 1  # a percentile interval may exclude a skewed mean
    backwards = [{s: dict(reversed(scores.items())) for s, scores in reversed(arm.items())} for arm in pair]
    assert bounds(*backwards) == pytest.approx((effect, lo, hi), abs=1e-9)


# ---- verdicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "effect", "lo", "hi", "want"),
    [
        (0.0, 0.2, 0.1, 0.3, REPRODUCED),
        (0.0, 0.2, 0.0, 0.4, WEAK),  # the margin at the interval's end is inside it
        (0.0, 0.2, -0.1, 0.5, WEAK),
        (0.0, 0.0, -0.1, 0.1, NOT_REPRODUCED),  # no direction at all
        (0.0, -0.1, -0.3, 0.1, NOT_REPRODUCED),
        (0.0, -0.2, -0.3, -0.1, NOT_REPRODUCED),
        (0.1, 0.3, 0.2, 0.4, REPRODUCED),
        (0.1, 0.3, 0.1, 0.5, WEAK),
        (0.1, 0.05, 0.02, 0.2, WEAK),  # right sign, interval includes the margin
        (0.1, 0.05, 0.01, 0.1, WEAK),
        (0.1, 0.05, 0.01, 0.09, NOT_REPRODUCED),  # right sign, but the interval excludes so large an effect
        (0.1, 0.0, -0.2, 0.2, NOT_REPRODUCED),
        (-0.1, 0.0, -0.05, 0.05, REPRODUCED),  # "at most 0.1 worse"
        (-0.1, -0.05, -0.2, 0.1, WEAK),
        (-0.1, -0.05, -0.1, 0.1, WEAK),
        (-0.1, -0.1, -0.2, 0.0, NOT_REPRODUCED),
        (-0.1, -0.15, -0.3, 0.0, NOT_REPRODUCED),
    ],
)
def test_verdicts_of_greater_and_its_mirror_image(margin, effect, lo, hi, want):
    assert verdict("greater", margin, effect, lo, hi) == want
    assert verdict("less", -margin, -effect, -hi, -lo) == want


@pytest.mark.parametrize(
    ("effect", "lo", "hi", "want"),
    [
        (0.0, -0.05, 0.05, REPRODUCED),
        (0.05, 0.02, 0.08, REPRODUCED),  # different from zero, and still within the margin
        (0.0, -0.1, 0.05, WEAK),
        (0.0, -0.05, 0.1, WEAK),
        (0.0, -0.5, 0.5, WEAK),
        (0.1, 0.05, 0.15, NOT_REPRODUCED),
        (-0.1, -0.15, -0.05, NOT_REPRODUCED),
        (0.3, 0.2, 0.4, NOT_REPRODUCED),
    ],
)
def test_verdicts_of_equal(effect, lo, hi, want):
    assert verdict("equal", 0.1, effect, lo, hi) == want


@given(st.sampled_from(["greater", "less"]), finite, finite, st.floats(0, 5), st.floats(0, 5))
def test_a_claim_and_its_opposite_are_never_both_reproduced(direction, margin, effect, below, above):
    found = {verdict(d, margin, effect, effect - below, effect + above) for d in ("greater", "less")}
    assert found != {REPRODUCED}


# ---- claims ---------------------------------------------------------------------------------------------------


def claim(*tests, **changes):
    values = {
        "id": "C1",
        "text": "a beats b",
        "where": "Table 1",
        "paper": {"a": 97.0, "b": 77.5},
        "tests": list(tests),
        "scales": ["tiny"],
        "not_testable": {"gpu": "no data", "paper": "needs Llama"},
    }
    return Claim.model_validate(values | changes)


BEATS = {"a": {"arm": "a", "metric": "accuracy"}, "b": {"arm": "b", "metric": "accuracy"}, "direction": "greater"}


def experiment(mean_a, mean_b, seeds=(0, 1, 2), items=200):
    rng = np.random.default_rng(12)
    return {
        arm: {
            s: RunScores({"seconds": mean + 0.01 * s}, {"accuracy": by_item(rng.random(items) < mean)[0]})
            for s in seeds
        }
        for arm, mean in (("a", mean_a), ("b", mean_b))
    }


def test_a_large_effect_is_reproduced_and_its_reverse_is_not():
    result = judge(claim(BEATS), experiment(0.9, 0.5), "tiny")
    test = result.tests[0]
    assert (result.verdict, test.verdict, test.seeds, test.items) == (REPRODUCED, REPRODUCED, 3, 200)
    assert test.mean_a - test.mean_b == pytest.approx(test.effect)
    assert (test.a, test.b) == ("a accuracy", "b accuracy")
    assert judge(claim(BEATS), experiment(0.5, 0.9), "tiny").verdict == NOT_REPRODUCED


def test_the_verdict_is_that_of_the_worst_test():
    slower = {"a": {"arm": "a", "metric": "seconds"}, "constant": 0.5, "direction": "less"}
    result = judge(claim(BEATS, slower), experiment(0.9, 0.5), "tiny")
    assert [test.verdict for test in result.tests] == [REPRODUCED, NOT_REPRODUCED]
    assert result.verdict == NOT_REPRODUCED
    assert result.tests[1].effect == pytest.approx(0.91 - 0.5)
    assert result.tests[1].mean_b is None


def test_a_test_does_not_depend_on_its_neighbours():
    other = {**BEATS, "direction": "less"}
    alone = judge(claim(BEATS), experiment(0.9, 0.5), "tiny").tests[0]
    assert judge(claim(other, BEATS), experiment(0.9, 0.5), "tiny").tests[1] == alone


def test_reasons_why_a_claim_is_not_testable():
    data = experiment(0.9, 0.5)
    assert judge(claim(BEATS), data, "gpu").reason == "no data"

    del data["b"][1]
    result = judge(claim(BEATS), data, "tiny", missing={("b", 1): "no eval.json"})
    assert (result.verdict, result.reason) == (NOT_TESTABLE, "no results for b seed 1 (no eval.json)")
    assert "b seed 1" in judge(claim(BEATS), data, "tiny").reason

    del data["b"]
    assert judge(claim(BEATS), data, "tiny").reason == "no results for b (not among the arms of this run)"


def test_a_seed_that_failed_in_every_arm_is_missed():
    missing = {("a", 3): "no train.json", ("b", 3): "no train.json"}
    reason = judge(claim(BEATS), experiment(0.9, 0.5), "tiny", missing=missing).reason
    assert reason == "no results for a seed 3 (no train.json); b seed 3 (no train.json)"


def test_one_number_of_one_seed_is_not_testable():
    faster = {"a": {"arm": "a", "metric": "seconds"}, "b": {"arm": "b", "metric": "seconds"}, "direction": "less"}
    result = judge(claim(faster), experiment(0.9, 0.5, seeds=[0]), "tiny")
    assert (result.verdict, result.tests[0].lo) == (NOT_TESTABLE, None)
    assert "no interval" in result.reason


def test_an_unknown_metric_names_the_known_ones():
    typo = {**BEATS, "a": {"arm": "a", "metric": "accuracies"}}
    with pytest.raises(UserError, match=r"arm a: unknown metric 'accuracies' \(did you mean 'accuracy'\?\)"):
        judge(claim(typo), experiment(0.9, 0.5), "tiny")
