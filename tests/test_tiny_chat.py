"""The tiny checkpoints behave like those that they stand for."""

import json
from collections import Counter

import pytest

from shared.generation import SamplingParams, load_sampler
from tests.tiny_chat import FAMILIES, REPLIES, chat_checkpoint, chat_tokenizer

CHAT = [{"role": "user", "content": "Hi there"}]
RENDERED = {
    "llama": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n{system}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
    ),
    "qwen": "{system}<|im_start|>user\nHi there<|im_end|>\n",
}
SYSTEM = {"llama": "Be brief.", "qwen": "<|im_start|>system\nBe brief.<|im_end|>\n"}
TURN = {"llama": "<|start_header_id|>assistant<|end_header_id|>\n\n", "qwen": "<|im_start|>assistant\n"}


@pytest.mark.parametrize("family", FAMILIES)
def test_templates(family):
    tokenizer = chat_tokenizer(family)
    rendered = RENDERED[family].replace("{system}", "")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == rendered
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == rendered + TURN[family]
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert tokenizer.apply_chat_template(system, tokenize=False) == RENDERED[family].replace("{system}", SYSTEM[family])
    for text in (rendered, 'é {"a": 1} $\\frac{1}{2}$\n'):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    begins = tokenizer("Hi")["input_ids"][0] == tokenizer.bos_token_id
    assert begins == (family == "llama")
    assert (tokenizer.pad_token is None) == (family == "llama")


def test_chat_models_answer(llama_chat, qwen_chat):
    for checkpoint in (llama_chat, qwen_chat):
        with load_sampler("transformers", checkpoint) as sampler:
            [row] = sampler.sample([CHAT], n=100, params=SamplingParams(max_new_tokens=30))
        texts = Counter(completion.text for completion in row)
        assert all(texts[reply] >= 3 for reply in REPLIES)
        assert sum(completion.finish_reason == "stop" for completion in row) >= 60


def test_other_replies(tmp_path):
    reply = json.dumps({"first_name": "Ada", "city": "Oslo"})
    with load_sampler("transformers", chat_checkpoint(tmp_path, "qwen", [reply])) as sampler:
        [row] = sampler.sample([CHAT], n=10, params=SamplingParams(max_new_tokens=30))
    assert sum(completion.text == reply for completion in row) >= 8


def test_classifiers(reward_checkpoint, pair_checkpoint):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from shared.rewards.reward_model import RewardModel

    reward = RewardModel(reward_checkpoint, ending=AutoTokenizer.from_pretrained(reward_checkpoint).cls_token)
    scores = reward([CHAT, CHAT], ["Hello", "Go away"])
    assert abs(scores[0] - scores[1]) > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(pair_checkpoint)
    assert tokenizer.decode(tokenizer("a b", "c")["input_ids"]) == "[CLS]a b[SEP]c[SEP]"
    model = AutoModelForSequenceClassification.from_pretrained(pair_checkpoint)
    logits = model(**tokenizer([("a b", "c"), ("it is", "it is not one")], padding=True, return_tensors="pt")).logits
    assert logits.shape == (2, 2)
