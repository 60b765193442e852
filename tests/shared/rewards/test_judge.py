import pytest

from shared.experiments.errors import UserError
from shared.generation import Completion
from shared.generation.openai_backend import ServerError
from shared.rewards.judge import Judge, JudgeReward, read_score, read_yes_no

TEMPLATE = "Question: {prompt}\nReply: {completion}\nRate it from 0 to 10 as [[rating]]."


class Server:
    """A sampler: replies with what `reply` makes of the question; a whole batch fails if one of its questions does."""

    def __init__(self, reply):
        self.reply, self.batches = reply, []

    def sample(self, prompts, n=1, params=None):
        self.batches.append(prompts)
        replies = [self.reply(prompt if isinstance(prompt, str) else prompt[0]["content"]) for prompt in prompts]
        if None in replies:
            raise ServerError("timed out")
        return [[reply if isinstance(reply, Completion) else Completion(reply, [], None, "stop")] for reply in replies]


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
    server = Server(lambda question: replies[question.split("Reply: ")[1].split("\n")[0]])
    reward = JudgeReward(Judge(server, read_score(0, 10)), TEMPLATE)
    logged = {}
    assert reward(["p"] * 4, ["good", "odd", "long", ""], log_metric=logged.__setitem__) == [9, None, None, 0]
    assert reward.counts == {"rows": 4, "unparsable": 2, "truncated": 1, "failed": 0}
    assert logged == {"judge/unparsable": 0.5, "judge/truncated": 0.25, "judge/failed": 0}
    assert len(server.batches) == 1


def test_one_question_that_times_out_does_not_lose_the_others():
    reward = JudgeReward(Judge(Server(lambda q: None if "slow" in q else "[[5]]"), read_score(0, 10)), TEMPLATE)
    assert reward(["p"] * 4, ["a", "slow", "b", "slow"]) == [5, None, 5, None]
    assert reward.counts == {"rows": 4, "unparsable": 0, "truncated": 0, "failed": 2}


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_dead_server_is_an_error(n):
    server = Server(lambda question: None)
    with pytest.raises(ServerError, match="timed out"):
        Judge(server, read_score(0, 10)).ask([f"q{i}" for i in range(n)])
    assert len(server.batches) <= 1 + 3
    assert Judge(server, read_score(0, 10)).ask([]) == []


def test_the_question_shows_prompt_completion_and_columns():
    server = Server(lambda question: "[[1]]")
    reward = JudgeReward(Judge(server, read_score(0, 1)), "{prompt}|{completion}|{reference}")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{why}?"}]
    done = [{"role": "assistant", "content": "{because}"}]
    assert reward([chat, chat[1:]], [done, done], reference=["r0", "r1"], other=[0, 0]) == [1, 1]
    assert [question[0]["content"] for question in server.batches[0]] == [
        "system: Be brief.\n\nuser: {why}?|{because}|r0",
        "{why}?|{because}|r1",
    ]
    with pytest.raises(UserError, match="'reference'"):
        reward(["p"], ["a"])
    with pytest.raises(ValueError, match="completion"):
        JudgeReward(reward.judge, "rate {prompt}")
    with pytest.raises(ValueError, match="nan for row 0"):
        JudgeReward(Judge(server, lambda reply: float("nan")), TEMPLATE)(["p"], ["a"])
