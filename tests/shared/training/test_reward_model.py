"""Reward models learned from comparisons: the loss against its equation, and a utility that is known."""

import numpy as np
import pytest
import torch

from shared.experiments.errors import UserError
from shared.models import encoder_from_scratch
from shared.rewards.reward_model import RewardModel
from shared.training.reward_model import pair_accuracy, train_reward_model
from tests.tiny_chat import chat_tokenizer

DIGITS = "0123456789"


@pytest.fixture
def encoder(tokenizer):
    return encoder_from_scratch(tokenizer, layers=1, width=32, heads=2, positions=12, outputs=1, seed=0)


def random_comparisons(n: int, seed: int, utility) -> list[tuple[str, str, str]]:
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < n:
        a, b = (" ".join(rng.choice(list(DIGITS), size=rng.integers(1, 6))) for _ in range(2))
        if utility(a) != utility(b):
            found.append(("3 = ", a, b) if utility(a) > utility(b) else ("3 = ", b, a))
    return found


def mean_of_digits(text: str) -> float:
    return float(np.mean([int(digit) for digit in text.split()]))


def test_the_loss_is_bradley_terrys(encoder, tokenizer, tmp_path):
    """In float64, each text alone, without padding."""
    comparisons = [("1 + 2 = ", "3", "4 4 4"), ("0 = ", "0 + 0", "1"), ("5 = ", "", "2 2 2 2 2 2")]
    with torch.no_grad():
        precise = encoder_from_scratch(tokenizer, layers=1, width=32, heads=2, positions=12, outputs=1, seed=0).double()
        scores = [
            [precise(torch.tensor([tokenizer(prompt + text)["input_ids"]])).logits.item() for text in pair]
            for prompt, *pair in comparisons
        ]
    expected = np.mean([np.log1p(np.exp(rejected - chosen)) for chosen, rejected in scores])
    loss = train_reward_model(encoder, tokenizer, comparisons, directory=tmp_path, steps=1, batch_size=3, lr=0, seed=0)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert abs(loss - np.log(2)) > 1e-3


def test_it_learns_a_known_utility_and_is_saved_for_scoring(encoder, tokenizer, tmp_path):
    learn, held_out = (random_comparisons(n, seed, mean_of_digits) for n, seed in ((2000, 0), (300, 1)))
    train_reward_model(encoder, tokenizer, learn, directory=tmp_path, steps=150, batch_size=32, lr=1e-2, seed=0)
    reward = RewardModel(tmp_path, batch_size=64)
    assert pair_accuracy(reward, held_out) > 0.95
    # On a scale of its own, but in the order of the utility.
    single = reward(["3 = "] * 10, list(DIGITS))
    assert single == sorted(single)
    assert not (tmp_path / "trainer").exists()
    # Reversed comparisons, reversed reward: nothing but the comparisons decides.
    reversed_ = [(prompt, rejected, chosen) for prompt, chosen, rejected in learn]
    fresh = encoder_from_scratch(tokenizer, layers=1, width=32, heads=2, positions=12, outputs=1, seed=0)
    other = tmp_path / "other"
    train_reward_model(fresh, tokenizer, reversed_, directory=other, steps=150, batch_size=32, lr=1e-2, seed=0)
    assert pair_accuracy(RewardModel(other, batch_size=64), held_out) < 0.05


def test_the_seed_decides(tokenizer, tmp_path):
    comparisons = random_comparisons(64, 0, mean_of_digits)

    def weights(seed: int) -> torch.Tensor:
        model = encoder_from_scratch(tokenizer, layers=1, width=32, heads=2, positions=12, outputs=1, seed=0)
        torch.rand(seed + 3)  # whatever was drawn before
        train_reward_model(
            model, tokenizer, comparisons, directory=tmp_path, steps=3, batch_size=16, lr=1e-2, seed=seed
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("family", ["encoder", "llama"])
def test_it_is_trained_on_the_tokens_that_are_scored(encoder, tokenizer, tmp_path, family):
    """With every kind of padding: the training loss of a batch is the loss of the rewards."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    if family == "llama":
        torch.manual_seed(0)
        encoder = LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=12, num_labels=1, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    comparisons = random_comparisons(8, 5, mean_of_digits)
    loss = train_reward_model(encoder, tokenizer, comparisons, directory=tmp_path, steps=1, batch_size=8, lr=0, seed=0)
    reward = RewardModel(tmp_path, batch_size=3)
    prompts = [prompt for prompt, *_ in comparisons]
    chosen, rejected = (np.array(reward(prompts, [pair[k] for pair in comparisons])) for k in (1, 2))
    assert loss == pytest.approx(np.log1p(np.exp(rejected - chosen)).mean(), abs=1e-6)


def test_conversations_are_rendered_as_the_reward_model_renders_them(tmp_path):
    tokenizer = chat_tokenizer("llama")
    model = encoder_from_scratch(tokenizer, layers=1, width=16, heads=2, positions=64, outputs=1, seed=0)
    prompt = [{"role": "user", "content": "a"}]
    comparisons = [(prompt, "b", "c d"), (prompt, "d", "")]
    loss = train_reward_model(model, tokenizer, comparisons, directory=tmp_path, steps=1, batch_size=2, lr=0, seed=0)
    reward = RewardModel(tmp_path)
    chosen, rejected = (np.array(reward([prompt] * 2, [pair[k] for pair in comparisons])) for k in (1, 2))
    assert loss == pytest.approx(np.log1p(np.exp(rejected - chosen)).mean(), abs=1e-6)


def test_accuracy_by_hand():
    def length(prompts, completions, **columns):
        assert columns["extra"] == ["x"] * 4
        return [float(len(prompt) + len(text)) for prompt, text in zip(prompts, completions, strict=True)]

    comparisons = [("p", "long", "s"), ("", "s", "long"), ("pp", "same", "size"), ("p", "longer", "long")]
    assert pair_accuracy(length, comparisons, extra=["x"] * 4) == (1 + 0 + 0.5 + 1) / 4


@pytest.mark.parametrize(
    ("comparisons", "message"),
    [
        ([], "no comparisons to learn"),
        ([("1 = ", "2", "3"), ("1 = ", "4", "4")], r"comparison 1: chosen and rejected are the same: '4'"),
        ([("1 = ", "2", " ".join(DIGITS + "+"))], r"comparison 0: 13 tokens do not fit into the model's context of 12"),
        ([("", "1", "")], "comparison 0: prompt and completion are empty"),
        ([("1 = ", "2", "<pad>")], "comparison 0 ends with the padding token"),
    ],
)
def test_comparisons_that_teach_nothing_are_refused(encoder, tokenizer, tmp_path, comparisons, message):
    with pytest.raises(UserError, match=message):
        train_reward_model(encoder, tokenizer, comparisons, directory=tmp_path, steps=1, lr=0, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_no_comparisons_no_accuracy():
    with pytest.raises(UserError, match="no comparisons to judge"):
        pair_accuracy(lambda prompts, completions: [], [])
