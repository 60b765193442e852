import re

import pytest

from papers.semi_online import eval as evaluation
from papers.semi_online.judge import judged_wins, read_choice
from shared.generation import Completion
from shared.rewards.judge import Judge


class Referee:
    """A sampler that prefers, by `choose(A, B)`, one of the answers in a question."""

    def __init__(self, choose):
        self.choose, self.asked = choose, []

    def sample(self, questions, params):
        self.asked += [messages[0]["content"] for messages in questions]
        found = [re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nExplain", question) for question in self.asked]
        replies = [self.choose(*match.groups()) for match in found[-len(questions) :]]
        return [[Completion(reply, [1], None, "stop")] for reply in replies]


def longest(a: str, b: str) -> str:
    return "Hm. [[A]]" if len(a) > len(b) else "Well, [[B]]" if len(b) > len(a) else "[[Tie]]"


def test_each_pair_is_judged_in_both_orders():
    referee = Referee(longest)
    judge = Judge(referee, read_choice)
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(4)]
    wins = judged_wins(judge, prompts, ["long", "s", "same", "four"], ["x", "longer", "same", "five"])
    assert wins == [1.0, 0.0, 0.5, 0.5]
    assert len(referee.asked) == 6  # of equal texts nobody is asked
    assert "question 0" in referee.asked[0]
    assert judge.counts["rows"] == 6


def test_a_judge_that_only_sees_the_place_decides_nothing():
    judge = Judge(Referee(lambda a, b: "[[A]]"), read_choice)
    assert judged_wins(judge, ["p", "q"], ["a", "b"], ["c", "d"]) == [0.5, 0.5]


def test_without_a_verdict_there_is_no_win_and_no_loss():
    judge = Judge(Referee(lambda a, b: "[[A]]" if a == "a" else "I like both"), read_choice)
    assert judged_wins(judge, ["p", "q"], ["a", "b"], ["c", "d"]) == [None, None]
    assert judge.counts["unparsable"] == 3
    assert judged_wins(judge, ["p"], ["a"], ["a"]) == [0.5]


def test_choices_that_are_read():
    assert [read_choice(f"so [[{c}]]") for c in ("A", "b", "tie", "C")] == [1.0, 0.0, 0.5, None]
    assert read_choice("A") is None


@pytest.mark.parametrize("arm", ["base", "chat_s1"])
def test_the_judges_verdicts_are_among_the_results(arm, llama_chat, reward_checkpoint, sources, make_run, monkeypatch):
    from papers.semi_online import train
    from papers.semi_online.config import Config
    from shared.experiments import files
    from shared.experiments.paper import load_paper
    from shared.experiments.run import resolve_config

    small = [f"hub.model={llama_chat}", f"hub.reward_model={reward_checkpoint}", "use_vllm=false", "judge_model=judge"]
    small += ["n_dev=2", "n_test=3", "test_samples=2", "save_every=1", "num_generations=4", "all_tasks=false"]
    small += [
        "both.n_train=9",
        "chat.n_train=4",
        "chat.steps=2",
        "chat.prompts=2",
        "chat.max_new_tokens=8",
        "chat.lr=0.03",
    ]
    small += [f"hub.sources.{name}={path}" for name, path in sources.items()]
    if arm == "base":
        small.append("phases=[chat]")
    config = resolve_config(load_paper("semi_online"), Config, "paper", arm, small)
    judge = Judge(Referee(longest), read_choice)
    monkeypatch.setattr(evaluation, "load_judge", lambda config: judge)
    train.train(config, make_run(arm))
    run = make_run(arm, stage="eval")
    metrics = evaluation.evaluate(config, run)
    assert metrics["judge_unparsable"] == metrics["judge_failed"] == 0
    for row in files.read_jsonl(run.dir / "predictions.jsonl"):
        if arm == "base":
            assert row["scores"]["judge_win_rate"] == row["scores"]["judge_win_rate_last"] == 0.5
        assert row["scores"]["judge_win_rate_last"] in (0, 0.5, 1)
    assert metrics["judge_win_rate"] == pytest.approx(metrics["judge_win_rate_last"], abs=1)
    assert (metrics["judge_rows"] > 0) == (arm != "base")
