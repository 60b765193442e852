"""What the backends have in common: prompts to token ids, random seeds of completions, generated ids to text."""

from __future__ import annotations

import bisect
import hashlib
import json
import numbers
from collections import Counter
from collections.abc import Mapping, Sequence

from shared.experiments.errors import UserError
from shared.generation import Completion, Prompt


class PromptError(UserError, ValueError):
    """A prompt that cannot be sampled from; the message names its index."""


def check_prompts(prompts: Sequence[Prompt], n: int) -> None:
    """Raise PromptError or TypeError, naming the index, unless each is text, messages or token ids, and not empty."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts must be a list of prompts, not {type(prompts).__name__}; for one prompt pass [prompt]"
        )
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n, the number of completions of each prompt, must be a positive integer, not {n!r}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, list, tuple)):
            raise TypeError(
                f"prompt {index} must be a string, a list of chat messages or a list of token ids, "
                f"not {type(prompt).__name__}"
            )
        if len(prompt) == 0:
            raise PromptError(f"prompt {index} is empty")
        if is_chat(prompt):
            for message in prompt:
                if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                    raise PromptError(f"prompt {index}: a chat message needs the keys role and content: {message!r}")
        elif not isinstance(prompt, str):
            for token in prompt:
                if not isinstance(token, numbers.Integral) or token < 0:
                    raise TypeError(f"prompt {index}: {token!r} is neither a chat message nor a token id")


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt that is not empty is a list of chat messages (and not text or token ids)."""
    return not isinstance(prompt, str) and isinstance(prompt[0], Mapping)


def encode_prompts(prompts: Sequence[Prompt], tokenizer, vocab_size: int, context: int | None) -> list[list[int]]:
    """Token ids of each prompt.

    Text gets the special tokens that the tokenizer adds by itself; chat messages are rendered with the chat template,
    followed by the header of the assistant's turn; token ids are taken as they are.
    vocab_size: number of tokens the model knows. context: most positions the model has, None if it has no limit.
    """
    encoded = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        elif is_chat(prompt):
            ids = _render_chat(index, prompt, tokenizer)
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise PromptError(f"prompt {index} has no tokens: {prompt!r}")
        if max(ids) >= vocab_size:
            raise PromptError(f"prompt {index} has token id {max(ids)}, but the model knows only {vocab_size} tokens")
        if context is not None and len(ids) >= context:
            raise PromptError(
                f"prompt {index} has {len(ids)} tokens, which leaves no room to generate "
                f"in the model's context of {context}; shorten it"
            )
        encoded.append(ids)
    return encoded


def _render_chat(index: int, messages: Sequence[dict], tokenizer) -> list[int]:
    if tokenizer.chat_template is None:
        raise PromptError(
            f"prompt {index} is a list of chat messages, but the tokenizer of {tokenizer.name_or_path!r} has no chat "
            "template; pass plain text, or set tokenizer.chat_template"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates raise what they like, often for a role they do not know
        raise PromptError(f"prompt {index}: the chat template refuses these messages: {error}") from error


def seeds_of_rows(prompts: Sequence[Prompt], n: int, seed: int) -> list[list[int]]:
    """A random seed in [0, 2**63) for each of the n completions of each prompt.

    It is a hash of `seed`, the prompt's content and the completion's number among all completions of that content, so
    it does not depend on what else is sampled; equal prompts, and different prompts with one seed, are independent.
    """
    seen: Counter[bytes] = Counter()
    seeds = []
    for prompt in prompts:
        content = json.dumps(prompt, sort_keys=True, default=int).encode()  # int: of numpy's token ids
        seeds.append([_hash(seed, number, content) for number in range(seen[content], seen[content] + n)])
        seen[content] += n
    return seeds


def _hash(seed: int, number: int, content: bytes) -> int:
    digest = hashlib.blake2b(b"%d %d %s" % (seed, number, content), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def end_of_sequence_ids(generation_config, tokenizer) -> list[int]:
    """Every token that ends a completion: those of the generation config, and the tokenizer's own."""
    ids = generation_config.eos_token_id
    ids = set(ids) if isinstance(ids, Sequence) else {ids}
    return sorted((ids | {tokenizer.eos_token_id}) - {None})


def prompt_lengths(prompts: Sequence[Prompt], tokenizer) -> list[int]:
    """Tokens of each prompt (text or chat messages), as `encode_prompts` would give them, in one call for each kind."""
    lengths = [0] * len(prompts)
    for chat in (False, True):
        rows = [row for row, prompt in enumerate(prompts) if is_chat(prompt) == chat]
        if not rows:
            continue
        chosen = [prompts[row] for row in rows]
        if chat:
            ids = tokenizer.apply_chat_template(chosen, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(chosen)["input_ids"]
        for row, tokens in zip(rows, ids, strict=True):
            lengths[row] = len(tokens)
    return lengths


def engine_length(prompts: Sequence[Prompt], tokenizer, max_new_tokens: int, context: int | None) -> int:
    """Positions that an engine needs for these prompts and their samples: those of the longest, not more than the
    model has. (vLLM reserves its cache for the whole context otherwise; for Llama 3.1's 131,072 positions, 16 GiB.)"""
    needed = max(prompt_lengths(prompts, tokenizer)) + max_new_tokens
    return needed if context is None else min(needed, context)


def context_length(config) -> int | None:
    """Most positions (prompt and completion together) of a model with this config; None where it states no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string that is complete first begins in `text`; None if there is none."""
    found = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    return min(found, key=lambda span: span[0])[1] if found else None


def decode(tokenizer, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def complete(
    tokenizer, token_ids: list[int], logprobs: list[float] | None, finish_reason: str, stop: Sequence[str]
) -> Completion:
    """The completion made of generated tokens; cuts text and tokens at the first stop string."""

    def has_stop(length: int) -> bool:
        return find_stop(decode(tokenizer, token_ids[:length]), stop) is not None

    text = decode(tokenizer, token_ids)
    start = find_stop(text, stop)
    if start is None:
        return Completion(text, token_ids, logprobs, finish_reason)
    lengths = range(1, len(token_ids) + 1)
    length = lengths[bisect.bisect_left(lengths, True, key=has_stop)]
    return Completion(text[:start], token_ids[:length], logprobs and logprobs[:length], "stop")
