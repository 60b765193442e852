"""Starting policies: made once, whole or not at all; supervised fine-tuning on completions alone."""

import functools
import threading
import time

import pytest
import torch

from shared.experiments.errors import UserError
from shared.training.starting_policy import measured, sft, starting_policy


def test_all_arms_of_a_seed_share_one_policy(make_run):
    built = []

    def build(directory):
        built.append(directory)
        (directory / "weights").write_text("w")
        return {"accuracy": 0.25}

    first = starting_policy(make_run("a"), {"steps": 3}, build, seed=0)
    second = starting_policy(make_run("b"), {"steps": 3}, build, seed=0)
    assert first == second
    assert len(built) == 1
    assert (first / "weights").read_text() == "w"
    assert measured(first) == {"accuracy": 0.25}
    others = {starting_policy(make_run("a"), {"steps": n}, build, seed=s) for n, s in ((3, 1), (4, 0))}
    assert len(others | {first}) == len(built) == 3


def build_with(directory, note):
    (directory / "note").write_text(note)
    return {}


def test_a_partial_function_will_do(make_run):
    built = starting_policy(make_run(), {"note": "n"}, functools.partial(build_with, note="n"), seed=0)
    assert (built / "note").read_text() == "n"


def test_who_comes_second_waits(make_run):
    built = []

    def build(directory):
        built.append(1)
        time.sleep(0.3)
        return {}

    # The lock belongs to the open file, so threads exclude each other as processes do.
    threads = [
        threading.Thread(target=starting_policy, args=(make_run(arm), {}, build), kwargs={"seed": 0}) for arm in "abc"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_a_failed_gate_or_a_crash_leaves_nothing_behind(make_run):
    def build(directory):
        (directory / "half").write_text("")
        if not fixed:
            raise UserError("accuracy is .1, the experiment needs .3")
        assert [path.name for path in directory.iterdir()] == ["half"]
        return {}

    fixed = False
    with pytest.raises(UserError, match=r"needs \.3"):
        starting_policy(make_run(), {}, build, seed=0)
    fixed = True
    assert starting_policy(make_run(), {}, build, seed=0).is_dir()


def test_the_loss_is_that_of_completions_and_their_end_alone(model, tokenizer, tmp_path):
    examples = [("1 + 2 =", "3"), ("4 + 4 + 1 =", "9 9"), ("0 =", "0")]
    total, count = 0.0, 0
    with torch.no_grad():
        for prompt, completion in examples:
            ids = tokenizer(f"{prompt} {completion}")["input_ids"] + [tokenizer.eos_token_id]
            logprobs_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            start = len(tokenizer(prompt)["input_ids"])
            total -= sum(logprobs_TV[t - 1, ids[t]].item() for t in range(start, len(ids)))
            count += len(ids) - start
    loss = sft(model, tokenizer, examples, directory=tmp_path, steps=1, batch_size=3, lr=0.0, seed=0)
    assert loss == pytest.approx(total / count, rel=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_token_ids_are_the_tokenizers():
    """Also of a tokenizer that was saved with padding and truncation switched on."""
    from shared.training.starting_policy import _token_ids
    from tests.tiny_chat import chat_tokenizer

    tokenizer = chat_tokenizer("llama")
    texts = ("a b", "", "a b c " * 9)
    expected = tokenizer(list(texts))["input_ids"]
    assert len(set(map(len, expected))) == 3
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert _token_ids(tokenizer, texts) == expected


def test_batches_are_those_of_trls_collator():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from shared.training.starting_policy import collate

    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    expected, found = DataCollatorForLanguageModeling(pad_token_id=3)(rows), collate(rows, pad_id=3)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


def test_it_learns(model, tokenizer, tmp_path):
    examples = [(f"{a} =", f"{(a + 3) % 10}") for a in range(10)]
    loss = sft(model, tokenizer, examples, directory=tmp_path, steps=60, batch_size=10, lr=2e-2, seed=0)
    assert loss < 0.1
