"""Evaluate one trained arm of MTA.

    python -m papers.mta.eval --scale tiny --arm first_mta --seed 0

Scores per test item (predictions.jsonl) and means (eval.json):
    error                       find-block: 1 if some letter of a query's answer is wrong
    nll                         text: nats per token of a validation sequence; `perplexity` is the exponential of its
                                mean, with several domains the mean of theirs (as in Table 2)
    needles_n                   1 if the number asked for was found among n needles (Fig. 3)
    babilong_4k, ...            1 if the question was answered with so much distraction (Fig. 5)
    harness_TASK                lm-eval-harness' accuracy, one number; harness_TASK_perplexity for LAMBADA (Table 4)
    added_parameters            parameters that a plain Transformer lacks, as a share of those that it has
`pretrained_` before a metric of text: before the second training stage. kernels.json has the learned kernels,
attention.json the weights with which the model answers one question of find-block.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from statistics import fmean

from papers.mta.config import Config
from papers.mta.train import PRETRAINED, autocast, stages
from shared.experiments import Run, UserError, files, stage_main


def evaluate(config: Config, run: Run) -> dict[str, float]:
    require_harness(config)
    if config.task == "findblock":
        model, tokenizer = load_checkpoint(run.checkpoint)
        rows, metrics = answer_find_block(config, model, tokenizer), {}
        files.write_json(run.dir / "attention.json", attention_of_one_answer(config, model, tokenizer))
    else:
        rows, metrics = [], {}
        for number, part in enumerate(parts := stages(config, run)):
            last = number == len(parts) - 1
            model, tokenizer = load_checkpoint(run.checkpoint if last else run.dir / PRETRAINED)
            found, summary = read_text(part, model, tokenizer, run, asks=last)
            prefix = "" if last else "pretrained_"
            rows += [{**row, "scores": {f"{prefix}{k}": v for k, v in row["scores"].items()}} for row in found]
            metrics |= {f"{prefix}{name}": value for name, value in summary.items()}
    run.write_predictions(rows)
    for name in dict.fromkeys(name for row in rows for name in row["scores"]):
        metrics[name] = fmean(row["scores"][name] for row in rows if name in row["scores"])
    files.write_json(run.dir / "kernels.json", learned_kernels(model))
    added = sum(p.numel() for name, p in model.named_parameters() if is_added(name))
    metrics["parameters"] = model.num_parameters()
    metrics["added_parameters"] = added / (model.num_parameters() - added)
    return metrics


def load_checkpoint(path: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import papers.mta.model  # noqa: F401 - registers the architecture

    if not path.is_dir():
        raise UserError(f"{path}: no checkpoint; run papers.mta.train with the same arguments")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(path)


def is_added(name: str) -> bool:
    """Whether a parameter is one that a plain Transformer lacks."""
    return "kernels." in name or name.endswith((".norm_weight", "gate_weight", "gate_bias", "lambda_q", "lambda_k"))


def learned_kernels(model) -> dict[str, dict[str, list]]:
    """Layer -> kernel -> nested lists in the shape that `mta_attention` takes."""
    found: dict[str, dict[str, list]] = {}
    for name, parameter in model.named_parameters():
        if "kernels." in name:
            found.setdefault(name.split(".")[2], {})[name.rpartition(".")[2]] = parameter.detach().tolist()
    return found


# ---- find-block -----------------------------------------------------------------------------------------------------
def find_block_logits(model, batch, config: Config):
    """(B, T, V) logits on the CPU."""
    import torch

    model.eval()
    with torch.no_grad(), autocast(config, model.device):
        parts = batch.input_ids.split(config.eval_batch_size)
        return torch.cat([model(input_ids=x.to(model.device), use_cache=False).logits.float().cpu() for x in parts])


def answer_find_block(config: Config, model, tokenizer) -> list[dict]:
    """One row per query; the same contexts for every arm and seed."""
    from papers.mta.tasks import find_block

    batch = find_block(config).test_batch(config.n_test)
    logits_BTV = find_block_logits(model, batch, config)
    errors_BQ = batch.errors(logits_BTV)
    said_BT = logits_BTV[:, :-1].argmax(-1)
    rows = []
    for b, q in [(b, q) for b in range(errors_BQ.shape[0]) for q in range(errors_BQ.shape[1])]:
        (at,) = (batch.query_of[b] == q).nonzero(as_tuple=True)
        rows.append(
            {
                "item": f"{b}-{q}",
                "prompt": tokenizer.decode(batch.input_ids[b, : at[0]]),
                "output": tokenizer.decode(said_BT[b, at - 1]),
                "expected": tokenizer.decode(batch.input_ids[b, at]),
                "scores": {"error": float(errors_BQ[b, q])},
            }
        )
    return rows


def attention_of_one_answer(config: Config, model, tokenizer) -> dict:
    """For the last question of the first test context: the tokens (S,) before the answer, the tokens [start, stop) of
    the block that it is about, and the weights of the position that answers, (layers, H, S)."""
    import torch

    from papers.mta.tasks import find_block

    task = find_block(config)
    batch = task.test_batch(config.n_test)
    (at,) = (batch.query_of[0] == config.n_queries - 1).nonzero(as_tuple=True)
    ids_S = batch.input_ids[0, : at[0]]
    tokens = tokenizer.convert_ids_to_tokens(ids_S.tolist())
    block = next(
        i
        for i in range(1, len(tokens), task.block_size + 1)
        if set(tokens[-task.query_size :]) <= set(tokens[i : i + task.block_size])
    )
    with torch.no_grad():
        maps = model(input_ids=ids_S[None].to(model.device), use_cache=False, output_attentions=True).attentions
    weights_LHS = torch.stack([map_BHTS[0, :, -1] for map_BHTS in maps]).float().tolist()
    return {"tokens": tokens, "block": [block, block + task.block_size], "weights": weights_LHS}


# ---- text -----------------------------------------------------------------------------------------------------------
def read_text(config: Config, model, tokenizer, run: Run, asks: bool) -> tuple[list[dict], dict[str, float]]:
    """Perplexity on every domain, benchmarks and, if it `asks`, retrieval."""
    from papers.mta.evaluators import sequence_nll
    from papers.mta.tasks import validation_sequences

    sequences, haystack = validation_sequences(config, tokenizer)
    total = len(sequences) + len(config.needles) + 2
    rows: list[dict] = []
    metrics: dict[str, float] = {}
    perplexities = []
    for done, (domain, ids) in enumerate(sequences.items(), start=1):
        with autocast(config, model.device):
            nll, tokens = sequence_nll(model, ids, batch_size=config.eval_batch_size)
        for i, value in enumerate((nll / tokens).tolist()):
            begin = tokenizer.decode(ids[i, :16])
            rows.append({"item": f"{domain}-{i}", "begins": begin, "scores": {"nll": value}})
        perplexities.append(math.exp(float(nll.sum() / tokens.sum())))
        if len(sequences) > 1:
            metrics[f"perplexity_{domain.removeprefix('RedPajama').lower()}"] = perplexities[-1]
        run.log(done, total)
    metrics["perplexity"] = fmean(perplexities)
    if asks and (config.needles or config.babilong):
        from shared.generation import load_sampler

        with autocast(config, model.device):
            sampler = load_sampler("transformers", model, tokenizer=tokenizer, batch_size=config.eval_batch_size)
            rows += ask_needles(config, sampler, tokenizer, haystack)
            rows += ask_babilong(config, sampler) if config.babilong else []
        run.log(total - 1, total)
    metrics |= run_harness(config, model, tokenizer)
    run.log(total, total)
    return rows, metrics


def ask_needles(config: Config, sampler, tokenizer, haystack: str) -> list[dict]:
    import numpy as np

    from papers.mta.evaluators import evaluate_needles
    from papers.mta.tasks import draw_needles

    rows = []
    for length in config.needle_contexts or [config.context_length]:
        for n in config.needles:
            rng = np.random.default_rng([4, length, n])
            examples = draw_needles(haystack, tokenizer, length, n, config.needle_depths, config.needle_samples, rng)
            for i, row in enumerate(evaluate_needles(sampler, examples)):
                score = float(row.pop("correct"))
                names = {f"needles_{n}": score, f"needles_{n}_of_{length}": score}
                rows.append({"item": f"needles-{length}-{n}-{i}", "context": length, **row, "scores": names})
    return rows


def ask_babilong(config: Config, sampler) -> list[dict]:
    from papers.mta.evaluators import evaluate_babilong

    rows = []
    for task in config.babilong_tasks:
        shots = babilong_rows(config.babilong, "0k", task)[: config.babilong_shots]
        for length in config.babilong_lengths:
            asked = babilong_rows(config.babilong, length, task)
            asked = asked[len(shots) if length == "0k" else 0 :][: config.babilong_samples]
            for i, row in enumerate(evaluate_babilong(sampler, asked, shots)):
                score = float(row.pop("correct"))
                scores = {f"babilong_{length}": score, f"babilong_{task}_{length}": score}
                rows.append({"item": f"babilong-{task}-{length}-{i}", **row, "scores": scores})
    return rows


def babilong_rows(source: str, length: str, task: str) -> list[dict]:
    from papers.mta.data import load_rows

    local = Path(source) / length / f"{task}.jsonl"
    if Path(source).is_dir():
        return list(load_rows(str(local), task))
    return list(load_rows(source, task, name=length))


# ---- lm-eval-harness ------------------------------------------------------------------------------------------------
def require_harness(config: Config) -> None:
    if config.harness and importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "the benchmarks in `harness` need lm-eval-harness: `.venv/bin/pip install lm-eval`, or leave them out with "
            "SET='harness=[]'"
        )


def run_harness(config: Config, model, tokenizer) -> dict[str, float]:
    """Zero-shot (or TASK:SHOTS) results of lm-eval-harness."""
    if not config.harness:
        return {}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.eval_batch_size)
    metrics = {}
    for entry in config.harness:
        task, _, shots = entry.partition(":")
        results = simple_evaluate(model=wrapped, tasks=[task], num_fewshot=int(shots or 0))["results"][task]
        for name, suffix in (("acc,none", ""), ("perplexity,none", "_perplexity")):
            if name in results:
                metrics[f"harness_{task}{suffix}"] = float(results[name])
    return metrics


if __name__ == "__main__":
    stage_main("eval", Config, evaluate)
