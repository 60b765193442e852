"""Tokenizers and models of the generated worlds."""

import json

import pytest
import torch

from shared.experiments.errors import UserError
from shared.models import encoder_from_scratch, llama_from_scratch, word_tokenizer

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


def test_init_std_is_that_of_embeddings_and_matrices(tokenizer):
    sizes = {"layers": 1, "width": 64, "heads": 2, "positions": 8, "seed": 0}
    for std, model in (
        (0.02, llama_from_scratch(tokenizer, **sizes)),
        (0.3, llama_from_scratch(tokenizer, **sizes, init_std=0.3)),
    ):
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                assert parameter.std().item() == pytest.approx(std, rel=0.1), name
            else:
                assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_the_encoder_reads_words_in_any_order_and_no_padding(tokenizer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    sizes = {"layers": 1, "width": 16, "heads": 2, "positions": 8, "outputs": 3}
    model, again, other = (encoder_from_scratch(tokenizer, **sizes, seed=seed).eval() for seed in (1, 1, 2))
    ids, padded = torch.tensor([tokenizer("a b {")["input_ids"]]), torch.full((1, 6), tokenizer.pad_token_id)
    padded[0, :3] = ids
    logits_13 = model(ids).logits
    assert logits_13.shape == (1, 3)
    torch.testing.assert_close(
        model(padded, attention_mask=(padded != tokenizer.pad_token_id).long()).logits, logits_13
    )
    torch.testing.assert_close(again(ids).logits, logits_13)
    assert not torch.allclose(other(ids).logits, logits_13)
    # The first word hears of the last: it is no decoder.
    changed = ids.clone()
    changed[0, -1] = tokenizer("}")["input_ids"][0]
    first, first_changed = (model.model(x).last_hidden_state[0, 0] for x in (ids, changed))
    assert not torch.allclose(first, first_changed)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids).logits, logits_13)
