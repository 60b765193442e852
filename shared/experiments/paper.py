"""The schema of papers/NAME/paper.yaml: who the paper is, its arms and seeds, its figures, its claims.

Unknown keys, wrong types and dangling references are errors that name the file, the key and what is allowed there.
"""

from __future__ import annotations

import fnmatch
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.experiments.config import read_yaml
from shared.experiments.errors import UserError, unknown

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT / "papers"

Scale = Literal["smoke", "tiny", "gpu", "paper"]
SCALES: tuple[str, ...] = ("smoke", "tiny", "gpu", "paper")
PublishedScale = Literal["tiny", "gpu", "paper"]
ArmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]  # names a directory and stands on command lines
Seed = Annotated[int, Field(ge=0, lt=2**32)]


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
    seeds: dict[PublishedScale, list[Seed]]
    arms: dict[ArmName, Arm] = Field(min_length=1)
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
        for scale in ("tiny", "gpu", "paper"):
            seeds = self.seeds.get(scale, [])
            if not seeds or len(set(seeds)) != len(seeds):
                raise ValueError(
                    f"seeds: give a list of different seeds for each of tiny, gpu, paper; {scale}: {seeds}"
                )
        return self

    @property
    def directory(self) -> Path:
        return self.path.parent

    @property
    def root(self) -> Path:
        """The repository's root: papers/NAME/paper.yaml stands three levels below it."""
        return self.path.parents[2]

    @property
    def package(self) -> str:
        return f"papers.{self.name}"

    def runs(self, scale: str) -> Path:
        """Where the runs of `scale` go: runs/NAME/SCALE, one directory ARM/SEED each."""
        return self.root / "runs" / self.name / scale

    def scales(self) -> list[str]:
        """The scales that have a config file."""
        return [scale for scale in SCALES if self.config_path(scale).is_file()]

    def config_path(self, scale: str) -> Path:
        """configs/SCALE.yaml; `smoke` is `tiny` with every size clipped."""
        return self.directory / "configs" / f"{'tiny' if scale == 'smoke' else scale}.yaml"

    def select_arms(self, scale: str, patterns: Sequence[str] = ()) -> list[str]:
        """The arms that run at `scale`, in the paper's order; `patterns` are names or shell patterns."""
        here = [name for name, arm in self.arms.items() if ("tiny" if scale == "smoke" else scale) in arm.scales]
        if not here:
            raise UserError(f"{self.path}: no arm runs at scale {scale}")
        if not patterns:
            return here
        for pattern in patterns:
            if not fnmatch.filter(here, pattern):
                raise unknown(f"arm at scale {scale}", pattern, here)
        return [name for name in here if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]

    def layers(self, scale: str, arm: str) -> tuple[dict, list[tuple[str, dict]]]:
        """The scale's `run:` section (resources, for the runner), and the config layers of one arm, weakest first."""
        path = self.config_path(scale)
        shown = str(path.relative_to(self.root))
        values = read_yaml(path)
        run, arms = (self._section(values, name, shown) for name in ("run", "arms"))
        for name in arms:
            if name not in self.arms:
                raise UserError(f"{shown}: arms: {unknown('arm', name, self.arms)}")
        layers = [
            (shown, values),
            (f"{self.path.name}, arm {arm}", self.arms[arm].config),
            (f"{shown}, arm {arm}", self._section(arms, arm, f"{shown}: arms")),
        ]
        return run, layers

    @staticmethod
    def _section(values: dict, name: str, where: str) -> dict:
        section = values.pop(name, None) or {}
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name}: expected a mapping, found {section!r}")
        return section


def load_paper(name: str, papers: Path = PAPERS) -> Paper:
    """Reads and validates papers/NAME/paper.yaml.

    Raises:
        UserError: no such paper, or a schema violation naming file, key and the allowed values.
    """
    path = Path(papers).resolve() / name / "paper.yaml"
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


def load_papers(papers: Path = PAPERS) -> tuple[list[Paper], dict[str, str]]:
    """All papers whose paper.yaml is in order, and for each of the others, by name, what is wrong with it."""
    found, broken = [], {}
    for name in paper_names(papers):
        try:
            found.append(load_paper(name, papers))
        except UserError as error:
            broken[name] = str(error)
    return found, broken


def _explain(path: Path, error: dict) -> str:
    key = ".".join(str(part) for part in error["loc"])
    where = f"{path}: {key}" if key else str(path)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; allowed here: {', '.join(_allowed(error['loc'][:-1]))}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"


def _allowed(location: tuple) -> list[str]:
    """Field names of the model that `location` leads to."""
    kind: Any = Paper
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation
            if isinstance(kind, types.UnionType):  # `Operand | None`
                kind = typing.get_args(kind)[0]
        else:  # a key of a dict or an index of a list
            kind = typing.get_args(kind)[-1]
    return [name for name in kind.model_fields if name != "path"]
