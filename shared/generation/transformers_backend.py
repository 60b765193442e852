"""Sampling with `transformers`: batched `model.generate` with a KV cache, for any causal language model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from shared.experiments.errors import UserError
from shared.generation import DEFAULT_PARAMS, Completion, Prompt, SamplingParams
from shared.generation.text import (
    check_prompts,
    complete,
    context_length,
    decode,
    encode_prompts,
    end_of_sequence_ids,
    find_stop,
    seeds_of_rows,
)

SHARED_TOKENS = 2000  # fewer tokens of prompts than this are computed again for each completion: that is as fast


@dataclass(frozen=True)
class _Row:
    """One completion to make."""

    prompt_ids: list[int]
    budget: int  # most tokens to generate
    seed: int


class TransformersSampler:
    """The `Sampler` that runs a `transformers` model in this process.

    model: a checkpoint directory or hub name, or a loaded causal language model (used as it is, where it is).
    tokenizer: its tokenizer, or the name or directory of it; by default the one of the checkpoint.
    batch_size: most completions generated at a time.
    max_batch_tokens: most tokens in a batch, counting every row as long as the longest prompt plus max_new_tokens;
        None for no limit. Lower this, or batch_size, when memory runs out.
    device, dtype: where and how to load a checkpoint; by default the GPU in the checkpoint's own dtype if there is
        one, else the CPU in float32.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 128,
        max_batch_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, not {batch_size}")
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be positive or None, not {max_batch_tokens}")
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        if isinstance(model, (str, Path)):
            tokenizer = tokenizer or model
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            dtype = dtype or ("auto" if device.type == "cuda" else torch.float32)
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
        elif device is not None or dtype is not None:
            raise ValueError("device and dtype are for loading a checkpoint; this model is loaded already")
        if tokenizer is None:
            raise ValueError("a loaded model needs its tokenizer: TransformersSampler(model, tokenizer)")
        if isinstance(tokenizer, (str, Path)):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self._eos_ids = end_of_sequence_ids(model.generation_config, tokenizer)
        self._can_share = True  # a prompt's cache among its completions, until the model's cache proves to be special

    def sample(
        self, prompts: Sequence[Prompt], n: int = 1, params: SamplingParams = DEFAULT_PARAMS
    ) -> list[list[Completion]]:
        """See `Sampler.sample`."""
        if self.model is None:
            raise RuntimeError("this sampler is closed")
        check_prompts(prompts, n)
        context = context_length(self.model.config)
        vocab_size = self.model.config.get_text_config().vocab_size
        encoded = encode_prompts(prompts, self.tokenizer, vocab_size, context)
        rows = []
        for ids, seeds in zip(encoded, seeds_of_rows(encoded, n, params.seed), strict=True):
            budget = params.max_new_tokens if context is None else min(params.max_new_tokens, context - len(ids))
            rows += [_Row(ids, budget, seed) for seed in seeds]

        completions: list[Completion | None] = [None] * len(rows)
        with self._plain_generation():
            for batch in self._batches(rows):
                for index, completion in zip(batch, self._generate([rows[i] for i in batch], params), strict=True):
                    completions[index] = completion
        return [completions[i : i + n] for i in range(0, len(rows), n)]

    def close(self) -> None:
        """Let go of the model."""
        self.model = None

    def __enter__(self) -> TransformersSampler:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    @contextlib.contextmanager
    def _plain_generation(self) -> Iterator[None]:
        """Evaluation mode, without the generation settings that checkpoints bring (such as repetition penalties).

        `generate` would merge those into ours. Every module is put back as it was: a model may be in training, partly
        frozen, or wrapped (by PEFT).
        """
        modes = [(module, module.training) for module in self.model.modules()]
        configs = [(m, m.generation_config) for m in self.model.modules() if "generation_config" in vars(m)]
        self.model.eval()
        for module, _ in configs:
            module.generation_config = GenerationConfig()
        try:
            yield
        finally:
            for module, config in configs:
                module.generation_config = config
            for module, training in modes:
                module.training = training

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[int]]:
        """Indices of rows to generate together: of similar length, longest first (so that memory runs out at once).

        Rows in a batch have the same budget: rows that are done are fed padding until the batch is done, which must
        not lead beyond the model's positions.
        """
        order = sorted(range(len(rows)), key=lambda i: (rows[i].budget, len(rows[i].prompt_ids)), reverse=True)
        batch: list[int] = []
        for i in order:
            if batch:
                first = rows[batch[0]]
                tokens = (len(batch) + 1) * (len(first.prompt_ids) + first.budget)
                too_many = self.max_batch_tokens is not None and tokens > self.max_batch_tokens
                if len(batch) == self.batch_size or too_many or rows[i].budget != first.budget:
                    yield batch
                    batch = []
            batch.append(i)
        if batch:
            yield batch

    def _generate(self, rows: Sequence[_Row], params: SamplingParams) -> list[Completion]:
        """Completions of one batch."""
        device = self.model.device
        pad_id = self.tokenizer.pad_token_id
        if pad_id is None:
            pad_id = self._eos_ids[0] if self._eos_ids else 0  # any token will do: it is masked
        width, budget = max(len(row.prompt_ids) for row in rows), rows[0].budget
        ids = np.full((len(rows), width), pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for b, row in enumerate(rows):
            ids[b, width - len(row.prompt_ids) :] = row.prompt_ids
            mask[b, width - len(row.prompt_ids) :] = 1
        input_ids_BT, mask_BT = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

        choose = _ChooseToken([row.seed for row in rows], budget, params, device)
        stop = _StopStrings(self.tokenizer, params.stop, width, len(rows))
        options = {"do_sample": False, "eos_token_id": self._eos_ids or None, "pad_token_id": pad_id, "use_cache": True}
        try:
            output_BT = self.model.generate(
                input_ids_BT,
                attention_mask=mask_BT,
                # Not sampled: `choose` leaves one token to choose.
                generation_config=GenerationConfig(max_new_tokens=budget, **options),
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([stop] if params.stop else []),
                **self._shared_prefill(rows, input_ids_BT, mask_BT, options),
            )
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"out of memory generating {len(rows)} completions of up to {width} + {budget} tokens at a time; "
                "lower the sampler's batch_size or max_batch_tokens"
            ) from error

        if choose.broken:
            raise UserError(
                "the model's logits are not numbers (NaN): its training has diverged (lower the learning rate) or its "
                "checkpoint is damaged"
            )
        logprobs_BT = choose.logprobs_BT().tolist() if params.logprobs else [None] * len(rows)
        completions = []
        for b, ids in enumerate(output_BT[:, width:].tolist()):
            ends = [k + 1 for k, token in enumerate(ids) if token in self._eos_ids]
            ends += [stop.length_B[b]] if stop.length_B[b] else []
            length = min(ends, default=len(ids))
            logprobs = logprobs_BT[b] and logprobs_BT[b][:length]
            reason = "stop" if ends else "length"
            completions.append(complete(self.tokenizer, ids[:length], logprobs, reason, params.stop))
        return completions

    def _shared_prefill(
        self, rows: Sequence[_Row], input_ids_BT: torch.Tensor, mask_BT: torch.Tensor, options: dict
    ) -> dict[str, Cache]:
        """The cache of all tokens of the prompts but the last, computed once for the rows of a prompt; {} where that
        would save little, or where a cache is not just keys and values of all positions."""
        of_prompt: dict[tuple[int, ...], int] = {}
        number_B = [of_prompt.setdefault(tuple(row.prompt_ids), len(of_prompt)) for row in rows]
        saved = (len(rows) - len(of_prompt)) * (input_ids_BT.shape[1] - 1)
        if saved < SHARED_TOKENS or not self._can_share:
            return {}
        first_P = [number_B.index(p) for p in range(len(of_prompt))]
        # The model's own first step, so that positions and masks are those that it would make.
        cache = self.model.generate(
            input_ids_BT[first_P],
            attention_mask=mask_BT[first_P],
            generation_config=GenerationConfig(max_new_tokens=1, return_dict_in_generate=True, **options),
        ).past_key_values
        self._can_share = all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))
        if not self._can_share:
            return {}
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor(number_B, device=input_ids_BT.device))
        return {"past_key_values": cache}


class _ChooseToken(LogitsProcessor):
    """Samples one token for each row, and leaves only that one possible.

    A token is drawn by inverting the cumulative distribution at a uniform number which is a function of the row's
    seed and the step alone; so what a row draws does not depend on its batch.
    """

    def __init__(self, seeds: Sequence[int], steps: int, params: SamplingParams, device: torch.device):
        self.params = params
        self.step = 0
        self.logprobs: list[torch.Tensor] = []
        self.broken = torch.zeros((), dtype=torch.bool, device=device)  # whether a token was chosen among NaNs
        self.warpers = LogitsProcessorList()
        if params.temperature == 0:
            return
        uniform_BT = np.stack([np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds])
        self.uniform_BT = torch.from_numpy(uniform_BT).to(device)
        if params.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k > 0:
            self.warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self.warpers.append(TopPLogitsWarper(params.top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Raw logits (B, V) to logits (B, V) that are 0 for the chosen token and -inf for the others."""
        if self.params.temperature == 0:
            token_B1 = scores.argmax(-1, keepdim=True)  # of NaN where there is one
            self.broken |= scores.gather(1, token_B1).isnan().any()
        else:
            token_B1 = self._draw(self.warpers(input_ids, scores))
        if self.params.logprobs:
            self.logprobs.append((scores.gather(1, token_B1) - scores.logsumexp(-1, keepdim=True)).squeeze(1))
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)

    def _draw(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """One token (B, 1) from softmax(logits)."""
        # Double precision, or rounding would move small probabilities.
        cumulative_BV = logits_BV.softmax(-1).double().cumsum(-1)
        self.broken |= cumulative_BV[:, -1].isnan().any()
        target_B1 = self.uniform_BT[:, self.step, None] * cumulative_BV[:, -1:]
        # The first token whose cumulative probability exceeds the target: never one of probability 0.
        return torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=logits_BV.shape[1] - 1)

    def logprobs_BT(self) -> torch.Tensor:
        return torch.stack(self.logprobs, dim=1)


class _StopStrings(StoppingCriteria):
    """Ends each row whose generated text contains a stop string; `length_B` then has its number of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_width: int, rows: int):
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_width = prompt_width
        # A stop string that the last token completes begins within this many tokens, as nearly each has a byte or more
        # (special tokens have none; `complete` finds what that hides from us).
        self.window = max((len(s.encode()) for s in stop), default=0) + 1
        self.length_B: list[int | None] = [None] * rows

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        generated_BT = input_ids[:, self.prompt_width :]
        for b, tail in enumerate(generated_BT[:, -self.window :].tolist()):
            # The tail may begin inside a character, so what is found there is looked up in the whole text.
            if self.length_B[b] is None and self._has_stop(tail) and self._has_stop(generated_BT[b].tolist()):
                self.length_B[b] = generated_BT.shape[1]
        return torch.tensor([length is not None for length in self.length_B], device=input_ids.device)

    def _has_stop(self, token_ids: list[int]) -> bool:
        return find_stop(decode(self.tokenizer, token_ids), self.stop) is not None
