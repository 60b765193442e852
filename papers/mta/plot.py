"""Draw MTA's figures from finished runs.

    python -m papers.mta.plot --runs runs/mta/tiny --out runs/mta/tiny/figures

Everything comes from log.jsonl, eval.json, predictions.jsonl, kernels.json and attention.json; a figure whose arms were
not run is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared.experiments import files, finished_runs, plot_main
from shared.experiments.claims import interval, measured
from shared.experiments.paper import Operand, Paper, load_paper
from shared.experiments.results import read_run
from shared.plotting import COLORS, arm_colors, bars_with_intervals, figure, legend_outside, lines_with_band, save

Found = dict[str, dict[int, Path]]  # arm -> seed -> run directory

LM_ARMS = ("lm_transformer", "lm_diff", "lm_talking_heads", "lm_mta")
INIT_ARMS = ("first_mta", "first_mta_zero", "first_mta_constant")
HEAD_ARMS = ("lm_talking_heads", "lm_mta_no_norm", "lm_mta")
SIZES = ("_300m", "_550m", "", "_1b")
N_KQ_LAYERS = {f"lm_mta_kq_layers_{n}": n for n in (0, 2, 4, 8)} | {"lm_mta": 6, "lm_mta_kq_layers_12": 12}
HEAD_GROUPS = {f"lm_mta_head_group_{n}": n for n in (1, 2, 4, 8, 16)}


def draw(runs: Path, out: Path) -> None:
    found = finished_runs(runs)
    paper = load_paper(Path(__file__).parent.name)
    find = [arm for arm in found if settings(found, arm)["task"] == "findblock"]
    if find:
        lines = one_cue_lines(settings(found, find[0]))
        draw_bars(found, paper, find, "error", "error, share of queries", out, "find_block", lines)
        curves: dict[str, list[str]] = {}
        for arm in find:
            if arm not in INIT_ARMS[1:]:
                curves.setdefault(settings(found, arm)["answer"], []).append(arm)
        draw_curves(found, paper, curves, out, "find_block_curves")
    if len(init := [arm for arm in INIT_ARMS if arm in found]) > 1:
        draw_curves(found, paper, {"first": init}, out, "init")
    for arm in ("first_mta", "last_mta", "lm_mta"):
        if arm in found:
            draw_kernels(next(iter(found[arm].values())), paper.arms[arm].title, out, f"kernels_{arm}")
    draw_attention(found, paper, [arm for arm in ("first_transformer", "first_mta") if arm in found], out)
    draw_head_mixing(found, paper, [arm for arm in HEAD_ARMS if arm in found], out)
    draw_ablation(found, N_KQ_LAYERS, "layers with key-query kernels", out, "kq_layers")
    draw_ablation(found, HEAD_GROUPS, "heads mixed with each other", out, "head_groups")
    if lms := [arm for arm in LM_ARMS if arm in found]:
        draw_lm(found, paper, lms, out)
        draw_retrieval(found, paper, lms, out)
    draw_scaling(found, paper, out)


def settings(found: Found, arm: str) -> dict:
    """The config that an arm was evaluated with."""
    return files.read_json(next(iter(found[arm].values())) / "eval.json")["config"]


def scores(found: Found, arm: str, metric: str):
    """The metric by seed (and item), as claims see it."""
    return measured({arm: {seed: read_run(path) for seed, path in found[arm].items()}}, Operand(arm=arm, metric=metric))


def per_seed(found: Found, arm: str, metric: str) -> list[float]:
    return [files.read_json(path / "eval.json")["metrics"][metric] for path in found[arm].values()]


def one_cue_lines(config: dict) -> dict[str, float]:
    """Errors on `first` and `last` that need no two cues at once.

    A model that matches one query letter: p is the chance that another block has it, too, given that it has not both,
    so 1 of 1 + Binomial(K - 1, p) blocks is right. A model that repeats the query letter that stands first (or last) in
    some block: the answer is one of the two letters in 2 of N cases.
    """
    k, n = config["n_blocks"], config["block_size"]
    both = n * (n - 1) / (26 * 25)
    p = (n / 26 - both) / (1 - both)
    return {"one letter matched": 1 - (1 - (1 - p) ** k) / (k * p), "a letter of the query repeated": 1 - 2 / n}


def draw_bars(
    found: Found, paper: Paper, arms: Sequence[str], metric: str, label: str, out: Path, name: str, lines: dict
) -> None:
    fig, ax = figure(width=6.8, height=1.0 + 0.34 * len(arms))
    values = {arm: scores(found, arm, metric) for arm in arms}
    bounds = {arm: interval(values[arm], resamples=2000) for arm in arms}
    bars_with_intervals(
        ax,
        [paper.arms[arm].title for arm in arms],
        [bounds[arm].effect for arm in arms],
        [(bounds[arm].lo, bounds[arm].hi) if bounds[arm].lo is not None else None for arm in arms],
        colors=[arm_colors(paper.arms)[arm] for arm in arms],
        points=[per_seed(found, arm, metric) for arm in arms],
    )
    for (text, x), style in zip(lines.items(), (":", "--"), strict=True):
        ax.axvline(x, color="#222222", linestyle=style, linewidth=1, label=text)
    ax.set(xlabel=label, xlim=(0, 1))
    legend_outside(fig, "lower center", columns=2)
    save(fig, out, name)


def curve(by_seed: dict[int, Path], metric: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and for each seed the logged values at them."""
    logs = [[row for row in files.read_jsonl(p / "log.jsonl") if metric in row] for p in by_seed.values()]
    return [row["step"] for row in logs[0]], [[row[metric] for row in log] for log in logs]


def draw_curves(found: Found, paper: Paper, arms_of: dict[str, list[str]], out: Path, name: str) -> None:
    """Error on find-block during training, a panel for each kind of answer."""
    fig, panels = figure(columns=len(arms_of), width=2.0 + 3.4 * len(arms_of), height=3.6)
    for ax, (answer, arms) in zip(np.atleast_1d(panels), arms_of.items(), strict=True):
        for arm, color in zip(arms, few_colors(arms), strict=True):
            steps, y_SX = curve(found[arm], "error")
            lines_with_band(ax, steps, y_SX, paper.arms[arm].title, color=color)
        ax.set(title=f"answer: {answer}", xlabel="optimizer steps", ylim=(0, 1))
        ax.legend(loc="upper right", fontsize=7)
    np.atleast_1d(panels)[0].set_ylabel("error")
    save(fig, out, name)


def few_colors(arms: Sequence[str]) -> list[str]:
    """Colours of the few arms of one figure: paper.yaml has more arms than there are colours."""
    return [COLORS[i % len(COLORS)] for i in range(len(arms))]


def draw_kernels(run: Path, title: str, out: Path, name: str) -> None:
    """Key-query kernels of one run: a panel per layer and head. Rows are queries, columns keys."""
    layers = files.read_json(run / "kernels.json")
    rows = [(layer, kind) for layer, kernels in layers.items() for kind in ("kq_pre", "kq_post") if kind in kernels]
    if not rows:
        return
    kernels_RHUW = [np.array(layers[layer][kind]) for layer, kind in rows]
    heads = min(8, len(kernels_RHUW[0]))
    fig, panels = figure(columns=heads, rows=len(rows), width=1.0 + 1.9 * heads, height=0.7 + 1.2 * len(rows))
    panels = np.array(panels).reshape(len(rows), heads)
    limit = max(float(np.abs(kernels).max()) for kernels in kernels_RHUW)
    for (layer, kind), kernels_HUW, axes in zip(rows, kernels_RHUW, panels, strict=True):
        c_q, c_k = kernels_HUW.shape[1:]
        for head, (ax, kernel_UW) in enumerate(zip(axes, kernels_HUW, strict=False)):
            extent = (-c_k / 2, c_k / 2, 0.5, 0.5 - c_q)
            image = ax.imshow(kernel_UW, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent, aspect="auto")
            ax.grid(visible=False)
            ax.set_yticks(range(1 - c_q, 1))
            ax.set_title(f"layer {layer} head {head}" + (", post" if kind == "kq_post" else ""), fontsize=8)
        axes[0].set_ylabel("query offset")
    for ax in panels[-1]:
        ax.set_xlabel("key offset")
    fig.colorbar(image, ax=panels.ravel().tolist(), shrink=0.8)
    fig.suptitle(f"{title}, seed {run.name}", fontsize=10)
    save(fig, out, name)


def draw_attention(found: Found, paper: Paper, arms: Sequence[str], out: Path) -> None:
    """With what weights the position that answers a question looks at the context: a row per layer and head.

    One question, the same for all arms; of a long context the part around its block, which is between the lines.
    """
    if not arms:
        return
    examples = [files.read_json(next(iter(found[arm].values())) / "attention.json") for arm in arms]
    fig, panels = figure(columns=len(arms), width=1.0 + 5.2 * len(arms), height=2.6)
    panels = np.atleast_1d(panels)
    for ax, arm, example in zip(panels, arms, examples, strict=True):
        begin, end = example["block"]
        shown = slice(max(0, begin - 30), end + 30)
        weights_LHS = np.array(example["weights"])[..., shown]
        rows = [f"{layer}.{head}" for layer, head in np.ndindex(weights_LHS.shape[:2])]
        image = ax.imshow(weights_LHS.reshape(len(rows), -1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        ax.set_xticks(range(weights_LHS.shape[-1]), [t if len(t) == 1 else "" for t in example["tokens"][shown]])
        ax.set_yticks(range(len(rows)), rows)
        ax.grid(visible=False)
        for x in (begin, end):
            ax.axvline(x - shown.start - 0.5, color="#222222", linewidth=0.8)
        ax.set(title=paper.arms[arm].title, ylabel="layer.head")
    fig.colorbar(image, ax=panels.tolist(), shrink=0.8, label="weight")
    save(fig, out, "attention")


def draw_head_mixing(found: Found, paper: Paper, arms: Sequence[str], out: Path) -> None:
    """Head mixers by layer: size of their diagonal, and of the rest beside it (Figures 16, 17)."""
    if not arms:
        return
    fig, (left, right) = figure(columns=2, width=9.5, height=3.2)
    for arm, color in zip(arms, few_colors(arms), strict=True):
        kernels = [files.read_json(path / "kernels.json") for path in found[arm].values()]
        for kind, marker in (("head_pre", "o"), ("head_post", "s")):
            layers = [layer for layer in kernels[0] if kind in kernels[0][layer]]
            if not layers:
                continue
            sizes_SL2 = np.array([[diagonal_and_rest(seed[layer][kind]) for layer in layers] for seed in kernels])
            label = f"{paper.arms[arm].title}, {kind.removeprefix('head_')}"
            style = {"color": color, "marker": marker}
            lines_with_band(left, [int(layer) for layer in layers], sizes_SL2[..., 0], label, **style)
            ratio_SL = sizes_SL2[..., 1] / sizes_SL2[..., 0]
            lines_with_band(right, [int(layer) for layer in layers], ratio_SL, label, **style)
    left.set(xlabel="layer", ylabel="mean size of the diagonal")
    right.set(xlabel="layer", ylabel="mean size off the diagonal, by that on it")
    for ax in (left, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
    legend_outside(fig)
    save(fig, out, "head_mixing")


def diagonal_and_rest(mixer: list) -> tuple[float, float]:
    """Mean absolute value on and off the diagonal of (H, H) or (groups, c_h, c_h) mixers; off it 0 where c_h = 1."""
    size_CC = np.abs(np.array(mixer)).reshape(-1, len(mixer[-1]), len(mixer[-1])).mean(0)
    n = len(size_CC)
    diagonal = float(np.trace(size_CC))
    return diagonal / n, (float(size_CC.sum()) - diagonal) / max(1, n * (n - 1))


def draw_ablation(found: Found, values: dict[str, int], label: str, out: Path, name: str) -> None:
    """Perplexity against a setting of MTA, with those of two baselines as lines (Figures 5 and 6)."""
    arms = [arm for arm in values if arm in found]
    if len(arms) < 2:
        return
    fig, ax = figure()
    perplexity_XS = [per_seed(found, arm, "perplexity") for arm in arms]
    lines_with_band(ax, [values[arm] for arm in arms], np.transpose(perplexity_XS), "MTA", marker="o")
    for arm, style in (("lm_transformer", ":"), ("lm_diff", "--")):
        if arm in found:
            mean = float(np.mean(per_seed(found, arm, "perplexity")))
            ax.axhline(mean, color="#222222", linestyle=style, linewidth=1, label=arm.removeprefix("lm_"))
    ax.set(xlabel=label, ylabel="perplexity")
    ax.legend()
    save(fig, out, name)


def draw_lm(found: Found, paper: Paper, arms: Sequence[str], out: Path) -> None:
    """Left, validation loss during training; right, at the end, how far from the Transformer's."""
    fig, (left, right) = figure(columns=2, width=9.5, height=3.3)
    colors = dict(zip(LM_ARMS, COLORS, strict=False))
    for arm in arms:
        steps, y_SX = curve(found[arm], "nll")
        lines_with_band(left, steps, y_SX, paper.arms[arm].title, color=colors[arm])
    left.set(xlabel="optimizer steps", ylabel="validation loss, nats per token")
    others = [arm for arm in arms if arm != "lm_transformer"]
    if "lm_transformer" in found and others:
        base = scores(found, "lm_transformer", "nll")
        shared = {arm: {s: v for s, v in scores(found, arm, "nll").items() if s in base} for arm in others}
        bounds = {arm: interval(shared[arm], {s: base[s] for s in shared[arm]}, resamples=2000) for arm in others}
        bars_with_intervals(
            right,
            [paper.arms[arm].title for arm in others],
            [bounds[arm].effect for arm in others],
            [(bounds[arm].lo, bounds[arm].hi) if bounds[arm].lo is not None else None for arm in others],
            colors=[colors[arm] for arm in others],
        )
        right.set_xlabel("loss at the end minus the Transformer's, nats per token")
        right.locator_params(axis="x", nbins=5)
    legend_outside(fig, "lower center", columns=len(arms))
    save(fig, out, "lm")


def draw_retrieval(found: Found, paper: Paper, arms: Sequence[str], out: Path) -> None:
    """Needles by number and depth (Figures 3, 8), BabiLong by length (Figure 5)."""
    config = settings(found, arms[0])
    if config["needles"]:
        contexts = config["needle_contexts"] or [config["context_length"]]
        wide = {"columns": len(contexts), "width": 2.0 + 3.2 * len(contexts), "height": 3.2}
        for name, label, key, xs in (
            ("needles", "needles", "n_needles", config["needles"]),
            ("depth", "depth of the needle", "depth", config["needle_depths"]),
        ):
            fig, panels = figure(**wide)
            for ax, context in zip(np.atleast_1d(panels), contexts, strict=True):
                for arm, color in zip(arms, few_colors(arms), strict=True):
                    y_SX = [needle_means(path, context, key, xs) for path in found[arm].values()]
                    lines_with_band(ax, xs, y_SX, paper.arms[arm].title, color=color, marker="o")
                ax.set(title=f"{context} tokens", xlabel=label, ylim=(0, 1.02), xticks=xs)
            np.atleast_1d(panels)[0].set_ylabel("accuracy")
            legend_outside(fig)
            save(fig, out, name)
    if config["babilong"]:
        lengths, tasks = config["babilong_lengths"], config["babilong_tasks"]
        names = {"mean": "babilong_"} | {task: f"babilong_{task}_" for task in tasks}
        fig, panels = figure(columns=len(names), width=1.5 + 2.2 * len(names), height=3.0)
        for ax, (title, metric) in zip(panels, names.items(), strict=True):
            for arm, color in zip(arms, few_colors(arms), strict=True):
                y_SX = np.transpose([per_seed(found, arm, f"{metric}{length}") for length in lengths])
                lines_with_band(ax, range(len(lengths)), y_SX, paper.arms[arm].title, color=color, marker="o")
            ax.set(title=title, xlabel="distraction, tokens", ylim=(0, 1.02))
            ax.set_xticks(range(len(lengths)), lengths)
        panels[0].set_ylabel("accuracy")
        legend_outside(fig)
        save(fig, out, "babilong")


def needle_means(run: Path, context: int, key: str, xs: Sequence[float]) -> list[float]:
    """Accuracy for each x of `key`, over everything else."""
    rows = [row for row in files.read_jsonl(run / "predictions.jsonl") if row.get("context") == context]
    return [float(np.mean([row["scores"][f"needles_{row['n_needles']}"] for row in rows if row[key] == x])) for x in xs]


def draw_scaling(found: Found, paper: Paper, out: Path) -> None:
    """How much lower than the Transformer's the perplexity is, against parameters (Figure 6, right)."""
    sizes = [size for size in SIZES if all(f"{arm}{size}" in found for arm in LM_ARMS)]
    if len(sizes) < 2:
        return
    fig, ax = figure()
    base = {size: np.mean(per_seed(found, f"lm_transformer{size}", "perplexity")) for size in sizes}
    x = [np.mean(per_seed(found, f"lm_transformer{size}", "parameters")) / 1e9 for size in sizes]
    for arm, color in zip(LM_ARMS[1:], COLORS[1:], strict=False):
        gain = [100 * (1 - np.mean(per_seed(found, f"{arm}{size}", "perplexity")) / base[size]) for size in sizes]
        ax.plot(x, gain, "o-", color=color, label=paper.arms[arm].title)
    ax.axhline(0, color="#222222", linewidth=0.8)
    ax.set(xlabel="parameters, billions", ylabel="perplexity gain, %")
    ax.legend()
    save(fig, out, "scaling")


if __name__ == "__main__":
    plot_main(draw)
