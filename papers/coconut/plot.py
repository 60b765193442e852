"""Draw Coconut's figures from finished runs.

    python -m papers.coconut.plot --runs runs/coconut/tiny --out runs/coconut/tiny/figures

Everything comes from eval.json and predictions.jsonl; a figure whose arms were not run is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from papers.coconut.analysis import PATH_CLASSES, cumulative_top, values_by_height
from shared.experiments import files
from shared.experiments.claims import interval, measured
from shared.experiments.paper import Operand, load_paper
from shared.experiments.results import read_run
from shared.experiments.run import finished_runs, plot_main
from shared.plotting import COLORS, arm_colors, bars_with_intervals, figure, legend_outside, save, stacked_bars

CLASS_TITLES = {
    "correct_path": "correct path",
    "longer_path": "longer path",
    "hallucination": "hallucination",
    "wrong_target": "wrong target",
    "correct_label": "right answer, no path",
    "incorrect_label": "wrong answer, no path",
}


def draw(runs: Path, out: Path) -> None:
    found = finished_runs(runs)
    paper = load_paper(Path(__file__).parent.name)
    draw_accuracy(found, paper, out)
    for arm in [name for name in found if thoughts_of(found[name])]:
        suffix = "" if arm == "coconut" else f"_{arm}"
        draw_thoughts(found, paper, arm, out, f"thoughts{suffix}")
        predictions = {seed: files.read_jsonl(path / "predictions.jsonl") for seed, path in found[arm].items()}
        ks = [k for k in thoughts_of(found[arm]) if k > 0 and has_frontier(predictions, k)]
        if ks:
            draw_parallelism(predictions, ks, out, f"parallelism{suffix}")
            draw_heights(predictions, ks, out, f"heights{suffix}")
            draw_search_tree(next(iter(predictions.values())), ks, out, f"search_tree{suffix}")
    draw_depth(found, out)
    draw_chaining(found, paper, out)


def thoughts_of(by_seed: dict[int, Path]) -> list[int]:
    """The numbers k of replaced steps that these runs were evaluated with."""
    return files.read_json(next(iter(by_seed.values())) / "eval.json")["config"]["thoughts"]


def has_frontier(predictions: dict[int, list[dict]], k: int) -> bool:
    return any(row.get("frontier_k", {}).get(str(k)) for rows in predictions.values() for row in rows)


def draw_accuracy(found: dict, paper, out: Path) -> None:
    """Accuracy and generated tokens of every arm (Table 1)."""
    names = list(found)
    colors = arm_colors(paper.arms)
    fig, panels = figure(columns=2, width=9.5, height=0.8 + 0.34 * len(names))
    for ax, metric, label in zip(
        panels, ("accuracy", "tokens"), ("accuracy", "tokens per answer, with thoughts"), strict=True
    ):
        data = {arm: {seed: read_run(path) for seed, path in by_seed.items()} for arm, by_seed in found.items()}
        values = {arm: measured(data, Operand(arm=arm, metric=metric)) for arm in names}
        bounds = {arm: interval(values[arm], resamples=2000) for arm in names}
        bars_with_intervals(
            ax,
            [paper.arms[arm].title for arm in names],
            [bounds[arm].effect for arm in names],
            [(bounds[arm].lo, bounds[arm].hi) if bounds[arm].lo is not None else None for arm in names],
            colors=[colors[arm] for arm in names],
            points=[[float(np.mean(list(v.values()))) for v in values[arm].values()] for arm in names],
        )
        ax.set_xlabel(label)
    panels[0].set_xlim(0, 1)
    save(fig, out, "accuracy")


def draw_thoughts(found: dict, paper, arm: str, out: Path, name: str) -> None:
    """Left, accuracy of final answers against k; right, the classes of what is written before them."""
    ks = thoughts_of(found[arm])
    metrics = {seed: files.read_json(path / "eval.json")["metrics"] for seed, path in found[arm].items()}
    fig, (left, right) = figure(columns=2, width=9.5, height=3.4)
    colors = arm_colors(paper.arms)
    y_SK = np.array([[m[f"accuracy_k{k}"] for k in ks] for m in metrics.values()])
    left.plot(ks, y_SK.mean(0), "o-", color=colors[arm], label=paper.arms[arm].title)
    left.fill_between(ks, y_SK.min(0), y_SK.max(0), color=colors[arm], alpha=0.18, linewidth=0)
    for other in ("cot", "no_cot"):
        if other in found:
            reached = np.mean([files.read_json(p / "eval.json")["metrics"]["accuracy"] for p in found[other].values()])
            left.axhline(reached, color=colors[other], linestyle="--", label=paper.arms[other].title)
    left.set(xlabel="steps replaced by thoughts, k", ylabel="accuracy", ylim=(0, 1.02), xticks=ks)
    left.legend()
    shown = [c for c in PATH_CLASSES if any(f"{c}_k{ks[0]}" in m for m in metrics.values())]
    parts = {CLASS_TITLES[c]: [np.mean([m[f"{c}_k{k}"] for m in metrics.values()]) for k in ks] for c in shown}
    if parts:
        stacked_bars(
            right,
            [str(k) for k in ks],
            parts,
            colors=("#009E73", "#56B4E9", "#D55E00", "#E69F00", "#7FCDB4", "#DDDDDD"),
        )
        right.set(xlabel="steps replaced by thoughts, k", ylabel="share of test problems", ylim=(0, 1))
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(fig, out, name)


def draw_parallelism(predictions: dict[int, list[dict]], ks: Sequence[int], out: Path, name: str) -> None:
    """Summed probability of the 1, 2 and 3 likeliest frontier nodes per test problem, sorted (one panel per k)."""
    fig, panels = figure(columns=len(ks), width=3.6 * len(ks), height=3.2)
    for ax, k in zip(np.atleast_1d(panels), ks, strict=True):
        cases = [
            [node["value"] for node in row["frontier_k"][str(k)]]
            for rows in predictions.values()
            for row in rows
            if row.get("frontier_k", {}).get(str(k))
        ]
        curves = cumulative_top(cases)
        percentile = 100 * (np.arange(curves.shape[1]) + 0.5) / curves.shape[1]
        for m, curve in enumerate(curves, start=1):
            ax.plot(percentile, curve, color=COLORS[m - 1], label=f"top {m}")
        ax.set(title=f"after {k} thought{'s' if k > 1 else ''}", xlabel="percentile of test problems", ylim=(0, 1.02))
    np.atleast_1d(panels)[0].set_ylabel("summed probability")
    legend_outside(fig)
    save(fig, out, name)


def draw_heights(predictions: dict[int, list[dict]], ks: Sequence[int], out: Path, name: str) -> None:
    """Mean probability of frontier nodes that can and cannot reach the target, by their height."""
    fig, panels = figure(columns=len(ks), width=3.6 * len(ks), height=3.2)
    for ax, k in zip(np.atleast_1d(panels), ks, strict=True):
        nodes = [n for rows in predictions.values() for row in rows for n in row.get("frontier_k", {}).get(str(k), ())]
        groups = values_by_height(nodes)
        for correct, color, label in ((True, COLORS[2], "can reach the target"), (False, COLORS[4], "cannot")):
            heights = [h for h, c in groups if c is correct]
            means = [groups[h, correct].mean() for h in heights]
            errors = [groups[h, correct].std() / np.sqrt(len(groups[h, correct])) for h in heights]
            ax.errorbar(heights, means, yerr=errors, fmt="o-", color=color, label=label, capsize=2)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(
            title=f"after {k} thought{'s' if k > 1 else ''}", xlabel="height (fewest edges to a leaf)", ylim=(0, 1.02)
        )
    np.atleast_1d(panels)[0].set_ylabel("probability of the node")
    legend_outside(fig)
    save(fig, out, name)


def draw_search_tree(rows: list[dict], ks: Sequence[int], out: Path, name: str) -> None:
    """The widest test problem's frontier after each number of thoughts: edges, and the probability of each node."""

    def width(row: dict) -> int:
        return sum(len(row.get("frontier_k", {}).get(str(k), ())) for k in ks)

    row = max(rows, key=width)
    facts, _, asked = row["question"].partition(" ? ")  # one token per fact, or sentences
    told = re.findall(r"(\w+)>(\w+)", facts) or re.findall(r"(\w+) is a (\w+)\.", row["question"])
    if asked:
        root, *options = asked.split()
        asked = f"Is {root} a {' or '.join(options)}?"
    else:
        asked = row["question"].rpartition(". ")[2]
    fig, ax = figure(width=6.5, height=1.1 + 0.9 * len(ks))
    above: dict[str, float] = {}
    for level, k in enumerate(ks):
        nodes = sorted(row["frontier_k"][str(k)], key=lambda node: node["symbol"])
        place = {node["symbol"]: (i + 0.5) / len(nodes) for i, node in enumerate(nodes)}
        for source, destination in told:
            if source in above and destination in place:
                ax.plot([above[source], place[destination]], [1 - level, -level], color="#BBBBBB", lw=1, zorder=0)
        for node in nodes:
            at = (place[node["symbol"]], -level)
            color = COLORS[2] if node["correct"] else "#999999"
            ax.scatter(*at, s=900, color="white")  # so that no edge shines through
            ax.scatter(*at, s=900, color=color, alpha=0.15 + 0.75 * min(1.0, node["value"]), edgecolors=color)
            ax.annotate(f"{node['symbol']}\n{node['value']:.2f}", at, ha="center", va="center", fontsize=8)
        ax.annotate(f"after {k} thought{'s' if k > 1 else ''}", (-0.02, -level), ha="right", va="center")
        above = place
    title = f"{asked} {row['expected'].rstrip('.')}. Green nodes can reach the target, lines are edges"
    ax.set(title=title, xlim=(-0.22, 1.05), ylim=(-len(ks) + 0.4, 0.6))
    ax.set_axis_off()
    save(fig, out, name)


def draw_depth(found: dict, out: Path) -> None:
    """Accuracy against the number of layers: thoughts come one after the other, pauses all at once."""
    fig, ax = figure()
    for color, (method, label) in zip(
        COLORS, (("coconut", "Coconut"), ("pause_as_thought", "pause as thought")), strict=False
    ):
        points: dict[int, list[float]] = {}
        for arm in (method, *(arm for arm in found if arm.startswith(f"{method}_") and arm.endswith("_layers"))):
            for path in found.get(arm, {}).values():
                record = files.read_json(path / "eval.json")
                points.setdefault(record["config"]["layers"], []).append(record["metrics"]["accuracy"])
        if len(points) < 2:
            return
        layers = sorted(points)
        ax.plot(layers, [np.mean(points[n]) for n in layers], "o-", color=color, label=label)
        for n in layers:
            ax.plot([n] * len(points[n]), points[n], ".", color=color, alpha=0.5)
    ax.set(xlabel="layers", ylabel="accuracy", ylim=(0, 1.02))
    ax.legend()
    save(fig, out, "depth")


def draw_chaining(found: dict, paper, out: Path) -> None:
    """Accuracy on arithmetic against thoughts per step, c: does chaining them add something?"""
    for task in ("arith", "gsm8k"):
        arms = {0: f"{task}_no_thought", 1: f"{task}_coconut_c1", 2: f"{task}_coconut"}
        have = {c: arm for c, arm in arms.items() if arm in found}
        if len(have) < 2:
            continue
        fig, ax = figure()
        y_SC = [
            [files.read_json(found[arm][seed] / "eval.json")["metrics"]["accuracy"] for arm in have.values()]
            for seed in found[next(iter(have.values()))]
        ]
        ax.plot(list(have), np.mean(y_SC, axis=0), "o-", color=COLORS[0], label="Coconut")
        for row in y_SC:
            ax.plot(list(have), row, ".", color=COLORS[0], alpha=0.5)
        for other in (f"{task}_cot", f"{task}_no_cot"):
            if other in found:
                reached = np.mean(
                    [files.read_json(p / "eval.json")["metrics"]["accuracy"] for p in found[other].values()]
                )
                ax.axhline(
                    reached,
                    linestyle="--",
                    color=COLORS[4 if other.endswith("no_cot") else 1],
                    label=paper.arms[other].title,
                )
        ax.set(xlabel="thoughts per step, c", ylabel="accuracy", xticks=list(have), ylim=(0, 1.02))
        ax.legend()
        save(fig, out, f"chaining_{task}")


if __name__ == "__main__":
    plot_main(draw)
