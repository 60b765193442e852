"""The schema of papers/NAME/paper.yaml: who the paper is, its arms and seeds, its figures, its claims.

Unknown keys, wrong types and dangling references are errors that name the file, the key and what is allowed there.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.experiments.config import read_yaml
from shared.experiments.errors import UserError, unknown

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT / "papers"

Scale = Literal["smoke", "tiny", "gpu", "paper"]
SCALES: tuple[str, ...] = ("smoke", "tiny", "gpu", "paper")
PublishedScale = Literal["tiny", "gpu", "paper"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Strict):
    """One method under comparison: the paper's own, a baseline or an ablation."""

    title: str
    about: str = ""
    config: dict[str, Any] = {}  # laid over configs/SCALE.yaml
    scales: list[PublishedScale] = ["tiny", "gpu", "paper"]


class Figure(_Strict):
    """A figure that plot.py draws: `file`.png and .pdf under figures/."""

    file: str
    shows: str
    paper: str | None = None  # the paper's figure it corresponds to
    scales: list[PublishedScale] = ["tiny", "gpu", "paper"]


class Operand(_Strict):
    """One side of a comparison: a metric of an arm. Without `item` scores the metric is one number per seed."""

    arm: str
    metric: str


class Comparison(_Strict):
    """`a - b` (or `a` itself against `constant`) compared with `margin`, in the metric's own unit.

    greater: claimed that a - b > margin.  less: claimed that a - b < margin.  equal: claimed that |a - b| < margin.
    """

    a: Operand
    b: Operand | None = None
    constant: float | None = None
    direction: Literal["greater", "less", "equal"]
    margin: float = 0.0

    @model_validator(mode="after")
    def _one_right_side(self) -> Comparison:
        if (self.b is None) == (self.constant is None):
            raise ValueError("give exactly one of `b` (an arm's metric) and `constant` (a number)")
        if self.direction == "equal" and self.margin <= 0:
            raise ValueError("`direction: equal` needs a `margin` above 0")
        return self


class Claim(_Strict):
    """A sentence of the paper that the results can support or contradict.

    `tests` all have to hold; the claim's verdict is the worst of theirs. `not_testable` gives, for each scale where the
    claim cannot be tested, the reason.
    """

    id: str
    text: str
    where: str
    paper: dict[str, float | str] = {}  # the paper's own numbers, as printed
    tests: list[Comparison] = []
    scales: list[PublishedScale] = []
    not_testable: dict[PublishedScale, str] = {}

    @model_validator(mode="after")
    def _every_scale_once(self) -> Claim:
        both = set(self.scales) & set(self.not_testable)
        neither = {"tiny", "gpu", "paper"} - set(self.scales) - set(self.not_testable)
        if both or neither:
            raise ValueError(
                f"each scale must stand in exactly one of `scales` and `not_testable`: "
                f"{', '.join(sorted(both | neither))} stands in {'both' if both else 'neither'}"
            )
        if self.scales and not self.tests:
            raise ValueError("`tests` is empty but the claim is said to be testable")
        return self


class Paper(_Strict):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: str
    arxiv: str
    summary: str
    links: dict[str, str] = {}
    seeds: dict[PublishedScale, list[int]]
    arms: dict[str, Arm]
    figures: list[Figure] = []
    claims: list[Claim]
    path: Path  # of paper.yaml; filled in by load_paper

    @model_validator(mode="after")
    def _references(self) -> Paper:
        for claim in self.claims:
            for operand in (o for t in claim.tests for o in (t.a, t.b) if o is not None):
                if operand.arm not in self.arms:
                    raise ValueError(f"claim {claim.id}: {unknown('arm', operand.arm, self.arms)}")
                missing = set(claim.scales) - set(self.arms[operand.arm].scales)
                if missing:
                    raise ValueError(f"claim {claim.id}: arm {operand.arm!r} does not run at {', '.join(missing)}")
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) != len(ids):
            raise ValueError(f"claims: ids must differ, found {ids}")
        if not all(self.seeds.get(scale) for scale in ("tiny", "gpu", "paper")):
            raise ValueError("seeds: give a list of seeds for each of tiny, gpu, paper")
        return self

    @property
    def directory(self) -> Path:
        return self.path.parent

    def config_path(self, scale: str) -> Path:
        """configs/SCALE.yaml; `smoke` is `tiny` with every size clipped."""
        return self.directory / "configs" / f"{'tiny' if scale == 'smoke' else scale}.yaml"

    @cached_property
    def package(self) -> str:
        return f"papers.{self.name}"

    def select_arms(self, scale: str, patterns: Sequence[str] = ()) -> list[str]:
        """The arms that run at `scale`, in the paper's order; `patterns` are names or shell patterns."""
        here = [name for name, arm in self.arms.items() if ("tiny" if scale == "smoke" else scale) in arm.scales]
        if not patterns:
            return here
        for pattern in patterns:
            if not fnmatch.filter(here, pattern):
                raise unknown(f"arm at scale {scale}", pattern, here)
        return [name for name in here if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]

    def layers(self, scale: str, arm: str) -> tuple[dict, list[tuple[str, dict]]]:
        """The scale's `run:` section (resources, for the runner), and the config layers of one arm, weakest first."""
        path = self.config_path(scale)
        values = read_yaml(path)
        run = values.pop("run", {})
        arms = values.pop("arms", {})
        for name in arms:
            if name not in self.arms:
                raise UserError(f"{path}: arms: {unknown('arm', name, self.arms)}")
        shown = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        layers = [
            (shown, values),
            (f"{self.path.name}, arm {arm}", self.arms[arm].config),
            (f"{shown}, arm {arm}", arms.get(arm) or {}),
        ]
        return run, layers


def load_paper(name: str, papers: Path = PAPERS) -> Paper:
    """Reads and validates papers/NAME/paper.yaml.

    Raises:
        UserError: no such paper, or a schema violation naming file, key and the allowed values.
    """
    path = papers / name / "paper.yaml"
    if not path.is_file():
        raise unknown("paper", name, paper_names(papers))
    return validate(read_yaml(path), path)


def validate(values: dict, path: Path) -> Paper:
    try:
        paper = Paper.model_validate({**values, "path": path})
    except ValidationError as error:
        raise UserError("\n".join(_explain(path, e) for e in error.errors())) from error
    if paper.name != path.parent.name:
        raise UserError(f"{path}: name: {paper.name!r} must be the directory's name, {path.parent.name!r}")
    return paper


def paper_names(papers: Path = PAPERS) -> list[str]:
    return sorted(path.parent.name for path in papers.glob("*/paper.yaml"))


def _explain(path: Path, error: dict) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(top level)"
    if error["type"] == "extra_forbidden":
        return f"{path}: {key}: unknown key; allowed here: {', '.join(_allowed(error['loc'][:-1]))}"
    return f"{path}: {key}: {error['msg'].removeprefix('Value error, ')}"


def _allowed(location: tuple) -> list[str]:
    """Field names of the model that `location` leads to."""
    models = {"arms": Arm, "figures": Figure, "claims": Claim, "tests": Comparison, "a": Operand, "b": Operand}
    model = next((models[part] for part in reversed(location) if part in models), Paper)
    return [name for name in model.model_fields if name != "path"]
