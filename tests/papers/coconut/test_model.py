"""CoconutForCausalLM against the literal definition in papers/coconut/naive.py."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

VOCAB, POSITIONS, LATENT = 24, 40, 23
L = LATENT
# Three thoughts, one, none, two spans, a thought at the end: with these offsets no two rows have latents aligned.
ROWS = [[5, 6, 7, L, L, L, 8, 9, 10], [5, L, 8], [4, 3, 5, 6], [3, L, 5, L, L, 6, 7], [6, 5, 9, L]]
OFFSETS = [2, 1, 8, 0, 7]
WIDTH = 12
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_base(family="gpt2", dtype=torch.float64, attn="sdpa", **overrides):
    import transformers

    if family == "gpt2":
        sizes = {"n_positions": POSITIONS, "n_embd": 16, "n_layer": 2, "n_head": 2}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 1}
        config_class = transformers.GPT2Config
    else:
        sizes = {"max_position_embeddings": POSITIONS, "hidden_size": 16, "intermediate_size": 24}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
        config_class = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[family]
    config = config_class(
        **{"vocab_size": VOCAB, "initializer_range": 0.2, "attn_implementation": attn} | sizes | overrides
    )
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    if dtype == torch.float64:
        for module in base.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = types.MethodType(rms_norm, module)  # transformers' own rounds to float32
    return base


def rms_norm(module, x):
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def make_model(*args, latent=LATENT, **kwargs):
    from papers.coconut.model import CoconutForCausalLM

    return CoconutForCausalLM.from_base(make_base(*args, **kwargs), latent_token_id=latent)


def make_batch(rows=ROWS, offsets=OFFSETS, width=WIDTH, pad=LATENT):
    """Rows at their offsets; padding holds the latent id, which must mean nothing there. Some labels are -100."""
    ids_BT = torch.full((len(rows), width), pad)
    mask_BT = torch.zeros_like(ids_BT)
    labels_BT = torch.full_like(ids_BT, -100)
    for b, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        span = slice(offset, offset + len(row))
        ids_BT[b, span] = torch.tensor(row)
        mask_BT[b, span] = 1
        labels_BT[b, span] = torch.tensor(row_labels(row))
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def row_labels(row):
    return [token if token != LATENT and (t % 2 or t > 5) else -100 for t, token in enumerate(row)]


def left_padded(rows, pad=0):
    width = max(map(len, rows))
    return make_batch(rows, [width - len(row) for row in rows], width, pad)


def assert_close(actual, expected, dtype=torch.float64):
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def param_grads(loss, module):
    names, params = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))


# --- equal to the definition --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype", "attn"),
    [
        ("gpt2", torch.float64, "sdpa"),
        ("gpt2", torch.float64, "eager"),
        ("gpt2", torch.float32, "sdpa"),
        ("gpt2", torch.float32, "eager"),
        ("llama", torch.float64, "sdpa"),
        ("llama", torch.float32, "sdpa"),
        ("llama", torch.float32, "eager"),
    ],
)
def test_logits_loss_and_all_gradients_are_those_of_the_definition(family, dtype, attn):
    from papers.coconut.naive import naive_logits, naive_loss

    model, batch = make_model(family, dtype, attn), make_batch()
    output = model(**batch, logits_to_keep=0)
    for b, (row, offset) in enumerate(zip(ROWS, OFFSETS, strict=True)):
        assert_close(output.logits[b, offset : offset + len(row)], naive_logits(model.base, row, LATENT), dtype)
    expected_loss = naive_loss(model.base, ROWS, [row_labels(row) for row in ROWS], LATENT)
    assert_close(output.loss, expected_loss, dtype)
    actual, expected = param_grads(output.loss, model.base), param_grads(expected_loss, model.base)
    for name in expected:
        assert expected[name].abs().max() > 1e-4, name
        assert_close(actual[name], expected[name], dtype)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bfloat16_follows_the_definition(family):
    from papers.coconut.naive import naive_logits

    model, batch = make_model(family, torch.bfloat16), make_batch()
    output = model(**batch, logits_to_keep=0)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    for b, (row, offset) in enumerate(zip(ROWS, OFFSETS, strict=True)):
        expected = naive_logits(model.base, row, LATENT).float()
        actual = output.logits[b, offset : offset + len(row)].float()
        assert (actual - expected).abs().max() < 0.15 * expected.std()  # a wrong input moves them by about 1 std
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast_keeps_the_thoughts_in_the_embeddings_dtype():
    model, batch = make_model(dtype=torch.float32), make_batch()
    expected = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert abs(loss - expected) < 0.05
    assert loss != expected  # autocast did something


def test_without_latents_it_is_the_base_model():
    rows = [[5, 6, 7], [8, 9, 3, 4, 2], [6]]
    batch = make_batch(rows, [3, 0, 2], 6)
    model = make_model()
    output = model(**batch, logits_to_keep=0)
    valid = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # the base counts pads unless told
    expected = model.base(**batch, position_ids=positions)
    assert torch.equal(output.logits[valid], expected.logits[valid])
    assert_close(output.loss.float(), expected.loss, torch.float32)  # transformers' loss is float32
    assert output.thoughts is None


def test_a_row_does_not_depend_on_the_others():
    model, batch = make_model(), make_batch()
    together = model(batch["input_ids"], batch["attention_mask"]).logits
    for b, (row, offset) in enumerate(zip(ROWS, OFFSETS, strict=True)):
        alone = model(torch.tensor([row])).logits[0]
        assert_close(together[b, offset : offset + len(row)], alone)


def test_thoughts_are_the_hidden_states_before_the_latents():
    from papers.coconut.naive import naive_hidden

    model, batch = make_model(), make_batch()
    thoughts = model(batch["input_ids"], batch["attention_mask"]).thoughts
    assert thoughts.shape == (len(ROWS), 3, 16)
    for b, row in enumerate(ROWS):
        hidden_TD = naive_hidden(model.base, row, LATENT)
        expected = [hidden_TD[t - 1] for t, token in enumerate(row) if token == LATENT]
        assert_close(thoughts[b], torch.stack([*expected, *[torch.zeros(16).double()] * (3 - len(expected))]))


def test_gradient_reaches_the_question_only_through_the_thoughts():
    """One layer that sees two positions back: the answer cannot attend to the question (token 5) directly."""
    model = make_model("mistral", num_hidden_layers=1, sliding_window=2)

    def question_gradient(middle):
        ids = torch.tensor([[5, 6, *middle, 8, 9]])
        embeds = []
        hook = model.get_input_embeddings().register_forward_hook(lambda *args: embeds.append(args[2]))
        labels = torch.tensor([[-100] * (ids.shape[1] - 1) + [9]])
        loss = model(ids, labels=labels).loss
        hook.remove()
        return torch.autograd.grad(loss, embeds[0])[0][0, 0]

    assert question_gradient([7, 7, 7]).abs().max() == 0
    assert question_gradient([L, L, L]).abs().max() > 1e-6
    assert question_gradient([L, 7, 7, L]).abs().max() == 0  # the chain is broken


def test_sliding_window_cache_follows_the_definition():
    from papers.coconut.naive import naive_logits

    model = make_model("mistral", sliding_window=3)
    row = [5, 6, 7, 9, 4, L, L, L, 8, 9]
    assert_close(model(torch.tensor([row])).logits[0], naive_logits(model.base, row, LATENT))


def test_continuing_from_a_cache_is_one_call_over_all():
    model = make_model()
    batch = left_padded([[5, 6, L, L, 8, 9, L, 7], [3, 4, L, 6, 2, L, L]])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = model(ids, mask)
    first = model(ids[:, :5], mask[:, :5], use_cache=True)
    second = model(ids[:, 5:], mask, past_key_values=first.past_key_values, use_cache=True)
    valid = mask.bool()
    assert_close(torch.cat([first.logits, second.logits], 1)[valid], whole.logits[valid])
    assert second.past_key_values.get_seq_length() == 8
    assert whole.past_key_values is None


# --- cost -----------------------------------------------------------------------------------------------------------


def test_k_aligned_thoughts_take_k_plus_one_passes_and_no_column_twice():
    model = make_model()
    batch = left_padded([[5, 6, 7, L, L, L, 8, 9], [4, L, L, L, 3, 2]])
    widths = []
    model.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model(**batch)
    assert widths == [3, 1, 1, 3]


def test_the_output_layer_runs_on_supervised_tokens_only():
    model, batch = make_model(), make_batch()
    shapes = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    supervised = int((batch["labels"] != -100).sum())
    assert model(**batch).logits is None
    assert shapes == [(supervised, 16)]


def test_logits_to_keep():
    model, batch = make_model(), make_batch()
    everything = model(batch["input_ids"], batch["attention_mask"]).logits
    assert everything.shape == (len(ROWS), WIDTH, VOCAB)
    assert_close(model(**batch, logits_to_keep=2).logits, everything[:, -2:])
    assert_close(model(**batch, logits_to_keep=torch.tensor([3, 7])).logits, everything[:, [3, 7]])


# --- arguments ------------------------------------------------------------------------------------------------------


def test_explicit_positions_are_used_and_do_not_pack_sequences():
    model = make_model()
    ids = torch.tensor([[5, 6, 7, L, L, 8], [3, 4, 5, L, L, 6]])
    assert torch.equal(model(ids, position_ids=torch.arange(6).expand(2, 6)).logits, model(ids).logits)
    plain = torch.tensor([[5, 6, 7, 8], [3, 4, 5, 6]])  # repeated positions: a set, not several packed sequences
    positions = torch.tensor([[0, 0, 0, 1]]).expand(2, 4)
    expected = model.base(plain, attention_mask=torch.ones_like(plain), position_ids=positions).logits
    assert torch.equal(model(plain, position_ids=positions).logits, expected)


def test_boolean_mask_single_token_and_tuple_output():
    model, batch = make_model(), make_batch()
    expected = model(batch["input_ids"], batch["attention_mask"]).logits
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"].bool()).logits, expected)
    assert model(torch.tensor([[5]])).logits.shape == (1, 1, VOCAB)
    assert model(torch.tensor([[5, L]])).thoughts.shape == (1, 1, 16)
    assert isinstance(model(torch.tensor([[5]]), return_dict=False), tuple)


def test_train_and_eval_are_those_of_a_module():
    model = make_model(embd_pdrop=0.5)
    assert model.eval() is model
    assert not model.base.training
    assert model.train(False) is model
    ids = torch.tensor([[5, 6, L, 7]])
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.train() is model
    assert model.base.training
    assert not torch.equal(model(ids).logits, model(ids).logits)


# --- generation -----------------------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7, L, L, L, 8], [4, L, 9, 2], [3, 6, 5], [7, 8, 9, 3, L, L, 4, 5, 6], [9]]


def generated_rows(model, prompts, eos, max_new_tokens=8, pad=0, **kwargs):
    batch = left_padded(prompts, pad)
    sequences = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad,
        **kwargs,
    )
    rows = sequences[:, batch["input_ids"].shape[1] :].tolist()
    ends = [row.index(eos) + 1 if eos in row else len(row) for row in rows]
    for row, end in zip(rows, ends, strict=True):
        assert row[end:] == [pad] * (len(row) - end)
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("eos_from", [(0, 0), (1, 0), (3, 3), (None, None)], ids=str)
def test_generate_is_the_naive_greedy_continuation_of_every_row(family, eos_from):
    """The end token is one that the definition writes: at once in one row, later or never in others."""
    from papers.coconut.naive import naive_generate

    model = make_model(family).eval()
    row, step = eos_from
    eos = 1 if row is None else naive_generate(model.base, PROMPTS[row], LATENT, step + 1)[step]
    expected = [naive_generate(model.base, prompt, LATENT, 8, eos) for prompt in PROMPTS]
    if row is not None:
        assert expected[row][-1] == eos
        assert len(expected[row]) <= step + 1
        assert len({len(new) for new in expected}) > 1
    assert generated_rows(model, PROMPTS, eos, do_sample=False) == expected
    assert generated_rows(model, PROMPTS, eos, do_sample=False, use_cache=False) == expected


def test_generate_runs_the_prompt_once():
    model = make_model().eval()
    widths = []
    model.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    generated_rows(model, [[5, 6, 7, L, L, 8], [3, L, L, 4]], eos=VOCAB, max_new_tokens=4, do_sample=False)
    assert widths == [3, 1, 2, 1, 1, 1]


def test_the_latent_token_is_never_generated():
    from papers.coconut.naive import naive_generate

    favourite = int(make_base()(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    model = make_model(latent=favourite).eval()
    prompt = [5, 6, 7]
    assert favourite not in prompt
    expected = naive_generate(model.base, prompt, favourite, 6)
    assert generated_rows(model, [prompt], eos=VOCAB, max_new_tokens=6, do_sample=False) == [expected]


def test_sampling_several_continuations_per_prompt():
    model = make_model().eval()
    torch.manual_seed(0)
    rows = generated_rows(model, PROMPTS, eos=VOCAB, do_sample=True, num_return_sequences=3)
    assert len(rows) == 3 * len(PROMPTS)
    assert len({tuple(row) for row in rows}) > len(PROMPTS)
    greedy = generated_rows(model, PROMPTS, eos=VOCAB, do_sample=True, num_return_sequences=2, top_k=1)
    assert greedy[::2] == greedy[1::2] == generated_rows(model, PROMPTS, eos=VOCAB, do_sample=False)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, family, tied):
    from transformers import AutoModelForCausalLM

    from papers.coconut.model import CoconutForCausalLM

    base = make_base(family, torch.float32, tie_word_embeddings=tied)
    model = CoconutForCausalLM.from_base(base, latent_token_id=LATENT, bot_token_id=21, eot_token_id=22)
    model.save_pretrained(tmp_path)
    batch = make_batch()
    expected = model(**batch, logits_to_keep=0)
    for loaded in (
        CoconutForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"),
    ):
        assert type(loaded) is CoconutForCausalLM
        config = loaded.config
        assert (config.latent_token_id, config.bot_token_id, config.eot_token_id) == (LATENT, 21, 22)
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
        assert loaded.generation_config.suppress_tokens == [LATENT]
        assert loaded.generation_config.eos_token_id == 1
        output = loaded(**batch, logits_to_keep=0)
        assert_close(output.loss, expected.loss, torch.float32)
        assert_close(
            output.logits[batch["attention_mask"].bool()],
            expected.logits[batch["attention_mask"].bool()],
            torch.float32,
        )
    assert loaded.base.config._attn_implementation == "eager"
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_wrapping_keeps_the_base_as_it_is():
    from papers.coconut.model import CoconutForCausalLM

    base = make_base(attn="eager").eval()
    base.generation_config.max_new_tokens = 7
    base.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
    base.transformer.wpe = torch.nn.Embedding(POSITIONS, 16, dtype=torch.float64)  # not made by transformers
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = CoconutForCausalLM.from_base(base, latent_token_id=VOCAB)
    assert model.base is base
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert base.config._attn_implementation == "eager"
    assert model.dtype == torch.float64
    assert not model.training
    assert not base.training
    assert model.generation_config.max_new_tokens == 7
    assert base.generation_config.suppress_tokens is None


def test_resizing_the_wrapped_vocabulary():
    model = make_model(tie_word_embeddings=True)
    model.resize_token_embeddings(VOCAB + 2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[5, L, VOCAB + 1]])).logits.shape == (1, 3, VOCAB + 2)
    assert model.config.get_text_config().vocab_size == VOCAB + 2


def test_checkpoint_of_another_architecture(tmp_path):
    from papers.coconut.model import CoconutForCausalLM

    make_base().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a Coconut checkpoint.*GPT2LMHeadModel.*CoconutForCausalLM") as error:
        CoconutForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(OSError, match="nowhere"):
        CoconutForCausalLM.from_pretrained(tmp_path / "nowhere")


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[5, 6], [L, 6]], None, r"row 1 .* latent in column 0.*start of the row"),
        ([[5, 6, 7], [0, L, 6]], [[1, 1, 1], [0, 1, 1]], r"row 1 .* latent in column 1.*padding"),
        ([[5, 6, L]], [[1, 0, 1]], r"row 0 .* latent in column 2.*padding"),
    ],
)
def test_latent_with_nothing_before_it(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        make_model()(torch.tensor(ids), None if mask is None else torch.tensor(mask))


def test_latent_right_after_a_cache():
    model = make_model()
    cache = model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"row 0 .* only as keys and values.*same call"):
        model(torch.tensor([[L, 6]]), past_key_values=cache)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_more_positions_than_the_model_has(family):
    model = make_model(family).eval()
    row = [5] * 30 + [L] * 11
    batch = left_padded([[3, 4], row])
    with pytest.raises(ValueError, match=r"row 1 .* 41 positions \(30 tokens \+ 11 latents\).* has 40 .*fewer latents"):
        model(**batch)
    with pytest.raises(ValueError, match=r"row 0 .* 41 positions.*fewer"):
        model.generate(torch.tensor([[5] * 38]), max_new_tokens=5, eos_token_id=VOCAB, pad_token_id=0)
    # Padding takes no position.
    padded = {key: torch.nn.functional.pad(value[:1], (5, 0)) for key, value in batch.items()}
    assert model(padded["input_ids"], padded["attention_mask"]).logits.isfinite()[:, -2:].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([5, 6])}, "input_ids must be"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "length >= 1"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be .*\[2, 3\].*got \[2, 4\]"),
        ({"position_ids": torch.arange(3)}, "position_ids must have"),
        ({"labels": torch.ones(2, 2, dtype=torch.long)}, "labels must have"),
        ({"labels": torch.tensor([[5, -100, -100]] * 2)}, "no supervised token"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**{"input_ids": torch.tensor([[5, 6, 7]] * 2)} | arguments)


def test_gradient_checkpointing_only_without_latents():
    model = make_model().train()
    plain = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, 7, 8]])}
    expected = param_grads(model(**plain).loss, model)
    model.gradient_checkpointing_enable()
    actual = param_grads(model(**plain).loss, model)
    for name in expected:
        assert_close(actual[name], expected[name])
    with pytest.raises(ValueError, match=r"gradient checkpointing.*gradient_checkpointing_disable"):
        model(torch.tensor([[5, L, 7]]))
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(**plain, use_cache=True)
    model.eval()
    model(torch.tensor([[5, L, 7]]))


def small(config_class, **overrides):
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return config_class(**sizes | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8} | overrides)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t.GPT2Model(make_base().config), r"GPT2Model: .*without an LM head"),
        (lambda t: torch.nn.Linear(2, 2), "got Linear"),
        (lambda t: make_model(), "got CoconutForCausalLM.*does not take inputs_embeds"),
        (
            lambda t: t.T5ForConditionalGeneration(
                t.T5Config(vocab_size=VOCAB, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)
            ),
            "got T5ForConditionalGeneration",
        ),
        (lambda t: t.BertLMHeadModel(small(t.BertConfig)), "depend on later tokens"),
        (lambda t: t.MambaForCausalLM(small(t.MambaConfig, state_size=4)), "does not take.*past_key_values"),
        (lambda t: t.Gemma2ForCausalLM(small(t.Gemma2Config, final_logit_softcapping=30.0)), "soft cap"),
    ],
    ids=["no-head", "not-a-model", "wrapped-twice", "encoder-decoder", "bidirectional", "recurrent", "softcap"],
)
def test_base_that_is_not_a_decoder_only_language_model(make, message):
    import transformers

    from papers.coconut.model import CoconutForCausalLM

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        CoconutForCausalLM.from_base(make(transformers), latent_token_id=LATENT)


def test_latent_token_outside_the_vocabulary():
    with pytest.raises(ValueError, match=r"latent_token_id 24 .* vocabulary of 24.*resize_token_embeddings"):
        make_model(latent=VOCAB)


def test_incomplete_configuration():
    from papers.coconut.model import CoconutConfig, CoconutForCausalLM

    with pytest.raises(ValueError, match="text_config"):
        CoconutForCausalLM(CoconutConfig(latent_token_id=3))


# --- benchmark ------------------------------------------------------------------------------------------------------

BENCH = Path(__file__).parents[3] / "scripts" / "bench" / "coconut.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_coconut", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train = module.Task("train", "tiny", "train", 3, (5, 8), 2, 3)
    evaluate = module.Task("eval", "tiny", "eval", 4, (5, 8), 2, 3, literal_rows=2)
    monkeypatch.setattr(module, "TASKS", [train, evaluate])
    return module


def test_benchmark_agrees_with_the_straightforward_algorithm(bench, tmp_path, monkeypatch, capsys):
    """The script itself compares losses, gradients and tokens of all sides, and fails if they differ."""
    out = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["coconut.py", "--seconds", "0", "--out", str(out)])
    bench.main()
    train, evaluate = json.loads(out.read_text())["rows"]
    assert train["seconds_min"].keys() == {"ours", "literal", "literal, unbind"}
    assert evaluate["examples"] == {"ours": 4, "literal": 2}
    speed = evaluate["examples"]["ours"] / evaluate["seconds_min"]["ours"]
    assert f"| {speed:.3g} examples/s |" in capsys.readouterr().out


def test_benchmark_notices_a_difference(bench, monkeypatch):
    model = bench.make_model("tiny", "cpu", 0)
    whole = type(model)._run_passes
    monkeypatch.setattr(type(model), "_run_passes", lambda *args: whole(*args) * 1.01)
    with pytest.raises(AssertionError, match="not close"):
        bench.run_task(bench.TASKS[0], model, "cpu", 0.0, 0)


def test_benchmark_loads_without_torch():
    code = f"import runpy, sys; runpy.run_path({str(BENCH)!r}, run_name='bench'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
