"""report.md and report.html of one run: verdicts, arms, figures, training curves, and how it was all made.

The HTML is one file that opens from disk: style, plots and figures are inside it, and nothing is fetched.
"""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from shared.experiments import files
from shared.experiments.paper import Paper
from shared.experiments.verdicts import NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, WEAK, tally

TEMPLATES = Path(__file__).parent / "templates"
MARKS = {REPRODUCED: "✓", WEAK: "~", NOT_REPRODUCED: "✗", NOT_TESTABLE: "–"}
CURVE_POINTS = 120


def write_report(paper: Paper, results: dict, runs_dir: Path) -> None:
    """Writes report.md and report.html into `runs_dir` from what write_results returned, its figures and its logs."""
    runs_dir = Path(runs_dir)
    files.write_text(runs_dir / "report.md", render_markdown(paper, results, runs_dir / "figures"))
    files.write_text(runs_dir / "report.html", render_html(paper, results, runs_dir / "figures", runs_dir))


def render_html(paper: Paper, results: dict, figures: Path, runs_dir: Path | None = None) -> str:
    """The page as text.

    Args:
        figures: where FILE.png of each figure lies.
        runs_dir: where ARM/SEED/log.jsonl lie, if they are there, for the training curves.
    """
    curves = _curves(results, runs_dir) if runs_dir else []
    return template("report.html.j2").render(**_context(paper, results, figures), curves=curves)


def render_markdown(paper: Paper, results: dict, figures: Path) -> str:
    return template("report.md.j2").render(**_context(paper, results, figures))


@functools.cache
def template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.j2", "html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        mark=MARKS.__getitem__,
        number=number,
        signed=signed,
        plain=plain,
        claimed=claimed,
        sample=sample,
        interval_plot=interval_plot,
    )
    return environment.get_template(name)


def embedded(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


def _context(paper: Paper, results: dict, figures: Path) -> dict[str, Any]:
    arms = results["arms"].values()
    drawn = [f for f in results["figures"] if (figures / f"{f['file']}.png").is_file()]
    undrawn = [f["file"] for f in results["figures"] if f not in drawn]
    return {
        "paper": paper,
        "results": results,
        "tally": tally(results),
        "metrics": list(dict.fromkeys(metric for arm in arms for metric in arm["metrics"])),
        "costs": {name: _costs(arm["runs"].values()) for name, arm in results["arms"].items()},
        "figures": [{**f, "source": embedded(figures / f"{f['file']}.png")} for f in drawn],
        "undrawn": ", ".join(undrawn),
        "facts": _facts(results),
    }


# ---- numbers and sentences --------------------------------------------------------------------------------------


def plain(value: float) -> str:
    """Three significant digits, without an exponent for everyday sizes."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.2e}".replace("-", "−")
    return _fixed(value, 2 - math.floor(math.log10(abs(value))))


def number(value: float, result: dict) -> str:
    """`value` with as many decimals as the interval of `result` can bear."""
    if result["lo"] is None or result["hi"] <= result["lo"]:
        return plain(value)
    width = result["hi"] - result["lo"]
    if not 1e-6 <= width < 1e7:
        return plain(value)
    return _fixed(value, 1 - math.floor(math.log10(width / 2)))


def signed(value: float, result: dict) -> str:
    text = number(value, result)
    return text if text.startswith("−") or not text.strip("0.,") else f"+{text}"


def _exact(value: float) -> str:
    """A number that a person wrote down."""
    return f"{value:g}".replace("-", "−")


def _fixed(value: float, decimals: int) -> str:
    text = f"{round(value, decimals):,.{max(0, min(decimals, 6))}f}"
    return text.lstrip("-") if not text.strip("-0.,") else text.replace("-", "−")


def claimed(test: dict) -> str:
    """The comparison as a formula: `ours accuracy − base accuracy > 0.1`."""
    right = test["b"] if test["b"] is not None else _exact(test["constant"])
    if test["direction"] == "equal":
        return f"|{test['a']} − {right}| < {_exact(test['margin'])}"
    sign = {"greater": ">", "less": "<"}[test["direction"]]
    if test["margin"] == 0:
        return f"{test['a']} {sign} {right}"
    return f"{test['a']} − {right} {sign} {_exact(test['margin'])}"


def sample(test: dict) -> str:
    seeds = f"{test['seeds']} seed" + ("s" if test["seeds"] != 1 else "")
    return seeds if test["items"] is None else f"{seeds}, {test['items']:,} items"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def memory(mebibytes: float) -> str:
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


def _costs(runs: Iterable[dict]) -> dict[str, str]:
    """Mean time of each stage and the largest memory of any, over an arm's runs."""
    runs = list(runs)
    found = {"train": "–", "eval": "–", "memory": "–"}
    for stage in ("train", "eval"):
        if times := [run[stage]["seconds"] for run in runs if run[stage]["seconds"] is not None]:
            found[stage] = duration(sum(times) / len(times))
    if peaks := _peaks(runs, "peak_memory_mb"):
        found["memory"] = memory(max(peaks))
    if peaks := _peaks(runs, "peak_gpu_memory_mb"):
        found["memory"] += f" + {memory(max(peaks))} GPU"
    return found


def _peaks(runs: Iterable[dict], name: str) -> list[float]:
    return [stage[name] for run in runs for stage in (run["train"], run["eval"]) if stage[name] is not None]


def _facts(results: dict) -> list[tuple[str, str]]:
    info = results["info"]
    runs = [run for arm in results["arms"].values() for run in arm["runs"].values()]
    facts = [("command", info["command"])] if info.get("command") else []
    facts.append(("seeds", ", ".join(map(str, results["seeds"]))))
    if info.get("wall_seconds") is not None:
        reused = info.get("stages_reused")
        note = f" ({reused} of {info['stages']} stages had been done before)" if reused else ""
        facts.append(("wall time", duration(info["wall_seconds"]) + note))
    if seconds := [stage["seconds"] for run in runs for stage in (run["train"], run["eval"]) if stage["seconds"]]:
        facts.append(("time in all runs", duration(sum(seconds))))
    if peaks := _peaks(runs, "peak_memory_mb"):
        facts.append(("peak memory of a run", memory(max(peaks))))
    if devices := sorted({run["train"]["device"] for run in runs if run["train"]["device"]}):
        facts.append(("device", ", ".join(devices)))
    if info.get("hardware"):
        facts.append(("machine", _machine(info["hardware"])))
    if info.get("versions"):
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())))
    if info.get("commit"):
        facts.append(("commit", info["commit"] + (" with uncommitted changes" if info.get("dirty") else "")))
    if results["finished"]:
        facts.append(("finished", results["finished"]))
    return facts


def _machine(hardware: dict) -> str:
    cores = f"{hardware['cores']} core" + ("s" if hardware["cores"] != 1 else "")
    return ", ".join([hardware["cpu"], cores, f"{hardware['memory_gb']:g} GiB memory", *hardware["gpus"]])


# ---- plots ------------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT = 320, 12, 308  # of an interval plot, in SVG units


def interval_plot(test: dict) -> Markup:
    """The effect and its interval on an axis with zero, the margin (dashed) and the claimed side (shaded)."""
    if test["lo"] is None:
        return Markup("<div></div>")
    margins = {"greater": [test["margin"]], "less": [test["margin"]], "equal": [-test["margin"], test["margin"]]}
    edges = margins[test["direction"]]
    shown = [0.0, test["effect"], test["lo"], test["hi"], *edges]
    span = (max(shown) - min(shown)) or 1.0
    start, end = min(shown) - 0.08 * span, max(shown) + 0.08 * span

    def x(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - start) / (end - start), 1)

    near = x(start if test["direction"] == "less" else edges[0])
    far = x(end if test["direction"] == "greater" else edges[-1])
    lines = [
        f'<rect class="claimed" x="{near}" y="6" width="{far - near:.1f}" height="30"/>',
        f'<line class="axis" x1="{LEFT}" y1="36" x2="{RIGHT}" y2="36"/>',
        f'<line class="zero" x1="{x(0)}" y1="6" x2="{x(0)}" y2="40"/>',
        *(f'<line class="margin" x1="{x(edge)}" y1="6" x2="{x(edge)}" y2="40"/>' for edge in edges if edge != 0),
        f'<line class="ci" x1="{x(test["lo"])}" y1="21" x2="{x(test["hi"])}" y2="21"/>',
        f'<circle class="point" cx="{x(test["effect"])}" cy="21" r="5"/>',
        *_tick_labels([(x(0), "0")] + [(x(edge), _exact(edge)) for edge in edges if edge != 0]),
    ]
    name = (
        f"effect {signed(test['effect'], test)}, 95% interval {signed(test['lo'], test)} to {signed(test['hi'], test)}"
    )
    # Everything in it is a number of ours, so nothing needs escaping.
    kind = test["verdict"].replace(" ", "-")
    head = f'<svg class="plot {kind}" viewBox="0 0 {WIDTH} 54" role="img" aria-label="{name}">'
    return Markup("".join([head, *lines, "</svg>"]))


def _tick_labels(ticks: Sequence[tuple[float, str]]) -> list[str]:
    """Labels under the axis; of two that would overlap, the first stays."""
    placed: list[tuple[float, str]] = []
    for x, text in ticks:
        if all(abs(x - other) > 3.5 * (len(text) + len(label)) for other, label in placed):
            placed.append((x, text))
    return [f'<text x="{x}" y="51" text-anchor="middle">{text}</text>' for x, text in placed]


def _curves(results: dict, runs_dir: Path) -> list[tuple[str, Markup]]:
    """A small plot of the training loss for each arm that logged one."""
    plots = []
    for name, arm in results["arms"].items():
        lines = [_losses(runs_dir / name / seed / "log.jsonl") for seed in arm["runs"]]
        if lines := [line for line in lines if len(line) > 1]:
            plots.append((arm["title"], _curve_plot(lines)))
    return plots


def _losses(path: Path) -> list[tuple[float, float]]:
    """(step, loss), averaged over neighbouring rows down to at most CURVE_POINTS points."""
    if not path.is_file():
        return []
    rows = [r for r in files.read_jsonl(path) if r.get("stage") == "train" and isinstance(r.get("loss"), int | float)]
    rows = [(float(r["step"]), float(r["loss"])) for r in rows if math.isfinite(r["loss"])]
    size = math.ceil(len(rows) / CURVE_POINTS) or 1
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


def _curve_plot(lines: list[list[tuple[float, float]]]) -> Markup:
    steps = [step for line in lines for step, _ in line]
    losses = [loss for line in lines for _, loss in line]
    last, low, high = max(steps), min(0.0, *losses), max(losses)

    def point(step: float, loss: float) -> str:
        return f"{38 + 176 * step / (last or 1):.1f},{86 - 78 * (loss - low) / ((high - low) or 1):.1f}"

    drawn = "".join(f'<polyline class="curve" points="{" ".join(point(*p) for p in line)}"/>' for line in lines)
    return Markup(
        '<svg viewBox="0 0 220 104" role="img" aria-label="training loss by step">'
        '<line class="axis" x1="38" y1="8" x2="38" y2="86"/><line class="axis" x1="38" y1="86" x2="214" y2="86"/>'
        f'<text x="34" y="13" text-anchor="end">{plain(high)}</text>'
        f'<text x="34" y="88" text-anchor="end">{plain(low)}</text>'
        f'<text x="214" y="100" text-anchor="end">step {last:,.0f}</text>{drawn}</svg>'
    )
