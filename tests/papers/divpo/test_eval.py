import json

import numpy as np
import pytest

from papers.divpo.config import Config
from papers.divpo.eval import evaluate_persona, evaluate_prompts, persona_metrics, prompt_scores, reward_at
from shared.experiments import UserError
from shared.generation import Completion

PERSONA = '{{ "first_name": "{}" , "city": "Rome" , "occupation": "baker" }}'


class FakeSampler:
    """The given texts over and over, in place of a model; remembers its temperatures and seeds."""

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    def sample(self, prompts, n=1, params=None):
        self.asked.append((params.temperature, params.seed))
        texts = iter(self.texts * (1 + len(prompts) * n // len(self.texts)))
        return [[Completion(next(texts), [1, 2], [-0.5, -1.5], "stop") for _ in range(n)] for _ in prompts]

    def close(self):
        self.texts = None


def test_personas(make_run):
    texts = [PERSONA.format("Ada"), "junk", PERSONA.format("Bo"), PERSONA.format("Ada")]
    config, run = Config(n_samples=8, unique_first=3, temperatures=[0.5]), make_run("eval")
    metrics = evaluate_persona(config, run, FakeSampler(texts))
    assert metrics["valid"] == 0.75
    assert metrics["entropy"] == 2.0
    assert metrics["unique_first_name"] == pytest.approx(2 / 3)  # Ada Bo Ada, twice
    assert metrics["unique"] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)
    assert metrics["top_share"] == pytest.approx(2 / 3)
    assert metrics["name_entropy"] == pytest.approx(-(2 / 3) * np.log(2 / 3) - (1 / 3) * np.log(1 / 3))
    assert metrics["valid_t0.5"] == 0.75
    rows = [json.loads(line) for line in (run.dir / "predictions.jsonl").read_text().splitlines()]
    assert [row["scores"]["valid"] for row in rows] == [1, 0, 1, 1] * 2
    assert rows[2]["output"] == texts[2]


def test_more_is_sampled_until_enough_are_valid(make_run):
    config, sampler = Config(n_samples=4, unique_first=3), FakeSampler([PERSONA.format("Ada"), "a", "b", "c"])
    metrics = evaluate_persona(config, make_run("eval"), sampler)
    assert len(sampler.asked) == 3
    assert len(set(sampler.asked)) == 3  # other seeds, other samples
    assert metrics["valid"] == 0.25
    assert metrics["unique_first_name"] == pytest.approx(1 / 3)


def test_a_policy_that_lost_the_format_is_an_error(make_run):
    with pytest.raises(UserError, match="only 0 of 32 samples are valid"):
        evaluate_persona(Config(n_samples=4, unique_first=3), make_run("eval"), FakeSampler(["junk"]))


def test_at_another_temperature_what_cannot_be_counted_is_left_out():
    completions = [Completion(t, [1], [-1.0], "stop") for t in ("junk", PERSONA.format("Ada"))]
    found = persona_metrics(Config(unique_first=2), completions, [0.0, 1.0])
    assert found == {"valid": 0.5, "entropy": 1.0}


def fake_reward(prompts, completions, **columns):
    return [float(len(text.split())) for text in completions]


def test_prompt_scores():
    rows = [{"item": "x", "prompt": "p"}, {"item": "y", "prompt": "q"}]
    outputs = [["a b c d e", "a b"], ["", ""]]
    first, second = prompt_scores(Config(task="keywords"), rows, outputs, fake_reward)
    assert first["reward"] == 3.5
    assert first["unique"] == 5
    assert first["valid"] == 0.5
    assert second == {"reward": 0.0, "unique": 0.0, "compression": 0.0, "valid": 0.0}


def test_a_sample_without_reward_names_the_item():
    with pytest.raises(UserError, match="item y: the reward gave no number for sample 1"):
        prompt_scores(
            Config(task="keywords"), [{"item": "y", "prompt": "p"}], [["a", "b"]], lambda *_, **__: [1.0, None]
        )


def test_keywords_write_scores_per_item_and_a_matched_reward(make_run):
    config = Config(task="keywords", test_prompts=4, samples_per_prompt=2, temperatures=[0.5, 2.0], matched_unique=5.0)
    run = make_run("eval")
    metrics = evaluate_prompts(config, run, FakeSampler(["a b c d e", "a b"]))
    assert metrics["reward_at_unique"] == metrics["reward"]
    rows = [json.loads(line) for line in (run.dir / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all({"reward", "unique_t0.5", "valid_t2"} <= row["scores"].keys() for row in rows)
    assert metrics["reward"] == np.mean([row["scores"]["reward"] for row in rows])


def test_matched_reward_interpolates_between_temperatures():
    curve = [(30.0, 0.8), (10.0, 0.9), (50.0, 0.2)]
    assert reward_at(curve, 30) == pytest.approx(0.8)
    assert reward_at(curve, 20) == pytest.approx(0.85)
    assert reward_at(curve, 45) == pytest.approx(0.35)
    with pytest.raises(UserError, match=r"between 10.0 and 50.0 .* matched_unique=60 is outside"):
        reward_at(curve, 60)
