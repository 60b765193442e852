import subprocess
import sys

import numpy as np
import pytest

from shared.experiments.errors import UserError
from shared.plotting import (
    COLORS,
    MAX_PNG_BYTES,
    arm_colors,
    bars_with_intervals,
    figure,
    legend_outside,
    lines_with_band,
    save,
    stacked_bars,
)

DRAW = """
import sys
from shared.plotting import figure, lines_with_band, legend_outside, save
fig, ax = figure()
lines_with_band(ax, [0, 1, 2], [[1, 2, 3], [2, 3, 4]], "ours")
ax.set_title("Δ accuracy")
legend_outside(fig)
save(fig, sys.argv[1], "curve")
"""


def test_equal_figures_give_equal_bytes_in_every_process(tmp_path):
    for run in ("one", "two"):
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / run)], check=True)
    for suffix in ("png", "pdf"):
        one, two = ((tmp_path / run / f"curve.{suffix}").read_bytes() for run in ("one", "two"))
        assert one == two
    assert one.startswith(b"%PDF")
    assert (tmp_path / "one/curve.png").stat().st_size < MAX_PNG_BYTES


def test_importing_and_colours_need_no_matplotlib():
    code = "import sys, shared.plotting as p; p.arm_colors(['a']); assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_figure_too_heavy_for_a_report_is_refused_and_not_left_behind(tmp_path):
    fig, ax = figure(width=12, height=12)
    ax.imshow(np.random.default_rng(0).random((1000, 1000, 3)), interpolation="nearest")
    with pytest.raises(UserError, match=r"noise.png: .* make the figure smaller"):
        save(fig, tmp_path, "noise")
    assert list(tmp_path.iterdir()) == []


def test_a_heavy_figure_is_saved_with_fewer_dots(tmp_path):
    fig, ax = figure(width=3, height=3)
    ax.imshow(np.random.default_rng(0).random((1000, 1000, 3)), interpolation="nearest")
    save(fig, tmp_path, "noise")
    width = int.from_bytes((tmp_path / "noise.png").read_bytes()[16:20])
    assert width in (3 * 80, 3 * 110)


def test_an_arm_keeps_its_colour():
    arms = [f"arm{i}" for i in range(9)]
    colors = arm_colors(arms)
    assert len(set(list(colors.values())[:8])) == len(COLORS) == 8
    assert colors["arm8"] == colors["arm0"]


def test_bars_show_means_intervals_and_seeds():
    _, ax = figure()
    bars_with_intervals(ax, ["ours", "base"], [0.8, 0.5], [(0.7, 0.9), None], ["red", "blue"], [[0.75, 0.85], [0.5]])
    assert [bar.get_width() for bar in ax.patches] == [0.8, 0.5]
    drawn = [list(line.get_xdata()) for line in ax.lines]
    assert [0.7, 0.9] in drawn
    assert [0.75, 0.85] in drawn
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ours", "base"]
    assert ax.yaxis_inverted()  # the first row on top


def test_stacks_lie_on_each_other():
    _, ax = figure()
    stacked_bars(ax, ["0", "1"], {f"part {i}": [0.1, 0.2] for i in range(10)}, COLORS)
    assert len(ax.patches) == 20
    tops = {round(bar.get_x()): bar.get_y() + bar.get_height() for bar in ax.patches}
    assert sorted(tops.values()) == pytest.approx([1.0, 2.0])


def test_a_line_is_the_mean_of_seeds_and_the_band_their_range():
    _, ax = figure()
    lines_with_band(ax, [0, 1], [[0.0, 1.0], [1.0, 1.0], [5.0, 1.0]], "ours")
    assert list(ax.lines[0].get_ydata()) == [2.0, 1.0]
    box = ax.collections[0].get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (0.0, 5.0)
    lines_with_band(ax, [0, 1], [0.0, 1.0], "one seed")
    assert len(ax.collections) == 1


def test_the_common_legend_names_each_line_once():
    fig, (left, right) = figure(columns=2)
    for ax in (left, right):
        lines_with_band(ax, [0, 1], [0, 1], "ours", color="#0072B2")
    legend_outside(fig)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["ours"]
