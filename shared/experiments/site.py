"""`make report`: report/index.html over all papers and scales, and beside it a page for each of their results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shared.experiments import files
from shared.experiments.paper import SCALES, Paper
from shared.experiments.report import embedded, render_html, tally, template
from shared.experiments.results import read_results

JUDGED_SCALES = tuple(scale for scale in SCALES if scale != "smoke")


@dataclass(frozen=True)
class Entry:
    """The newest results of a paper at a scale."""

    results: dict
    figures_dir: Path
    runs_dir: Path | None  # where the logs are, if these are local results
    origin: str
    page: str  # the file name of its report

    @property
    def verdicts(self) -> dict[str, str]:
        return {claim["id"]: claim["verdict"] for claim in self.results["claims"]}

    @property
    def figures(self) -> list[dict]:
        return [
            {"shows": figure["shows"], "source": embedded(path)}
            for figure in self.results["figures"]
            if (path := self.figures_dir / f"{figure['file']}.png").is_file()
        ]


def published_dir(paper: Paper, scale: str) -> Path:
    """Where the committed results of a scale are: results.json and the figures' PNGs."""
    return paper.directory / "results" / scale


def write_site(papers: Iterable[Paper], directory: Path) -> Path:
    """Writes `directory`/index.html and its pages from the committed results and, where newer, those in runs/."""
    rows = []
    for paper in papers:
        entries = {scale: entry for scale in JUDGED_SCALES if (entry := newest(paper, scale))}
        for entry in entries.values():
            page = render_html(paper, entry.results, entry.figures_dir, entry.runs_dir)
            files.write_text(directory / entry.page, page)
        rows.append((paper, entries))
    index = directory / "index.html"
    files.write_text(index, template("index.html.j2").render(papers=rows, scales=JUDGED_SCALES, tally=tally))
    return index


def newest(paper: Paper, scale: str) -> Entry | None:
    """The local results if they are as new as the committed ones, else those."""
    page = f"{paper.name}-{scale}.html"
    runs, committed = paper.runs(scale), published_dir(paper, scale)
    found = []
    if (runs / "results.json").is_file():
        found.append(Entry(read_results(runs / "results.json"), runs / "figures", runs, "this machine", page))
    if (committed / "results.json").is_file():
        found.append(Entry(read_results(committed / "results.json"), committed, None, "reference", page))
    return max(found, key=lambda entry: entry.results["finished"], default=None)
