import json

import pytest

from shared.experiments.errors import UserError
from shared.rewards.format import JSONReward, LengthReward

KEYS = ("first_name", "city", "occupation")
PERSONA = {"first_name": "Åsa", "city": "東京", "occupation": "nurse"}


def score(text, reward=None):
    (value,) = (reward or JSONReward(KEYS))(["p"], [text])
    return value


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(PERSONA),
        json.dumps(PERSONA, ensure_ascii=False),
        "\n" + json.dumps(dict(reversed(PERSONA.items())), indent=2) + " ",
        json.dumps(PERSONA | {"age": 3}),
    ],
)
def test_valid_personas(text):
    assert score(text) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no idea",
        json.dumps(PERSONA)[:-1],  # truncated
        json.dumps(PERSONA)[:40],
        f"```json\n{json.dumps(PERSONA)}\n```",
        "Here: " + json.dumps(PERSONA),
        json.dumps([PERSONA]),
        json.dumps({k: PERSONA[k] for k in KEYS[:2]}),
        json.dumps(PERSONA | {"city": " "}),
        json.dumps(PERSONA | {"city": 7}),
        json.dumps(PERSONA | {"city": None}),
        json.dumps(PERSONA | {"age": float("nan")}),
        '{"city": "Rome", ' + json.dumps(PERSONA)[1:],  # city twice
        "[" * 100_000,
        str(PERSONA),  # Python's quotes
    ],
)
def test_invalid_personas(text):
    assert score(text) == 0


def test_completions_of_chat():
    messages = [{"role": "assistant", "content": json.dumps(PERSONA)}]
    assert JSONReward(KEYS)([[{}]] * 2, [messages, [{"role": "assistant", "content": None}]]) == [1, 0]
    with pytest.raises(TypeError, match="row 1"):
        JSONReward(KEYS)(["p", "p"], ["a", []])
    with pytest.raises(TypeError, match="row 0"):
        JSONReward(KEYS)(["p"], [None])
    with pytest.raises(ValueError, match="keys"):
        JSONReward("city")


def test_length_in_words():
    reward = LengthReward(5, 5)
    texts = ["a b c d e", "  a b\nc d  e ", "a b c d", "a b c d e f", "", "été sol mer île où"]
    assert reward(["p"] * 6, texts) == [1, 1, 0, 0, 0, 1]
    assert LengthReward(0, 2)(["p"] * 3, ["", "a b", "a b c"]) == [1, 1, 0]


def test_length_in_tokens():
    reward = LengthReward(1, 3, "tokens")
    assert reward(["p"] * 3, ["a", "b", "c"], completion_ids=[[1], [1, 2, 3, 4], []]) == [1, 0, 0]
    with pytest.raises(UserError, match=r"'completion_ids'.*dataset has: answer"):
        reward(["p"], ["a"], answer=["1"])
    with pytest.raises(ValueError, match="2 rows for 1 completions"):
        reward(["p"], ["a"], completion_ids=[[1], [2]])


def test_length_refuses_impossible_limits():
    with pytest.raises(ValueError, match="least=3, most=2"):
        LengthReward(3, 2)
    with pytest.raises(ValueError, match="characters"):
        LengthReward(1, 2, "characters")
