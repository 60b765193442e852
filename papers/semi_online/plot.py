"""Draw the figures from finished runs.

    python -m papers.semi_online.plot --runs runs/semi_online/tiny --out runs/semi_online/tiny/figures

Everything comes from eval.json, predictions.jsonl and log.jsonl; a figure whose arms were not run is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from papers.semi_online.eval import rollout_series
from shared.experiments import files
from shared.experiments.claims import interval, measured
from shared.experiments.paper import Operand, load_paper
from shared.experiments.results import read_run
from shared.experiments.run import finished_runs, plot_main
from shared.plotting import COLORS, bars_with_intervals, figure, legend_outside, lines_with_band, save

MATH = ("offline", "rare", "s10", "s1", "grpo")
CHAT = ("chat_offline", "chat_s10", "chat_s1", "chat_grpo")
SMOOTH = 9  # steps in a moving mean of what is logged at every step


def draw(runs: Path, out: Path) -> None:
    arms = Arms(runs)
    draw_accuracy(arms, out)
    draw_staleness(arms, out)
    draw_curves(arms, out)
    draw_rollouts(arms, MATH, out, "entropy")
    draw_steps(arms, ("s1", "s1_frozen"), ("length", "dev_accuracy", "entropy"), out, "reference")
    for first, file in (("s10", "entropy_bonus"), ("rare", "entropy_bonus_100")):
        bonus = [arm for arm in arms.found if arm.startswith(f"{first}_entropy")]
        draw_steps(arms, (first, *bonus), ("dev_accuracy", "entropy"), out, file)
    if arms.hub:
        draw_steps(arms, ("s1", "s1_frozen"), ("chosen_length", "rejected_length"), out, "lengths")
    draw_steps(arms, (*CHAT, "chat_s5"), ("chosen_length", "rejected_length"), out, "chat_lengths")
    draw_steps(arms, ("s10", "group_dpo", "group_dpo_grpo"), ("dev_accuracy", "entropy"), out, "group")
    draw_steps(arms, ("s10", "s10_nll", "s1"), ("dev_accuracy", "entropy", "chosen"), out, "nll")
    draw_chat(arms, out)
    draw_combined(arms, out)


class Arms:
    """The finished runs, read once."""

    def __init__(self, runs: Path):
        self.paper = load_paper(Path(__file__).parent.name)
        self.found = finished_runs(runs)
        self.logs = {arm: {s: _log(path) for s, path in by_seed.items()} for arm, by_seed in self.found.items()}
        self.evals = {
            arm: {s: files.read_json(path / "eval.json") for s, path in by_seed.items()}
            for arm, by_seed in self.found.items()
        }
        self._scores = {arm: {s: read_run(path) for s, path in by_seed.items()} for arm, by_seed in self.found.items()}

    @property
    def hub(self) -> bool:
        """Whether these are the paper's models and data."""
        return any(run["config"]["world"] == "hub" for by_seed in self.evals.values() for run in by_seed.values())

    def here(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.found]

    def title(self, arm: str) -> str:
        config = next(iter(self.evals[arm].values()))["config"]
        weight = f", λ = {config['entropy_weight']:g}" if config.get("entropy_weight") else ""
        title = f"semi-online DPO, s = {config['sync_steps']}" if arm == "rare" else self.paper.arms[arm].title
        return title + weight

    def summary(self, arm: str, metric: str):
        """(mean, interval or None, one value per seed); None if the arm has no such metric."""
        if any(metric not in run.items and metric not in run.scalars for run in self._scores[arm].values()):
            return None
        values = measured(self._scores, Operand(arm=arm, metric=metric))
        found = interval(values, resamples=2000)
        per_seed = [float(np.mean(list(v.values()))) if isinstance(v, dict) else float(v) for v in values.values()]
        return found.effect, None if found.lo is None else (found.lo, found.hi), per_seed

    def dev(self, arm: str, metric: str) -> tuple[list[int], np.ndarray] | None:
        """(steps, values [seeds, steps]) on held-out prompts."""
        rows = [[r for r in log if r["stage"] == "eval" and metric in r] for log in self.logs[arm].values()]
        if not all(rows):
            return None
        return [row["policy_step"] for row in rows[0]], np.array([[row[metric] for row in of] for of in rows])

    def rollouts(self, arm: str, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(steps, values [seeds, steps]) of entropy or length of the rollouts, or of a key of the log, smoothed."""
        series = []
        for log in self.logs[arm].values():
            rows = [row for row in log if row["stage"] == "train" and "loss" in row]
            values = rollout_series(rows)[name] if name in ("entropy", "length") else [row.get(name) for row in rows]
            series.append(values)
        y_SX = np.array(series, dtype=float)  # NaN where a step has no such value (lengths of pairs, without a pair)
        known_SX = ~np.isnan(y_SX)
        if not known_SX.any(1).all():
            return None
        kernel = np.ones(min(SMOOTH, y_SX.shape[1]))
        sums_SX, counts_SX = (
            np.array([np.convolve(y, kernel, mode="valid") for y in values_SX])
            for values_SX in (np.where(known_SX, y_SX, 0.0), known_SX.astype(float))
        )
        smooth_SX = np.where(counts_SX > 0, sums_SX / np.maximum(counts_SX, 1), np.nan)
        width = len(kernel)
        return np.arange(smooth_SX.shape[1]) + (width + 1) / 2, smooth_SX

    def sampled(self, arm: str, steps: Sequence[int]) -> np.ndarray:
        """Tokens sampled up to each of `steps`, mean over seeds: mean length times B N, summed."""
        config = next(iter(self.evals[arm].values()))["config"]
        each = config[config["phases"][-1]]["prompts"] * config["num_generations"]
        per_step = np.mean(
            [
                rollout_series([r for r in log if r["stage"] == "train" and "loss" in r])["length"]
                for log in self.logs[arm].values()
            ],
            axis=0,
        )
        total = np.concatenate([[0.0], np.cumsum(per_step * each)])
        return total[np.asarray(steps)]


def colors_of(names: Sequence[str]) -> dict[str, str]:
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def draw_accuracy(arms: Arms, out: Path) -> None:
    """Test accuracy of every arm that trains on math (Table 1), at its best and at its last checkpoint."""
    names = [arm for arm in arms.found if arms.summary(arm, "accuracy")]
    if not names:
        return
    fig, panels = figure(columns=2, width=10, height=0.9 + 0.32 * len(names))
    for ax, metric, title in zip(
        panels, ("accuracy", "accuracy_last"), ("best checkpoint on held-out prompts", "last checkpoint"), strict=True
    ):
        bars(ax, arms, names, metric)
        ax.set(xlabel="accuracy", xlim=(0, 1), title=title)
    panels[1].set_yticklabels([])
    save(fig, out, "accuracy")


def bars(ax, arms: Arms, names: Sequence[str], metric: str) -> None:
    found = [arms.summary(arm, metric) for arm in names]
    bars_with_intervals(
        ax,
        [arms.title(arm) for arm in names],
        [f[0] for f in found],
        [f[1] for f in found],
        colors=[COLORS[0] if arm == "base" else COLORS[2] if "grpo" in arm else COLORS[5] for arm in names],
        points=[f[2] for f in found],
    )


def draw_staleness(arms: Arms, out: Path) -> None:
    """Test accuracy and win rate against s; tokens per second and calls of generation (real, of these runs)."""
    math = arms.here(("offline", "rare", "s10", "s1"))
    if len(math) < 2:
        return
    chat = arms.here(("chat_offline", "chat_s10", "chat_s5", "chat_s1"))
    fig, (left, middle, right) = figure(columns=3, width=12.5)
    for ax, names, metric in ((left, math, "accuracy"), (middle, chat, "win_rate")):
        for suffix, style, label in (("", "o-", "best checkpoint"), ("_last", "s--", "last checkpoint")):
            found = [arms.summary(arm, metric + suffix) for arm in names]
            if not names or None in found:
                continue
            (line,) = ax.plot(range(len(names)), [f[0] for f in found], style, label=f"DPO, {label}")
            for x, f in enumerate(found):
                ax.plot([x] * len(f[2]), f[2], ".", color=line.get_color(), alpha=0.5)
        for other, color in (("grpo", COLORS[2]), ("base", COLORS[6])):
            arm = other if ax is left or other == "base" else f"chat_{other}"
            if arm in arms.found and (f := arms.summary(arm, metric)):
                ax.axhline(f[0], color=color, linestyle=":", label=arms.title(arm))
        ax.set_xticks(range(len(names)), [s_label(arms, arm) for arm in names])
        ax.set(xlabel="steps between copies to the generator, s", ylabel=metric.replace("_", " "))
    left.legend()
    ticks = sorted({s_label(arms, arm) for arm in (*math, *chat)}, key=lambda s: -float(s.replace("∞", "inf")))
    for names, color, label in ((math, COLORS[0], "math"), (chat, COLORS[1], "chat")):
        speed = [arms.summary(arm, "generated_tokens_per_second") for arm in names]
        if not names or None in speed:
            continue
        at = [ticks.index(s_label(arms, arm)) for arm in names]
        right.plot(at, [f[0] / 1000 for f in speed], "o-", color=color, label=label)
        if label == "math":
            for x, y, arm in zip(at, speed, names, strict=True):
                calls = arms.summary(arm, "generator_calls")[0]
                right.annotate(f"{calls:.0f} calls", (x, y[0] / 1000), xytext=(0, 6), textcoords="offset points")
    right.set_xticks(range(len(ticks)), ticks)
    right.set(xlabel="s", ylabel="sampled tokens per second, thousands", ylim=(0, None))
    right.legend(loc="lower left")
    save(fig, out, "staleness")


def s_label(arms: Arms, arm: str) -> str:
    s = next(iter(arms.evals[arm].values()))["config"]["sync_steps"]
    return "∞" if s is None else str(s)


def draw_curves(arms: Arms, out: Path) -> None:
    """Accuracy on held-out problems against steps and against sampled tokens."""
    names = arms.here((*MATH, "grpo_n4", "grpo_n12"))
    fig, (left, right) = figure(columns=2, width=10)
    for arm, color in colors_of(names).items():
        if found := arms.dev(arm, "dev_accuracy"):
            steps, y_SX = found
            lines_with_band(left, steps, y_SX, arms.title(arm), color, marker="o")
            lines_with_band(right, arms.sampled(arm, steps) / 1000, y_SX, arms.title(arm), color, marker="o")
    left.set(xlabel="optimizer steps", ylabel="accuracy on held-out problems")
    right.set(xlabel="sampled tokens, thousands")
    if not left.lines:
        return
    legend_outside(fig)
    save(fig, out, "curves")


def draw_rollouts(arms: Arms, names: Sequence[str], out: Path, name: str) -> None:
    """Entropy and length of the rollouts by step (Figure 3)."""
    fig, (left, right) = figure(columns=2, width=10)
    for arm, color in colors_of(arms.here(names)).items():
        for ax, what in ((left, "entropy"), (right, "length")):
            if found := arms.rollouts(arm, what):
                lines_with_band(ax, *found, arms.title(arm), color)
    if not left.lines:
        return
    left.set(xlabel="optimizer step", ylabel=LABELS["entropy"])
    right.set(xlabel="optimizer step", ylabel=LABELS["length"])
    for ax in (left, right):
        from_zero(ax)
    legend_outside(fig)
    save(fig, out, name)


def from_zero(ax) -> None:
    """The vertical axis from 0 to a little above the highest line."""
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])


LABELS: dict[str, str] = {
    "dev_accuracy": "accuracy on held-out problems",
    "entropy": "entropy of the rollouts, nats per token",
    "length": "length of the rollouts, tokens",
    "chosen": "log-probability of the chosen response",
    "chosen_length": "length of chosen responses, tokens",
    "rejected_length": "length of rejected responses, tokens",
}
KEYS = {
    "chosen": "logps/chosen",
    "chosen_length": "rollout/chosen_length",
    "rejected_length": "rollout/rejected_length",
}


def draw_steps(arms: Arms, names: Sequence[str], panels: Sequence[str], out: Path, file: str) -> None:
    """Some quantities by optimizer step for some arms."""
    names = arms.here(names)
    if len(names) < 2:
        return
    fig, axes = figure(columns=len(panels), width=4.4 * len(panels) + 1)
    for ax, what in zip(axes, panels, strict=True):
        read: Callable = arms.dev if what.startswith("dev_") else arms.rollouts
        key = KEYS.get(what, what)
        for arm, color in colors_of(names).items():
            if found := read(arm, key):
                lines_with_band(ax, *found, arms.title(arm), color, marker="o" if read == arms.dev else "")
        ax.set(xlabel="optimizer step", ylabel=LABELS[what])
        if "length" in what or what == "entropy":
            from_zero(ax)
    if any(ax.lines for ax in axes):
        legend_outside(fig)
        save(fig, out, file)


def draw_chat(arms: Arms, out: Path) -> None:
    """What the learned reward says of held-out responses, and what the hidden reader says, by step."""
    names = arms.here((*CHAT, "chat_s5"))
    metrics = {
        "dev_reward": "score of the reward model",
        "dev_gold": "gold score",
        "dev_chat_length": "length of the responses, tokens",
    }
    metrics = {name: label for name, label in metrics.items() if any(arms.dev(arm, name) for arm in names)}
    if not metrics:
        return
    fig, axes = figure(columns=len(metrics) + 1, width=3.6 * (len(metrics) + 1) + 1.5)
    for ax, (metric, label) in zip(axes, metrics.items(), strict=False):
        for arm, color in colors_of(names).items():
            if found := arms.dev(arm, metric):
                lines_with_band(ax, *found, arms.title(arm), color, marker="o")
        ax.set(xlabel="optimizer step", ylabel=label)
    for arm, color in colors_of(names).items():
        if found := arms.rollouts(arm, "entropy"):
            lines_with_band(axes[-1], *found, arms.title(arm), color)
    axes[-1].set(xlabel="optimizer step", ylabel=LABELS["entropy"])
    from_zero(axes[-1])
    legend_outside(fig)
    save(fig, out, "chat")


def draw_combined(arms: Arms, out: Path) -> None:
    """Both tasks after training on one, on both at once, or on one after the other (Table 3); last checkpoints."""
    names = arms.here(("base", "s1", "chat_s1", "mixed", "chat_then_math", "math_then_chat"))
    names = [arm for arm in names if arms.summary(arm, "accuracy_last") and arms.summary(arm, "win_rate_last")]
    if len(names) < 3:
        return
    fig, (left, right) = figure(columns=2, width=10, height=0.9 + 0.36 * len(names))
    bars(left, arms, names, "accuracy_last")
    bars(right, arms, names, "win_rate_last")
    left.set(xlabel="accuracy on math", xlim=(0, 1))
    right.set(xlabel="chat: win rate against the starting policy", xlim=(0, 1))
    right.axvline(0.5, color="#444444", linewidth=0.8, linestyle=":")
    right.set_yticklabels([])
    save(fig, out, "combined")


def _log(path: Path) -> list[dict]:
    return files.read_jsonl(path / "log.jsonl") if (path / "log.jsonl").exists() else []


if __name__ == "__main__":
    plot_main(draw)
