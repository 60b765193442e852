import json

import pytest

from papers.semi_online import eval as evaluation
from papers.semi_online.config import Config
from papers.semi_online.eval import Asker, choose, increments, scores, training_log
from papers.semi_online.worlds import Rewards, task_rows
from shared.data.writing import gold_score
from shared.experiments import UserError, files
from tests.papers.semi_online.conftest import small_config


class Told:
    """An Asker that returns prepared answers by checkpoint."""

    by_gold = True

    def __init__(self, by_path: dict):
        self.by_path, self.asked = by_path, []

    def ask(self, path, task, rows, n, seed):
        self.asked.append((path, task, len(rows), n, seed))
        return self.by_path[path]


def answers(reward: float, length: float, gold: float = 0.0) -> dict:
    return {"rewards": [[reward, reward]], "lengths": [[length, length]], "gold": [[gold, gold]], "texts": [["", ""]]}


def test_math_checkpoints_are_chosen_by_development_accuracy(make_run):
    """The first of equals; the starting policy is not among them."""
    run, metrics = make_run(stage="eval"), {}
    told = Told({"start": answers(0.9, 7), "a": answers(0.4, 7), "b": answers(0.6, 7), "c": answers(0.6, 7)})
    found = choose(small_config(), run, told, {0: "start", 2: "a", 4: "b", 6: "c"}, metrics)
    assert (found, metrics) == ("b", {"best_step": 4})
    rows = files.read_jsonl(run.dir / "log.jsonl")
    assert [(row["policy_step"], row["dev_accuracy"]) for row in rows] == [(0, 0.9), (2, 0.4), (4, 0.6), (6, 0.6)]
    assert {call[1:] for call in told.asked} == {("math", 6, 2, evaluation.DEV_SEED)}


@pytest.mark.parametrize(("world", "best"), [("hub", ("a", 2)), ("generated", ("b", 4))])
def test_chat_checkpoints_are_chosen_by_reward_and_never_by_gold(make_run, monkeypatch, world, best):
    """On the hub by reward over length: 2 / 5 against 3 / 10."""
    monkeypatch.setattr(evaluation, "task_rows", lambda *args: [{}] * 2)
    told = {"start": answers(0, 9), "a": answers(2.0, 5), "b": answers(3.0, 10), "c": answers(1, 10, gold=9)}
    config, metrics = small_config(phases=["chat"], world=world), {}
    checkpoints = {0: "start", 2: "a", 4: "b", 6: "c"}
    found = choose(config, make_run(stage="eval"), Told(told), checkpoints, metrics)
    assert (found, metrics["best_step"]) == best


@pytest.mark.parametrize("options", [{"phases": ["both"]}, {"phases": ["chat", "math"]}, {"method": "none"}])
def test_arms_of_several_tasks_keep_their_last_checkpoint(make_run, options):
    told = Told({"start": answers(0.5, 7), "a": answers(1, 7)})
    metrics: dict[str, float] = {}
    assert choose(small_config(**options), make_run(stage="eval"), told, {0: "start", 2: "a"}, metrics) is None
    assert metrics == {}


def test_scores_by_hand():
    math = {"task": "math"}
    found = {"rewards": [[1.0, 0.0, 0.0, 1.0]], "lengths": [[7, 7, 5, 9]]}
    assert scores(math, found, None, 0, True) == {"accuracy": 0.5, "length": 7}
    assert scores({"task": "math", "metric": "accuracy_amc23"}, found, None, 0, True).keys() == {
        "accuracy_amc23",
        "length",
    }
    chat = {"rewards": [[3.0, 1.0]], "lengths": [[4, 8]], "gold": [[0.1, 0.7]]}
    base = {"rewards": [[1.0, 1.0]], "lengths": [[4, 8]], "gold": [[0.5, 0.7]]}
    by_gold = scores({"task": "chat"}, chat, base, 0, by_gold=True)
    assert by_gold == pytest.approx({"reward": 2, "win_rate": 0.25, "chat_length": 6, "gold": 0.4})
    by_model = scores({"task": "chat"}, {k: v for k, v in chat.items() if k != "gold"}, base, 0, by_gold=False)
    assert by_model == pytest.approx({"reward": 2, "win_rate": 0.75, "chat_length": 6})


def test_the_asker_scores_what_it_sampled(make_run):
    from papers.semi_online.worlds import starting_points

    config = small_config()
    policy, reward_model = starting_points(config, make_run())
    asker = Asker(config, Rewards(config, reward_model))
    for task in ("math", "chat"):
        rows = task_rows(config, task, "test", 5)
        found = asker.ask(policy, task, rows, 3, seed=1)
        assert found == asker.ask(policy, task, rows, 3, seed=1)
        assert found != asker.ask(policy, task, rows, 3, seed=2)
        for row, texts, rewards, lengths in zip(rows, found["texts"], found["rewards"], found["lengths"], strict=True):
            assert len(texts) == len(rewards) == len(lengths) == 3
            for text, reward, length in zip(texts, rewards, lengths, strict=True):
                assert len(text.split()) <= length <= config.math.max_new_tokens
                if task == "math":
                    assert reward == (text.split()[-2:] == ["ANS", row["answer"]] and len(text.split()) <= 4)
        if task == "chat":
            expected = [
                [gold_score(row["keywords"], t) for t in of] for row, of in zip(rows, found["texts"], strict=True)
            ]
            assert found["gold"] == expected


def test_an_unparsable_gold_answer_counts_as_wrong():
    class Nothing:
        def sample(self, *args, **kwargs):
            from shared.generation import Completion

            return [[Completion("x", [5], [0.0], "stop")]]

    asker = Asker(Config(), lambda prompts, completions, **columns: [None])
    asker._sampler = lambda path: Nothing()
    assert asker.ask("p", "math", [{"prompt": "1 =", "task": "math", "answer": "?"}], 1, 0)["rewards"] == [[0.0]]


def test_counters_that_begin_again_are_added_up():
    assert increments([]) == 0
    assert increments([1, 3, 3, 7]) == 7
    assert increments([1, 3, 2, 4]) == 3 + 2 + 2  # killed after 3, went on from 0


@pytest.mark.parametrize("names", [("rollout/entropy", "rollout/length"), ("entropy", "completions/mean_length")])
def test_entropy_and_length_at_both_ends_of_training(make_run, names):
    run = make_run(stage="eval")
    rows = [{"stage": "train", "step": t, "loss": 0, names[0]: 2 - t / 100, names[1]: 7.0} for t in range(100)]
    rows += [{"stage": "train", "step": 100, "train_loss": 0.1}]
    (run.dir / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = training_log(run)
    assert found["rollout_entropy_start"] == pytest.approx(2 - 0.02)  # steps 0 .. 4
    assert found["rollout_entropy_end"] == pytest.approx(2 - 0.945)  # steps 90 .. 99
    assert found["rollout_entropy_ratio"] == pytest.approx(1.055 / 1.98)
    assert found["rollout_length_ratio"] == 1
    assert "generator_calls" not in found


def test_without_a_checkpoint_it_says_what_to_do(make_run):
    with pytest.raises(UserError, match="no checkpoint; run papers"):
        evaluation.evaluate(small_config(), make_run(stage="eval"))
