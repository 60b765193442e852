"""`make report`: report/index.html over all papers and scales, and beside it a page for each of their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from shared.experiments import files
from shared.experiments.paper import SCALES, Paper
from shared.experiments.report import embedded, render_html, template
from shared.experiments.results import read_results
from shared.experiments.verdicts import tally

JUDGED_SCALES = tuple(scale for scale in SCALES if scale != "smoke")


@dataclasses.dataclass(frozen=True)
class Entry:
    """The newest results of a paper at a scale."""

    results: dict
    figures_dir: Path
    runs_dir: Path | None  # where the logs are, if these are local results
    origin: str
    page: str  # the file name of its report
    note: str = ""

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
    """Writes `directory`/index.html and its pages, for each paper and scale from its `newest` results."""
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
    """The local results if they are as new as the committed ones and not of less, else those."""
    page = f"{paper.name}-{scale}.html"
    runs, committed = paper.runs(scale), published_dir(paper, scale)
    local = reference = None
    if (runs / "results.json").is_file():
        local = Entry(read_results(runs / "results.json"), runs / "figures", runs, "this machine", page)
    if (committed / "results.json").is_file():
        reference = Entry(read_results(committed / "results.json"), committed, None, "reference", page)
    if not local or not reference:
        return local or reference
    if local.results["finished"] < reference.results["finished"]:
        return reference
    if _is_partial(local.results, reference.results):
        report = (runs / "report.html").relative_to(paper.root)
        note = f"The last run here was partial or with overrides, and has a report of its own: {report}"
        return dataclasses.replace(reference, note=note)
    return local


def _is_partial(local: dict, reference: dict) -> bool:
    """Whether a run was for fewer arms or seeds than the reference, or with another config, or in part failed."""
    fewer = any(not set(reference[what]) <= set(local[what]) for what in ("arms", "seeds"))
    return fewer or bool(local["missing"]) or " SET=" in local["info"]["command"]
