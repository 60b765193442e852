"""Evaluate one trained arm of Coconut: answers, their cost, and what happens in between (Section 4).

    python -m papers.coconut.eval --scale tiny --arm coconut --seed 0

Scores per test item (predictions.jsonl) and means (eval.json):
    accuracy, tokens            with all reasoning replaced; thoughts count as tokens, pauses and markers do not
    accuracy_k0 ..              with the first k steps replaced, the rest written
    correct_path_k0 ..          1 for the class of papers.coconut.analysis.PATH_CLASSES that the answer belongs to
    top1_share_k0 ..            share of the frontier's probability that its likeliest node has
Numbers of the whole run (eval.json):
    seconds_per_example         answered one at a time
    value_gap_low_k0 .., value_gap_high_k0 ..
                                how much likelier nodes that reach the target are than others, near leaves and above
"""

from __future__ import annotations

import numpy as np

from papers.coconut.analysis import PATH_CLASSES, classify, frontier_values, n_edges_before
from papers.coconut.config import Config
from papers.coconut.method import ARMS, Batches, Curriculum, is_correct, special_ids, tokenize_rows
from shared.experiments import Run, UserError, stage_main

LOW = 1  # nodes up to this height are near the leaves
TINY = 1e-30  # a frontier without any probability has no share to give


def evaluate(config: Config, run: Run) -> dict[str, float]:
    from papers.coconut.evaluation import answer, name_probabilities, seconds_per_example
    from papers.coconut.tasks import load_model, load_rows

    if not run.checkpoint.is_dir():
        raise UserError(f"{run.checkpoint}: no checkpoint; run papers.coconut.train with the same arguments")
    rows = load_rows(config, "test")
    model, tokenizer = load_model(config, run.checkpoint)
    _to_accelerator(model)
    curriculum = Curriculum(config.method, config.c_thought, config.max_latent_stage, config.pad_latent_to_max)
    batches = Batches(tokenize_rows(rows, tokenizer, f"{config.task} test"), curriculum, special_ids(tokenizer))
    total = 2 + 2 * len(config.thoughts)

    predictions = [
        {"item": f"test-{i}", "question": row["question"], "expected": row["answer"]} for i, row in enumerate(rows)
    ]
    for record, row, (text, n_tokens) in zip(predictions, rows, answer(model, tokenizer, batches, config), strict=True):
        record["output"] = text
        record["scores"] = {
            "accuracy": float(is_correct(text, row["answer"])),
            "tokens": n_tokens + n_thoughts(config),
        }
    run.log(1, total)
    metrics = {"seconds_per_example": seconds_per_example(model, tokenizer, batches, config)}
    run.log(2, total)

    with_graph = "edges" in rows[0]
    for done, k in enumerate(config.thoughts):
        outputs = answer(model, tokenizer, batches, config, stage=k)
        for record, row, (text, _) in zip(predictions, rows, outputs, strict=True):
            record.setdefault("outputs_k", {})[str(k)] = text
            record["scores"][f"accuracy_k{k}"] = float(is_correct(text, row["answer"]))
            if with_graph:
                found = classify(row, text, k)
                record["scores"] |= {f"{name}_k{k}": float(name == found) for name in PATH_CLASSES}
        run.log(3 + 2 * done, total)
        if with_graph and names_nodes(rows, k, config):
            values = name_probabilities(model, tokenizer, batches, rows, k, config)
            for record, row, value_N in zip(predictions, rows, values, strict=True):
                nodes = frontier_values(row, k, value_N)
                record.setdefault("frontier_k", {})[str(k)] = nodes
                mass = sum(node["value"] for node in nodes)
                if len(nodes) > 1:
                    record["scores"][f"top1_share_k{k}"] = nodes[0]["value"] / max(mass, TINY)
            metrics |= value_gaps([n for record in predictions for n in record["frontier_k"][str(k)]], k)
        run.log(4 + 2 * done, total)

    run.write_predictions(predictions)
    for name in predictions[0]["scores"]:
        scores = [record["scores"][name] for record in predictions if name in record["scores"]]
        metrics[name] = float(np.mean(scores))
    return metrics


def names_nodes(rows: list[dict], k: int, config: Config) -> bool:
    """Whether the next thing to write after k steps' worth of thoughts is a step that begins at (or with) a node other
    than the root."""
    return k < config.max_latent_stage and n_edges_before(rows[0], k) > 0


def value_gaps(nodes: list[dict], k: int) -> dict[str, float]:
    """Mean value of nodes that reach the target minus that of the others, for heights up to LOW and above (Figure 9).

    A gap is left out where one of its two groups is empty.
    """
    gaps = {}
    for name, is_low in (("low", True), ("high", False)):
        of_height = [node for node in nodes if (node["height"] <= LOW) == is_low]
        groups = [[node["value"] for node in of_height if node["correct"] is correct] for correct in (True, False)]
        if all(groups):
            gaps[f"value_gap_{name}_k{k}"] = float(np.mean(groups[0]) - np.mean(groups[1]))
    return gaps


def n_thoughts(config: Config) -> int:
    """Thoughts that an answer takes; as in Table 1 they count as generated tokens, pauses do not."""
    return config.c_thought * config.max_latent_stage if ARMS[config.method].filler == "latent" else 0


def _to_accelerator(model) -> None:
    import torch

    if torch.cuda.is_available():
        model.to("cuda")


if __name__ == "__main__":
    stage_main("eval", Config, evaluate)
