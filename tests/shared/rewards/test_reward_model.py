import pytest
import torch

from shared.experiments.errors import UserError
from shared.rewards.reward_model import RewardModel, token_ids
from tests.tiny_chat import chat_tokenizer

TEXTS = ["ab", "", "é cd a", "hhhh ef. g", "a</s>", "ba"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny Llama classifiers by number of outputs, over characters, without a padding token; 1 has 16 positions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {token: i for i, token in enumerate(["</s>", "<cls>", *sorted(split.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer, core.decoder = split, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", cls_token="<cls>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"vocab_size": len(vocab), "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": 0, **sizes}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    paths = {}
    for outputs in (1, 2):
        paths[outputs] = tmp_path_factory.mktemp(f"outputs{outputs}")
        LlamaForSequenceClassification(LlamaConfig(num_labels=outputs, **config)).save_pretrained(paths[outputs])
        tokenizer.save_pretrained(paths[outputs])
    paths["language model"] = tmp_path_factory.mktemp("lm")
    LlamaForCausalLM(LlamaConfig(num_labels=1, **config)).save_pretrained(paths["language model"])
    tokenizer.save_pretrained(paths["language model"])
    return paths


@pytest.fixture(scope="module")
def reward(checkpoints):
    return RewardModel(checkpoints[1], batch_size=4, device="cpu")


def by_hand(reward, text: str) -> float:
    """The head on the last hidden state of the row alone, without padding."""
    ids = torch.tensor([reward.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        hidden = reward.model.model(ids).last_hidden_state[0, -1]
        return float(reward.model.score.weight[0] @ hidden)


def test_scores_are_those_of_each_row_alone(reward):
    """Also where a row ends with the token that is commonly used for padding."""
    expected = [by_hand(reward, "p:" + text) for text in TEXTS]
    assert len({round(value, 6) for value in expected}) == len(TEXTS)
    assert reward(["p:"] * len(TEXTS), TEXTS, answer=["unused"] * len(TEXTS)) == pytest.approx(expected, abs=1e-5)


def test_conversations_are_rendered_and_the_ending_appended(reward):
    chat = [{"role": "user", "content": "p"}]
    done = [[{"role": "assistant", "content": text}] for text in TEXTS[:4]]
    expected = [by_hand(reward, f"p</s>{text}</s>") for text in TEXTS[:4]]
    assert reward([chat] * 4, done) == pytest.approx(expected, abs=1e-5)
    reward.ending = "<cls>"
    try:
        expected = [by_hand(reward, f"p</s>{text}</s><cls>") for text in TEXTS[:4]]
        assert reward([chat] * 4, done) == pytest.approx(expected, abs=1e-5)
    finally:
        reward.ending = ""


@pytest.mark.parametrize("family", ["characters", "llama", "qwen"])
def test_rows_are_tokenised_together_as_each_would_be_alone(family, reward, monkeypatch):
    """Text and conversations, empty and long rows, an ending; a tokenizer saved with padding and truncation."""
    tokenizer = reward.tokenizer if family == "characters" else chat_tokenizer(family)
    ending = tokenizer.special_tokens_map["eos_token"]
    chat = [{"role": "user", "content": "p"}]
    prompts = ["p: ", chat, "", chat, "p", "", [*chat, {"role": "assistant", "content": ""}, *chat]]
    completions = ["a", "", "", "b " * 40, "b " * 40, " a\n", "ab"]

    def alone(prompt, text, end):
        if isinstance(prompt, str):
            return tokenizer(prompt + text + end)["input_ids"]
        rendered = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)
        return tokenizer(rendered + end, add_special_tokens=False)["input_ids"]

    expected = {
        end: [alone(prompt, text, end) for prompt, text in zip(prompts, completions, strict=True)]
        for end in ("", ending)
    }
    assert len({len(ids) for ids in expected[""]}) > 3
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.enable_truncation(5)
    calls = []
    batched = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **kw: calls.append(1) or batched(*args, **kw))
    for end, ids in expected.items():
        assert token_ids(tokenizer, prompts, completions, end) == ids
        assert token_ids(tokenizer, prompts[:1], completions[:1], end) == ids[:1]
    assert len(calls) == 2 * (2 + 1)
    assert token_ids(tokenizer, [], []) == []
    with pytest.raises(ValueError, match="2 prompts for 1 completions"):
        token_ids(tokenizer, prompts[:2], completions[:1])


def test_rows_that_cannot_be_scored_are_named(reward):
    with pytest.raises(UserError, match=r"row 1: 18 tokens do not fit .* context of 16"):
        reward(["p:"] * 2, ["a", "b" * 16])
    with pytest.raises(UserError, match="row 1: prompt and completion are empty"):
        reward(["p:", ""], ["a", ""])
    weight = reward.model.score.weight
    saved = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="nan for row 0"):
            reward(["p:"], ["a"])
    finally:
        weight.data.copy_(saved)
    assert reward([], []) == []


def test_only_reward_models_are_accepted(checkpoints):
    with pytest.raises(UserError, match=r"no weights for score\.weight, which would be random"):
        RewardModel(checkpoints["language model"], device="cpu")
    with pytest.raises(UserError, match="has 2 outputs"):
        RewardModel(checkpoints[2], device="cpu")


def test_weights_under_other_names(checkpoints, reward, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in checkpoints[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(checkpoints[1] / "model.safetensors")
    weights["v_head.weight"] = weights.pop("score.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    renamed = RewardModel(tmp_path, key_mapping={r"^v_head\.": "score."}, device="cpu")
    assert renamed(["p:"] * 2, TEXTS[:2]) == reward(["p:"] * 2, TEXTS[:2])
