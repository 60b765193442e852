"""results.json: everything a report says about one paper at one scale, collected from the runs' own files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.experiments import files
from shared.experiments.claims import RunScores, interval, judge, mean, measured
from shared.experiments.errors import UserError
from shared.experiments.paper import Operand, Paper

SCHEMA_VERSION = 1
SMOKE_NOTE = "smoke proves that the pipeline runs; it claims nothing"

# What a report tells of each stage of each run; the key says from which config, code and libraries it came.
FACTS = ("key", "seconds", "cpu_seconds", "peak_memory_mb", "peak_gpu_memory_mb", "device", "finished")

# Means are quoted to a few digits: fewer resamples do than for a verdict that may hang on the third.
MEAN_RESAMPLES = 2_000


def write_results(
    paper: Paper, scale: str, runs_dir: Path, seeds: Sequence[int], arms: Sequence[str], info: dict[str, Any]
) -> dict:
    """Collects the runs in `runs_dir`, judges the claims, and writes runs_dir/results.json.

    Args:
        runs_dir: runs/PAPER/SCALE, with ARM/SEED/ for each run.
        seeds, arms: what was asked for; a run among them without results is listed as missing.
        info: how the runs were made, copied as it is: command, commit, dirty, versions, hardware, wall_seconds.
            `failed`, if there, maps "ARM/SEED" to what went wrong; such a run counts as missing even if an older
            result of it is still on disk.

    Returns:
        What is in the file: schema_version, paper, title, scale, seeds, finished (when the last run
        was), info, arms, claims, claims_note, figures, missing.

    Raises:
        UserError: a broken file, a number that is not finite, an item scored twice, or a mean that contradicts the
            scores behind it; names file and key.
    """
    data: dict[str, dict[int, RunScores]] = {}
    runs: dict[str, dict[int, dict]] = {}
    missing: dict[tuple[str, int], str] = {}
    for arm in arms:
        for seed in seeds:
            directory = Path(runs_dir) / arm / str(seed)
            failed = info.get("failed", {})
            if reason := failed.get(f"{arm}/{seed}") or _missing(directory):
                missing[arm, seed] = reason
            else:
                data.setdefault(arm, {})[seed] = read_run(directory)
                runs.setdefault(arm, {})[seed] = _facts(directory)
    # First, because its errors name arm and metric.
    summary = {arm: _arm(paper, arm, data.get(arm, {}), runs.get(arm, {})) for arm in arms}
    claims = []
    if scale != "smoke":
        claims = [dataclasses.asdict(judge(claim, data, scale, missing=missing)) for claim in paper.claims]
    results = {
        "schema_version": SCHEMA_VERSION,
        "paper": paper.name,
        "title": paper.title,
        "scale": scale,
        "seeds": list(seeds),
        "finished": max(
            (run["eval"]["finished"] or "" for by_seed in runs.values() for run in by_seed.values()), default=""
        ),
        "info": info,
        "arms": summary,
        "claims": claims,
        "claims_note": SMOKE_NOTE if scale == "smoke" else "",
        "figures": _figures(paper, scale, Path(runs_dir)),
        "missing": [{"arm": arm, "seed": seed, "reason": reason} for (arm, seed), reason in missing.items()],
    }
    # Not files.write_json: arms and metrics keep the paper's order.
    files.write_text(Path(runs_dir) / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def read_results(path: Path) -> dict:
    """A results.json of this schema version."""
    results = files.read_json(path)
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {version!r}, expected {SCHEMA_VERSION}: run `make reproduce` again")
    return results


def read_run(directory: Path) -> RunScores:
    """The metrics of eval.json and the scores of predictions.jsonl of one run, checked."""
    path = directory / "eval.json"
    scalars = {metric: _number(value, f"{path}: metrics.{metric}") for metric, value in _metrics(path, "eval").items()}
    items = _scores(directory / "predictions.jsonl")
    for metric, scores in items.items():
        # eval.json may round; a difference beyond that is a metric with two meanings.
        if metric in scalars and not math.isclose(scalars[metric], mean(scores), rel_tol=1e-3, abs_tol=1e-3):
            raise UserError(
                f"{path}: metrics.{metric} is {scalars[metric]:g} but the mean of that score in predictions.jsonl is "
                f"{mean(scores):g}: fix eval.py, or give the two different names"
            )
    return RunScores(scalars, items)


def _missing(directory: Path) -> str:
    for stage in ("train", "eval"):
        if not (directory / f"{stage}.json").is_file():
            return f"no {stage}.json"
    return ""


def _metrics(path: Path, stage: str) -> dict:
    record = files.read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        raise UserError(f"{path}: no `metrics`: {stage}.py must return a dict of numbers; delete the file, run again")
    return record["metrics"]


def _scores(path: Path) -> dict[str, dict[str, float]]:
    """metric -> item -> score; {} when the paper's evaluation writes no predictions."""
    if not path.is_file():
        return {}
    found: dict[str, dict[str, float]] = {}
    for number, row in enumerate(files.read_jsonl(path), start=1):
        where = f"{path}:{number}"
        if not isinstance(row, dict) or "item" not in row or not isinstance(row.get("scores"), dict):
            raise UserError(f'{where}: a row needs "item" and "scores": {{metric: number}}')
        item = str(row["item"])
        for metric, value in row["scores"].items():
            scores = found.setdefault(metric, {})
            if item in scores:
                raise UserError(f"{where}: item {item!r} already has a score for {metric}: items must differ")
            scores[item] = _number(value, f"{where}: scores.{metric}")
    return found


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {value!r} is not a finite number")
    return float(value)


def _facts(directory: Path) -> dict:
    facts: dict[str, Any] = {}
    for stage in ("train", "eval"):
        record = files.read_json(directory / f"{stage}.json")
        facts[stage] = {name: record.get(name) for name in FACTS}
    return facts


def _arm(paper: Paper, name: str, data: dict[int, RunScores], runs: dict[int, dict]) -> dict:
    return {
        "title": paper.arms[name].title,
        "runs": {str(seed): facts for seed, facts in runs.items()},
        "metrics": {metric: _metric(name, metric, data) for metric in _common_metrics(data)},
    }


def _common_metrics(data: dict[int, RunScores]) -> list[str]:
    """Metrics that every run has in the same form, in the order of the first run."""
    runs = list(data.values())
    forms = [[run.items for run in runs], [run.scalars for run in runs]]
    return list(dict.fromkeys(m for form in forms if form for m in form[0] if all(m in run for run in form)))


def _metric(arm: str, metric: str, data: dict[int, RunScores]) -> dict:
    values = measured({arm: data}, Operand(arm=arm, metric=metric))
    try:
        found = interval(values, resamples=MEAN_RESAMPLES)
    except UserError as error:
        raise UserError(f"arm {arm}, {metric}: {error}") from error
    return {
        "mean": found.effect,
        "lo": found.lo,
        "hi": found.hi,
        "items": found.items,
        "note": found.note,
        "per_seed": {str(seed): mean(value) for seed, value in sorted(values.items())},
    }


def _figures(paper: Paper, scale: str, runs_dir: Path) -> list[dict]:
    """The figures of paper.yaml for this scale; `drawn` says whether plot.py made them."""
    planned = [f for f in paper.figures if ("tiny" if scale == "smoke" else scale) in f.scales]
    return [
        {
            "file": f.file,
            "shows": f.shows,
            "paper": f.paper,
            "drawn": (runs_dir / "figures" / f"{f.file}.png").is_file(),
        }
        for f in planned
    ]
