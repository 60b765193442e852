"""Draw DARLING's figures from finished runs.

    python -m papers.darling.plot --runs runs/darling/tiny --out runs/darling/tiny/figures

Everything comes from eval.json, predictions.jsonl and log.jsonl; a figure whose arms were not run is left out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared.experiments import files
from shared.experiments.claims import interval, measured
from shared.experiments.paper import Operand, Paper, load_paper
from shared.experiments.results import read_run
from shared.experiments.run import finished_runs, plot_main
from shared.plotting import COLORS, bars_with_intervals, figure, legend_outside, lines_with_band, save

WORLDS = {
    "ops": "operators",
    "ideas": "ideas",
    "math4b": "maths, 4B",
    "math14b": "maths, 14B",
    "chat8b": "WildChat, 8B",
}
# One colour per method, whatever the world.
METHODS = ("base", "grpo", "darling", "x4gram", "grpo_no_std", "darling_oracle", "additive", "unlikeliness")
STYLES = {name: COLORS[i] for i, name in enumerate(METHODS)}
STYLES |= {"darling_std": "#7FCDB4", "darling_raw": "#888888"}
FRONT = ("base", "grpo", "darling", "x4gram", "additive")
CURVES = ("base", "grpo", "grpo_no_std", "x4gram", "darling", "darling_oracle")
SAMPLED = ("base", "grpo", "x4gram", "darling")
TRAINED = ("grpo", "grpo_no_std", "x4gram", "additive", "darling")


def draw(runs: Path, out: Path) -> None:
    found = finished_runs(runs)
    paper = load_paper(Path(__file__).parent.name)
    metrics = {
        arm: {seed: files.read_json(path / "eval.json")["metrics"] for seed, path in by_seed.items()}
        for arm, by_seed in found.items()
    }
    for world in WORLDS:
        arms = [arm for arm in found if arm.startswith(f"{world}_")]
        if arms:
            draw_scores(world, arms, found, paper, out)
            draw_front(world, arms, found, metrics, paper, out)
            draw_pass_at_k(world, arms, metrics, paper, out)
            draw_training(world, arms, found, paper, out)
            draw_samples(world, arms, found, paper, out)
    draw_classifier(metrics, out)


def method(arm: str) -> str:
    return arm.partition("_")[2]


def title(paper: Paper, arm: str) -> str:
    return paper.arms[arm].title.rpartition(" (")[0]


def seeds_of(values: dict[int, dict[str, float]], name: str) -> list[float]:
    return [metrics[name] for metrics in values.values()]


def draw_scores(world: str, arms: list[str], found: dict, paper: Paper, out: Path) -> None:
    """Quality and diversity of every arm (Tables 1, 2 and 5)."""
    data = {arm: {seed: read_run(path) for seed, path in found[arm].items()} for arm in arms}
    first = next(iter(data[arms[0]].values())).items
    most = max((int(name[5:]) for name in first if name.startswith("pass@") and name[5:].isdigit()), default=0)
    shown = ["pass@1", f"pass@{most}"] if most else ["quality"]
    shown += [name for name in ("distinct", "remarks", "distinct4") if name in first][:2]
    fig, panels = figure(columns=len(shown), width=2.9 * len(shown) + 1.2, height=0.9 + 0.3 * len(arms))
    for ax, name in zip(panels, shown, strict=True):
        values = {arm: measured(data, Operand(arm=arm, metric=name)) for arm in arms}
        bounds = [interval(values[arm], resamples=2000) for arm in arms]
        bars_with_intervals(
            ax,
            [title(paper, arm) for arm in arms] if ax is panels[0] else [""] * len(arms),
            [bound.effect for bound in bounds],
            [(bound.lo, bound.hi) if bound.lo is not None else None for bound in bounds],
            colors=[STYLES[method(arm)] for arm in arms],
            points=[[float(np.mean(list(v.values()))) for v in values[arm].values()] for arm in arms],
        )
        ax.set_xlabel({"distinct": "distinct meanings of 10", "remarks": "words that say nothing"}.get(name, name))
        ax.set_xlim(left=0)
    save(fig, out, f"scores_{world}")


def draw_front(world: str, arms: list[str], found: dict, metrics: dict, paper: Paper, out: Path) -> None:
    """Quality against diversity, one curve over temperatures per arm (Figure 3)."""
    shown = [arm for arm in arms if method(arm) in FRONT and has(metrics[arm], "distinct")]
    config = files.read_json(next(iter(found[arms[0]].values())) / "eval.json")["config"]
    if not shown or not config["sweep"]:
        return
    name = "pass@1" if has(metrics[shown[0]], "pass@1") else "quality"
    temperatures = {f"_t{t:g}": t for t in config["sweep"]} | {"": config["eval_temperature"]}
    suffixes = sorted(temperatures, key=temperatures.get)
    fig, ax = figure(width=5.2, height=3.6)
    for arm in shown:
        points_T2 = np.array(
            [[np.mean(seeds_of(metrics[arm], f"{part}{suffix}")) for part in ("distinct", name)] for suffix in suffixes]
        )
        color = STYLES[method(arm)]
        ax.plot(*points_T2.T, "-", color=color, label=title(paper, arm))
        ax.scatter(*points_T2.T, s=[12 * (place + 1) for place in range(len(suffixes))], color=color)
        for seed_metrics in metrics[arm].values():
            ax.plot(seed_metrics["distinct"], seed_metrics[name], ".", color=color, alpha=0.4)
    points = ", ".join(f"{temperatures[suffix]:g}" for suffix in suffixes)
    ax.set(ylabel=name, title=WORLDS[world])
    ax.set_xlabel(f"distinct meanings of 10\n(temperatures {points}, from small to large points)")
    ax.set_ylim(bottom=0)
    legend_outside(fig)
    save(fig, out, f"front_{world}")


def draw_pass_at_k(world: str, arms: list[str], metrics: dict, paper: Paper, out: Path) -> None:
    """pass@k (Figure 6)."""
    shown = [arm for arm in arms if method(arm) in CURVES and has(metrics[arm], "pass@1")]
    if not shown:
        return
    names = next(iter(metrics[shown[0]].values()))
    ks = sorted(int(name[5:]) for name in names if name.startswith("pass@") and name[5:].isdigit())
    fig, ax = figure(width=5.2, height=3.4)
    for arm in shown:
        y_SK = [[values[f"pass@{k}"] for k in ks] for values in metrics[arm].values()]
        lines_with_band(ax, ks, y_SK, title(paper, arm), color=STYLES[method(arm)], marker="o")
    ax.set_xscale("log", base=2)
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.set(xlabel="samples, k", ylabel="pass@k", ylim=(0, 1.02), title=WORLDS[world])
    legend_outside(fig)
    save(fig, out, f"pass_at_k_{world}")


def draw_training(world: str, arms: list[str], found: dict, paper: Paper, out: Path) -> None:
    """The quality reward and the entropy of the rollouts during training."""
    shown = [arm for arm in arms if method(arm) in TRAINED]
    if not shown:
        return
    fig, panels = figure(columns=2, width=9, height=3)
    for arm in shown:
        logs = [files.read_jsonl(path / "log.jsonl") for path in found[arm].values()]
        for ax, name in zip(panels, ("quality", "entropy"), strict=True):
            runs = [[row[name] for row in log if name in row] for log in logs]
            n = min(map(len, runs))
            if n:
                smooth = [np.convolve(run[:n], np.ones(min(9, n)) / min(9, n), "valid") for run in runs]
                steps = np.arange(len(smooth[0])) + min(9, n)
                lines_with_band(ax, steps, smooth, title(paper, arm), color=STYLES[method(arm)])
    panels[0].set(xlabel="step", ylabel="quality reward (mean of 9 steps)", title=WORLDS[world])
    panels[1].set(xlabel="step", ylabel="entropy per token")
    panels[1].set_ylim(bottom=0)
    legend_outside(fig)
    save(fig, out, f"training_{world}")


def draw_samples(world: str, arms: list[str], found: dict, paper: Paper, out: Path) -> None:
    """The first samples of some arms for one test prompt, of the first seed (Figures 5, 10 and 11)."""
    shown = [arm for arm in arms if method(arm) in SAMPLED]
    lines = []
    for arm in sorted(shown, key=lambda arm: SAMPLED.index(method(arm))):
        record = files.read_jsonl(found[arm][min(found[arm])] / "predictions.jsonl")[0]
        prompt = record["prompt"] if isinstance(record["prompt"], str) else record["prompt"][-1]["content"]
        lines += [] if lines else [f"prompt: {shortened(prompt)}"]
        lines += ["", title(paper, arm)] + [f"    {shortened(text)}" for text in record["outputs"][:6]]
    if not lines:
        return
    fig, ax = figure(width=7.5, height=0.4 + 0.135 * len(lines))
    ax.axis("off")
    ax.set_title(f"{WORLDS[world]}: six samples of each policy")
    # Written by a model: no formulas for matplotlib to set.
    ax.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=8, parse_math=False)
    save(fig, out, f"samples_{world}")


def shortened(text: str, most: int = 90) -> str:
    """On one line; of a long text the beginning and the end, where answers and what follows them stand."""
    text = " ".join(text.split())
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def draw_classifier(metrics: dict, out: Path) -> None:
    """Agreement of the pair classifier with the truth (Figure 7)."""
    worlds = [w for w in WORLDS if has(metrics.get(f"{w}_base", {}), "classifier_ngram_balanced_accuracy")]
    if not worlds:
        return
    kinds = {"trained classifier": "", "4-gram threshold": "ngram_", "untrained classifier": "untrained_"}
    fig, panels = figure(columns=len(worlds), width=4.6 * len(worlds), height=2.6)
    for ax, world in zip(np.atleast_1d(panels), worlds, strict=True):
        rows, means, points = [], [], []
        for kind, prefix in kinds.items():
            values = seeds_of(metrics[f"{world}_base"], f"classifier_{prefix}balanced_accuracy")
            rates = [
                np.mean(seeds_of(metrics[f"{world}_base"], f"classifier_{prefix}{rate}")) for rate in ("tpr", "fpr")
            ]
            rows.append(f"{kind}\nTPR {rates[0]:.2f}, FPR {rates[1]:.2f}")
            means.append(float(np.mean(values)))
            points.append(values)
        bars_with_intervals(
            ax, rows, means, [None] * len(rows), colors=(COLORS[2], COLORS[3], COLORS[6]), points=points
        )
        ax.axvline(0.5, color="#222222", linestyle=":", linewidth=1)
        ax.set(xlim=(0, 1), xlabel="balanced accuracy, held-out pairs", title=WORLDS[world])
    save(fig, out, "classifier")


def has(by_seed: dict[int, dict[str, float]], name: str) -> bool:
    return bool(by_seed) and all(name in metrics for metrics in by_seed.values())


if __name__ == "__main__":
    plot_main(draw)
