import copy
import functools
import math
import statistics

import numpy as np
import pytest
import torch

from shared.experiments.errors import UserError
from shared.generation import SamplingParams, load_sampler
from shared.generation.text import PromptError


@pytest.fixture(scope="module")
def sampler(model, tokenizer):
    return load_sampler("transformers", model, tokenizer=tokenizer)


def next_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def flat(completions):
    return [c for row in completions for c in row]


def token_ids(completions):
    return [[c.token_ids for c in row] for row in completions]


def naive_greedy(model, ids, steps):
    """Recompute everything for each token: one row, no cache, no padding."""
    out = []
    while len(out) < steps and (not out or out[-1] != model.config.eos_token_id):
        out.append(int(next_logits(model, ids + out).argmax()))
    return out


# ---- against the definition -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_equals_the_naive_loop(prompts, build_model, tokenizer, family):
    model = build_model(family)
    sampler = load_sampler("transformers", model, tokenizer=tokenizer)
    rows = sampler.sample(prompts, params=SamplingParams(max_new_tokens=24, temperature=0))
    for prompt, [completion] in zip(prompts, rows, strict=True):
        expected = naive_greedy(model, tokenizer(prompt)["input_ids"], 24)
        assert completion.token_ids == expected
        assert completion.finish_reason == ("stop" if expected[-1] == 2 else "length")
        assert completion.text == tokenizer.decode([t for t in expected if t > 2])


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"temperature": 0.5, "top_k": 3, "top_p": 0.8}])
def test_logprobs_are_those_of_the_plain_model(prompts, model, tokenizer, sampler, params):
    params = SamplingParams(max_new_tokens=20, logprobs=True, **params)
    double = copy.deepcopy(model).double()
    for prompt, row in zip(prompts, sampler.sample(prompts, n=2, params=params), strict=True):
        for completion in row:
            prompt_ids = tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                logits_TV = double(torch.tensor([prompt_ids + completion.token_ids])).logits[0]
            logprobs_TV = logits_TV[len(prompt_ids) - 1 : -1].log_softmax(-1)
            expected = logprobs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)


def test_no_logprobs_unless_asked_for(sampler):
    [[completion]] = sampler.sample(["a"], params=SamplingParams(max_new_tokens=3))
    assert completion.logprobs is None


FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 4},
    {"top_p": 0.7},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
]


@pytest.mark.parametrize("params", FILTERS)
def test_frequencies_are_the_distributions(model, tokenizer, sampler, next_distribution, check_frequencies, params):
    """Of the first token and, given the most frequent first token, of the second."""
    [rows] = sampler.sample(["bad cab"], n=4000, params=SamplingParams(max_new_tokens=2, seed=3, **params))
    prompt_ids = tokenizer("bad cab")["input_ids"]
    check_frequencies([c.token_ids[0] for c in rows], next_distribution(model, prompt_ids, **params))
    first = statistics.mode(c.token_ids[0] for c in rows if len(c.token_ids) > 1)
    seconds = [c.token_ids[1] for c in rows if c.token_ids[0] == first]
    check_frequencies(seconds, next_distribution(model, [*prompt_ids, first], **params))


@pytest.mark.parametrize("seed", range(5))
def test_extreme_random_numbers_draw_no_impossible_token(seed):
    from shared.generation.transformers_backend import _ChooseToken

    choose = _ChooseToken([0, 0], 1, SamplingParams(), torch.device("cpu"))
    choose.uniform_BT = torch.tensor([[0.0], [math.nextafter(1, 0)]], dtype=torch.float64)
    logits_V = torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    logits_V[:100] = logits_V[-100:] = -torch.inf
    chosen_BV = choose(torch.zeros(2, 1, dtype=torch.long), logits_V.repeat(2, 1))
    assert chosen_BV.argmax(-1).tolist() == [100, 899]
    assert (chosen_BV > -torch.inf).sum(-1).tolist() == [1, 1]


def test_the_test_of_frequencies_can_fail(model, tokenizer, sampler, next_distribution, check_frequencies):
    [rows] = sampler.sample(["bad cab"], n=4000, params=SamplingParams(max_new_tokens=1, temperature=1.15))
    with pytest.raises(AssertionError):
        check_frequencies([c.token_ids[0] for c in rows], next_distribution(model, tokenizer("bad cab")["input_ids"]))


# ---- what a completion depends on -------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 5}, {"seed": 5, "top_p": 0.9, "stop": ("ab", "d.")}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batch_size_does_not_matter(prompts, build_model, tokenizer, family, params):
    params = SamplingParams(max_new_tokens=20, logprobs=True, **params)
    model = build_model(family)
    reference = load_sampler("transformers", model, tokenizer=tokenizer, batch_size=1).sample(prompts, 3, params)
    for options in ({"batch_size": 5}, {"batch_size": 64}, {"max_batch_tokens": 70}):
        rows = load_sampler("transformers", model, tokenizer=tokenizer, **options).sample(prompts, 3, params)
        assert token_ids(rows) == token_ids(reference)
        for row, expected in zip(rows, reference, strict=True):
            for completion, other in zip(row, expected, strict=True):
                assert completion.text == other.text
                assert completion.finish_reason == other.finish_reason
                np.testing.assert_allclose(completion.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"logprobs": True}])
def test_completions_of_a_prompt_may_share_its_cache(prompts, build_model, tokenizer, family, params, monkeypatch):
    """The same tokens whether the prompt is read once or once for each completion; prompts of different lengths."""
    from shared.generation import transformers_backend as backend

    sampler = load_sampler("transformers", build_model(family), tokenizer=tokenizer)
    params = SamplingParams(max_new_tokens=12, seed=3, **params)
    reads = []
    forward = sampler.model.forward
    monkeypatch.setattr(
        sampler.model,
        "forward",
        functools.wraps(forward)(lambda *args, **kw: reads.append(kw["input_ids"].shape) or forward(*args, **kw)),
    )
    alone = sampler.sample(prompts, n=6, params=params)
    assert reads[0] == (len(prompts) * 6, 16)
    reads.clear()
    monkeypatch.setattr(backend, "SHARED_TOKENS", 1)
    shared = sampler.sample(prompts, n=6, params=params)
    assert reads[:2] == [(len(prompts), 16), (len(prompts) * 6, 1)]
    assert token_ids(shared) == token_ids(alone)
    for mine, theirs in zip(flat(shared), flat(alone), strict=True):
        assert mine.text == theirs.text
        assert not params.logprobs or mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_a_cache_of_another_kind_is_not_shared(prompts, build_model, tokenizer, monkeypatch):
    """A window shorter than the prompts: its cache has not all positions, so prompts are read for each completion."""
    from transformers import MistralConfig, MistralForCausalLM

    from shared.generation import transformers_backend as backend

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=1, sliding_window=4, **sizes)
    sampler = load_sampler("transformers", MistralForCausalLM(config).eval(), tokenizer=tokenizer)
    params = SamplingParams(max_new_tokens=12, seed=3)
    alone = sampler.sample(prompts, n=6, params=params)
    monkeypatch.setattr(backend, "SHARED_TOKENS", 1)
    assert token_ids(sampler.sample(prompts, n=6, params=params)) == token_ids(alone)
    assert not sampler._can_share


def test_other_prompts_do_not_matter(prompts, sampler):
    params = SamplingParams(max_new_tokens=12)
    rows = dict(zip(prompts, sampler.sample(prompts, 2, params), strict=True))
    assert sampler.sample(prompts[3:5], 2, params) == [rows[p] for p in prompts[3:5]]
    assert sampler.sample(prompts[::-1], 2, params) == [rows[p] for p in prompts[::-1]]


def test_a_repeated_prompt_continues_its_samples(sampler):
    params = SamplingParams(max_new_tokens=12)
    [four] = sampler.sample(["feed"], 4, params)
    assert sampler.sample(["feed", "a", "feed"], 2, params)[::2] == [four[:2], four[2:]]
    assert len({c.text for c in four}) == 4


def test_the_seed_fixes_the_samples(prompts, sampler):
    params = SamplingParams(max_new_tokens=12, seed=1)
    torch.manual_seed(0)
    first = sampler.sample(prompts, 2, params)
    torch.manual_seed(1)
    assert sampler.sample(prompts, 2, params) == first
    other = sampler.sample(prompts, 2, SamplingParams(max_new_tokens=12, seed=2))
    assert all(a != b for row, others in zip(first, other, strict=True) for a, b in zip(row, others, strict=True))


def test_the_global_random_state_is_left_alone(sampler):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sampler.sample(["feed"], 2, SamplingParams(max_new_tokens=4))
    assert torch.equal(torch.rand(3), expected)


# ---- ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [("a",), (". ", "ab"), ("dc",), ("gh", "h"), ("é",), ("abcd", "bc", "no such text")])
def test_stop_strings_cut_what_would_have_been_generated(prompts, tokenizer, sampler, stop):
    """Search every prefix of the unstopped completion."""
    long = SamplingParams(max_new_tokens=30, logprobs=True)
    found = spanning = 0
    unstopped = sampler.sample(prompts, 8, long)
    stopped = sampler.sample(prompts, 8, SamplingParams(max_new_tokens=30, logprobs=True, stop=stop))
    for free, cut in zip(flat(unstopped), flat(stopped), strict=True):
        texts = [tokenizer.decode(free.token_ids[:k], skip_special_tokens=True) for k in range(len(free.token_ids) + 1)]
        hits = [k for k, text in enumerate(texts) if any(s in text for s in stop)]
        if not hits:
            assert cut.text == free.text
            assert cut.token_ids == free.token_ids
            assert cut.finish_reason == free.finish_reason
            continue
        length = hits[0]
        start = min((texts[length].find(s) + len(s), texts[length].find(s)) for s in stop if s in texts[length])[1]
        found += 1
        spanning += start < len(texts[length - 1])  # the string began in an earlier token
        assert cut.text == texts[length][:start]
        assert cut.token_ids == free.token_ids[:length]
        assert cut.finish_reason == "stop"
        np.testing.assert_allclose(cut.logprobs, free.logprobs[:length], atol=1e-4)
    assert found > 0
    assert spanning > 0 or stop in [("a",)]


def test_a_stop_string_ends_the_work_too(prompts, model, sampler):
    """No step of the model after the one whose token completes the stop string, be it of one character or of many."""
    calls = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    tried = 0
    for prompt in prompts:
        [[free]] = sampler.sample([prompt], params=SamplingParams(max_new_tokens=30))
        for stop in (free.text[1:2], free.text[1:7]):
            if stop and "\N{REPLACEMENT CHARACTER}" not in stop:
                calls.clear()
                [[cut]] = sampler.sample([prompt], params=SamplingParams(max_new_tokens=30, stop=(stop,)))
                assert len(calls) == len(cut.token_ids)
                tried += len(stop) > 1
    handle.remove()
    assert tried > 1


def test_end_of_sequence_at_the_first_token(prompts, build_model, tokenizer):
    model = build_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform; argmax is the first of equals
    model.generation_config.eos_token_id = [0, 2]
    sampler = load_sampler("transformers", model, tokenizer=tokenizer)
    params = SamplingParams(max_new_tokens=5, temperature=0, logprobs=True)
    for [completion] in sampler.sample(prompts, params=params):
        assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [0], "stop")
        assert completion.logprobs == pytest.approx([-math.log(len(tokenizer))])


def test_the_tokenizers_end_of_sequence_counts_too(prompts, build_model, tokenizer):
    model = build_model()
    model.generation_config.eos_token_id = None
    sampler = load_sampler("transformers", model, tokenizer=tokenizer)
    rows = flat(sampler.sample(prompts, 8, SamplingParams(max_new_tokens=30)))
    ended = [c for c in rows if c.finish_reason == "stop"]
    assert 0 < len(ended) < len(rows)
    assert all(c.token_ids.index(2) == len(c.token_ids) - 1 for c in ended)
    assert all(2 not in c.token_ids and len(c.token_ids) == 30 for c in rows if c.finish_reason == "length")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_completions_end_with_the_context(build_model, tokenizer, family):
    sizes = {"n_positions": 16} if family == "gpt2" else {"max_position_embeddings": 16}
    model = build_model(family, **sizes)
    sampler = load_sampler("transformers", model, tokenizer=tokenizer)
    prompts = [[5] * length for length in (1, 9, 10, 14, 15)]
    rows = sampler.sample(prompts, 4, SamplingParams(max_new_tokens=6))
    for prompt, row in zip(prompts, rows, strict=True):
        for completion in row:
            if completion.finish_reason == "length":
                assert len(completion.token_ids) == min(6, 16 - len(prompt))
    assert any(c.finish_reason == "length" for c in rows[-2])
    greedy = SamplingParams(max_new_tokens=6, temperature=0)
    [[completion]] = sampler.sample([[5] * 14], params=greedy)
    assert completion.token_ids == naive_greedy(model, [5] * 14, 2)


# ---- prompts, models, tokenizers --------------------------------------------------------------------------------


def test_kinds_of_prompts(sampler, tokenizer):
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    params = SamplingParams(max_new_tokens=8, logprobs=True)
    assert sampler.sample([chat], 2, params) == sampler.sample(["ab. cd. h"], 2, params)
    ids = tokenizer("ab. cd. h")["input_ids"]
    assert (
        sampler.sample([ids], 2, params) == sampler.sample([tuple(ids)], 2, params) == sampler.sample([chat], 2, params)
    )


def test_no_prompts_no_completions(sampler):
    assert sampler.sample([]) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([3] * 128, r"prompt 1 has 128 tokens, which leaves no room .* context of 128"),
        ([18], "prompt 1 has token id 18, but the model knows only 18 tokens"),
        ([{"role": "system", "content": "a"}], "prompt 1: the chat template refuses these messages: no system role"),
        ("x", "prompt 1 has no tokens"),  # no such character in the tiny vocabulary
    ],
)
def test_prompts_the_model_cannot_take(sampler, prompt, message):
    with pytest.raises(PromptError, match=message) as raised:
        sampler.sample(["a", prompt])
    assert isinstance(raised.value, UserError)  # no traceback


@pytest.mark.parametrize("params", [SamplingParams(3), SamplingParams(3, temperature=0), SamplingParams(3, top_k=2)])
def test_a_model_that_has_diverged_is_an_error(build_model, tokenizer, params):
    """NaN is no distribution: what would be drawn from it is the last token of the vocabulary, again and again."""
    broken = build_model()
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    with pytest.raises(UserError, match="not numbers"):
        load_sampler("transformers", broken, tokenizer=tokenizer).sample(["a", "bad cab"], 2, params)


def test_no_chat_template(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"prompt 0 is a list of chat messages, but the tokenizer .* no chat template"):
        load_sampler("transformers", model, tokenizer=bare).sample([[{"role": "user", "content": "a"}]])


def test_a_tokenizer_without_padding_token(prompts, model, tokenizer, sampler):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    params = SamplingParams(max_new_tokens=12)
    assert load_sampler("transformers", model, tokenizer=bare).sample(prompts, 2, params) == sampler.sample(
        prompts, 2, params
    )
    assert bare.pad_token is None


def test_a_checkpoint_directory(prompts, checkpoint, sampler):
    params = SamplingParams(max_new_tokens=12)
    with load_sampler("transformers", checkpoint) as loaded:
        assert loaded.model.dtype == torch.float32
        assert loaded.sample(prompts, 2, params) == sampler.sample(prompts, 2, params)
    with pytest.raises(RuntimeError, match="this sampler is closed"):
        loaded.sample(prompts)


def test_wrong_models(model, tmp_path):
    with pytest.raises(ValueError, match="a loaded model needs its tokenizer"):
        load_sampler("transformers", model)
    with pytest.raises(ValueError, match="this model is loaded already"):
        load_sampler("transformers", model, tokenizer=tmp_path, dtype="float32")
    with pytest.raises(ValueError, match="batch_size must be positive"):
        load_sampler("transformers", model, batch_size=0)
    with pytest.raises(ValueError, match="max_batch_tokens must be positive"):
        load_sampler("transformers", model, max_batch_tokens=0)


def test_the_checkpoints_generation_settings_are_ignored_and_kept(prompts, build_model, tokenizer, sampler):
    model = build_model()
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=0.1, top_k=1, min_new_tokens=9)
    before = model.generation_config.to_dict()
    params = SamplingParams(max_new_tokens=12)
    rows = load_sampler("transformers", model, tokenizer=tokenizer).sample(prompts, 2, params)
    assert rows == sampler.sample(prompts, 2, params)
    assert model.generation_config.to_dict() == before


def test_a_model_in_training_is_sampled_in_evaluation_mode_and_put_back(prompts, build_model, tokenizer):
    model = build_model(attention_dropout=0.5)
    sampler = load_sampler("transformers", model, tokenizer=tokenizer)
    params = SamplingParams(max_new_tokens=12)
    expected = sampler.sample(prompts, 2, params)
    model.train()
    model.model.layers[0].eval()
    assert sampler.sample(prompts, 2, params) == expected
    assert model.training
    assert model.model.layers[1].self_attn.training
    assert not model.model.layers[0].self_attn.training


def test_an_adapter_model(prompts, build_model, tokenizer):
    from peft import LoraConfig, get_peft_model

    model = build_model()
    generation_config = model.generation_config
    sampler = load_sampler("transformers", model, tokenizer=tokenizer)
    params = SamplingParams(max_new_tokens=12)
    expected = sampler.sample(prompts, 2, params)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    assert load_sampler("transformers", wrapped, tokenizer=tokenizer).sample(prompts, 2, params) == expected
    assert model.generation_config is generation_config
