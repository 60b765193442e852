"""Verdicts on a paper's claims: the effect, its 95% interval over seeds and test items, and what that says.

The interval answers "what if training were repeated with new seeds and tested on new items?". Every run of an arm is
asked the same items, so seeds and items are crossed, and the effect's variance has three parts:

    Var(effect) = seeds / n + items / U + (seed x item) / (n U)        for n seeds and U items

- Items are many: they are resampled (bootstrap), the same ones for every arm, seed and metric that share their names.
  Their deviations are shrunk by the share of the seed x item part, which the seed level already contains.
- Seeds are few. Resampling 3 of them cannot leave the range of the 3, which holds the true mean in 75% of cases only,
  so the seed level is Student's t with n - 1 degrees of freedom on the per-seed effects, paired by seed.

The interval is that of the sum of both, and never narrower than the bootstrap over items alone. Without items it is the
paired t interval; with one seed it is the bootstrap over items, and the result says that the variance of seeds is
missing. Where each seed has items of its own, the spread between seeds contains that of the items.

In simulations with 3 (5) seeds, 60 items and a variance mostly of seeds it covers the true effect in 95% (95%) of
experiments, where resampling the seeds covers it in 82% (87%) and resampling n - 1 of n of them in 86% (89%); with
smaller seed effects it covers 96 to 98%, that is, errs on the careful side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.experiments.errors import UserError, unknown
from shared.experiments.paper import Claim, Comparison, Operand
from shared.experiments.verdicts import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, VERDICTS, WEAK

TAILS = (0.025, 0.975)
RESAMPLES = 10_000

SIGNS = (1.0, -1.0)  # of the two sides of a difference

# By seed: one number, or a score for each item.
Measured = Mapping[int, float | Mapping[str, float]]


@dataclass(frozen=True)
class RunScores:
    """What one run measured: numbers for the run as a whole, and scores by metric and item."""

    scalars: Mapping[str, float]
    items: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    effect: float
    lo: float | None  # None: a single number has no interval
    hi: float | None
    seeds: int
    items: int | None  # distinct items behind the effect; None where the metric is one number per run
    note: str = ""


@dataclass(frozen=True)
class TestResult:
    """One comparison: `mean_a - mean_b` (or `mean_a - constant`) with its interval, in the metric's unit."""

    a: str  # "arm metric"
    b: str | None
    constant: float | None
    direction: str
    margin: float
    mean_a: float
    mean_b: float | None
    effect: float
    lo: float | None
    hi: float | None
    seeds: int
    items: int | None
    verdict: str
    note: str


@dataclass(frozen=True)
class ClaimResult:
    id: str
    text: str
    where: str
    paper: dict[str, float | str]
    verdict: str
    reason: str  # why it is not testable; "" otherwise
    tests: list[TestResult]


def judge(
    claim: Claim,
    data: Mapping[str, Mapping[int, RunScores]],
    scale: str,
    rng_seed: int = 0,
    missing: Mapping[tuple[str, int], str] | None = None,
) -> ClaimResult:
    """The verdict on `claim`: the worst of its tests.

    Args:
        data: arm -> seed -> what that run measured.
        scale: tiny, gpu or paper.
        rng_seed: of the resampling; every test starts from it, so that no test depends on another.
        missing: (arm, seed) -> why that run, which was asked for, has no results.

    Raises:
        UserError: a metric that the runs do not have, or items that do not match between seeds.
    """
    if scale in claim.not_testable:
        return _result(claim, NOT_TESTABLE, claim.not_testable[scale], [])
    absent = _absent_runs(claim, data, missing or {})
    if absent:
        return _result(claim, NOT_TESTABLE, f"no results for {'; '.join(absent)}", [])
    tests = [_test(comparison, data, rng_seed) for comparison in claim.tests]
    worst = max((test.verdict for test in tests), key=VERDICTS.index)
    reason = "; ".join(test.note for test in tests if test.verdict == NOT_TESTABLE)
    return _result(claim, worst, reason, tests)


def interval(
    a: Measured, b: Measured | None = None, rng_seed: int = 0, resamples: int = RESAMPLES, constant: float = 0.0
) -> Interval:
    """The mean over seeds and items of `a - b` (of `a - constant` without `b`), with its 95% interval.

    Args:
        a, b: with the same seeds; each has either a number for every seed or scores by item for every seed.
        rng_seed, resamples: of the bootstrap over items; the interval of numbers per seed needs no resampling.

    Raises:
        UserError: seeds whose items are neither all the same nor all different.
    """
    seeds = sorted(a)
    n = len(seeds)
    sides = [[side[seed] for seed in seeds] for side in (a, b) if side is not None]
    per_seed = np.array([mean(a[s]) - (mean(b[s]) if b is not None else constant) for s in seeds])
    effect = float(per_seed.mean())
    names = {item for side in sides for scores in side if isinstance(scores, Mapping) for item in scores}
    items = len(names) or None

    rng = np.random.default_rng(rng_seed)
    crossed = [_is_crossed(side) for side in sides]
    shared = _crossed_strata([side if c else None for side, c in zip(sides, crossed, strict=True)])
    of_shared = _resample([stratum.mean(0) for stratum in shared], rng, resamples)
    own = _nested_strata([None if c else side for side, c in zip(sides, crossed, strict=True)])
    of_items = of_shared + _resample(own, rng, resamples)  # the effect's deviations with these seeds and other items
    lo, hi = np.quantile(of_items, TAILS)
    if n == 1:
        if all(stratum.shape[1] < 2 for stratum in shared):
            return Interval(effect, None, None, 1, items, "one seed without scores of several items: no interval")
        note = "one seed: its variance is not included"
        return Interval(effect, effect + float(lo), effect + float(hi), 1, items, note)

    main = of_shared * math.sqrt(_item_share(shared))
    t_lo, t_hi = _quantiles(main, math.sqrt(per_seed.var(ddof=1) / n), n - 1)
    # Seeds that agree by luck must not make the interval narrower than the sampling of items alone does.
    return Interval(effect, effect + min(t_lo, float(lo)), effect + max(t_hi, float(hi)), n, items)


def verdict(direction: str, margin: float, effect: float, lo: float, hi: float) -> str:
    """What an effect with interval [lo, hi] says about the claim that it is greater than (less than, within) `margin`.

    greater: reproduced if the whole interval lies above the margin; weak if the margin lies inside it (or at its end)
    and the effect at least has the claimed sign (with a negative margin: exceeds it); not reproduced otherwise.
    less: the mirror image.
    equal: reproduced if the whole interval lies inside (-margin, margin); weak if the effect itself does.
    """
    if direction == "less":
        direction, margin, effect, lo, hi = "greater", -margin, -effect, -hi, -lo
    if direction == "greater":
        if lo > margin:
            return REPRODUCED
        return WEAK if effect > min(margin, 0.0) and hi >= margin else NOT_REPRODUCED
    if -margin < lo and hi < margin:
        return REPRODUCED
    return WEAK if abs(effect) < margin else NOT_REPRODUCED


def measured(data: Mapping[str, Mapping[int, RunScores]], operand: Operand) -> Measured:
    """An arm's metric: scores by item if the runs have them, otherwise one number per seed."""
    runs = data[operand.arm]
    if all(operand.metric in run.items for run in runs.values()):
        return {seed: run.items[operand.metric] for seed, run in runs.items()}
    for run in runs.values():
        if operand.metric not in run.scalars:
            valid = sorted({*run.items, *run.scalars})
            raise UserError(f"paper.yaml, arm {operand.arm}: {unknown('metric', operand.metric, valid)}")
    return {seed: run.scalars[operand.metric] for seed, run in runs.items()}


def mean(scores: float | Mapping[str, float]) -> float:
    """One run's value of a metric: the mean over its items, or the number itself."""
    return math.fsum(scores.values()) / len(scores) if isinstance(scores, Mapping) else float(scores)


def _result(claim: Claim, verdict: str, reason: str, tests: list[TestResult]) -> ClaimResult:
    return ClaimResult(claim.id, claim.text, claim.where, dict(claim.paper), verdict, reason, tests)


def _absent_runs(claim: Claim, data: Mapping, missing: Mapping[tuple[str, int], str]) -> list[str]:
    arms = dict.fromkeys(o.arm for test in claim.tests for o in (test.a, test.b) if o is not None)
    seeds = {seed for arm in arms for seed in data.get(arm, ())} | {seed for arm, seed in missing if arm in arms}
    absent = []
    for arm in arms:
        gone = sorted(seeds - set(data.get(arm, ())))
        if not data.get(arm) and not any((arm, seed) in missing for seed in gone):
            absent.append(f"{arm} (not among the arms of this run)")
            continue
        for seed in gone:
            reason = missing.get((arm, seed))
            absent.append(f"{arm} seed {seed}" + (f" ({reason})" if reason else ""))
    return absent


def _test(comparison: Comparison, data: Mapping, rng_seed: int) -> TestResult:
    a = measured(data, comparison.a)
    b = measured(data, comparison.b) if comparison.b else None
    found = interval(a, b, rng_seed, constant=comparison.constant or 0.0)
    if found.lo is None or found.hi is None:
        decided = NOT_TESTABLE
    else:
        decided = verdict(comparison.direction, comparison.margin, found.effect, found.lo, found.hi)
    return TestResult(
        a=f"{comparison.a.arm} {comparison.a.metric}",
        b=f"{comparison.b.arm} {comparison.b.metric}" if comparison.b else None,
        constant=comparison.constant,
        direction=comparison.direction,
        margin=comparison.margin,
        mean_a=_mean_over_seeds(a),
        mean_b=_mean_over_seeds(b) if b else None,
        effect=found.effect,
        lo=found.lo,
        hi=found.hi,
        seeds=found.seeds,
        items=found.items,
        verdict=decided,
        note=found.note,
    )


def _mean_over_seeds(values: Measured) -> float:
    return math.fsum(map(mean, values.values())) / len(values)


def _is_crossed(scores: list[float | Mapping[str, float]]) -> bool:
    """True if all seeds have the same items, False if none are shared or there are no items at all."""
    if not isinstance(scores[0], Mapping):
        return False
    first = scores[0].keys()
    if all(other.keys() == first for other in scores[1:]):
        return True
    if sum(map(len, scores)) == len(set().union(*scores)):
        return False
    odd = next(iter(first ^ next(other.keys() for other in scores if other.keys() != first)))
    raise UserError(
        f"the items of an arm's seeds must be all the same or all different, but item {odd!r} is in some seeds only: "
        f"score every item, or report the metric as one number per run in eval.json"
    )


def _crossed_strata(sides: list[list[Mapping[str, float]] | None]) -> list[np.ndarray]:
    """The crossed sides' contributions to the per-seed effects: an array [seeds, items] per stratum."""
    by_seed = list(zip(*(side for side in sides if side is not None), strict=True))
    signs = [sign for sign, side in zip(SIGNS, sides, strict=False) if side is not None]
    per_seed = [_contributions(scores, signs) for scores in by_seed]
    return [np.stack(stratum) for stratum in zip(*per_seed, strict=True)]


def _contributions(sides: Iterable[Mapping[str, float]], signs: Iterable[float]) -> list[np.ndarray]:
    """What each item adds to a difference of means, in strata by which of the sides have the item.

    With strata of fixed sizes, sides with the same items are paired and sides with different items independent. Items
    and strata come in the order of the items' names, whichever side comes first.
    """
    sides = list(sides)
    strata: dict[tuple[bool, ...], list[float]] = {}
    for item in sorted(set().union(*sides)):
        value = sum(sign * side[item] / len(side) for sign, side in zip(signs, sides, strict=True) if item in side)
        strata.setdefault(tuple(item in side for side in sides), []).append(value)
    return [np.array(values) for values in strata.values()]


def _nested_strata(sides: list[list[Any] | None]) -> list[np.ndarray]:
    """The contributions [items] to the effect, per seed and stratum, of sides whose seeds have items of their own."""
    kept = [(sign, side) for sign, side in zip(SIGNS, sides, strict=False) if side and isinstance(side[0], Mapping)]
    if not kept:
        return []
    signs, sides = zip(*kept, strict=True)
    return [stratum / len(sides[0]) for scores in zip(*sides, strict=True) for stratum in _contributions(scores, signs)]


def _resample(strata: list[np.ndarray], rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Deviations [resamples] of the strata's total when the items of each are drawn anew, with replacement."""
    totals = np.zeros(resamples)
    for values in strata:
        count = len(values)
        rows = max(1, 4_000_000 // count)  # at a time, for memory's sake
        for start in range(0, resamples, rows):
            drawn = rng.integers(0, count, size=(min(rows, resamples - start), count))
            totals[start : start + rows] += (values - values.mean())[drawn].sum(1)
    return totals


def _item_share(strata: list[np.ndarray]) -> float:
    """The share of the item part in the variance of item means (which is the item and the seed x item part)."""
    total = both = 0.0
    for values in strata:
        seeds, count = values.shape
        if count > 1:
            residual = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
            both += count * (residual**2).sum() / ((seeds - 1) * (count - 1)) / seeds
            total += count * values.mean(0).var(ddof=1)
    return 1 - both / total if total > both else 0.0


def _quantiles(deviations: np.ndarray, scale: float, df: int) -> tuple[float, float]:
    """The central 95% of `deviation + scale * t` for a deviation drawn from `deviations` and t ~ Student(df).

    The distribution function of the sum is the mean over the deviations of Student's, so t need not be sampled.
    """
    from scipy.optimize import brentq
    from scipy.special import stdtr, stdtrit

    spread = float(np.ptp(deviations))
    if spread == 0.0:
        return float(scale * stdtrit(df, TAILS[0])), float(scale * stdtrit(df, TAILS[1]))
    if scale <= 1e-12 * spread:
        lo, hi = np.quantile(deviations, TAILS)
        return float(lo), float(hi)
    reach = 2 * scale * stdtrit(df, TAILS[1])
    ends = float(deviations.min() - reach), float(deviations.max() + reach)
    tolerance = 1e-12 * (ends[1] - ends[0])

    def quantile(p: float) -> float:
        return brentq(lambda x: stdtr(df, (x - deviations) / scale).mean() - p, *ends, xtol=tolerance)

    return quantile(TAILS[0]), quantile(TAILS[1])
