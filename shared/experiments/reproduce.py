"""`make reproduce`: train, evaluate, plot, judge, report; `make list` and `make smoke`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shared.experiments import files, provenance
from shared.experiments.errors import UserError, unknown
from shared.experiments.keys import imported_modules, stage_key
from shared.experiments.paper import ROOT, SCALES, Paper, load_paper, load_papers, paper_names
from shared.experiments.progress import Display, duration
from shared.experiments.resources import Resources, load_resources, slots, stage_command, visible_gpus
from shared.experiments.run import EXIT_USER_ERROR, resolve_config, run_key
from shared.experiments.scheduler import DONE, Interrupted, Job, Stage, run_jobs
from shared.experiments.verdicts import tally
from shared.experiments.warm import heavy_modules

LAUNCHERS = ("local", "slurm")
GPU_SCALES = ("gpu", "paper")
VARIABLES = ("PAPER", "SCALE", "ARMS", "SEEDS", "JOBS", "FORCE", "LAUNCH", "SET")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to reproduce, checked."""

    paper: Paper
    scale: str
    arms: list[str]
    seeds: list[int]
    jobs: int | None
    force: bool
    launch: str
    overrides: list[str]  # of the config
    resources: Resources
    command: str  # the `make` line that asks for this


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Returns the exit status: 0 done, 1 something failed, 2 a mistake in the request, 128 + n stopped by signal n."""
    args = _parse(argv)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    sys.path.insert(0, str(root))  # for papers.NAME.config
    try:
        if args.list:
            return show_list(root, console)
        with files.disk_full_explained(root / "runs"):
            if args.smoke:
                return smoke(args, root, console)
            return reproduce(read_request(args, root), console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Interrupted as stop:
        print(f"stopped ({stop}); the same command goes on from here", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def reproduce(request: Request, console: Console) -> int:
    """All of it for one paper at one scale.

    Raises:
        UserError: another command is at it. Its runs may be others, but runs.json, figures and results are the same.
    """
    with files.lock(request.paper.runs(request.scale)):
        return _reproduce(request, console)


def _reproduce(request: Request, console: Console) -> int:
    begun = time.monotonic()
    paper, runs = request.paper, request.paper.runs(request.scale)
    jobs = plan(request)
    check_free(request, jobs)
    if request.force:
        forget(jobs)
        (runs / "figures" / "plot.json").unlink(missing_ok=True)
    found_done = sum(stage.done() for job in jobs for stage in job.stages)
    if request.scale in GPU_SCALES and request.launch == "local" and not visible_gpus():
        console.print(f"no NVIDIA GPU here: scale {request.scale} goes on, but is not made for a CPU", style="yellow")
    launch(request, jobs, console)
    done = [job for job in jobs if job.state == DONE]
    failed = {f"{job.arm}/{job.seed}": job.error for job in jobs if job.state != DONE}
    if not done:
        _print_failures(jobs, console)
        return 1
    files.write_json(runs / "runs.json", [[job.arm, job.seed] for job in done])
    plot = plot_job(paper, runs, done)
    with Display("figures", [plot], console) as display:
        run_jobs([plot], slots(Resources(), 1, 1), display, paper.root)

    info = {
        "command": request.command,
        **provenance.git_state(paper.root),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "wall_seconds": round(time.monotonic() - begun, 1),  # of this command, reused stages not included
        "stages": sum(len(job.stages) for job in jobs),
        "stages_reused": found_done,
        **_totals(done),
        "failed": failed,
    }
    from shared.experiments.report import write_report  # here, not above: they need numpy, and only now
    from shared.experiments.results import write_results

    results = write_results(paper, request.scale, runs, request.seeds, request.arms, info)
    write_report(paper, results, runs)
    show_claims(results, console)
    _print_failures([*jobs, plot], console)
    console.print(f"\nreport: {_shown(runs / 'report.html', paper.root)}  ({duration(info['wall_seconds'])})")
    return 1 if failed or plot.error else 0


# ---- what was asked for -------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    given = {name.lower(): os.environ.get(name) or None for name in VARIABLES}
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description="Each option can also be given as an environment variable of its name: PAPER=...",
    )
    parser.add_argument("--paper", default=given["paper"])
    parser.add_argument("--scale", default=given["scale"] or "tiny")
    parser.add_argument("--arms", default=given["arms"], help="a,b; shell patterns work")
    parser.add_argument("--seeds", default=given["seeds"], help="0,1,2")
    parser.add_argument("--jobs", default=given["jobs"], help="runs at a time")
    parser.add_argument("--force", nargs="?", const="1", default=given["force"], help="run again what is done")
    parser.add_argument("--launch", default=given["launch"] or "local", help="local or slurm")
    parser.add_argument("--set", default=given["set"], help="config overrides: 'key=value key=value'")
    parser.add_argument("--list", action="store_true", help="papers, scales and their status")
    parser.add_argument("--smoke", action="store_true", help="every paper at scale smoke with one seed")
    return parser.parse_args(argv)


def read_request(args: argparse.Namespace, root: Path) -> Request:
    """Checks the arguments.

    Raises:
        UserError: one of them is wrong; says what is valid.
    """
    names = paper_names(root / "papers")
    if not args.paper:
        raise UserError(f"which paper? make reproduce PAPER=NAME with one of: {', '.join(names) or 'none yet'}")
    paper = load_paper(args.paper, root / "papers")
    if args.scale not in paper.scales():
        raise unknown("scale", args.scale, paper.scales())
    if args.launch not in LAUNCHERS:
        raise unknown("launcher", args.launch, LAUNCHERS)
    arms = paper.select_arms(args.scale, _arms(args.arms))
    published = paper.seeds["tiny" if args.scale == "smoke" else args.scale]
    seeds = _seeds(args.seeds) if args.seeds else published[:1] if args.scale == "smoke" else published
    entries = _entries(args.set or "")
    run_overrides = [entry.removeprefix("run.") for entry in entries if entry.startswith("run.")]
    return Request(
        paper=paper,
        scale=args.scale,
        arms=arms,
        seeds=list(seeds),
        jobs=_positive(args.jobs),
        force=_flag("FORCE", args.force),
        launch=args.launch,
        overrides=[entry for entry in entries if not entry.startswith("run.")],
        resources=load_resources(paper, args.scale, run_overrides),
        command=_command(args),
    )


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _arms(text: str | None) -> list[str]:
    patterns = _split(text or "")
    if text and not patterns:
        raise UserError(f"ARMS={text}: give names or shell patterns, separated by commas; for all arms leave it out")
    return patterns


def _seeds(text: str) -> list[int]:
    parts = _split(text)
    seeds = [int(part) for part in parts if part.isdecimal() and int(part) < 2**32]
    if not seeds or len(set(seeds)) != len(parts):
        raise UserError(f"SEEDS={text}: give different whole numbers from 0 on, separated by commas: SEEDS=0,1,2")
    return seeds


def _flag(name: str, text: str | None) -> bool:
    if text not in (None, "0", "1"):
        raise UserError(f"{name}={text}: 1, or leave it out")
    return text == "1"


def _entries(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"SET={text}: {error}") from error


def _positive(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"JOBS={text}: give a whole number from 1 on")
    return int(text)


def _command(args: argparse.Namespace) -> str:
    defaults = {"scale": "tiny", "launch": "local", "force": "0"}
    given = {name: getattr(args, name.lower()) for name in VARIABLES}
    parts = [f"{n}={shlex.quote(v)}" for n, v in given.items() if v and v != defaults.get(n.lower())]
    return " ".join(["make reproduce", *parts])


# ---- jobs ---------------------------------------------------------------------------------------------------------


def plan(request: Request) -> list[Job]:
    """One job per (arm, seed), seeds outermost: a problem with any arm shows early."""
    paper = request.paper
    config_class = _config_class(paper)
    configs = {arm: resolve_config(paper, config_class, request.scale, arm, request.overrides) for arm in request.arms}
    warm = _warm_modules(request)
    # The first arm goes first with every seed: where arms start from one policy, it makes that, and they do not wait.
    first, others = request.arms[:1], request.arms[1:]
    order = [*((arm, seed) for arm in first for seed in request.seeds)]
    order += [(arm, seed) for seed in request.seeds for arm in others]
    return [_run_job(request, arm, seed, configs[arm], warm) for arm, seed in order]


def _warm_modules(request: Request) -> tuple[str, ...]:
    """What the stages' processes can have imported before they start; nothing where they may use a GPU."""
    if visible_gpus() or request.resources.accelerate is not None or request.launch != "local":
        return ()
    paper = request.paper
    modules = [imported_modules(paper.directory / f"{name}.py", paper.root) for name in ("train", "eval")]
    return tuple(heavy_modules(set().union(*modules)))


def _config_class(paper: Paper) -> type:
    path = paper.directory / "config.py"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it has to define the dataclass `Config`")
    config_class = getattr(importlib.import_module(f"{paper.package}.config"), "Config", None)
    if not dataclasses.is_dataclass(config_class):
        raise UserError(f"{path}: has to define a dataclass `Config`")
    return config_class


def _run_job(request: Request, arm: str, seed: int, config: object, warm: tuple[str, ...]) -> Job:
    paper = request.paper
    directory = paper.runs(request.scale) / arm / str(seed)
    where = ["--scale", request.scale, "--arm", arm, "--seed", str(seed), "--out", str(directory)]
    stages, trained = [], ""
    for name in ("train", "eval"):
        key = trained = run_key(paper, name, config, arm, seed, trained)
        command = stage_command(paper, name, request.resources, [*where, *request.overrides])
        record, out = directory / f"{name}.json", directory / f"{name}.out"
        stages.append(Stage(name, tuple(command), key, record, out, warm=warm))
    return Job(arm, seed, directory, stages)


def plot_job(paper: Paper, runs: Path, done: Sequence[Job]) -> Job:
    """Draws the figures again when a run or plot.py has changed."""
    figures = runs / "figures"
    inputs = [f"{job.label} {job.stages[-1].key}" for job in done]
    key = stage_key(paper.directory / "plot.py", {}, inputs, paper.root)
    command = [sys.executable, "-m", f"{paper.package}.plot", "--runs", str(runs), "--out", str(figures)]
    record, out = figures / "plot.json", figures / "plot.out"
    return Job("figures", None, figures, [Stage("plot", tuple(command), key, record, out, writes_record=False)])


def check_free(request: Request, jobs: Sequence[Job]) -> None:
    """Says at once, not when a run's turn comes, that somebody else works on it."""
    if request.launch == "slurm":
        from shared.experiments.slurm import active_jobs

        active = active_jobs(jobs) if request.force else []  # without FORCE we go on watching them
        if active:
            ids = " ".join(active)
            raise UserError(f"FORCE=1: SLURM jobs from before are still working on these runs: `scancel {ids}` first")
        return
    for job in jobs:
        with files.lock(job.directory):
            pass


def forget(jobs: Sequence[Job]) -> None:
    """FORCE=1: nothing of these runs counts as done or begun."""
    for job in jobs:
        for name in ("train.json", "eval.json", "state.pt"):
            (job.directory / name).unlink(missing_ok=True)


def launch(request: Request, jobs: Sequence[Job], console: Console) -> None:
    paper, resources = request.paper, request.resources
    with Display(f"{paper.name}, {request.scale}", jobs, console) as display:
        if request.launch == "slurm":
            from shared.experiments.slurm import run_on_slurm

            run_on_slurm(jobs, f"{paper.name} {request.scale}", resources, display, paper.root)
        else:
            run_jobs(jobs, slots(resources, request.jobs, len(jobs)), display, paper.root)


def _totals(done: Sequence[Job]) -> dict[str, float]:
    """Over all stages of all finished runs, now or earlier."""
    records = [files.read_json(stage.record) for job in done for stage in job.stages]
    return {
        "stage_seconds": round(sum(record["seconds"] for record in records), 1),
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in records), 1),
        "peak_memory_mb": max(record["peak_memory_mb"] for record in records),
    }


# ---- what is printed ----------------------------------------------------------------------------------------------


def show_claims(results: Mapping, console: Console) -> None:
    if not results["claims"]:
        return
    table = Table("claim", "verdict", "effect [95% interval]", title=f"{results['title']}: {results['scale']}")
    for claim in results["claims"]:
        effects = [_effect(test) for test in claim["tests"]] or [claim["reason"]]
        table.add_row(f"{claim['id']}: {claim['text']}", claim["verdict"], "\n".join(effects))
    console.print(table)


def _effect(test: Mapping) -> str:
    interval = "" if test["lo"] is None else f" [{test['lo']:.3g}, {test['hi']:.3g}]"
    return f"{test['effect']:.3g}{interval}"


def _print_failures(jobs: Sequence[Job], console: Console) -> None:
    for job in jobs:
        if job.error:
            where = f" ({job.stage.out})" if job.stage else ""
            console.print(f"failed: {job.label}: {job.error}{where}", style="bold red", markup=False)


def _shown(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


def show_list(root: Path, console: Console) -> int:
    """Papers, and for each scale the verdicts in papers/NAME/results/SCALE/results.json. A paper.yaml that is
    wrong is named with the reason, and makes the exit status that of a mistake."""
    scales = [scale for scale in SCALES if scale != "smoke"]
    table = Table("paper", "title", "arXiv", *scales)
    papers, broken = load_papers(root / "papers")
    for paper in papers:
        table.add_row(paper.name, paper.title, paper.arxiv, *(_status(paper, scale) for scale in scales))
    console.print(table)
    for reason in broken.values():
        print(f"error: {reason}", file=sys.stderr)
    return EXIT_USER_ERROR if broken else 0


def _status(paper: Paper, scale: str) -> str:
    path = paper.directory / "results" / scale / "results.json"
    if scale not in paper.scales():
        return "no config"
    if not path.is_file():
        return "-"
    return ", ".join(f"{count} {verdict}" for verdict, count in tally(files.read_json(path)))


def smoke(args: argparse.Namespace, root: Path, console: Console) -> int:
    """Every paper's pipeline at scale smoke; a table of pass and fail."""
    table = Table("paper", "smoke", "time")
    failures = 0
    for name in paper_names(root / "papers"):
        begun = time.monotonic()
        asked = argparse.Namespace(**{**vars(args), "paper": name, "scale": "smoke"})
        try:
            status = reproduce(read_request(asked, root), console)
        except UserError as error:
            console.print(f"error: {error}", style="bold red", markup=False)
            status = EXIT_USER_ERROR
        except Exception:  # a broken paper must not hide the state of the others
            console.print_exception()
            status = 1
        failures += status != 0
        table.add_row(name, "FAIL" if status else "pass", duration(time.monotonic() - begun))
    console.print(table)
    return 1 if failures else 0
