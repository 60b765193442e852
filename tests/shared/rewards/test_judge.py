import threading

import pytest

from shared.experiments.errors import UserError
from shared.generation import Completion, load_sampler, openai_backend
from shared.generation.openai_backend import ServerError
from shared.rewards.judge import Judge, JudgeReward, read_score, read_yes_no
from tests.openai_server import Server

TEMPLATE = "Question: {prompt}\nReply: {completion}\nRate it from 0 to 10 as [[rating]]."


class Model:
    """A sampler that is no server: replies with what `reply` makes of the question."""

    def __init__(self, reply):
        self.reply, self.batches = reply, []

    def sample(self, prompts, n=1, params=None):
        self.batches.append(prompts)
        replies = [self.reply(prompt if isinstance(prompt, str) else prompt[0]["content"]) for prompt in prompts]
        return [[reply if isinstance(reply, Completion) else Completion(reply, [], None, "stop")] for reply in replies]


@pytest.fixture
def server(monkeypatch):
    """Rates each completion by its first word: with that number of the scale, or it does what the word says."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(openai_backend, "FIRST_WAIT", 0.001)

    def answer(path, body):
        assert path == "/v1/chat/completions"
        word = body["messages"][0]["content"].split("Reply: ")[1].split()[0]
        if word == "hang":
            hanging.wait(30)
        status = {"hang": 200, "down": 503, "refuse": 400, "key": 401}.get(word, 200)
        message = {"content": word if word == "nonsense" else f"Well. [[{word}]]"}
        return status, {}, {"choices": [{"message": message, "finish_reason": "stop"}]}

    hanging = threading.Event()
    server = Server()
    server.answer = answer
    yield server
    hanging.set()
    server.close()


@pytest.fixture
def judge(server):
    return Judge(load_sampler("openai", "m", base_url=server.url, timeout=0.3, max_retries=1), read_score(0, 10))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Clear and true. [[7]]", 7),
        ("Not [[2]]; on reflection [[ 8.5 ]]", 8.5),
        ("好 [[10]]", 10),
        ("[[11]]", None),
        ("[[-1]]", None),
        ("[[nan]]", None),
        ("[[inf]]", None),
        ("[[seven]]", None),
        ("[[7]", None),
        ("7", None),
        ("", None),
    ],
)
def test_read_score(reply, score):
    assert read_score(0, 10)(reply) == score


def test_read_yes_no():
    assert [read_yes_no(r) for r in ("so [[Yes]]", "[[no]]", "[[maybe]]", "yes")] == [True, False, None, None]


def test_scores_and_failures_are_told_apart_and_counted():
    replies = {
        "good": "[[9]]",
        "odd": "as a language model",
        "long": Completion("let me think", [], None, "length"),
        "": "[[0]]",
    }
    model = Model(lambda question: replies[question.split("Reply: ")[1].split("\n")[0]])
    reward = JudgeReward(Judge(model, read_score(0, 10)), TEMPLATE)
    logged = {}
    assert reward(["p"] * 4, ["good", "odd", "long", ""], log_metric=logged.__setitem__) == [9, None, None, 0]
    assert reward.counts == {"rows": 4, "unparsable": 2, "truncated": 1, "failed": 0}
    assert logged == {"judge/unparsable": 0.5, "judge/truncated": 0.25, "judge/failed": 0}
    assert len(model.batches) == 1


def test_a_server_that_fails_on_some_questions_does_not_lose_the_others(server, judge):
    logged = {}
    reward = JudgeReward(judge, TEMPLATE)
    texts = ["3", "hang", "nonsense", "10", "refuse", "11", "7"]
    with pytest.warns(UserWarning, match="did not answer") as warned:
        found = reward(["p"] * 7, texts, log_metric=logged.__setitem__)
    assert found == [3, None, None, 10, None, None, 7]
    assert reward.counts == {"rows": 7, "unparsable": 2, "truncated": 0, "failed": 2}
    assert logged == {"judge/failed": 2 / 7, "judge/truncated": 0, "judge/unparsable": 2 / 7}
    reasons = sorted(str(warning.message) for warning in warned)
    assert "did not answer: prompt 1: " in reasons[0]
    assert "no answer within 0.3 s" in reasons[0]
    assert "did not answer: prompt 4: " in reasons[1]
    assert "HTTP 400" in reasons[1]
    assert len(server.requests) == 7 + 1  # only the question that timed out was asked twice


@pytest.mark.parametrize("texts", [["down"], ["hang"], ["down"] * 9, ["refuse", "refuse"], ["5", "key", "5"]])
def test_a_dead_server_is_an_error(judge, texts):
    with pytest.raises(ServerError, match="prompt"):
        JudgeReward(judge, TEMPLATE)(["p"] * len(texts), texts)


def test_no_questions(judge):
    assert judge.ask([]) == []
    assert Judge(Model(lambda question: ""), read_score(0, 1)).ask([]) == []


def test_the_question_shows_prompt_completion_and_columns():
    model = Model(lambda question: "[[1]]")
    reward = JudgeReward(Judge(model, read_score(0, 1)), "{prompt}|{completion}|{reference}")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{why}?"}]
    done = [{"role": "assistant", "content": "{because}"}]
    assert reward([chat, chat[1:]], [done, done], reference=["r0", "r1"], other=[0, 0]) == [1, 1]
    assert [question[0]["content"] for question in model.batches[0]] == [
        "system: Be brief.\n\nuser: {why}?|{because}|r0",
        "{why}?|{because}|r1",
    ]
    with pytest.raises(UserError, match="'reference'"):
        reward(["p"], ["a"])
    with pytest.raises(ValueError, match="completion"):
        JudgeReward(reward.judge, "rate {prompt}")
    with pytest.raises(ValueError, match="nan for row 0"):
        JudgeReward(Judge(model, lambda reply: float("nan")), TEMPLATE)(["p"], ["a"])
