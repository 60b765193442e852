"""One look for every figure, and the few kinds of panel that the papers need.

    fig, (left, right) = figure(columns=2)
    bars_with_intervals(left, titles, means, intervals, colors=arm_colors(arms).values(), points=per_seed)
    legend_outside(fig)
    save(fig, "runs/coconut/tiny/figures", "accuracy")

Figures do not go through pyplot, so nothing needs closing. matplotlib loads at the first figure.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.experiments import files
from shared.experiments.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PNG_BYTES = 300_000

# Okabe and Ito's palette (2008), distinguishable with any colour vision; its yellow, too pale on white, comes last.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#6B6B6B", "#F0E442")

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # real text in the PDF
    "savefig.facecolor": "white",
}


def figure(
    columns: int = 1, rows: int = 1, width: float | None = None, height: float | None = None
) -> tuple[Figure, Any]:
    """A figure and its panels: one Axes, or an array [columns], [rows] or [rows, columns] of them.

    Args:
        width, height: of the whole, in inches; default: 4.2 x 3.2 per panel.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=COLORS)
    fig = Figure(figsize=(width or 4.2 * columns, height or 3.2 * rows), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns)


def save(fig: Figure, directory: str | Path, name: str) -> None:
    """Writes NAME.png (below 300 kB: reports embed it) and NAME.pdf; equal figures give equal bytes.

    Raises:
        UserError: the PNG is too large even at 80 dots per inch.
    """
    directory = Path(directory)
    for dpi in (160, 110, 80):
        png = _render(fig, "png", dpi=dpi, metadata={"Software": None})
        if len(png) < MAX_PNG_BYTES:
            break
    else:
        raise UserError(
            f"{directory / name}.png: {len(png) // 1000} kB even at 80 dpi, above {MAX_PNG_BYTES // 1000} kB: "
            f"make the figure smaller or plainer"
        )
    pdf = _render(fig, "pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    for suffix, content in (("png", png), ("pdf", pdf)):
        files.write_atomic(directory / f"{name}.{suffix}", lambda file, c=content: file.write(c), binary=True)


def arm_colors(arms: Iterable[str]) -> dict[str, str]:
    """A colour per arm, by position in paper.yaml: pass all arms, so that one keeps its colour in every figure.

    From the ninth on, colours repeat.
    """
    return {arm: COLORS[position % len(COLORS)] for position, arm in enumerate(arms)}


def bars_with_intervals(
    ax: Axes,
    labels: Sequence[str],
    means: Sequence[float],
    intervals: Sequence[tuple[float, float] | None],
    colors: Iterable[str] | None = None,
    points: Sequence[Sequence[float]] | None = None,
) -> None:
    """Horizontal bars from top to bottom with 95% intervals, and `points` (one per seed) as dots."""
    rows = np.arange(len(labels))
    ax.barh(rows, means, height=0.66, color=list(colors) if colors is not None else COLORS[0], alpha=0.85)
    for row, (mean, bounds) in enumerate(zip(means, intervals, strict=True)):
        if bounds is not None:
            ax.plot(bounds, [row, row], color="#222222", linewidth=1.2, solid_capstyle="butt")
            ax.plot(bounds, [row, row], "|", color="#222222", markersize=6, markeredgewidth=1.2)
        else:
            ax.plot([mean], [row], "|", color="#222222", markersize=6)
    for row, values in enumerate(points or ()):
        ax.plot(values, [row + 0.2] * len(values), "o", color="white", markeredgecolor="#222222", markersize=3.5)
    ax.set_yticks(rows, labels)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")


def stacked_bars(
    ax: Axes, labels: Sequence[str], parts: Mapping[str, Sequence[float]], colors: Iterable[str] = COLORS
) -> None:
    """Vertical bars, one per label, each stacked from `parts` (part -> its height in every bar), bottom part first."""
    bottom = np.zeros(len(labels))
    for (part, heights), color in zip(parts.items(), itertools.cycle(colors), strict=False):
        ax.bar(range(len(labels)), heights, bottom=bottom, width=0.72, label=part, color=color, edgecolor="white")
        bottom += np.asarray(heights, dtype=float)
    ax.set_xticks(range(len(labels)), labels)
    ax.grid(visible=False, axis="x")


def lines_with_band(
    ax: Axes,
    x: Sequence[float],
    y_SX: Sequence[Sequence[float]] | np.ndarray,
    label: str,
    color: str | None = None,
    marker: str = "",
) -> None:
    """The mean over seeds of `y_SX` [seeds, len(x)], in a band from the lowest to the highest seed."""
    y_SX = np.atleast_2d(np.asarray(y_SX, dtype=float))
    (line,) = ax.plot(x, y_SX.mean(0), label=label, color=color, marker=marker)
    if len(y_SX) > 1:
        ax.fill_between(x, y_SX.min(0), y_SX.max(0), color=line.get_color(), alpha=0.18, linewidth=0)


def legend_outside(fig: Figure, where: str = "right upper", columns: int = 1) -> None:
    """One legend for all panels, each label once, beside them ("right upper") or under them ("lower center")."""
    handles = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    fig.legend(handles.values(), handles.keys(), loc=f"outside {where}", ncols=columns)


def _render(fig: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
