import re

import numpy as np
import pytest
import torch
from scipy import stats

from papers.coconut.data import VOCABULARY, facts_tokenizer, word_tokenizer
from papers.coconut.method import (
    ARMS,
    IGNORE,
    Batches,
    Curriculum,
    add_special_tokens,
    draw_stages,
    extract_answer,
    format_example,
    icot_offsets,
    init_special_tokens,
    is_correct,
    special_ids,
    tokenize_rows,
)
from papers.coconut.prosqa import balanced_rows, prosqa_rows
from shared.experiments.errors import UserError

ROWS = [
    {"question": "q r ?", "steps": ["a1 a2", "b1", "c1 c2"], "answer": "y"},
    {"question": "q", "steps": ["d1 d2"], "answer": "z y"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(ROWS)


@pytest.fixture(scope="module")
def tokenized(tokenizer):
    return tokenize_rows(ROWS, tokenizer)


# c = 2, K = 2. Each sequence as the paper spells it out, thoughts as l, pauses as p; the loss is on what follows `|`.
# The first row has three steps, the second one.
FORMATS = [
    ("coconut", 0, "q r ? <bot> <eot> | a1 a2 b1 c1 c2 ### y <eos>", "q <bot> <eot> | d1 d2 ### z y <eos>"),
    ("coconut", 1, "q r ? <bot> l l <eot> | b1 c1 c2 ### y <eos>", "q <bot> l l <eot> | ### z y <eos>"),
    ("coconut", 2, "q r ? <bot> l l l l <eot> | c1 c2 ### y <eos>", "q <bot> l l l l <eot> | ### z y <eos>"),
    ("coconut", 3, "q r ? <bot> l l l l <eot> | ### y <eos>", "q <bot> l l l l <eot> | ### z y <eos>"),
    ("coconut", 9, "q r ? <bot> l l l l <eot> | ### y <eos>", "q <bot> l l l l <eot> | ### z y <eos>"),
    ("cot", 0, "q r ? | a1 a2 b1 c1 c2 ### y <eos>", "q | d1 d2 ### z y <eos>"),
    ("cot", 2, "q r ? | a1 a2 b1 c1 c2 ### y <eos>", "q | d1 d2 ### z y <eos>"),
    ("no_cot", 0, "q r ? | ### y <eos>", "q | ### z y <eos>"),
    ("no_cot", 3, "q r ? | ### y <eos>", "q | ### z y <eos>"),
    ("no_curriculum", 0, "q r ? <bot> l l l l <eot> | ### y <eos>", "q <bot> l l l l <eot> | ### z y <eos>"),
    ("no_curriculum", 3, "q r ? <bot> l l l l <eot> | ### y <eos>", "q <bot> l l l l <eot> | ### z y <eos>"),
    ("no_thought", 0, "q r ? | a1 a2 b1 c1 c2 ### y <eos>", "q | d1 d2 ### z y <eos>"),
    ("no_thought", 2, "q r ? | c1 c2 ### y <eos>", "q | ### z y <eos>"),
    ("no_thought", 3, "q r ? | ### y <eos>", "q | ### z y <eos>"),
    ("pause_as_thought", 0, "q r ? <bot> <eot> | a1 a2 b1 c1 c2 ### y <eos>", "q <bot> <eot> | d1 d2 ### z y <eos>"),
    ("pause_as_thought", 1, "q r ? <bot> p p <eot> | b1 c1 c2 ### y <eos>", "q <bot> p p <eot> | ### z y <eos>"),
    ("pause_as_thought", 3, "q r ? <bot> p p p p <eot> | ### y <eos>", "q <bot> p p p p <eot> | ### z y <eos>"),
    ("pause", 0, "q r ? p p p p | ### y <eos>", "q p p p p | ### z y <eos>"),
    ("pause", 3, "q r ? p p p p | ### y <eos>", "q p p p p | ### z y <eos>"),
    ("icot", 0, "q r ? | a1 a2 b1 c1 c2 ### y <eos>", "q | d1 d2 ### z y <eos>"),
    ("icot", 1, "q r ? | a2 b1 c1 c2 ### y <eos>", "q | d2 ### z y <eos>"),
    ("icot", 4, "q r ? | c2 ### y <eos>", "q | ### z y <eos>"),
    ("icot", 99, "q r ? | ### y <eos>", "q | ### z y <eos>"),
]


def spelled(tokenizer, ids, labels) -> str:
    """Tokens as in FORMATS, with the bar where labels begin."""
    names = {"<latent>": "l", "<pause>": "p"}
    words = [names.get(token, token) for token in tokenizer.convert_ids_to_tokens(ids)]
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert list(labels[start:]) == list(ids[start:])  # labels are not shifted, and none is missing after the first
    return " ".join([*words[:start], "|", *words[start:]])


@pytest.mark.parametrize(("arm", "stage", "first", "second"), FORMATS)
def test_formats(tokenizer, tokenized, arm, stage, first, second):
    curriculum = Curriculum(arm, c_thought=2, max_latent_stage=2)
    ids = special_ids(tokenizer)
    for row, expected in enumerate((first, second)):
        prefix, n_fillers, suffix, labels = format_example(tokenized, row, stage, curriculum, ids)
        filler = {"latent": ids.latent, "pause": ids.pause, None: None}[curriculum.filler]
        assert spelled(tokenizer, prefix + [filler] * n_fillers + suffix, labels) == expected


def test_every_arm_is_spelled_out():
    assert {arm for arm, *_ in FORMATS} == set(ARMS)


def test_without_padding_short_reasoning_gets_fewer_thoughts_after_the_last_step(tokenizer, tokenized):
    curriculum = Curriculum("coconut", c_thought=2, max_latent_stage=2, pad_latent_to_max=False)
    counts = {stage: [format_example(tokenized, row, stage, curriculum, special_ids(tokenizer))[1] for row in (0, 1)]
              for stage in (1, 2, 3)}  # fmt: skip
    assert counts == {1: [2, 2], 2: [4, 4], 3: [4, 2]}


@pytest.fixture(scope="module")
def many():
    """Rows of different lengths, also some without steps."""
    rows = prosqa_rows(40, "train")
    rows[7] = {**rows[7], "steps": []}
    tokenizer = word_tokenizer(rows)
    return rows, tokenizer, tokenize_rows(rows, tokenizer)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("pad_latent_to_max", [True, False])
def test_batches_hold_the_formats(many, arm, pad_latent_to_max):
    _, tokenizer, data = many
    ids = special_ids(tokenizer)
    curriculum = Curriculum(arm, c_thought=2, max_latent_stage=4, pad_latent_to_max=pad_latent_to_max)
    batches = Batches(data, curriculum, ids)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows_B = rng.integers(0, len(data), 6)
        stage_B = rng.integers(0, 7, 6) if arm != "icot" else rng.integers(0, 40, 6)
        batch = {key: tensor.numpy() for key, tensor in batches.train(rows_B, stage_B).items()}
        assert set(batch) == {"input_ids", "attention_mask", "position_ids", "labels"}
        first_thought = set()
        for i, (row, stage) in enumerate(zip(rows_B, stage_B, strict=True)):
            prefix, n_fillers, suffix, labels = format_example(data, int(row), int(stage), curriculum, ids)
            fillers = [getattr(ids, curriculum.filler)] * n_fillers if n_fillers else []
            sequence = prefix + fillers + suffix
            mask = batch["attention_mask"][i].astype(bool)
            real = np.flatnonzero(mask)
            assert (np.diff(real) == 1).all()  # pads on the outside only
            assert batch["input_ids"][i][mask].tolist() == sequence
            assert batch["labels"][i][mask].tolist() == labels
            assert batch["position_ids"][i][mask].tolist() == list(range(len(sequence)))
            assert (batch["input_ids"][i][~mask] == ids.pad).all()
            assert (batch["labels"][i][~mask] == IGNORE).all()
            assert (batch["position_ids"][i] < len(sequence)).all()
            assert (batch["position_ids"][i] >= 0).all()
            first_thought.add(int(real[0]) + len(prefix))
        assert len(first_thought) == 1  # one column for all first thoughts
        assert batch["attention_mask"][:, 0].any()
        assert batch["attention_mask"][:, -1].any()  # no column of pads alone


@pytest.mark.parametrize("arm", ARMS)
def test_prompts_are_the_formats_without_the_tail(many, arm):
    _, tokenizer, data = many
    ids = special_ids(tokenizer)
    for pad_latent_to_max in (True, False):
        curriculum = Curriculum(arm, c_thought=2, max_latent_stage=4, pad_latent_to_max=pad_latent_to_max)
        batches = Batches(data, curriculum, ids)
        rows_B = np.arange(9)
        for stage in (None, 0, 3):
            batch = batches.prompts(rows_B, stage, continuation=[11, 12])
            for row, row_ids, mask in zip(rows_B, batch["input_ids"], batch["attention_mask"], strict=True):
                at = curriculum.last_stage if stage is None else stage
                prefix, n_fillers, suffix, labels = format_example(data, int(row), at, curriculum, ids)
                head = suffix[: labels.count(IGNORE) - len(prefix) - n_fillers]
                fillers = [getattr(ids, curriculum.filler)] * n_fillers if n_fillers else []
                sequence = [*prefix, *fillers, *head, 11, 12]
                assert row_ids.tolist() == [ids.pad] * (len(row_ids) - len(sequence)) + sequence
                assert mask.tolist() == [0] * (len(row_ids) - len(sequence)) + [1] * len(sequence)


def test_a_prompt_and_its_training_sequence_agree(many):
    """What the model is asked at test time is how the last stage's training sequences begin."""
    _, tokenizer, data = many
    for arm in ARMS:
        batches = Batches(data, Curriculum(arm, c_thought=1, max_latent_stage=3), special_ids(tokenizer))
        last = 10**6 if arm == "icot" else 4
        for row in range(5):
            prompt = batches.prompts(np.array([row]))["input_ids"][0]
            sequence = batches.train(np.array([row]), 0 if arm == "cot" else last)
            assert sequence["input_ids"][0, : len(prompt)].tolist() == prompt.tolist()
            assert (sequence["labels"][0, : len(prompt)] == IGNORE).all()
            assert (sequence["labels"][0, len(prompt) :] != IGNORE).all()


def test_padding_changes_no_loss():
    """A batch's summed loss is that of its rows alone: masks, positions and labels fit together in the model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from papers.coconut.model import CoconutForCausalLM

    rows = balanced_rows(6, "train")
    tokenizer = facts_tokenizer()
    ids = special_ids(tokenizer)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=None)
    model = CoconutForCausalLM.from_base(GPT2LMHeadModel(config), latent_token_id=ids.latent).double().eval()
    batches = Batches(tokenize_rows(rows, tokenizer), Curriculum("coconut"), ids)
    stage_B = np.array([0, 3, 1, 2, 4, 2])

    def summed_loss(rows_B, stage_B) -> torch.Tensor:
        batch = batches.train(rows_B, stage_B)
        return model(**batch).loss * (batch["labels"] != IGNORE).sum()

    together = summed_loss(np.arange(6), stage_B)
    alone = sum(summed_loss(np.array([i]), stage_B[i]) for i in range(6))
    assert together.item() == pytest.approx(alone.item(), rel=1e-12)


def test_too_long_rows_are_named(many):
    rows, tokenizer, data = many
    longest = max(len(tokenizer.encode("\n".join([row["question"], *row["steps"], row["answer"]]))) for row in rows)
    # Coconut at stage 0: both markers, `###` and <eos> beside the text.
    limit = longest + 4
    batches = Batches(data, Curriculum("coconut", c_thought=1, max_latent_stage=3), special_ids(tokenizer))
    batches.check_positions(limit)
    with pytest.raises(UserError, match=rf"data: row \d+ takes up to {limit} positions .* the model has {limit - 1}"):
        batches.check_positions(limit - 1)
    # A step has 6 tokens or fewer, so with 8 thoughts for each the late stages are the longest.
    batches = Batches(data, Curriculum("coconut", c_thought=8, max_latent_stage=3), special_ids(tokenizer))
    with pytest.raises(UserError, match=r"with up to 24 thoughts.*lower c_thought or max_latent_stage"):
        batches.check_positions(limit)
    longest_seen = max(
        batches.train(np.array([row]), stage)["input_ids"].shape[1] for row in range(len(data)) for stage in range(5)
    )
    batches.check_positions(longest_seen)
    with pytest.raises(UserError):
        batches.check_positions(longest_seen - 1)


# ---- stages -------------------------------------------------------------------------------------------------------


def test_stage_mixing():
    rng = np.random.default_rng(0)
    n_steps_B = np.repeat([1, 3], 20_000)
    assert (draw_stages(rng, 2, n_steps_B, 0.0) == 2).all()
    # With probability .4 uniform on 0..n_steps, else stage 2.
    stages = draw_stages(rng, 2, n_steps_B, 0.4)
    for n_steps, probability in ((1, [0.2, 0.2, 0.6, 0]), (3, [0.1, 0.1, 0.7, 0.1])):
        counts = np.bincount(stages[n_steps_B == n_steps], minlength=4)
        possible = np.array(probability) > 0
        assert counts[~possible].sum() == 0
        assert stats.chisquare(counts[possible], 20_000 * np.array(probability)[possible]).pvalue > 1e-4


def test_stage_mixing_per_batch():
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(3000):
        stages = draw_stages(rng, 2, np.array([1, 3, 2]), 0.4, per_batch=True)
        assert stages.shape == (3,)
        assert len(set(stages.tolist())) == 1
        drawn.append(stages[0])
    assert stats.chisquare(np.bincount(drawn), 3000 * np.array([0.1, 0.1, 0.7, 0.1])).pvalue > 1e-4


def test_icot_offsets():
    rng = np.random.default_rng(0)
    assert (icot_offsets(rng, 50, smoothing=50) == 0).all()
    weights = np.exp(-np.arange(30.0))  # P(o) ∝ exp(-o)
    counts = np.bincount(icot_offsets(rng, 40_000, smoothing=1.0).clip(max=5), minlength=6)
    probability = np.append(weights[:5], weights[5:].sum()) / weights.sum()
    assert stats.chisquare(counts, 40_000 * probability).pvalue > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arm": "cocnut"}, r"unknown arm 'cocnut' \(did you mean 'coconut'\?\); valid: coconut, cot"),
        ({"arm": "coconut", "c_thought": -1}, "must not be negative, got -1 and 3"),
        ({"arm": "coconut", "max_latent_stage": -2}, "must not be negative, got 1 and -2"),
    ],
)
def test_bad_curriculum(arguments, message):
    with pytest.raises(UserError, match=message):
        Curriculum(**arguments)


# ---- tokens -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bpe(tmp_path):
    """A byte-level BPE tokenizer as GPT-2's, of a few hundred tokens, with `<<` among them."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["Every blix is a dwung. <<1+2=3>> <<4-1=3>>\n"] * 3, vocab_size=300)
    trained.save(str(tmp_path / "tokenizer.json"))
    return PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>")


def test_pretrained_tokenizers_get_the_markers(bpe):
    bpe.add_special_tokens({"eos_token": "<|endoftext|>"})
    before = len(bpe)
    with pytest.raises(UserError, match="has no pad, bot, eot, latent, pause token"):
        special_ids(bpe)
    assert add_special_tokens(bpe) == 4
    assert len(bpe) == before + 4
    assert add_special_tokens(bpe) == 0
    ids = special_ids(bpe)
    assert ids.pad == ids.eos == bpe.eos_token_id
    markers = bpe.convert_ids_to_tokens([ids.bot, ids.eot, ids.latent, ids.pause])
    assert "".join(markers) == "<bot><eot><latent><pause>"
    rows = [{"question": "Every blix\u2028?", "steps": ["<<1+2=3>>", "<<4-1=3>>"], "answer": "3"}]
    batches = Batches(tokenize_rows(rows, bpe), Curriculum("coconut"), ids)
    batch = batches.train(np.array([0]), 1)
    assert bpe.decode(batch["input_ids"][0]) == "Every blix\u2028?\n<bot><latent><eot><<4-1=3>>\n### 3<|endoftext|>"
    assert bpe.decode(batches.prompts(np.array([0]), 2)["input_ids"][0]) == (
        "Every blix\u2028?\n<bot><latent><latent><eot>"
    )


def test_a_tokenizer_without_end_is_refused(bpe):
    bpe.eos_token = None
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        add_special_tokens(bpe)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("source", ["<<", "mean"])
def test_embeddings_of_new_tokens(tied, source):
    from transformers import GPT2Config, GPT2LMHeadModel

    words = word_tokenizer([], [*VOCABULARY, *(["<<", ">>"] if source == "<<" else [])])
    config = GPT2Config(
        vocab_size=len(words), n_positions=8, n_embd=8, n_layer=1, n_head=1, tie_word_embeddings=tied, bos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = [table.detach().clone() for table in tables]
    assert (before[0] == before[1]).all() == tied
    assert init_special_tokens(model, words) == source
    new = words.convert_tokens_to_ids(["<bot>", "<eot>", "<latent>", "<pause>"])
    old = [i for i in range(len(words)) if i not in new]
    for table, was in zip(tables, before, strict=True):
        expected = was[words.convert_tokens_to_ids("<<")] if source == "<<" else was[old].mean(0)
        torch.testing.assert_close(table[new], expected.expand(4, -1))
        assert (table[old] == was[old]).all()
    assert all(table.requires_grad for table in tables)


def test_text_that_cannot_be_tokenized_is_named(tokenizer):
    for key, value in (("question", "q unknown ?"), ("answer", "unknown"), ("steps", ["a1", "unknown"])):
        rows = [*ROWS, {**ROWS[0], key: value}]
        with pytest.raises(UserError, match=rf"train\.json: row 2: {key}: the tokenizer cannot encode '.*unknown"):
            tokenize_rows(rows, tokenizer, "train.json")
    with pytest.raises(UserError, match=r"train\.json: no rows"):
        tokenize_rows([], tokenizer, "train.json")


def test_tokens_are_those_of_the_whole_text(many):
    rows, tokenizer, data = many
    for i, row in enumerate(rows):
        question = data.questions[data.question_start_N[i] : data.question_start_N[i + 1]]
        tail = data.tails[data.tail_start_N[i] : data.tail_start_N[i + 1]]
        assert tokenizer.decode(question) == row["question"]
        assert tokenizer.decode(tail) == " ".join([*row["steps"], "###", row["answer"], "<eos>"])
        for s in range(data.cuts_NS.shape[1]):
            kept = tokenizer.decode(tail[: data.cuts_NS[i, s]])
            assert kept == " ".join(row["steps"][:s])
        assert data.n_steps_N[i] == len(row["steps"])


# ---- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<<1+2=3>>\n### 3", "3"),
        ("#### 1,234 \n", "1234"),
        ("### 3 ### 4", "4"),
        ("no mark", "no mark"),
        ("Every blix is a dwung. ### Ada is a dwung.", "Ada is a dwung."),
        ("###", ""),
        ("", ""),
    ],
)
def test_answers(text, answer):
    assert extract_answer(text) == answer
    assert is_correct(text, answer)
    assert not is_correct(text, answer + "0")


def test_gold_answers_lose_their_commas():
    assert is_correct("### 1234", " 1,234")
    assert not re.search(",", extract_answer("### 1,2,3"))
