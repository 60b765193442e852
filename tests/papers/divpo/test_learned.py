import numpy as np
import pytest

from papers.divpo.config import Config
from papers.divpo.learned import SHARPNESS, LearnedReward, build_reward_model, compare, load_learned_reward
from papers.divpo.tasks import build_policy, load_world
from papers.divpo.train import train
from shared.experiments import UserError, files
from tests.papers.divpo.conftest import SMALL

LEARNED = {**SMALL, "task": "keywords", "width": 32, "sft_steps": 250, "reward_model_learned": True}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policy")
    build_policy(Config(**LEARNED), 0, directory)
    return directory


def test_comparisons_follow_bradley_terry(start):
    world = load_world(Config(**LEARNED))
    rows = {f"{row['prompt']} ": row for row in world.rows("train")}
    compared = compare(world, list(rows.values()), start, 3000, seed=0)
    margins = []
    for prompt, preferred, other in compared:
        topic = rows[prompt]["topic"]
        margins.append(world.quality(topic, preferred) - world.quality(topic, other))
        assert len(preferred.split()) == len(other.split()) == 5
    assert 1000 < len(margins) <= 3000
    assert 0 not in margins
    expected = 1 / (1 + np.exp(-SHARPNESS * np.abs(margins)))
    deviation = np.sqrt(np.sum(expected * (1 - expected)))
    assert abs(np.sum(np.array(margins) > 0) - np.sum(expected)) < 4 * deviation
    assert 0.55 < np.mean(np.array(margins) > 0) < 0.99


def test_held_out_comparisons_have_the_true_order(start):
    world = load_world(Config(**LEARNED))
    rows = {f"{row['prompt']} ": row for row in world.rows("dev")}
    compared = compare(world, list(rows.values()), start, 300, seed=1, sharpness=np.inf)
    assert len(compared) > 100
    for prompt, better, worse in compared:
        assert world.quality(rows[prompt]["topic"], better) > world.quality(rows[prompt]["topic"], worse)


def test_the_reward_model_learns_the_order(start, tmp_path):
    config = Config(**LEARNED, reward_model_pairs=3000, reward_model_steps=150, reward_model_accuracy=0.55)
    measured = build_reward_model(config, load_world(config), start, 0, tmp_path)
    assert measured["accuracy"] > 0.62


def test_no_story_is_worth_less_than_an_answer_without_five_keywords():
    def scores(prompts, completions, **columns):
        assert prompts == ["title : "] * 3
        return [-9.0, 0.0, 4.0]

    reward = LearnedReward(scores)(["title :"] * 3, ["a", "b", "c"])
    assert reward == pytest.approx([1 / (1 + np.exp(9)), 0.5, 1 / (1 + np.exp(-4))])
    assert min(reward) > 0


def test_one_that_learned_nothing_is_refused(start, tmp_path):
    options = {"reward_model_pairs": 100, "reward_model_steps": 1, "reward_model_lr": 0.0, "reward_model_accuracy": 0.9}
    config = Config(**LEARNED, **options)
    with pytest.raises(UserError, match=r"the reward model orders .* raise reward_model_pairs"):
        build_reward_model(config, load_world(config), start, 0, tmp_path)


def test_arms_of_a_seed_share_it_and_are_evaluated_by_the_truth(make_run):
    from papers.divpo.eval import evaluate

    config = Config(**LEARNED, reward_model_pairs=300, reward_model_steps=5, reward_model_accuracy=0.0)
    for arm in ("keywords_dpo_learned", "keywords_divpo_learned"):
        train(config, make_run(arm=arm))
    run = make_run("eval", arm=arm)
    assert len(list((run.dir.parents[1] / "starting_policies").glob("*/starting_policy.json"))) == 2
    assert 0 <= evaluate(config, run)["reward_model_accuracy"] <= 1
    world = load_world(config)
    rows = files.read_jsonl(run.dir / "predictions.jsonl")
    for row in rows:
        truth = [world.quality(row["item"].split()[-1], text) for text in row["outputs"]]
        assert row["scores"]["reward"] == pytest.approx(np.mean(truth))
    assert any(row["scores"]["learned_reward"] != row["scores"]["reward"] for row in rows)


def test_the_directory_depends_on_policy_and_settings(start, make_run):
    config = Config(**LEARNED, reward_model_pairs=300, reward_model_steps=5, reward_model_accuracy=0.0)
    other = Config(**LEARNED, reward_model_pairs=300, reward_model_steps=6, reward_model_accuracy=0.0)
    world = load_world(config)
    paths = {load_learned_reward(c, make_run(), world, start) for c in (config, other, config)}
    assert len(paths) == 2
