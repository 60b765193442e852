"""`make publish`: a finished run's results become the committed reference; and the tables in papers/README.md.

Published results can be made again from what is committed: every run and figure asked for is there, and comes from the
code and configs that are committed now, without overrides.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from shared.experiments import files
from shared.experiments.errors import UserError, unknown
from shared.experiments.keys import code_files, imports
from shared.experiments.paper import PAPERS, Paper, load_paper, paper_names
from shared.experiments.report import write_report
from shared.experiments.reproduce import Request, plan, plot_job
from shared.experiments.resources import load_resources
from shared.experiments.results import read_results, write_results
from shared.experiments.site import JUDGED_SCALES, published_dir
from shared.experiments.verdicts import tally
from shared.plotting import MAX_PNG_BYTES

MIN_TINY_SEEDS = 3
MACHINERY = "experiments"  # every paper uses it


def publish(paper: Paper, scale: str) -> Path:
    """Copies results.json and the figures' PNGs from runs/ to papers/NAME/results/SCALE, and returns that directory.

    The claims are judged anew, by the paper.yaml of now.

    Raises:
        UserError: something is missing or was made from other code or config (lists all of it), or `make reproduce` is
            at work on it.
    """
    if scale not in JUDGED_SCALES:
        raise unknown("scale to publish", scale, JUDGED_SCALES)
    runs, seeds, arms = paper.runs(scale), paper.seeds[scale], paper.select_arms(scale)
    command = f"make reproduce PAPER={paper.name} SCALE={scale}"
    if not (runs / "results.json").is_file():
        raise UserError(f"{runs}: no results yet: `{command}` first")
    with files.lock(runs):  # from the checks to the last copy
        return _publish(paper, scale, runs, seeds, arms, command)


def _publish(paper: Paper, scale: str, runs: Path, seeds: list[int], arms: list[str], command: str) -> Path:
    last = read_results(runs / "results.json")
    pngs = _figures(paper, scale)
    objections = [
        *(f"{run['arm']} seed {run['seed']}: {run['reason']}" for run in last["missing"]),
        *_unfinished(paper, scale, arms, seeds),
        *(f"{png}: no such figure" for png in pngs if not png.is_file()),
        *(
            f"{png}: {png.stat().st_size // 1000} kB, above {MAX_PNG_BYTES // 1000} kB: draw it smaller or plainer"
            for png in pngs
            if png.is_file() and png.stat().st_size >= MAX_PNG_BYTES
        ),
        *(f"{path}: not committed" for path in _uncommitted(paper, scale)),
    ]
    if (list(last["arms"]), last["seeds"]) != (arms, seeds):
        objections.append(f"the last command was for a part only: {last['info']['command']}")
    if scale == "tiny" and len(seeds) < MIN_TINY_SEEDS:
        objections.append(f"{paper.path}: seeds.tiny: {len(seeds)}, at least {MIN_TINY_SEEDS} are needed")
    if objections:
        raise UserError(
            f"{paper.name}, {scale}: not to be published:\n  "
            + "\n  ".join(objections)
            + f"\ncommit what is not, then `{command}` (what is done is not done again)"
        )
    results = write_results(paper, scale, runs, seeds, arms, last["info"])
    write_report(paper, results, runs)
    target = published_dir(paper, scale)
    for old in target.glob("*.png"):
        if old.name not in {png.name for png in pngs}:
            old.unlink()
    for source in [*pngs, runs / "results.json"]:
        content = source.read_bytes()
        files.write_atomic(target / source.name, lambda file, c=content: file.write(c), binary=True)
    return target


def index_table(papers: Path = PAPERS) -> str:
    """The Markdown table of all papers: what each shows, and its verdicts at each scale."""
    rows = ["| paper | what it shows | " + " | ".join(JUDGED_SCALES) + " |", "|---|---|" + "---|" * len(JUDGED_SCALES)]
    for name in paper_names(papers):
        paper = load_paper(name, papers)
        title = f"[{name}]({name}/)<br>[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
        cells = [title, paper.summary, *(_status(paper, scale) for scale in JUDGED_SCALES)]
        rows.append("| " + " | ".join(cell.strip().replace("\n", " ").replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def parts_table(papers: Path = PAPERS) -> str:
    """The Markdown table of what each paper's own modules import from shared/, package by package."""
    used = {name: _shared_modules(papers / name) for name in paper_names(papers)}
    packages = sorted({package for modules in used.values() for package, _ in modules} - {MACHINERY})
    rows = ["| paper | " + " | ".join(packages) + " |", "|---|" + "---|" * len(packages)]
    for name, modules in used.items():
        cells = [", ".join(sorted(module or "✓" for p, module in modules if p == package)) for package in packages]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def write_index(papers: Path = PAPERS) -> bool:
    """Puts the tables between their markers in papers/README.md; whether that changed anything.

    Raises:
        UserError: the file or its markers are missing.
    """
    readme = papers / "README.md"
    old, new = _readme(papers)
    if new != old:
        files.write_text(readme, new)
    return new != old


def check_index(papers: Path = PAPERS) -> None:
    """Raises UserError if the tables in papers/README.md are not what the papers' files and results give."""
    old, new = _readme(papers)
    if new != old:
        raise UserError(f"{papers / 'README.md'}: its tables are out of date: run `make report` and commit it")


def _unfinished(paper: Paper, scale: str, arms: list[str], seeds: list[int]) -> list[str]:
    """Runs and figures that are missing, or whose content address is not the one that they would get now."""
    request = Request(
        paper=paper,
        scale=scale,
        arms=arms,
        seeds=list(seeds),
        jobs=None,
        force=False,
        launch="local",
        overrides=[],
        resources=load_resources(paper, scale),
        command="",
    )
    jobs = plan(request)
    figures = plot_job(paper, paper.runs(scale), jobs)
    return [
        f"{job.label}, {stage.name}: " + ("made from other code or config" if stage.record.is_file() else "not done")
        for job in [*jobs, figures]
        for stage in job.stages
        if not stage.done()
    ]


def _figures(paper: Paper, scale: str) -> list[Path]:
    return [paper.runs(scale) / "figures" / f"{f.file}.png" for f in paper.figures if scale in f.scales]


def _uncommitted(paper: Paper, scale: str) -> list[str]:
    """Files behind the results that differ from the last commit."""
    made_from = {paper.path, paper.config_path(scale)}
    for script in ("train.py", "eval.py", "plot.py"):
        made_from.update(code_files(paper.directory / script, paper.root))
    relative = sorted(path.resolve().relative_to(paper.root).as_posix() for path in made_from)
    try:
        status = subprocess.run(
            ["git", "status", "--porcelain", "--no-renames", "-z", "--", *relative],
            cwd=paper.root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise UserError(f"{paper.root}: not a git checkout: what the results came from cannot be told") from error
    return [line[3:] for line in status.stdout.split("\0") if line]


def _status(paper: Paper, scale: str) -> str:
    path = published_dir(paper, scale) / "results.json"
    if not path.is_file():
        return "–"
    return ", ".join(f"{count} {verdict}" for verdict, count in tally(read_results(path)))


def _shared_modules(directory: Path) -> set[tuple[str, str]]:
    """(package, module) of shared/ for the imports in a paper's files; the module is "" for the package itself."""
    found = set()
    for path in directory.glob("*.py"):
        for module in imports(path, directory.parents[1]):
            top, _, inner = module.partition(".")
            package, _, name = inner.partition(".")
            if top == "shared" and package and (directory.parents[1] / "shared" / package).is_dir():
                here = directory.parents[1] / "shared" / package / f"{name}.py"
                if not name or here.is_file():
                    found.add((package, name))
    with_modules = {package for package, name in found if name}
    return {(package, name) for package, name in found if name or package not in with_modules}


def _readme(papers: Path) -> tuple[str, str]:
    """papers/README.md as it is and as it should be."""
    readme = papers / "README.md"
    old = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    new = old
    for name, table in (("papers", index_table), ("shared", parts_table)):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found_begin, rest = new.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise UserError(f"{readme}: needs the lines {begin} and {end}, between which a table goes")
        new = f"{before}{begin}\n{table(papers)}\n{end}{after}"
    return old, new
