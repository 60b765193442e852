import numpy as np
import pytest
import torch

PROMPTS = [
    [{"role": "user", "content": "Tell me a joke."}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "A joke"},
    ],
    [{"role": "user", "content": "Write a story about a dog."}],
]
ANSWERS = ["A dog and a girl.", "No.", "Once there was a dog that did not know what to say. " * 3]


@pytest.fixture(scope="module")
def ArmoRM():
    from papers.divpo.armo import ArmoRM

    return ArmoRM


def by_hand(checkpoint, prompt, answer) -> float:
    """One conversation, in float64, from the stored weights: no batch, no padding."""
    from transformers import AutoTokenizer

    from papers.divpo.armo import LlamaForGatedReward

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = LlamaForGatedReward.from_pretrained(checkpoint, dtype=torch.float64)
    ids = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], return_dict=False)
    header = tokenizer.encode("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)
    # Where the last answer's header begins: the end of the prompt's last turn, which is in the original's pattern.
    starts = [j for j in range(len(ids) - len(header) + 1) if ids[j : j + len(header)] == header]
    with torch.no_grad():
        h = model.model(torch.tensor([ids])).last_hidden_state[0].numpy()
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    x = h[starts[-1]]
    for i in range(3):
        x = np.maximum(weights[f"gating.layers.{i}.weight"] @ x + weights[f"gating.layers.{i}.bias"], 0)
    logits = (weights["gating.layers.3.weight"] @ x + weights["gating.layers.3.bias"]) / 10
    gate = weights["gating.logit_scale"][0] * np.exp(logits) / np.exp(logits).sum()
    rewards = weights["regression_layer.weight"] @ h[-1]
    return float(gate @ (rewards @ weights["reward_transform_matrix"]))


def test_score_is_the_gated_sum_of_the_objectives(ArmoRM, armo_checkpoint):
    scores = ArmoRM(armo_checkpoint, batch_size=2)(PROMPTS, ANSWERS)
    expected = [by_hand(armo_checkpoint, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == 3


def test_batches_and_chat_completions_change_nothing(ArmoRM, armo_checkpoint):
    reward = ArmoRM(armo_checkpoint, batch_size=16)
    alone = [reward([p], [[{"role": "assistant", "content": a}]])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert reward(PROMPTS, ANSWERS) == pytest.approx(alone, abs=1e-5)


def test_another_model_is_refused(ArmoRM, reward_checkpoint):
    with pytest.raises(ValueError, match=r"is no ArmoRM: it has no weights for .*gating"):
        ArmoRM(reward_checkpoint)


def test_too_long_a_conversation(ArmoRM, armo_checkpoint):
    with pytest.raises(ValueError, match="do not fit into ArmoRM's context"):
        ArmoRM(armo_checkpoint)(PROMPTS[:1], ["word " * 2000])
