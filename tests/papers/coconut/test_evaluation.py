import numpy as np
import pytest
import torch

from papers.coconut.analysis import frontier
from papers.coconut.config import Config
from papers.coconut.eval import n_thoughts, value_gaps
from papers.coconut.evaluation import answer, name_probabilities
from papers.coconut.method import Batches, Curriculum, special_ids, tokenize_rows
from papers.coconut.prosqa import balanced_rows, prosqa_rows
from papers.coconut.tasks import load_model


def settings(**values) -> Config:
    sizes = {"width": 32, "heads": 2, "mlp_width": 32, "positions": 600, "init_std": 0.3, "max_latent_stage": 3}
    return Config(
        **{**sizes, "stage_steps": [1], "n_train": 40, "n_dev": 5, "n_test": 5, "max_new_tokens": 6, **values}
    )


def load(config: Config, rows: list[dict]):
    torch.manual_seed(0)
    model, tokenizer = load_model(config)
    curriculum = Curriculum(config.method, config.c_thought, config.max_latent_stage)
    return model.eval(), tokenizer, Batches(tokenize_rows(rows, tokenizer), curriculum, special_ids(tokenizer))


def test_answers_do_not_depend_on_the_batch():
    config = settings()
    rows = balanced_rows(7, "test")
    model, tokenizer, batches = load(config, rows)
    together = answer(model, tokenizer, batches, config, stage=1)
    alone = answer(model, tokenizer, batches, config, stage=1, batch_size=1)
    assert together == alone
    assert answer(model, tokenizer, batches, config, stage=1, only=[4, 2]) == [together[4], together[2]]


def test_answers_stop_at_eos_and_count_it():
    config = settings()
    model, tokenizer, batches = load(config, balanced_rows(3, "test"))
    with torch.no_grad():  # make <eos> the favourite of every hidden state: h·W_eos = |h|² · large
        model.get_output_embeddings().weight.zero_()
        norm = model.base.transformer.ln_f
        norm.weight.zero_()
        norm.bias.fill_(1.0)
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = 1.0
    assert answer(model, tokenizer, batches, config) == [("", 1)] * 3


@pytest.mark.parametrize(("task", "make", "k"), [("balanced", balanced_rows, 1), ("prosqa", prosqa_rows, 2)])
def test_values_are_products_of_token_probabilities(task, make, k):
    """Against one full forward pass per node, without batching or padding."""
    config = settings(task=task)
    rows = make(4, "test")
    model, tokenizer, batches = load(config, rows)
    model.double()
    values = name_probabilities(model, tokenizer, batches, rows, k, config)
    lead = [] if task == "balanced" else tokenizer("Every", add_special_tokens=False).input_ids
    for i, row in enumerate(rows):
        expected = np.zeros(len(row["idx_to_symbol"]))
        for node in frontier(row, k + (task == "balanced")):
            name = tokenizer(row["idx_to_symbol"][node], add_special_tokens=False).input_ids
            prompt = batches.prompts(np.array([i]), k, continuation=lead)["input_ids"]
            probability = 1.0
            for token in name:
                with torch.no_grad():
                    p_V = torch.softmax(model(prompt).logits[0, -1], -1)
                probability *= p_V[token].item()
                prompt = torch.cat([prompt, torch.tensor([[token]])], dim=1)
            expected[node] = probability
        np.testing.assert_allclose(values[i], expected, rtol=1e-6)
        assert (values[i] > 0).any()


def test_value_gaps():
    def node(value: float, height: int, correct: bool) -> dict:
        return {"value": value, "height": height, "correct": correct}

    nodes = [node(0.9, 0, True), node(0.7, 1, True), node(0.2, 1, False), node(0.5, 2, True)]
    assert value_gaps(nodes, 1) == {"value_gap_low_k1": pytest.approx(0.8 - 0.2)}
    gaps = value_gaps([*nodes, node(0.4, 3, False)], 2)
    assert gaps["value_gap_high_k2"] == pytest.approx(0.1)


def test_thoughts_count_as_tokens_and_pauses_do_not():
    assert n_thoughts(settings(c_thought=2)) == 6
    assert n_thoughts(settings(method="pause_as_thought", c_thought=2)) == 0
    assert n_thoughts(settings(method="cot")) == 0
