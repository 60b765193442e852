import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from papers.coconut import tasks
from papers.coconut.config import Config
from papers.coconut.data import fact_table, facts_tokenizer, save_json
from papers.coconut.method import Batches, Curriculum, special_ids, tokenize_rows
from papers.coconut.prontoqa import prontoqa_rows
from papers.coconut.prosqa import balanced_rows, prosqa_rows
from papers.coconut.train import (
    Schedule,
    draw_batch,
    make_schedule,
    new_optimizer,
    optimizer_step,
    removed_tokens,
    resets,
    set_learning_rate,
)
from shared.experiments import UserError
from shared.experiments.paper import ROOT

SMALL = {"n_train": 70, "n_dev": 10, "n_test": 12, "batch_size": 16, "embedding_std": 0.2, "width": 16, "mlp_width": 16}


def config(**values) -> Config:
    return Config(**{**SMALL, "stage_steps": [4, 3, 3, 5], "lr": 1e-3, "heads": 2, **values})


def batches_of(arm: str, n: int = 70) -> Batches:
    tokenizer = facts_tokenizer()
    data = tokenize_rows(balanced_rows(n, "train"), tokenizer)
    return Batches(data, Curriculum(arm), special_ids(tokenizer))


# ---- schedule -----------------------------------------------------------------------------------------------------


def test_stages_follow_each_other():
    schedule = make_schedule(config(), 70)
    assert [schedule.stage(step) for step in range(15)] == [0] * 4 + [1] * 3 + [2] * 3 + [3] * 5
    assert [step for step in range(15) if schedule.starts_stage(step)] == [0, 4, 7, 10]
    assert schedule.since_stage(8) == (1, 3)


@pytest.mark.parametrize("arm", ["cot", "no_cot", "no_curriculum", "pause"])
def test_arms_without_a_curriculum_take_as_many_steps(arm):
    schedule = make_schedule(config(method=arm), 70)
    assert schedule.ends == [15]
    assert {schedule.stage(step) for step in range(15)} == {0}


def test_epochs_become_steps():
    schedule = make_schedule(config(stage_steps=[], stage_epochs=[2, 1]), 70)  # 5 batches of up to 16
    assert schedule.ends == [10, 15]


def test_a_stage_without_steps_is_refused():
    with pytest.raises(UserError, match="at least one step"):
        make_schedule(config(stage_steps=[3, 0]), 70)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage_epochs": [1]}, "exactly one of stage_steps and stage_epochs"),
        ({"stage_steps": []}, "exactly one of stage_steps and stage_epochs"),
        ({"method": "cott"}, "method: 'cott' is not one of coconut, cot"),
        ({"task": "prosqa2"}, "task: 'prosqa2' is not one of balanced"),
        ({"task": "json"}, "needs train_file, dev_file and test_file"),
        ({"uniform_prob": 1.5}, "not a probability"),
    ],
)
def test_contradictions_in_the_config(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_an_epoch_shows_every_example_once():
    batches, schedule = batches_of("coconut"), make_schedule(config(), 70)
    first = np.concatenate([draw_batch(config(), batches, schedule, 7, step)[0] for step in range(5)])
    second = np.concatenate([draw_batch(config(), batches, schedule, 7, step)[0] for step in range(5, 10)])
    assert sorted(first) == sorted(second) == list(range(70))
    assert list(first) != list(second)


def test_batches_depend_on_seed_and_step_alone():
    batches, schedule, settings = batches_of("coconut"), make_schedule(config(), 70), config(uniform_prob=0.5)
    late = draw_batch(settings, batches, schedule, 3, 12)
    for step in range(12):
        draw_batch(settings, batches, schedule, 3, step)
    again = draw_batch(settings, batches, schedule, 3, 12)
    other = draw_batch(settings, batches, schedule, 4, 12)
    assert all((a == b).all() for a, b in zip(late, again, strict=True))
    assert (late[0] != other[0]).any()


def test_mixing_draws_stages_uniformly():
    batches, settings = batches_of("coconut"), config(uniform_prob=0.4, stage_steps=[4000])
    schedule = make_schedule(settings, 70)
    stages = np.array([draw_batch(settings, batches, schedule, 0, step)[1][0] for step in range(4000)])
    shares = np.bincount(stages, minlength=4) / 4000
    expected = [0.6 + 0.4 / 4, 0.1, 0.1, 0.1]  # three steps: stages 0..3
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_icot_removes_tokens_one_after_the_other():
    batches, schedule = batches_of("icot"), Schedule([10, 16, 22, 30], 5)
    removed = [removed_tokens(batches, schedule, step) for step in range(30)]
    assert removed[:11] == [0] * 11
    assert removed[22:] == [3] * 8  # all three tokens of the reasoning, from the last stage on
    assert sorted(removed) == removed
    assert set(removed) == {0, 1, 2, 3}
    new = [step for step in range(30) if resets(config(method="icot"), batches, schedule, step)]
    assert new == [0, *(step for step in range(1, 30) if removed[step] != removed[step - 1])]


@pytest.mark.parametrize(("rule", "expected"), [("stage", [0, 4, 7, 10]), ("epoch", [0, 5, 10]), ("never", [])])
def test_optimizer_resets(rule, expected):
    settings = config(reset_optimizer=rule)
    schedule = make_schedule(settings, 70)
    assert [step for step in range(15) if resets(settings, batches_of("coconut"), schedule, step)] == expected


def test_learning_rate_warms_up_in_each_stage():
    settings = config(stage_steps=[10, 10], warmup_steps=4, lr=1.0, lr_schedule="linear")
    schedule = make_schedule(settings, 70)
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    rates = []
    for step in range(20):
        set_learning_rate(settings, schedule, optimizer, step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:10] == rates[10:]
    assert rates[0] == pytest.approx(0.25)
    assert rates[9] == pytest.approx(1 - 0.9 * 9 / 10)


# ---- steps --------------------------------------------------------------------------------------------------------


def stepped(**values) -> list[torch.Tensor]:
    """Parameters after one optimizer step."""
    from accelerate import Accelerator

    from papers.coconut.tasks import load_model

    settings = config(**values)
    torch.manual_seed(0)
    model, _ = load_model(settings)
    batches = batches_of(settings.method)
    schedule = make_schedule(settings, 70)
    optimizer = new_optimizer(settings, model)
    optimizer_step(settings, batches, schedule, model, optimizer, Accelerator(), 0, 0)
    return [p.detach().clone() for p in model.parameters()]


def test_micro_batches_change_nothing():
    """In one stage all tails of this task are equally long, so the mean of means is the mean."""
    whole, parts = stepped(), stepped(micro_batch_size=5)
    assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(whole, parts, strict=True))


def test_thoughts_start_at_the_scale_of_embeddings():
    from papers.coconut.tasks import load_model

    torch.manual_seed(0)
    model, tokenizer = load_model(config(thought_scale=0.3, width=64))
    model.eval()
    embedded = model.get_input_embeddings()
    batches = Batches(tokenize_rows(balanced_rows(8, "dev"), tokenizer), Curriculum("coconut"), special_ids(tokenizer))
    thoughts = model(**batches.prompts(np.arange(8))).thoughts
    ratio = thoughts.norm(dim=-1).mean() / embedded.weight.norm(dim=-1).mean()
    assert 0.5 < ratio < 3
    assert embedded.weight is model.get_output_embeddings().weight


def test_markers_begin_with_one_embedding():
    from papers.coconut.tasks import load_model

    model, tokenizer = load_model(config())
    rows = model.get_input_embeddings().weight[
        tokenizer.convert_tokens_to_ids(["<bot>", "<eot>", "<latent>", "<pause>"])
    ]
    assert (rows == rows[0]).all()
    assert (rows[0] != model.get_input_embeddings().weight[tokenizer.eos_token_id]).any()


def test_facts_enter_as_the_sum_of_their_nodes():
    from papers.coconut.tasks import load_model

    model, tokenizer = load_model(config())
    embedding = model.get_input_embeddings()
    a, fact, b = tokenizer.convert_tokens_to_ids(["n3", "n3>n7", "n7"])
    expected = embedding.weight[a] + embedding.destination.weight @ embedding.weight[b]
    torch.testing.assert_close(embedding(torch.tensor(fact)), expected)
    torch.testing.assert_close(embedding(torch.tensor(a)), embedding.weight[a])


def test_the_composed_embedding_has_the_gradients_of_its_definition():
    """In float64: the table of all tokens, looked up, against each position composed by itself."""
    from papers.coconut.facts_model import FactEmbedding

    torch.manual_seed(0)
    table = fact_table(facts_tokenizer())
    embedding = FactEmbedding(table.tolist(), 8).double()
    ids = torch.randint(len(table), (5, 40))
    source, destination = (torch.from_numpy(table[ids.numpy()][..., i]) for i in (0, 1))
    composed = embedding.weight[source] + embedding.weight[destination] @ embedding.destination.weight.T
    expected = torch.where((source >= 0)[..., None], composed, embedding.weight[ids])
    direction = torch.randn_like(expected)
    parameters = list(embedding.parameters())
    torch.testing.assert_close(embedding(ids), expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(e, parameters, direction) for e in (embedding(ids), expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# ---- rows -------------------------------------------------------------------------------------------------------


def test_many_generated_rows_are_kept_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "KEPT", tmp_path)
    monkeypatch.setattr(tasks, "KEEP_FROM", 20)
    settings = config(task="balanced", n_train=30)
    fresh = balanced_rows(30, "train")
    assert tasks.load_rows(settings, "train") == fresh
    tasks.load_rows(settings, "test")  # 12 rows: not worth it
    (kept,) = tmp_path.iterdir()
    made = kept.read_text()
    monkeypatch.setattr(tasks, "_rows", lambda *_: pytest.fail("made again"))
    assert tasks.load_rows(settings, "train") == fresh
    monkeypatch.undo()
    monkeypatch.setattr(tasks, "KEPT", tmp_path)
    monkeypatch.setattr(tasks, "KEEP_FROM", 20)
    kept.write_text(made[: len(made) // 2])
    assert tasks.load_rows(settings, "train") == fresh
    assert kept.read_text() == made


@pytest.mark.parametrize("task", ["prosqa", "prontoqa", "arith", "balanced_text"])
def test_a_vocabulary_that_does_not_depend_on_the_rows_has_all_their_words(task):
    settings = config(task=task, n_train=150)
    _, tokenizer = tasks.load_model(settings)
    rows = tasks.load_rows(settings, "train")
    assert len(tokenize_rows(rows, tokenizer)) == 150  # an unknown word is an error
    assert len(tokenizer) == len(tasks.load_model(config(task="prosqa"))[1])


# ---- models and checkpoints that will not do ---------------------------------------------------------------------


def test_models_and_checkpoints_that_will_not_do(tmp_path):
    from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

    settings = config(task="prosqa", n_train=5)
    model, tokenizer = tasks.load_model(settings)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    bases = {
        "bert": BertLMHeadModel(BertConfig(**sizes, num_attention_heads=2)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)),
        "damaged": model,
    }
    for name, base in bases.items():
        base.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    def complaint(model: str | None = None, checkpoint=None) -> str:
        with pytest.raises(UserError) as caught:
            tasks.load_model(config(task="prosqa", model=model), checkpoint)
        return str(caught.value)

    assert complaint(str(tmp_path / "none")).startswith(f"model={tmp_path}/none: no checkpoint there")
    assert "needs a decoder-only causal language model, got BertLMHeadModel" in complaint(str(tmp_path / "bert"))
    assert complaint(str(tmp_path / "damaged")).startswith(f"model={tmp_path}/damaged: ")
    assert "is not a Coconut checkpoint" in complaint(checkpoint=tmp_path / "gpt2")
    assert complaint(checkpoint=tmp_path / "damaged").startswith(f"{tmp_path}/damaged: ")


# ---- whole stages -------------------------------------------------------------------------------------------------

TRAIN = """
import sys
from papers.coconut import train
from shared.experiments import stage_main
from shared.experiments.run import Run
Run.due = lambda self, every=20.0: True  # save after every step, so that a kill finds something to resume from
stage_main("train", train.Config, train.train, sys.argv[1:])
"""
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def stage(name: str, directory, *arguments: str, wait: bool = True):
    command = [sys.executable, "-c", TRAIN] if name == "train" else [sys.executable, "-m", f"papers.coconut.{name}"]
    process = subprocess.Popen(
        [*command, "--out", str(directory), *arguments], cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True
    )
    if wait:
        _, errors = process.communicate()
        return process.returncode, errors
    return process


def metrics(directory, name: str) -> dict:
    return json.loads((directory / f"{name}.json").read_text())["metrics"]


@pytest.mark.slow
def test_killed_training_ends_as_if_nothing_had_happened(tmp_path):
    arguments = ("--scale", "smoke", "--arm", "coconut", "--seed", "5", "n_train=64", "thoughts=[1]")
    through, killed = tmp_path / "through", tmp_path / "killed"
    assert stage("train", through, *arguments)[0] == 0

    process = stage("train", killed, *arguments, wait=False)
    log = killed / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "train.json").exists()
    assert (killed / "state.pt").exists()
    done_before = log.read_text().count("\n")
    assert done_before < 12  # it was killed midway

    assert stage("train", killed, *arguments)[0] == 0
    assert metrics(killed, "train") == metrics(through, "train")
    rows = [[json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()] for d in (through, killed)]
    assert [[r["step"], r["loss"]] for r in rows[0]] == [[r["step"], r["loss"]] for r in rows[1]]
    for directory in (through, killed):
        assert stage("eval", directory, *arguments)[0] == 0
    first, second = (metrics(d, "eval") for d in (through, killed))
    assert first.keys() == second.keys()
    assert {k: v for k, v in first.items() if k != "seconds_per_example"} == {
        k: v for k, v in second.items() if k != "seconds_per_example"
    }


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A directory with a GPT-2 of two layers and a byte-level BPE tokenizer, as openai-community/gpt2 has them."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    texts = [row["question"] for row in prosqa_rows(30, "train")] + ["<<12+3=15>> ### 1"] * 30
    bpe.train_from_iterator(texts, vocab_size=500, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(directory)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 1024}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The data files of configs/paper.yaml in their published formats, a few rows each."""
    directory = tmp_path_factory.mktemp("data")
    for name, make in (("prosqa", prosqa_rows), ("prontoqa", prontoqa_rows)):
        for split, ours in (("train", "train"), ("valid", "dev"), ("test", "test")):
            save_json(directory / f"{name}_{split}.json", make(6, ours))
    lines = [
        f"Tom has {a} pears and buys {a + 1}. How many?||<<{a}+{a + 1}={2 * a + 1}>> #### {2 * a + 1}" for a in range(6)
    ]
    for split in ("train", "valid"):
        (directory / f"gsm8k_aug_{split}.txt").write_text("\n".join(lines) + "\n")
    rows = [
        {
            "question": f"Tom has {a} pears and buys 1. How many?",
            "answer": f"{a}+1=<<{a}+1={a + 1}>>{a + 1}\n#### {a + 1}",
        }
        for a in range(5)
    ]
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "names", "epochs"),
    [
        ("coconut_mixed", ("prosqa_train.json", "prosqa_valid.json", "prosqa_test.json"), "[1,1,1,1,1,1,1]"),
        ("prontoqa_pause_as_thought", ("prontoqa_train.json", "prontoqa_valid.json", "prontoqa_test.json"), "[1,1,1]"),
        ("gsm8k_coconut", ("gsm8k_aug_train.txt", "gsm8k_aug_valid.txt", "test.jsonl"), "[1,1,1,1,1]"),
    ],
)
def test_the_papers_scale_runs_on_a_small_checkpoint(tmp_path, gpt2, files, arm, names, epochs):
    """Only paths, numbers of epochs and the length of answers differ from configs/paper.yaml."""
    paths = [f"{key}={files / name}" for key, name in zip(("train_file", "dev_file", "test_file"), names, strict=True)]
    arguments = ["--scale", "paper", "--arm", arm, f"model={gpt2}", *paths, f"stage_epochs={epochs}"]
    arguments += ["max_new_tokens=8", "latency_items=2"]
    for name in ("train", "eval"):
        code, errors = stage(name, tmp_path, *arguments)
        assert code == 0, errors
    found = metrics(tmp_path, "eval")
    assert 0 <= found["accuracy"] <= 1
    if arm == "coconut_mixed":
        assert {"accuracy_k0", "accuracy_k6", "top1_share_k1", "top1_share_k2"} <= found.keys()
        assert 6 <= found["tokens"] <= 14  # six thoughts and up to eight tokens
    if arm == "prontoqa_pause_as_thought":
        assert found["tokens"] <= 8  # pauses do not count


def test_mistakes_end_in_one_line(tmp_path, files):
    broken = tmp_path / "broken.json"
    broken.write_text('[{"question": "Is Ada a blix?", "steps": [], "answer": "yes"}]')
    paths = [f"{key}={broken}" for key in ("train_file", "dev_file", "test_file")]
    code, errors = stage("train", tmp_path / "run", "--arm", "cot", "task=json", *paths)
    assert code == 2
    assert errors.strip().splitlines()[-1].startswith(f"error: {broken}: row 0: key 'steps' must be a non-empty list")
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "train.json").exists()


def test_evaluation_without_training(tmp_path):
    code, errors = stage("eval", tmp_path / "run", "--scale", "smoke", "--arm", "cot")
    assert code == 2
    assert "nothing trained here yet" in errors
    assert "Traceback" not in errors
