import copy
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from papers.mta.config import Config, Finetune, Model
from papers.mta.train import set_learning_rate, stages
from shared.experiments import Run, UserError, files, stage_main
from shared.experiments.paper import ROOT

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "query_kernel_size": 2,
    "key_kernel_size": 3,
    "kq_layers": [1],
}
FIND = {"block_size": 3, "n_blocks": 4, "n_queries": 2, "n_test": 6, "n_dev": 3, "lr": 1e-2, "eval_every": 2}
TEXT = {"vocab_size": 300, "context_length": 24, "n_validation": 5, "n_dev": 2, "lr": 1e-2, "eval_every": 2}


def config(model: dict | None = None, **values) -> Config:
    sizes = FIND if values.get("task", "findblock") == "findblock" else TEXT
    return Config(**{**sizes, "steps": 6, "batch_size": 4, **values}, model=Model(**{**TINY, **(model or {})}))


def make_run(path, stage: str = "train", seed: int = 5) -> Run:
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    return Run(path, "mta", "tiny", "arm", seed, stage, "key")


@pytest.fixture
def small_library(monkeypatch, tmp_path):
    """A few documents in place of the standard library, and a cache of their own."""
    from papers.mta import data, tasks

    def corpus(with_source=False):
        rng = np.random.default_rng(0)
        words = ["list", "returns", "the", "object", "is", "value", "of", "string", "key.", "index.", "\n", "error"]
        texts = [" ".join(rng.choice(words, 400)) for _ in range(6)]
        documents = [data.Document(f"d{i}", text) for i, text in enumerate(texts)]
        return documents[:4], documents[4:]

    monkeypatch.setattr(data, "docs_corpus", corpus)
    monkeypatch.setattr(tasks, "CACHE", tmp_path / "cache")


def weights(path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def logged(path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "time"} for row in files.read_jsonl(path / "log.jsonl")]


# ---- schedule and stages --------------------------------------------------------------------------------------------
class OneGroup:
    def __init__(self):
        self.param_groups = [{"lr": 0.0}]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]), ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25])],
)
def test_learning_rate_warms_up_and_stays_or_falls_to_zero(schedule, expected):
    optimizer, found = OneGroup(), []
    for step in range(6):
        set_learning_rate(config(lr=1.0, lr_schedule=schedule, warmup_steps=2), optimizer, step)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(expected)


def test_the_second_stage_keeps_the_tokens_of_a_step(tmp_path):
    first = config(task="docs", batch_size=128, micro_batch_size=4, context_length=2048, weight_decay=0.05)
    first.finetune = Finetune(steps=3, context_length=4096, warmup_steps=1)
    before, after = stages(first, make_run(tmp_path))
    assert before is first
    assert (after.batch_size, after.micro_batch_size, after.context_length) == (64, 2, 4096)
    assert (after.steps, after.weight_decay, after.warmup_steps, after.lr) == (3, 0.0, 1, first.lr)
    assert after.model.rope_theta == 500_000.0
    assert first.model.rope_theta == 100_000.0


# ---- batches --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["findblock", "docs"])
def test_processes_share_out_the_batch_of_one(task, small_library):
    from papers.mta.tasks import training_batches

    def rows(step, world_size):
        parts = [training_batches(config(task=task), None, 5, rank, world_size) for rank in range(world_size)]
        return sorted(tuple(row.tolist()) for part in parts for row in part.take(step)["input_ids"])

    for step in (0, 1, 40):
        assert rows(step, 1) == rows(step, 2) == rows(step, 4)
    assert rows(0, 1) != rows(1, 1)
    with pytest.raises(UserError, match="multiple of the 3 processes"):
        rows(0, 3)


def test_each_epoch_shows_every_sequence_once_in_a_new_order(small_library):
    from papers.mta.tasks import load_docs, training_batches

    settings = config(task="docs", batch_size=4)
    docs = load_docs(settings)
    n = len(docs.train_ids)
    batches = training_batches(settings, None, 5, 0, 1)
    seen = [tuple(r.tolist()) for step in range(-(-2 * n // 4)) for r in batches.take(step)["input_ids"]]
    everything = sorted(tuple(row.tolist()) for row in docs.train_ids)
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == everything
    assert seen[:n] != seen[n : 2 * n]


@pytest.mark.parametrize("attention", ["transformer", "diff", "talking_heads", "mta"])
def test_training_attends_across_packed_documents_in_every_arm(attention, small_library):
    """As the paper's does: where a document ends nothing is reset."""
    from papers.mta.tasks import build_model, tokenizer_of, training_batches

    settings = config({"attention": attention}, task="docs", context_length=60)
    tokenizer = tokenizer_of(settings)
    batch = training_batches(settings, tokenizer, 5, 0, 1).take(0)
    assert batch.keys() == {"input_ids", "labels"}
    model = build_model(settings, tokenizer).eval()
    text = tokenizer("list of<eos><bos>the key", return_tensors="pt")["input_ids"]
    assert tokenizer.eos_token_id in text
    changed = text.clone()
    changed[0, 0] = tokenizer.pad_token_id  # a token like another: batches have no attention mask
    with torch.no_grad():
        difference = model(input_ids=text).logits[0, -1] - model(input_ids=changed).logits[0, -1]
    assert difference.abs().max() > 1e-4


def test_needle_documents_are_a_share_of_training_and_learnt_whole(small_library):
    from papers.mta.tasks import load_docs

    docs = load_docs(config(task="docs", context_length=120, needle_share=0.2, needles=[2]))
    with_needle = [("magic number" in docs.tokenizer.decode(row)) for row in docs.train_ids]
    assert sum(with_needle) == round(0.2 * len(with_needle))
    for ids, labels in zip(docs.train_ids, docs.train_labels, strict=True):
        real = ids != docs.tokenizer.pad_token_id
        assert torch.equal(ids[real], labels[real])
        assert (labels[~real] == -100).all()
    last = docs.tokenizer.decode(docs.train_ids[-1], skip_special_tokens=True)
    *_, (city, number) = re.findall(r"magic number of (\w+) is (\d+)", last)
    assert last.count(f"number of {city} is {number}") == 2  # hidden, and answered


def test_the_corpus_is_built_once(small_library, monkeypatch):
    from papers.mta import tasks

    first = tasks.load_docs(config(task="docs"))
    monkeypatch.setattr(tasks, "build_docs", None)
    again = tasks.load_docs(config(task="docs"))
    assert torch.equal(first.train_ids, again.train_ids)
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    with pytest.raises(TypeError):  # other settings are another corpus
        tasks.load_docs(config(task="docs", context_length=25))


# ---- optimization ---------------------------------------------------------------------------------------------------
def test_micro_batches_add_up_to_the_batch():
    from accelerate import Accelerator

    from papers.mta.tasks import build_model, tokenizer_of, training_batches
    from papers.mta.train import optimizer_step

    settings = config({"attention": "mta"}, clip=1e9)
    model = build_model(settings, tokenizer_of(settings)).double()
    batch = training_batches(settings, None, 5, 0, 1).take(0)
    found = []
    for size in (None, 1, 3):
        settings.micro_batch_size = size
        copied = copy.deepcopy(model)
        loss = optimizer_step(settings, batch, copied, torch.optim.SGD(copied.parameters(), lr=1.0), Accelerator())
        found.append((loss, torch.cat([p.detach().flatten() for p in copied.parameters()])))
    for loss, parameters in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)  # the loss is computed in float32
        torch.testing.assert_close(parameters, found[0][1], rtol=1e-5, atol=1e-6)


def test_kernels_decay_like_everything_else_or_as_told():
    """Trap: in the paper's recipe decay pulls the kernels away from the identity."""
    from papers.mta.tasks import build_model, tokenizer_of
    from papers.mta.train import new_optimizer

    shrunk = {}
    for kernel_decay in (None, 0.0, 0.2):
        settings = config({"attention": "mta"}, weight_decay=0.1, kernel_weight_decay=kernel_decay, lr=0.5)
        model = build_model(settings, tokenizer_of(settings))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        new_optimizer(settings, model).step()
        for name, parameter in model.named_parameters():
            expected = kernel_decay if ".kernels." in name and kernel_decay is not None else 0.1
            torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * expected))
        shrunk[kernel_decay] = model.model.layers[1].self_attn.kernels["kq_pre"].max().item()
    assert shrunk == pytest.approx({None: 0.95, 0.0: 1.0, 0.2: 0.9})


def test_a_loss_that_is_not_finite_ends_training(tmp_path):
    from papers.mta.train import train

    with pytest.raises(UserError, match="lower lr"):
        train(config(lr=1e30, clip=1e30), make_run(tmp_path))


@pytest.mark.parametrize(
    ("settings", "stop_at"),
    [
        ({"model": {"attention": "mta", "attention_dropout": 0.3}}, 3),
        ({"task": "docs", "model": {"attention": "diff"}, "finetune": Finetune(steps=4, context_length=30)}, 3),
        ({"task": "docs", "finetune": Finetune(steps=5, context_length=24, retrofit=True)}, 8),
    ],
    ids=["dropout", "first of two stages", "second of two stages"],
)
def test_training_goes_on_after_a_kill_as_if_nothing_had_been(settings, stop_at, tmp_path, monkeypatch, small_library):
    from papers.mta import train

    whole = train.train(config(**settings), make_run(tmp_path / "whole"))

    taken = 0
    step = train.optimizer_step

    def stopping(*args):
        nonlocal taken
        taken += 1
        if taken == stop_at + 2:  # one step after the last save is lost
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "optimizer_step", stopping)
    monkeypatch.setattr(Run, "due", lambda self, every=0.0: taken == stop_at)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(**settings), make_run(tmp_path / "killed"))
    assert not (tmp_path / "killed" / "checkpoint").exists()
    monkeypatch.setattr(train, "optimizer_step", step)
    monkeypatch.setattr(Run, "due", lambda self, every=0.0: False)
    resumed = train.train(config(**settings), make_run(tmp_path / "killed", seed=5))

    assert resumed == whole
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    expected, found = weights(tmp_path / "whole" / "checkpoint"), weights(tmp_path / "killed" / "checkpoint")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_streams_of_text_go_on_where_they_were(tmp_path, slimpajama):
    from papers.mta.tasks import training_batches

    settings = config(task="slimpajama", dataset=str(slimpajama), tokenizer="given")
    tokenizer = fixture_tokenizer()
    batches = training_batches(settings, tokenizer, 5, 0, 1)
    expected = [batches.take(step)["input_ids"] for step in range(6)]
    batches = training_batches(settings, tokenizer, 5, 0, 1)
    for step in range(3):
        batches.take(step)
    state = copy.deepcopy(batches.state_dict())
    batches = training_batches(settings, tokenizer, 5, 0, 1)
    batches.load_state_dict(state)
    for step in range(3, 6):
        assert torch.equal(batches.take(step)["input_ids"], expected[step])
    batches.size = 10_000
    with pytest.raises(UserError, match="the data end before step 7"):
        batches.take(6)


# ---- several processes ----------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_two_processes_train_the_model_of_one(how, tmp_path):
    from papers.mta.train import train

    arguments = ["--arm", "first_mta", "--seed", "7"]
    settings = ["n_test=4", "steps=6", "batch_size=8", "n_dev=4", "eval_every=3", "model.hidden_size=32"]
    script = {"replicated": ["-m", "papers.mta.train"], "sharded": ["tests/papers/mta/sharded_train.py"]}[how]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    stage_main("train", Config, train, [*arguments, "--out", str(tmp_path / "one"), *settings])
    command = [sys.executable, *torchrun, *script, *arguments, "--out", str(tmp_path / "two"), *settings]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (weights(tmp_path / out / "checkpoint") for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "two" / "checkpoint" / "config.json").read_text())["architectures"] == [
        "MTAForCausalLM"
    ]


# ---- the configs of the larger scales, with small models and a few rows of data -------------------------------------
DOMAINS = ("CommonCrawl", "C4", "Github", "Book", "ArXiv", "Wikipedia", "StackExchange")


@pytest.fixture
def slimpajama(tmp_path):
    """A directory of SlimPajama's rows as they are on the hub."""
    rng = np.random.default_rng(1)
    words = ["the", "river", "model", "def", "return", "proof", "lemma.", "asked", "answer.", "history", "\n"]

    def rows(n):
        for i in range(n):
            for domain in DOMAINS:
                text = " ".join(rng.choice(words, 60))
                yield {"text": text, "meta": {"redpajama_set_name": f"RedPajama{domain}"}, "__index_level_0__": i}

    directory = tmp_path / "slimpajama"
    directory.mkdir()
    files.write_jsonl(directory / "train.jsonl", rows(60))
    files.write_jsonl(directory / "validation.jsonl", rows(8))
    return directory


@pytest.fixture
def babilong(tmp_path):
    """A directory like BabiLong's configurations and splits."""
    for length in ("0k", "4k"):
        for task in ("qa1", "qa2"):
            path = tmp_path / "babilong" / length / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            places = ["garden", "office", "kitchen", "hallway"]
            rows = [{"input": f"Mary went to the {p}.", "question": "Where is Mary?", "target": p} for p in places]
            files.write_jsonl(path, rows)
    return tmp_path / "babilong"


def fixture_tokenizer():
    from papers.mta.data import train_tokenizer

    return train_tokenizer(["the river and the model of the answer to the magic number of a garden"] * 4, 300)


@pytest.fixture
def llama(tmp_path):
    """A Llama 3 checkpoint, only smaller: grouped queries, its rotary scaling, its kind of tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = fixture_tokenizer()
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=scaling,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


SMALLER = [
    "model.hidden_size=32",
    "model.num_hidden_layers=4",
    "model.num_attention_heads=4",
    "model.intermediate_size=48",
    "steps=3",
    "eval_every=2",
    "batch_size=4",
    "micro_batch_size=2",
    "warmup_steps=1",
]
FEW_LINES = ["n_blocks=6", "n_test=4", "n_dev=2", "model.kq_layers=[0,1]"]
SHORT = ["context_length=32", "n_validation=8", "n_dev=1", "finetune.context_length=64", "finetune.steps=2"]


@pytest.mark.parametrize(
    ("scale", "arm", "overrides"),
    [
        ("gpu", "first_mta", FEW_LINES),
        ("gpu", "all_transformer", FEW_LINES),
        ("paper", "all8_mta", FEW_LINES),
        ("paper", "all_transformer_eval_dropout", FEW_LINES),
        ("gpu", "lm_mta", ["context_length=320", "n_validation=2", "n_dev=1", "vocab_size=300", "needle_samples=2"]),
        ("gpu", "lm_retrofit_mta", [*SHORT, "vocab_size=300", "model.kq_layers=[2]"]),
        ("paper", "lm_mta", SHORT),
        ("paper", "lm_diff_1b", SHORT),
        ("paper", "llama_1b_mta", SHORT[:3]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_larger_scales_train_and_evaluate(
    scale, arm, overrides, tmp_path, monkeypatch, small_library, slimpajama, babilong, llama
):
    from papers.mta import eval as evaluation
    from papers.mta import train

    overrides = [*SMALLER, *overrides]
    if arm == "lm_mta" and scale == "gpu":
        overrides.append("model.kq_layers=[2]")
    if scale == "paper" and "lm" in arm.split("_") + ["lm"] * arm.startswith("llama"):
        overrides += [f"dataset={slimpajama}", "harness=[]"]
        if arm.startswith("lm"):
            overrides += [
                f"tokenizer={llama}",
                f"babilong={babilong}",
                "babilong_lengths=[0k,4k]",
                "babilong_tasks=[qa1,qa2]",
                "needles=[1]",
                "finetune.context_length=256",
                "needle_contexts=[200]",
                "needle_samples=2",
            ]
        else:
            overrides.append(f"init_from={llama}")
    arguments = ["--scale", scale, "--arm", arm, "--out", str(tmp_path / "run"), *overrides]
    stage_main("train", Config, train.train, arguments)
    stage_main("eval", Config, evaluation.evaluate, arguments)

    record = files.read_json(tmp_path / "run" / "eval.json")
    metrics, settings = record["metrics"], record["config"]
    rows = files.read_jsonl(tmp_path / "run" / "predictions.jsonl")
    trained = json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())
    if settings["task"] == "findblock":
        assert len(rows) == 4 * settings["n_queries"]
        assert all(row["scores"]["error"] == (row["output"] != row["expected"]) for row in rows)
        return
    domains = 7 if scale == "paper" else 1
    kinds = {row["item"].rpartition("-")[0] for row in rows if "nll" in row["scores"]}
    assert len(kinds) == domains
    assert metrics["perplexity"] > 1
    if arm in ("lm_retrofit_mta", "llama_1b_mta"):
        assert trained["attention"] == "mta"
        assert files.read_json(tmp_path / "run" / "kernels.json")
    if settings["finetune"]["steps"]:
        assert "pretrained_perplexity" in metrics
        assert trained["rope_parameters"]["rope_theta"] == settings["finetune"]["rope_theta"]
    if settings["needles"]:
        assert 0 <= metrics[f"needles_{settings['needles'][-1]}"] <= 1
    if scale == "paper" and arm.startswith("lm"):
        assert {"babilong_0k", "babilong_4k", "babilong_qa2_4k", "perplexity_arxiv"} <= metrics.keys()
