"""What prompts cost in positions: against encoding each of them alone."""

import pytest

from shared.generation.text import encode_prompts, engine_length, prompt_lengths
from tests.tiny_chat import chat_tokenizer

CHAT = [{"role": "user", "content": "how far is it?"}]
PROMPTS = ["a", CHAT, "a longer prompt than the first", [*CHAT, {"role": "assistant", "content": "far"}, *CHAT]]


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_prompt_lengths(family):
    tokenizer = chat_tokenizer(family)
    alone = [len(encode_prompts([prompt], tokenizer, 10**9, None)[0]) for prompt in PROMPTS]
    assert len(set(alone)) == len(alone)
    assert prompt_lengths(PROMPTS, tokenizer) == alone
    assert prompt_lengths(PROMPTS[::2], tokenizer) == alone[::2]
    assert prompt_lengths(PROMPTS[1::2], tokenizer) == alone[1::2]
    assert prompt_lengths([], tokenizer) == []


@pytest.mark.parametrize(("context", "positions"), [(None, 0), (10**6, 0), (7, 7)])
def test_an_engine_has_room_for_the_longest_prompt_and_sample_within_the_context(context, positions):
    tokenizer = chat_tokenizer("llama")
    longest = max(prompt_lengths(PROMPTS, tokenizer))
    assert engine_length(PROMPTS, tokenizer, 5, context) == (positions or longest + 5)
