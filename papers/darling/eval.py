"""Evaluate one trained arm of DARLING on held-out prompts.

    python -m papers.darling.eval --scale tiny --arm ops_darling --seed 0

Scores per test prompt (predictions.jsonl) and their means (eval.json):
    pass@1, pass@2, ..     verifiable tasks: the unbiased estimate from n_samples samples
    quality                others: mean of the true quality; of the reward model's score where the truth is unknown
    distinct               meanings among ten samples, by the world's own semantics (never by the classifier of the
                           reward); by `eval_classifier` where the truth is unknown
    distinct4              Distinct-4: share of a response's 4-grams that differ
    remarks, tokens        per response: words that say nothing (generated worlds), tokens
    NAME_tT                the same with temperature T (pass@1 or quality, and distinct)
Numbers of the whole run (eval.json):
    front_area             area of (distinct, pass@1 or quality) that the temperatures dominate, as a share of
                           10 meanings x quality 1 (Figure 3)
    classifier_*, policy_*   what was measured when the seed's parts were trained
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from papers.darling.config import Config
from shared.evaluation.at_k import pass_at_k
from shared.evaluation.diversity import Same, distinct_classes, distinct_n
from shared.experiments import Run, UserError, files, stage_main
from shared.generation import SamplingParams, load_sampler

BLOCK = 10  # Distinct counts meanings among so many samples (NoveltyBench)


def evaluate(config: Config, run: Run) -> dict[str, float]:
    from papers.darling.tasks import make_task

    if not run.checkpoint.is_dir():
        raise UserError(f"{run.checkpoint}: no checkpoint; run papers.darling.train with the same arguments")
    task = make_task(config, run.seed)
    rows = task.rows(config.test_split, config.n_test)
    prompts = [row["prompt"] for row in rows]
    counts = {config.eval_temperature: config.n_samples} | dict.fromkeys(config.sweep, BLOCK)
    total = 2 * len(counts)
    samples = {}
    with load_sampler(*sampler_arguments(config, run)) as sampler:
        for done, (temperature, n) in enumerate(counts.items(), start=1):
            params = SamplingParams(
                max_new_tokens=config.eval_max_new_tokens,
                temperature=temperature,
                top_p=config.eval_top_p,
                seed=run.seed,
            )
            samples[temperature] = sampler.sample(prompts, n=n, params=params)
            run.log(done, total)

    # Only now that the sampler has let go of the GPU.
    same, quality = meaning_of(config, task), quality_of(config, task)
    predictions = []
    for row, completions in zip(rows, samples.pop(config.eval_temperature), strict=True):
        texts = [completion.text for completion in completions]
        scores = score_row(row, texts, task, quality, same, config.ks)
        scores["tokens"] = float(np.mean([len(completion.token_ids) for completion in completions]))
        record = {"item": row.get("item", row["prompt"]), "prompt": row["prompt"], "outputs": texts, "scores": scores}
        predictions.append(record | {key: row[key] for key in ("answer", "test_set") if key in row})
    for done, (temperature, found) in enumerate(samples.items(), start=len(counts) + 1):
        for record, row, completions in zip(predictions, rows, found, strict=True):
            texts = [completion.text for completion in completions]
            at_t = score_row(row, texts, task, quality, same, [1])
            names = ("pass@1", "quality", "distinct")
            record["scores"] |= {f"{name}_t{temperature:g}": at_t[name] for name in names if name in at_t}
        run.log(done, total)

    run.write_predictions(predictions)
    metrics = means(predictions)
    metrics |= {f"{name}_{part}": value for part, name, value in by_part(predictions, rows, task)}
    if same is not None:
        metrics["front_area"] = front_area(front(metrics, config.sweep, known=config.task != "wildchat"))
    if config.steps == 0 and config.pairs_source:
        metrics |= pair_accuracy(config)
    measured = files.read_json(run.dir / "train.json")["metrics"]
    parts = ("classifier_", "policy_", "prompts_too_long")
    return metrics | {name: value for name, value in measured.items() if name.startswith(parts)}


def sampler_arguments(config: Config, run: Run) -> tuple:
    return ("vllm" if config.vllm else "transformers", str(run.checkpoint))


def score_row(row: dict, texts: Sequence[str], task, quality, same: Same | None, ks: Sequence[int]) -> dict[str, float]:
    """Scores of the samples of one prompt."""
    scores: dict[str, float] = {}
    found = task.score(row, texts)
    if quality is not None:
        found["quality"] = quality([row["prompt"]] * len(texts), texts)
    if "correct" in found:
        correct = [found.pop("correct")]
        scores |= {f"pass@{k}": float(pass_at_k(correct, k)[0]) for k in ks if k <= len(texts)}
    scores |= {name: float(np.mean(values)) for name, values in found.items()}
    if same is not None:
        blocks = [texts[start : start + BLOCK] for start in range(0, len(texts) - BLOCK + 1, BLOCK)]
        scores["distinct"] = float(np.mean([distinct_classes(block, same) for block in blocks]))
    fourgrams = [value for text in texts if not np.isnan(value := distinct_n(text, 4))]
    if fourgrams:
        scores["distinct4"] = float(np.mean(fourgrams))
    return scores


def meaning_of(config: Config, task) -> Same | None:
    """What counts as the same meaning in the test: the truth, or a classifier that no arm was trained with."""
    if task.meaning is not None:
        return lambda pairs: [task.meaning(a) == task.meaning(b) for a, b in pairs]
    if config.eval_classifier is None:
        return None
    from papers.darling.classifier import PairClassifier

    return PairClassifier(config.eval_classifier, same_label=config.same_label, threshold=config.eval_threshold)


def quality_of(config: Config, task):
    """A reward model for responses whose true quality is not known."""
    if config.task != "wildchat":
        return None
    from shared.rewards.reward_model import RewardModel

    return RewardModel(config.eval_reward_model or config.reward_model, batch_size=8)


def means(predictions: Sequence[dict]) -> dict[str, float]:
    """The mean of each score over the prompts that have it."""
    names = dict.fromkeys(name for record in predictions for name in record["scores"])
    return {
        name: float(np.mean([record["scores"][name] for record in predictions if name in record["scores"]]))
        for name in names
    }


def by_part(predictions: Sequence[dict], rows: Sequence[dict], task):
    """(part, score, mean) for the two kinds of topics of `ideas`, and for each test set from the hub."""
    if hasattr(task, "world"):
        parts = ["tight" if row["topic"] in task.world.tight else "wide" for row in rows]
    else:
        parts = [row.get("test_set") for row in rows]
    for part in dict.fromkeys(part for part in parts if part):
        chosen = [record for record, its in zip(predictions, parts, strict=True) if its == part]
        for name, value in means(chosen).items():
            if "_t" not in name:
                yield part, name, value


def front(metrics: dict[str, float], sweep: Sequence[float], *, known: bool) -> list[tuple[float, float]]:
    """(distinct, pass@1 or quality) of each temperature; `known` is false for scores of a reward model, which are then
    squashed into (0, 1)."""
    name = "pass@1" if "pass@1" in metrics else "quality"
    points = []
    for suffix in ("", *(f"_t{temperature:g}" for temperature in sweep)):
        value = metrics[f"{name}{suffix}"]
        points.append((metrics[f"distinct{suffix}"], value if known else 1 / (1 + np.exp(-value))))
    return points


def front_area(points: Sequence[tuple[float, float]]) -> float:
    """Area of the union of the rectangles (1, 0)-(distinct, quality), over that of distinct = 10, quality = 1."""
    area, covered = 0.0, 0.0
    for distinct, quality in sorted(points, reverse=True):  # from the most distinct on, only higher quality adds
        area += max(0.0, quality - covered) * (distinct - 1)
        covered = max(covered, quality)
    return area / (BLOCK - 1)


def pair_accuracy(config: Config) -> dict[str, float]:
    """Agreement of the reward's classifier with the human labels of the held-out pairs (Figure 7)."""
    from papers.darling.classifier import PairClassifier, agreement
    from shared.data.hub import load_prompts

    rows = load_prompts("similarity", "validation", source=config.pairs_source)
    classifier = PairClassifier(config.classifier, same_label=config.same_label, threshold=config.threshold)
    verdicts = classifier([tuple(row["responses"]) for row in rows])
    found = agreement(np.array(verdicts), np.array([row["similar"] for row in rows]))
    return {f"classifier_{name}": value for name, value in found.items()}


if __name__ == "__main__":
    stage_main("eval", Config, evaluate)
