"""Draw DivPO's figures from finished runs.

    python -m papers.divpo.plot --runs runs/divpo/tiny --out runs/divpo/tiny/figures

Everything comes from eval.json, predictions.jsonl and log.jsonl; a figure whose arms were not run is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from shared.evaluation.diversity import words
from shared.experiments import files, finished_runs, plot_main
from shared.experiments.paper import Paper, load_paper
from shared.plotting import COLORS, figure, legend_outside, lines_with_band, save

Runs = Mapping[int, Path]
ONLINE_PERSONA = ("persona_dpo", "persona_divpo", "persona_divpo_freq", "persona_grpo")
NAMES_OF = ("persona_base", *ONLINE_PERSONA)
SWEPT = ("keywords_base", "keywords_dpo", "keywords_dpo_beta", "keywords_divpo", "keywords_grpo")
COUNTED = ("keywords_dpo", "keywords_grpo", "keywords_divpo")
RHO_CURVES = {
    "probability": [f"keywords_divpo{rho}" for rho in ("_rho10", "_rho20", "", "_rho40", "_rho50")],
    "frequency": ["keywords_divpo_freq_rho10", "keywords_divpo_freq"],
    "judge": ["keywords_divpo_judge_rho10", "keywords_divpo_judge"],
}


def draw(runs: Path, out: Path) -> None:
    found = finished_runs(runs)
    paper = load_paper(Path(__file__).parent.name)
    persona = {arm: by_seed for arm, by_seed in found.items() if arm.startswith("persona")}
    keywords = {arm: by_seed for arm, by_seed in found.items() if arm.startswith("keywords")}
    if persona:
        draw_names(persona, paper, out)
        draw_training(persona, paper, out)
        draw_persona(persona, paper, out)
    if keywords:
        draw_pareto(keywords, paper, out)
        draw_words(keywords, paper, out)
        draw_temperatures(keywords, paper, out)


def colors_of(arms: Iterable[str]) -> dict[str, str]:
    return dict(zip(arms, COLORS * 3, strict=False))


def numbers(by_seed: Runs, name: str) -> list[float]:
    """The metric in each seed that has it."""
    found = [files.read_json(path / "eval.json")["metrics"] for path in by_seed.values()]
    return [metrics[name] for metrics in found if name in metrics]


def config_of(by_seed: Runs) -> dict:
    return files.read_json(next(iter(by_seed.values())) / "eval.json")["config"]


def curve(by_seed: Runs, x: str, y: str) -> tuple[list[float], list[float], list[float]]:
    """Temperatures and the means over seeds of two metrics at them, where all seeds have both."""
    temperatures = sorted({1.0, *config_of(by_seed)["temperatures"]})
    points = []
    for t in temperatures:
        suffix = "" if t == 1 else f"_t{t:g}"
        xs, ys = numbers(by_seed, x + suffix), numbers(by_seed, y + suffix)
        if len(xs) == len(ys) == len(by_seed):
            points.append((t, float(np.mean(xs)), float(np.mean(ys))))
    t, xs, ys = zip(*points, strict=True)
    return list(t), list(xs), list(ys)


def draw_names(found: Mapping[str, Runs], paper: Paper, out: Path) -> None:
    """Share of the valid samples that have the first name of each rank (Figure 2)."""
    from shared.rewards.format import parse_attributes

    fig, ax = figure(width=6)
    arms = [arm for arm in NAMES_OF if arm in found]
    for arm, color in colors_of(arms).items():
        counts: Counter[int] = Counter()
        for path in found[arm].values():
            samples = [parse_attributes(row["output"], ["first_name"]) for row in read_rows(path)]
            names = Counter(sample["first_name"] for sample in samples if sample)
            for rank, (_, count) in enumerate(names.most_common(), start=1):
                counts[rank] += count / names.total() / len(found[arm])
        ax.plot(list(counts), list(counts.values()), color=color, label=paper.arms[arm].title)
    ax.set(xscale="log", yscale="log", xlabel="rank of the first name", ylabel="share of valid samples")
    ax.legend()
    save(fig, out, "names")


def read_rows(path: Path) -> list[dict]:
    return files.read_jsonl(path / "predictions.jsonl")


def draw_training(found: Mapping[str, Runs], paper: Paper, out: Path) -> None:
    """Validity and diversity of each step's samples while the policy samples for itself."""
    arms = [arm for arm in ONLINE_PERSONA if arm in found]
    if not arms:
        return
    fig, panels = figure(columns=2, width=9.5, height=3.2)
    for arm, color in colors_of([*NAMES_OF]).items():
        if arm not in arms:
            continue
        logs = [
            [row for row in files.read_jsonl(p / "log.jsonl") if row["stage"] == "train"] for p in found[arm].values()
        ]
        for ax, name in zip(panels, ("rollout/unique", "rollout/reward"), strict=True):
            steps = [row["step"] for row in logs[0] if all(name in seed[row["step"] - 1] for seed in logs)]
            if steps:
                y_SX = smooth(np.array([[seed[step - 1][name] for step in steps] for seed in logs]))
                lines_with_band(ax, steps, y_SX, paper.arms[arm].title, color)
    panels[0].set(xlabel="step", ylabel="unique attributes of 100 valid samples")
    panels[1].set(xlabel="step", ylabel="valid samples")
    legend_outside(fig, "lower center", columns=len(arms))
    save(fig, out, "training")


def smooth(y_SX: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving mean; shorter at both ends."""
    kernel = np.ones(min(width, y_SX.shape[1]))
    norm = np.convolve(np.ones(y_SX.shape[1]), kernel, "same")
    return np.array([np.convolve(y, kernel, "same") / norm for y in y_SX])


def draw_persona(found: Mapping[str, Runs], paper: Paper, out: Path) -> None:
    """Unique attributes against validity: every arm, and base and DPO at several temperatures."""
    fig, ax = figure(width=7.5, height=3.8)
    scatter_arms(ax, found, paper, "valid", "unique")
    ax.set(xlabel="valid samples", ylabel="unique attributes of 100 valid samples")
    legend_outside(fig)
    save(fig, out, "persona")


def draw_pareto(found: Mapping[str, Runs], paper: Paper, out: Path) -> None:
    """Unique words against reward: every arm, base and DPO at several temperatures, DivPO along rho (Figure 4)."""
    fig, ax = figure(width=8, height=4.2)
    scatter_arms(ax, found, paper, "reward", "unique")
    for criterion, arms in RHO_CURVES.items():
        have = [arm for arm in arms if arm in found]
        if len(have) > 1:
            xs, ys = ([np.mean(numbers(found[arm], name)) for arm in have] for name in ("reward", "unique"))
            ax.plot(xs, ys, color="#222222", linewidth=0.9, zorder=1, label=f"{criterion}, along rho")
    n = config_of(next(iter(found.values())))["samples_per_prompt"]
    ax.set(xlabel="reward (more is better)", ylabel=f"unique words of {n} samples (more is more diverse)")
    legend_outside(fig)
    save(fig, out, "pareto")


def scatter_arms(ax, found: Mapping[str, Runs], paper: Paper, x: str, y: str) -> None:
    """A point for each arm at temperature 1, small ones for its seeds, a dashed line along its temperatures."""
    markers = dict(zip(found, "osD^v<>PX*" * 3, strict=False))
    for arm, color in colors_of(found).items():
        xs, ys = numbers(found[arm], x), numbers(found[arm], y)
        ax.plot(xs, ys, ".", color=color, alpha=0.5, markersize=3)
        ax.plot([np.mean(xs)], [np.mean(ys)], markers[arm], color=color, markersize=7, label=paper.arms[arm].title)
        if config_of(found[arm])["temperatures"]:
            _, xs, ys = curve(found[arm], x, y)
            ax.plot(xs, ys, "--", color=color, linewidth=1, alpha=0.8)


def draw_words(found: Mapping[str, Runs], paper: Paper, out: Path) -> None:
    """How many of one title's samples have each word, DPO and DivPO (Figure 6), and GRPO."""
    arms = [arm for arm in COUNTED if arm in found]
    if len(arms) < 2:
        return
    seed, path = next(iter(found[arms[0]].items()))
    item = read_rows(path)[0]["item"]
    fig, panels = figure(columns=len(arms), width=9.5, height=3.4)
    for ax, arm, color in zip(panels, arms, COLORS[1:], strict=False):
        row = next(row for row in read_rows(found[arm][seed]) if row["item"] == item)
        counts = Counter(word for text in row["outputs"] for word in set(words(text)))
        heights = [count for _, count in counts.most_common()]
        ax.bar(range(len(heights)), heights, color=color, width=0.9)
        ax.set(xlabel="word, by frequency", title=f"{paper.arms[arm].title}: {len(heights)} words")
        ax.annotate(f"mean reward {row['scores']['reward']:.2f}", (0.97, 0.9), xycoords="axes fraction", ha="right")
    top = max(ax.get_ylim()[1] for ax in panels)
    right = max(ax.get_xlim()[1] for ax in panels)
    for ax in panels:
        ax.set(ylim=(0, top), xlim=(-1, right))
    panels[0].set_ylabel(f"samples with the word, of {len(row['outputs'])}")
    fig.suptitle(f"title: {item}", fontsize=9)
    save(fig, out, "words")


def draw_temperatures(found: Mapping[str, Runs], paper: Paper, out: Path) -> None:
    """Reward and unique words against the sampling temperature."""
    arms = [arm for arm in SWEPT if arm in found and config_of(found[arm])["temperatures"]]
    if not arms:
        return
    fig, panels = figure(columns=2, width=9.5, height=3.2)
    for arm, color in colors_of(arms).items():
        temperatures, reward, unique = curve(found[arm], "reward", "unique")
        for ax, ys in zip(panels, (reward, unique), strict=True):
            ax.plot(temperatures, ys, "o-", color=color, label=paper.arms[arm].title)
    panels[0].set(xlabel="temperature", ylabel="reward")
    panels[1].set(xlabel="temperature", ylabel="unique words")
    legend_outside(fig, "lower center", columns=len(arms))
    save(fig, out, "temperatures")


if __name__ == "__main__":
    plot_main(draw)
