import subprocess
import sys

import pytest

from shared.generation import Completion, SamplingParams, load_sampler
from shared.generation.text import check_prompts, complete, find_stop, seeds_of_rows


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 0.001}, r"at least 0\.01"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": "\n"}, "tuple of non-empty strings"),
        ({"stop": ("a", "")}, "tuple of non-empty strings"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
    ],
)
def test_wrong_parameters(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**wrong)


def test_a_list_of_stop_strings_becomes_a_tuple():
    assert SamplingParams(stop=["a"]) == SamplingParams(stop=("a",))
    hash(SamplingParams(stop=["a"]))


def test_an_unknown_backend_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown generation backend 'vlm'; valid: transformers, vllm, openai"):
        load_sampler("vlm", "model")


def test_the_interface_imports_nothing_heavy():
    code = "import sys, shared.generation; assert not {'torch', 'transformers', 'vllm', 'httpx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("text", TypeError, r"pass \[prompt\]"),
        ([["a"]], TypeError, "prompt 0: 'a' is neither a chat message nor a token id"),
        (["a", ""], ValueError, "prompt 1 is empty"),
        (["a", []], ValueError, "prompt 1 is empty"),
        (["a", None], TypeError, "prompt 1 must be a string"),
        (["a", [{"role": "user"}]], ValueError, "prompt 1: a chat message needs the keys role and content"),
        ([[{"role": "user", "content": "a"}, 3]], ValueError, "prompt 0: a chat message needs"),
        ([[3, -1]], TypeError, "prompt 0: -1 is neither"),
        ([[3, 1.0]], TypeError, "prompt 0: 1.0 is neither"),
    ],
)
def test_wrong_prompts(prompts, error, message):
    with pytest.raises(error, match=message):
        check_prompts(prompts, 1)


@pytest.mark.parametrize("n", [0, -1, 1.0])
def test_wrong_n(n):
    with pytest.raises(ValueError, match="n, the number of completions"):
        check_prompts(["a"], n)


def test_seeds_differ_between_prompts_samples_and_seeds_and_know_nothing_of_other_prompts():
    a, b = [1, 2], [1, 3]
    seeds = seeds_of_rows([a, b], 3, seed=0)
    assert len({*seeds[0], *seeds[1], *seeds_of_rows([a], 3, seed=1)[0]}) == 9
    assert all(0 <= s < 2**63 for row in seeds for s in row)
    assert seeds_of_rows([b], 3, seed=0) == [seeds[1]]
    assert seeds_of_rows([a, b, a, a], 1, seed=0) == [[seeds[0][0]], [seeds[1][0]], [seeds[0][1]], [seeds[0][2]]]


@pytest.mark.parametrize(
    ("text", "stop", "start"),
    [
        ("abc", (), None),
        ("abc", ("x",), None),
        ("abcabc", ("c",), 2),
        ("abcd", ("d", "bc"), 1),  # complete first, though second in the list
        ("abcd", ("abcd", "c"), 2),  # begins later, but is complete first
        ("abc", ("bc", "c"), 1),  # complete at once: the first of the list
        ("abc", ("c", "bc"), 2),
    ],
)
def test_find_stop(text, stop, start):
    assert find_stop(text, stop) == start


def test_complete_cuts_text_tokens_and_logprobs_at_the_stop_string(tokenizer):
    ids = tokenizer("ef abcd g")["input_ids"]  # "e", "f", " ", "abcd", " ", "g"
    logprobs = [-float(i) for i in range(len(ids))]
    cut = complete(tokenizer, ids, logprobs, "length", ("bc",))
    assert cut == Completion("ef a", ids[:4], logprobs[:4], "stop")
    assert complete(tokenizer, ids, logprobs, "length", ("x",)) == Completion("ef abcd g", ids, logprobs, "length")
    assert complete(tokenizer, ids, None, "length", ("f a",)) == Completion("e", ids[:4], None, "stop")
