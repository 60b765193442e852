import numpy as np
import pytest

from papers.semi_online import worlds
from papers.semi_online.config import Config, Hub
from papers.semi_online.worlds import Rewards, WordReward, _sums, starting_points, task_rows, train_rows
from shared.data.writing import gold_score, prefer
from shared.experiments import UserError
from tests.papers.semi_online.conftest import small_config


class Lengths:
    """A reward model that scores by the number of characters."""

    def __call__(self, prompts, completions, **columns):
        return [float(len(prompt + completion)) for prompt, completion in zip(prompts, completions, strict=True)]


def rewards_with(model) -> Rewards:
    rewards = Rewards(Config(), "unused")
    rewards._by_task["chat"] = WordReward(model)
    return rewards


def test_each_completion_is_scored_by_its_task():
    prompts = ["1 + 1 + 1 =", "river stone :", "1 + 1 + 1 =", "stone river :"]
    found = rewards_with(Lengths())(
        prompts,
        ["2 3 ANS 3", "cloud", "2 4 ANS 4", ""],
        task=["math", "chat", "math", "chat"],
        answer=["3", None, "3", None],
        keywords=[None, ["river", "stone"], None, ["stone", "river"]],
        trainer_state=object(),  # what TRL passes beside the columns
    )
    assert found == [1.0, len("river stone : cloud"), 0.0, len("stone river : ")]


def test_rewards_refuse_what_they_cannot_score():
    rewards = rewards_with(Lengths())
    with pytest.raises(UserError, match="column 'task'"):
        rewards(["x"], ["y"])
    with pytest.raises(UserError, match="must be math or chat, not 'poem'"):
        rewards(["x"], ["y"], task=["poem"])
    with pytest.raises(UserError, match="needs the dataset column 'answer'"):
        rewards(["1 + 1 ="], ["2"], task=["math"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0], "the reward of chat returned 1 rewards for 2 completions"), ([1.0, np.nan], "returned nan for row 1")],
)
def test_a_broken_reward_model_is_an_error(returned, message):
    rewards = rewards_with(lambda prompts, completions, **columns: returned)
    with pytest.raises(ValueError, match=message):
        rewards(["a", "b"], ["c", "d"], task=["chat", "chat"])


def test_splits_share_no_prompt_and_test_rows_are_the_same_for_every_seed():
    config = Config(n_test=50)
    for task in ("math", "chat"):
        prompts = {split: {row["prompt"] for row in task_rows(config, task, split, 2000)} for split in ("dev", "test")}
        prompts["train"] = {row["prompt"] for seed in (0, 1) for row in task_rows(config, task, "train", 2000, seed)}
        assert len(set.union(*prompts.values())) == sum(map(len, prompts.values()))
        items = [row["item"] for row in task_rows(config, task, "test", 50)]
        assert len(set(items)) == len(items)
        # A chat prompt of the test comes once only.
        assert len({row["prompt"] for row in task_rows(config, task, "test", 50)}) == len(items)


def test_mixed_training_has_as_many_of_each():
    rows = train_rows(small_config(), "both", seed=0)
    assert [row["task"] for row in rows] == ["math"] * 10 + ["chat"] * 10


def test_sums_by_hand():
    # 7+5=2 right, 2*3=9 (not a sum), 9-4=6 wrong, 6+1=7 right, given what was written
    assert _sums("7 + 5 * 3 - 4 + 1 =", "2 9 6 7 ANS 7", 10) == [True, False, True]
    assert _sums("7 - 8 =", "9", 10) == [True]
    assert _sums("7 + 5 + 1 =", "2 ANS 2", 10) == [True]
    assert _sums("7 + 5 =", "", 10) == []


def test_policy_and_reward_model_are_made_once_per_seed(make_run):
    config = small_config()
    first = starting_points(config, make_run("a"))
    again = starting_points(small_config(method="grpo"), make_run("b"))  # what an arm does is not part of it
    other = starting_points(config, make_run("a", seed=7))
    assert first == again
    assert set(first).isdisjoint(other)
    for directory in (*first, *other):
        assert (directory / "config.json").exists()
        assert not (directory / "sft").exists()
        assert not (directory / "trainer").exists()


def test_an_incompetent_policy_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"starting policy of seed 3 gets .* change generated.sft_steps"):
        worlds.build_policy(small_config(), 3, gated=True, directory=tmp_path)


def test_a_reward_model_that_is_often_wrong_is_refused(make_run, tmp_path):
    policy, _ = starting_points(small_config(), make_run())
    with pytest.raises(UserError, match=r"reward model of seed 0 gets .* fewer than 80%: raise generated.reward_steps"):
        worlds.build_reward_model(small_config(), 0, True, policy, tmp_path)


def test_the_reward_model_reads_prompt_and_response_as_it_was_taught(make_run):
    """The score of TRL's training input is the score of the reward."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _, directory = starting_points(small_config(), make_run())
    reward = Rewards(small_config(), directory)
    prompts, texts = ["river stone :"] * 3, ["cloud", "", "amber fern river stone"]
    found = reward(prompts, texts, task=["chat"] * 3)
    model, tokenizer = (c.from_pretrained(directory) for c in (AutoModelForSequenceClassification, AutoTokenizer))
    for prompt, text, score in zip(prompts, texts, found, strict=True):
        ids = torch.tensor([tokenizer(f"{prompt} {text}")["input_ids"]])
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert len(set(found)) == 3


def test_comparisons_are_decided_by_the_annotator(make_run):
    policy, _ = starting_points(small_config(), make_run())
    pairs = worlds.comparisons(policy, "dev", 30, seed=0)
    assert 20 < len(pairs) <= 30
    for prompt, chosen, rejected in pairs:
        assert chosen != rejected
        keywords = prompt.split()[:2]
        assert prefer(keywords, chosen, rejected) == (chosen, rejected)
        assert gold_score(keywords, chosen) > gold_score(keywords, rejected) - 0.02 * 16
    held_out = {row["prompt"] for row in task_rows(small_config(), "chat", "train", 446)}
    assert not {prompt.strip() for prompt, *_ in pairs} & held_out


# ---- the hub's data --------------------------------------------------------------------------------------------------


def test_rows_of_the_hub(sources):
    config = Config(world="hub", hub=Hub(sources=sources))
    config.chat.n_train, config.both.n_train = 12, 30
    tests = task_rows(config, "math", "test", 100)
    assert [row["metric"] for row in tests] == (
        ["accuracy"] * 3 + ["accuracy_numinamath"] * len([r for r in tests if r["metric"] == "accuracy_numinamath"])
        + ["accuracy_amc23"] * 2
    )  # fmt: skip
    assert len({row["item"] for row in tests}) == len(tests)
    [message] = tests[0]["prompt"]
    assert message["role"] == "user"
    assert "What is 0?" in message["content"]
    assert message["content"].endswith("\\boxed{answer}$. I hope it is correct.")
    train, dev = train_rows(config, "chat", 0), task_rows(config, "chat", "dev", 10)
    assert len(train) == 12
    assert len(dev) == 10
    assert not {row["item"] for row in train} & {row["item"] for row in dev}
    both = train_rows(config, "both", 0)
    assert [row["task"] for row in both] == ["math"] * 20 + ["chat"] * 10
    assert not {row["item"] for row in both} & {row["item"] for row in dev}
