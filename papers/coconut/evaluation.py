"""Ask a Coconut model: answers, seconds per answer, and the probabilities of what it might write next."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from papers.coconut.analysis import frontier, is_facts, n_edges_before
from papers.coconut.config import Config
from papers.coconut.method import Batches, is_correct

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from papers.coconut.model import CoconutForCausalLM


def accuracy(model, tokenizer, batches: Batches, rows: Sequence[dict], config: Config) -> float:
    """Share of right answers when all reasoning is replaced (arms without a curriculum: as they were trained)."""
    outputs = answer(model, tokenizer, batches, config)
    return float(np.mean([is_correct(text, row["answer"]) for (text, _), row in zip(outputs, rows, strict=True)]))


def answer(
    model: CoconutForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    config: Config,
    stage: int | None = None,
    only: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> list[tuple[str, int]]:
    """Greedy (text, number of generated tokens with <eos>) for every row of `batches`, or for `only` some.

    Args:
        stage: k, the steps that thoughts replace before the model goes on in language; None: all.
    """
    indices = np.arange(len(batches.data)) if only is None else np.asarray(only)
    size = batch_size or config.eval_batch_size
    results: list[tuple[str, int]] = []
    model.eval()
    for rows_B in _chunks(indices, size):
        prompt = _to(model, batches.prompts(rows_B, stage))
        width = prompt["input_ids"].shape[1]
        output = model.generate(**prompt, max_new_tokens=config.max_new_tokens, do_sample=False)
        for ids in output[:, width:].tolist():
            ended = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else None
            text = tokenizer.decode(ids[:ended], skip_special_tokens=False)
            results.append((text, len(ids) if ended is None else ended + 1))
    return results


def seconds_per_example(model, tokenizer, batches: Batches, config: Config) -> float:
    """Mean seconds to answer one example alone, greedy and with a KV cache, after one to warm up."""
    import torch

    only = list(range(min(config.latency_items, len(batches.data))))
    answer(model, tokenizer, batches, config, only=only[:1])
    begun = time.perf_counter()
    answer(model, tokenizer, batches, config, only=only, batch_size=1)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / len(only)


def name_probabilities(
    model: CoconutForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    rows: Sequence[dict],
    k: int,
    config: Config,
) -> list[np.ndarray]:
    """For each row `[nodes]`: the probability that, after k steps' worth of thoughts, the model names that node next.

    The product of the probabilities of the name's tokens, after "Every" where steps are sentences (Section 4). Only
    the nodes of the frontier are asked for; the others get 0.
    """
    import torch

    questions = [
        (i, node, _name_ids(tokenizer, row, node))
        for i, row in enumerate(rows)
        for node in frontier(row, n_edges_before(row, k))
    ]
    values = [np.zeros(len(row["idx_to_symbol"])) for row in rows]
    model.eval()
    for some in _chunks(questions, config.eval_batch_size):
        prompt = _to(model, _with_continuations(batches, [(i, ids) for i, _, (ids, _) in some], k))
        with torch.no_grad():
            logits_BTV = model(**prompt).logits
        width = prompt["input_ids"].shape[1]
        log_p_BTV = torch.log_softmax(logits_BTV.float(), dim=-1)
        for b, (i, node, (_, n_name)) in enumerate(some):
            columns = slice(width - n_name - 1, width - 1)  # what predicts each token of the name
            values[i][node] = log_p_BTV[b, columns].gather(1, prompt["input_ids"][b, -n_name:, None]).sum().exp().item()
    return values


def _name_ids(tokenizer: PreTrainedTokenizerBase, row: dict, node: int) -> tuple[list[int], int]:
    """(token ids of the beginning of a step that names `node`, how many of them are the name)."""
    name = row["idx_to_symbol"][node]
    if is_facts(row):
        ids = tokenizer(name, add_special_tokens=False).input_ids
        return ids, len(ids)
    lead = tokenizer("Every", add_special_tokens=False).input_ids
    ids = tokenizer(f"Every {name}", add_special_tokens=False).input_ids
    return ids, len(ids) - len(lead)


def _with_continuations(batches: Batches, asked: Sequence[tuple[int, list[int]]], k: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts after k steps' worth of thoughts, each followed by its own ids."""
    import torch

    prompts = [batches.prompts(np.array([i]), k, continuation=ids)["input_ids"][0] for i, ids in asked]
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), batches.ids.pad)
    mask_BT = torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        ids_BT[b, width - len(prompt) :] = prompt
        mask_BT[b, width - len(prompt) :] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def _to(model: CoconutForCausalLM, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.to(model.device) for key, tensor in batch.items()}


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
