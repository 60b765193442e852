"""Tokenizers and models of the generated worlds."""

import json

import pytest
import torch

from shared.experiments.errors import UserError
from shared.models import llama_from_scratch, word_tokenizer

WORDS = ["{", "}", '"name":', '"Ada"', ",", "a", "b"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


def test_text_comes_back_as_it_was_with_single_spaces(tokenizer):
    text = '{ "name": "Ada" , }'
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 5
    assert tokenizer.decode(ids) == text
    assert json.loads(tokenizer.decode(tokenizer('{ "name":   "Ada" }')["input_ids"])) == {"name": "Ada"}


def test_nothing_is_added_so_prompt_and_completion_can_be_joined(tokenizer):
    joined = tokenizer("a b { }")["input_ids"]
    assert joined == tokenizer("a b")["input_ids"] + tokenizer("{ }")["input_ids"]


def test_order_and_repetition_of_the_words_do_not_matter(tokenizer):
    assert word_tokenizer([*reversed(WORDS), "a"]).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == len(WORDS) + 3


def test_unknown_words_and_padding(tokenizer):
    assert tokenizer("a zebra")["input_ids"][1] == tokenizer.unk_token_id
    padded = tokenizer(["a b", "a"], padding=True)
    assert padded["input_ids"][1] == [tokenizer.pad_token_id, *tokenizer("a")["input_ids"]]


def test_a_word_with_white_space_could_never_be_a_token():
    with pytest.raises(UserError, match="white space: 'new york'"):
        word_tokenizer(["a", "new york"])


def test_a_checkpoint_keeps_tokenizer_and_logits(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = llama_from_scratch(tokenizer, layers=1, width=16, heads=2, positions=8, seed=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("{ a zebra }")["input_ids"] == tokenizer("{ a zebra }")["input_ids"]
    assert (loaded.padding_side, loaded.eos_token_id) == ("left", tokenizer.eos_token_id)
    ids = torch.tensor([tokenizer("a b a")["input_ids"]])
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_the_seed_decides_the_weights_and_leaves_the_global_generator_alone(tokenizer):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sizes = {"layers": 1, "width": 16, "heads": 2, "positions": 8}
    a, b, c = (llama_from_scratch(tokenizer, **sizes, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert a.lm_head.weight is a.model.embed_tokens.weight
