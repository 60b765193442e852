import math
import sys
import types

import pytest
import torch

from papers.mta.config import Config, Model
from shared.experiments import UserError

SIZES = {"hidden_size": 16, "intermediate_size": 24, "query_kernel_size": 2, "key_kernel_size": 3, "kq_layers": [1]}


def model_for(config: Config):
    from papers.mta.tasks import build_model, tokenizer_of

    return build_model(config, tokenizer_of(config)).eval(), tokenizer_of(config)


def find_config(**values) -> Config:
    return Config(block_size=3, n_blocks=5, n_queries=2, n_test=7, eval_batch_size=3, model=Model(**SIZES), **values)


class Reader(torch.nn.Module):
    """Answers find-block by reading the text; `wrong` of every four queries with a letter of no block."""

    def __init__(self, config: Config, wrong: int):
        super().__init__()
        from papers.mta.data import letter_tokenizer

        self.config, self.wrong, self.tokenizer, self.device = config, wrong, letter_tokenizer(), torch.device("cpu")
        self.asked = 0

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for b, row in enumerate(input_ids):
            text = [self.tokenizer.convert_ids_to_tokens(int(i)) for i in row]
            blocks = "".join(text[1 : text.index("#")]).split(".")
            for at in [i for i, c in enumerate(text) if c == "#"]:
                (block,) = [x for x in blocks if {text[at + 1], text[at + 2]} <= set(x)]
                answer = {"first": block[0], "last": block[-1], "all": block}[self.config.answer]
                if self.asked % 4 < self.wrong:
                    answer = answer[:-1] + next(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in block)
                self.asked += 1
                for i, letter in enumerate(answer):
                    logits[b, at + 2 + i, self.tokenizer.convert_tokens_to_ids(letter)] = 1.0
        return types.SimpleNamespace(logits=logits)


@pytest.mark.parametrize("answer", ["first", "last", "all"])
@pytest.mark.parametrize("wrong", [0, 1, 4])
def test_error_of_a_reader_who_is_right_as_often_as_we_say(answer, wrong):
    from papers.mta.eval import answer_find_block

    config = find_config(answer=answer)
    reader = Reader(config, wrong)
    rows = answer_find_block(config, reader, reader.tokenizer)
    assert len({row["item"] for row in rows}) == len(rows) == 14
    assert [row["scores"]["error"] for row in rows] == [float(i % 4 < wrong) for i in range(14)]
    assert all((row["output"] != row["expected"]) == row["scores"]["error"] for row in rows)
    assert all(row["prompt"].startswith("<bos>") for row in rows)


@pytest.mark.parametrize("attention", ["mta", "transformer"])
def test_attention_of_an_answer_is_that_of_the_position_before_it(attention):
    from papers.mta.eval import attention_of_one_answer

    config = find_config(answer="all")
    config.model.attention = attention
    model, tokenizer = model_for(config)
    found = attention_of_one_answer(config, model, tokenizer)
    *blocks, _ = "".join(found["tokens"][1:]).split("#")
    assert len(blocks) == 2  # the last of the two questions, its answer not shown
    block = found["tokens"][slice(*found["block"])]
    assert len(block) == 3
    assert set(found["tokens"][-2:]) <= set(block)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(found["tokens"])])
    whole = model(input_ids=torch.cat([ids, ids[:, :3]], dim=1), output_attentions=True, use_cache=False).attentions
    expected = torch.stack([map_BHTS[0, :, ids.shape[1] - 1, : ids.shape[1]] for map_BHTS in whole])
    torch.testing.assert_close(torch.tensor(found["weights"]), expected, rtol=1e-4, atol=1e-6)


def test_kernels_and_the_share_of_added_parameters():
    from papers.mta.eval import is_added, learned_kernels

    config = find_config()
    plain, _ = model_for(config)
    for attention in ("transformer", "talking_heads", "diff", "mta"):
        config.model.attention = attention
        model, _ = model_for(config)
        added = sum(p.numel() for name, p in model.named_parameters() if is_added(name))
        assert added == model.num_parameters() - plain.num_parameters()
    kernels = learned_kernels(model)
    assert kernels.keys() == {"0", "1"}
    assert kernels["1"].keys() == {"kq_pre", "kq_post", "head_pre", "head_post"}
    assert kernels["0"].keys() == {"head_pre", "head_post"}
    assert kernels["1"]["kq_pre"] == [[[0, 0, 0], [0, 1, 0]]] * 2
    assert kernels["0"]["head_post"] == [[[1, 0], [0, 1]]]


def test_perplexity_is_that_of_the_models_own_loss(monkeypatch, tmp_path):
    from papers.mta import tasks
    from papers.mta.data import train_tokenizer
    from papers.mta.eval import read_text
    from shared.experiments import Run

    config = Config(task="docs", context_length=12, eval_batch_size=2, model=Model(**SIZES))
    tokenizer = train_tokenizer(["some text"], 260)
    model = tasks.build_model(config, tokenizer).eval()
    sequences = {"RedPajamaC4": torch.randint(3, 260, (5, 12)), "RedPajamaBook": torch.randint(3, 260, (3, 12))}
    monkeypatch.setattr(tasks, "validation_sequences", lambda *args: (sequences, ""))
    rows, metrics = read_text(config, model, tokenizer, Run(tmp_path, "mta", "tiny", "a", 0, "eval", "k"), asks=True)
    with torch.no_grad():
        loss = {name: float(model(input_ids=ids, labels=ids).loss) for name, ids in sequences.items()}
    assert metrics["perplexity_c4"] == pytest.approx(math.exp(loss["RedPajamaC4"]), rel=1e-5)
    assert metrics["perplexity_book"] == pytest.approx(math.exp(loss["RedPajamaBook"]), rel=1e-5)
    mean = (math.exp(loss["RedPajamaC4"]) + math.exp(loss["RedPajamaBook"])) / 2
    assert metrics["perplexity"] == pytest.approx(mean, rel=1e-5)
    scores = {row["item"]: row["scores"]["nll"] for row in rows}
    assert scores.keys() == {*(f"RedPajamaC4-{i}" for i in range(5)), *(f"RedPajamaBook-{i}" for i in range(3))}
    c4 = [value for item, value in scores.items() if "C4" in item]
    assert sum(c4) / 5 == pytest.approx(loss["RedPajamaC4"], rel=1e-5)


# ---- lm-eval-harness ------------------------------------------------------------------------------------------------
def test_a_missing_harness_is_named(monkeypatch):
    import importlib.util

    from papers.mta.eval import require_harness

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_harness(Config(task="docs"))
    with pytest.raises(UserError, match="pip install lm-eval"):
        require_harness(Config(task="docs", harness=["boolq"]))


def test_harness_results_become_metrics(monkeypatch):
    from papers.mta.eval import run_harness

    asked = []

    def simple_evaluate(model, tasks, num_fewshot):
        asked.append((tasks, num_fewshot))
        values = {"perplexity,none": 13.2, "acc,none": 0.5} if tasks == ["lambada_standard"] else {"acc,none": 0.25}
        return {"results": {tasks[0]: values}}

    modules = {
        "lm_eval": types.SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.models": types.SimpleNamespace(),
        "lm_eval.models.huggingface": types.SimpleNamespace(HFLM=lambda **kwargs: kwargs),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    metrics = run_harness(Config(task="docs", harness=["mmlu:5", "lambada_standard"]), None, None)
    assert asked == [(["mmlu"], 5), (["lambada_standard"], 0)]
    assert metrics == {
        "harness_mmlu": 0.25,
        "harness_lambada_standard": 0.5,
        "harness_lambada_standard_perplexity": 13.2,
    }


# ---- models from settings -------------------------------------------------------------------------------------------
def test_contradicting_settings_are_a_persons_mistake():
    config = find_config()
    config.model.attention = "mta"
    for change, match in (
        ({"key_kernel_size": 4}, "odd"),
        ({"kq_layers": [7]}, "do not exist"),
        ({"attention": "gqa"}, "attention"),
    ):
        broken = find_config()
        broken.model = Model(**{**SIZES, "attention": "mta", **change})
        with pytest.raises(UserError, match=match):
            model_for(broken)


def test_a_checkpoint_of_another_mechanism_is_refused(tmp_path):
    config = find_config()
    config.model.attention = "talking_heads"
    model, _ = model_for(config)
    model.save_pretrained(tmp_path)
    config.init_from = str(tmp_path)
    for wanted, match in (("diff", "has attention=talking_heads, not diff"), ("mta", "needs a Llama")):
        config.model.attention = wanted
        with pytest.raises(UserError, match=match):
            model_for(config)


def test_the_example_in_the_readme():
    from shared.experiments.paper import PAPERS
    from shared.kernels import mta_attention

    text = (PAPERS / "mta" / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    q, k, v, kernel, out = (names[name] for name in ("q", "k", "v", "kernel", "out"))
    torch.testing.assert_close(out, mta_attention(q, k, v, kq_pre=kernel, backend="reference"))
    # the sequence match that it speaks of: logits of the map plus those of the map shifted along its diagonal
    scores = (q @ k.transpose(2, 3) / 32**0.5).tril()
    scores[:, :, 1:, 1:] += scores[:, :, :-1, :-1].clone()
    above = torch.ones(100, 100, dtype=torch.bool).triu(1)
    torch.testing.assert_close(out, scores.masked_fill(above, -torch.inf).softmax(-1) @ v, rtol=1e-4, atol=1e-5)
