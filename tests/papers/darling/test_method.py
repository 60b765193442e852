"""DARLING's reward against its equations, written out in another way."""

import math

import numpy as np
import pytest

from papers.darling.config import Config
from papers.darling.method import DiversityAwareReward, UnlikelinessReward, make_reward, shaped, z_scores
from shared.experiments.paper import load_paper
from shared.experiments.run import resolve_config


def qualities(values):
    return lambda prompts, completions, **columns: list(values)


def same_first_word(pairs):
    return [a.split()[0] == b.split()[0] for a, b in pairs]


PROMPTS = ["p"] * 4 + ["q"] * 4
TEXTS = ["a 1", "a 2", "b", "c", "d", "d 1", "d 2", "d 3"]


def test_the_papers_example():
    """Four responses, two of them equivalent: diversities 2/3, 2/3, 1, 1; and a group of one class gets the floor."""
    reward = make_reward(Config(num_generations=4), qualities([1, 0, 1, 0.5, 1, 1, 0, 1]), same_first_word)
    assert reward(PROMPTS, TEXTS) == pytest.approx([2 / 3, 0, 1, 0.5, 0.1, 0.1, 0, 0.1])


def test_equation_5_on_random_partitions():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(2, 9))
        classes = rng.integers(0, n, size=n)
        quality = rng.random(n)
        texts = [f"{c} {i}" for i, c in enumerate(classes)]
        reward = make_reward(Config(num_generations=n), qualities(quality), same_first_word)
        expected = []
        for i in range(n):
            distances = [classes[i] != classes[j] for j in range(n) if j != i]  # Eq. 4, pair by pair
            expected.append(quality[i] * max(0.1, sum(distances) / (n - 1)))
        assert reward(["p"] * n, texts) == pytest.approx(expected)


def test_verdicts_are_closed_transitively():
    chain = {("a", "b"), ("b", "c")}  # a ~ b ~ c, although a and c do not look alike

    def same(pairs):
        return [(x, y) in chain or (y, x) in chain for x, y in pairs]

    reward = make_reward(Config(num_generations=4), qualities([1] * 4), same)
    assert reward(["p"] * 4, ["a", "b", "c", "d"]) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])


def test_without_diversity_the_reward_is_the_quality():
    quality = [0.3, -2.0, None, 1.0]
    reward = make_reward(Config(diversity="none", num_generations=4), qualities(quality), None)
    assert reward(["p"] * 4, ["a", "b", "c", "d"]) == quality


def test_a_negative_quality_turns_the_product_around_unless_it_is_shaped():
    quality = [-2.0, -2.0, -2.0, -2.0]  # equally bad: two of one class, two rare
    texts = ["a 1", "a 2", "b", "c"]
    rewards = {
        shape: make_reward(Config(num_generations=4, shape=shape), qualities(quality), same_first_word)(
            ["p"] * 4, texts
        )
        for shape in ("raw", "sigmoid", "min_shift")
    }
    assert rewards["raw"][0] > rewards["raw"][2]  # the trap: the common answer is rewarded
    assert rewards["sigmoid"][0] < rewards["sigmoid"][2]
    assert rewards["min_shift"] == [0.0] * 4


def test_shapes():
    values = np.array([[-1000.0, 0.0, 2.0], [1000.0, np.nan, -3.0]])
    sigmoid = shaped(values, "sigmoid")
    assert sigmoid[0] == pytest.approx([0.0, 0.5, 1 / (1 + math.exp(-2))])
    assert sigmoid[1, 0] == 1.0
    assert np.isnan(sigmoid[1, 1])
    shifted = shaped(values, "min_shift")
    assert shifted[0] == pytest.approx([0, 1000, 1002])
    assert shifted[1, [0, 2]] == pytest.approx([1003, 0])
    assert np.isnan(shifted[1, 1])
    assert shaped(values, "raw") is values


def test_z_scores_of_each_group():
    values = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0], [1.0, np.nan, 3.0, np.nan]])
    found = z_scores(values)
    assert found[0] == pytest.approx((values[0] - 2.5) / np.std(values[0], ddof=1), abs=1e-5)
    assert found[1] == pytest.approx([0] * 4)
    assert found[2, [0, 2]] == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)], abs=1e-5)
    assert np.isnan(found[2, [1, 3]]).all()


def test_the_sum_is_of_z_scores_and_ignores_the_scales_of_its_parts():
    texts = ["a 1", "a 2", "b", "c"]
    rewards = [
        make_reward(
            Config(num_generations=4, combine="sum"), qualities(scale * np.array([1.0, 3, 2, 2])), same_first_word
        )
        for scale in (1, 1000)
    ]
    first, second = (reward(["p"] * 4, texts) for reward in rewards)
    assert first == pytest.approx(second, abs=1e-4)
    diversity = np.array([2 / 3, 2 / 3, 1, 1])
    expected = (np.array([1.0, 3, 2, 2]) - 2) / np.std([1, 3, 2, 2], ddof=1)
    expected += (diversity - diversity.mean()) / np.std(diversity, ddof=1)
    assert first == pytest.approx(expected, abs=1e-4)


def test_rows_without_quality_have_no_reward_and_leave_the_others_alone():
    for combine in ("product", "sum"):
        config = Config(num_generations=4, combine=combine, shape="min_shift")
        reward = make_reward(config, qualities([None, 1.0, 2.0, 3.0]), same_first_word)
        found = reward(["p"] * 4, ["a", "b", "c", "d"])
        assert found[0] is None
        assert all(math.isfinite(value) for value in found[1:])


def test_nonsense_is_refused_with_its_row():
    bad = make_reward(Config(num_generations=4), qualities([1, 1, float("nan"), 1]), same_first_word)
    with pytest.raises(ValueError, match="quality returned nan for row 2"):
        bad(["p"] * 4, ["a", "b", "c", "d"])
    short = make_reward(Config(num_generations=4), qualities([1, 1, 1]), same_first_word)
    with pytest.raises(ValueError, match="3 rewards for 4 completions"):
        short(["p"] * 4, ["a", "b", "c", "d"])
    uneven = make_reward(Config(num_generations=4), qualities([1] * 6), same_first_word)
    with pytest.raises(ValueError, match="6 completions are not groups of 4"):
        uneven(["p"] * 6, list("abcdef"))


def test_empty_and_equal_completions():
    reward = make_reward(Config(num_generations=4), qualities([1.0] * 4), lambda pairs: [False] * len(pairs))
    assert reward(["p"] * 4, ["", "", "", ""]) == pytest.approx([0.1] * 4)  # equal texts are not even asked about


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 - 2 / 12, 1 - 3 / 12, 1 - 1 / 12, 1 - 2 / 12, 1 - 2 / 12, 1 - 2 / 12]),  # ranks 1, 0, 2; all 1
        ({"weight": 0}, [1] * 6),
        ({"min_max": True}, [0.5, 0, 1, 1, 1, 1]),
    ],
)
def test_unlikeliness(options, expected):
    reward = UnlikelinessReward(3, **options)
    logprobs = [[-1.0, -3.0], [-1.0], [-4.0, -2.0], [-1.0], [-1.0], [-1.0, -1.0]]  # means -2, -1, -3; all -1
    found = reward(["p"] * 3 + ["q"] * 3, list("abcdef"), logprobs=logprobs)
    assert found == pytest.approx(expected)
    assert DiversityAwareReward(qualities([1] * 6), reward, group_size=3).needs_logprobs


def test_metrics_are_logged():
    logged = {}
    reward = make_reward(Config(num_generations=4), qualities([1, 0, None, 0.5]), same_first_word)
    reward(["p"] * 4, ["a 1", "a 2", "b", "c"], log_metric=lambda name, value: logged.__setitem__(name, value))
    assert logged["quality"] == pytest.approx(0.5)
    assert logged["diversity"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("scale", ["tiny", "gpu", "paper"])
def test_arms_differ_from_grpo_only_as_they_say(scale):
    paper = load_paper("darling")
    arms = {arm: resolve_config(paper, Config, scale, arm, []) for arm in paper.select_arms(scale)}
    for arm, config in arms.items():
        world, _, method = arm.partition("_")
        matched = arms[f"{world}_grpo"]
        changed = {name for name, value in vars(config).items() if value != getattr(matched, name)}
        reward = {"diversity", "combine", "shape", "scale_rewards"}
        assert changed <= (reward | {"steps", "pairs_source"} if method == "base" else reward), arm
        assert (config.steps == 0) == (method == "base")
        if method.startswith("darling"):
            assert config.diversity in ("classes", "true_classes")
            assert (config.scale_rewards == "group") == (method == "darling_std")


def test_config_says_what_is_valid():
    for change, message in [
        ({"task": "chess"}, "task: 'chess' is not one of operators, ideas, math, wildchat"),
        ({"diversity": "x"}, "diversity: 'x' is not one of none"),
        ({"num_generations": 1}, "at least 2 rollouts"),
        ({"task": "math"}, "task math needs model, test_sets, classifier"),
        (
            {"task": "math", "diversity": "true_classes", "model": "m", "test_sets": ["aime25"]},
            "needs a generated task",
        ),
        ({"sweep": [0.5, 1.0]}, "sweep: 1.0 is eval_temperature"),
        ({"test_sets": ["a"], "test_sources": ["b", "c"]}, "2 for 1 test_sets"),
    ]:
        with pytest.raises(ValueError, match=message):
            Config(**change)
