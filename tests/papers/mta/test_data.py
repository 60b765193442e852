import json
import zlib
from collections import Counter

import numpy as np
import pytest
import torch

from shared.experiments import UserError

# ---- find-block ------------------------------------------------------------------------------------------------------
TASKS = [
    {"answer": answer, "block_size": n, "n_blocks": 50} for answer in ("all", "first", "last") for n in (5, 8)
] + [
    {"answer": "first", "block_size": 3, "n_blocks": 8, "n_queries": 4},
    {"answer": "last", "block_size": 2, "n_blocks": 40},
    {"answer": "all", "block_size": 4, "n_blocks": 12, "min_blocks": 5, "n_queries": 3, "query_size": 3},
]  # fmt: skip


def task_name(settings):
    return "-".join(f"{k}={v}" for k, v in settings.items())


@pytest.mark.parametrize("settings", TASKS, ids=task_name)
def test_find_block_sequences_are_what_the_paper_describes(settings):
    """Every sequence, read as a person would."""
    from papers.mta.data import FindBlock, letter_tokenizer

    task = FindBlock(**settings)
    batch = task.test_batch(40, seed=3)
    assert batch.input_ids.shape == (40, task.length)
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        text = letter_tokenizer().decode(ids)
        assert text.startswith("<bos>")
        body, padding = text.removeprefix("<bos>").split("<eos>")
        assert padding.replace("<pad>", "") == ""
        context, *queries = body.split("#")
        blocks = context.split(".")
        assert (task.min_blocks or task.n_blocks) <= len(blocks) <= task.n_blocks
        assert all(len(b) == len(set(b)) == task.block_size for b in blocks), "whole blocks of distinct letters"
        assert len(set(blocks)) == len(blocks)
        answers = []
        assert len(queries) == task.n_queries
        for query in queries:
            letters, answer = query[: task.query_size], query[task.query_size :]
            assert len(set(letters)) == task.query_size
            (block,) = [b for b in blocks if set(letters) <= set(b)]
            assert answer == {"all": block, "first": block[0], "last": block[-1]}[task.answer]
            answers.append(answer)
        learnt = letter_tokenizer().decode(labels[labels != -100])
        assert learnt == "".join(answers) + "<eos>"
        assert torch.equal(labels[labels != -100], ids[labels != -100])


def test_find_block_favours_no_block_and_no_letter():
    from papers.mta.data import FindBlock, letter_tokenizer

    batch = FindBlock(answer="first", block_size=3, n_blocks=4).test_batch(8000)
    where, order = Counter(), Counter()
    for text in letter_tokenizer().batch_decode(batch.input_ids):
        context, query = text.removeprefix("<bos>").removesuffix("<eos>").split("#")
        (target,) = [i for i, b in enumerate(context.split(".")) if set(query[:2]) <= set(b)]
        block = context.split(".")[target]
        where[target] += 1
        order[block.index(query[0]), block.index(query[1])] += 1
    # 8000 draws: 5 standard deviations around the uniform counts
    assert all(abs(where[i] - 2000) < 5 * (8000 * 1 / 4 * 3 / 4) ** 0.5 for i in range(4))
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    assert all(abs(order[p] - 8000 / 6) < 5 * (8000 * 1 / 6 * 5 / 6) ** 0.5 for p in pairs)
    assert sum(order.values()) == 8000


def test_find_block_is_fixed_by_the_seed_and_never_tests_on_training_data():
    from papers.mta.data import FindBlock

    task = FindBlock(block_size=3, n_blocks=4)
    first, again, other = (next(task.batches(16, seed)).input_ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    stream = task.batches(16, 1)
    seen = {tuple(row.tolist()) for _ in range(50) for row in next(stream).input_ids}
    assert len(seen) == 800
    assert not seen & {tuple(row.tolist()) for row in task.test_batch(500, seed=1).input_ids}


def test_find_block_errors_count_wrong_answers_only():
    from papers.mta.data import FindBlock

    batch = FindBlock(answer="all", block_size=3, n_blocks=4, n_queries=2).test_batch(5)
    following = torch.roll(batch.input_ids, -1, dims=1)
    logits = torch.nn.functional.one_hot(following, 32).float()
    assert not batch.errors(logits).any()

    answers = [(batch.query_of[0] == q).nonzero().flatten() for q in range(2)]
    logits[0, answers[1][2] - 1] = 0.0
    logits[0, answers[1][2] - 1, 5 if following[0, answers[1][2] - 1] != 5 else 6] = 1.0
    logits[1, :10] = 0.0  # nothing asked there
    end = (batch.input_ids[2] == 2).nonzero().item()
    logits[2, end - 1] = 0.0  # <eos> isn't part of the answer
    expected = torch.zeros(5, 2, dtype=torch.bool)
    expected[0, 1] = True
    assert torch.equal(batch.errors(logits), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"answer": "middle"},
        {"block_size": 26},
        {"block_size": 1},
        {"n_blocks": 0},
        {"n_blocks": 4, "min_blocks": 5},
        {"n_queries": 0},
    ],
    ids=task_name,
)
def test_impossible_tasks_are_refused(settings):
    from papers.mta.data import FindBlock

    with pytest.raises(ValueError, match=next(iter(settings))):
        FindBlock(**settings)


def test_a_task_without_unambiguous_queries_says_so():
    from papers.mta.data import FindBlock

    with pytest.raises(ValueError, match="unambiguous"):
        FindBlock(block_size=25, n_blocks=4, query_size=1, n_queries=8).test_batch(4)


def test_letter_tokenizer_has_32_tokens_and_round_trips(tmp_path):
    from transformers import AutoTokenizer

    from papers.mta.data import letter_tokenizer

    letter_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (letter_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == 32
        ids = tokenizer("abc.xyz#by")["input_ids"]
        assert len(ids) == 10
        assert tokenizer.decode(ids) == "abc.xyz#by"
        assert tokenizer("A")["input_ids"] == [tokenizer.unk_token_id]


# ---- documentation ---------------------------------------------------------------------------------------------------
def held_out(name):
    return zlib.crc32(name.encode()) % 10 == 0


def test_no_docstring_is_in_both_splits(monkeypatch):
    from papers.mta import data

    names = [f"m{i}.py" for i in range(100)]
    kept, reserved = ([n for n in names if held_out(n) is out][:2] for out in (False, True))
    sources = {
        kept[0]: '"""Only here."""\ndef f():\n    """Copied."""\n    return "not a docstring"\n',
        kept[1]: '"""Copied."""\n',
        reserved[0]: '"""Held out."""\nclass C:\n    def f(self):\n        """Copied."""\n',
        reserved[1]: "x = 1\n",
    }
    monkeypatch.setattr(data, "_standard_library", lambda: iter(sources.items()))
    monkeypatch.setattr(data, "_topics", dict)
    train, validation = data.docs_corpus()
    assert [(d.name, d.text) for d in train] == [(kept[0], "Only here.")]
    assert [(d.name, d.text) for d in validation] == [(reserved[0], "Held out.\n\nCopied.")]


def test_documentation_of_python_is_enough_for_a_small_model():
    from papers.mta.data import docs_corpus

    train, validation = docs_corpus()
    assert sum(len(d.text) for d in train) > 1_000_000
    assert 0.05 < sum(len(d.text) for d in validation) / sum(len(d.text) for d in train) < 0.25
    names = {d.name for d in train}
    assert {"topic:for", "argparse.py"} <= names | {d.name for d in validation}
    assert not names & {d.name for d in validation}
    assert all(held_out(d.name) for d in validation)
    assert not any("/test/" in f"/{name}" or "site-packages" in name for name in names)


def test_bpe_round_trips_any_text_and_compresses_what_it_learnt():
    from papers.mta.data import train_tokenizer

    text = "the attention of the attention " * 50
    tokenizer = train_tokenizer([text], 300)
    assert len(tokenizer) <= 300
    for sample in (text, "naïve 日本語 \t\n  code()\x00"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    assert len(tokenizer(text)["input_ids"]) < len(text) / 5
    with pytest.raises(ValueError, match="259"):
        train_tokenizer([text], 258)


@pytest.fixture
def byte_tokenizer():
    from papers.mta.data import train_tokenizer

    return train_tokenizer([], 259)


def test_packing_keeps_every_token_in_order(byte_tokenizer):
    from papers.mta.data import pack

    packed = pack(["abc", "defgh"], byte_tokenizer, 4)
    assert packed.shape == (3, 4)
    assert [byte_tokenizer.decode(row) for row in packed] == ["<bos>abc", "<eos><bos>de", "fgh<eos>"]
    assert pack(["abc", "defgh"], byte_tokenizer, 5).shape == (2, 5)
    with pytest.raises(UserError, match="lower context_length"):
        pack(["abc"], byte_tokenizer, 6)


# ---- SlimPajama ------------------------------------------------------------------------------------------------------
SHARES = {"RedPajamaC4": 0.8, "RedPajamaBook": 0.2}
MARKS = {"RedPajamaC4": "c", "RedPajamaBook": "b", "RedPajamaGithub": "g"}


@pytest.fixture
def slimpajama_file(tmp_path):
    """Rows with the dataset's columns: half of the text C4, a third books, and GitHub, which nobody asks for."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(600):
        domain = rng.choice(list(MARKS), p=[0.5, 0.3, 0.2])
        rows.append({"text": MARKS[domain] * int(rng.integers(1, 60)), "meta": {"redpajama_set_name": domain}})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream(path, tokenizer, **settings):
    from papers.mta.data import MixedText, load_rows

    settings = {"shares": SHARES, "seed": 5, "buffered": 2, **settings}
    return MixedText(load_rows(path, "train", streaming=True), tokenizer, 16, **settings)


def domains(sequences, tokenizer):
    """The domain of each sequence by its letters; fails where one mixes domains."""
    letters = [set(tokenizer.decode(s["input_ids"], skip_special_tokens=True)) for s in sequences]
    assert all(len(found) == 1 for found in letters)
    return [found.pop() for found in letters]


def test_mixed_text_has_the_shares_asked_for_not_those_of_the_data(slimpajama_file, byte_tokenizer):
    sequences = list(stream(slimpajama_file, byte_tokenizer))
    assert len(sequences) > 300
    assert all(s["input_ids"].shape == (16,) and torch.equal(s["input_ids"], s["labels"]) for s in sequences)
    counts = Counter(domains(sequences, byte_tokenizer))
    assert set(counts) == {"c", "b"}
    share = counts["c"] / len(sequences)
    assert abs(share - 0.8) < 4 * (0.8 * 0.2 / len(sequences)) ** 0.5


def test_mixed_text_goes_on_where_it_stopped(slimpajama_file, byte_tokenizer):
    whole = [s["input_ids"].tolist() for s in stream(slimpajama_file, byte_tokenizer)]
    first = stream(slimpajama_file, byte_tokenizer)
    iterator = iter(first)
    begun = [next(iterator)["input_ids"].tolist() for _ in range(37)]
    second = stream(slimpajama_file, byte_tokenizer, seed=99)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [s["input_ids"].tolist() for s in second] == whole


def test_ranks_read_different_rows(tmp_path, byte_tokenizer):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"{i:012d}" + "." * 2, "meta": {"redpajama_set_name": "RedPajamaC4"}} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = []
    for rank in range(2):
        text = stream(str(path), byte_tokenizer, shares={"RedPajamaC4": 1.0}, rank=rank, world_size=2)
        read.append({byte_tokenizer.decode(s["input_ids"], skip_special_tokens=True) for s in text})
    assert len(read[0]) == len(read[1]) == 20
    assert not read[0] & read[1]


def test_validation_has_as_many_sequences_of_each_domain(slimpajama_file, byte_tokenizer):
    from papers.mta.data import domain_sequences, load_rows

    rows = load_rows(slimpajama_file, "train", streaming=True)
    sequences = domain_sequences(rows, byte_tokenizer, 16, 7, list(MARKS))
    for domain, ids in sequences.items():
        assert ids.shape == (7, 16)
        assert domains([{"input_ids": row} for row in ids], byte_tokenizer) == [MARKS[domain]] * 7
    with pytest.raises(UserError, match="RedPajamaArXiv"):
        domain_sequences(rows, byte_tokenizer, 16, 7, ["RedPajamaArXiv"])


def test_rows_that_are_not_slimpajamas_are_named(tmp_path, byte_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"content": "x", "source": "web"}\n')
    with pytest.raises(UserError, match="content, source"):
        list(stream(str(path), byte_tokenizer))


def test_a_dataset_out_of_reach_says_what_to_do(monkeypatch, tmp_path):
    import datasets

    from papers.mta.data import load_rows

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="hf download --repo-type dataset cerebras/SlimPajama-627B"):
        load_rows("cerebras/SlimPajama-627B", "train", streaming=True)
