import numpy as np
import pytest

from papers.divpo.config import Config
from papers.divpo.tasks import (
    GatedReward,
    attributes_of,
    build_policy,
    load_criterion,
    load_reward,
    load_rows,
    rollout_diversity,
    unique_attributes,
)
from shared.data import persona, story
from shared.experiments import UserError
from shared.generation import Completion
from shared.training.pairs import Pool


def pool_of(*texts) -> Pool:
    return Pool({"prompt": "x"}, [Completion(text, [1], [-1.0], "stop") for text in texts], [0.0] * len(texts))


def test_train_and_test_prompts_differ():
    config = Config(task="keywords", n_topics=5, n_styles=6, test_prompts=10)
    train, test = load_rows(config, "train"), load_rows(config, "test")
    assert not {row["item"] for row in train} & {row["item"] for row in test}
    assert len(test) == 10
    assert len({row["topic"] for row in test}) > 2  # a random part, not the first titles
    assert load_rows(config, "test") == test


def test_prompts_of_pretrained_models_are_chat_messages():
    config = Config(task="keywords", model="m", reward_model="r", test_prompts=2)
    (message,) = load_rows(config, "test")[0]["prompt"]
    assert message["role"] == "user"
    title = load_rows(config, "test")[0]["title"]
    assert f'"{title.title()}"' in message["content"]
    (row,) = load_rows(Config(task="persona", model="m"), "train")
    assert row["prompt"] == [{"role": "user", "content": persona.INSTRUCTION}]
    assert all(f'"{name}"' in persona.INSTRUCTION for name in persona.ATTRIBUTES)


def test_wildchat_holds_test_prompts_out(wildchat):
    options = {"task": "instruct", "model": "m", "reward_model": "r", "prompts": str(wildchat)}
    config = Config(**options, train_prompts=9, test_prompts=4)
    train, test = load_rows(config, "train"), load_rows(config, "test")
    assert (len(train), len(test)) == (9, 4)
    assert not {row["item"] for row in train} & {row["item"] for row in test}
    assert "h3" not in {row["item"] for row in train + test}  # toxic


def test_unique_attributes_are_counted_in_lots_of_the_same_size():
    names = ["a", "b", "a", "c", "c", "c", "d"]
    valid = [{"first_name": name, "city": "x", "occupation": str(i)} for i, name in enumerate(names)]
    found = unique_attributes(valid, 3)  # two lots of three; the seventh is left out
    assert found["unique_first_name"] == pytest.approx(np.mean([2 / 3, 1 / 3]))
    assert found["unique_city"] == pytest.approx(1 / 3)
    assert found["unique_occupation"] == 1.0
    assert found["unique"] == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    with pytest.raises(ValueError, match="need at least 8 values"):
        unique_attributes(valid, 8)


def test_rollout_diversity():
    good = [
        '{ "first_name": "A" , "city": "B" , "occupation": "C" }',
        '{ "first_name": "D" , "city": "B" , "occupation": "C" }',
    ]
    assert rollout_diversity(Config(unique_first=2), [[good[0], "junk"], [good[1]]]) == pytest.approx(2 / 3)
    assert rollout_diversity(Config(unique_first=3), [good]) is None
    assert rollout_diversity(Config(task="keywords"), [["a b", "b c"], ["d", "d"]]) == 2.0


def test_gated_reward_asks_only_about_answers_of_the_right_length():
    asked = []

    def model(prompts, completions, **columns):
        asked.append((prompts, completions, columns))
        return [7.0] * len(completions)

    reward = GatedReward(model, 2)
    assert reward(["p", "q", "r"], ["a b", "a", "c, d!"], topic=["x", "y", "z"], log_metric=print) == [7.0, 0.0, 7.0]
    assert asked == [(["p", "r"], ["a b", "c, d!"], {"topic": ["x", "z"]})]
    assert reward(["p"], [""], topic=["x"]) == [0.0]
    assert len(asked) == 1


@pytest.mark.parametrize("bad", [[float("nan")], [1.0, 2.0]])
def test_gated_reward_passes_no_nonsense_on(bad):
    def model(prompts, completions, **columns):
        return bad

    with pytest.raises(ValueError, match="row 0" if len(bad) == 1 else "2 rewards for 1"):
        GatedReward(model, 1)(["p"], ["a"])


def test_rewards_of_the_tasks(reward_checkpoint, armo_checkpoint):
    assert load_reward(Config())([""], ['{ "first_name": "A" , "city": "B" , "occupation": "C" }']) == [1.0]
    world = story.StoryWorld()
    text = " ".join(world.words["sea"][:5])
    reward = load_reward(Config(task="keywords"))
    assert reward([""], [text], topic=["sea"]) == [world.quality("sea", text)]
    prompt = [{"role": "user", "content": "Tell me a joke."}]
    for checkpoint, kind in ((reward_checkpoint, "classifier"), (armo_checkpoint, "armo")):
        config = Config(task="keywords", model="m", reward_model=str(checkpoint), reward_model_kind=kind)
        scores = load_reward(config)([prompt] * 3, ["a b c d e", "a b c d", "f g h i j"], topic=["sea"] * 3)
        assert scores[1] == 0.0
        assert 0.0 not in (scores[0], scores[2])


def test_the_criterion_of_personas_ignores_the_keys():
    def persona_of(name):
        return f'{{ "first_name": "{name}" , "city": "{name}" , "occupation": "{name}" }}'

    # Z is in one sample and B in two; with the common keys counted, the first would have the commoner words.
    pool = pool_of(persona_of("Z"), "B", persona_of("B"), persona_of("Q"))
    allowed = np.array([[True, True, False, False]])
    assert load_criterion(Config(criterion="frequency"))([pool], allowed, True) == [0]
    assert load_criterion(Config(criterion="frequency", task="keywords"))([pool], allowed, True) == [1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "story"}, "task: 'story' is not one of persona, keywords, instruct"),
        ({"criterion": "novelty"}, "criterion: 'novelty' is not one of"),
        ({"rho": 0.6}, "rho: 0.6 is not between 0 and 0.5"),
        ({"method": "grpo", "online": False}, "method grpo needs online: true"),
        ({"method": "grpo", "nll_weight": 0.1}, "nll_weight is a term of DPO's loss"),
        ({"num_generations": 1}, "at least 2 samples"),
        ({"criterion": "llm"}, "criterion llm needs a judge_model"),
        ({"task": "instruct"}, "needs model and reward_model"),
        ({"task": "keywords", "model": "m"}, "needs a reward_model"),
        ({"stories": True}, "stories needs task keywords"),
    ],
)
def test_config_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_a_policy_that_learned_nothing_is_refused(small, tmp_path):
    config = small(sft_steps=1, least_competence=0.5)
    with pytest.raises(UserError, match=r"the starting policy answers validly in .* raise sft_steps"):
        build_policy(config, 0, tmp_path)


def test_attributes_of_keeps_only_valid_personas():
    assert attributes_of(["{", '{ "first_name": "A" , "city": "B" , "occupation": "C" }']) == [
        {"first_name": "A", "city": "B", "occupation": "C"}
    ]
