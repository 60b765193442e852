"""One interface to sample text from a language model, whatever runs the model.

    with load_sampler("transformers", "runs/p/tiny/sft/0/checkpoint") as sampler:
        completions = sampler.sample(["2 + 2 ="], n=4, params=SamplingParams(max_new_tokens=8))

Importing this package loads neither torch nor transformers nor vLLM; `load_sampler` loads what its backend needs.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Prompt = str | Sequence[dict] | Sequence[int]
"""Plain text, chat messages (`{"role": ..., "content": ...}`, rendered with the chat template), or token ids."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Every backend applies temperature, then top-k, then top-p.

    max_new_tokens: most tokens to generate for one completion (less where the model's context ends before).
    temperature: 0 is greedy decoding; otherwise at least 0.01.
    top_p: keep the smallest set of most probable tokens whose probability sums to at least this; 1 keeps all.
    top_k: keep this many most probable tokens; 0 keeps all.
    stop: generation ends as soon as the text contains one of these; the text is cut where that string begins.
    seed: the same seed gives the same completions (see `Sampler`).
    logprobs: whether to return `Completion.logprobs`.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self):
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a positive integer, not {self.max_new_tokens!r}")
        # vLLM raises smaller temperatures to 0.01, so the backends would not agree below it.
        if not isinstance(self.temperature, numbers.Real) or not (self.temperature == 0 or self.temperature >= 0.01):
            raise ValueError(f"temperature must be 0 (greedy) or at least 0.01, not {self.temperature!r}")
        if not isinstance(self.top_p, numbers.Real) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p!r}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or a positive integer, not {self.top_k!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63), not {self.seed!r}")


DEFAULT_PARAMS = SamplingParams()


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    text: the generated text without special tokens, cut before the stop string if one ended it.
    token_ids: every generated token, including the end-of-sequence token and the tokens of the stop string; empty
        from the `openai` backend, whose protocol does not carry them.
    logprobs: for each of `token_ids`, ln p(token | prompt, tokens before) under the softmax of the model's raw logits,
        that is at temperature 1 and before top-k and top-p, whatever the sampling parameters; None unless asked for.
        From the `openai` backend: what the server reports, None where it reports nothing.
    finish_reason: "stop" (end-of-sequence token or stop string), "length" (max_new_tokens or the context is used up);
        from the `openai` backend also what else the server says, such as "content_filter".
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


class Sampler(Protocol):
    """What every backend offers. Close it, or use it as a context manager, to release the model."""

    def sample(
        self, prompts: Sequence[Prompt], n: int = 1, params: SamplingParams = DEFAULT_PARAMS
    ) -> list[list[Completion]]:
        """n completions of each prompt, in the order of the prompts.

        A completion depends on the model, the parameters (with the seed), its prompt and its number among the
        completions of that prompt; not on the other prompts, their order or the batch size (up to the rounding of
        batched arithmetic). A prompt that occurs twice gets different samples: sampling `[p, p]` with n=1 equals
        sampling `[p]` with n=2. Long lists can therefore be sampled in pieces.

        Raises PromptError (a UserError and a ValueError) or TypeError naming the prompt's index for an empty or
        malformed prompt, one that does not fit into the model's context, and chat messages without a chat template.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Sampler: ...

    def __exit__(self, *exc_info) -> None: ...


BACKENDS = ("transformers", "vllm", "openai")


def load_sampler(backend: str, model: Any, **options) -> Sampler:
    """The sampler `backend` for `model`.

    backend: "transformers" (any causal LM, on CPU or GPU), "vllm" (vLLM's engine on a GPU, or its CPU build), or
        "openai" (an OpenAI-compatible server).
    model: a checkpoint directory or hub name; for "transformers" also a loaded model; for "openai" the name under
        which the server offers it.
    options: keyword arguments of `TransformersSampler`, `VLLMSampler` or `OpenAISampler`.
    """
    if backend == "transformers":
        from shared.generation.transformers_backend import TransformersSampler

        return TransformersSampler(model, **options)
    if backend == "vllm":
        from shared.generation.vllm_backend import VLLMSampler

        return VLLMSampler(model, **options)
    if backend == "openai":
        from shared.generation.openai_backend import OpenAISampler

        return OpenAISampler(model, **options)
    raise ValueError(f"unknown generation backend {backend!r}; valid: {', '.join(BACKENDS)}")
