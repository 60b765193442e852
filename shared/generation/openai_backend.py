"""Sampling from a server that speaks OpenAI's HTTP protocol: OpenAI itself, `vllm serve`, llama.cpp and many others."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence

import httpx

from shared.experiments.errors import UserError
from shared.generation import DEFAULT_PARAMS, Completion, Prompt, SamplingParams
from shared.generation.text import check_prompts, is_chat, seeds_of_rows

RETRIED_STATUS = {408, 409, 429, 500, 502, 503, 504, 529}
HOPELESS_STATUS = {401, 403, 404}  # the key, the address or the model's name is wrong, whatever the prompt
FAILURES_IN_A_ROW = 3  # prompts, after which `sample_each` takes the server for dead
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between attempts; doubled each time


class OpenAISampler:
    """The `Sampler` that asks a server.

    Chat messages go to the server's /chat/completions, plain text and token ids to its /completions. The server
    tokenizes, so `Completion.token_ids` is empty, and how far a seed fixes the samples is up to the server.

    model: the model's name at the server.
    base_url: where the server's endpoints begin, such as "http://127.0.0.1:8000/v1"; by default OPENAI_BASE_URL from
        the environment, else OpenAI's own.
    api_key_env: environment variable with the API key; if it is not set, none is sent.
    max_concurrency: most requests under way at a time.
    timeout: seconds to wait for an answer.
    max_retries: how often to repeat a request after a timeout, a failed connection, or an answer that says that the
        server is busy or broken (429, 5xx); the waits in between double from a second to a minute, or are what the
        server asks for.
    max_tokens_field: what the server calls SamplingParams.max_new_tokens; OpenAI's reasoning models want
        "max_completion_tokens".
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 16,
        timeout: float = 300.0,
        max_retries: int = 6,
        max_tokens_field: str = "max_tokens",
    ):
        if not isinstance(model, str):
            raise TypeError(f"model must be the model's name at the server, not a {type(model).__name__}")
        if max_concurrency < 1 or max_retries < 0 or timeout <= 0:
            raise ValueError(
                "max_concurrency and timeout must be positive and max_retries not negative, "
                f"not {max_concurrency}, {timeout} and {max_retries}"
            )
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, not be {base_url!r}")
        self.model = model
        self.base_url = base_url.rstrip("/")
        self.api_key_env = api_key_env
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.max_tokens_field = max_tokens_field
        self._random = random.Random()  # for the waits: the global one belongs to the experiment

    def sample(
        self, prompts: Sequence[Prompt], n: int = 1, params: SamplingParams = DEFAULT_PARAMS
    ) -> list[list[Completion]]:
        """See `Sampler.sample`. Raises ServerError, naming prompt, endpoint and status, when the server fails."""
        check_prompts(prompts, n)
        return asyncio.run(self._sample_all(prompts, n, params, stop_at=lambda error: True))

    def sample_each(
        self, prompts: Sequence[Prompt], n: int = 1, params: SamplingParams = DEFAULT_PARAMS
    ) -> list[list[Completion] | ServerError]:
        """As `sample`, but a prompt that the server refuses or fails on has its error in its place, and the others
        their completions.

        Raises ServerError if the server wants another key, address or model, fails on three prompts in a row, or
        answers none: a dead server is not one with a few bad prompts.
        """
        check_prompts(prompts, n)
        in_a_row = 0

        def is_dead(error: ServerError | None) -> bool:
            nonlocal in_a_row
            in_a_row = in_a_row + 1 if error is not None and not error.refused else 0
            return in_a_row == FAILURES_IN_A_ROW or (error is not None and error.status in HOPELESS_STATUS)

        found = asyncio.run(self._sample_all(prompts, n, params, stop_at=is_dead))
        if found and all(isinstance(each, ServerError) for each in found):
            raise found[0]
        return found

    def close(self) -> None:
        """Nothing to do: connections live as long as a call of `sample`."""

    def __enter__(self) -> OpenAISampler:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    async def _sample_all(
        self,
        prompts: Sequence[Prompt],
        n: int,
        params: SamplingParams,
        stop_at: Callable[[ServerError | None], bool],
    ) -> list[list[Completion] | ServerError]:
        """stop_at: is told how each prompt ended (None: well); True ends all requests and raises the error."""
        key = os.environ.get(self.api_key_env, "").strip()
        client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self.timeout, connect=min(self.timeout, 10.0)),
            limits=httpx.Limits(),  # none: `slots` is the limit
        )
        slots = asyncio.Semaphore(self.max_concurrency)

        async def sample_one(index: int, prompt: Prompt, seeds: list[int]) -> list[Completion] | ServerError:
            async with slots:
                try:
                    completions = await self._sample(client, prompt, seeds, params)
                except ServerError as error:
                    named = ServerError(f"prompt {index}: {error}", error.status)
                    if stop_at(named):
                        raise named from error
                    return named
            stop_at(None)
            return completions

        seeds = seeds_of_rows(prompts, n, params.seed)
        try:
            async with client, asyncio.TaskGroup() as group:  # what one of them raises cancels the others
                tasks = [
                    group.create_task(sample_one(i, p, s)) for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _sample(
        self, client: httpx.AsyncClient, prompt: Prompt, seeds: list[int], params: SamplingParams
    ) -> list[Completion]:
        """One completion for each seed. Servers that ignore "n" are asked again for what is missing."""
        endpoint = f"{self.base_url}/{'chat/completions' if is_chat(prompt) else 'completions'}"
        completions: list[Completion] = []
        while len(completions) < len(seeds):
            missing = len(seeds) - len(completions)
            body = self._request(prompt, missing, seeds[len(completions)], params)
            response = await self._post(client, endpoint, body)
            completions += _read_completions(endpoint, response, params.logprobs)[:missing]
        return completions

    def _request(self, prompt: Prompt, n: int, seed: int, params: SamplingParams) -> dict:
        body = {
            "model": self.model,
            "n": n,
            self.max_tokens_field: params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": seed >> 32,  # servers differ in how large a seed may be; 31 bits suit all
        }
        if params.top_k:
            body["top_k"] = params.top_k  # not in OpenAI's own protocol, but in that of most servers
        if params.stop:
            body["stop"] = list(params.stop)
        if is_chat(prompt):
            return body | {"messages": list(prompt)} | ({"logprobs": True} if params.logprobs else {})
        prompt = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
        return body | {"prompt": prompt} | ({"logprobs": 1} if params.logprobs else {})

    async def _post(self, client: httpx.AsyncClient, endpoint: str, body: dict) -> httpx.Response:
        """The server's answer with status 200, after as many attempts as it takes and is allowed."""
        for attempt in range(self.max_retries + 1):
            asked_wait = None
            try:
                response = await client.post(endpoint, json=body)
            except httpx.TimeoutException as error:
                problem = f"no answer within {self.timeout:g} s ({type(error).__name__})"
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return response
                problem = f"HTTP {response.status_code}: {_shortened(response.text)}"
                if response.status_code not in RETRIED_STATUS:
                    raise ServerError(
                        f"{endpoint} refused the request with {problem}{self._hint(response.status_code)}",
                        response.status_code,
                    )
                asked_wait = _seconds(response.headers.get("Retry-After"))
            if attempt < self.max_retries:
                wait = FIRST_WAIT * 2**attempt * self._random.uniform(0.5, 1)
                await asyncio.sleep(min(wait if asked_wait is None else asked_wait, LONGEST_WAIT))
        raise ServerError(f"{endpoint} failed {self.max_retries + 1} times, the last time with {problem}")

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            return f" (is the environment variable {self.api_key_env} set to a valid key?)"
        if status == 404:
            return (
                f" (is {self.base_url} right, and has it the model {self.model!r}? Chat messages need its "
                "/chat/completions, plain text and token ids its /completions)"
            )
        return ""


class ServerError(UserError, RuntimeError):
    """The server did not answer as it should.

    status: the HTTP status with which it refused the request for good; None if it failed otherwise.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status

    @property
    def refused(self) -> bool:
        return self.status is not None


def _read_completions(endpoint: str, response: httpx.Response, logprobs: bool) -> list[Completion]:
    try:
        choices = response.json()["choices"]
        completions = [_read_choice(choice, logprobs) for choice in choices]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(
            f"{endpoint} answered with something other than completions: {_shortened(response.text)}"
        ) from error
    if not completions:
        raise ServerError(f"{endpoint} answered without any completion: {_shortened(response.text)}")
    return completions


def _read_choice(choice: dict, logprobs: bool) -> Completion:
    """A choice of a chat completion ({"message": {"content": ...}}) or of a text completion ({"text": ...})."""
    text = (choice["message"]["content"] or "") if "message" in choice else choice["text"]  # refusals have no content
    reported = choice.get("logprobs") if logprobs else None
    if reported is not None:
        if "content" in reported:
            reported = [token["logprob"] for token in reported["content"] or []]
        else:
            reported = reported["token_logprobs"]
        reported = [float(value) for value in reported]
    if not isinstance(text, str) or not isinstance(choice["finish_reason"], str):
        raise TypeError("text and finish_reason must be strings")
    return Completion(text, [], reported, choice["finish_reason"])


def _seconds(retry_after: str | None) -> float | None:
    """The header Retry-After, when it is a number of seconds (and not a date)."""
    try:
        return max(0.0, float(retry_after))
    except (TypeError, ValueError):
        return None


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:300] + " ..."
