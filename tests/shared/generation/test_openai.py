"""The client against a real HTTP server on this machine, scripted by each test."""

import socket
import threading
import time

import numpy as np
import pytest

from shared.generation import Completion, SamplingParams, load_sampler, openai_backend
from shared.generation.openai_backend import ServerError
from tests.openai_server import Server, completions, in_turn

CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(openai_backend, "FIRST_WAIT", 0.001)
    server = Server()
    server.answer = lambda path, body: (200, {}, completions(*[f"text {i}" for i in range(body["n"])]))
    yield server
    server.close()


def test_text_goes_to_completions(server):
    params = SamplingParams(max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=3, stop=("\n",), seed=5)
    rows = load_sampler("openai", "some-model", base_url=server.url).sample(["2 + 2 ="], 2, params)
    assert rows == [[Completion("text 0", [], None, "stop"), Completion("text 1", [], None, "stop")]]
    [(path, body)] = server.requests
    seed = body.pop("seed")
    assert isinstance(seed, int)
    assert 0 <= seed < 2**31
    assert path == "/v1/completions"
    assert body == {
        "model": "some-model",
        "prompt": "2 + 2 =",
        "n": 2,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop": ["\n"],
    }
    assert "Authorization" not in server.headers[0]


def test_token_ids_go_to_completions(server):
    load_sampler("openai", "m", base_url=server.url).sample([(5, 6)])
    [(path, body)] = server.requests
    assert path == "/v1/completions"
    assert body["prompt"] == [5, 6]
    assert not {"stop", "top_k", "logprobs"} & set(body)


def test_messages_go_to_chat_completions(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", " secret\n")
    choice = {"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "length"}
    logprobs = {"content": [{"token": "4", "logprob": -0.25}]}
    server.answer = in_turn((200, {}, {"choices": [choice | {"logprobs": logprobs}]}))
    sampler = load_sampler(
        "openai", "m", base_url=server.url + "/", api_key_env="MY_KEY", max_tokens_field="max_completion_tokens"
    )
    rows = sampler.sample([CHAT], params=SamplingParams(max_new_tokens=9, logprobs=True))
    assert rows == [[Completion("4", [], [-0.25], "length")]]
    [(path, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert body["messages"] == CHAT
    assert body["logprobs"] is True
    assert body["max_completion_tokens"] == 9
    assert "max_tokens" not in body
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_logprobs_of_completions(server):
    choice = {"index": 0, "text": "a b", "finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0, -2]}}
    server.answer = in_turn((200, {}, {"choices": [choice]}))
    sampler = load_sampler("openai", "m", base_url=server.url)
    assert sampler.sample(["a"], params=SamplingParams(logprobs=True))[0][0].logprobs == [-1.0, -2.0]
    assert sampler.sample(["a"])[0][0].logprobs is None
    server.answer = in_turn((200, {}, completions("a b")))
    assert sampler.sample(["a"], params=SamplingParams(logprobs=True))[0][0].logprobs is None


def test_a_refusal_without_content_is_an_empty_text(server):
    choice = {"index": 0, "message": {"content": None, "refusal": "no"}, "finish_reason": "content_filter"}
    server.answer = in_turn((200, {}, {"choices": [choice]}))
    rows = load_sampler("openai", "m", base_url=server.url).sample([CHAT])
    assert rows == [[Completion("", [], None, "content_filter")]]


def test_the_order_is_that_of_the_prompts_and_concurrency_is_limited(server):
    three = threading.Barrier(3)

    def answer(path, body):
        three.wait(30)  # breaks unless three requests are under way
        time.sleep(0.01 * (9 - int(body["prompt"])))  # the first takes longest
        return 200, {}, completions(f"to {body['prompt']}")

    server.answer = answer
    sampler = load_sampler("openai", "m", base_url=server.url, max_concurrency=3)
    rows = sampler.sample([str(i) for i in range(9)])
    assert [row[0].text for row in rows] == [f"to {i}" for i in range(9)]
    assert server.most_at_once == 3


def test_seeds_follow_the_interface(server):
    sampler = load_sampler("openai", "m", base_url=server.url, max_concurrency=1)
    sampler.sample(["a", "b", "a"])
    sampler.sample(["b"])
    sampler.sample(["b"], params=SamplingParams(seed=1))
    a, b, second_a, again_b, other_b = (body["seed"] for _, body in server.requests)
    assert b == again_b
    assert len({a, b, second_a, other_b}) == 4


def test_a_server_that_ignores_n_is_asked_again(server):
    server.answer = in_turn(*[(200, {}, completions(f"answer {i}")) for i in range(3)])
    rows = load_sampler("openai", "m", base_url=server.url).sample(["a"], 3)
    assert [c.text for c in rows[0]] == ["answer 0", "answer 1", "answer 2"]
    assert [body["n"] for _, body in server.requests] == [3, 2, 1]
    assert len({body["seed"] for _, body in server.requests}) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(server, status):
    busy = (status, {}, {"error": "busy"})
    server.answer = in_turn(busy, busy, (200, {}, completions("done")))
    assert load_sampler("openai", "m", base_url=server.url).sample(["a"])[0][0].text == "done"
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


def test_waits_grow_and_obey_the_server(server, monkeypatch):
    waits = []
    real_sleep = openai_backend.asyncio.sleep

    async def sleep(seconds):
        waits.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr(openai_backend.asyncio, "sleep", sleep)
    monkeypatch.setattr(openai_backend, "FIRST_WAIT", 1.0)
    busy = [(429, headers, {}) for headers in ({}, {}, {"Retry-After": 7}, {"Retry-After": "Fri, 01 Jan"}, {}, {}, {})]
    server.answer = in_turn(*busy, (200, {}, completions("done")))
    load_sampler("openai", "m", base_url=server.url, max_retries=7).sample(["a"])
    assert waits[2] == 7
    for attempt in (0, 1, 3, 4, 5, 6):
        assert min(0.5 * 2**attempt, 60) <= waits[attempt] <= min(2**attempt, 60)


def test_a_server_that_stays_busy(server):
    server.answer = in_turn((503, {}, b"<html>\n  down\n</html>"))
    sampler = load_sampler("openai", "m", base_url=server.url, max_retries=2)
    with pytest.raises(RuntimeError, match=r"prompt 0: http.*/v1/completions failed 3 times, .* HTTP 503: <html> down"):
        sampler.sample(["a"])
    assert len(server.requests) == 3


def test_no_answer_in_time(server):
    answered = threading.Event()
    server.answer = lambda path, body: answered.wait(30) and (200, {}, completions("late"))
    sampler = load_sampler("openai", "m", base_url=server.url, timeout=0.1, max_retries=1)
    with pytest.raises(
        RuntimeError, match=r"failed 2 times, the last time with no answer within 0\.1 s \(ReadTimeout\)"
    ):
        sampler.sample(["a"])
    answered.set()
    assert len(server.requests) == 2


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        sampler = load_sampler("openai", "m", base_url=url, max_retries=0)
        with pytest.raises(
            RuntimeError, match=r"prompt 0: http://127.* failed 1 times, the last time with ConnectError"
        ):
            sampler.sample(["a"])


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (400, "too long"),
        (401, "is the environment variable OPENAI_API_KEY set"),
        (404, "is http://.*/v1 right, and has it the model 'm'"),
    ],
)
def test_refusals_are_final(server, monkeypatch, status, hint):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answer = in_turn((status, {}, {"error": {"message": "too long"}}))
    message = f"prompt 0: http.*/v1/completions refused the request with HTTP {status}: .*{hint}"
    with pytest.raises(RuntimeError, match=message) as error:
        load_sampler("openai", "m", base_url=server.url).sample(["a"])
    assert "secret" not in str(error.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"not json",
        [],
        {},
        {"choices": None},
        {"choices": []},
        {"choices": [{"index": 0, "finish_reason": "stop"}]},
        {"choices": [{"index": 0, "text": 3, "finish_reason": "stop"}]},
        {"choices": [{"index": 0, "text": "a", "finish_reason": None}]},
        {"choices": [{"index": 0, "message": None, "finish_reason": "stop"}]},
        {"choices": [{"index": 0, "text": "a", "finish_reason": "stop", "logprobs": {"token_logprobs": [None]}}]},
    ],
)
def test_malformed_answers(server, content):
    server.answer = in_turn((200, {}, content))
    with pytest.raises(RuntimeError, match=r"prompt 0: http.*/v1/completions answered with"):
        load_sampler("openai", "m", base_url=server.url).sample(["a"], params=SamplingParams(logprobs=True))
    assert len(server.requests) == 1


def test_a_failure_ends_the_other_requests(server):
    finished = threading.Event()

    def answer(path, body):
        if body["prompt"] == "bad":
            return 400, {}, {"error": "bad prompt"}
        finished.wait(30)
        return 200, {}, completions("late")

    server.answer = answer
    with pytest.raises(RuntimeError, match=r"prompt 2: .*bad prompt"):
        load_sampler("openai", "m", base_url=server.url, timeout=60).sample(["a", "b", "bad", "c"])
    assert not finished.is_set()
    finished.set()


def test_wrong_arguments(server):
    sampler = load_sampler("openai", "m", base_url=server.url)
    assert sampler.sample([]) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler.sample(["a", ""])
    assert server.requests == []
    with pytest.raises(TypeError, match="the model's name at the server"):
        load_sampler("openai", object())
    with pytest.raises(ValueError, match="must be positive"):
        load_sampler("openai", "m", max_concurrency=0)
    with pytest.raises(ValueError, match="base_url must begin with http"):
        load_sampler("openai", "m", base_url="localhost:8000/v1")


def test_where_the_server_is(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert load_sampler("openai", "m").base_url == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert load_sampler("openai", "m").base_url == "http://127.0.0.1:1/v1"


BAD = 400, {}, {"error": "too long for me"}
DOWN = 503, {}, {"error": "down"}


def by_prompt(**answers):
    """An `answer` by the prompt's first word; others are answered with the prompt."""

    def answer(path, body):
        return answers.get(body["prompt"].split()[0], (200, {}, completions(body["prompt"])))

    return answer


def test_sample_each_keeps_what_the_server_answered(server):
    server.answer = by_prompt(bad=BAD, down=DOWN)
    sampler = load_sampler("openai", "m", base_url=server.url, max_retries=1)
    prompts = ["a", "bad 1", "b", "down", "bad 2", "bad 3", "bad 4", "c"]
    rows = sampler.sample_each(prompts)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        if " " in prompt or prompt == "down":
            assert isinstance(row, ServerError)
            assert str(row).startswith(f"prompt {i}: http")
            assert (row.status, row.refused) == ((400, True) if " " in prompt else (None, False))
        else:
            assert [c.text for c in row] == [prompt]
    asked = [body["prompt"] for _, body in server.requests]
    assert sorted(asked) == sorted([*prompts, "down"])  # nothing is asked again but what may be answered then
    assert sampler.sample_each([]) == []


@pytest.mark.parametrize(("status", "requests"), [(401, 1), (404, 1), (503, 3)])
def test_sample_each_gives_up_a_server_that_answers_nothing(server, status, requests):
    server.answer = in_turn((status, {}, {"error": "?"}))
    sampler = load_sampler("openai", "m", base_url=server.url, max_retries=0, max_concurrency=1)
    with pytest.raises(ServerError, match=f"HTTP {status}"):
        sampler.sample_each([f"p{i}" for i in range(9)])
    assert len(server.requests) == requests


def test_sample_each_raises_where_every_prompt_is_refused(server):
    server.answer = in_turn(BAD)
    with pytest.raises(ServerError, match=r"prompt 0: .*too long for me"):
        load_sampler("openai", "m", base_url=server.url).sample_each(["a", "b", "c", "d"])
    assert len(server.requests) == 4


def test_sample_each_gives_up_where_the_server_dies_on_the_way(server):
    """An answer in between begins the count anew."""
    server.answer = by_prompt(down=DOWN)
    sampler = load_sampler("openai", "m", base_url=server.url, max_retries=0, max_concurrency=1)
    rows = sampler.sample_each(["down", "down", "a", "down", "down", "b"])
    assert [isinstance(row, ServerError) for row in rows] == [True, True, False, True, True, False]
    with pytest.raises(ServerError, match="prompt 3"):
        sampler.sample_each(["a", "down", "down", "down", "b"])
    assert len(server.requests) == 6 + 4


def test_token_ids_may_be_numpys(server):
    sampler = load_sampler("openai", "m", base_url=server.url)
    sampler.sample([list(np.array([5, 6]))])
    sampler.sample([[5, 6]])
    assert server.requests[0] == server.requests[1]
